"""SparseAutoencoder against float64 NumPy definitions of every preset."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_sae import Preset, SAEConfig, SparseAutoencoder, init_stats

D, M, B = 12, 40, 9


@dataclasses.dataclass
class DataStatistics:
    mean: np.ndarray
    geometric_median: np.ndarray
    mean_norm: float
    raw_mean_norm: float


def make(name, **overrides):
    rng = np.random.default_rng(0)
    mean = rng.normal(size=D).astype(np.float32)
    statistics = DataStatistics(mean, mean + 0.1, mean_norm=7.0, raw_mean_norm=9.0)
    config = SAEConfig.preset(name, D, M, **overrides)
    model = SparseAutoencoder(config, rngs=nnx.Rngs(1), statistics=statistics)
    for _, leaf in nnx.iter_graph(model):
        if isinstance(leaf, nnx.Param):
            leaf[...] = leaf[...] + 0.1 * rng.normal(size=leaf.shape).astype(np.float32)
    x = (mean + 2 * rng.normal(size=(B, D))).astype(np.float32)
    return config, model, init_stats(config, statistics), x


def sparsemax_rows(z):
    """(p, tau) by sorting, one row at a time."""
    p, taus = np.zeros_like(z), np.zeros(len(z))
    for i, row in enumerate(z):
        u = np.sort(row)[::-1]
        r = np.arange(1, len(u) + 1)
        k = r[u + (1 - np.cumsum(u)) / r > 0].max()
        taus[i] = (u[:k].sum() - 1) / k
        p[i] = np.maximum(row - taus[i], 0)
    return p, taus


def definition(config, model, stats, x):
    """x_hat and activations of one batch, in float64, straight from the formulas."""
    w = {k: np.asarray(v[...], np.float64) for k, v in vars(model).items() if isinstance(v, nnx.Param)}
    x, mean = x.astype(np.float64), np.asarray(stats.mean, np.float64)
    centred = x - mean
    if config.normalize_input == "unit_norm":
        norm = np.linalg.norm(centred, axis=-1, keepdims=True)
    else:
        norm = np.full((len(x), 1), 1 / np.float64(stats.scale))
    u = centred / norm
    if config.encoder == "attention":
        keys, values = w["concepts"] @ w["W_K"], w["concepts"] @ w["W_V"]
        z = config.score_scale * (u @ w.get("W_Q", np.eye(D))) @ keys.T
        bias = 0
    else:
        z = (u - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
        values, bias = w["W_dec"], w["b_dec"]
    if config.frequency_cap is not None:
        z[:, np.asarray(stats.frequency) > config.frequency_cap] = 0
    if config.activation == "sparsemax":
        p, tau = sparsemax_rows(z)
        a = p if config.values == "probabilities" else np.where(z > tau[:, None], z, 0)
    elif config.activation == "topk":
        a = np.zeros_like(z)
        top = np.argsort(-z, axis=-1)[:, : config.k]
        np.put_along_axis(a, top, np.maximum(np.take_along_axis(z, top, -1), 0), -1)
    elif config.activation == "batch_topk":
        positive = np.maximum(z, 0)
        a = np.where(positive >= np.sort(positive.ravel())[-config.k * len(x)], positive, 0)
    else:
        a = np.maximum(z, 0)
    return (a @ values + bias) * norm + mean, a


@pytest.mark.parametrize("name", get_args(Preset))
def test_forward_equals_the_definition(name):
    config, model, stats, x = make(name, **({"k": 5} if "topk" in name else {}))
    if config.frequency_cap:
        stats = dataclasses.replace(stats, frequency=stats.frequency.at[3].set(0.2))
    out = jax.jit(lambda m, x, s: m(x, s, training=True))(model, x, stats)
    x_hat, activations = definition(config, model, stats, x)
    np.testing.assert_allclose(out.activations, activations, atol=2e-5)
    np.testing.assert_array_equal(np.asarray(out.activations) != 0, activations != 0)
    np.testing.assert_allclose(out.x_hat, x_hat, atol=1e-4)


@pytest.mark.parametrize("name", get_args(Preset))
def test_encode_and_decode_are_the_two_halves_of_the_call(name):
    _, model, stats, x = make(name)
    out = model(x, stats)
    np.testing.assert_array_equal(model.encode(x, stats), out.activations)
    np.testing.assert_allclose(model.decode(out.activations, stats, out.norm), out.x_hat, rtol=1e-6)


@pytest.mark.parametrize("name", get_args(Preset))
def test_leading_dimensions_are_free(name):
    _, model, stats, x = make(name)
    tokens = model(x.reshape(3, 3, D), stats)
    np.testing.assert_allclose(tokens.x_hat.reshape(B, D), model(x, stats).x_hat, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", get_args(Preset))
def test_a_zero_row_and_a_row_at_the_mean_are_finite_with_finite_gradients(name):
    _, model, stats, x = make(name)
    rows = jnp.stack([jnp.zeros(D), stats.mean, jnp.asarray(x[0])])
    loss = lambda m: jnp.sum(m(rows, stats, training=True).x_hat ** 2)
    value, grads = jax.value_and_grad(loss)(model)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_the_mlp_starts_at_the_centre_of_the_data_with_unit_rows_and_a_tied_encoder():
    statistics = DataStatistics(np.arange(D, dtype=np.float32), np.ones(D, np.float32), 3.0, 6.0)
    config = SAEConfig.preset("topk", D, M, k=4)
    model = SparseAutoencoder(config, rngs=nnx.Rngs(0), statistics=statistics)
    scale = np.sqrt(D) / 6.0
    np.testing.assert_allclose(model.b_dec[...], np.ones(D) * scale, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(model.W_dec[...], axis=-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(model.W_enc[...], model.W_dec[...].T)


def test_the_attention_starts_kaiming_uniform():
    model = SparseAutoencoder(SAEConfig.preset("sparsemax", 64, 3000), rngs=nnx.Rngs(0))
    assert np.std(model.concepts[...]) == pytest.approx((2 / 3000) ** 0.5, rel=0.01)
    assert np.std(model.W_K[...]) == pytest.approx((2 / 64) ** 0.5, rel=0.03)
    assert np.abs(model.W_V[...]).max() <= (6 / 64) ** 0.5
    assert not hasattr(model, "W_Q")


def test_bfloat16_rows_are_computed_in_float32():
    _, model, stats, x = make("sparsemax")
    x = jnp.asarray(x, jnp.bfloat16)
    out = model(x, stats)
    assert out.x_hat.dtype == jnp.float32
    np.testing.assert_array_equal(out.x_hat, model(x.astype(jnp.float32), stats).x_hat)


def test_the_module_holds_parameters_only():
    _, model, _, _ = make("sparsemax")
    assert {type(leaf) for _, leaf in nnx.to_flat_state(nnx.state(model))} == {nnx.Param}


def test_decode_with_unit_norm_inputs_asks_for_the_norms():
    _, model, stats, x = make("sparsemax")
    with pytest.raises(ValueError, match="decode needs norm"):
        model.decode(model.encode(x, stats), stats)


def test_decoder_norms_are_those_of_the_rows():
    _, model, _, _ = make("sparsemax")
    rows = np.asarray(model.concepts[...], np.float64) @ np.asarray(model.W_V[...], np.float64)
    np.testing.assert_allclose(model.decoder_norms(), np.linalg.norm(rows, axis=-1), rtol=1e-5)
