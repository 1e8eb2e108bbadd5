"""Runs trained together: each is the run that it is alone, they resume bit for bit, and one may fail alone."""

import dataclasses
import os
import signal

import jax
import numpy as np
import pytest

from tests.train.application import records
from train import sweep
from train.checkpoint import Checkpoints
from train.compare import CompareConfig
from train.config import LEARNING_RATES, Overrides
from train.files import write_json
from train.logs import PendingMetrics
from train.loop import train
from train.members import members
from train.run import load_run, open_data, survey

NAMES = ["relu-sparsity_coefficient0.5", "relu-sparsity_coefficient1"]
SMALL = CompareConfig(
    presets=("relu",),
    vary=("sparsity_coefficient=0.5,1",),
    steps=20,
    batch_size=32,
    n_concepts=64,
    checkpoint_every=5,
    log_every=5,
    warmup_steps=5,
)


def train_members(rows_file, workdir, **changes):
    """What :func:`train_together` returns, and the members."""
    config = dataclasses.replace(SMALL, data=rows_file, workdir=workdir, **changes)
    activations = open_data(rows_file, holdout=config.holdout)
    workdir.mkdir(exist_ok=True)
    found = members(config.base, config.grid, activations)
    for member in found:
        (workdir / member.name).mkdir(exist_ok=True)
        write_json(workdir / member.name / "config.json", member.resolved.to_json())
    activations, statistics = survey(activations, workdir, drop_non_finite=False)
    runs = [member.resolved for member in found]
    return sweep.train_together(runs, activations, statistics, workdir), found


def leaves(workdir):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(load_run(workdir).state)]


def assert_identical(a, b, names=NAMES):
    for name in names:
        for x, y in zip(leaves(a / name), leaves(b / name), strict=True):
            np.testing.assert_array_equal(x, y)
        assert metrics(a / name) == metrics(b / name)


def metrics(workdir):
    """metrics.jsonl without its timing."""
    timing = {"rows_per_second", "input_wait_fraction", "elapsed_seconds"}
    return [{name: line[name] for name in line.keys() - timing} for line in records(workdir)]


@pytest.fixture(scope="module")
def whole(rows_file, tmp_path_factory):
    """Two uninterrupted runs, each a group of its own."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    finished, found = train_members(rows_file, workdir)
    assert finished and [member.name for member in found] == NAMES
    return workdir


def assert_trained_alone(workdir, alone):
    """``workdir`` holds the run that ``python -m train`` gives for its configuration."""
    run = load_run(workdir)
    assert run.step == 20
    train(dataclasses.replace(run.config, workdir=alone, sae=Overrides(k=run.sae.k)))
    for x, y in zip(leaves(workdir), leaves(alone), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    for a, b in zip(metrics(workdir), metrics(alone), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.slow
def test_members_with_another_k_are_the_runs_that_train_gives(rows_file, tmp_path):
    _, (first, second) = train_members(rows_file, tmp_path, presets=("topk",), k=(8, 3), vary=())
    assert_trained_alone(tmp_path / second.name, tmp_path / "alone")
    assert metrics(tmp_path / first.name) != metrics(tmp_path / second.name)


def test_members_with_another_seed_and_rate_are_the_runs_that_train_gives(rows_file, tmp_path):
    train_members(rows_file, tmp_path, seeds=(1, 0), learning_rates=(1e-3, 3e-3), vary=())
    assert_trained_alone(tmp_path / "relu-lr0.003-seed0", tmp_path / "alone")


class Killed(BaseException):
    """Stands for a death of the process at any point of the loop."""


def die_at(method, call):
    count = iter(range(1, call))

    def wrapped(*arguments, **keywords):
        if next(count, None) is None:
            raise Killed
        return method(*arguments, **keywords)

    return wrapped


@pytest.mark.parametrize(("owner", "method", "call"), [(PendingMetrics, "add", 13), (Checkpoints, "save", 6)])
def test_a_sweep_that_died_and_resumed_ends_bit_for_bit_the_same(
    whole, rows_file, tmp_path, monkeypatch, owner, method, call
):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, method, die_at(getattr(owner, method), call))
        train_members(rows_file, tmp_path)
    saved = {name: load_run(tmp_path / name).step for name in NAMES}
    if owner is Checkpoints:
        assert set(saved.values()) == {10, 15}, "it died between the members' checkpoints"
    train_members(rows_file, tmp_path)
    assert_identical(tmp_path, whole)


def test_a_signal_saves_all_and_says_so(whole, rows_file, tmp_path, monkeypatch, capsys):
    add = PendingMetrics.add

    def interrupt(pending, step, metrics):
        add(pending, step, metrics)
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(PendingMetrics, "add", interrupt)
        assert not train_members(rows_file, tmp_path)[0]
    assert f"stopped by SIGTERM at step 7 of 20, saved in {tmp_path}; run the same" in capsys.readouterr().out
    assert {load_run(tmp_path / name).step for name in NAMES} == {7}
    assert train_members(rows_file, tmp_path)[0]
    for name in NAMES:
        for x, y in zip(leaves(tmp_path / name), leaves(whole / name), strict=True):
            np.testing.assert_array_equal(x, y)


def test_a_finished_sweep_is_left_alone(whole, rows_file, monkeypatch):
    monkeypatch.setattr(sweep, "_Group", None)
    assert train_members(rows_file, whole)[0]


def test_a_run_that_diverges_is_left_out_and_the_others_go_on(whole, rows_file, tmp_path, capsys):
    changes = dict(learning_rates=(LEARNING_RATES["relu"], 1e30), vary=("sparsity_coefficient=1",))
    finished, (good, wild) = train_members(rows_file, tmp_path, **changes)
    assert finished
    assert sweep.failure(good.resolved) is None
    ended = sweep.failure(wild.resolved)
    assert "loss is not finite" in ended["reason"] and 1 <= ended["step"] < 20
    assert f"{wild.name}: {ended['reason']} at step {ended['step']}; it is left out" in capsys.readouterr().out
    assert all(np.isfinite(line["loss"]) for line in records(tmp_path / wild.name) if "loss" in line)
    for x, y in zip(leaves(tmp_path / good.name), leaves(whole / "relu-sparsity_coefficient1"), strict=True):
        np.testing.assert_array_equal(x, y)
    assert train_members(rows_file, tmp_path, **changes)[0], "it is finished: what failed is not tried again"


def test_when_all_diverge_training_ends(rows_file, tmp_path):
    changes = dict(learning_rates=(1e30,), vary=(), steps=100_000)
    finished, (only,) = train_members(rows_file, tmp_path, **changes)
    assert finished and sweep.failure(only.resolved)["step"] < 100
