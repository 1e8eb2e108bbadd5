"""The benchmark of the bottleneck measures what it says."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import bottleneck
from benchmarks.shapes import SHAPES
from jax_sae import Capacity
from jax_sae.sae.gradients import dense_gradients, sparse_gradients

TINY = SHAPES["tiny"]


def test_the_scale_gives_the_support_that_was_asked_for():
    rows = jax.random.normal(jax.random.key(1), (64, TINY.d))
    for support in (5.0, 20.0):
        scale = bottleneck.scale_for("sparsemax", TINY, rows, support)
        found = bottleneck.mean_support(bottleneck.state_with("sparsemax", TINY, scale), rows)
        assert found == pytest.approx(support, rel=0.1)


def test_candidates_that_differ_or_do_not_fit_are_found_out():
    rows = jax.random.normal(jax.random.key(1), (8, TINY.d))
    state = bottleneck.state_with("sparsemax", TINY, 1.0)
    call = state.model, state.stats, rows, jnp.int32(0)
    dense, fits = dense_gradients(*call), sparse_gradients(*call, capacity=Capacity(192, 192))
    bottleneck.verify(dense, fits)
    with pytest.raises(AssertionError, match="did not fit"):
        bottleneck.verify(dense, sparse_gradients(*call, capacity=Capacity(1, 32)))
    with pytest.raises(AssertionError):
        bottleneck.verify(dataclasses.replace(dense, gradients=jax.tree.map(lambda g: 1.1 * g, dense.gradients)), fits)


def test_the_whole_benchmark_writes_its_tables(tmp_path):
    bottleneck.main(presets=("sparsemax",), shapes=("tiny",), supports=(5.0, 100.0), rounds=1, json=tmp_path)
    (path,) = tmp_path.glob("*/bottleneck.json")
    content = json.loads(path.read_text())
    assert [row["name"] for row in content["tables"][0]["rows"]] == ["dense", "sparse"]
    assert len(content["tables"]) == 1, "a support above a quarter of the concepts is left out"
