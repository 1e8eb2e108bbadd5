"""Windows of the order of training, each read while the one before it is in use."""

import dataclasses
import itertools
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np

from jax_sae.data.order import BatchOrder
from jax_sae.data.reader import ActivationSet

READERS = 2  # threads that copy rows from the page cache; that the disk is busy is the doing of what is announced

Window = tuple[int, int]  # epoch, number of the window in it
Plan = tuple[np.ndarray, np.ndarray]  # rows to read, ascending; for each place of the stream, where its row is in them
Loaded = tuple[np.ndarray, np.ndarray]  # the same with what was read


@dataclasses.dataclass(frozen=True)
class Share:
    """What one host uses of the stream of rows: an equal, consecutive part of each of the first batches.

    Attributes:
      order: which rows make up which batch.
      batches: how many batches are used.
      first_row: row of the set that row 0 of the order is.
      skip: rows of a batch that hosts before this one get.
      size: rows of a batch that this host gets.
    """

    order: BatchOrder
    batches: int
    first_row: int
    skip: int
    size: int

    def owned_before(self, position: int) -> int:
        """How many positions of the stream before ``position`` are this host's."""
        batches, within = divmod(position, self.order.batch_size)
        return batches * self.size + min(max(within - self.skip, 0), self.size)

    def rows(self, window: Window) -> np.ndarray:
        """int64 rows of the set that this host uses of a window, in the order of the stream."""
        rows = self.order.window(*window)
        within = (self.order.window_start(*window) + np.arange(len(rows))) % self.order.batch_size
        return rows[(within >= self.skip) & (within < self.skip + self.size)] + self.first_row

    def following(self, window: Window) -> Window | None:
        """The window after ``window``, if batches reach into it."""
        epoch, number = window
        following = (epoch, number + 1) if number + 1 < self.order.windows else (epoch + 1, 0)
        return following if self.order.window_start(*following) < self.batches * self.order.batch_size else None


class WindowReader:
    """Rows of one window at a time, in two buffers that are used in turn: fresh memory costs more than the copy.

    While one window is in use the next is read, and the system is told of the one after it, so that the disk never
    waits. One thread at a time may use it.

    Args:
      activations: the set.
      share: what of it is read.
    """

    def __init__(self, activations: ActivationSet, share: Share):
        self._activations, self._share = activations, share
        most = min(share.order.block_rows * share.order.window_blocks, share.order.rows)
        self._spare, self._used = (np.empty((most, activations.d), activations.dtype) for _ in range(2))
        self._held: tuple[Window, Loaded] | None = None
        self._ahead: tuple[Window, Future[Loaded]] | None = None
        self._planned: tuple[Window, Future[Plan]] | None = None
        self._plans = ThreadPoolExecutor(1, "plans")
        self._turns = ThreadPoolExecutor(1, "windows")  # so a buffer that is being filled is waited for
        self._readers = ThreadPoolExecutor(READERS, "rows")

    def __call__(self, window: Window) -> Loaded:
        """The window, valid until the next call with another; an error of reading is raised and not remembered."""
        if self._held is None or self._held[0] != window:
            ahead = self._ahead if self._ahead is not None and self._ahead[0] == window else self._start(window)
            self._ahead = None
            self._held = window, ahead[1].result()
            self._spare, self._used = self._used, self._spare
            following = self._share.following(window)
            self._ahead = None if following is None else self._start(following)
        return self._held[1]

    def _start(self, window: Window) -> tuple[Window, "Future[Loaded]"]:
        """Begins to read a window, and to announce the one that follows."""
        if self._planned is not None and self._planned[0] == window:
            plan = self._planned[1]
        else:
            plan = self._plans.submit(self._plan, window, announce=False)
        reading = self._turns.submit(self._read, plan, self._spare)
        following = self._share.following(window)
        self._planned = None if following is None else (following, self._plans.submit(self._plan, following))
        return window, reading

    def _plan(self, window: Window, announce: bool = True) -> Plan:
        rows = self._share.rows(window)
        by_place = np.argsort(rows)
        find = np.empty_like(by_place)
        find[by_place] = np.arange(len(rows))
        ascending = rows[by_place]
        if announce:
            self._activations.announce(ascending)
        return ascending, find

    def _read(self, plan: "Future[Plan]", buffer: np.ndarray) -> Loaded:
        ascending, find = plan.result()
        rows, loaded = len(ascending), buffer[: len(ascending)]
        bounds = np.linspace(0, rows, READERS + 1, dtype=int)
        parts = [slice(low, high) for low, high in itertools.pairwise(bounds) if low < high]
        readings = [self._readers.submit(self._activations.take, ascending[part], loaded[part]) for part in parts]
        wait(readings)  # all of them, that none writes into a buffer given to another window after an error
        for reading in readings:
            reading.result()
        return loaded, find
