"""The real model on real text: SmolLM2-135M over State of the Union addresses."""

import jax
import numpy as np
import pytest

from jax_sae.backbones.llama import Llama, load_gguf, load_tokenizer
from jax_sae.errors import InputError
from train.assets import ensure_model, ensure_text
from train.corpus import Windows, cut_windows, read_documents

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model_path():
    return fetched(ensure_model, "smollm2-135m")


def fetched(ensure, name):
    try:
        return ensure(name)
    except InputError as error:
        pytest.skip(f"the real {name} is not to be had here: {error}")


@pytest.fixture(scope="module")
def model(model_path) -> Llama:
    return load_gguf(model_path)


@pytest.fixture(scope="module")
def tokenizer(model_path):
    return load_tokenizer(model_path)


@pytest.fixture(scope="module")
def windows(tokenizer) -> Windows:
    documents = read_documents([str(fetched(ensure_text, "sotu"))])
    return cut_windows(documents, tokenizer, n_windows=32, sequence_length=128, holdout=0.5, seed=0)


def test_next_token_loss_on_speeches(model, windows):
    """102 other windows of these texts gave 3.70 nats, 96 more 3.72; 32 have a standard error of 0.07."""
    score = jax.jit(lambda m, t: m.next_token_loss(m.residual(t, 9), t, 9))
    losses = [np.asarray(score(model, windows.tokens[i : i + 8])) for i in range(0, 32, 8)]
    assert 3.4 < np.concatenate(losses).mean() < 3.9


def test_position_0_is_an_attention_sink(model, windows):
    """After block 9 its norm is about 600, against a mean of about 127 over all positions."""
    norms = np.linalg.norm(jax.jit(lambda m, t: m.residual(t, 9))(model, windows.tokens[:8]), axis=-1)
    assert 500 < norms[:, 0].mean() < 700
    assert 110 < norms.mean() < 140


def test_what_it_learned(model, tokenizer):
    for text, following in (("The capital of France is", " Paris"), ("one, two, three, four,", " five")):
        tokens = np.array([tokenizer.encode(text).ids])
        logits = jax.jit(lambda m, t: m.logits(t))(model, tokens)[0, -1]
        assert tokenizer.decode([int(logits.argmax())]) == following
