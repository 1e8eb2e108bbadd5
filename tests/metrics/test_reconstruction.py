"""FVU, NMSE and cosine similarity against float64 NumPy, however rows are batched."""

import functools

import jax
import numpy as np
import pytest

from jax_sae.metrics import ReconstructionSums, on_host
from tests.metrics.batching import jitted, sharded, streamed

N, D = 320, 24
KINDS = [
    "plain",
    "far from zero",
    "very far from zero",
    "of many sizes",
    "repeated",
    "some constant",
    "some zero",
    "badly reconstructed",
]


def definition(x, x_hat):
    """Every number in float64, straight from its formula."""
    x, x_hat = x.astype(np.float64), x_hat.astype(np.float64)
    varies = x.max(-1) > x.min(-1)
    mean, std = x.mean(-1, keepdims=True), x.std(-1, ddof=1, keepdims=True)
    fvu = (x - x_hat)[varies].var(-1, ddof=1) / x[varies].var(-1, ddof=1)
    standardised, reconstruction = (x - mean) / (std + 1e-5), (x_hat - mean) / (std + 1e-5)
    norms = np.maximum(np.linalg.norm(x, axis=-1), 1e-8) * np.maximum(np.linalg.norm(x_hat, axis=-1), 1e-8)
    return {
        "fvu": fvu.mean(),
        "nmse": ((reconstruction - standardised)[varies] ** 2).mean(),
        "fvu_pooled": ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(),
        "cs": ((x * x_hat).sum(-1) / norms).mean(),
        "undefined_rows": (~varies).sum(),
    }


@functools.cache
def rows(kind):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((N, D))
    x = {
        "plain": x,
        "far from zero": x + 1000,
        "very far from zero": x + 1e5,
        "of many sizes": x * np.exp(3 * rng.standard_normal((N, 1))),
        "repeated": x[rng.integers(0, 3, N)],
        # The mean of equal features is not exactly one of them: neither 0.1 nor 1000.1 may leave a variance.
        "some constant": np.where(np.arange(N)[:, None] % 5 == 0, [[0.1], [1000.1]] * (N // 2), x),
        "some zero": np.where(np.arange(N)[:, None] % 7 == 0, 0.0, x),
        "badly reconstructed": x,
    }[kind]
    x_hat = x + (30 if kind.startswith("badly") else 0.2) * rng.standard_normal(x.shape)
    x_hat[3] = 0
    if kind.startswith("very far"):
        x_hat[3] = x[4]
    return x.astype(np.float32), x_hat.astype(np.float32)


@pytest.mark.parametrize("size", [1, 7, 64, N])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_float64_in_any_batch_size(kind, size):
    x, x_hat = rows(kind)
    got = streamed(ReconstructionSums.of_batch, x, x_hat, size=size).compute()
    assert got == pytest.approx(definition(x, x_hat), rel=3e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_over_eight_devices_equals_float64(kind):
    x, x_hat = rows(kind)
    assert sharded(ReconstructionSums.of_batch, x, x_hat).compute() == pytest.approx(definition(x, x_hat), rel=3e-6)


def test_merging_has_no_order():
    x, x_hat = rows("of many sizes")
    parts = [on_host(jitted(ReconstructionSums.of_batch)(x[i : i + 64], x_hat[i : i + 64])) for i in range(0, N, 64)]
    there = functools.reduce(ReconstructionSums.merge, parts).compute()
    back = functools.reduce(ReconstructionSums.merge, parts[::-1]).compute()
    assert there == pytest.approx(back, rel=1e-12)


def test_a_million_rows_in_twenty_thousand_batches_add_up_in_float64():
    """The sums of one batch, 20,000 times: float32 would lose the third digit of the mean."""
    x, x_hat = rows("far from zero")
    part = on_host(ReconstructionSums.of_batch(x[:50], x_hat[:50]))
    total = functools.reduce(ReconstructionSums.merge, [part] * 20_000)
    assert total.rows == 1_000_000
    assert total.compute() == pytest.approx({**part.compute(), "undefined_rows": 0}, rel=1e-9)


def test_a_million_different_rows_add_up_in_float64():
    rng = np.random.default_rng(0)
    x = 100 + rng.standard_normal((1_000_000, 4), dtype=np.float32)
    x += np.linspace(0, 3, len(x), dtype=np.float32)[:, None]  # batches have other means than the whole
    x_hat = x + rng.standard_normal(x.shape, dtype=np.float32)
    got = streamed(ReconstructionSums.of_batch, x, x_hat, size=20_000).compute()
    assert got == pytest.approx(definition(x, x_hat), rel=2e-6)


def test_the_mean_of_rows_far_from_zero_is_known_better_than_float32_can_say():
    x, x_hat = rows("very far from zero")
    sums = streamed(ReconstructionSums.of_batch, x, x_hat, size=40)
    mean = x.astype(np.float64).mean(0)
    assert np.abs(mean.astype(np.float32) - mean).max() > 1e-4
    np.testing.assert_allclose(sums.origin + sums.offset, mean, atol=1e-6, rtol=0)


@pytest.mark.parametrize("value", [2.0, 0.1, 1000.1])
def test_rows_that_are_all_equal_have_no_fvu(value):
    x = np.full((4, 3), value, np.float32)
    got = streamed(ReconstructionSums.of_batch, x, np.ones((4, 3), np.float32), size=2).compute()
    assert all(np.isnan(got[name]) for name in ("fvu", "nmse", "fvu_pooled")) and got["undefined_rows"] == 4
    assert got["cs"] == pytest.approx(1.0)


def test_one_row_has_an_fvu_and_no_pooled_one():
    x, x_hat = (array[:1] for array in rows("plain"))
    got = streamed(ReconstructionSums.of_batch, x, x_hat, size=1).compute()
    assert np.isnan(got["fvu_pooled"]) and got["undefined_rows"] == 0
    assert got["fvu"] == pytest.approx(float((x - x_hat).var(ddof=1) / x.var(ddof=1)), rel=1e-5)


def test_a_perfect_reconstruction_leaves_nothing_unexplained():
    x, _ = rows("of many sizes")
    got = jax.jit(ReconstructionSums.of_batch)(x, x)
    expected = {"fvu": 0, "nmse": 0, "fvu_pooled": 0, "cs": 1, "undefined_rows": 0}
    assert on_host(got).compute() == pytest.approx(expected, abs=1e-7)
