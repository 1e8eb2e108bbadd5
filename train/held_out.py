"""What is measured on held-out rows. Each is encoded once, and every metric takes its part of the batch."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jax_sae import SAEConfig, SAEStats, SparseAutoencoder, sae_loss
from jax_sae.data import ActivationSet
from jax_sae.metrics import (
    AlignmentSums,
    MonosemanticitySums,
    OrthogonalitySums,
    ReconstructionSums,
    SparsitySums,
    on_host,
)

from .run import Run

LEAST_CKNNA_ROWS = 11  # ten neighbours and the row itself
ITEMS_PER_BLOCK = 1024  # of the sums for MS, which are merged on the host: [M, d] float64


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What one pass over the held-out rows gives.

    Attributes:
      numbers: metrics by their name in ``evaluation.json``, and ``cknna_left_out``, ``ms_left_out`` with the reason
        where those could not be computed.
      active: [rows] int, active concepts of each row.
      firing: [M] int, rows that each concept fires on.
    """

    numbers: dict[str, Any]
    active: np.ndarray
    firing: np.ndarray


def measure(
    run: Run,
    activations: ActivationSet,
    mean: np.ndarray,
    *,
    batch_size: int,
    cknna_rows: int,
    progress: Callable[[int], object],
) -> HeldOut:
    """Every metric of the held-out rows of ``activations``.

    Args:
      run: the autoencoder.
      activations: with at least one held-out row.
      mean: [d] that embeddings of items are centred by.
      batch_size: rows at one time, rounded down to whole items.
      cknna_rows: rows of a batch of CKNNA, whose activations ``[cknna_rows, M]`` are kept; 0 for no CKNNA.
      progress: called with the rows of every batch.
    """
    first, last, item = activations.train_rows, activations.rows, activations.tokens_per_item or 1
    rows = _Rows()
    alignment = _Alignment(activations, run.sae.n_concepts, cknna_rows)
    monosemanticity = _Monosemanticity(activations, run.sae.n_concepts, mean)
    for begin, end in batch_bounds(first, last, item, batch_size):
        x = activations.read(begin, end)
        batch = _forward(run.sae, run.state.model, run.state.stats, x)
        rows.add(batch)
        alignment.add(batch.activations)
        if begin % item == 0 and end % item == 0:
            monosemanticity.add(x, batch.activations)
        progress(end - begin)
    overlap = on_host(jax.jit(OrthogonalitySums.of_batch)(run.state.model.decoder()))
    numbers = rows.compute() | overlap.compute() | alignment.compute() | monosemanticity.compute()
    assert rows.sparsity is not None
    return HeldOut(numbers, np.concatenate(rows.active), rows.sparsity.firing)


def batch_bounds(first: int, last: int, item: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """Ends of batches of whole items; rows of no whole item, at both ends, are batches of their own.

    Example:
      >>> list(batch_bounds(3, 21, item=4, batch_size=9))
      [(3, 4), (4, 12), (12, 20), (20, 21)]
    """
    start, stop = min(first + -first % item, last), max(last - last % item, first)
    size = max(batch_size // item, 1) * item
    return itertools.pairwise(sorted({first, *range(start, stop, size), stop, last}))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Batch:
    """What the device gives for a batch; ``activations [B, M]`` stay there."""

    loss: jax.Array
    reconstruction: ReconstructionSums
    sparsity: SparsitySums
    active: jax.Array
    activations: jax.Array


@functools.partial(jax.jit, static_argnums=0)
def _forward(config: SAEConfig, model: SparseAutoencoder, stats: SAEStats, x: jax.Array) -> _Batch:
    loss, (output, _) = sae_loss(model, stats, x, config.sparsity_warmup_steps, training=False)
    return _Batch(
        loss,
        ReconstructionSums.of_batch(x, output.x_hat),
        SparsitySums.of_batch(output.activations),
        jnp.sum(output.activations != 0, axis=-1),
        output.activations,
    )


class _Mergeable(Protocol):
    def merge(self, other: Any) -> Any: ...


Sums = TypeVar("Sums", bound=_Mergeable)


def _merged(total: Sums | None, part: Sums) -> Sums:
    """``total`` and the sums of one more batch, on the host."""
    part = on_host(part)
    return part if total is None else total.merge(part)


class _Rows:
    """Loss, reconstruction and sparsity: sums over rows."""

    def __init__(self) -> None:
        self.reconstruction: ReconstructionSums | None = None
        self.sparsity: SparsitySums | None = None
        self.loss = 0.0
        self.active: list[np.ndarray] = []

    def add(self, batch: _Batch) -> None:
        self.reconstruction = _merged(self.reconstruction, batch.reconstruction)
        self.sparsity = _merged(self.sparsity, batch.sparsity)
        self.active.append(np.asarray(batch.active))
        self.loss += float(batch.loss) * len(batch.active)

    def compute(self) -> dict[str, Any]:
        assert self.reconstruction is not None and self.sparsity is not None  # there are held-out rows
        silent = int(np.count_nonzero(self.sparsity.firing == 0))
        mean_loss = self.loss / int(self.sparsity.rows)
        return {"loss": mean_loss, **self.sparsity.compute(), "ndn": silent, **self.reconstruction.compute()}


class _Alignment:
    """CKNNA between rows and their activations, over full batches; over all rows where there are fewer."""

    def __init__(self, activations: ActivationSet, n_concepts: int, size: int):
        self._set, self._begin = activations, activations.train_rows
        self._size = min(size, activations.holdout_rows)
        self._left_out = ""
        if not size:
            self._left_out = "switched off by --cknna-rows 0"
        elif self._size < LEAST_CKNNA_ROWS:
            self._left_out = f"there are {self._size} held-out rows, at least {LEAST_CKNNA_ROWS} are needed"
        else:
            self._blocks = _Blocks(self._size, n_concepts)
        self._sums: AlignmentSums | None = None

    def add(self, activations: jax.Array) -> None:
        if self._left_out:
            return
        for block in self._blocks.add(activations):
            x = self._set.read(self._begin, self._begin + self._size)
            self._sums = _merged(self._sums, AlignmentSums.of_batch(jnp.asarray(x), block))
            self._begin += self._size

    def compute(self) -> dict[str, Any]:
        if self._left_out:
            return {"cknna_left_out": self._left_out}
        assert self._sums is not None  # at least one batch is full
        numbers = self._sums.compute()
        if not np.isfinite(numbers["cknna"]):
            return {"cknna_left_out": "kernel values of the rows are beyond float32"}
        return {**numbers, "cknna_rows": self._size}


class _Monosemanticity:
    """MS over items: a concept's activation is its mean over the tokens, the embedding that of the centred rows."""

    def __init__(self, activations: ActivationSet, n_concepts: int, mean: np.ndarray):
        self._item, self._mean = activations.tokens_per_item, jnp.asarray(mean, jnp.float32)
        self._n_concepts, self._items = n_concepts, 0
        most = activations.holdout_rows // (self._item or 1)
        self._blocks = _Blocks(min(most, ITEMS_PER_BLOCK), n_concepts + len(mean)) if self._item and most else None
        self._sums: MonosemanticitySums | None = None

    def add(self, x: np.ndarray, activations: jax.Array) -> None:
        """Rows of whole items."""
        if self._item is None or self._blocks is None:
            return
        means = _item_means(x, activations, self._mean, self._item)
        self._items += len(means)
        for block in self._blocks.add(means):
            self._merge(block)

    def _merge(self, items: jax.Array) -> None:
        self._sums = _merged(self._sums, _of_items(items, self._n_concepts))

    def compute(self) -> dict[str, Any]:
        if self._item is None:
            return {"ms_left_out": "the set has no items of several tokens (tokens_per_item)"}
        if self._blocks is not None and len(rest := self._blocks.rest()):
            self._merge(rest)
        if self._sums is None:
            return {"ms_left_out": "no item is held out whole"}
        numbers = {**self._sums.compute(), "ms_items": self._items}
        if not numbers["ms_concepts"]:
            none = f"no concept fires on two of the {self._items} held-out items or more"
            return {"ms_items": self._items, "ms_concepts": 0, "ms_left_out": none}
        return numbers


@functools.partial(jax.jit, static_argnames="item")
def _item_means(x: jax.Array, activations: jax.Array, mean: jax.Array, item: int) -> jax.Array:
    """[items, M + d]: the mean activations of every item, and the mean of its centred rows."""
    centred = x.astype(jnp.float32) - mean[None, :]
    means = [rows.reshape(-1, item, rows.shape[-1]).mean(axis=1) for rows in (activations, centred)]
    return jnp.concatenate(means, axis=-1)


@functools.partial(jax.jit, static_argnames="n_concepts")
def _of_items(items: jax.Array, n_concepts: int) -> MonosemanticitySums:
    return MonosemanticitySums.of_batch(items[:, :n_concepts], items[:, n_concepts:])


class _Blocks:
    """Gathers rows of batches of any size into blocks of one size, in one piece of device memory."""

    def __init__(self, size: int, width: int):
        self._buffer = jnp.zeros((size, width))
        self._filled = 0

    def add(self, rows: jax.Array) -> Iterator[jax.Array]:
        """The blocks that ``rows`` fill; each is to be used up before the next, which takes its memory."""
        done = 0
        while done < len(rows):
            self._buffer = _put(self._buffer, rows, self._filled - done)
            taken = min(len(rows) - done, len(self._buffer) - self._filled)
            done, self._filled = done + taken, self._filled + taken
            if self._filled == len(self._buffer):
                yield self._buffer
                self._filled = 0

    def rest(self) -> jax.Array:
        """The rows of the block that is not full."""
        return self._buffer[: self._filled]


@functools.partial(jax.jit, donate_argnames="buffer")
def _put(buffer: jax.Array, rows: jax.Array, at: int) -> jax.Array:
    """``buffer`` with ``rows`` from row ``at`` on, which may be negative; rows outside of it are dropped."""
    places = at + jnp.arange(len(rows))
    places = jnp.where(places < 0, len(buffer), places)  # a negative index would count from the end
    return buffer.at[places].set(rows.astype(buffer.dtype), mode="drop")
