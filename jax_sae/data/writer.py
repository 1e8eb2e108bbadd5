"""Writes an activation set shard by shard, so that an interrupted writer can go on."""

import dataclasses
import errno
import io
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from jax_sae.data.format import DTYPES, JOURNAL, METADATA, Metadata, ShardEntry
from jax_sae.data.reader import ActivationSet
from jax_sae.data.shards import NpyShard
from jax_sae.data.statistics import scan
from jax_sae.errors import InputError


class ActivationWriter:
    """Appends rows to a set that appears, whole, when :meth:`close` is called.

    Rows gather in memory until a shard is full; it is then written, synced and noted in a journal. A writer
    on the same folder with the same settings goes on after the last whole shard: append from row
    :attr:`received` on.

    Args:
      path: folder of the set, made if need be; other files in it are left alone.
      d: width of a row.
      dtype: float32, float16 or bfloat16; rows are cast to it.
      shard_rows: rows per shard.
      tokens_per_item: rows per item (a window of text, an image).
      source: where the rows come from; JSON values.
      drop_non_finite: leave out rows with NaN or inf, counting them, instead of refusing them.

    Attributes:
      rows: rows safely on disk or waiting for their shard to fill.
      dropped_rows: rows left out so far.

    Raises:
      InputError: the folder holds a finished set, or an unfinished one of other settings, or the dtype is none
        of the three.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        d: int,
        dtype: Any = np.float32,
        shard_rows: int = 65_536,
        tokens_per_item: int | None = None,
        source: Mapping[str, Any] | None = None,
        drop_non_finite: bool = False,
    ):
        self._path = Path(path)
        self._dtype = np.dtype(dtype)
        if self._dtype.name not in DTYPES:
            raise InputError(f"dtype is {self._dtype}, expected one of {', '.join(DTYPES)}")
        if d < 1 or shard_rows < 1:
            raise InputError(f"d is {d} and shard_rows {shard_rows}; expected at least 1 of each")
        if (self._path / METADATA).exists():
            raise InputError(f"{self._path} holds a finished activation set; choose another folder or remove it")
        self._path.mkdir(parents=True, exist_ok=True)
        self._metadata = Metadata(d, self._dtype.name, (), tokens_per_item=tokens_per_item, source=dict(source or {}))
        self._settings = {
            "d": d,
            "dtype": self._dtype.name,
            "shard_rows": shard_rows,
            "tokens_per_item": tokens_per_item,
            "source": json.loads(json.dumps(self._metadata.source)),
            "drop_non_finite": drop_non_finite,
        }
        self._shard_rows, self._drop = shard_rows, drop_non_finite
        self._shards: list[ShardEntry] = []
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []  # rows, and which of the rows received they are
        self.rows = self.dropped_rows = 0
        self._resume()

    @property
    def received(self) -> int:
        """Rows appended in all, dropped ones included: where a resumed writer goes on."""
        return self.rows + self.dropped_rows

    def _resume(self) -> None:
        """Takes over the whole shards that the journal of an interrupted writer names."""
        path = self._path / JOURNAL
        if not path.exists():
            return
        try:
            journal = json.loads(path.read_text(encoding="utf-8"))
            differing = [name for name in self._settings if journal["settings"][name] != self._settings[name]]
            shards = [ShardEntry(**entry) for entry in journal["shards"]]
            received = int(journal["received"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is damaged ({error}); remove the folder and start again") from error
        if differing:
            raise InputError(
                f"{self._path} holds an unfinished set with another {', '.join(differing)}; choose another folder"
            )
        for entry in shards:
            file = self._path / entry.name
            if not file.is_file() or NpyShard(file, self._dtype).rows != entry.rows:
                raise InputError(f"{file} is missing or not whole; remove the folder and start again")
        self._shards, self.rows = shards, sum(entry.rows for entry in shards)
        self.dropped_rows = received - self.rows

    def append(self, rows: np.ndarray) -> None:
        """Adds ``rows [n, d]``.

        Raises:
          InputError: another width; or NaN or inf, also after the cast to the stored dtype, where they are not
            dropped. Nothing of ``rows`` is kept then.
          OSError: a shard cannot be written; what was written before is whole.
        """
        rows = np.asarray(rows)
        if rows.ndim != 2 or rows.shape[1] != self._metadata.d:
            raise InputError(f"rows have shape {rows.shape}, expected [n, {self._metadata.d}]")
        with np.errstate(over="ignore"):
            cast = rows.astype(self._dtype)
        places = self.received + np.arange(len(rows))
        finite = np.isfinite(cast.astype(np.float32)).all(axis=1)
        if not finite.all():
            if not self._drop:
                raise InputError(
                    f"{np.count_nonzero(~finite)} rows have NaN or inf as {self._dtype} (the first is row "
                    f"{places[~finite][0]}); mend them, use a wider dtype, or pass drop_non_finite=True"
                )
            self.dropped_rows += int(np.count_nonzero(~finite))
            cast, places = cast[finite], places[finite]
        self._waiting.append((cast, places))
        self.rows += len(cast)
        self._write_shards(least=self._shard_rows)

    def close(self, *, holdout_rows: int = 0, provenance: Mapping[str, Any] | None = None) -> Path:
        """Writes the last shard, the statistics of the training rows and, last of all, ``activations.json``.

        Args:
          holdout_rows: the last rows, kept from training.
          provenance: names of the files, already in the folder, that say which token a row is; see
            :class:`jax_sae.data.Provenance`.

        Returns:
          The folder of the set.

        Raises:
          InputError: no rows, more rows held out than there are, or provenance of a set with dropped rows or
            without tokens_per_item.
        """
        if not 0 <= holdout_rows < max(self.rows, 1) or not self.rows:
            raise InputError(f"{holdout_rows} of {self.rows} rows are held out; expected some rows to train on")
        if provenance is not None and self.dropped_rows:
            raise InputError(f"{self.dropped_rows} rows were dropped, so rows no longer match their tokens")
        if provenance is not None and self._metadata.tokens_per_item is None:
            raise InputError("provenance is given but tokens_per_item is not; give the rows per item")
        self._write_shards(least=1)
        metadata = dataclasses.replace(
            self._metadata,
            shards=tuple(self._shards),
            holdout_rows=holdout_rows,
            provenance=None if provenance is None else dict(provenance),
            dropped_rows=self.dropped_rows,
        )
        shards = [NpyShard(self._path / entry.name, self._dtype) for entry in self._shards]
        statistics, _ = scan(ActivationSet(self._path, shards, metadata), 0, self.rows - holdout_rows)
        metadata = dataclasses.replace(metadata, statistics=statistics)
        self._publish(METADATA, json.dumps(metadata.to_json(), indent=1, allow_nan=False).encode())
        (self._path / JOURNAL).unlink(missing_ok=True)
        return self._path

    def _write_shards(self, least: int) -> None:
        """Writes the waiting rows, a shard at a time, while there are at least ``least``."""
        if sum(len(rows) for rows, _ in self._waiting) < least:
            return
        rows, places = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
        while len(rows) >= least:
            self._waiting = [(rows, places)]
            self._write_shard(rows[: self._shard_rows], received=int(places[: self._shard_rows][-1]) + 1)
            rows, places = rows[self._shard_rows :], places[self._shard_rows :]
        self._waiting = [(rows.copy(), places.copy())]

    def _write_shard(self, rows: np.ndarray, received: int) -> None:
        """Writes a shard and the journal, which says that the first ``received`` rows need not come again."""
        stored = rows.view(np.uint16) if self._dtype.name == "bfloat16" else rows
        name = f"shard-{len(self._shards):05d}.npy"
        checksum = self._publish(name, _npy_header(stored), np.ascontiguousarray(stored).data.cast("B"))
        shards = [*self._shards, ShardEntry(name, len(rows), checksum)]
        journal = {
            "settings": self._settings,
            "shards": [dataclasses.asdict(entry) for entry in shards],
            "received": received,
        }
        self._publish(JOURNAL, json.dumps(journal).encode())
        self._shards = shards

    def _publish(self, name: str, *parts: bytes | memoryview) -> int:
        """Writes a file beside its place, syncs it, moves it in; returns its checksum."""
        temporary, checksum = self._path / f".{name}.tmp", 0
        try:
            with temporary.open("wb") as file:
                for part in parts:
                    file.write(part)
                    checksum = zlib.crc32(part, checksum)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path / name)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
            raise OSError(
                error.errno,
                f"cannot write {self._path / name} ({reason}); what was written before is whole, run again",
            ) from error
        return checksum

    def __enter__(self) -> "ActivationWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leaves an unclosed set unfinished; its whole shards stay for the next writer."""


def _npy_header(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, np.lib.format.header_data_from_array_1_0(array))
    return buffer.getvalue()
