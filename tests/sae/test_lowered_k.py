"""k lowered in the statistics is the k of a configuration: forward, gradients, BatchTopK's running threshold."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_sae
from jax_sae import SAEConfig

D, M, B = 12, 40, 9
X = (2 * np.random.default_rng(0).normal(size=(B, D)) + 0.3).astype(np.float32)


def make(preset, k, kept=None):
    """(configuration, state) with ``config.k = k`` of which ``kept`` are kept."""
    config = SAEConfig.preset(preset, D, M, k=k, aux_k=4, dead_after_rows=4 * B)
    state = jax_sae.init_train_state(config, jax_sae.make_optimizer(1e-3, total_steps=9), jax.random.key(0))
    stats = state.stats if kept is None else dataclasses.replace(state.stats, k=jnp.int32(kept))
    return config, dataclasses.replace(state, stats=stats)


@pytest.mark.parametrize("preset", ["topk", "batch_topk", "matryoshka_batch_topk"])
def test_a_lowered_k_is_the_k_of_a_configuration(preset):
    _, lowered = make(preset, k=9, kept=3)
    _, plain = make(preset, k=3)

    def loss(model, stats):
        loss, (output, _) = jax_sae.sae_loss(model, stats, X, step=0)
        return loss, output.activations

    (of_lowered, activations), grads = jax.value_and_grad(loss, has_aux=True)(lowered.model, lowered.stats)
    (of_plain, expected), expected_grads = jax.value_and_grad(loss, has_aux=True)(plain.model, plain.stats)
    np.testing.assert_array_equal(activations, expected)
    assert np.sum(np.asarray(activations) != 0) == 3 * B
    assert of_lowered == of_plain
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("preset", ["topk", "batch_topk"])
def test_training_with_a_lowered_k_goes_the_same_way(preset):
    optimizer, states = jax_sae.make_optimizer(1e-3, total_steps=9), []
    for k, kept in ((9, 3), (3, None)):
        config, state = make(preset, k, kept)
        step = jax_sae.jit_train_step(config, optimizer)
        for _ in range(5):
            state, _ = step(state, jnp.asarray(X))
        states.append(state)
    assert states[0].stats.k == 3, "training leaves it alone"
    assert preset == "topk" or states[0].stats.threshold > 0
    for got, want in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("preset", ["topk", "batch_topk"])
def test_no_more_than_the_k_of_the_configuration_are_kept(preset):
    _, raised = make(preset, k=3, kept=9)
    _, plain = make(preset, k=3)
    activations = lambda state: state.model(X, state.stats, training=True).activations
    np.testing.assert_array_equal(activations(raised), activations(plain))
