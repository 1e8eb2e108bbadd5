"""The TPU kernel of sparsemax in Pallas' interpreters, against float64 sorting.

``InterpretParams`` models the memories of a TPU: what was not written is NaN, what is outside raises. The public
functions are run by the plain interpreter, which is faster and knows nothing of that.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_sae import sparsemax, sparsemax_jvp, sparsemax_threshold
from jax_sae.ops.sparsemax import pallas_tpu, pallas_tpu_kernel
from tests.ops.reference import jacobian, scores, sparsemax_rows
from tests.ops.test_threshold import crowded

BY_KERNEL = {"implementation": "pallas_tpu"}


@pytest.fixture(autouse=True)
def no_races(capfd):
    """Older versions of JAX print what newer ones raise."""
    yield
    assert "RACE DETECTED" not in capfd.readouterr().out


def modelled(kernel, z, **params):
    """The kernel's outputs, with the memories of a TPU modelled and races looked for."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, **params)):
        outputs = jax.jit(lambda z: kernel(z))(jnp.asarray(z))
    return [np.asarray(out) for out in outputs]


def interpreted(f, *arrays):
    with pltpu.force_tpu_interpret_mode(True):
        return jax.jit(lambda *arrays: f(*arrays))(*arrays)


def assert_is_sparsemax(z, p, found):
    """``p`` and (top, tau, count) are those of the finite or -inf scores ``z``."""
    expected, expected_tau, expected_count = sparsemax_rows(np.asarray(z, np.float64))
    rounding = float(jnp.finfo(z.dtype).eps) if z.dtype == jnp.bfloat16 else 0
    np.testing.assert_allclose(np.asarray(p, np.float64), expected, rtol=rounding, atol=3e-7)
    np.testing.assert_array_equal(p > 0, expected > 0)
    top, tau, count = found
    np.testing.assert_allclose((top + tau)[:, 0], expected_tau, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(count[:, 0], expected_count)


# Rows of one chunk and of several, whole and ragged; batches of one block and of several, whole and ragged.
@pytest.mark.parametrize("rows, width", [(1, 1), (7, 2), (67, 129), (8, 1024), (9, 2048), (21, 5000)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equals_float64_sorting_at_every_scale(rows, width, dtype):
    scales = np.resize([1e-4, 0.01, 0.1, 1.0, 100.0], rows)[:, None].astype(np.float32)
    z = jnp.asarray(scales * scores(rows, width), dtype)
    (p,) = modelled(pallas_tpu._project_kernel, z)
    assert p.dtype == dtype
    assert_is_sparsemax(z, p, modelled(pallas_tpu._threshold_kernel, z))


def test_ties_offsets_and_large_numbers():
    ties, far, large = np.round(4 * scores(4, 1500)) / 8, scores(3, 1500, 0.1) + np.float32(1e6), scores(3, 1500)
    large[0, :3], large[1, [0, 1499]], large[2] = (1e30, 1e30, 9e29), 3e38, -1e30
    z = np.concatenate([ties, far, large, scores(2, 1500) - 1000]).astype(np.float32)
    z[3, 700:] = -np.inf
    (p,) = modelled(pallas_tpu._project_kernel, z)
    assert_is_sparsemax(z, p, modelled(pallas_tpu._threshold_kernel, z))


@pytest.mark.parametrize("width", [4, 3000])
def test_rows_without_a_projection_are_nan_with_count_0_and_leave_others_alone(width):
    z = scores(12, width)
    z[1, width // 2], z[2, 0], z[3], z[4, :2], z[9, -1] = np.nan, np.inf, -np.inf, (np.nan, np.inf), np.nan
    undefined = [1, 2, 3, 4, 9]
    (p,), found = modelled(pallas_tpu._project_kernel, z), modelled(pallas_tpu._threshold_kernel, z)
    assert np.isnan(p[undefined]).all() and np.isnan(found[1][undefined]).all() and not found[2][undefined].any()
    assert_is_sparsemax(*(np.delete(x, undefined, 0) for x in (z, p)), [np.delete(x, undefined, 0) for x in found])


@pytest.mark.parametrize("width", [4, 3000])
def test_nan_is_seen_where_a_maximum_drops_it(monkeypatch, width):
    """As it may in hardware: nothing but the sums then tells of it."""
    monkeypatch.setattr(pallas_tpu_kernel.jnp, "maximum", jnp.fmax)
    z = scores(5, width)
    z[1, width // 2], z[3, -1] = np.nan, np.nan
    (p,) = modelled(pallas_tpu._project_kernel, z)
    np.testing.assert_array_equal(np.isnan(p).any(-1), np.isnan(p).all(-1))
    np.testing.assert_array_equal(np.isnan(p).all(-1), [False, True, False, True, False])


def test_a_block_is_independent_of_what_stands_beyond_the_last_row():
    z = scores(3, 1300, 0.1)
    results = [modelled(pallas_tpu._threshold_kernel, z, uninitialized_memory=kind) for kind in ("nan", "zero")]
    for of_nan, of_zero in zip(*results, strict=True):
        np.testing.assert_array_equal(of_nan, of_zero)


@pytest.mark.parametrize("width", [33, 1100])
def test_newton_ends_where_rounding_decides_the_support(monkeypatch, width):
    """A third of these rows would go up and down for ever if only an unchanged count ended it."""
    z, results = crowded(1000, width), []
    for sweeps in (30, 31):
        monkeypatch.setattr(pallas_tpu_kernel, "_MAX_SWEEPS", sweeps)
        results.append([np.asarray(out) for out in interpreted(lambda z: pallas_tpu._threshold_kernel(z), z)])
    for after_30, after_31 in zip(*results, strict=True):
        np.testing.assert_array_equal(after_30, after_31)
    top, tau, _ = results[0]
    np.testing.assert_allclose((top + tau)[:, 0], sparsemax_rows(z)[1], atol=5e-7)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_rows_too_long_for_two_blocks_are_read_one_block_at_a_time(monkeypatch, blocks):
    z = scores(19, 3000, 0.1)
    monkeypatch.setattr(pallas_tpu, "_usable_memory", lambda: blocks * 32 * 3000)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        (p,) = jax.jit(lambda z: pallas_tpu._project_kernel(z))(z)
    np.testing.assert_allclose(p, sparsemax_rows(z)[0], atol=3e-7)
    monkeypatch.setattr(pallas_tpu, "_usable_memory", lambda: 32 * 3000 - 1)
    with pytest.raises(ValueError, match="rows have 3000 scores; the TPU kernel holds 8 rows in 0 MiB"):
        sparsemax(z, **BY_KERNEL)


def test_public_functions_along_any_axis_with_a_mask():
    z, keep = scores(10, 70, 0.3).reshape(2, 70, 5), np.random.default_rng(1).random((70, 1)) > 0.5
    chosen = {"axis": 1, "where": keep, **BY_KERNEL}
    p = interpreted(functools.partial(sparsemax, **chosen), z)
    tau, count = interpreted(functools.partial(sparsemax_threshold, **chosen), z)
    rows = np.moveaxis(z[:, keep[:, 0]], 1, -1)
    expected, expected_tau, expected_count = sparsemax_rows(rows.reshape(10, -1))
    np.testing.assert_allclose(p[:, keep[:, 0]], np.moveaxis(expected.reshape(rows.shape), -1, 1), atol=3e-7)
    np.testing.assert_allclose(tau, expected_tau.reshape(2, 5), atol=1e-6)
    np.testing.assert_array_equal(count, expected_count.reshape(2, 5))


def test_derivatives_are_the_closed_form():
    z, g = scores(6, 300, 0.2), scores(6, 300, seed=1)
    expected = sparsemax_rows(z)[0]
    products = np.stack([jacobian(row) @ vector for row, vector in zip(expected, g.astype(float), strict=True)])
    f = functools.partial(sparsemax, **BY_KERNEL)
    np.testing.assert_allclose(interpreted(lambda z, g: jax.vjp(f, z)[1](g)[0], z, g), products, atol=2e-6)
    np.testing.assert_allclose(interpreted(lambda z, g: sparsemax_jvp(z, g, **BY_KERNEL)[1], z, g), products, atol=2e-6)
    threshold = lambda z: jnp.sum(sparsemax_threshold(z, **BY_KERNEL)[0])
    mean = (expected > 0) / (expected > 0).sum(-1, keepdims=True)
    np.testing.assert_allclose(interpreted(jax.grad(threshold), z), mean, atol=1e-6)


def test_vmapped_axes_become_rows_of_one_kernel():
    z = scores(12, 150, 0.2).reshape(3, 4, 150)
    f = functools.partial(sparsemax, **BY_KERNEL)
    expected = sparsemax_rows(z.reshape(12, 150))[0].reshape(z.shape)
    np.testing.assert_allclose(interpreted(jax.vmap(jax.vmap(f)), z), expected, atol=3e-7)
    np.testing.assert_allclose(interpreted(jax.vmap(f, in_axes=1, out_axes=1), z), expected, atol=3e-7)
    count = interpreted(jax.vmap(lambda z: sparsemax_threshold(z, **BY_KERNEL)[1], in_axes=1, out_axes=1), z)
    np.testing.assert_array_equal(count, (expected > 0).sum(-1))


@pytest.mark.parametrize("kernel", [pallas_tpu._project_kernel, pallas_tpu._threshold_kernel])
def test_devices_solve_their_rows_inside_shard_map(kernel):
    """With the check of varying axes on: the outputs vary as the scores do."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    z = scores(16, 300, 0.1)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        outputs = jax.jit(jax.shard_map(lambda z: kernel(z), mesh=mesh, in_specs=P("data"), out_specs=P("data")))(z)
    expected, tau, _ = sparsemax_rows(z)
    if len(outputs) == 1:
        np.testing.assert_allclose(outputs[0], expected, atol=3e-7)
    else:
        np.testing.assert_allclose((outputs[0] + outputs[1])[:, 0], tau, atol=1e-6)


def test_what_the_kernel_does_not_take_is_refused_by_name_and_passed_on_by_default():
    with jax.enable_x64(True):
        z = jnp.zeros((2, 4), jnp.float64)
        with pytest.raises(ValueError, match="scores are float64; the TPU kernel takes float32 and bfloat16"):
            sparsemax(z, **BY_KERNEL)
        assert sparsemax(z).dtype == jnp.float64
    with pytest.raises(ValueError, match="scores are float16; the TPU kernel takes float32 and bfloat16"):
        sparsemax_threshold(jnp.zeros((2, 4), jnp.float16), **BY_KERNEL)
    with pytest.raises(ValueError, match="axis_name is 'model'; the TPU kernel needs whole rows"):
        jax.vmap(lambda z: sparsemax(z, axis_name="model", **BY_KERNEL), axis_name="model")(jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match="interpret mode is supported on CPU"):
        sparsemax(jnp.zeros((2, 4)), **BY_KERNEL)


def test_integers_and_empty_batches_pass():
    p = interpreted(functools.partial(sparsemax, **BY_KERNEL), np.array([3, 3, 1]))
    np.testing.assert_array_equal(p, [0.5, 0.5, 0])
    assert sparsemax(jnp.zeros((0, 5)), **BY_KERNEL).shape == (0, 5)
    assert sparsemax_threshold(jnp.zeros((3, 0, 5)), **BY_KERNEL)[1].shape == (3, 0)


def test_numbers_of_64_bits_by_default_change_nothing():
    z = scores(9, 1500, 0.1)
    with jax.enable_x64(True):
        (p,), found = modelled(pallas_tpu._project_kernel, z), modelled(pallas_tpu._threshold_kernel, z)
        gradient = interpreted(jax.grad(lambda z: sparsemax(z, **BY_KERNEL)[:, 0].sum()), z)
    assert [x.dtype for x in (p, *found, gradient)] == ["float32", "float32", "float32", "int32", "float32"]
    assert_is_sparsemax(z, p, found)
