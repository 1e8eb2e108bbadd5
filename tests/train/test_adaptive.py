"""The capacity of the sparse step follows the run, changes no number, and is the same in a run that was stopped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_sae
from jax_sae import Capacity, InputError, SAEConfig, capacity_limit, choose_capacity, init_stats
from jax_sae.sae.stats import CAPACITIES, needs_of
from tests.train.application import records
from tests.train.test_loop import SMALL, assert_identical
from train.adaptive import AdaptiveStep
from train.config import TrainConfig, resolve
from train.loop import train
from train.run import load_run, open_data, survey
from train.sweep import train_together

LARGE = dataclasses.replace(SMALL, n_concepts=1600, steps=40, checkpoint_every=20, preset="topk")


def config(rows_file, workdir, **changes) -> TrainConfig:
    return dataclasses.replace(LARGE, data=rows_file, workdir=workdir, **changes)


def losses(workdir):
    return [line["loss"] for line in records(workdir) if "loss" in line]


@pytest.fixture(scope="module")
def whole_run(rows_file, tmp_path_factory):
    return train(config(rows_file, tmp_path_factory.mktemp("runs") / "whole"))


def test_a_run_takes_the_places_that_it_needs_and_logs_them(whole_run):
    changes = [line for line in records(whole_run) if "capacity_row" in line]
    assert [(line["step"], line["capacity_mean"]) for line in changes] == [(1, 64), (11, 32)]
    assert all(line["dense"] == 0 for line in records(whole_run) if "dense" in line)


def test_a_capacity_that_k_does_not_fit_in_is_refused(rows_file, tmp_path):
    with pytest.raises(InputError, match="--capacity is 8 but topk keeps k = 32"):
        train(config(rows_file, tmp_path / "refused", capacity=8))


class Steps:
    """Stands for compiled steps: every capacity has its own, which needs too many places for all but some steps."""

    def __init__(self, fitting):
        self.fitting, self.taken = fitting, []

    def compiled_for(self, capacity):
        def step(state):
            self.taken.append(capacity)
            fullest = 32 if len(self.taken) in self.fitting else 4096
            needs = state.stats.needs + (0 if capacity is None else needs_of(jnp.int32(fullest), jnp.int32(fullest)))
            now = jnp.array(capacity or (0, 0), jnp.int32)
            return dataclasses.replace(state, stats=dataclasses.replace(state.stats, needs=needs, capacity=now)), {}

        return step


@pytest.mark.parametrize("every", [1, 4])
def test_a_dense_run_looks_with_one_call_and_becomes_sparse_when_that_pays(every):
    steps = Steps(fitting=range(150 // every, 1000))
    state = jax_sae.init_train_state(SPARSEMAX, optax.sgd(0.0), jax.random.key(0))
    arguments = dict(asked="auto", limit=capacity_limit(SPARSEMAX, "cpu"), steps_per_call=every)
    adaptive = AdaptiveStep(SPARSEMAX, steps.compiled_for, state, **arguments)
    for step in range(0, 240, every):
        state, _ = adaptive(step, state)
    looked = [i * every for i, capacity in enumerate(steps.taken) if capacity is not None]
    assert looked[:4] == [step - step % every for step in (0, 10, 30, 100)]
    assert looked[4:] == list(range(200, 240, every))


def test_the_sparse_run_trains_as_the_dense_one(whole_run, rows_file, tmp_path):
    dense = train(config(rows_file, tmp_path / "dense", capacity="dense"))
    np.testing.assert_allclose(losses(whole_run), losses(dense), rtol=1e-3)
    assert all(line["dense"] == 1 for line in records(dense) if "dense" in line)


@pytest.mark.parametrize("dies_at", [10, 17])
def test_a_run_that_died_resumes_with_the_same_places(whole_run, rows_file, tmp_path, monkeypatch, dies_at):
    workdir, flags = tmp_path / "resumed", config(rows_file, tmp_path / "resumed", checkpoint_every=dies_at)
    save = "train.loop.Checkpoints.save"
    original = __import__("train.checkpoint", fromlist=["Checkpoints"]).Checkpoints.save

    def save_and_die(checkpoints, state, step, metrics):
        original(checkpoints, state, step, metrics)
        checkpoints.wait()
        raise KeyboardInterrupt

    monkeypatch.setattr(save, save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train(flags)
    monkeypatch.undo()
    train(dataclasses.replace(flags, checkpoint_every=20))
    assert_identical(whole_run, workdir)


def test_members_of_a_comparison_take_sparse_steps_too(rows_file, tmp_path, whole_run):
    activations = open_data(rows_file, holdout=0.05)
    runs = [resolve(config(rows_file, tmp_path / name, seed=seed), activations) for name, seed in (("a", 0), ("b", 1))]
    activations, statistics = survey(activations, tmp_path, drop_non_finite=False)
    train_together(runs, activations, statistics, tmp_path)
    assert all(line["dense"] == 0 for line in records(tmp_path / "a") if "dense" in line)
    np.testing.assert_allclose(losses(tmp_path / "a"), losses(whole_run), rtol=1e-3)


SPARSEMAX = SAEConfig.preset("sparsemax", 16, 4608)


def stats_with(now, row, mean):
    """Statistics of steps: numbers of steps by the place in CAPACITIES that they needed."""
    stats = init_stats(SPARSEMAX)
    needs = np.zeros((2, len(CAPACITIES) + 1), np.int32)
    for kind, steps in enumerate((row, mean)):
        for capacity, number in steps.items():
            needs[kind, CAPACITIES.index(capacity) if capacity else len(CAPACITIES)] = number
    return dataclasses.replace(stats, capacity=np.array(now or (0, 0)), needs=needs)


@pytest.mark.parametrize(
    ("now", "row", "mean", "chosen"),
    [
        (None, {}, {}, (768, 192)),  # nothing is known: all that pays
        ((768, 192), {}, {}, (768, 192)),
        ((768, 192), {64: 100}, {32: 100}, (96, 32)),  # one more for the fullest row, what is needed on average
        ((768, 192), {64: 5}, {32: 5}, (768, 192)),  # too few steps to go down
        ((48, 32), {64: 5}, {48: 5}, (96, 48)),  # but not to go up
        ((96, 32), {96: 1, 32: 999}, {64: 1, 32: 999}, (128, 32)),  # 1 in 1,000 may be computed densely
        ((96, 32), {96: 100}, {256: 100}, None),  # more than pays
        ((96, 32), {None: 100}, {32: 100}, None),  # rows that nothing holds
    ],
)
def test_the_choice_of_a_capacity(now, row, mean, chosen):
    found = choose_capacity(SPARSEMAX, stats_with(now, row, mean), capacity_limit(SPARSEMAX, "cpu"))
    assert found == (None if chosen is None else Capacity(*chosen))


@pytest.mark.parametrize(("k", "mean"), [(32, 64), (33, 64), (34, 96), (180, 48)])
def test_batch_topk_gets_what_its_k_can_need_on_average_if_that_pays(k, mean):
    """k places of a row and the unused ones of a block of 32, up to a limit of 192; else what was measured."""
    config = SAEConfig.preset("batch_topk", 16, 4608, k=k)
    stats = stats_with((768, 192), {256: 100}, {48: 100})
    assert choose_capacity(config, stats, capacity_limit(config, "cpu")).mean == mean


def test_small_dictionaries_are_dense():
    assert capacity_limit(SAEConfig.preset("sparsemax", 16, 128), "cpu") is None
    large = SAEConfig.preset("sparsemax", 16, 49_152)
    assert capacity_limit(large, "tpu") is None and 0 < capacity_limit(large, "gpu") < capacity_limit(large, "cpu")
    assert choose_capacity(SPARSEMAX, init_stats(SPARSEMAX), None) is None


def test_the_state_of_a_run_says_what_its_last_step_had(whole_run):
    assert jax.device_get(load_run(whole_run).state.stats.capacity).tolist() == [64, 32]
