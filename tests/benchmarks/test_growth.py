"""What the growth benchmark measures, what it leaves out, and what it leaves behind."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import growth
from benchmarks.growth import Point, Sweep
from benchmarks.sparsemax import example_scores
from jax_sae import sparsemax_threshold


def sweep_of(seconds, *, gigabytes=0.0, work=lambda size: size):
    """Sizes 1, 10, 100; ``seconds(size)`` of the candidate "a"."""

    def point(size):
        return Point(
            size, work(size), gigabytes * size, lambda names: {name: (lambda: seconds(size)) for name in names}
        )

    return Sweep("s", "M", "B = 1", ("a",), tuple(point(size) for size in (1, 10, 100)))


@pytest.fixture
def pretended(monkeypatch):
    """Candidates say how long they take."""
    monkeypatch.setattr(
        growth,
        "measure",
        lambda candidates, rounds, warmup: {name: (go(),) * rounds for name, go in candidates.items()},
    )


def test_a_point_is_left_out_when_the_last_one_says_it_takes_too_long(pretended, capsys):
    calls = 1 + growth.WARMUP
    curve = growth.measure_sweep(sweep_of(lambda size: 1.0 * size), rounds=1, seconds=10.0 * calls, gigabytes=1)
    assert curve.samples == {1: {"a": (1.0,)}, 10: {"a": (10.0,)}}
    (left_out,) = curve.skipped
    assert left_out == {"sweep": "s", "candidate": "a", "size": "M = 100", "predicted s": 100.0 * calls, "arrays GB": 0}
    assert "skipped: s, a, M = 100" in capsys.readouterr().out


def test_a_point_is_left_out_when_its_arrays_are_too_large(pretended):
    curve = growth.measure_sweep(sweep_of(lambda size: 0.0, gigabytes=0.1), rounds=1, seconds=1, gigabytes=1)
    assert list(curve.samples) == [1, 10]
    assert [row["arrays GB"] for row in curve.skipped] == [10.0]


def test_nothing_is_left_out_where_work_does_not_grow(pretended):
    sweep = sweep_of(lambda size: 1.0, work=lambda size: 1)
    assert list(growth.measure_sweep(sweep, rounds=1, seconds=10, gigabytes=1).samples) == [1, 10, 100]


@pytest.mark.parametrize("support", [10, 300])
def test_scores_have_about_the_support_asked_for(support):
    scores = example_scores((64, 3072), growth.scale_for(support, 3072), "float32")
    assert float(jnp.median(sparsemax_threshold(scores)[1])) == pytest.approx(support, rel=0.15)


def test_steps_that_share_a_state_hand_it_on():
    steps = {
        "add": lambda state, batch: (state + batch, {"loss": state}),
        "multiply": lambda state, batch: (state * batch, {"loss": state}),
    }
    candidates = growth.shared_stepping(steps, jnp.int32(1), [jnp.int32(10)])
    assert [int(candidates[name]()) for name in ("add", "multiply", "add")] == [1, 11, 110]


def test_the_step_has_the_scores_that_the_sweep_asks_for():
    config = growth.step_config(growth.Shape(32, 768, 64), 0.1)
    state = growth.initial_state(config)
    rows = jax.random.normal(jax.random.key(2), (32, 768))
    scores = state.model.scores(state.model.normalize(rows, state.stats)[0], state.stats)
    assert float(jnp.std(scores)) == pytest.approx(0.1, rel=0.1)


@pytest.mark.slow
def test_the_command_writes_every_point_and_draws_them(tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "CONCEPTS", (64, 128))
    monkeypatch.setattr(growth, "SUPPORTS", (3,))
    monkeypatch.setattr(growth, "WIDE", 128)
    names = ("sparsemax over concepts", "step over concepts")
    growth.main(only=names, d=16, rounds=1, json=tmp_path)
    (path,) = tmp_path.rglob("growth.json")
    sparsemax, step = json.loads(path.read_text())["tables"]
    assert [row["name"] for row in sparsemax["rows"]][:2] == [
        "jax_sae.sparsemax, M = 64",
        "jax_sae.sparsemax, M = 128",
    ]
    assert [row["name"] for row in step["rows"]] == [
        f"{name}, M = {size}" for name in (growth.OURS, growth.DENSE) for size in (64, 128)
    ]
    assert all(np.isfinite(row["median"]) for table in (sparsemax, step) for row in table["rows"])
    drawn = importlib.util.find_spec("matplotlib") is not None
    assert path.with_suffix(".svg").exists() == drawn
