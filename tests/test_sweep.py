"""Members trained in lock-step get the numbers that each gets alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_sae
from jax_sae import SAEConfig

D, M, B, STEPS = 16, 64, 32, 10
MEMBERS = {  # (seed, learning rate, k)
    "sparsemax": [(0, 1e-3, 4), (0, 3e-3, 4), (1, 1e-3, 4), (1, 3e-3, 4)],
    "topk": [(0, 1e-3, 8), (0, 1e-3, 3)],
    "batch_topk": [(0, 1e-3, 8), (0, 1e-3, 3)],
}


def make_optimizer(learning_rate):
    return jax_sae.make_optimizer(learning_rate, total_steps=STEPS, warmup_steps=3, clip_norm=1.0)


def config_of(preset, k):
    return SAEConfig.preset(preset, D, M, k=k, dead_after_rows=64)


def batches():
    mixing = np.random.default_rng(0).normal(size=(24, D))
    codes = np.maximum(np.random.default_rng(1).normal(size=(STEPS, B, 24)) - 1, 0)
    return (codes @ mixing + 0.3).astype(np.float32)


@functools.cache
def alone(preset, seed, rate, k):
    """(state, loss of every step) of one member with a configuration of its own."""
    config, optimizer = config_of(preset, k), make_optimizer(rate)
    state, losses = jax_sae.init_train_state(config, optimizer, jax.random.key(seed)), []
    step = jax_sae.jit_train_step(config, optimizer)
    for batch in batches():
        state, metrics = step(state, batch)
        losses.append(metrics["loss"])
    return jax.device_get(state), np.asarray(losses)


def together(preset, members, implementation):
    """(stacked states, losses [steps, members]) with the configuration of the largest k."""
    config = config_of(preset, max(k for _, _, k in members))
    states = []
    for seed, rate, k in members:
        state = jax_sae.init_train_state(config, make_optimizer(rate), jax.random.key(seed))
        states.append(dataclasses.replace(state, stats=dataclasses.replace(state.stats, k=jnp.int32(k))))
    states, losses = jax_sae.stack_states(states), []
    step = jax_sae.sweep_train_step(config, make_optimizer, implementation=implementation)
    rates = jnp.asarray([rate for _, rate, _ in members])
    for batch in batches():
        states, metrics = step(states, rates, batch)
        losses.append(metrics["loss"])
    return states, np.asarray(losses)


def assert_equal_states(actual, expected):
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("implementation", ["map", "vmap"])
@pytest.mark.parametrize("preset", MEMBERS)
def test_members_get_the_numbers_they_get_alone(preset, implementation):
    states, losses = together(preset, MEMBERS[preset], implementation)
    for i, member in enumerate(MEMBERS[preset]):
        state, expected = alone(preset, *member)
        np.testing.assert_allclose(losses[:, i], expected, rtol=1e-5)
        assert_equal_states(jax_sae.member_state(states, i), state)
    assert len({float(loss) for loss in losses[-1]}) == len(MEMBERS[preset]), "the members differ"


@pytest.mark.parametrize("implementation", ["map", "vmap"])
def test_a_member_that_diverges_does_not_touch_the_others(implementation):
    states, losses = together("batch_topk", [(0, 1e-3, 8), (1, 1e30, 8)], implementation)
    assert not np.isfinite(losses[:, 1]).all()
    assert_equal_states(jax_sae.member_state(states, 0), alone("batch_topk", 0, 1e-3, 8)[0])


def test_the_states_are_donated():
    config = config_of("sparsemax", 4)
    state = jax_sae.init_train_state(config, make_optimizer(1e-3), jax.random.key(0))
    states = jax.device_put(jax_sae.stack_states([state, state]))
    jax_sae.sweep_train_step(config, make_optimizer)(states, jnp.full(2, 1e-3), batches()[0])
    assert states.model.concepts[...].is_deleted()


def test_an_unknown_implementation_is_named():
    with pytest.raises(ValueError, match="implementation is 'scan'; expected None or one of vmap, map"):
        jax_sae.sweep_train_step(config_of("topk", 4), make_optimizer, implementation="scan")
