"""The activation set on disk: ``activations.json`` beside ``shard-*.npy`` files.

The json is written last and names every shard with its rows and checksum, so a folder without it is not a set.
bfloat16 is stored as uint16, because ``.npy`` has no name for it; the json has the real dtype.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_sae.data.statistics import Statistics
from jax_sae.errors import InputError

VERSION = 1
METADATA = "activations.json"
JOURNAL = "activations.partial.json"
DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class ShardEntry:
    """One shard file.

    Attributes:
      name: of the file in the folder of the set.
      rows: rows in it.
      crc32: checksum of the whole file.
    """

    name: str
    rows: int
    crc32: int


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The content of ``activations.json``.

    Attributes:
      d: width of a row.
      dtype: float32, float16 or bfloat16.
      shards: in the order of their rows.
      holdout_rows: the last rows, kept from training.
      tokens_per_item: rows per item (a window of text, an image), or None.
      source: where the rows come from: model, layer, ...
      statistics: of the training rows, or None.
      provenance: names of the files that say which token every row belongs to, or None.
      dropped_rows: rows that were not stored because they were not finite.
    """

    d: int
    dtype: str
    shards: tuple[ShardEntry, ...]
    holdout_rows: int = 0
    tokens_per_item: int | None = None
    source: dict[str, Any] = dataclasses.field(default_factory=dict)
    statistics: Statistics | None = None
    provenance: dict[str, Any] | None = None
    dropped_rows: int = 0

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return sum(shard.rows for shard in self.shards)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "version": VERSION,
            "rows": self.rows,
            **dataclasses.asdict(self),
            "statistics": None if self.statistics is None else self.statistics.to_json(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Metadata":
        """The inverse of :meth:`to_json`; raises KeyError, TypeError or ValueError on anything else."""
        if value["version"] != VERSION:
            raise ValueError(f"format version {value['version']!r}, expected {VERSION}")
        fields = {name: value[name] for name in (f.name for f in dataclasses.fields(cls))}
        fields["shards"] = tuple(ShardEntry(**shard) for shard in value["shards"])
        if value["statistics"] is not None:
            fields["statistics"] = Statistics.from_json(value["statistics"])
        metadata = cls(**fields)
        _check(metadata, value["rows"])
        return metadata


def _check(metadata: Metadata, rows: Any) -> None:
    if metadata.dtype not in DTYPES:
        raise ValueError(f"dtype {metadata.dtype!r}, expected one of {', '.join(DTYPES)}")
    counts = {"d": metadata.d, "holdout_rows": metadata.holdout_rows, "dropped_rows": metadata.dropped_rows}
    if metadata.tokens_per_item is not None:
        counts["tokens_per_item"] = metadata.tokens_per_item
    for name, count in (*counts.items(), *((shard.name, shard.rows) for shard in metadata.shards)):
        least = 1 if name in ("d", "tokens_per_item") else 0
        if not isinstance(name, str) or not isinstance(count, int) or count < least:
            raise ValueError(f"{name} = {count!r}, expected an integer of at least {least}")
    if metadata.statistics is not None and metadata.statistics.mean.shape != (metadata.d,):
        raise ValueError(f"statistics of width {metadata.statistics.mean.shape}, expected {metadata.d}")
    if rows != metadata.rows:
        raise ValueError(f"{rows!r} rows, but the shards have {metadata.rows}")
    if not 0 <= metadata.holdout_rows <= metadata.rows:
        raise ValueError(f"{metadata.holdout_rows} held-out rows of {metadata.rows}")


def read_metadata(folder: Path) -> Metadata:
    """Reads ``activations.json``.

    Raises:
      InputError: it is damaged or of another version.
    """
    path = folder / METADATA
    try:
        return Metadata.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} does not describe an activation set ({type(error).__name__}: {error}); write the set again"
        ) from error


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Which token of which document every row belongs to.

    Row r is item ``r // tokens_per_item`` at position ``first_position + r % tokens_per_item``.

    Attributes:
      tokens: [items, sequence_length] int32 token ids.
      items: [items, 2] int32: the document of an item, and the offset of its first token in it.
      documents: names of the documents.
      tokens_per_item: rows per item.
      first_position: position in the item of its first row.
      tokenizer_path: the ``tokenizer.json`` of these ids.
    """

    tokens: np.ndarray
    items: np.ndarray
    documents: tuple[str, ...]
    tokens_per_item: int
    first_position: int
    tokenizer_path: Path

    @classmethod
    def open(cls, folder: Path, fields: Mapping[str, Any], tokens_per_item: int) -> "Provenance":
        """Maps the files that ``fields`` of the metadata name.

        Raises:
          InputError: a field or a file is missing or damaged.
        """

        def load(name: str) -> np.ndarray:
            return np.load(folder / fields[name], mmap_mode="r", allow_pickle=False)

        try:
            return cls(
                load("tokens"),
                load("items"),
                tuple(fields["documents"]),
                tokens_per_item,
                int(fields["first_position"]),
                folder / fields["tokenizer"],
            )
        except (KeyError, TypeError, ValueError, FileNotFoundError) as error:
            raise InputError(
                f"{folder} does not know its tokens ({type(error).__name__}: {error}); write the set again"
            ) from error

    def locate(self, row: int) -> tuple[int, int, str, int]:
        """(item, position in the item, name of the document, offset of the token in the document) of a row."""
        item, within = divmod(row, self.tokens_per_item)
        position = self.first_position + within
        document, offset = self.items[item]
        return item, position, self.documents[document], int(offset) + position
