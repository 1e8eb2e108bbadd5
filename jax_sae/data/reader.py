"""Activation sets as they come: our own format, ``.npy`` files, a folder of them, a TFDS array_record folder."""

import copy
import hashlib
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jax_sae.data.format import DTYPES, JOURNAL, METADATA, Metadata, Provenance, read_metadata
from jax_sae.data.statistics import Statistics
from jax_sae.errors import InputError

_VERIFY_BYTES = 1 << 22
_FINGERPRINT_BYTES = 1 << 16


class Shard(Protocol):
    """Rows that can be read in ranges and by index."""

    rows: int

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop``, [stop - start, d]."""

    def take(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Puts the rows at ascending ``indices`` into ``out [n, d]``."""

    def fingerprint(self) -> bytes:
        """Bytes that differ between shards of different shape, and almost surely of different content."""


class NpyShard:
    """A memory-mapped ``.npy`` file, [rows, d] or [items, tokens, d]; never a pickle.

    Args:
      path: the file.
      dtype: what the bytes are where the file cannot say so (bfloat16 stored as uint16).

    Raises:
      InputError: not a ``.npy`` file, truncated, of another dtype, or not 2- or 3-dimensional.
    """

    def __init__(self, path: Path, dtype: np.dtype | None = None):
        self.path = path
        array = _map(path)
        if dtype is not None and dtype.name == "bfloat16" and array.dtype == np.uint16:
            array = array.view(dtype)
        if array.dtype.name not in DTYPES or (dtype is not None and array.dtype != dtype):
            expected = ", ".join(DTYPES) if dtype is None else dtype.name
            raise InputError(f"{path} has dtype {array.dtype}, expected {expected}; convert it")
        if array.ndim not in (2, 3) or array.shape[-1] == 0:
            raise InputError(f"{path} has shape {array.shape}, expected [rows, d] or [items, tokens, d]; reshape it")
        self.tokens_per_item = array.shape[1] if array.ndim == 3 else None
        self._rows = array.reshape(-1, array.shape[-1])
        self.rows, self.d = self._rows.shape
        self.dtype = array.dtype

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop``, [stop - start, d]."""
        return np.array(self._rows[start:stop])

    def take(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Puts the rows at ascending ``indices`` into ``out [n, d]``."""
        np.take(self._rows, indices, axis=0, out=out, mode="clip")  # "raise" would go through a buffer

    def fingerprint(self) -> bytes:
        """Both ends of the file."""
        with self.path.open("rb") as file:
            first = file.read(_FINGERPRINT_BYTES)
            file.seek(max(0, self.path.stat().st_size - _FINGERPRINT_BYTES))
            return first + file.read()


def _map(path: Path) -> np.ndarray:
    """The array in ``path``, mapped; one without entries cannot be mapped and is loaded."""
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_{version[1]}")
            empty = 0 in read_header(file)[0]
        return np.load(path, mmap_mode=None if empty else "r", allow_pickle=False)
    except (ValueError, EOFError, AttributeError) as error:
        raise InputError(f"{path} is truncated or not a plain .npy array ({error}); write it again") from error


class RecordShard:
    """A split of a TFDS data source with one ``Tensor`` feature of shape [d] or [tokens, d]."""

    def __init__(self, source: Any, feature: str, shape: tuple[int, ...], dtype: np.dtype, path: Path):
        self._source, self._feature = source, feature
        self.tokens_per_item = shape[0] if len(shape) == 2 else None
        self._per_record = self.tokens_per_item or 1
        self.d, self.dtype, self.path = shape[-1], dtype, path
        self.rows = len(source) * self._per_record

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop``, [stop - start, d]."""
        rows = np.empty((stop - start, self.d), self.dtype)
        self.take(np.arange(start, stop), rows)
        return rows

    def take(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Puts the rows at ascending ``indices`` into ``out [n, d]``."""
        records, places = np.unique(indices // self._per_record, return_inverse=True)
        loaded = self._source.__getitems__([int(record) for record in records])
        rows = np.stack([record[self._feature] for record in loaded]).reshape(len(records), -1, self.d)
        out[...] = rows[places, indices % self._per_record]

    def fingerprint(self) -> bytes:
        """The shape, the first and the last row."""
        ends = self.read(0, 1).tobytes() + self.read(self.rows - 1, self.rows).tobytes()
        return repr((self.rows, self.d)).encode() + ends


class ActivationSet:
    """Stored activations, one row after another across shards.

    Attributes:
      path: what was opened.
      d: width of a row.
      dtype: of the stored rows.
      rows: rows in all.
      holdout_rows: the last rows, kept from training.
      tokens_per_item: rows per item, or None.
      source: where the rows come from (model, layer, ...); empty if unknown.
      statistics: of the training rows, if the set has them.
      provenance: which token a row is, if the set knows.
      fingerprint: hex digest that differs between sets with different content.
    """

    def __init__(self, path: Path, shards: Sequence[Any], metadata: Metadata):
        self.path, self._shards, self._metadata = path, shards, metadata
        self.d, self.dtype = metadata.d, DTYPES[metadata.dtype]
        self._ends = np.cumsum([shard.rows for shard in shards])
        self._removed = np.zeros(0, np.int64)
        self.holdout_rows = metadata.holdout_rows
        self.tokens_per_item, self.source = metadata.tokens_per_item, metadata.source
        self.statistics: Statistics | None = metadata.statistics
        self.provenance: Provenance | None = None
        if metadata.provenance is not None and metadata.tokens_per_item is not None:
            self.provenance = Provenance.open(path, metadata.provenance, metadata.tokens_per_item)
        self.fingerprint = _fingerprint(shards, metadata)

    @property
    def rows(self) -> int:
        """Rows in all, without removed ones."""
        return int(self._ends[-1]) - len(self._removed)

    @property
    def train_rows(self) -> int:
        """Rows that training may see: the first ones."""
        return self.rows - self.holdout_rows

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop`` as an array [stop - start, d] of its own, in the stored dtype.

        Raises:
          IndexError: the range is not within the set.
        """
        if not 0 <= start <= stop <= self.rows:
            raise IndexError(f"rows {start} to {stop} of a set with {self.rows}")
        if len(self._removed):
            return self.take(np.arange(start, stop))
        parts = []
        for shard, end in zip(self._shards, self._ends, strict=True):
            begin = int(end) - shard.rows
            if begin < stop and start < end:
                parts.append(shard.read(max(start - begin, 0), min(stop - begin, shard.rows)))
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty((0, self.d), self.dtype), *parts])

    def take(self, indices: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Rows at ``indices`` (int64, any order) as an array [n, d]; ascending indices read in sequence.

        Args:
          indices: [n].
          out: [n, d] of the set's dtype to put them in, instead of new memory.

        Raises:
          IndexError: a row is not in the set.
        """
        if len(indices) and not 0 <= indices.min() <= indices.max() < self.rows:
            raise IndexError(f"rows {indices.min()} to {indices.max()} of a set with {self.rows}")
        taken = np.empty((len(indices), self.d), self.dtype) if out is None else out
        rows = indices
        if len(self._removed):  # the i-th removed row shifts every row from there on by one
            rows = rows + np.searchsorted(self._removed - np.arange(len(self._removed)), rows, side="right")
        if np.all(rows[:-1] <= rows[1:]):  # ascending: every shard fills one stretch
            bounds = np.searchsorted(rows, np.concatenate([[0], self._ends]))
            for shard, end, low, high in zip(self._shards, self._ends, bounds, bounds[1:], strict=False):
                if low < high:
                    shard.take(rows[low:high] - (end - shard.rows), out=taken[low:high])
            return taken
        order = np.argsort(rows)
        taken[order] = self.take(indices[order])
        return taken

    def with_holdout(self, rows: int) -> "ActivationSet":
        """The same set with its last ``rows`` rows held out; statistics of other training rows are dropped."""
        changed = copy.copy(self)
        changed.holdout_rows = rows
        if rows != self.holdout_rows:
            changed.statistics = None
        return changed

    def without_rows(self, removed: np.ndarray) -> "ActivationSet":
        """The same set without the rows ``removed`` (ascending int64); held-out rows stay held out.

        Rows are counted anew, so the token of a row is no longer known: provenance is dropped.
        """
        changed = copy.copy(self)
        if len(self._removed):
            raise ValueError("rows were removed from this set already; remove all of them at once")
        changed._removed = np.asarray(removed, np.int64)
        changed.holdout_rows -= int(np.count_nonzero(removed >= self.train_rows))
        if len(removed):
            changed.provenance, changed.tokens_per_item = None, None
        return changed

    def verify(self, progress: Callable[[int], object] | None = None) -> None:
        """Compares every shard with its checksum; a set without checksums has nothing to compare.

        Args:
          progress: called with the number of bytes read.

        Raises:
          InputError: a shard is not what was written.
        """
        for entry in self._metadata.shards:
            path, checksum = self.path / entry.name, 0
            with path.open("rb") as file:
                while block := file.read(_VERIFY_BYTES):
                    checksum = zlib.crc32(block, checksum)
                    if progress is not None:
                        progress(len(block))
            if checksum != entry.crc32:
                raise InputError(
                    f"{path} has checksum {checksum:08x}, expected {entry.crc32:08x}; damaged, write the set again"
                )


def open_activations(path: str | Path) -> ActivationSet:
    """Opens stored activations; only headers and a few bytes are read.

    Args:
      path: a folder with ``activations.json``; a ``.npy`` file of [rows, d] or [items, tokens, d]; a folder of
        such files, taken in the order of their names; or the folder of a TFDS dataset in array_record
        format whose first split has one ``Tensor`` feature.

    Raises:
      InputError: nothing there, empty, damaged, or not activations; the file is named.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist; expected an activation set (folder or .npy file)")
    if path.is_file():
        return _from_shards(path, [NpyShard(path)])
    if (path / METADATA).exists():
        return _own_format(path)
    if (path / JOURNAL).exists():
        raise InputError(f"{path} is an unfinished activation set; run what writes it again to complete it")
    if (path / "dataset_info.json").exists():
        return _from_shards(path, [_record_shard(path)])
    files = sorted(path.glob("*.npy"))
    if not files:
        raise InputError(f"{path} holds no activations.json, no .npy file and no TFDS dataset; give an activation set")
    return _from_shards(path, [NpyShard(file) for file in files])


def _own_format(path: Path) -> ActivationSet:
    metadata = read_metadata(path)
    shards = []
    for entry in metadata.shards:
        file = path / entry.name
        if file.parent != path or not file.is_file():
            raise InputError(f"{file} is missing; expected a shard of {entry.rows} rows, write the set again")
        shard = NpyShard(file, DTYPES[metadata.dtype])
        if (shard.rows, shard.d) != (entry.rows, metadata.d):
            raise InputError(
                f"{file} is {shard.rows} x {shard.d}, expected {entry.rows} x {metadata.d}; write the set again"
            )
        shards.append(shard)
    if not metadata.rows:
        raise InputError(f"{path} is an activation set without rows; write the set again")
    return ActivationSet(path, shards, metadata)


def _from_shards(path: Path, shards: Sequence[NpyShard | RecordShard]) -> ActivationSet:
    """A set of foreign files, which must agree in width, dtype and tokens per item."""
    first = shards[0]
    for shard in shards[1:]:
        for name in ("d", "dtype", "tokens_per_item"):
            if getattr(shard, name) != getattr(first, name):
                raise InputError(
                    f"{shard.path} has {name} = {getattr(shard, name)}, expected {getattr(first, name)} as in "
                    f"{first.path.name}; put sets apart into folders of their own"
                )
    if not sum(shard.rows for shard in shards):
        raise InputError(f"{path} has no rows; expected at least one")
    metadata = Metadata(first.d, first.dtype.name, (), tokens_per_item=first.tokens_per_item)
    return ActivationSet(path, shards, metadata)


def _record_shard(path: Path) -> RecordShard:
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(path))
    features = builder.info.features
    tensors = {n: f for n, f in features.items() if type(f) is tfds.features.Tensor and len(f.shape) in (1, 2)}
    if len(tensors) != 1:
        raise InputError(
            f"{path} has features {', '.join(features)}; expected one Tensor feature of shape [d] or [tokens, d]"
        )
    ((name, feature),) = tensors.items()
    if None in feature.shape or np.dtype(feature.np_dtype).name not in DTYPES:
        raise InputError(
            f"{path}: feature {name} is {feature.np_dtype} {feature.shape}, expected one shape of {', '.join(DTYPES)}"
        )
    split = next(iter(builder.info.splits))
    source = builder.as_data_source(split=split)
    return RecordShard(source, name, tuple(feature.shape), np.dtype(feature.np_dtype), path)


def _fingerprint(shards: Sequence[Shard], metadata: Metadata) -> str:
    """Of the checksums where there are any, else of the size and both ends of every shard."""
    digest = hashlib.sha256()
    for entry in metadata.shards:
        digest.update(f"{entry.rows} {entry.crc32} ".encode())
    for shard in () if metadata.shards else shards:
        digest.update(f"{shard.rows} ".encode() + shard.fingerprint())
    return digest.hexdigest()[:32]
