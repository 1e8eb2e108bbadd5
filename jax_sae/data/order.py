"""The order of training rows: a pure function of the seed and the position in an endless stream."""

import dataclasses
import functools

import numpy as np

from jax_sae.errors import InputError


@dataclasses.dataclass(frozen=True)
class Piece:
    """Part of a batch: positions ``start`` to ``stop`` of one window of one epoch."""

    epoch: int
    window: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class BatchOrder:
    """Which rows make up which batch.

    Rows are shuffled at two levels, because reading blocks in sequence is many times faster than reading rows at
    random: every epoch puts blocks of consecutive rows into a new order, and rows are then shuffled within
    windows of consecutive blocks. The stream of rows is endless, every epoch a permutation of all rows; batch i is
    positions i * batch_size to (i + 1) * batch_size of it. So no row is dropped, a batch may reach from one
    epoch into the next, and where to resume is one integer.

    Args:
      rows: number of rows.
      batch_size: rows per batch.
      seed: of the shuffle.
      block_rows: consecutive rows that stay in one window.
      window_blocks: blocks that rows are shuffled across; a window is what has to fit into memory.

    Raises:
      InputError: a batch larger than the set, or a size below 1.

    Example:
      >>> order = BatchOrder(rows=10, batch_size=4, seed=0, block_rows=2, window_blocks=2)
      >>> sorted(int(row) for i in range(5) for row in order.indices(i)) == sorted(2 * list(range(10)))
      True
    """

    rows: int
    batch_size: int
    seed: int
    block_rows: int = 256
    window_blocks: int = 256

    def __post_init__(self) -> None:
        for name in ("rows", "batch_size", "block_rows", "window_blocks"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.batch_size > self.rows:
            raise InputError(
                f"a batch has {self.batch_size} rows but the set {self.rows}; use a smaller batch or a larger set"
            )

    @property
    def windows(self) -> int:
        """Windows of an epoch."""
        return -(-self.rows // (self.block_rows * self.window_blocks))

    def indices(self, batch: int) -> np.ndarray:
        """[batch_size] int64 rows of batch number ``batch``."""
        return np.concatenate([self.window(p.epoch, p.window)[p.start : p.stop] for p in self.pieces(batch)])

    def pieces(self, batch: int) -> list[Piece]:
        """Where the rows of a batch are: windows of one epoch, or of two where the batch straddles them."""
        position, end = batch * self.batch_size, (batch + 1) * self.batch_size
        pieces = []
        while position < end:
            epoch, offset = divmod(position, self.rows)
            starts = self._window_starts(epoch)
            window = int(np.searchsorted(starts, offset, side="right")) - 1
            within = offset - int(starts[window])
            taken = min(int(starts[window + 1]) - offset, end - position)
            pieces.append(Piece(epoch, window, within, within + taken))
            position += taken
        return pieces

    def window(self, epoch: int, window: int) -> np.ndarray:
        """int64 rows of a window, in the order of the stream."""
        blocks = self._blocks(epoch)[window * self.window_blocks : (window + 1) * self.window_blocks]
        starts = blocks * self.block_rows
        rows = (starts[:, None] + np.arange(self.block_rows)[None, :]).ravel()
        rows = rows[rows < self.rows]  # the last block may be short
        return self._generator(epoch, window + 1).permutation(rows)

    def window_start(self, epoch: int, window: int) -> int:
        """Position in the stream of the first row of a window."""
        return epoch * self.rows + int(self._window_starts(epoch)[window])

    @functools.lru_cache(maxsize=2)  # noqa: B019 - an object lives as long as a run
    def _blocks(self, epoch: int) -> np.ndarray:
        """Blocks in the order of an epoch."""
        return self._generator(epoch, 0).permutation(-(-self.rows // self.block_rows))

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def _window_starts(self, epoch: int) -> np.ndarray:
        """Offset in the epoch at which each window starts, and the end of the last."""
        blocks = self._blocks(epoch)
        sizes = np.minimum(self.block_rows, self.rows - blocks * self.block_rows)
        ends = np.cumsum(sizes)
        last_blocks = np.arange(self.window_blocks, len(blocks) + self.window_blocks, self.window_blocks) - 1
        return np.concatenate([[0], ends[np.minimum(last_blocks, len(blocks) - 1)]])

    def _generator(self, epoch: int, stream: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch, stream])))
