"""Batches of a shuffled set, read ahead on the host and moved to the devices ahead of the step."""

import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any

import jax
import numpy as np

from jax_sae.data.order import BatchOrder
from jax_sae.data.reader import ActivationSet
from jax_sae.errors import InputError

_ENDLESS = 2**62


class BatchSource:
    """Random access to batches, for ``grain.MapDataset.source``: an element is a whole batch.

    The window of the order that was used last is kept in memory, and batches are gathered from it. Of each window a
    host reads the rows it will use, in the order they have on disk, and always into the same buffer: fresh memory
    costs more than the copy. So one thread at a time may use a source.

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
        self._activations, self._order, self._batches = activations, order, batches
        self._first_row = first_row
        self._share = order.batch_size // process_count
        self._skip = process_index * self._share
        most = min(order.block_rows * order.window_blocks, order.rows)
        self._buffer = np.empty((most, activations.d), activations.dtype)
        self._held: tuple[int, int] | None = None  # epoch and window of the two below
        self._loaded, self._find = self._buffer[:0], np.zeros(0, np.int64)

    def __len__(self) -> int:
        return self._batches

    def __getitem__(self, batch: Any) -> np.ndarray:
        """[batch_size / process_count, d] in the stored dtype."""
        if not 0 <= batch < self._batches:
            raise IndexError(f"batch {batch} of {self._batches}")
        parts = []
        start = int(batch) * self._order.batch_size  # positions in the stream of rows from here on
        mine = start + self._skip, start + self._skip + self._share
        for piece in self._order.pieces(int(batch)):
            stop = start + piece.stop - piece.start
            low, high = max(start, mine[0]), min(stop, mine[1])
            if low < high:
                first = self._owned_before(self._order.window_start(piece.epoch, piece.window))
                loaded, find = self._window(piece.epoch, piece.window)
                parts.append(loaded[find[self._owned_before(low) - first : self._owned_before(high) - first]])
            start = stop
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def _owned_before(self, position: int) -> int:
        """How many positions of the stream before ``position`` are this host's."""
        batches, within = divmod(position, self._order.batch_size)
        return batches * self._share + min(max(within - self._skip, 0), self._share)

    def _window(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """This host's rows of a window in the order of the disk, and where each place of the stream finds its row."""
        if self._held != (epoch, window):
            rows = self._order.window(epoch, window)
            within = (self._order.window_start(epoch, window) + np.arange(len(rows))) % self._order.batch_size
            rows = rows[(within >= self._skip) & (within < self._skip + self._share)]
            by_place = np.argsort(rows)
            self._held = None  # should reading fail, the buffer holds no window
            self._find = np.empty_like(by_place)
            self._find[by_place] = np.arange(len(rows))
            self._loaded = self._activations.take(rows[by_place] + self._first_row, out=self._buffer[: len(rows)])
            self._held = epoch, window
        return self._loaded, self._find


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
