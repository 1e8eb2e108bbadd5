"""Losses and statistics against closed forms; tests/conformance has the references' recorded numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_sae import SAEConfig, SparseAutoencoder, init_stats, sae_loss, update_stats


def test_batch_topk_keeps_a_running_threshold_in_float32_and_uses_it_at_evaluation():
    config = SAEConfig.preset("batch_topk", 4, 6, k=2, threshold_decay=0.75)
    stats = init_stats(config)
    first = jnp.array([[0.0, 3.0, 0, 2.0, 0, 0], [0.5, 0, 0, 0, 0, 0]])
    stats = update_stats(config, stats, first)
    assert stats.threshold == 0.5
    stats = update_stats(config, stats, first + (first > 0))
    assert stats.threshold == 0.75 * 0.5 + 0.25 * 1.5 and stats.threshold.dtype == jnp.float32
    assert update_stats(config, stats, jnp.zeros((2, 6))).threshold == stats.threshold
    model = SparseAutoencoder(config, rngs=nnx.Rngs(0))
    scores = jnp.array([[0.7, 1.5, -1.0, 5.0, 0.75, 0.0]])
    np.testing.assert_array_equal(model.select(scores, stats), [[0, 1.5, 0, 5.0, 0, 0]])


def test_statistics_count_frequency_and_silence():
    config = SAEConfig.preset("relu", 4, 3, dead_after_rows=8)
    stats = init_stats(config)
    stats = update_stats(config, stats, jnp.array([[1.0, 0, 0], [2.0, 0, 3.0], [1, 0, 0], [1, 0, 0]]))
    np.testing.assert_allclose(stats.frequency, [1, 0, 0.25])
    np.testing.assert_array_equal(stats.rows_since_fired, [0, 4, 0])
    stats = update_stats(config, stats, jnp.array([[0.0, 0, 1.0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]))
    np.testing.assert_allclose(stats.frequency, [0.5, 0, 0.25])
    np.testing.assert_array_equal(stats.rows_since_fired, [4, 8, 0])


def test_the_silence_counter_stops_instead_of_wrapping():
    config = SAEConfig.preset("relu", 4, 3)
    stats = dataclasses.replace(init_stats(config), rows_since_fired=jnp.full(3, 2**30 - 1, jnp.int32))
    for _ in range(3):
        stats = update_stats(config, stats, jnp.zeros((5, 3)))
    np.testing.assert_array_equal(stats.rows_since_fired, [2**30] * 3)


def test_the_sparsity_penalty_warms_up_linearly():
    config = SAEConfig.preset("relu", 4, 6, sparsity_coefficient=0.5, sparsity_warmup_steps=10)
    model, stats = SparseAutoencoder(config, rngs=nnx.Rngs(0)), init_stats(config)
    x = jax.random.normal(jax.random.key(0), (5, 4))
    penalty = 0.5 * np.abs(np.asarray(model(x, stats).activations)).sum(-1).mean()
    for step, fraction in [(0, 0.1), (4, 0.5), (9, 1.0), (500, 1.0)]:
        _, (_, terms) = sae_loss(model, stats, x, step)
        assert terms["sparsity"] == pytest.approx(fraction * penalty, rel=1e-6)


def test_l1_of_contributions_cannot_be_evaded_by_longer_decoder_rows():
    config = SAEConfig.preset("attention_relu", 4, 6, sparsity_coefficient=1.0, sparsity_warmup_steps=0)
    model, stats = SparseAutoencoder(config, rngs=nnx.Rngs(0)), init_stats(config)
    x = jax.random.normal(jax.random.key(0), (5, 4))
    rows = np.asarray(model.concepts[...], np.float64) @ np.asarray(model.W_V[...], np.float64)
    activations = np.asarray(model(x, stats).activations, np.float64)
    expected = (np.abs(activations) * np.linalg.norm(rows, axis=-1)).sum(-1).mean()
    penalty = lambda model: float(sae_loss(model, stats, x, 0)[1][1]["sparsity"])
    assert penalty(model) == pytest.approx(expected, rel=1e-5)
    model.W_K[...], model.W_V[...] = model.W_K[...] / 8, model.W_V[...] * 8
    assert penalty(model) == pytest.approx(expected, rel=1e-5)


def aux_case():
    config = SAEConfig.preset("topk", 6, 20, k=3, aux_k=4, dead_after_rows=100)
    model, stats = SparseAutoencoder(config, rngs=nnx.Rngs(0)), init_stats(config)
    dead = np.arange(20) % 3 == 0
    stats = dataclasses.replace(stats, rows_since_fired=jnp.where(dead, 100, 0).astype(jnp.int32))
    return config, model, stats, dead, jax.random.normal(jax.random.key(3), (7, 6))


def test_auxk_equals_its_definition():
    config, model, stats, dead, x = aux_case()
    _, (out, terms) = sae_loss(model, stats, x, 0)
    residual = np.asarray(x - out.x_hat, np.float64)
    scores = np.where(dead, np.maximum(np.asarray(out.scores, np.float64), 0), 0)
    keep = np.argsort(-scores, axis=-1)[:, :4]
    chosen = np.zeros_like(scores)
    np.put_along_axis(chosen, keep, np.take_along_axis(scores, keep, -1), -1)
    error = ((residual - chosen @ np.asarray(model.W_dec[...], np.float64)) ** 2).sum(-1).mean()
    variance = ((residual - residual.mean(0)) ** 2).sum(-1).mean()
    assert terms["aux"] == pytest.approx(error / variance / 32, rel=1e-5)


def test_auxk_moves_dead_concepts_and_nothing_else():
    config, model, stats, dead, x = aux_case()
    aux = lambda model: sae_loss(model, stats, x, 0)[1][1]["aux"]
    grads = jax.grad(aux)(model)
    moved = np.abs(np.asarray(grads.W_dec[...])).max(-1) > 0
    assert moved.any() and not moved[~dead].any()
    assert not np.asarray(grads.W_enc[...])[:, ~dead].any()


def test_auxk_is_zero_while_nothing_is_dead():
    config, model, _, _, x = aux_case()
    assert sae_loss(model, init_stats(config), x, 0)[1][1]["aux"] == 0


@pytest.mark.parametrize("preset", ["sparsemax", "mlp_sparsemax"])
def test_a_row_far_longer_than_the_others_does_not_outweigh_them(preset):
    config = SAEConfig.preset(preset, 4, 30)
    model, stats = SparseAutoencoder(config, rngs=nnx.Rngs(0)), init_stats(config)
    x = jax.random.normal(jax.random.key(0), (5, 4))
    grad = jax.jit(jax.grad(lambda model, x: sae_loss(model, stats, x, 0)[0]))
    plain, stretched = grad(model, x), grad(model, x * jnp.array([1, 1, 1000.0, 1, 1])[:, None])
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(stretched), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_rows_near_a_mean_that_is_far_from_zero_have_the_error_of_their_direction():
    config = SAEConfig.preset("sparsemax", 4, 30)
    model, stats = SparseAutoencoder(config, rngs=nnx.Rngs(0)), init_stats(config)
    u = jax.random.normal(jax.random.key(0), (5, 4))
    far = dataclasses.replace(stats, mean=jnp.full(4, 1024.0))
    step = 2.0**-10  # exact beside the mean
    rows = jnp.round(u / step) * step
    expected = sae_loss(model, stats, rows, 0)[0]
    assert sae_loss(model, far, 1024.0 + rows, 0)[0] == pytest.approx(float(expected), rel=1e-6)
    at_the_mean = jnp.full((1, 4), 1024.0)
    assert sae_loss(model, far, at_the_mean, 0)[0] < 1
