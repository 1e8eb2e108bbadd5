"""SparseAutoencoder against float64 NumPy definitions of every preset."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jax_sae import Preset, SAEConfig, SparseAutoencoder, init_stats, init_train_state, train_step
from tests.ops.reference import entmax_rows, sparsemax_rows

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
        product = config.score_scale * (u - w["b_dec"] * config.apply_b_dec_to_input) @ w["W_enc"]
        z = product + w["b_gate" if config.activation == "gated" else "b_enc"]
        values, bias = w["W_dec"], w["b_dec"]
    if config.frequency_cap is not None:
        z[:, np.asarray(stats.frequency) > config.frequency_cap] = 0
    if config.activation == "sparsemax":
        p, tau, _ = sparsemax_rows(z)
        a = p if config.values == "probabilities" else np.where(z > tau[:, None], z, 0)
    elif config.activation == "entmax":
        p = entmax_rows(z, 1 + np.exp(w["log_alpha"]) if config.learn_alpha else config.alpha)
        a = p if config.values == "probabilities" else np.where(p > 0, z, 0)
    elif config.activation == "jumprelu":
        a = np.where(z > w["threshold"], z, 0)
    elif config.activation == "gated":
        a = np.where(z > 0, np.maximum(np.exp(w["r_mag"]) * product + w["b_mag"], 0), 0)
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


VARIANTS = [(name, {"k": 5} if "topk" in name else {}) for name in get_args(Preset)] + [
    ("entmax", dict(alpha=1.2)),
    ("entmax", dict(alpha=2.5, encoder="mlp")),
    ("entmax", dict(values="probabilities", alpha=1.7)),
    ("entmax", dict(values="probabilities", learn_alpha=True)),
    ("jumprelu", dict(encoder="attention", unit_norm_decoder=False)),
    ("relu", dict(apply_b_dec_to_input=False)),
    ("gated", dict(apply_b_dec_to_input=False)),
    ("matryoshka_batch_topk", dict(k=5, group_fractions=(0.5, 0.3, 0.2))),
]


@pytest.mark.parametrize(("name", "overrides"), VARIANTS)
def test_forward_equals_the_definition(name, overrides):
    config, model, stats, x = make(name, **overrides)
    if config.frequency_cap:
        stats = dataclasses.replace(stats, frequency=stats.frequency.at[3].set(0.2))
    out = jax.jit(lambda m, x, s: m(x, s, training=True))(model, x, stats)
    x_hat, activations = definition(config, model, stats, x)
    assert 0 < (activations != 0).mean() <= 1
    np.testing.assert_allclose(out.activations, activations, atol=2e-5)
    np.testing.assert_array_equal(np.asarray(out.activations) != 0, activations != 0)
    np.testing.assert_allclose(out.x_hat, x_hat, atol=1e-4)


@pytest.mark.parametrize("name", ["matryoshka_batch_topk", "entmax"])
def test_parts_of_the_dictionary_add_up(name):
    config, model, stats, x = make(name)
    a = model.encode(x, stats)
    whole, parts, first = model.decode_linear(a), 0, 0
    for size in (3, 30, M - 33):
        part = slice(first, first + size)
        parts, first = parts + model.decode_linear(a[:, part], part), first + size
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    expected = np.asarray(a[:, 3:33], np.float64) @ np.asarray(model.decoder()[3:33], np.float64)
    np.testing.assert_allclose(model.decode_linear(a[:, 3:33], slice(3, 33)), expected, atol=1e-5)


def test_a_learned_alpha_starts_at_its_setting_and_has_a_gradient():
    config = SAEConfig.preset("entmax", D, M, values="probabilities", learn_alpha=True, alpha=1.7, score_scale=1.0)
    model = SparseAutoencoder(config, rngs=nnx.Rngs(0))
    assert float(model.alpha()) == pytest.approx(1.7, rel=1e-6)
    _, _, stats, x = make("entmax", values="probabilities", learn_alpha=True)
    loss = lambda m: jnp.sum(m(x, stats).x_hat ** 2)
    by_log_alpha = float(jax.grad(loss)(model).log_alpha[...])
    fixed = lambda alpha: loss(SparseAutoencoder(dataclasses.replace(config, alpha=alpha), rngs=nnx.Rngs(0)))
    numeric = (fixed(1.71) - fixed(1.69)) / 0.02 * 0.7  # d alpha / d log_alpha = alpha - 1
    assert by_log_alpha == pytest.approx(float(numeric), rel=1e-2) and by_log_alpha != 0


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


def test_the_attention_can_start_kaiming_uniform():
    config = SAEConfig.preset("sparsemax", 64, 3000, attention_init="kaiming_uniform")
    model = SparseAutoencoder(config, rngs=nnx.Rngs(0))
    assert np.std(model.concepts[...]) == pytest.approx((2 / 3000) ** 0.5, rel=0.01)
    assert np.std(model.W_K[...]) == pytest.approx((2 / 64) ** 0.5, rel=0.03)
    assert np.abs(model.W_V[...]).max() <= (6 / 64) ** 0.5
    assert not hasattr(model, "W_Q")


def test_the_attention_starts_with_concepts_of_norm_1_that_are_their_own_keys_and_values():
    model = SparseAutoencoder(SAEConfig.preset("sparsemax_paper", 16, 60), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(np.linalg.norm(model.concepts[...], axis=-1), 1, rtol=1e-6)
    for projection in (model.W_K, model.W_Q):
        np.testing.assert_array_equal(projection[...], np.eye(16))
    np.testing.assert_array_equal(model.W_V[...], 4 * np.eye(16))  # probabilities average values of the input's norm
    scores = SparseAutoencoder(SAEConfig.preset("sparsemax", 16, 60, score_scale=2.0), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(scores.W_V[...], np.eye(16) / 2)


def test_projections_move_by_a_fraction_of_the_update():
    moved = {}
    for rate in (1.0, 0.25, 0.0):
        config = SAEConfig.preset("sparsemax", D, M, projection_rate=rate)
        state = init_train_state(config, optax.sgd(0.1), jax.random.key(0))
        before = jax.device_get(state.model)
        state, _ = train_step(config, optax.sgd(0.1), state, jax.random.normal(jax.random.key(1), (B, D)))
        moved[rate] = {n: getattr(state.model, n)[...] - getattr(before, n)[...] for n in ("concepts", "W_K", "W_V")}
    for name in ("W_K", "W_V"):
        assert np.abs(moved[1.0][name]).max() > 1e-3
        np.testing.assert_allclose(moved[0.25][name], 0.25 * moved[1.0][name], atol=1e-6)
        np.testing.assert_array_equal(moved[0.0][name], 0)
    np.testing.assert_array_equal(moved[0.25]["concepts"], moved[1.0]["concepts"])


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
