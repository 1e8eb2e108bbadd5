"""Selection of the largest scores against NumPy sorting."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_sae import batch_top_k_threshold, top_k_mask
from jax_sae.ops import top_k_threshold
from jax_sae.ops.largest import top_k


def test_top_k_mask_equals_a_stable_sort():
    z = np.random.default_rng(0).integers(-4, 5, (50, 30)).astype(np.float32)  # many ties
    for k in (1, 7, 30):
        expected = np.zeros(z.shape, bool)
        np.put_along_axis(expected, np.argsort(-z, axis=-1, kind="stable")[:, :k], True, -1)
        np.testing.assert_array_equal(top_k_mask(jnp.asarray(z), k), expected)


def test_top_k_is_that_of_the_definition_whatever_k_is_rounded_up_to(run_as):
    run_as("tpu")
    z = jnp.asarray(np.random.default_rng(0).standard_normal((5, 700)), jnp.float32)
    for k in (1, 128, 129, 512, 513, 700):
        for found, expected in zip(top_k(z, k), jax.lax.top_k(z, k), strict=True):
            np.testing.assert_array_equal(found, expected)


ADVERSARIAL = {
    "normal": lambda rng: rng.standard_normal((6, 3000)),
    "ties": lambda rng: rng.integers(-4, 5, (6, 3000)),
    "all equal": lambda rng: np.full((6, 3000), 0.25),
    "positive part": lambda rng: np.maximum(rng.standard_normal((6, 3000)), 0),
    "few large": lambda rng: np.where(rng.random((6, 3000)) < 0.003, 1e30, -1e-30),
    "minus infinity": lambda rng: np.where(rng.random((6, 3000)) < 0.01, rng.standard_normal((6, 3000)), -np.inf),
    "short": lambda rng: rng.integers(0, 3, (6, 40)),
}


@pytest.fixture(params=["cpu", "tpu", "gpu"])
def platform(request, run_as):
    run_as(request.param)


@pytest.fixture
def mask_of(platform):
    return lambda z, k: np.asarray(top_k_mask(jnp.asarray(z), k))


@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_the_mask_is_that_of_a_stable_sort(mask_of, kind):
    z = ADVERSARIAL[kind](np.random.default_rng(3)).astype(np.float32)
    order = np.argsort(-z, axis=-1, kind="stable")
    for k in (1, 8, 33, 40) if kind == "short" else (1, 17, 600, 2999):
        expected = np.zeros(z.shape, bool)
        np.put_along_axis(expected, order[:, :k], True, -1)
        np.testing.assert_array_equal(mask_of(z, k), expected)


def test_float64_scores_that_float32_cannot_tell_apart_are_told_apart(mask_of):
    with jax.enable_x64(True):
        z = 1 + 1e-12 * np.random.default_rng(0).permutation(3000)[None]
        expected = np.zeros(z.shape, bool)
        np.put_along_axis(expected, np.argsort(-z)[:, :40], True, -1)
        np.testing.assert_array_equal(mask_of(z, 40), expected)


@pytest.mark.parametrize("sign", [1, -1])
def test_nan_of_either_sign_is_the_largest(mask_of, sign, request):
    """A TPU may keep more of a row with NaN, never less."""
    more = "tpu" in request.node.name
    z = np.random.default_rng(0).standard_normal((3, 2000)).astype(np.float32)
    z[0, 7] = np.inf
    z[1, ::400] = np.copysign(np.float32(np.nan), sign)
    z[2] = np.copysign(np.float32(np.nan), sign)
    for k in (2, 5, 9):
        mask = mask_of(z, k)
        kept, of_nan = mask.sum(-1), mask[1, ::400].sum()
        assert (kept >= k).all() and of_nan >= min(k, 5) and mask[0, 7] and mask[2, :k].all()
        assert more or ((kept == k).all() and of_nan == min(k, 5))


def test_top_k_mask_takes_leading_dimensions_and_is_a_constant():
    z = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 9)), jnp.float32)
    np.testing.assert_array_equal(top_k_mask(z, 4).reshape(6, 9), top_k_mask(z.reshape(6, 9), 4))
    gradient = jax.grad(lambda z: jnp.sum(jnp.where(top_k_mask(z, 4), 2 * z, 0.0)))(z)
    np.testing.assert_array_equal(gradient, 2.0 * np.asarray(top_k_mask(z, 4)))


def test_top_k_mask_keeps_a_traced_number_of_the_k():
    z = jnp.asarray(np.random.default_rng(0).integers(-4, 5, (50, 30)), jnp.float32)  # many ties
    masked = jax.jit(top_k_mask, static_argnums=1)
    for keep in (1, 7, 12):
        np.testing.assert_array_equal(masked(z, 12, jnp.int32(keep)), top_k_mask(z, keep))
    np.testing.assert_array_equal(masked(z, 12, jnp.int32(13)), top_k_mask(z, 12))
    assert not masked(z, 12, jnp.int32(0)).any()


def test_top_k_mask_keeps_another_number_for_every_member_of_a_batch():
    z = jnp.asarray(np.random.default_rng(1).standard_normal((3, 5, 9)), jnp.float32)
    kept = jax.vmap(lambda rows, keep: top_k_mask(rows, 6, keep))(z, jnp.array([1, 4, 6]))
    np.testing.assert_array_equal(kept, jnp.stack([top_k_mask(z[i], k) for i, k in enumerate((1, 4, 6))]))


@pytest.mark.parametrize("k", [0, 10])
def test_top_k_mask_names_a_k_out_of_range(k):
    with pytest.raises(ValueError, match=f"k is {k} for rows of 9 scores"):
        top_k_mask(jnp.zeros((2, 9)), k)


@pytest.mark.parametrize("k", [20, 384, 600])
def test_no_whole_row_is_sorted(k):
    """XLA makes a sort, a hundred times slower, of taking the k largest and then the last of them, if it may."""
    program = jax.jit(functools.partial(top_k_mask, k=k)).lower(jnp.zeros((4, 40_000))).compile()
    assert " sort(" not in program.as_text()


@pytest.mark.parametrize("kind", ["normal", "positive part", "ties", "tiny", "huge", "next to each other", "one row"])
@pytest.mark.parametrize(
    ("width", "count"),
    [*((40, count) for count in (1, 2, 37, 799, 800)), *((3000, count) for count in (20, 900, 55_000))],
)
def test_batch_threshold_is_the_count_th_largest(kind, width, count):
    """Short rows; and long ones, of which the last count is of more than there are maxima of groups."""
    z = np.random.default_rng(5).standard_normal((20, width)).astype(np.float32)
    z = {
        "normal": z,
        "positive part": np.maximum(z, 0),
        "ties": np.round(z),
        "tiny": z * np.float32(1e-38),
        "huge": z * np.float32(1e37),
        "next to each other": np.random.default_rng(5)
        .permutation(0x3F800000 + np.arange(z.size, dtype=np.int32))
        .view(np.float32)
        .reshape(z.shape),
        "one row": z + 100 * (np.arange(20)[:, None] == 3).astype(np.float32),  # that has most of what is large
    }[kind]
    with np.errstate(under="ignore"):
        assert batch_top_k_threshold(jnp.asarray(z), count) == np.sort(z.ravel())[-count]


def test_batch_threshold_takes_a_traced_count():
    z = np.random.default_rng(5).standard_normal((20, 40)).astype(np.float32)
    counts = jnp.array([1, 37, 800])
    found = jax.jit(jax.vmap(batch_top_k_threshold, in_axes=(None, 0)))(z, counts)
    np.testing.assert_array_equal(found, np.sort(z.ravel())[-np.asarray(counts)])


@pytest.mark.parametrize("width", [50, 3000])
@pytest.mark.parametrize("first", [0.0, 100.0])
def test_batch_threshold_over_eight_devices_is_that_of_the_whole_batch(width, first):
    """Also where one device has most of what is large."""
    z = np.random.default_rng(6).standard_normal((32, width)).astype(np.float32)
    z[0] += first
    f = jax.pmap(functools.partial(batch_top_k_threshold, count=1000, axis_name="data"), axis_name="data")
    np.testing.assert_array_equal(f(z.reshape(8, 4, width)), np.full(8, np.sort(z.ravel())[-1000]))


@pytest.mark.parametrize("count", [0, 13])
def test_batch_threshold_names_a_count_out_of_range(count):
    with pytest.raises(ValueError, match=f"count is {count} for a batch of 12 scores"):
        batch_top_k_threshold(jnp.zeros((3, 4)), count)


@pytest.mark.parametrize("kind", ["normal", "ties", "extremes"])
@pytest.mark.parametrize("k", [1, 7, 30])
def test_row_threshold_is_the_kth_largest_of_each_row(kind, k, platform):
    rng = np.random.default_rng(2)
    z = {
        "normal": rng.standard_normal((50, 30)),
        "ties": rng.integers(-2, 3, (50, 30)),
        "extremes": rng.choice([-np.inf, np.inf, 1e30, -1e30, 1e-38, -1e-38], (50, 30)),
    }[kind].astype(np.float32)
    np.testing.assert_array_equal(jax.jit(top_k_threshold, static_argnums=1)(z, k), -np.sort(-z, axis=-1)[:, k - 1])
