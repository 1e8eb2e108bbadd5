"""Interleaved timing of candidates on one machine, with the machine's own limits beside the results.

Candidates take turns inside every round, so that a clock that drifts or a neighbour that wakes up hits all of
them alike, and ratios are taken within a round before their median is.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

Samples = dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Row:
    """One candidate's figures: ``seconds`` of every round and what follows from them.

    ``ratio`` is the median over rounds of its time over the baseline's in the same round (above 1 is slower).
    ``limit_fraction`` is the time the limit allows over the median (1 is at the limit). ``items_per_second``
    counts the table's unit. Each is None where there is nothing to compare with.
    """

    name: str
    seconds: tuple[float, ...]
    ratio: float | None = None
    limit_fraction: float | None = None
    items_per_second: float | None = None

    @property
    def median(self) -> float:
        """Median time of a call, in seconds."""
        return statistics.median(self.seconds)

    @property
    def interquartile_range(self) -> float:
        """Third less first quartile of the times, in seconds."""
        first, third = np.percentile(self.seconds, (25, 75))
        return float(third - first)


@dataclass(frozen=True)
class Table:
    """Rows measured together, with the name of the baseline and the unit that ``items_per_second`` counts."""

    title: str
    rows: tuple[Row, ...]
    baseline: str | None = None
    unit: str = "rows"

    def __getitem__(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)


@dataclass(frozen=True)
class Figures:
    """Numbers that were not measured in rounds: rows of equal columns; a column's name ends with its unit."""

    title: str
    rows: tuple[Mapping[str, str | float], ...]


def interleave(samplers: Mapping[str, Callable[[], float]], *, rounds: int) -> Samples:
    """Calls every sampler once a round and returns the seconds that each of them reported, in round order.

    The order rotates by one from round to round: no candidate always follows the same neighbour's cache.

    Raises:
      ValueError: ``samplers`` is empty or ``rounds`` is below 1.
    """
    if not samplers or rounds < 1:
        raise ValueError(f"found {len(samplers)} candidates and {rounds} rounds, expected at least 1 of each")
    names = list(samplers)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in tqdm(range(rounds), desc="rounds", leave=False, disable=None):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(samplers[name]())
    return {name: tuple(values) for name, values in seconds.items()}


def seconds_per_call(candidate: Callable[[], Any], calls: int = 1) -> float:
    """Mean wall time of ``calls`` calls, each waited for until its arrays are there."""
    start = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(candidate())
    return (time.perf_counter() - start) / calls


def measure(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 10,
    warmup: int = 2,
    minimum_seconds: float = 0.0,
) -> Samples:
    """Times functions of no arguments, interleaved; compilation falls into the warm-up.

    Args:
      candidates: the functions by name; what they return is waited for.
      rounds: how often each is timed.
      warmup: untimed calls of each first, at least 1.
      minimum_seconds: a candidate faster than this is called several times a round, so that each timing lasts
        about that long; the figures stay per call.

    Returns:
      Seconds per call of every round, by name.
    """
    samplers = {}
    for name, candidate in candidates.items():
        warm = [seconds_per_call(candidate) for _ in range(max(1, warmup))]
        calls = max(1, math.ceil(minimum_seconds / max(warm[-1], 1e-9)))
        samplers[name] = lambda candidate=candidate, calls=calls: seconds_per_call(candidate, calls)
    return interleave(samplers, rounds=rounds)


def tabulate(
    title: str,
    samples: Samples,
    *,
    baseline: str | None = None,
    limits: Mapping[str, float] | None = None,
    items: Mapping[str, float] | float | None = None,
    unit: str = "rows",
) -> Table:
    """Turns samples into a table.

    Args:
      title: what was measured, with its shape and dtype.
      samples: seconds by candidate, from :func:`measure` or :func:`interleave`.
      baseline: the candidate that ratios refer to.
      limits: seconds below which no call can go on this machine (bytes over bandwidth, FLOPs over rate), by
        candidate; those left out show no fraction.
      items: how many of ``unit`` one call works through, for all candidates or by name.
      unit: what ``items`` counts, in the plural.

    Raises:
      ValueError: ``baseline`` or a name in ``limits`` was not measured.
    """
    limits = limits or {}
    strangers = ({baseline} - {None} | set(limits)) - set(samples)
    if strangers:
        raise ValueError(f"found the names {sorted(map(str, strangers))}, measured were {sorted(samples)}")
    counts = items if isinstance(items, Mapping) else {name: items for name in samples if items is not None}
    rows = []
    for name, seconds in samples.items():
        median = statistics.median(seconds)
        rows.append(
            Row(
                name=name,
                seconds=seconds,
                ratio=None if baseline is None else paired_ratio(seconds, samples[baseline]),
                limit_fraction=limits[name] / median if name in limits else None,
                items_per_second=counts[name] / median if name in counts else None,
            )
        )
    return Table(title, tuple(rows), baseline, unit)


def paired_ratio(seconds: Iterable[float], baseline: Iterable[float]) -> float:
    """Median over rounds of a candidate's time over the baseline's in the same round."""
    return statistics.median(ours / theirs for ours, theirs in zip(seconds, baseline, strict=True))


def matmul_rate(m: int = 1024, k: int = 768, n: int = 8192, dtype: Any = jnp.float32, rounds: int = 5) -> float:
    """Best measured rate of an ``[m, k] @ [k, n]`` product on the default device, in FLOP/s.

    The best round, not the median: a limit is what the machine can do.
    """
    left = jnp.ones((m, k), dtype)
    right = jnp.ones((k, n), dtype)
    product = jax.jit(jnp.matmul)
    seconds = measure({"matmul": lambda: product(left, right)}, rounds=rounds)["matmul"]
    return 2 * m * k * n / min(seconds)


def copy_bandwidth(megabytes: int = 256, rounds: int = 5) -> float:
    """Best measured rate of ``z * 2`` in place on a float32 array, in bytes/s, read plus written.

    The array is donated: on a CPU the first touch of a fresh output's pages costs several times the copy,
    and would be measured in its stead.
    """
    double = jax.jit(lambda z: z * 2, donate_argnums=0)
    held = [jnp.zeros((megabytes * 1_000_000 // 4,), jnp.float32)]

    def in_place() -> jax.Array:
        held[0] = double(held[0])
        return held[0]

    seconds = measure({"copy": in_place}, rounds=rounds)["copy"]
    return 2 * held[0].nbytes / min(seconds)


def machine_rates(dtype: Any = jnp.float32) -> dict[str, float]:
    """Both limits of the default device under the names that results carry them by."""
    return {f"matmul {jnp.dtype(dtype).name} FLOP/s": matmul_rate(dtype=dtype), "copy B/s": copy_bandwidth()}
