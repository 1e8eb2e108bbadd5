"""Overlap of decoder rows and monosemanticity against loops over pairs in float64, however rows are batched."""

import functools
from itertools import combinations

import numpy as np
import pytest

from jax_sae.metrics import MonosemanticitySums, OrthogonalitySums
from tests.metrics.batching import sharded, streamed

M, D = 48, 6  # decoder rows and their width
N, CONCEPTS, E = 80, 14, 5  # images, concepts and the width of embeddings


def overlap(rows):
    pairs = sum(float(a @ b) ** 2 for a, b in combinations(rows.astype(np.float64), 2))
    return 2 * pairs / len(rows) ** 2


def do_definition(rows):
    rows = rows.astype(np.float64)
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    return {"do": overlap(np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)), "do_raw": overlap(rows)}


@functools.cache
def decoder(kind):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((M, D))
    rows = {
        "random": rows,
        "zero rows": np.where(np.arange(M)[:, None] % 4 == 0, 0, rows),
        "all zero": 0 * rows,
        "duplicate rows": rows[rng.integers(0, 3, M)],
        "far from zero": rows + 1000,
        "of many sizes": rows * np.exp(2 * rng.standard_normal((M, 1))),
        "orthogonal": np.concatenate([3 * np.eye(D), np.zeros((M - D, D))]),
    }[kind]
    return rows.astype(np.float32)


DECODERS = ["random", "zero rows", "all zero", "duplicate rows", "far from zero", "of many sizes", "orthogonal"]


@pytest.mark.parametrize("size", [1, 7, 64, "over eight devices"])
@pytest.mark.parametrize("kind", DECODERS)
def test_overlap_equals_the_definition_in_any_batch_size(kind, size):
    rows = decoder(kind)
    of_batch = OrthogonalitySums.of_batch
    sums = sharded(of_batch, rows) if isinstance(size, str) else streamed(of_batch, rows, size=size)
    assert sums.compute() == pytest.approx(do_definition(rows), rel=3e-6, abs=1e-9)


def test_one_row_overlaps_with_nothing():
    row = np.array([[0.3, -0.7, 2.0, 1.1]], np.float32)
    got = streamed(OrthogonalitySums.of_batch, row, size=1).compute()
    assert got == pytest.approx({"do": 0, "do_raw": 0}, abs=1e-6 * float((row**2).sum()) ** 2)
    assert got["do"] >= 0 and got["do_raw"] >= 0


def test_random_directions_overlap_by_one_over_the_width():
    rows = np.random.default_rng(0).standard_normal((4000, 64)).astype(np.float32)
    assert streamed(OrthogonalitySums.of_batch, rows, size=1000).compute()["do"] == pytest.approx(1 / 64, rel=0.01)


def test_a_million_rows_add_up_in_float64():
    rows = np.random.default_rng(0).standard_normal((1_000_000, 3), dtype=np.float32) + np.float32(0.5)
    exact = rows.astype(np.float64)
    squares = (exact**2).sum(-1)
    unit = exact / np.sqrt(squares)[:, None]
    expected = {
        "do": (((unit.T @ unit) ** 2).sum() - len(rows)) / len(rows) ** 2,
        "do_raw": (((exact.T @ exact) ** 2).sum() - (squares**2).sum()) / len(rows) ** 2,
    }
    assert streamed(OrthogonalitySums.of_batch, rows, size=10_000).compute() == pytest.approx(expected, rel=2e-6)


def monosemanticity(activations, embeddings):
    """[concepts] pair by pair, NaN without a pair."""
    activations, embeddings = activations.astype(np.float64), embeddings.astype(np.float64)
    unit = embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)
    i, j = np.triu_indices(len(unit), 1)
    cosines = (unit[i] * unit[j]).sum(-1)
    scores = np.full(activations.shape[1], np.nan)
    for concept, a in enumerate(activations.T):
        if (a > a.min()).sum() >= 2:
            a = (a - a.min()) / (a.max() - a.min())
            scores[concept] = (a[i] * a[j] * cosines).sum() / (a[i] * a[j]).sum()
    return scores


@functools.cache
def images():
    """Activations [N, CONCEPTS], each concept a case of its own, and embeddings [N, E] of any norm."""
    rng = np.random.default_rng(0)
    a = np.maximum(rng.standard_normal((N, CONCEPTS)) - 1, 0)
    a[:, 0] = 0  # dead
    a[:, 1] = 0.7  # constant
    a[:, 2], a[41, 2] = 0, 3.0  # on one image
    a[:, 3], a[[5, 77], 3] = 0, (3.0, 0.5)  # on two
    a[:, 4], a[[5, 6], 4] = 0, (1.0, 1e-6)  # on two, one of which dwarfs the other
    a[:, 5] = rng.integers(0, 3, N)  # ties
    a[:, 6] = 1000 + rng.standard_normal(N)  # far from zero
    a[:, 7] = -5 - a[:, 8]  # below zero
    a[:, 9] = np.where(np.arange(N) == 30, -2.0, 1.0)  # the smallest on one image, equal elsewhere
    a[:, 10], a[[1, 2, 3], 10] = 0, (1e4, 1.0, 1e-3)
    a[N // 2 :, 11] = 0.25  # another smallest activation in one part of the images than in the other
    embeddings = rng.standard_normal((N, E)) + 0.5
    embeddings[10:20] = embeddings[10]  # duplicates
    embeddings *= np.exp(2 * rng.standard_normal((N, 1)))
    return a.astype(np.float32), embeddings.astype(np.float32)


@pytest.mark.parametrize("size", [1, 7, 64, N, "over eight devices"])
def test_monosemanticity_equals_the_definition_in_any_batch_size(size):
    a, embeddings = images()
    of_batch = MonosemanticitySums.of_batch
    sums = sharded(of_batch, a, embeddings) if isinstance(size, str) else streamed(of_batch, a, embeddings, size=size)
    expected = monosemanticity(a, embeddings)
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(expected)), [0, 1, 2])
    np.testing.assert_allclose(sums.scores(), expected, atol=2e-6, rtol=0)
    assert sums.compute() == pytest.approx(
        {"ms_mean": np.nanmean(expected), "ms_max": np.nanmax(expected), "ms_concepts": CONCEPTS - 3}, abs=2e-6
    )


def test_monosemanticity_does_not_depend_on_the_order_of_images():
    a, embeddings = images()
    forwards = streamed(MonosemanticitySums.of_batch, a, embeddings, size=9).scores()
    backwards = streamed(MonosemanticitySums.of_batch, a[::-1], embeddings[::-1], size=9).scores()
    np.testing.assert_allclose(forwards, backwards, atol=1e-6)


def test_scores_of_images_that_are_alike_opposite_and_unrelated():
    e = np.array([[2.0, 0], [5.0, 0], [-1.0, 0], [0, 3.0]], np.float32)
    a = np.array([[1, 1, 1], [4, 0, 0], [0, 2, 0], [0, 0, 7]], np.float32)
    np.testing.assert_allclose(streamed(MonosemanticitySums.of_batch, a, e, size=2).scores(), [1, -1, 0], atol=1e-6)


@pytest.mark.parametrize("kind", ["all activations zero", "constant", "one image"])
def test_without_a_pair_nothing_has_a_score(kind):
    a, embeddings = images()
    a = {"all activations zero": 0 * a, "constant": 0 * a + 0.3, "one image": a[:1]}[kind]
    got = streamed(MonosemanticitySums.of_batch, a, embeddings[: len(a)], size=16).compute()
    assert np.isnan(got["ms_mean"]) and np.isnan(got["ms_max"]) and got["ms_concepts"] == 0


def test_a_million_images_add_up_in_float64():
    rng = np.random.default_rng(0)
    a = np.maximum(rng.standard_normal((1_000_000, 3), dtype=np.float32), 0)
    a[:, 1] += 2
    e = rng.standard_normal((len(a), 3), dtype=np.float32) + np.float32(1)
    exact, unit = a.astype(np.float64) - a.min(0), e / np.linalg.norm(e.astype(np.float64), axis=-1, keepdims=True)
    squares = (exact**2).sum(0)
    expected = (((exact.T @ unit) ** 2).sum(-1) - squares) / (exact.sum(0) ** 2 - squares)
    sums = streamed(MonosemanticitySums.of_batch, a, e, size=10_000)
    assert sums.images == 1_000_000
    np.testing.assert_allclose(sums.scores(), expected, rtol=2e-6)
