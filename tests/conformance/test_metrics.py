"""Metrics against MSAE's, which the published tables were made with, and monosemanticity against sae-for-vlm's."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_sae.metrics import (
    AlignmentSums,
    MonosemanticitySums,
    OrthogonalitySums,
    ReconstructionSums,
    SparsitySums,
    cknna,
    on_host,
)
from tests.conformance.golden import close

# Recorded, and not compared: metrics that the tables do not have. The "nmse" of this library is another one, of rows
# that were standardised; the HSIC is checked inside of CKNNA, which needs the unbiased one only.
LEFT_OUT = {
    *("nmse_per_sample", "nmae_per_sample", "loss_nmse_zero_mean", "loss_nmse_mean", "euclid_mean"),
    *("cknna_x_acts_biased", "hsic_unbiased_full", "hsic_biased_full"),
}
INPUTS = {"x", "x_hat", "acts", "decoder", "decoder_unit"}
RECONSTRUCTION = {"fvu", "fvu_per_sample", "cs_mean", "cs_per_sample"}
SPARSITY = {"l0", "l0_per_sample", "dead_neurons"}
ORTHOGONALITY = {"do_decoder", "do_decoder_unit", "f64_do_decoder_unit"}


def whole_and_merged(of_batch, *rows):
    """The sums of all rows at once, and merged from three uneven batches."""
    yield on_host(of_batch(*map(jnp.asarray, rows)))
    cuts = [0, 1, len(rows[0]) // 3, len(rows[0])]
    parts = [on_host(of_batch(*(jnp.asarray(a[i:j]) for a in rows))) for i, j in itertools.pairwise(cuts)]
    yield functools.reduce(lambda a, b: a.merge(b), parts)


def by_row(of_batch, *rows):
    """The sums of every row alone, stacked."""
    return jax.vmap(lambda *row: of_batch(*(a[None] for a in row)))(*map(jnp.asarray, rows))


@pytest.mark.golden("msae_metrics")
def test_every_array_is_compared_or_left_out_by_name(golden):
    rest = set(golden) - INPUTS - RECONSTRUCTION - SPARSITY - ORTHOGONALITY - LEFT_OUT
    assert rest and all(re.fullmatch(r"(f64_)?cknna_.*", name) for name in rest)


@pytest.mark.golden("msae_metrics")
def test_fvu_and_cosine_similarity(golden):
    x, x_hat = golden["x"], golden["x_hat"]
    rows = by_row(ReconstructionSums.of_batch, x, x_hat)
    close(rows.fvu, golden["fvu_per_sample"], name="fvu of every row")
    close(rows.cosine, golden["cs_per_sample"], name="cs of every row")
    for sums in whole_and_merged(ReconstructionSums.of_batch, x, x_hat):
        got = sums.compute()
        close(got["fvu"], golden["fvu"], name="fvu")
        close(got["cs"], golden["cs_mean"], name="cs")
        close(got["cs"], golden["cs_per_sample"].mean(), name="cs")
        assert got["undefined_rows"] == 0


@pytest.mark.golden("msae_metrics")
def test_zeros_and_dead_concepts(golden):
    """Their L0 is the fraction of zeros, like ours; their "dead neurons" are counts, of which the zeros are dead."""
    acts = golden["acts"]
    rows = by_row(SparsitySums.of_batch, acts)
    close(1 - rows.firing.sum(-1) / acts.shape[-1], golden["l0_per_sample"], name="l0 of every row")
    for sums in whole_and_merged(SparsitySums.of_batch, acts):
        np.testing.assert_array_equal(sums.firing, golden["dead_neurons"])
        close(sums.compute()["l0"], golden["l0"], name="l0")
        assert sums.compute()["dead_fraction"] == (golden["dead_neurons"] == 0).mean()


@pytest.mark.golden("msae_metrics")
def test_overlap_of_decoder_rows(golden):
    for sums in whole_and_merged(OrthogonalitySums.of_batch, golden["decoder"]):
        close(sums.compute()["do_raw"], golden["do_decoder"], name="do of the rows as they are")
        close(sums.compute()["do"], golden["do_decoder_unit"], name="do of the rows at norm 1")
    with jax.enable_x64(True):
        rows = jnp.asarray(golden["decoder_unit"], jnp.float64)  # of norm 1 to float32 rounding: taken as they are
        got = on_host(OrthogonalitySums.of_batch(rows)).compute()["do_raw"]
    close(got, golden["f64_do_decoder_unit"], 1e-12, "do in float64")


def cut_clearly(rows, neighbors):
    """Whether every row has ``neighbors`` nearest others that rounding cannot confuse with the next."""
    if neighbors == len(rows) - 1:
        return True
    kernel = rows.astype(np.float64) @ rows.T.astype(np.float64)
    np.fill_diagonal(kernel, -np.inf)
    ordered = -np.sort(-kernel, axis=-1)
    return (ordered[:, neighbors - 1] - ordered[:, neighbors]).min() > 1e-5 * np.abs(ordered[:, :-1]).max(-1).min()


@pytest.mark.golden("msae_metrics")
def test_alignment(golden):
    names = [name for name in golden if name.startswith("cknna_") and name not in LEFT_OUT]
    sides = {"cknna_xhat_x": ("x_hat", "x"), "cknna_x_x": ("x", "x")}
    compared = set()
    for name in names:
        a, b = (golden[side] for side in sides.get(name, ("x", "acts")))
        given = re.search(r"_k(\d+)$", name)
        neighbors = int(given[1]) if given else 10
        if cut_clearly(a, neighbors) and cut_clearly(b, neighbors):
            close(cknna(a, b, neighbors=neighbors), golden[name], name=name)
            compared.add(name)
    assert compared >= {"cknna_x_acts", "cknna_xhat_x", "cknna_x_x"}
    close(AlignmentSums.of_batch(golden["x"], golden["acts"]).compute()["cknna"], golden["cknna_x_acts"])
    with jax.enable_x64(True):
        a, b = (jnp.asarray(golden[name], jnp.float64) for name in ("x", "acts"))
        close(cknna(a, b), golden["f64_cknna_x_acts"], 1e-12, "in float64")


@pytest.mark.golden("ms_score")
def test_monosemanticity(golden):
    """Scores, and which concepts have none. ``ms_std`` and the equation with another denominator are not here."""
    defined = ~np.isnan(golden["ms"])
    for sums in whole_and_merged(MonosemanticitySums.of_batch, golden["activations"], golden["embeddings"]):
        scores, got = sums.scores(), sums.compute()
        np.testing.assert_array_equal(np.isnan(scores), ~defined)
        close(scores[defined], golden["ms"][defined], name="ms")
        close(scores[defined], golden["closed_form_ms"][defined], name="ms in closed form")
        close(got["ms_mean"], golden["ms_mean"], name="mean")
        close(got["ms_max"], golden["ms_max"], name="max")
        assert len(scores) - got["ms_concepts"] == golden["nan_count"]
