"""CKNNA against its float64 definition with whole kernels, ties included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_sae.metrics import AlignmentSums, cknna, on_host
from tests.metrics.batching import sharded, streamed

N = 320


def nearest(kernel, neighbors):
    """0/1 [n, n]: the largest entries of each row but the diagonal; of equal ones those of lower index."""
    kernel = kernel.copy()
    np.fill_diagonal(kernel, -np.inf)
    mask = np.zeros_like(kernel)
    np.put_along_axis(mask, np.argsort(-kernel, axis=-1, kind="stable")[:, :neighbors], 1, -1)
    return mask


def unbiased_hsic(k, other):
    n = len(k)
    k, other = k * (1 - np.eye(n)), other * (1 - np.eye(n))
    sums = (k * other.T).sum() + k.sum() * other.sum() / ((n - 1) * (n - 2)) - 2 * (k @ other).sum() / (n - 2)
    return sums / (n * (n - 3))


def definition(a, b, neighbors=10):
    a, b = a.astype(np.float64), b.astype(np.float64)
    k, other = a @ a.T, b @ b.T
    mask_a, mask_b = nearest(k, neighbors), nearest(other, neighbors)
    both = mask_a * mask_b
    of_a, of_b = mask_a * k, mask_b * other
    with np.errstate(invalid="ignore"):
        scale = np.sqrt(unbiased_hsic(of_a, of_a) * unbiased_hsic(of_b, of_b))
    return unbiased_hsic(both * k, both * other) / (scale + 1e-6)


@functools.cache
def pair(kind):
    """Two representations in whole numbers, so that float32 kernels are exact and ties are ties."""
    rng = np.random.default_rng(0)
    a = np.round(8 * rng.standard_normal((N, 12)))
    b = np.round(8 * (a @ rng.standard_normal((12, 20)) / 20 + rng.standard_normal((N, 20))))
    sparse = np.maximum(b - 12, 0)
    return {
        "related": (a, b),
        "unrelated": (a, np.round(8 * rng.standard_normal((N, 5)))),
        "with itself": (a, a),
        "few values": (np.sign(a[:, :3]), np.sign(b[:, :2])),
        "duplicate rows": (a[rng.integers(0, 30, N)], b[rng.integers(0, 25, N)]),
        "sparse": (a, sparse),
        "some rows silent": (a, np.where(np.arange(N)[:, None] % 3 == 0, 0, sparse)),
        "all activations zero": (a, 0 * b),
        "constant rows": (a, np.full((N, 4), 3.0)),
        "far from zero": (a + 1000, b),
        "one feature": (a[:, :1], b[:, :1]),
    }[kind]


KINDS = [
    "related",
    "unrelated",
    "with itself",
    "few values",
    "duplicate rows",
    "sparse",
    "some rows silent",
    "all activations zero",
    "constant rows",
    "far from zero",
    "one feature",
]


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_definition(kind):
    a, b = pair(kind)
    assert float(cknna(a, b)) == pytest.approx(definition(a, b), rel=2e-5, abs=3e-6)


@pytest.mark.parametrize("kind", ["related", "duplicate rows", "some rows silent"])
@pytest.mark.parametrize("neighbors", [1, 3, 40])
def test_any_number_of_neighbors(kind, neighbors):
    a, b = pair(kind)
    assert float(cknna(a, b, neighbors=neighbors)) == pytest.approx(definition(a, b, neighbors), rel=2e-5)


@pytest.mark.parametrize("kind", ["related", "duplicate rows", "some rows silent", "all activations zero"])
def test_rows_spread_over_eight_devices_have_the_same_value(kind):
    a, b = pair(kind)
    got = sharded(AlignmentSums.of_batch, a.astype(np.float32), b.astype(np.float32)).compute()
    assert got["cknna"] == pytest.approx(definition(a, b), rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("n", [1024, 1025, 1300])
def test_blocks_of_rows_leave_no_seam(n):
    rng = np.random.default_rng(n)
    a, b = np.round(8 * rng.standard_normal((n, 6))), np.round(3 * rng.standard_normal((n, 4)))
    b[:, :2] += a[:, :2]
    expected = definition(a, b)
    assert expected > 0.02
    assert float(cknna(a, b)) == pytest.approx(expected, rel=2e-5)


def test_few_rows_down_to_the_fewest():
    for n, neighbors in ((11, 10), (4, 3), (8, 2)):
        a, b = pair("related")
        expected = definition(a[:n], b[:n], neighbors)
        assert float(cknna(a[:n], b[:n], neighbors=neighbors)) == pytest.approx(expected, rel=1e-4, nan_ok=True)


def test_a_representation_is_aligned_with_its_rotations_and_multiples_alone():
    rng = np.random.default_rng(1)
    a = rng.standard_normal((N, 16))
    turned = a @ np.linalg.qr(rng.standard_normal((16, 16)))[0]
    assert float(cknna(a, 3 * turned)) == pytest.approx(1, abs=1e-3)
    assert abs(float(cknna(a, rng.standard_normal((N, 16))))) < 0.1


def test_rows_so_long_that_the_squares_of_kernels_pass_float32():
    a, b = pair("related")
    assert float(cknna(2.0**20 * a, 2.0**20 * b)) == pytest.approx(definition(a, b), rel=2e-5)


def test_the_mean_over_batches():
    a, b = (array.astype(np.float32) for array in pair("related"))
    sums = streamed(AlignmentSums.of_batch, a, b, size=64)
    expected = [definition(a[i : i + 64], b[i : i + 64]) for i in range(0, N, 64)]
    assert sums.batches == 5 and sums.compute()["cknna"] == pytest.approx(np.mean(expected), rel=2e-5)


def test_ten_thousand_rows_never_meet_in_one_matrix():
    n = 10_000
    rows = jax.ShapeDtypeStruct((n, 8), jnp.float32)
    memory = cknna.lower(rows, rows).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * n * n / 2, "half of one kernel in float32"


def test_what_cannot_be_compared_is_refused():
    a, b = pair("related")
    with pytest.raises(ValueError, match="cknna got 320 rows and 319 rows; expected two representations of the same"):
        cknna(a, b[1:])
    with pytest.raises(ValueError, match="cknna got 10 rows; expected at least 11 for 10 neighbors"):
        cknna(a[:10], b[:10])
    with pytest.raises(ValueError, match="cknna got 3 rows; expected at least 4 for 1 neighbors"):
        cknna(a[:3], b[:3], neighbors=1)


def test_sums_of_batches_are_float64_on_the_host():
    sums = on_host(AlignmentSums(jnp.int32(1), jnp.float32(0.1)))
    total = functools.reduce(AlignmentSums.merge, [sums] * 10_000)
    assert total.compute()["cknna"] == pytest.approx(float(np.float32(0.1)), rel=1e-12)
