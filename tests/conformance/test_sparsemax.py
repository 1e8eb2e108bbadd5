"""The Sparsemax SAE against the authors' code: the operator, forward and backward passes, masks, training steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_sae
from jax_sae import SAEConfig, TrainState, init_stats, sae_loss, train_step, update_stats
from tests.conformance.golden import close, same_support, with_parameters
from tests.ops.reference import jacobian

IMPLEMENTATIONS = ["xla", "sort"]
loss_and_gradients = jax.jit(jax.value_and_grad(sae_loss, has_aux=True), static_argnames="training")
NAMES = {"concepts": "concept", "W_K": "k", "W_V": "v"}


@pytest.mark.golden("sparsemax_op")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("prefix", ["wide_", "wide_small_", "wide_dense_"])
def test_wide_rows(golden, prefix, implementation):
    z, p, cotangent, vjp = (golden[prefix + name] for name in ("z", "p", "g", "vjp"))
    got, pullback = jax.vjp(functools.partial(jax_sae.sparsemax, implementation=implementation), z)
    same_support(got, p)
    close(got, p)
    close(pullback(jnp.asarray(cotangent))[0], vjp)


@pytest.mark.golden("sparsemax_op")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("prefix", "tolerance"), [("", 2e-6), ("f64_", 1e-12)])
def test_named_rows(golden, prefix, tolerance, implementation):
    z, p, cotangent, vjp, jacobians = (golden[prefix + name] for name in ("z", "p", "g", "vjp", "jacobian"))
    with jax.enable_x64(prefix == "f64_"):
        f = functools.partial(jax_sae.sparsemax, implementation=implementation)
        got, pullback = jax.vjp(f, jnp.asarray(z))
        got_vjp, got_jacobians = np.asarray(pullback(jnp.asarray(cotangent))[0]), jax.vmap(jax.jacrev(f))(z)
    assert got.dtype == z.dtype
    same_support(got, p)
    for row, name in zip(range(len(z)), golden.meta.get("row_names", map(str, range(len(z)))), strict=True):
        close(got[row], p[row], tolerance, name)
        tied = (p[row] == 0) & (np.diagonal(jacobians[row]) != 0)
        if tied.any():
            # Entries exactly at the threshold: the reference lets the gradient through, here their derivative is 0.
            tau = (z[row][p[row] > 0].astype(np.float64) - p[row][p[row] > 0]).mean()
            np.testing.assert_allclose(z[row][tied], tau, rtol=tolerance, atol=tolerance, err_msg=name)
            expected, expected_vjp = jacobian(p[row]), jacobian(p[row]) @ cotangent[row]
        else:
            expected, expected_vjp = jacobians[row], vjp[row]
        np.testing.assert_allclose(got_jacobians[row], expected, atol=tolerance, err_msg=name)
        np.testing.assert_allclose(got_vjp[row], expected_vjp, atol=tolerance * np.abs(vjp).max(), err_msg=name)


def reference(arrays, **overrides):
    """The reference's model: the preset with its loss and equal steps of all parameters, without mean-centring."""
    m, d = arrays["concept"].shape
    recipe = dict(loss="mse_over_norm", loss_scale=10.0, projection_rate=1.0)
    config = SAEConfig.preset("sparsemax", d, m, center_input=False, **recipe, **overrides)
    model = with_parameters(config, **{ours: arrays[theirs] for ours, theirs in NAMES.items()})
    return model, init_stats(config)


def check_call(model, stats, g, *, cls_weight=1.0, training=True, gradients=True, tolerance=2e-6):
    """One recorded call of the reference: activations, reconstruction, loss, gradients. Gives the activations."""
    tokens = g["x"].shape[:-1]
    weights = np.ones(tokens, g["x"].dtype)
    weights[..., :1] = cls_weight
    x = jnp.asarray(g["x"].reshape(-1, g["x"].shape[-1]))
    stats = dataclasses.replace(stats, frequency=jnp.asarray(g["idf_before"], jnp.float32))
    weights = jnp.asarray(weights.reshape(-1))
    (value, (out, terms)), grads = loss_and_gradients(model, stats, x, 0, row_weights=weights, training=training)
    flat = lambda a: a.reshape(-1, a.shape[-1])
    same_support(out.activations, flat(g["feature_acts"]))
    close(out.activations, flat(g["feature_acts"]), tolerance, "activations")
    close(out.x_hat, flat(g["sae_out"]), tolerance, "x_hat")
    close(value, g["loss"], tolerance, "loss")
    assert set(terms) == {"reconstruction"} and not g["l1_loss"] and not g["mse_loss_ghost_resid"]
    if gradients:
        capped = np.asarray(stats.frequency) > model.config.frequency_cap
        close(out.scores, flat(np.where(capped, 0, g["hidden_pre"])), tolerance, "scores")
        for ours, theirs in NAMES.items():
            close(getattr(grads, ours)[...], g[f"grad_{theirs}"], tolerance, theirs)
        # From the recorded scores: p is small differences of scores, and would show what those were rounded by.
        p = jax_sae.sparsemax(jnp.asarray(np.where(capped, 0, g["hidden_pre"])))
        close(p, g["sparse_probs"], tolerance, "p")
    return out.activations


@pytest.mark.golden("sparsemax_sae_forward")
def test_calls_in_a_row(golden):
    model, stats = reference(golden)
    steps = [name.removesuffix("_x") for name in golden if name.startswith("step") and name.endswith("_x")]
    assert len(steps) >= 2
    for step in steps:
        g = golden.part(f"{step}_")
        close(stats.frequency, g["idf_before"], name="frequency before")
        stats = update_stats(model.config, stats, check_call(model, stats, g))
        close(stats.frequency, g["idf_after"], name="frequency after")
    assert any((golden[f"{step}_idf_before"] > 0.1).any() for step in steps), "the cap must have been at work"


@pytest.mark.golden("sparsemax_sae_forward")
def test_calls_in_a_row_in_float64(golden):
    """Scores, supports and probabilities; the module itself computes in float32, which bounds everything else."""
    steps = [name.removesuffix("_x") for name in golden if name.startswith("f64_step") and name.endswith("_x")]
    assert steps
    for step in steps:
        g = golden.part(f"{step}_")
        with jax.enable_x64(True):
            x, c, k = (jnp.asarray(a, jnp.float64) for a in (g["x"], golden["concept"], golden["k"]))
            scores = x / jnp.linalg.norm(x, axis=-1, keepdims=True) @ k.T @ c.T
            close(scores, g["hidden_pre"], 1e-12, "scores")
            z = jnp.where(jnp.asarray(g["idf_before"] > 0.1)[None], 0, scores)
            for implementation in IMPLEMENTATIONS:
                p = jax_sae.sparsemax(z, implementation=implementation)
                close(p, g["sparse_probs"], 1e-12, "p")
                tau, _ = jax_sae.sparsemax_threshold(z, implementation=implementation)
                close(jnp.where(z > tau[:, None], z, 0), g["feature_acts"], 1e-12, "activations")


@pytest.mark.golden("sparsemax_sae_forward_regimes")
@pytest.mark.parametrize("regime", ["tiny_", "large_"])
def test_negative_thresholds_and_tiny_supports(golden, regime):
    model, stats = reference(golden.part(regime))
    for prefix in (regime, f"{regime}second_"):
        g = golden.part(prefix)
        stats = update_stats(model.config, stats, check_call(model, stats, g))
        close(stats.frequency, g["idf_after"], name="frequency")


@pytest.mark.golden("sparsemax_sae_forward_tokens")
def test_tokens_with_a_weight_on_cls(golden):
    model, stats = reference(golden)
    calls = [name.removesuffix("_x") for name in golden if name.endswith("_x")]
    assert any(call.startswith("step") for call in calls) and any(call.startswith("eval") for call in calls)
    for call in calls:
        g, training = golden.part(f"{call}_"), call.startswith("step")
        weight = float(golden["mse_cls_coefficient"]) if training else 1.0
        activations = check_call(model, stats, g, cls_weight=weight, training=training)
        before, stats = stats, update_stats(model.config, stats, activations)
        close(stats.frequency, g["idf_after"], name="frequency")
        if not training:
            # The reference moves its frequencies here too, and with them its next answer. Ours are an argument.
            x = jnp.asarray(g["x"])
            first, second = (model(x, before).activations for _ in range(2))
            np.testing.assert_array_equal(first, second)
            same_support(first, g["feature_acts"])


@pytest.mark.golden("sparsemax_sae_clamp")
def test_masked_and_scaled_concepts(golden):
    """``forward_clamp``: encode without the cap, scale chosen concepts, decode."""
    model, stats = reference(golden, frequency_cap=None)
    out = model(jnp.asarray(golden["x"]), stats)
    close(out.activations, golden["plain_feature_acts"])
    for case in ("plain", "on", "off", "vec", "idx_scalar", "idx_vec"):
        g = golden.part(f"{case}_")
        if case in ("on", "off"):
            factors = jnp.asarray(golden[f"{case}_mask"])
        elif case == "vec":
            factors = jnp.asarray(golden["vec"])
        else:  # factors on a few indices, which only the recorded activations name
            there = golden["plain_feature_acts"] != 0
            ratios = np.where(there, g["feature_acts"], 1) / np.where(there, golden["plain_feature_acts"], 1)
            times = np.maximum(there.sum((0, 1)), 1)
            factors = jnp.asarray(np.where(there.any((0, 1)), (ratios * there).sum((0, 1)) / times, 1))
        activations = out.activations * factors[None, None]
        same_support(activations, g["feature_acts"])
        close(activations, g["feature_acts"], name=case)
        x_hat = model.decode(activations, stats, out.norm)
        close(x_hat, g["sae_out"], name=case)
        close(10 * jnp.mean((x_hat - golden["x"]) ** 2 / out.norm), g["loss"], name=case)


@pytest.mark.golden("sparsemax_sae_trainer")
def test_optimizer_steps(golden):
    """Parameters after every step of Adam with warm-up, statistics, and the metrics that both sides have."""
    model, stats = reference(golden.part("init_"))
    config: SAEConfig = model.config
    steps = sorted(int(name.removeprefix("step").removesuffix("_x")) for name in golden if name.endswith("_x"))
    rates = jnp.asarray([golden[f"step{step}_lr"] for step in steps], jnp.float32)
    optimizer = optax.adam(lambda count: rates[count])
    state = TrainState(jnp.int32(0), model, optimizer.init(model), stats)
    for step in steps:
        g = golden.part(f"step{step}_")
        rows = g["x"].reshape(-1, config.d_in)
        out = state.model(jnp.asarray(rows), state.stats)
        same_support(out.activations, g["feature_acts"].reshape(len(rows), -1))
        close(out.activations, g["feature_acts"].reshape(len(rows), -1), 1e-5, f"activations of step {step}")
        close(out.x_hat, g["sae_out"].reshape(rows.shape), 1e-5, f"x_hat of step {step}")
        state, metrics = train_step(config, optimizer, state, jnp.asarray(rows))
        close(metrics["loss"], g["loss"], name=f"loss of step {step}")
        # The reference counts positive activations; a negative threshold lets negative ones through, which count here.
        close((np.asarray(out.activations) > 0).sum(-1).mean(), g["metrics_l0"], name=f"active of step {step}")
        close(metrics["active"], (np.asarray(out.activations) != 0).sum(-1).mean())
        close(state.stats.frequency, g["idf"], name=f"frequency after step {step}")
        silent = g["n_forward_passes_since_fired"] * len(rows)  # the reference counts passes
        np.testing.assert_array_equal(state.stats.rows_since_fired, silent)
        for ours, theirs in NAMES.items():
            close(getattr(state.model, ours)[...], g[theirs], 1e-5, f"{theirs} after step {step}")
