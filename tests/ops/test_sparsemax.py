"""sparsemax against float64 sorting and answers known beforehand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_sae
from tests.ops.reference import scores, sparsemax_rows

IMPLEMENTATIONS = ["xla", "xla on a TPU", "xla on a GPU", "sort"]

sparsemax = jax.jit(jax_sae.sparsemax, static_argnames=("axis", "implementation"))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("width", [1, 2, 129, 1024, 5000])
def test_equals_float64_sorting_at_every_scale(implementation, width):
    z = np.concatenate([scores(7, width, scale) for scale in (1e-4, 1e-3, 0.01, 0.1, 1.0, 100.0)])
    z = np.concatenate([z, np.round(4 * scores(7, width)) / 8])  # ties
    expected, _, _ = sparsemax_rows(z)
    got = np.asarray(sparsemax(z, implementation=implementation))
    np.testing.assert_allclose(got, expected, atol=3e-7)
    np.testing.assert_array_equal(got > 0, expected > 0)
    np.testing.assert_allclose(got.sum(-1, dtype=np.float64), 1, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("offset", [1000.0, -1000.0, 1e6])
def test_an_offset_common_to_a_row_costs_nothing(implementation, offset):
    z = scores(16, 700, 0.1) + np.float32(offset)  # rounded to what float32 holds, then equal in both precisions
    np.testing.assert_allclose(sparsemax(z, implementation=implementation), sparsemax_rows(z)[0], atol=3e-7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_with_a_known_answer(implementation):
    inf = np.inf
    rows = [
        ([7.0, 7.0, 7.0, 7.0], [0.25, 0.25, 0.25, 0.25]),
        ([-0.0, 0.0, 0.0, -0.0], [0.25, 0.25, 0.25, 0.25]),
        ([1.0, 1.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]),
        ([1.0, 0.0, -5.0, 0.0], [1.0, 0.0, 0.0, 0.0]),
        ([1e30, -1e30, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]),
        ([1e30, 1e30, 1e30, 9e29], [1 / 3, 1 / 3, 1 / 3, 0.0]),
        ([3e38, -3e38, -3e38, 3e38], [0.5, 0.0, 0.0, 0.5]),
        ([-1e30, -1e30, -2e30, -1e30], [1 / 3, 1 / 3, 0.0, 1 / 3]),
        ([0.5, -inf, 0.5, -inf], [0.5, 0.0, 0.5, 0.0]),
        ([-40.0, -40.5, -42.0, -inf], [0.75, 0.25, 0.0, 0.0]),
        ([-inf, -inf, -inf, -1e30], [0.0, 0.0, 0.0, 1.0]),
    ]
    z, expected = (np.array(column, np.float32) for column in zip(*rows, strict=True))
    np.testing.assert_allclose(sparsemax(z, implementation=implementation), expected, atol=1e-7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("width", [4, 3000])
def test_rows_without_a_projection_are_nan_and_leave_others_alone(implementation, width):
    z = scores(12, width)
    z[1, width // 2], z[2, 0], z[3], z[4, :2], z[9, -1] = np.nan, np.inf, -np.inf, (np.nan, np.inf), np.nan
    got = np.asarray(sparsemax(z, implementation=implementation))
    undefined = [1, 2, 3, 4, 9]
    assert np.isnan(got[undefined]).all()
    np.testing.assert_allclose(np.delete(got, undefined, 0), sparsemax_rows(np.delete(z, undefined, 0))[0], atol=3e-7)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_any_axis_of_any_batch(axis):
    z = scores(6, 20).reshape(2, 3, 20)
    moved = np.moveaxis(z, axis, -1)
    expected = np.moveaxis(sparsemax_rows(moved.reshape(-1, moved.shape[-1]))[0].reshape(moved.shape), -1, axis)
    np.testing.assert_allclose(sparsemax(z, axis=axis), expected, atol=3e-7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_where_leaves_entries_out(implementation):
    z, keep = scores(6, 40), np.random.default_rng(1).random((6, 40)) > 0.5
    z[~keep] = 1e9  # NaN too may stand in an entry that takes no part
    z[0, np.flatnonzero(~keep[0])[0]] = np.nan
    keep[5] = False
    got = np.asarray(sparsemax(z, where=keep, implementation=implementation))
    for row in range(5):
        np.testing.assert_allclose(got[row, keep[row]], sparsemax_rows(z[row, keep[row]][None])[0][0], atol=3e-7)
        assert not got[row, ~keep[row]].any()
    assert np.isnan(got[5]).all()


def test_where_is_broadcast_before_the_axis_moves():
    z, keep = scores(6, 5).reshape(2, 3, 5), np.array([True, False, True])[:, None]
    got = np.asarray(sparsemax(z, axis=1, where=keep))
    expected = sparsemax_rows(np.moveaxis(z[:, [0, 2]], 1, -1).reshape(-1, 2))[0].reshape(2, 5, 2)
    np.testing.assert_allclose(got[:, [0, 2]], np.moveaxis(expected, -1, 1), atol=3e-7)
    assert not got[:, 1].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_projected_in_float32(dtype, implementation):
    z = jnp.asarray(scores(8, 300, 0.1), dtype)
    got = sparsemax(z, implementation=implementation)
    assert got.dtype == dtype
    expected = sparsemax_rows(np.asarray(z, np.float64))[0]
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=float(jnp.finfo(dtype).eps), atol=3e-7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float64_stays_float64(implementation):
    with jax.enable_x64(True):
        z = np.random.default_rng(0).standard_normal((4, 1500)) * 0.05
        got = sparsemax(jnp.asarray(z), implementation=implementation)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, sparsemax_rows(z)[0], atol=1e-15)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.int8, jnp.uint8])
def test_integers_become_float32(dtype):
    got = sparsemax(jnp.array([3, 3, 1], dtype))
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, [0.5, 0.5, 0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_empty_batches_pass(implementation):
    assert sparsemax(jnp.zeros((0, 5)), implementation=implementation).shape == (0, 5)
    assert sparsemax(jnp.zeros((3, 0, 5)), axis=0, implementation=implementation).shape == (3, 0, 5)
    tau, count = jax_sae.sparsemax_threshold(jnp.zeros((3, 0, 5)), implementation=implementation)
    assert tau.shape == count.shape == (3, 0)


@pytest.mark.parametrize("function", [jax_sae.sparsemax, jax_sae.sparsemax_threshold])
def test_what_has_no_projection_is_refused(function):
    with pytest.raises(ValueError, match=r"shape \(3, 0\), empty along axis -1"):
        function(jnp.zeros((3, 0)))
    with pytest.raises(ValueError, match="axis is 2 for scores of shape"):
        function(jnp.zeros((3, 4)), axis=2)
    with pytest.raises(ValueError, match="axis is -1 for scores of shape"):
        function(jnp.float32(1.0))
    with pytest.raises(ValueError, match="implementation is 'fast'; expected None or one of xla, sort, pallas_tpu"):
        function(jnp.zeros((0, 3)), implementation="fast")
