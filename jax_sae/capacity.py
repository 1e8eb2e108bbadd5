"""How many places for active concepts the sparse training step has: measured while training, and chosen from that."""

import bisect

import jax
import numpy as np

from jax_sae.ops.rows import BLOCK
from jax_sae.sae.config import SAEConfig
from jax_sae.sae.stats import CAPACITIES, Capacity, SAEStats

# The most places per row, as a share of the concepts, with which the sparse step is the faster one. On a CPU measured
# with benchmarks.bottleneck; on a GPU by what the compiled programs read and write, at the rates of an H100 and a B200,
# for rows of 768 to 4,096 (benchmarks.compiled_gpu); none on a TPU, whose compiler expects the rows of 64 places of
# 49,152 to take as long as all in a dense product (benchmarks.compiled_parts).
_WORTHWHILE = {"cpu": 1 / 24, "tpu": 0.0}
_WORTHWHILE_ELSEWHERE = 1 / 384
_COVERED = 0.99  # of the steps should fit on average; the others are computed densely
_ENOUGH_STEPS = 8  # measured, before a capacity is lowered: a new one has to be compiled for


def capacity_limit(config: SAEConfig, platform: str | None = None) -> int | None:
    """The largest mean capacity that pays; None where the dense step is faster with any.

    Args:
      config: the autoencoder.
      platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``; that of the default device when None.
    """
    share = _WORTHWHILE.get(platform or jax.default_backend(), _WORTHWHILE_ELSEWHERE)
    paying = [capacity for capacity in CAPACITIES if least_places(config) <= capacity <= share * config.n_concepts]
    return paying[-1] if paying else None


def choose_capacity(config: SAEConfig, stats: SAEStats, limit: int | None) -> Capacity | None:
    """The capacity for the next training steps, from what the last ones needed.

    A pure function of ``stats``, which are saved with a run: a run that is resumed chooses as one that never
    stopped. Dense steps measure nothing: after some of them the choice is the largest capacity, to look again.

    Args:
      config: the autoencoder.
      stats: its statistics, with the needs of the steps since :func:`jax_sae.forget_needs`.
      limit: of :func:`capacity_limit`.

    Returns:
      The places of the sparse step, or None for the dense step.
    """
    if limit is None:
        return None
    now, needs = Capacity(*np.asarray(stats.capacity).tolist()), np.asarray(stats.needs)
    steps = int(needs[0].sum())
    if steps == 0:
        return now if now.row else Capacity(min(4 * limit, CAPACITIES[-1]), limit)
    of_row, of_mean = _covering(needs[0], steps) + 1, _covering(needs[1], _COVERED * steps)
    if of_mean >= len(CAPACITIES) or CAPACITIES[of_mean] > limit or needs[0][-1] > (1 - _COVERED) * steps:
        return None  # it would not pay, or there are rows that no capacity holds
    mean = max(CAPACITIES[of_mean], _most_on_average(config, limit))
    row = CAPACITIES[bisect.bisect_left(CAPACITIES, max(least_places(config), mean))]
    wanted = Capacity(max(row, CAPACITIES[min(of_row, len(CAPACITIES) - 1)]), mean)
    grows = wanted.row > now.row or wanted.mean > now.mean
    return wanted if grows or steps >= _ENOUGH_STEPS else now


def _covering(needs: np.ndarray, steps: float) -> int:
    """The first of CAPACITIES, by its number, that was enough in so many steps."""
    return int(np.searchsorted(np.cumsum(needs), steps))


def _most_on_average(config: SAEConfig, limit: int) -> int:
    """The capacity that a batch on one device does not pass, scores that tie aside, if it pays; else 0.

    batch_topk keeps k of a row on average, and the places of a row are counted in whole blocks.
    """
    if config.activation != "batch_topk":
        return 0
    enough = [capacity for capacity in CAPACITIES if config.k + BLOCK - 1 <= capacity <= limit]
    return enough[0] if enough else 0


def least_places(config: SAEConfig) -> int:
    """The places that a row has to have: topk keeps k in each."""
    return config.k if config.activation in ("topk", "batch_topk") else 1
