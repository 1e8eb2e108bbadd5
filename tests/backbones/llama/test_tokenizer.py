"""Tokenizers built from the vocabulary of a GGUF file, or read from tokenizer.json."""

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from tokenizers import Tokenizer, pre_tokenizers

from jax_sae.backbones.llama import load_tokenizer
from jax_sae.errors import InputError

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<s>", "<end>", *BYTES, "Ġt", "he", "Ġthe", "12"]
MERGES = ["Ġ t", "h e", "Ġt he", "1 2"]


@pytest.fixture
def write_vocabulary(tmp_path) -> Callable[..., Path]:
    def write(pre: str = "smollm", model: str = "gpt2", bos: bool = False) -> Path:
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
        writer.add_tokenizer_model(model)
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(TOKENS)
        writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(0)
        writer.add_add_bos_token(bos)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return tmp_path / "model.gguf"

    return write


def test_merges_are_applied_and_undone(write_vocabulary):
    tokenizer = load_tokenizer(write_vocabulary())
    encoding = tokenizer.encode("at the äther")
    assert encoding.tokens == ["a", "t", "Ġthe", "Ġ", "Ã", "¤", "t", "he", "r"]
    assert encoding.ids == [TOKENS.index(token) for token in encoding.tokens]
    assert tokenizer.decode(encoding.ids) == "at the äther"


def test_smollm_never_merges_digits(write_vocabulary):
    assert load_tokenizer(write_vocabulary("smollm")).encode("12").tokens == ["1", "2"]


def test_llama3_groups_three_digits(write_vocabulary):
    tokenizer = load_tokenizer(write_vocabulary("llama-bpe"))
    words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str("We'll see 12345 of\n\nthem!")]
    assert words == ["We", "'ll", "Ġsee", "Ġ", "123", "45", "Ġof", "ĊĊ", "them", "!"]
    assert tokenizer.encode("12").tokens == ["12"]


def test_control_tokens_are_found_in_the_text(write_vocabulary):
    assert load_tokenizer(write_vocabulary()).encode("a<end>a").tokens == ["a", "<end>", "a"]


def test_begins_with_what_the_model_wants(write_vocabulary):
    tokenizer = load_tokenizer(write_vocabulary(bos=True))
    assert tokenizer.encode("").ids == [0]
    assert tokenizer.encode("a").ids == [0, TOKENS.index("a")]
    assert tokenizer.encode("a", add_special_tokens=False).ids == [TOKENS.index("a")]
    assert load_tokenizer(write_vocabulary(bos=False)).encode("").ids == []


def test_saved_and_read_again(write_vocabulary, tmp_path):
    tokenizer = load_tokenizer(write_vocabulary())
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert isinstance(load_tokenizer(path), Tokenizer)
        assert load_tokenizer(path).encode("the 12").ids == tokenizer.encode("the 12").ids


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "llama"}, "has a 'llama' tokenizer, expected byte-level BPE"),
        ({"pre": "qwen2"}, "has pre-tokenization 'qwen2', expected smollm or llama-bpe"),
    ],
)
def test_kinds_that_are_refused(write_vocabulary, settings, message):
    with pytest.raises(InputError, match=message):
        load_tokenizer(write_vocabulary(**settings))


def test_no_tokenizer(tmp_path):
    with pytest.raises(InputError, match=r"tokenizer\.json does not exist"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(tmp_path)
