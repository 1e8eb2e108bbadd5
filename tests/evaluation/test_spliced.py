"""Spliced cross-entropy against a model whose loss is known in closed form, and against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_sae.backbones.llama import Llama, LlamaConfig
from jax_sae.errors import InputError
from jax_sae.evaluation.spliced import (
    baseline_loss,
    evaluate_baselines,
    evaluate_spliced,
    splice,
    spliced_loss,
    spliced_metrics,
)

CONFIG = LlamaConfig(40, 16, 3, 4, 2, 4, 24, 1e-5, 1e4, None, 64, True)
MEAN = np.linspace(-1, 1, 16).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> Llama:
    return Llama(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 40, (5, 12))


def squeezed(x: jax.Array) -> jax.Array:
    """A reconstruction that keeps the first 12 of 16 features."""
    return x.at[..., 12:].set(0.0)


class CountingModel:
    """The loss at position t is the sum of the residual stream at positions 0 to t: every change shows."""

    def residual(self, tokens, layer):
        return jnp.asarray(tokens, jnp.float32)[..., None]

    def next_token_loss(self, residual, tokens, layer):
        return jnp.cumsum(residual[..., 0], axis=1)[:, :-1]


def test_closed_form():
    sums = spliced_loss(CountingModel(), 0, np.array([[10, 1, 2, 3]]), lambda x: 2 * x, jnp.array([5.0]), 1)
    # predictions at positions 1 and 2; position 0 keeps its 10 in every variant
    assert sums.clean == (10 + 1) + (10 + 1 + 2)
    assert sums.sae == (10 + 2) + (10 + 2 + 4)
    assert sums.mean_ablated == (10 + 5) + (10 + 5 + 5)
    assert sums.zero_ablated == 10 + 10
    assert sums.predictions == 2
    assert spliced_metrics(sums) == pytest.approx(
        {
            "ce_clean": 12,
            "ce_sae": 14,
            "ce_mean_ablated": 17.5,
            "ce_zero_ablated": 10,
            "ce_degradation": 2,
            "loss_recovered": 1 - 2 / -2,
            "loss_recovered_mean": 1 - 2 / 5.5,
        }
    )


def test_first_position_zero_replaces_everything():
    sums = spliced_loss(CountingModel(), 0, np.array([[10, 1, 2, 3]]), lambda x: 2 * x, jnp.array([5.0]), 0)
    assert (sums.clean, sums.zero_ablated, sums.predictions) == (10 + 11 + 13, 0, 3)


def test_against_numpy_on_a_llama(model, tokens):
    """The variants one by one, cross-entropy in float64 from the logits."""
    residual = model.residual(tokens, 2)
    replacements = {
        "ce_clean": residual,
        "ce_sae": squeezed(residual),
        "ce_mean_ablated": np.broadcast_to(MEAN, residual.shape),
        "ce_zero_ablated": np.zeros_like(residual),
    }
    got = evaluate_spliced(model, 2, tokens, squeezed, MEAN, 1, batch_size=5)
    for name, replacement in replacements.items():
        spliced = np.concatenate([residual[:, :1], replacement[:, 1:]], axis=1)
        logits = np.asarray(model.unembed(model.run(spliced, 2, 3)), np.float64)[:, 1:-1]
        targets = tokens[:, 2:, None]
        loss = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets, -1)[..., 0]
        assert got[name] == pytest.approx(loss.mean(), rel=1e-5)
    assert got["ce_degradation"] != 0


def test_a_perfect_reconstruction_recovers_everything(model, tokens):
    got = evaluate_spliced(model, 1, tokens, lambda x: x, MEAN, 1)
    assert (got["ce_degradation"], got["loss_recovered"], got["loss_recovered_mean"]) == (0, 1, 1)


def test_the_mean_as_reconstruction_recovers_nothing_of_the_mean_ablation(model, tokens):
    got = evaluate_spliced(model, 1, tokens, lambda x: jnp.broadcast_to(MEAN, x.shape), MEAN, 1)
    assert got["loss_recovered_mean"] == pytest.approx(0, abs=1e-6)


def test_the_batch_size_changes_nothing(model, tokens):
    done = []
    whole = evaluate_spliced(model, 2, tokens, squeezed, MEAN, 1, batch_size=5)
    pieces = evaluate_spliced(model, 2, tokens, squeezed, MEAN, 1, batch_size=2, progress=done.append)
    assert done == [2, 2, 1]
    assert pieces == pytest.approx(whole, rel=1e-5)


def test_one_compilation_for_several_autoencoders(model, tokens):
    def scaled(scale, x):
        return x * scale

    traces = []

    class Traced(CountingModel):
        def residual(self, tokens, layer):
            traces.append(layer)
            return super().residual(tokens, layer)

    jax.tree_util.register_static(Traced)
    backbone = Traced()
    for scale in (0.5, 0.25):
        reconstruct = jax.tree_util.Partial(scaled, jnp.float32(scale))
        got = evaluate_spliced(backbone, 0, tokens, reconstruct, np.zeros(1), 1)
        x = tokens.astype(float)
        expected = x[:, :1] + scale * (np.cumsum(x, axis=1) - x[:, :1])[:, 1:-1]
        assert got["ce_sae"] == pytest.approx(expected.mean(), rel=1e-6)
    assert len(traces) == 1


def test_baselines_in_closed_form():
    sums = baseline_loss(CountingModel(), 0, np.array([[10, 1, 2, 3]]), jnp.array([5.0]), 1)
    assert (sums.clean, sums.mean_ablated, sums.zero_ablated, sums.predictions) == (24, 35, 20, 2)


@pytest.mark.parametrize("batch_size", [2, 5])
def test_shared_baselines_change_no_number(model, tokens, batch_size):
    done = []
    baselines = evaluate_baselines(model, 2, tokens, MEAN, 1, batch_size=batch_size, progress=done.append)
    assert sum(done) == 5
    for reconstruct in (squeezed, lambda x: x, lambda x: 0.9 * x):
        alone = evaluate_spliced(model, 2, tokens, reconstruct, MEAN, 1, batch_size=batch_size)
        shared = evaluate_spliced(model, 2, tokens, reconstruct, MEAN, 1, baselines=baselines, batch_size=batch_size)
        assert shared == pytest.approx(alone, rel=1e-6, abs=1e-6)


def test_with_baselines_only_the_reconstruction_runs_through_the_model(tokens):
    runs = []

    class Counted(CountingModel):
        def next_token_loss(self, residual, tokens, layer):
            jax.debug.callback(lambda: runs.append(layer))
            return super().next_token_loss(residual, tokens, layer)

    jax.tree_util.register_static(Counted)
    baselines = evaluate_baselines(Counted(), 0, tokens, np.zeros(1), 1)
    jax.effects_barrier()
    assert len(runs) == 3
    evaluate_spliced(Counted(), 0, tokens, lambda x: x, np.zeros(1), 1, baselines=baselines)
    jax.effects_barrier()
    assert len(runs) == 4


def test_baselines_of_other_sequences_are_refused(model, tokens):
    baselines = evaluate_baselines(model, 1, tokens[:3], MEAN, 1)
    with pytest.raises(ValueError, match="baselines are of 30 predictions, the sequences have 50"):
        evaluate_spliced(model, 1, tokens, squeezed, MEAN, 1, baselines=baselines)


def test_splice_keeps_the_dtype_of_the_residual():
    x = jnp.ones((1, 3, 2), jnp.float32)
    spliced = splice(x, jnp.zeros((1, 3, 2), jnp.bfloat16), 1)
    assert spliced.dtype == jnp.float32
    np.testing.assert_array_equal(spliced[0, :, 0], [1, 0, 0])


def test_no_prediction_to_count(model):
    with pytest.raises(InputError, match="sequences have 2 tokens, expected at least 3"):
        evaluate_spliced(model, 1, np.zeros((1, 2), int), squeezed, MEAN, 1)
    with pytest.raises(InputError, match="no held-out sequences"):
        evaluate_spliced(model, 1, np.zeros((0, 12), int), squeezed, MEAN, 1)
    with pytest.raises(InputError, match="no held-out sequences"):
        evaluate_baselines(model, 1, np.zeros((0, 12), int), MEAN, 1)
