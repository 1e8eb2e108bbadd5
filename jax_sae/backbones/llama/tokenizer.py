"""Tokenizers of Llamas: ``tokenizer.json``, or the vocabulary and merges inside a GGUF file."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_sae.backbones.llama.gguf_file import GGUFFile
from jax_sae.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL_TOKEN = 3  # of tokenizer.ggml.token_type


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """Reads a tokenizer.

    Args:
      path: a ``.gguf`` file, a ``tokenizer.json``, or a folder that holds one.

    Returns:
      tokenizers.Tokenizer. ``encode(text)`` puts the tokens that the model wants before a text in front;
      ``encode(text, add_special_tokens=False)`` is the text alone.

    Raises:
      InputError: there is no tokenizer, or one of a kind that is not supported.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return _from_gguf(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"{file} does not exist; expected a tokenizer.json beside the model")
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception for any bad file
        raise InputError(f"{file} is not a tokenizer ({error}); fetch it again") from error


def _from_gguf(path: Path) -> "Tokenizer":
    """Byte-level BPE as the file describes it, split into words as ``tokenizer.ggml.pre`` says."""
    from tokenizers import Tokenizer, decoders, models

    metadata = GGUFFile(path).metadata
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise InputError(
            f"{path} has a {kind!r} tokenizer, expected byte-level BPE ('gpt2'); give a folder with tokenizer.json"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(metadata.get("tokenizer.ggml.pre"), path)
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens(control)
    if metadata.get("tokenizer.ggml.add_bos_token", False):
        _begin_with(tokenizer, tokens[metadata["tokenizer.ggml.bos_token_id"]])
    return tokenizer


def _pre_tokenizer(name: str | None, path: Path) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if name == "llama-bpe":
        words = pre_tokenizers.Split(Regex(_LLAMA3_WORDS), behavior="isolated")
        spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([words, spelled])
    raise InputError(
        f"{path} has pre-tokenization {name!r}, expected smollm or llama-bpe; give a folder with tokenizer.json"
    )


def _begin_with(tokenizer: "Tokenizer", token: str) -> None:
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A",
        pair=f"{token} $A {token}:1 $B:1",
        special_tokens=[(token, tokenizer.token_to_id(token))],
    )
