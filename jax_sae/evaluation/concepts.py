"""Concepts in context: how many an input needs, how often each fires, and where it fires most strongly."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_sae.sae import SAEStats, SparseAutoencoder

if TYPE_CHECKING:
    from jax_sae.data import ActivationSet

TOKENS_BEFORE, TOKENS_AFTER = 20, 10
FREQUENCY_BANDS = (0.003, 0.01, 0.03)
ALWAYS_ON = 0.1  # concepts that fire more often than this are left out, as the paper leaves them out
Progress = Callable[[int], object]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Firing:
    """What is known of every concept after some rows. One item of the set (a text, an image) counts once in ``peaks``.

    Attributes:
      count: [M] rows it fires on.
      total: [M] sum of its activations.
      energy: [M] sum of their squares.
      peaks: [M, n] its strongest activations, one per item, in descending order; -inf where there are fewer.
      rows: [M, n] int32 the rows they are at.
    """

    count: jax.Array
    total: jax.Array
    energy: jax.Array
    peaks: jax.Array
    rows: jax.Array

    @classmethod
    def start(cls, n_concepts: int, n_peaks: int) -> "Firing":
        """Nothing seen yet."""
        return cls(
            count=jnp.zeros(n_concepts, jnp.int32),
            total=jnp.zeros(n_concepts),
            energy=jnp.zeros(n_concepts),
            peaks=jnp.full((n_concepts, n_peaks), -jnp.inf),
            rows=jnp.zeros((n_concepts, n_peaks), jnp.int32),
        )

    def add(self, activations: jax.Array, first_row: jax.Array, group: int) -> "Firing":
        """After ``activations [B, M]`` of rows from ``first_row`` on, every ``group`` rows an item."""
        fires = activations != 0
        items = jnp.where(fires, activations, -jnp.inf).reshape(-1, group, activations.shape[-1])
        within = jnp.argmax(items, axis=1)  # [items, M]
        rows = first_row + jnp.arange(len(items))[:, None] * group + within
        peaks = jnp.concatenate([self.peaks, jnp.max(items, axis=1).T], axis=1)
        rows = jnp.concatenate([self.rows, rows.T.astype(jnp.int32)], axis=1)
        peaks, best = jax.lax.top_k(peaks, self.peaks.shape[1])
        return Firing(
            self.count + jnp.sum(fires, axis=0, dtype=jnp.int32),
            self.total + jnp.sum(activations, axis=0),
            self.energy + jnp.sum(activations**2, axis=0),
            peaks,
            jnp.take_along_axis(rows, best, axis=1),
        )


@partial(jax.jit, static_argnames="group", donate_argnames="firing")
def _add_rows(
    model: SparseAutoencoder, stats: SAEStats, x: jax.Array, firing: Firing, first_row: jax.Array, group: int
) -> Firing:
    return firing.add(model.encode(x, stats), first_row, group)


def find_peaks(
    model: SparseAutoencoder,
    stats: SAEStats,
    activations: "ActivationSet",
    start: int,
    stop: int,
    *,
    n_peaks: int = 8,
    batch_size: int = 1024,
    progress: Progress | None = None,
) -> Firing:
    """:class:`Firing` over rows ``start`` to ``stop``, on the host.

    Rows of one item stay together, so ``start`` and ``stop`` should be at items; where they are not, or the set
    has no items, every row is an item of its own.
    """
    group = item_size(activations, start, stop)
    size = max(batch_size // group, 1) * group
    firing = Firing.start(model.config.n_concepts, n_peaks)
    for begin in range(start, stop, size):
        x = activations.read(begin, min(begin + size, stop))
        firing = _add_rows(model, stats, x, firing, jnp.int32(begin), group)
        if progress is not None:
            progress(len(x))
    return jax.device_get(firing)


def item_size(activations: "ActivationSet", start: int, stop: int) -> int:
    """Rows per item, or 1 where the range does not begin and end with an item."""
    size = activations.tokens_per_item or 1
    return size if start % size == 0 and stop % size == 0 else 1


def choose_concepts(firing: Firing, rows: int, decoder_norms: np.ndarray, count: int) -> np.ndarray:
    """The concepts to show: those that explain most, from rare ones and frequent ones alike.

    Concepts that fire on at least one row and on at most a tenth are ranked by the sum of squared activations times
    the squared norm of the decoder row, within bands of their firing frequency (above 3 %, 1 %, 0.3 %, and the rest);
    the bands then take turns. Without the bands, the words that occur most would fill the list.

    Returns:
      int64 [at most ``count``] concepts, the strongest of every band first.
    """
    shown = np.flatnonzero((firing.count > 0) & (firing.count <= ALWAYS_ON * rows))
    energy = np.asarray(firing.energy)[shown] * np.asarray(decoder_norms)[shown] ** 2
    shown = shown[np.argsort(-energy, kind="stable")]
    band = np.digitize(firing.count[shown] / rows, FREQUENCY_BANDS)
    turn = np.zeros(len(shown), np.int64)
    for which in np.unique(band):
        turn[band == which] = np.arange(np.count_nonzero(band == which))
    return shown[np.lexsort((-band, turn))][:count]


class Contexts:
    """Reads the tokens around rows of a set, and what a function of the rows gives for each of them.

    Args:
      activations: the set; without provenance a context has no tokens, only its own row.
    """

    def __init__(self, activations: "ActivationSet"):
        self._activations = activations
        self._provenance = activations.provenance
        self._texts: dict[int, str] = {}
        if self._provenance is not None:
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(str(self._provenance.tokenizer_path))

    def around(self, row: int, values: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
        """The context of ``row`` with ``values(x [n, d]) -> [n]`` of its rows, as the report wants it."""
        if self._provenance is None:
            value = float(values(self._activations.read(row, row + 1))[0])
            return {"source": None, "row": row, "tokens": None, "values": [value], "peak": 0}
        where = self._provenance
        item, position, document, _ = where.locate(row)
        length = where.first_position + where.tokens_per_item
        low, high = max(position - TOKENS_BEFORE, 0), min(position + TOKENS_AFTER + 1, length)
        first = max(low, where.first_position)  # positions before it have no row
        origin = row - position
        known = values(self._activations.read(origin + first, origin + high))
        return {
            "source": document,
            "row": row,
            "tokens": [self._text(int(token)) for token in where.tokens[item, low:high]],
            "values": [None] * (first - low) + [float(value) for value in known],
            "peak": position - low,
        }

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._tokenizer.decode([token], skip_special_tokens=False)
        return self._texts[token]


def describe_concepts(
    model: SparseAutoencoder,
    stats: SAEStats,
    activations: "ActivationSet",
    firing: Firing,
    rows: int,
    *,
    count: int = 48,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """The chosen concepts with their strongest contexts: the entries of ``concepts`` in ``concepts.json``.

    Args:
      model: the autoencoder.
      stats: its statistics.
      activations: the set that ``firing`` is of.
      firing: from :func:`find_peaks`.
      rows: that ``firing`` is of.
      count: concepts to show.
      progress: called with 1 for every concept.
    """
    contexts, encode = Contexts(activations), _padded_encoder(model, stats)

    def of_concept(concept: int, x: np.ndarray) -> np.ndarray:
        return encode(x)[:, concept]

    described = []
    for concept in choose_concepts(firing, rows, np.asarray(model.decoder_norms()), count):
        peaks = firing.rows[concept][np.isfinite(firing.peaks[concept])]
        described.append(
            {
                "id": int(concept),
                "frequency": float(firing.count[concept] / rows),
                "mean_activation": float(firing.total[concept] / firing.count[concept]),
                "max_activation": float(firing.peaks[concept][0]),
                "contexts": [contexts.around(int(row), partial(of_concept, concept)) for row in peaks],
            }
        )
        if progress is not None:
            progress(1)
    return described


def describe_inputs(
    model: SparseAutoencoder, stats: SAEStats, activations: "ActivationSet", rows: np.ndarray
) -> list[dict[str, Any]]:
    """Contexts of ``rows`` whose values are numbers of active concepts: ``few`` and ``many`` of ``concepts.json``."""
    contexts, encode = Contexts(activations), _padded_encoder(model, stats)
    return [contexts.around(int(row), lambda x: (encode(x) != 0).sum(axis=-1)) for row in rows]


def extreme_inputs(active: np.ndarray, group: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the rows with the fewest and with the most active concepts, no two of one item.

    Args:
      active: [rows] number of active concepts.
      group: rows per item.
      count: of each.
    """
    items = active.reshape(-1, group)
    first = np.arange(len(items)) * group
    few, many = items.argmin(axis=1), items.argmax(axis=1)
    fewest = np.argsort(items.min(axis=1), kind="stable")[:count]
    most = np.argsort(-items.max(axis=1), kind="stable")[:count]
    return first[fewest] + few[fewest], first[most] + many[most]


def active_histogram(active: np.ndarray) -> dict[str, list[int]]:
    """How many of the inputs ``active [rows]`` need each number of concepts; bins are half-open."""
    counts = np.bincount(active)
    return {"edges": list(range(len(counts) + 1)), "counts": counts.tolist()}


def frequency_histogram(firing: np.ndarray, rows: int) -> dict[str, Any]:
    """Tenths of log10 of the firing frequency, over the concepts that fired: ``firing [M]`` of ``rows`` rows."""
    tenths = np.floor(10 * np.log10(firing[firing > 0] / rows) + 1e-9).astype(int)
    tenths = np.minimum(tenths, -1)  # a concept that always fires belongs to the last bin
    lowest = min(int(np.floor(10 * np.log10(1 / rows))), -1)
    return {
        "log10_edges": [round(tenth / 10, 1) for tenth in range(lowest, 1)],
        "counts": np.bincount(tenths - lowest, minlength=-lowest).tolist(),
        "never": int((firing == 0).sum()),
    }


def _padded_encoder(model: SparseAutoencoder, stats: SAEStats) -> Callable[[np.ndarray], np.ndarray]:
    """[n, d] rows to [n, M] activations, compiled for one length that holds every context."""
    most = TOKENS_BEFORE + 1 + TOKENS_AFTER
    encode = jax.jit(lambda model, stats, x: model.encode(x, stats))

    def padded(x: np.ndarray) -> np.ndarray:
        filled = np.concatenate([x, np.broadcast_to(x[:1], (most - len(x), x.shape[1]))])
        return np.asarray(encode(model, stats, filled))[: len(x)]

    return padded
