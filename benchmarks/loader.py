"""Shuffled batches from a set on disk against reading the same files in sequence, and against shuffling row by row.

    python -m benchmarks.loader
    python -m benchmarks.loader --rows 100000 --d 576 --dtype float32 --memory-multiple 0

The set is written anew and measured twice: from the page cache, and cold, every file evicted before each turn (and seen
to be). Every turn is a whole pass, from opening the stream to its last batch. The sequential read goes file by file
into one buffer that is used again, which is the least that any loader of batches has to do. Processor time counts all
threads of the process, whatever else runs on the machine.

Besides, sets of growing size, the largest larger than the machine's memory, are gone through once each, not cached at
first, with the memory that the process holds at most. Their files are sparse: they take no room on the disk and are
read without it, but the page cache fills with them as with any file.
"""

import ctypes
import functools
import itertools
import json
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from benchmarks.harness import Figures, Samples, Table, copy_bandwidth, interleave, tabulate
from benchmarks.results import publish
from jax_sae.data import (
    ActivationSet,
    ActivationWriter,
    BatchOrder,
    BatchSource,
    Metadata,
    ShardEntry,
    load_batches,
    open_activations,
)
from jax_sae.data.format import DTYPES, METADATA

SHARDS = 8
PREFETCH = 2
READ = "sequential read"
ROW_BY_ROW = "Grain, row by row"
PART = 32  # row by row is so slow that only a 32nd of the batches is timed
STATM = Path("/proc/self/statm")
Stream = Callable[[int], Iterator[np.ndarray]]


def write_set(folder: Path, rows: int, d: int, dtype: str) -> ActivationSet:
    """Normal rows in ``SHARDS`` files, all of them in the page cache afterwards."""
    generator = np.random.default_rng(0)
    shard_rows = -(-rows // SHARDS)
    with ActivationWriter(folder, d=d, dtype=DTYPES[dtype], shard_rows=shard_rows) as writer:
        for start in range(0, rows, shard_rows):
            writer.append(generator.standard_normal((min(shard_rows, rows - start), d), np.float32))
        return open_activations(writer.close())


def sparse_set(folder: Path, rows: int, d: int, dtype: str, shards: int) -> ActivationSet:
    """Rows of zeros in ``shards`` files that take no room on the disk."""
    folder.mkdir()
    shard_rows = rows // shards
    stored = np.dtype(np.uint16) if dtype == "bfloat16" else DTYPES[dtype]
    header = {"descr": np.lib.format.dtype_to_descr(stored), "fortran_order": False, "shape": (shard_rows, d)}
    entries = tuple(ShardEntry(f"shard-{shard:05d}.npy", shard_rows, 0) for shard in range(shards))
    for entry in entries:
        with (folder / entry.name).open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + shard_rows * d * stored.itemsize)
    (folder / METADATA).write_text(json.dumps(Metadata(d, dtype, entries).to_json()))
    return open_activations(folder)


def shards_of(activations: ActivationSet) -> list[Path]:
    """The files of a set, in the order of their rows."""
    return sorted(activations.path.glob("shard-*.npy"))


def streams(activations: ActivationSet, batch_size: int) -> dict[str, Stream]:
    """The candidates: each opens an iterator over a given number of batches."""
    order = BatchOrder(activations.rows, batch_size, 0)
    return {
        READ: lambda number: rows_in_sequence(activations, batch_size, number),
        "load_batches": lambda number: load_batches(activations, batch_size, 0, stop=number, prefetch=PREFETCH),
        "the same, not ahead": lambda number: iter(BatchSource(activations, order, number)),
        ROW_BY_ROW: lambda number: shuffled_rows(activations, batch_size, number),
    }


def rows_in_sequence(activations: ActivationSet, batch_size: int, number: int) -> Iterator[np.ndarray]:
    """The rows as they are on the disk, over and over, always in the same array; plain reads of a batch each."""
    batch = np.empty((batch_size, activations.d), activations.dtype)
    rest = whole = batch.view(np.uint8).data.cast("B")
    for path in itertools.cycle(shards_of(activations)):
        with path.open("rb", buffering=0) as file:
            file.seek(np.load(path, mmap_mode="r").offset)
            while count := file.readinto(rest):
                rest = rest[count:]
                if not rest:
                    yield batch
                    rest, number = whole, number - 1
                if not number:
                    return


def shuffled_rows(activations: ActivationSet, batch_size: int, number: int) -> Iterator[np.ndarray]:
    """The usual pipeline: one record is one row of a mapped file, shuffled over the whole set, and batched."""
    import grain

    files = [np.load(file, mmap_mode="r") for file in shards_of(activations)]
    shard_rows = len(files[0])

    class Rows:
        def __len__(self) -> int:
            return activations.rows

        def __getitem__(self, row: int) -> np.ndarray:
            return files[row // shard_rows][row % shard_rows]

    dataset = grain.MapDataset.source(Rows()).seed(0).shuffle().repeat().batch(batch_size)[:number]
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH)))


def verify(activations: ActivationSet, batch_size: int) -> None:
    """Holds a batch to plain indexing.

    Raises:
      AssertionError: it differs.
    """
    found = next(load_batches(activations, batch_size, seed=0))
    expected = activations.take(BatchOrder(activations.rows, batch_size, 0).indices(0))
    np.testing.assert_array_equal(found, expected)


def cached_fraction(paths: Sequence[Path]) -> float:
    """How much of the files is in the page cache: mincore of their pages, without touching them."""
    cached = pages = 0
    for path in paths:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            bytes_ = np.frombuffer(mapped, np.uint8)
            flags = np.zeros(-(-len(bytes_) // mmap.PAGESIZE), np.uint8)
            failed = ctypes.CDLL(None).mincore(
                ctypes.c_void_p(bytes_.ctypes.data), ctypes.c_size_t(len(bytes_)), ctypes.c_void_p(flags.ctypes.data)
            )
            del bytes_  # the mapping cannot be closed before
            if failed:
                raise OSError(f"mincore failed on {path}")
            cached, pages = cached + int(np.count_nonzero(flags & 1)), pages + len(flags)
    return cached / pages


def evict(paths: Sequence[Path]) -> None:
    """Takes files out of the page cache.

    Raises:
      RuntimeError: they are still there, as files on a tmpfs and pages that a process has mapped always are.
    """
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    left = cached_fraction(paths)
    if left > 0.01:
        raise RuntimeError(f"{left:.0%} of {paths[0].parent} stay in the page cache; give a --folder on a disk")


def sample(
    candidates: Mapping[str, Stream], batches: int, rounds: int, before: Callable[[], None] = lambda: None
) -> tuple[Samples, Samples]:
    """Wall and processor seconds of ``batches`` batches, by name; ``before`` is called ahead of every turn, untimed."""
    processor: dict[str, list[float]] = {name: [] for name in candidates}

    def seconds(name: str) -> float:
        timed = max(1, batches // PART) if name == ROW_BY_ROW else batches
        before()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in candidates[name](timed):
            pass
        processor[name].append((time.process_time() - cpu) * batches / timed)
        return (time.perf_counter() - wall) * batches / timed

    wall = interleave({name: functools.partial(seconds, name) for name in candidates}, rounds=rounds)
    return wall, {name: tuple(values) for name, values in processor.items()}


def cached_tables(activations: ActivationSet, batch_size: int, *, rounds: int, copy_rate: float) -> tuple[Table, ...]:
    """Rows and megabytes a second of wall time, and rows a second of processor time, from the page cache."""
    verify(activations, batch_size)
    batches = activations.rows // batch_size
    for _ in rows_in_sequence(activations, batch_size, batches + 1):  # all of it into the cache
        pass
    wall, processor = sample(streams(activations, batch_size), batches, rounds)
    rows = batches * batch_size
    size = rows * activations.d * activations.dtype.itemsize
    title = f"{described(activations)}, batches of {batch_size}, page cache"
    limits = dict.fromkeys(wall, 2 * size / copy_rate)
    return (
        tabulate(title, wall, baseline=READ, limits=limits, items=rows),
        tabulate(f"{title}, bytes", wall, baseline=READ, items=size / 1e6, unit="MB"),
        tabulate(f"{title}, processor time", processor, baseline=READ, items=rows),
    )


def cold_tables(activations: ActivationSet, batch_size: int, *, rounds: int) -> tuple[Table, ...]:
    """Megabytes a second from the disk; the limit is the sequential read of the same files in the same rounds.

    Raises:
      RuntimeError: the files cannot be evicted.
    """
    batches = activations.rows // batch_size
    candidates = {name: streams(activations, batch_size)[name] for name in (READ, "load_batches")}
    wall, _ = sample(candidates, batches, rounds, functools.partial(evict, shards_of(activations)))
    size = batches * batch_size * activations.d * activations.dtype.itemsize
    title = f"{described(activations)}, batches of {batch_size}, cold"
    limits = {"load_batches": statistics.median(wall[READ])}
    return (tabulate(title, wall, baseline=READ, limits=limits, items=size / 1e6, unit="MB"),)


def described(activations: ActivationSet) -> str:
    """Shape and dtype."""
    return f"{activations.rows} x {activations.d} {activations.dtype.name}"


def memory_figures(folder: Path, d: int, dtype: str, batch_size: int, sizes: Sequence[int]) -> Figures:
    """What the process holds while it goes once through sparse sets of ``sizes`` bytes."""
    rows = []
    for number, size in enumerate(sizes):
        shards = max(1, size >> 30)
        of_shard = size // shards // (d * DTYPES[dtype].itemsize)
        activations = sparse_set(folder / f"sparse-{number}", shards * of_shard, d, dtype, shards)
        batches = activations.rows // batch_size
        before, most = resident(), 0
        seconds = []
        for name in (READ, "load_batches"):
            evict(shards_of(activations))
            start = time.perf_counter()
            for _ in streams(activations, batch_size)[name](batches):
                most = max(most, resident())
            seconds.append(time.perf_counter() - start)
        read, load = (int(batches * batch_size / value) for value in seconds)
        rows.append(
            {
                "set GB": size / 1e9,
                f"{READ} rows/s": read,
                "load_batches rows/s": load,
                "resident before MB": before / 1e6,
                "resident at most MB": most / 1e6,
            }
        )
    memory = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE / 1e9
    return Figures(f"Sparse sets of {d} {dtype}, gone through once; the machine has {memory:.1f} GB", tuple(rows))


def resident() -> int:
    """Resident memory of this process in bytes, mapped files included."""
    return int(STATM.read_text().split()[1]) * mmap.PAGESIZE


def main(
    rows: int = 1_048_576,
    d: int = 768,
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16",
    batch_size: int = 4096,
    rounds: int = 10,
    cold: bool = True,
    memory_multiple: float = 1.1,
    folder: Path | None = None,
    json: Path | None = None,
) -> None:
    """Benchmark the loader.

    Args:
      rows: of the set.
      d: width of a row.
      dtype: of the stored rows.
      batch_size: rows per batch.
      rounds: timed passes over the set.
      cold: whether to measure from the disk as well (Linux).
      memory_multiple: size of the largest set over the machine's memory; 0 leaves such sets out (Linux).
      folder: where sets are written, and removed in the end; the system's folder for temporary files without it.
      json: folder to write the result under, instead of benchmarks/results.
    """
    copy_rate = copy_bandwidth()
    figures = []
    with tempfile.TemporaryDirectory(dir=folder) as place:
        if memory_multiple:  # before anything else has filled the memory of the process
            largest = memory_multiple * os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
            sizes = [int(largest / part) for part in (16, 4, 1)]
            figures.append(memory_figures(Path(place), d, dtype, batch_size, sizes))
        activations = write_set(Path(place) / "set", rows, d, dtype)
        # Cold first: what the process has mapped, as the stream of single rows does, cannot be evicted.
        from_disk = cold_tables(activations, batch_size, rounds=rounds) if cold else ()
        tables = cached_tables(activations, batch_size, rounds=rounds, copy_rate=copy_rate)
    publish("loader", (*tables, *from_disk), figures=figures, rates={"copy B/s": copy_rate}, root=json)


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.loader")
