"""Batches of a shuffled set, read ahead on the host and moved to the devices ahead of the step."""

import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any

import jax
import numpy as np

from jax_sae.data.order import BatchOrder
from jax_sae.data.reader import ActivationSet
from jax_sae.data.windows import Share, WindowReader
from jax_sae.errors import InputError

_ENDLESS = 2**62


class BatchSource:
    """Random access to batches, for ``grain.MapDataset.source``: an element is a whole batch.

    Batches are gathered from a window of the order that is in memory, while the next window is read from the disk. Of
    each window a host reads the rows it will use, in the order they have on disk. Memory is that of two windows,
    whatever the size of the set. One thread at a time may use a source.

    Args:
      activations: the set.
      order: which rows make up which batch.
      batches: length of the source.
      first_row: row of the set that row 0 of the order is.
      process_index: this host.
      process_count: hosts; each gets an equal, consecutive part of every batch.
    """

    def __init__(
        self,
        activations: ActivationSet,
        order: BatchOrder,
        batches: int,
        *,
        first_row: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if order.batch_size % process_count:
            raise InputError(f"batch_size is {order.batch_size}; expected a multiple of the {process_count} processes")
        size = order.batch_size // process_count
        self._order, self._share = order, Share(order, batches, first_row, process_index * size, size)
        self._shape, self._dtype = (size, activations.d), activations.dtype
        self._windows = WindowReader(activations, self._share)

    def __len__(self) -> int:
        return self._share.batches

    def __getitem__(self, batch: Any) -> np.ndarray:
        """[batch_size / process_count, d] in the stored dtype."""
        if not 0 <= batch < self._share.batches:
            raise IndexError(f"batch {batch} of {self._share.batches}")
        gathered, filled = np.empty(self._shape, self._dtype), 0
        start = int(batch) * self._order.batch_size  # positions in the stream of rows from here on
        mine = start + self._share.skip, start + self._share.skip + self._share.size
        for piece in self._order.pieces(int(batch)):
            stop = start + piece.stop - piece.start
            low, high = max(start, mine[0]), min(stop, mine[1])
            if low < high:
                first = self._share.owned_before(self._order.window_start(piece.epoch, piece.window))
                loaded, find = self._windows((piece.epoch, piece.window))
                places = find[self._share.owned_before(low) - first : self._share.owned_before(high) - first]
                out = gathered[filled : filled + len(places)]
                np.take(loaded, places, axis=0, out=out, mode="clip")  # "raise" would go through a buffer
                filled += len(places)
            start = stop
        return gathered


def load_batches(
    activations: ActivationSet,
    batch_size: int,
    seed: int,
    *,
    start: int = 0,
    stop: int | None = None,
    rows: tuple[int, int] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 2,
) -> Iterator[np.ndarray]:
    """Shuffled batches, read ahead in a thread of their own.

    Args:
      activations: the set.
      batch_size: rows per batch over all hosts.
      seed: of the order (:class:`jax_sae.data.BatchOrder`).
      start: first batch; give the training step to resume where a run left off.
      stop: one past the last batch; endless without it.
      rows: range of rows to draw from; the training rows without it.
      process_index: this host.
      process_count: hosts.
      prefetch: batches to read ahead.

    Yields:
      [batch_size / process_count, d] arrays in the stored dtype.

    Raises:
      InputError: a batch larger than the range of rows, one that cannot be split over the hosts, or a range
        that is not within the set.
    """
    import grain

    first, last = (0, activations.train_rows) if rows is None else rows
    if not 0 <= first < last <= activations.rows:
        raise InputError(f"batches of rows {first} to {last} of a set with {activations.rows}; give some of its rows")
    source = BatchSource(
        activations,
        BatchOrder(last - first, batch_size, seed),
        _ENDLESS if stop is None else stop,
        first_row=first,
        process_index=process_index,
        process_count=process_count,
    )
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.source(source)[start:].to_iter_dataset(options))


def prefetch_to_device(
    batches: Iterator[np.ndarray], *, sharding: jax.sharding.Sharding | None = None, size: int = 2
) -> Generator[jax.Array]:
    """Moves batches to the devices in a thread of its own, ``size`` of them ahead of the consumer.

    Args:
      batches: arrays of this host.
      sharding: where a batch goes; the default device without it. With several hosts, each gives its part
        of the global array.
      size: batches that wait on the device.

    Yields:
      The batches, in order. An error of ``batches`` is raised when its turn comes; closing the generator
      stops the thread.

    Raises:
      InputError: ``size`` is below 1.
    """
    if size < 1:
        raise InputError(f"size is {size}; expected at least 1")
    ready: queue.Queue[Any] = queue.Queue(maxsize=size)
    stopped = threading.Event()

    def put(item: Any) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for batch in batches:
                put((_to_device(batch, sharding), None))
                if stopped.is_set():
                    return
            put((None, StopIteration()))
        except BaseException as error:  # handed over to the consumer, who raises it
            put((None, error))

    thread = threading.Thread(target=work, name="prefetch_to_device", daemon=True)
    thread.start()
    try:
        while True:
            batch, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield batch
    finally:
        stopped.set()
        thread.join()


def _to_device(batch: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None or jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.make_array_from_process_local_data(sharding, batch)
