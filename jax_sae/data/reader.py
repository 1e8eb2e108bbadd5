"""Activation sets as they come: our own format, ``.npy`` files, a folder of them, a TFDS array_record folder."""

import copy
import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jax_sae.data.format import DTYPES, JOURNAL, METADATA, Metadata, Provenance, read_metadata
from jax_sae.data.shards import NpyShard, RecordShard, Shard, open_record_shard
from jax_sae.data.statistics import Statistics
from jax_sae.errors import InputError

_VERIFY_BYTES = 1 << 22


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

    def __init__(self, path: Path, shards: Sequence[Shard], metadata: Metadata):
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
            low, high = max(start - begin, 0), min(stop - begin, shard.rows)
            if low < high:
                parts.append(shard.read(low, high))
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
        if np.all(indices[:-1] <= indices[1:]):
            for shard, rows, part in self._by_shard(indices):
                shard.take(rows, out=taken[part])
            return taken
        order = np.argsort(indices)
        taken[order] = self.take(indices[order])
        return taken

    def announce(self, indices: np.ndarray) -> None:
        """Tells the system that the rows at ascending ``indices`` will be taken, so that it may read them already."""
        for shard, rows, _ in self._by_shard(indices):
            shard.announce(rows)

    def _by_shard(self, indices: np.ndarray) -> Iterator[tuple[Shard, np.ndarray, slice]]:
        """Shards with rows at ascending ``indices``: which rows of the shard, and where they are in ``indices``."""
        rows = indices
        if len(self._removed):  # the i-th removed row shifts every row from there on by one
            rows = rows + np.searchsorted(self._removed - np.arange(len(self._removed)), rows, side="right")
        bounds = np.searchsorted(rows, np.concatenate([[0], self._ends]))
        for shard, end, low, high in zip(self._shards, self._ends, bounds, bounds[1:], strict=False):
            if low < high:
                yield shard, rows[low:high] - (end - shard.rows), slice(low, high)

    def with_holdout(self, rows: int) -> "ActivationSet":
        """The same set with its last ``rows`` rows held out; statistics of other training rows are dropped.

        Raises:
          InputError: more rows than the set has, or fewer than none.
        """
        if not 0 <= rows <= self.rows:
            raise InputError(f"{rows} rows are to be held out of {self.rows}; give a number from 0 to {self.rows}")
        changed = copy.copy(self)
        changed.holdout_rows = rows
        if rows != self.holdout_rows:
            changed.statistics = None
        return changed

    def without_rows(self, removed: np.ndarray) -> "ActivationSet":
        """The same set without the rows ``removed`` (ascending int64); held-out rows stay held out.

        Rows are counted anew, so the token of a row is no longer known: provenance is dropped.

        Raises:
          ValueError: not ascending, not in the set, or rows were removed from it before.
        """
        if len(self._removed):
            raise ValueError("rows were removed from this set already; remove all of them at once")
        removed = np.asarray(removed, np.int64)
        if np.any(np.diff(removed, prepend=-1, append=self.rows) < 1):
            raise ValueError(f"rows to remove are not ascending or not within the {self.rows} of the set")
        changed = copy.copy(self)
        changed._removed = removed
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
        format with one ``Tensor`` feature, of which the ``train`` split is taken, or the first.

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
        return _from_shards(path, [open_record_shard(path)])
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


def _fingerprint(shards: Sequence[Shard], metadata: Metadata) -> str:
    """Of the checksums where there are any, else of the size and both ends of every shard."""
    digest = hashlib.sha256()
    for entry in metadata.shards:
        digest.update(f"{entry.rows} {entry.crc32} ".encode())
    for shard in () if metadata.shards else shards:
        digest.update(f"{shard.rows} ".encode() + shard.fingerprint())
    return digest.hexdigest()[:32]
