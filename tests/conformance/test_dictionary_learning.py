"""ReLU, TopK, BatchTopK, Matryoshka, JumpReLU and Gated against dictionary_learning: loss, gradients, one update.

Where that library does something else on purpose or by accident, the test says so by name and accounts for it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_sae import SAEConfig, TrainState, dead_concepts, init_stats, sae_loss, train_step, update_stats
from jax_sae.sae import losses
from tests.conformance.golden import close, same_support, with_parameters

# Our parameter: (theirs, whether theirs is transposed).
LINEAR = {
    "W_enc": ("encoder_weight", True),
    "b_enc": ("encoder_bias", False),
    "W_dec": ("decoder_weight", True),
    "b_dec": ("b_dec", False),
}
PLAIN = {name: (name, False) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
L1 = LINEAR | {"b_dec": ("bias", False)}
JUMP = PLAIN | {"threshold": ("threshold", False)}
GATED = {
    "W_enc": ("encoder_weight", True),
    "b_gate": ("gate_bias", False),
    "r_mag": ("r_mag", False),
    "b_mag": ("mag_bias", False),
    "W_dec": ("decoder_weight", True),
    "b_dec": ("decoder_bias", False),
}
RATE = 0.01  # of the one recorded update


def ours(g, names, prefix):
    """Their arrays under our names and in our layout."""
    return {name: g[prefix + their].T if flip else g[prefix + their] for name, (their, flip) in names.items()}


def setup(g, preset, names, **overrides):
    """Their model; the data are taken as they come."""
    parameters = ours(g, names, "param_")
    m, d = parameters["W_dec"].shape
    config = SAEConfig.preset(preset, d, m, normalize_input="none", **overrides)
    return config, with_parameters(config, **parameters), init_stats(config)


def with_silence(stats, g, prefix):
    """The counters after this batch, which is when they look for dead concepts."""
    silent = jnp.asarray(g[f"{prefix}num_tokens_since_fired_after"], jnp.int32)
    return dataclasses.replace(stats, rows_since_fired=silent)


def check_loss(g, prefix, names, model, stats, step=0, *, but=()):
    """Features, reconstruction, loss and gradients (``but`` some); gives the terms, the output and the gradients."""
    (loss, (out, terms)), grads = jax.value_and_grad(sae_loss, has_aux=True)(model, stats, jnp.asarray(g["x"]), step)
    same_support(out.activations, g[f"{prefix}f"])
    close(out.activations, g[f"{prefix}f"], name="features")
    close(out.x_hat, g[f"{prefix}x_hat"], name="x_hat")
    close(loss, g[f"{prefix}loss"], name="loss")
    for name, expected in ours(g, names, f"{prefix}grad_").items():
        if name not in but:
            close(getattr(grads, name)[...], expected, name=f"gradient of {name}")
    return terms, out, grads


def check_update(g, names, model, stats, *, clip, step=4999):
    """Parameters after one step of Adam."""
    adam = optax.adam(RATE)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adam) if clip else adam
    state = TrainState(jnp.int32(step), model, optimizer.init(model), stats)
    state, _ = train_step(model.config, optimizer, state, jnp.asarray(g["x"]))
    before = ours(g, names, "param_")
    for name, expected in ours(g, names, "after_update_").items():
        got = np.array(getattr(state.model, name)[...])
        # Adam's first step is RATE times the sign of the gradient, but for gradients near its eps = 1e-8, where it is
        # whatever their rounding says.
        moved = np.abs(expected - before[name])
        unsure = (moved > 0) & (moved < 0.99 * RATE) & (name != "W_dec" or not model.config.unit_norm_decoder)
        assert unsure.mean() <= 0.02 and (np.abs(got - before[name])[unsure] <= 1.01 * RATE).all(), name
        got[unsure] = expected[unsure]
        close(got, expected, 1e-5, f"{name} after the update")


def check_evaluation(g, model, stats):
    out = model(jnp.asarray(g["x"]), stats)
    same_support(out.activations, g["eval_f"])
    close(out.activations, g["eval_f"], name="features at evaluation")
    close(out.x_hat, g["eval_x_hat"], name="x_hat at evaluation")


def warmup(step):
    """Their warm-up is step / sparsity_warmup_steps at a step counted from 1; ours counts from 0."""
    return int(step) - 1


def penalty(golden, coefficient="l1_penalty"):
    """The settings of their sparsity penalty."""
    arguments = golden.arguments
    return dict(sparsity_coefficient=arguments[coefficient], sparsity_warmup_steps=arguments["sparsity_warmup_steps"])


def recorded_steps(golden):
    """(prefix, our step) of every recorded call of a loss with a warm-up."""
    found = [(name.removesuffix("step"), warmup(golden[name])) for name in golden if name.endswith("_step")]
    assert found
    return found


def check_l1(golden, prefix, config, terms, step):
    close(terms["reconstruction"], golden[f"{prefix}log_mse_loss"], name="reconstruction")
    rise = min(1, (step + 1) / config.sparsity_warmup_steps)
    expected = config.sparsity_coefficient * rise * golden[f"{prefix}log_sparsity_loss"]
    close(terms["sparsity"], expected, name="sparsity")


@pytest.mark.golden("dl_relu_l1")
def test_relu_with_l1(golden):
    config, model, stats = setup(golden, "relu", L1, **penalty(golden))
    for prefix, step in recorded_steps(golden):
        terms, _, _ = check_loss(golden, prefix, L1, model, stats, step)
        check_l1(golden, prefix, config, terms, step)
    check_evaluation(golden, model, stats)
    check_update(golden, L1, model, stats, clip=False)


@pytest.mark.golden("dl_relu_l1_april")
def test_relu_with_l1_of_contributions(golden):
    settings = dict(sparsity_of="contributions", unit_norm_decoder=False)
    config, model, stats = setup(golden, "relu", L1, **settings, **penalty(golden))
    for prefix, step in recorded_steps(golden):
        terms, _, _ = check_loss(golden, prefix, L1, model, stats, step)
        check_l1(golden, prefix, config, terms, step)
    check_evaluation(golden, model, stats)
    check_update(golden, L1, model, stats, clip=True)


def k_of(golden, preset):
    """From the .json; without one, what the features show: exactly k in a row, or k rows' worth in a batch."""
    counts = (golden["f"] != 0).sum(-1)
    shown = counts.max() if preset == "topk" else round(counts.mean())
    return golden.arguments["k"] if golden.meta else int(shown)


def check_topk_family(golden, preset, names, **overrides):
    """Both recorded calls; gives what each is to be checked with further."""
    settings = dict(k=k_of(golden, preset), aux_k=golden["x"].shape[-1] // 2, threshold_decay=0.999)
    config, model, stats = setup(golden, preset, names, **settings, **overrides)
    for prefix in ("", "dead_"):
        silent = with_silence(stats, golden, prefix)
        assert int((silent.rows_since_fired >= config.dead_after_rows).sum()) == golden[f"{prefix}n_dead"]
        before = jnp.asarray(golden[f"{prefix}num_tokens_since_fired_before"], jnp.int32)
        yield prefix, model, silent, dataclasses.replace(stats, rows_since_fired=before)


def check_statistics(golden, prefix, model, before, activations):
    """Silence counters, and BatchTopK's running threshold. Their TopK keeps one too, and does not use it here."""
    threshold = jnp.asarray(golden[f"{prefix}threshold_before"], jnp.float32)
    after = update_stats(model.config, dataclasses.replace(before, threshold=threshold), activations)
    np.testing.assert_array_equal(after.rows_since_fired, golden[f"{prefix}num_tokens_since_fired_after"])
    if model.config.activation == "batch_topk":
        close(after.threshold, golden[f"{prefix}threshold_after"], name="threshold")


def check_topk(golden, preset, names, **overrides):
    for prefix, model, stats, before in check_topk_family(golden, preset, names, **overrides):
        terms, out, _ = check_loss(golden, prefix, names, model, stats)
        close(terms["reconstruction"], golden[f"{prefix}log_l2_loss"], name="reconstruction")
        close(32 * terms["aux"], golden[f"{prefix}log_auxk_loss"], name="auxk")
        check_statistics(golden, prefix, model, before, out.activations)
    # They evaluate last, with the threshold that the calls have left.
    threshold = jnp.asarray(golden["dead_threshold_after"], jnp.float32)
    check_evaluation(golden, model, dataclasses.replace(stats, threshold=threshold))
    check_update(golden, names, model, init_stats(model.config), clip=True)


@pytest.mark.golden("dl_topk")
def test_topk(golden):
    check_topk(golden, "topk", LINEAR)


@pytest.mark.golden("dl_batchtopk")
def test_batch_topk(golden):
    check_topk(golden, "batch_topk", LINEAR)


@pytest.mark.golden("dl_matryoshka_batchtopk")
def test_matryoshka_batch_topk(golden):
    """Their reconstruction loss is divided by the number of groups twice: the mean over prefixes, and once more."""
    fractions = tuple(golden.arguments["group_fractions"])
    settings = dict(group_fractions=fractions, loss_scale=1 / len(fractions))
    check_topk(golden, "matryoshka_batch_topk", PLAIN, **settings)


def jumprelu(golden):
    arguments = golden.arguments
    settings = dict(bandwidth=arguments["bandwidth"], target_l0=arguments["target_l0"], apply_b_dec_to_input=False)
    return setup(golden, "jumprelu", JUMP, **settings, **penalty(golden, "sparsity_penalty"))


@pytest.mark.golden("dl_jumprelu")
def test_jumprelu(golden):
    """They count features above their thresholds, we count scores, as the paper does.

    The counts are the same, the windows of their derivative are not: a feature that is off is at 0 for them, which is
    near every small threshold.
    """
    config, model, stats = jumprelu(golden)
    threshold = np.asarray(golden["param_threshold"])
    near = lambda values: np.abs(np.asarray(values) - threshold) < config.bandwidth / 2
    for prefix, step in recorded_steps(golden):
        terms, out, grads = check_loss(golden, prefix, JUMP, model, stats, step, but=("threshold",))
        close(terms["reconstruction"], golden[f"{prefix}log_l2_loss"])
        active = (golden[f"{prefix}f"] != 0).sum(-1).mean()
        slope = 2 * (active / config.target_l0 - 1) / config.target_l0
        slope *= config.sparsity_coefficient * min(1, (step + 1) / config.sparsity_warmup_steps)
        windows = near(out.activations).mean(0) - near(out.scores).mean(0)
        expected = golden[f"{prefix}grad_threshold"] + slope * windows / config.bandwidth
        close(grads.threshold[...], expected, name="gradient of threshold")
        silent = jnp.asarray(golden[f"{prefix}num_tokens_since_fired_before"], jnp.int32)
        after = update_stats(config, dataclasses.replace(stats, rows_since_fired=silent), out.activations)
        np.testing.assert_array_equal(after.rows_since_fired, golden[f"{prefix}num_tokens_since_fired_after"])
        assert int(dead_concepts(config, after).sum()) == golden[f"{prefix}n_dead"]
    check_evaluation(golden, model, stats)


@pytest.mark.golden("dl_jumprelu")
def test_jumprelu_with_their_windows(golden, monkeypatch):
    """Our penalty of their features instead of our scores gives their gradients and their update."""
    of_scores = losses.sparsity_penalty
    of_features = lambda model, out, *rest: of_scores(model, dataclasses.replace(out, scores=out.activations), *rest)
    monkeypatch.setattr(losses, "sparsity_penalty", of_features)
    _, model, stats = jumprelu(golden)
    for prefix, step in recorded_steps(golden):
        check_loss(golden, prefix, JUMP, model, stats, step)
    check_update(golden, JUMP, model, stats, clip=True)


@pytest.mark.golden("dl_gated")
def test_gated(golden):
    config, model, stats = setup(golden, "gated", GATED, **penalty(golden))
    for prefix, step in recorded_steps(golden):
        terms, _, _ = check_loss(golden, prefix, GATED, model, stats, step)
        check_l1(golden, prefix, config, terms, step)
        close(terms["gate"], golden[f"{prefix}log_aux_loss"], name="gate")
    check_evaluation(golden, model, stats)
    check_update(golden, GATED, model, stats, clip=False)
