"""The files that rows come from: ``.npy`` arrays, mapped, and TFDS datasets in array_record format."""

import io
import itertools
import os
import tokenize
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jax_sae.data.format import DTYPES
from jax_sae.errors import InputError

_FINGERPRINT_BYTES = 1 << 16
_RUN_BYTES = 1 << 14  # runs of rows shorter than this on average are quicker copied than read one by one


class Shard(Protocol):
    """Rows that can be read in ranges and by index."""

    rows: int

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop``, [stop - start, d]."""

    def take(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Puts the rows at ascending ``indices`` into ``out [n, d]``."""

    def announce(self, indices: np.ndarray) -> None:
        """Tells the system that the rows at ascending ``indices`` will be taken."""

    def fingerprint(self) -> bytes:
        """Bytes that differ between shards of different shape, and almost surely of different content."""


class NpyShard:
    """A memory-mapped ``.npy`` file, [rows, d] or [items, tokens, d]; never a pickle.

    Args:
      path: the file.
      dtype: what the bytes are where the file cannot say so (bfloat16 stored as uint16).

    Raises:
      InputError: not a ``.npy`` file, truncated, of another dtype, in Fortran order, or not 2- or 3-dimensional.
    """

    def __init__(self, path: Path, dtype: np.dtype | None = None):
        self.path = path
        array = _map(path)
        self._offset = getattr(array, "offset", 0)  # of the first row in the file
        if dtype is not None and dtype.name == "bfloat16" and array.dtype == np.uint16:
            array = array.view(dtype)
        if array.dtype.name not in DTYPES or (dtype is not None and array.dtype != dtype):
            expected = ", ".join(DTYPES) if dtype is None else dtype.name
            raise InputError(f"{path} has dtype {array.dtype}, expected {expected}; convert it")
        if array.ndim not in (2, 3) or array.shape[-1] == 0:
            raise InputError(f"{path} has shape {array.shape}, expected [rows, d] or [items, tokens, d]; reshape it")
        if not array.flags.c_contiguous:
            raise InputError(
                f"{path} is in Fortran order, which scatters a row over the file; save np.ascontiguousarray of it"
            )
        self.tokens_per_item = array.shape[1] if array.ndim == 3 else None
        self._rows = array.reshape(-1, array.shape[-1])
        self.rows, self.d = self._rows.shape
        self.dtype = DTYPES[array.dtype.name]  # in the byte order of this machine, whatever the file's is

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop``, [stop - start, d]."""
        return np.array(self._rows[start:stop], self.dtype)

    def take(self, indices: np.ndarray, out: np.ndarray) -> None:
        """Puts the rows at ascending ``indices`` into ``out [n, d]``.

        Runs of consecutive rows are read in one request each, which a disk serves at its full rate; scattered rows are
        copied from the mapping.

        Raises:
          InputError: the file has become shorter.
        """
        runs = self._runs(indices)
        if not runs or self._rows.dtype != out.dtype or not out.flags.c_contiguous:
            np.take(self._rows, indices, axis=0, out=out, mode="clip")  # "raise" would go through a buffer
            return
        row_bytes = self._rows.strides[0]
        with self.path.open("rb", buffering=0) as file:
            for start, stop in runs:
                file.seek(self._offset + int(indices[start]) * row_bytes)
                self._fill(file, out[start:stop].view(np.uint8).data.cast("B"))

    def announce(self, indices: np.ndarray) -> None:
        """Has the system read runs of consecutive rows into the page cache, where it can be told to."""
        if not hasattr(os, "posix_fadvise"):
            return
        row_bytes = self._rows.strides[0]
        with self.path.open("rb", buffering=0) as file:
            for start, stop in self._runs(indices):
                offset = self._offset + int(indices[start]) * row_bytes
                os.posix_fadvise(file.fileno(), offset, int(stop - start) * row_bytes, os.POSIX_FADV_WILLNEED)

    def _runs(self, indices: np.ndarray) -> list[tuple[int, int]]:
        """Where runs of consecutive rows start and stop in ``indices``; none if they are short."""
        starts = np.flatnonzero(np.diff(indices, prepend=-2) != 1)
        if len(starts) * _RUN_BYTES > len(indices) * self._rows.strides[0]:
            return []
        return list(itertools.pairwise([*starts, len(indices)]))

    def _fill(self, file: io.FileIO, out: memoryview) -> None:
        """Reads until ``out`` is full."""
        while len(out):
            count = file.readinto(out)
            if not count:
                raise InputError(f"{self.path} has become shorter since it was opened; write it again")
            out = out[count:]

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
    except (ValueError, EOFError, AttributeError, tokenize.TokenError) as error:
        raise InputError(
            f"{path} is truncated or not a plain .npy array ({_first_line(error)}); write it again"
        ) from error


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
        try:
            loaded = self._source.__getitems__([int(record) for record in records])
        except RuntimeError as error:
            raise InputError(f"{self.path} is damaged ({_first_line(error)}); prepare it again") from error
        rows = np.stack([record[self._feature] for record in loaded]).reshape(len(records), -1, self.d)
        out[...] = rows[places, indices % self._per_record]

    def announce(self, indices: np.ndarray) -> None:
        """Nothing: records are read by a library with a read-ahead of its own."""

    def fingerprint(self) -> bytes:
        """The shape, the first and the last row."""
        ends = self.read(0, 1).tobytes() + self.read(self.rows - 1, self.rows).tobytes()
        return repr((self.rows, self.d)).encode() + ends


def open_record_shard(path: Path) -> RecordShard:
    """Opens the ``train`` split of a TFDS dataset, or its first split where none is called so.

    Raises:
      InputError: damaged, not in array_record format, or without exactly one ``Tensor`` feature of a fixed shape
        [d] or [tokens, d].
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(str(path))
        features, splits = builder.info.features, list(builder.info.splits)
    except Exception as error:  # many kinds, for as many kinds of damage
        raise InputError(f"{path} is not a TFDS dataset ({_first_line(error)}); prepare it again") from error
    tensors = {n: f for n, f in features.items() if type(f) is tfds.features.Tensor and len(f.shape) in (1, 2)}
    if len(tensors) != 1:
        names = ", ".join(sorted(features))
        raise InputError(f"{path} has features {names}; expected one Tensor feature of shape [d] or [tokens, d]")
    ((name, feature),) = tensors.items()
    if not all(feature.shape) or np.dtype(feature.np_dtype).name not in DTYPES:
        raise InputError(
            f"{path}: feature {name} is {feature.np_dtype} {feature.shape}, expected one shape of {', '.join(DTYPES)}"
        )
    if not splits:
        raise InputError(f"{path} is a TFDS dataset without splits; prepare it again")
    try:
        source = builder.as_data_source(split="train" if "train" in splits else splits[0])
    except NotImplementedError as error:
        found = builder.info.file_format.value
        raise InputError(f"{path} is in {found} format; prepare it with file_format='array_record'") from error
    return RecordShard(source, name, tuple(feature.shape), np.dtype(feature.np_dtype), path)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
