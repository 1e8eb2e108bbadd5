"""Shuffled batches from a set on disk against one copy of the same bytes, and against shuffling row by row.

    python -m benchmarks.loader
    python -m benchmarks.loader --rows 20000 --d 576 --dtype bfloat16

The set is written anew and read from the page cache, so the figures are of the loader and not of a disk: a loader
slower than the disk wastes it, one faster than the step is never waited for. The copy goes from the mapped files
into one buffer that is used again, which is the least that any loader of batches has to do. Processor time counts
all threads of the process, whatever else runs on the machine.
"""

import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from benchmarks.harness import Samples, Table, copy_bandwidth, interleave, tabulate
from benchmarks.results import publish
from jax_sae.data import ActivationSet, ActivationWriter, BatchOrder, BatchSource, load_batches, open_activations
from jax_sae.data.format import DTYPES

SHARDS = 8
PREFETCH = 2
ROW_BY_ROW = "Grain, row by row"
PART = 8  # row by row is so slow that only an eighth of the batches is timed
Stream = Callable[[int], Iterator[np.ndarray]]


def write_set(folder: Path, rows: int, d: int, dtype: str) -> ActivationSet:
    """Normal rows in ``SHARDS`` files, all of them in the page cache afterwards."""
    generator = np.random.default_rng(0)
    shard_rows = -(-rows // SHARDS)
    with ActivationWriter(folder, d=d, dtype=DTYPES[dtype], shard_rows=shard_rows) as writer:
        for start in range(0, rows, shard_rows):
            writer.append(generator.standard_normal((min(shard_rows, rows - start), d), np.float32))
        return open_activations(writer.close())


def streams(activations: ActivationSet, batch_size: int) -> dict[str, Stream]:
    """The candidates: each opens an iterator over a given number of batches."""
    order = BatchOrder(activations.rows, batch_size, 0)

    def copies(number: int) -> Iterator[np.ndarray]:
        buffer = np.empty((batch_size, activations.d), activations.dtype)
        for batch in range(number):
            start = batch * batch_size % (activations.rows - batch_size + 1)
            yield activations.take(np.arange(start, start + batch_size), buffer)

    return {
        "copy": copies,
        "load_batches": lambda number: load_batches(activations, batch_size, 0, stop=number, prefetch=PREFETCH),
        "the same, not ahead": lambda number: iter(BatchSource(activations, order, number)),
        ROW_BY_ROW: lambda number: shuffled_rows(activations, batch_size, number),
    }


def shuffled_rows(activations: ActivationSet, batch_size: int, number: int) -> Iterator[np.ndarray]:
    """The usual pipeline: one record is one row of a mapped file, shuffled over the whole set, and batched."""
    import grain

    files = [np.load(file, mmap_mode="r") for file in sorted(activations.path.glob("shard-*.npy"))]
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


def sample(candidates: Mapping[str, Stream], batches: int, rounds: int) -> tuple[Samples, Samples]:
    """Wall and processor seconds of ``batches`` batches, by name.

    What can be read before the clock starts is drawn first, and no stream goes further than it is timed: nobody is
    given work done in another's turn.
    """
    processor: dict[str, list[float]] = {name: [] for name in candidates}

    def seconds(name: str) -> float:
        timed = max(1, batches // PART) if name == ROW_BY_ROW else batches
        stream = candidates[name](PREFETCH + 1 + timed)
        for _ in range(PREFETCH + 1):
            next(stream)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in stream:
            pass
        processor[name].append((time.process_time() - cpu) * batches / timed)
        return (time.perf_counter() - wall) * batches / timed

    wall = interleave({name: functools.partial(seconds, name) for name in candidates}, rounds=rounds)
    return wall, {name: tuple(values) for name, values in processor.items()}


def loader_tables(activations: ActivationSet, batch_size: int, *, rounds: int, copy_rate: float) -> tuple[Table, ...]:
    """Rows and megabytes a second of wall time, and rows a second of processor time."""
    verify(activations, batch_size)
    batches = activations.rows // batch_size
    wall, processor = sample(streams(activations, batch_size), batches, rounds)
    rows = batches * batch_size
    size = rows * activations.d * activations.dtype.itemsize
    title = f"{activations.rows} x {activations.d} {activations.dtype.name}, batches of {batch_size}"
    limits = dict.fromkeys(wall, 2 * size / copy_rate)
    return (
        tabulate(title, wall, baseline="copy", limits=limits, items=rows),
        tabulate(f"{title}, bytes", wall, baseline="copy", items=size / 1e6, unit="MB"),
        tabulate(f"{title}, processor time", processor, baseline="copy", items=rows),
    )


def main(
    rows: int = 98_304,
    d: int = 768,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    batch_size: int = 4096,
    rounds: int = 10,
    json: Path | None = None,
) -> None:
    """Benchmark the loader.

    Args:
      rows: of the set.
      d: width of a row.
      dtype: of the stored rows.
      batch_size: rows per batch.
      rounds: timed passes over the set.
      json: folder to write the result under, instead of benchmarks/results.
    """
    copy_rate = copy_bandwidth()
    with tempfile.TemporaryDirectory() as folder:
        activations = write_set(Path(folder) / "set", rows, d, dtype)
        tables = loader_tables(activations, batch_size, rounds=rounds, copy_rate=copy_rate)
    publish("loader", tables, rates={"copy B/s": copy_rate}, root=json)


if __name__ == "__main__":
    tyro.cli(main, prog="python -m benchmarks.loader")
