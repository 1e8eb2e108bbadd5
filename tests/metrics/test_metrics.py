"""Metrics against float64 NumPy and the recorded numbers of a published implementation, however rows are batched."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_sae.metrics import ReconstructionSums, SparsitySums, on_host

GOLDEN = Path(__file__).parent.parent / "goldens" / "msae_metrics_public.npz"


def definition(x, x_hat):
    """FVU per sample (of rows that vary), pooled FVU and CS in float64."""
    x, x_hat = x.astype(np.float64), x_hat.astype(np.float64)
    variance = x.var(-1, ddof=1)
    varies = variance > 0
    fvu = ((x - x_hat).var(-1, ddof=1)[varies] / variance[varies]).mean()
    pooled = ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    norms = np.maximum(np.linalg.norm(x, axis=-1), 1e-8) * np.maximum(np.linalg.norm(x_hat, axis=-1), 1e-8)
    return fvu, pooled, ((x * x_hat).sum(-1) / norms).mean(), int((~varies).sum())


def streamed(x, x_hat, size):
    of_batch = jax.jit(ReconstructionSums.of_batch)
    parts = [on_host(of_batch(x[i : i + size], x_hat[i : i + size])) for i in range(0, len(x), size)]
    return functools.reduce(ReconstructionSums.merge, parts).compute()


def rows(kind):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 24))
    x = {
        "plain": x,
        "far from zero": x + 1000,
        "of many sizes": x * np.exp(3 * rng.standard_normal((300, 1))),
        "repeated": x[rng.integers(0, 3, 300)],
        "some constant": np.where(np.arange(300)[:, None] % 5 == 0, 2.0, x),
        "some zero": np.where(np.arange(300)[:, None] % 7 == 0, 0.0, x),
    }[kind]
    return x.astype(np.float32), (x + 0.2 * rng.standard_normal(x.shape)).astype(np.float32)


@pytest.mark.parametrize("size", [1, 7, 64, 300])
@pytest.mark.parametrize("kind", ["plain", "far from zero", "of many sizes", "repeated", "some constant", "some zero"])
def test_reconstruction_equals_float64_in_any_batch_size(kind, size):
    x, x_hat = rows(kind)
    got = streamed(x, x_hat, size)
    fvu, pooled, cs, undefined = definition(x, x_hat)
    assert got["undefined_rows"] == undefined
    assert got["fvu"] == pytest.approx(fvu, rel=2e-3 if kind == "far from zero" else 1e-5)
    assert got["fvu_pooled"] == pytest.approx(pooled, rel=2e-3 if kind == "far from zero" else 1e-5)
    assert got["cs"] == pytest.approx(cs, abs=1e-6)


def test_merging_has_no_order():
    x, x_hat = rows("of many sizes")
    parts = [on_host(ReconstructionSums.of_batch(x[i : i + 50], x_hat[i : i + 50])) for i in range(0, 300, 50)]
    there = functools.reduce(ReconstructionSums.merge, parts).compute()
    back = functools.reduce(ReconstructionSums.merge, parts[::-1]).compute()
    assert there == pytest.approx(back, rel=1e-12)


def test_a_million_rows_add_up_in_float64():
    """The sums of one batch, 20,000 times: float32 would lose the third digit of the mean."""
    x, x_hat = rows("far from zero")
    part = on_host(ReconstructionSums.of_batch(x[:50], x_hat[:50]))
    total = functools.reduce(ReconstructionSums.merge, [part] * 20_000)
    assert total.rows == 1_000_000
    assert total.compute() == pytest.approx({**part.compute(), "undefined_rows": 0}, rel=1e-9)


def test_rows_that_are_all_equal_have_no_fvu():
    got = streamed(np.full((4, 3), 2.0, np.float32), np.ones((4, 3), np.float32), 2)
    assert np.isnan(got["fvu"]) and np.isnan(got["fvu_pooled"]) and got["undefined_rows"] == 4
    assert got["cs"] == pytest.approx(1.0)


def test_sparsity_counts_exact_zeros():
    a = np.where(np.random.default_rng(0).random((90, 40)) < 0.1, 1e-30, 0).astype(np.float32)
    a[:, 5], a[3, 6] = 0, -2.0
    parts = [on_host(SparsitySums.of_batch(jnp.asarray(a[i : i + 20]))) for i in range(0, 90, 20)]
    sums = functools.reduce(SparsitySums.merge, parts)
    np.testing.assert_array_equal(sums.firing, (a != 0).sum(0))
    expected = {"l0": (a == 0).mean(), "active": (a != 0).sum(-1).mean(), "dead_fraction": (~(a != 0).any(0)).mean()}
    assert sums.compute() == pytest.approx(expected, rel=1e-12)


def test_equal_to_the_published_implementation():
    with np.load(GOLDEN, allow_pickle=False) as g:
        got = streamed(g["x"], g["x_hat"], 32)
        sums = on_host(SparsitySums.of_batch(jnp.asarray(g["acts"])))
        assert got["fvu"] == pytest.approx(float(g["fvu"]), rel=2e-6)
        assert got["cs"] == pytest.approx(float(g["cs_per_sample"].mean()), rel=2e-6)
        assert sums.compute()["l0"] == pytest.approx(float(g["l0"]), rel=2e-6)
        np.testing.assert_array_equal(sums.firing, g["dead_neurons"])
