"""Texts cut into windows of tokens: documents in, distinct contexts out, split by document."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from jax_sae.errors import InputError

from .assets import TEXTS, ensure_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_OVERSAMPLE = 8  # windows that are cut for each one that is kept, where the text has them
_ENCODED_TOGETHER = 16  # documents


@dataclasses.dataclass(frozen=True)
class Document:
    """A text with a name to show it under."""

    name: str
    text: str


@dataclasses.dataclass(frozen=True)
class Windows:
    """Token windows with where each was cut; the held-out ones, from other documents, come last.

    Attributes:
      tokens: int32 [items, sequence_length].
      items: int32 [items, 2], the index into ``documents`` and which token of that document stands at
        position 0 of the window. A BOS that the tokenizer puts in front of a window takes the place of the
        token before it, so the first window of a document is then at -1.
      documents: names of all documents.
      holdout: how many of the items, the last ones, are held out.
    """

    tokens: np.ndarray
    items: np.ndarray
    documents: list[str]
    holdout: int


def read_documents(inputs: Sequence[str]) -> list[Document]:
    """Reads texts.

    Args:
      inputs: names of default texts, ``.txt`` files (one document each), ``.jsonl`` files (one a line, in the
        field ``text``), or folders of such files at any depth.

    Raises:
      InputError: an input does not exist, holds no text, or is not UTF-8 or JSON.
    """
    documents = [document for source in inputs for document in _read(source)]
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise InputError(f"--inputs {' '.join(inputs)} holds no text; give .txt or .jsonl files or a folder of them")
    return documents


def cut_windows(
    documents: list[Document],
    tokenizer: "Tokenizer",
    *,
    n_windows: int,
    sequence_length: int,
    holdout: float,
    seed: int,
) -> Windows:
    """Samples windows that do not overlap, from all documents or from enough of them.

    Documents are split first, so that a held-out window never has a neighbour in training: held-out ones are
    drawn until they have the fraction ``holdout`` of all characters.

    Args:
      documents: to cut.
      tokenizer: what it puts in front of a text opens every window.
      n_windows: wanted; fewer come back when the documents have fewer.
      sequence_length: tokens per window; the rest of a document that does not fill one is left out.
      holdout: fraction of the windows, in [0, 1).
      seed: of the split and of the sample.

    Raises:
      InputError: too few documents for a hold-out, or too little text for one window.
    """
    rng = np.random.default_rng(seed)
    order, first_training = _split(documents, holdout, rng)
    n_holdout = round(n_windows * holdout)
    if holdout and not n_holdout:
        raise InputError(f"--holdout {holdout} of {n_windows} windows is none; raise --tokens or --holdout")
    sides = [
        _sample(documents, side, tokenizer, n, sequence_length, rng)
        for side, n in ((order[first_training:], n_windows - n_holdout), (order[:first_training], n_holdout))
    ]
    if not len(sides[0][0]) or (holdout and not len(sides[1][0])):
        raise InputError(f"the documents are shorter than one window; lower --sequence-length {sequence_length}")
    tokens, items = (np.concatenate(arrays) for arrays in zip(*sides, strict=True))
    return Windows(tokens, items, [document.name for document in documents], len(sides[1][0]))


def _split(documents: list[Document], holdout: float, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """A shuffled order of the documents, and how many of it, from the front, are held out."""
    order = rng.permutation(len(documents))
    if not holdout:
        return order, 0
    if len(documents) < 2:
        raise InputError("--inputs is one document, and whole documents are held out; give several, or --holdout 0")
    share = np.cumsum([len(documents[i].text) for i in order], dtype=np.float64)
    held_out = int(np.searchsorted(share, holdout * share[-1])) + 1
    return order, min(held_out, len(documents) - 1)


def _sample(
    documents: list[Document],
    side: np.ndarray,
    tokenizer: "Tokenizer",
    n: int,
    sequence_length: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [m, sequence_length], items [m, 2]) of m <= n windows out of the documents of one side."""
    prefix = np.asarray(tokenizer.encode("").ids, np.int32)
    length = sequence_length - len(prefix)
    tokens, items = [np.empty((0, length), np.int32)], [np.empty((0, 2), np.int32)]
    found = 0
    with tqdm(total=_OVERSAMPLE * n, unit=" windows", desc="tokenize", leave=False, disable=None) as bar:
        for index, ids in _encode(documents, side, tokenizer):
            whole = len(ids) // length
            tokens.append(ids[: whole * length].reshape(whole, length))
            offsets = np.arange(whole, dtype=np.int32) * length - len(prefix)
            items.append(np.stack([np.full(whole, index, np.int32), offsets], axis=1))
            found += whole
            bar.update(whole)
            if found >= _OVERSAMPLE * n:
                break
    kept = rng.permutation(found)[:n]
    opened = np.broadcast_to(prefix, (len(kept), len(prefix)))
    return np.concatenate([opened, np.concatenate(tokens)[kept]], axis=1), np.concatenate(items)[kept]


def _encode(documents: list[Document], side: np.ndarray, tokenizer: "Tokenizer") -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(side), _ENCODED_TOGETHER):
        some = side[start : start + _ENCODED_TOGETHER]
        texts = [documents[i].text for i in some]
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for index, encoding in zip(some, encodings, strict=True):
            yield int(index), np.asarray(encoding.ids, np.int32)


def _read(source: str) -> Iterator[Document]:
    path = ensure_text(source) if source in TEXTS else Path(source)
    if not path.exists():
        raise InputError(
            f"--inputs {source} does not exist; give .txt or .jsonl files, a folder of them, or {', '.join(TEXTS)}"
        )
    if path.is_file():
        yield from _read_file(path, path.stem)
        return
    files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".jsonl") and file.is_file())
    if not files:
        raise InputError(f"--inputs {source} holds no .txt or .jsonl file; give a folder that does")
    for file in files:
        yield from _read_file(file, file.relative_to(path).with_suffix("").as_posix())


def _read_file(file: Path, name: str) -> Iterator[Document]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); convert it") from error
    if file.suffix != ".jsonl":
        yield Document(name, text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield Document(f"{name}:{number}", _text_field(line, f"{file} line {number}"))


def _text_field(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON ({error.msg}); expected one object a line") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise InputError(f'{where} has no text; expected an object with a string in the field "text"')
    return record["text"]
