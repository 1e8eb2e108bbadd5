"""Every term of the loss and its gradient: float64 NumPy formulas, their finite differences, closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_sae import SAEConfig, SparseAutoencoder, init_stats, sae_loss

D, M, B = 5, 12, 7
SCALE = 0.5  # of mean_norm; the losses of the MLPs are in units of the scaled input
DEAD = np.arange(M) % 3 == 0


def case(preset, **overrides):
    """(model, stats, x, the parameters in float64) of an MLP at random parameters, some concepts dead."""
    config = SAEConfig.preset(preset, D, M, **dict(sparsity_warmup_steps=0, dead_after_rows=10) | overrides)
    model, rng = SparseAutoencoder(config, rngs=nnx.Rngs(1)), np.random.default_rng(0)
    for _, leaf in nnx.iter_graph(model):
        if isinstance(leaf, nnx.Param):
            leaf[...] = leaf[...] + 0.3 * rng.standard_normal(leaf.shape).astype(np.float32)
    if config.activation == "jumprelu":
        model.threshold[...] = jnp.abs(model.threshold[...])
    silent = jnp.where(DEAD, 10, 0).astype(jnp.int32)
    stats = dataclasses.replace(init_stats(config), rows_since_fired=silent)
    if config.normalize_input == "mean_norm":
        stats = dataclasses.replace(stats, scale=jnp.float32(SCALE))
    x = 3 * rng.standard_normal((B, D)).astype(np.float32)
    parameters = {k: np.asarray(v[...], np.float64) for k, v in vars(model).items() if isinstance(v, nnx.Param)}
    return model, stats, x, parameters


def term_and_gradient(name, model, stats, x, **arguments):
    def term(model):
        return sae_loss(model, stats, x, 0, **arguments)[1][1][name]

    value, gradient = jax.jit(jax.value_and_grad(term))(model)
    return float(value), {k: np.asarray(v[...]) for k, v in vars(gradient).items() if isinstance(v, nnx.Param)}


def finite_differences(formula, parameters, step=1e-6):
    gradient = {}
    for name, value in parameters.items():
        gradient[name] = np.zeros_like(value)
        for index in np.ndindex(value.shape):
            ends = []
            for sign in (1, -1):
                moved = value.copy()
                moved[index] += sign * step
                ends.append(formula(parameters | {name: moved}))
            gradient[name][index] = (ends[0] - ends[1]) / (2 * step)
    return gradient


def check(name, case, formula, **arguments):
    """The value of a term and its gradient by every parameter."""
    model, stats, x, parameters = case
    value, gradient = term_and_gradient(name, model, stats, x, **arguments)
    assert value == pytest.approx(formula(parameters), rel=2e-6) and value != 0
    expected = finite_differences(formula, parameters)
    assert gradient.keys() == expected.keys()
    size = max(np.abs(g).max() for g in expected.values())
    for parameter, wanted in expected.items():
        np.testing.assert_allclose(gradient[parameter], wanted, atol=5e-6 * size, err_msg=parameter)


def scores(w, x):
    bias = w["b_gate"] if "b_gate" in w else w["b_enc"]
    return (SCALE * x.astype(np.float64) - w["b_dec"]) @ w["W_enc"] + bias


def relu(z):
    return np.maximum(z, 0)


def squared_error(w, a, x):
    """[B] in units of the scaled input."""
    return ((a @ w["W_dec"][: a.shape[-1]] + w["b_dec"] - SCALE * x.astype(np.float64)) ** 2).sum(-1)


def norms(w):
    return np.linalg.norm(w["W_dec"], axis=-1)


@pytest.mark.parametrize("of", ["activations", "contributions"])
@pytest.mark.parametrize("kind", ["l1", "tanh"])
def test_penalties_of_activations(kind, of):
    it = case("relu", sparsity_loss=kind, sparsity_of=of, sparsity_coefficient=0.3, tanh_scale=0.7)

    def formula(w):
        sizes = relu(scores(w, it[2])) * (norms(w) if of == "contributions" else 1)
        return 0.3 * (np.tanh(0.7 * sizes) if kind == "tanh" else sizes).sum(-1).mean()

    check("sparsity", it, formula)


def jump_case(**overrides):
    model, stats, x, w = case("jumprelu", sparsity_coefficient=0.3, bandwidth=0.4, **overrides)
    z, threshold = scores(w, x), w["threshold"]
    near = np.abs(z - threshold) < 0.2
    assert 5 < near.sum() < near.size / 2
    return model, stats, x, w, z, near


@pytest.mark.parametrize("target", [None, 2.0, 9.0])
def test_the_number_of_active_concepts(target):
    model, stats, x, w, z, near = jump_case(target_l0=target)
    count = (z > w["threshold"]).sum(-1).mean()
    value, gradient = term_and_gradient("sparsity", model, stats, x)
    slope = -near.mean(0) / 0.4  # of the count, by each threshold
    expected, factor = (count, 1) if target is None else ((count / target - 1) ** 2, 2 * (count / target - 1) / target)
    assert value == pytest.approx(0.3 * expected, rel=1e-6)
    np.testing.assert_allclose(gradient.pop("threshold"), 0.3 * factor * slope, rtol=2e-6)
    assert not any(other.any() for other in gradient.values()), "a count moves nothing but thresholds"


def test_reconstruction_moves_thresholds_by_what_scores_near_them_are_worth():
    model, stats, x, w, z, near = jump_case()
    a = np.where(z > w["threshold"], z, 0)
    value, gradient = term_and_gradient("reconstruction", model, stats, x)
    assert value == pytest.approx(squared_error(w, a, x).mean(), rel=2e-6)
    by_activation = 2 / B * (a @ w["W_dec"] + w["b_dec"] - SCALE * x.astype(np.float64)) @ w["W_dec"].T
    expected = -(by_activation * near).sum(0) * w["threshold"] / 0.4
    np.testing.assert_allclose(gradient["threshold"], expected, atol=1e-5 * np.abs(expected).max())


def test_dead_concepts_are_pulled_up_to_their_thresholds():
    it = case("jumprelu", pre_activation_coefficient=0.2)

    def formula(w):
        below = relu(w["threshold"] - scores(w, it[2]))
        return 0.2 * (below * norms(w) * DEAD).sum(-1).mean()

    check("pre_activation", it, formula)


def test_nothing_is_pulled_while_nothing_is_dead_or_at_evaluation():
    model, stats, x, _ = case("jumprelu", pre_activation_coefficient=0.2)
    assert "pre_activation" not in sae_loss(model, stats, x, 0, training=False)[1][1]
    stats = dataclasses.replace(stats, rows_since_fired=jnp.zeros(M, jnp.int32))
    assert sae_loss(model, stats, x, 0)[1][1]["pre_activation"] == 0


def gated(w, x):
    """Activations: open gates let the magnitudes through."""
    gates = scores(w, x)
    return np.where(gates > 0, relu(np.exp(w["r_mag"]) * (gates - w["b_gate"]) + w["b_mag"]), 0)


def test_gates_reconstruct_through_a_decoder_that_does_not_move():
    it = case("gated")
    fixed = {name: it[3][name] for name in ("W_dec", "b_dec")}
    check("gate", it, lambda w: squared_error(fixed, relu(scores(w, it[2])), it[2]).mean())


def test_gated_reconstruction():
    it = case("gated")
    check("reconstruction", it, lambda w: squared_error(w, gated(w, it[2]), it[2]).mean())


@pytest.mark.parametrize("of", ["activations", "contributions"])
def test_the_penalty_of_gated_is_on_its_gates(of):
    it = case("gated", sparsity_of=of, sparsity_coefficient=0.3)
    weight = norms if of == "contributions" else lambda w: 1
    check("sparsity", it, lambda w: 0.3 * (relu(scores(w, it[2])) * weight(w)).sum(-1).mean())


def prefix_errors(w, a, x, sizes):
    """[B, groups] of the reconstructions from the first part of the dictionary, the first two, and so on."""
    return np.stack([squared_error(w, a[:, :last], x) for last in np.cumsum(sizes)], -1)


def test_matryoshka_averages_the_errors_of_prefixes():
    it = case("relu", group_fractions=(0.25, 0.25, 0.5))
    assert it[0].config.group_sizes == (3, 3, 6)
    check("reconstruction", it, lambda w: prefix_errors(w, relu(scores(w, it[2])), it[2], (3, 3, 6)).mean())


def test_matryoshka_over_the_batch():
    it = case("matryoshka_batch_topk", group_fractions=(0.3, 0.7), k=3)
    positive = relu(scores(it[3], it[2]))
    kept = positive >= np.sort(positive.ravel())[-3 * B]
    check("reconstruction", it, lambda w: prefix_errors(w, kept * scores(w, it[2]), it[2], (3, 9)).mean())


def test_one_group_is_the_plain_loss():
    model, stats, x, _ = case("relu", group_fractions=(1.0,))
    plain = case("relu")[0]
    assert sae_loss(model, stats, x, 0)[0] == sae_loss(plain, stats, x, 0)[0]


WEIGHTS = np.array([2, 1, 0, 1, 0.5, 1, 3])


@pytest.mark.parametrize("groups", [(), (0.5, 0.5)])
@pytest.mark.parametrize("loss", ["squared_error", "mse", "mse_over_norm"])
def test_row_weights_scale_the_error_of_each_row(loss, groups):
    it = case("relu", loss=loss, loss_scale=3.0, group_fractions=groups)

    def formula(w):
        x = it[2].astype(np.float64)
        errors = prefix_errors(w, relu(scores(w, x)), x, (6, 6) if groups else (M,)).mean(-1)
        if loss == "mse_over_norm":  # back to the units of the data
            errors = errors / SCALE**2 / np.linalg.norm(x, axis=-1)
        return 3.0 * (WEIGHTS * errors).mean() / (1 if loss == "squared_error" else D)

    check("reconstruction", it, formula, row_weights=jnp.asarray(WEIGHTS, jnp.float32))


def test_row_weights_of_the_attention_are_over_the_norms_of_centred_rows():
    model, stats, x, w = case("attention_relu")
    stats = dataclasses.replace(stats, mean=jnp.arange(D) / 4)
    centred = x.astype(np.float64) - np.arange(D) / 4
    norm = np.linalg.norm(centred, axis=-1, keepdims=True)
    a = relu(centred / norm @ (w["concepts"] @ w["W_K"]).T)
    errors = (norm * (a @ w["concepts"] @ w["W_V"]) - centred) ** 2 / norm
    for weights in (None, WEIGHTS):
        expected = 10 * (errors.mean(-1) * (1 if weights is None else weights)).mean()
        row_weights = None if weights is None else jnp.asarray(weights, jnp.float32)
        _, (_, terms) = sae_loss(model, stats, x, 0, row_weights=row_weights)
        assert terms["reconstruction"] == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize(
    ("preset", "overrides", "names"),
    [
        ("relu", {}, {"reconstruction", "sparsity"}),
        ("gated", {}, {"reconstruction", "sparsity", "gate"}),
        ("gated", dict(sparsity_coefficient=0.0), {"reconstruction", "gate"}),
        ("jumprelu", dict(pre_activation_coefficient=0.1), {"reconstruction", "sparsity", "pre_activation"}),
        ("matryoshka_batch_topk", dict(group_fractions=(0.5, 0.5)), {"reconstruction", "aux"}),
        ("entmax", {}, {"reconstruction"}),
    ],
)
def test_the_loss_is_the_sum_of_its_terms(preset, overrides, names):
    model, stats, x, _ = case(preset, **overrides)
    loss, (_, terms) = sae_loss(model, stats, x, 0)
    assert terms.keys() == names
    assert float(loss) == pytest.approx(sum(float(term) for term in terms.values()), rel=1e-6)
