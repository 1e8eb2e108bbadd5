"""The Llama against Hugging Face transformers, layer by layer, and against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_sae.backbones.llama import Llama, LlamaConfig, load_huggingface, load_llama
from jax_sae.errors import InputError

SMALL = LlamaConfig(50, 16, 3, 4, 2, 4, 24, 1e-5, 1e4, None, 200, True)


@pytest.fixture(scope="module")
def small() -> Llama:
    return Llama(SMALL, rngs=nnx.Rngs(0))


def next_token_loss64(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Cross-entropy in float64 by its definition."""
    logits = np.asarray(logits, np.float64)[:, :-1]
    normalizer = np.log(np.exp(logits).sum(-1))
    return normalizer - np.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]


@jax.jit
def every_layer(model: Llama, tokens: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    layers = range(model.config.n_layers + 1)
    return [model.residual(tokens, layer) for layer in layers], model.logits(tokens)


def assert_matches(model: Llama, golden: dict) -> None:
    residuals, logits = every_layer(model, golden["input_ids"])
    for layer, residual in enumerate(residuals):
        np.testing.assert_allclose(residual, golden[f"residual_{layer}"], atol=3e-5, rtol=1e-5)
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4, rtol=1e-5)


def test_every_block_matches_transformers(golden, write_huggingface):
    assert_matches(load_huggingface(write_huggingface(golden["config"], golden["weights"])), golden)


def test_every_block_matches_transformers_live(live_golden, write_huggingface):
    assert_matches(load_llama(write_huggingface(live_golden["config"], live_golden["weights"])), live_golden)


def test_run_continues_from_any_layer(golden, write_huggingface):
    model = load_huggingface(write_huggingface(golden["config"], golden["weights"]))
    residuals = [golden[f"residual_{start}"] for start in range(4)]
    finish = jax.jit(lambda m, xs: [m.run(x, start, 3) for start, x in enumerate(xs)])
    for residual in finish(model, residuals):
        np.testing.assert_allclose(residual, golden["residual_3"], atol=3e-5, rtol=1e-5)


def test_next_token_loss_matches_transformers(golden, write_huggingface):
    model = load_huggingface(write_huggingface(golden["config"], golden["weights"]))
    tokens = golden["input_ids"]
    expected = next_token_loss64(golden["logits"], tokens)
    residuals = [golden[f"residual_{layer}"] for layer in range(4)]
    score = jax.jit(lambda m, xs: [m.next_token_loss(x, tokens, layer) for layer, x in enumerate(xs)])
    for loss in score(model, residuals):
        np.testing.assert_allclose(loss, expected, atol=2e-4)


def test_next_token_loss_in_several_chunks(small):
    tokens = np.random.default_rng(0).integers(0, 50, (3, 151))  # 450 positions: a whole chunk and a part
    loss = jax.jit(lambda m, t: m.next_token_loss(m.residual(t, 1), t, 1))(small, tokens)
    np.testing.assert_allclose(loss, next_token_loss64(small.logits(tokens), tokens), atol=1e-4)


def test_next_token_loss_never_forms_all_logits(small):
    def finish(model, residual, tokens):
        return model.next_token_loss(residual, tokens, 3)

    residual, tokens = jnp.zeros((20, 151, 16)), jnp.zeros((20, 151), int)
    memory = jax.jit(finish).lower(small, residual, tokens).compile().memory_analysis()
    all_logits = 20 * 150 * 50 * 4
    assert memory.temp_size_in_bytes < all_logits


def test_later_tokens_do_not_reach_earlier_ones(small):
    tokens = np.random.default_rng(1).integers(0, 50, (2, 9))
    changed = tokens.copy()
    changed[:, 6:] = (changed[:, 6:] + 1) % 50
    read = jax.jit(lambda t: small.residual(t, 3))
    before, after = read(tokens), read(changed)
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert np.abs(before[:, 6:] - after[:, 6:]).min(axis=-1).max() > 0


def test_derivative_of_the_loss_by_the_residual(small):
    tokens = np.random.default_rng(2).integers(0, 50, (1, 6))
    residual = small.residual(tokens, 1)
    direction = jax.random.normal(jax.random.key(0), residual.shape)

    @jax.jit
    def loss(x):
        return small.next_token_loss(x, tokens, 1).sum()

    slope = jnp.vdot(jax.grad(loss)(residual), direction)
    step = 1e-2
    difference = (loss(residual + step * direction) - loss(residual - step * direction)) / (2 * step)
    np.testing.assert_allclose(slope, difference, rtol=2e-2)


def test_bfloat16_weights_keep_a_float32_residual(tied, write_huggingface):
    folder = write_huggingface(tied["config"], tied["weights"])
    residual = load_llama(folder, dtype=jnp.bfloat16).residual(tied["input_ids"], 3)
    assert residual.dtype == jnp.float32
    error = np.linalg.norm(residual - tied["residual_3"]) / np.linalg.norm(tied["residual_3"])
    assert 1e-4 < error < 3e-2  # 8 bits of mantissa: neither exact nor far


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (-1, 2), (3, 2)])
def test_layer_out_of_range(small, start, stop):
    with pytest.raises(InputError, match=rf"layers {start}\.\.{stop} are out of range of the 3 blocks"):
        small.run(jnp.zeros((1, 4, 16)), start, stop)


def test_sequence_too_long(small):
    with pytest.raises(InputError, match="sequences have 201 tokens, expected at most 200"):
        small.residual(jnp.zeros((1, 201), int), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2', expected 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu', expected 'silu'"),
        ({"attention_bias": True}, "attention_bias = True, expected False"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope scaling 'yarn' is not supported"),
    ],
)
def test_configurations_that_are_refused(tied, change, message):
    with pytest.raises(InputError, match=message):
        LlamaConfig.from_huggingface(tied["config"] | change)


def test_configuration_before_transformers_5(golden):
    """rope_theta stood at the top level, rope_scaling beside it."""
    config = dict(golden["config"])
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    assert LlamaConfig.from_huggingface(config) == LlamaConfig.from_huggingface(golden["config"])
