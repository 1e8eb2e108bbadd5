"""What the report reads: the four files of a workdir, checked and typed."""

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

from jax_sae import InputError

from .files import read_json

EVALUATION_NUMBERS = ("loss", "active", "fvu", "fvu_pooled", "cs", "dead_fraction", "rows")
SPLICED_LOSSES = (
    "ce_clean",
    "ce_sae",
    "ce_mean_ablated",
    "ce_zero_ablated",
    "ce_degradation",
    "loss_recovered",
)
LEFT_OUT = "_left_out"  # ends the name of a reason: "ms_left_out" says why there is no MS


class Malformed(ValueError):
    """What is wrong inside a file; becomes an InputError once the file is named."""


@dataclasses.dataclass(frozen=True)
class Metrics:
    """``metrics.jsonl``.

    Attributes:
      training: records of training steps, by step.
      validation: records with ``val_*``, by step.
      torn: whether a last line that a killed process left unfinished was ignored.
    """

    training: tuple[dict[str, float], ...]
    validation: tuple[dict[str, float], ...]
    torn: bool


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Counts of values; bin i holds ``edges[i] <= value < edges[i + 1]``."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.counts)


@dataclasses.dataclass(frozen=True)
class Context:
    """Tokens around one row of the set.

    Attributes:
      source: the document, if known.
      row: of the activation set.
      tokens: text of each token; None for a set without provenance.
      values: one number per token, 0 where silent; None where the set has no row for that position.
      peak: the token that the context is about.
    """

    source: str | None
    row: int
    tokens: tuple[str, ...] | None
    values: tuple[float | None, ...]
    peak: int

    @property
    def peak_value(self) -> float:
        return self.values[self.peak] or 0.0


@dataclasses.dataclass(frozen=True)
class Concept:
    """One concept: how often it fires, how strongly over the rows where it does, and where most strongly."""

    id: int
    frequency: float
    mean_activation: float
    max_activation: float
    contexts: tuple[Context, ...]


@dataclasses.dataclass(frozen=True)
class Concepts:
    """``concepts.json``.

    Attributes:
      rows: held-out rows it was computed from.
      n_concepts: size of the dictionary.
      active: histogram of the number of active concepts per row.
      log10_frequency: histogram over concepts that fire, of log10 of the fraction of rows they fire on.
      never: concepts that fire on no row.
      few: rows that need few concepts; ``values`` are numbers of active concepts.
      many: rows that need many.
      concepts: the ones to show, in order.
    """

    rows: int
    n_concepts: int
    active: Histogram
    log10_frequency: Histogram
    never: int
    few: tuple[Context, ...]
    many: tuple[Context, ...]
    concepts: tuple[Concept, ...]

    @property
    def in_text(self) -> bool:
        """Whether contexts have tokens; a set without provenance knows only the numbers of its rows."""
        contexts = (
            *self.few,
            *self.many,
            *(context for concept in self.concepts for context in concept.contexts),
        )
        return any(context.tokens is not None for context in contexts)


def read_config(workdir: Path) -> dict[str, Any]:
    """``config.json`` as nested values, with at least a ``preset``, a ``sae`` and a ``source``.

    Raises:
      InputError: the folder holds no run, or the file is damaged.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise InputError(f"{workdir} holds no run (no config.json); give the --workdir of a training run")
    fields = read_json(path)
    kinds = {"preset": str, "sae": dict, "source": dict}
    if not isinstance(fields, dict) or not all(isinstance(fields.get(name), kinds[name]) for name in kinds):
        raise InputError(
            f"{path} is not the configuration of a run (expected an object with preset, sae and source); "
            "restore it or use a new workdir"
        )
    return fields


def read_metrics(workdir: Path) -> Metrics:
    """``metrics.jsonl``; empty when nothing was logged yet.

    An unfinished last line is what a killed process leaves; it is left out and reported. Any other line
    that is not a record is an error.

    Raises:
      InputError: a damaged line, by its number.
    """
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return Metrics((), (), torn=False)
    lines = path.read_bytes().split(b"\n")
    records, torn = [], False
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line:
            break
        try:
            records.append(_record(line))
        except ValueError as error:
            if number < len(lines):
                raise InputError(
                    f"{path} line {number} is not a record of a training run ({error}); restore or remove the line"
                ) from error
            torn = True
    records.sort(key=lambda record: record["step"])
    validation = tuple(r for r in records if any(name.startswith("val_") for name in r))
    training = tuple(r for r in records if "loss" in r)
    return Metrics(training, validation, torn)


def _record(line: bytes) -> dict[str, float]:
    record = json.loads(line.decode("utf-8"))
    if not isinstance(record, dict) or not _is_count(record.get("step")):
        raise Malformed("expected an object with a step")
    wrong = [name for name, value in record.items() if not _is_number(value)]
    if wrong:
        raise Malformed(f"{wrong[0]} is not a number")
    return record


def read_evaluation(workdir: Path) -> dict[str, float] | None:
    """``evaluation.json``, finite numbers by name; None when the run was not evaluated.

    Raises:
      InputError: it is damaged, or lacks a number that every evaluation has.
    """
    path = workdir / "evaluation.json"
    if not path.exists():
        return None
    try:
        return _evaluation(read_json(path))
    except Malformed as error:
        raise _damaged(path, error) from error


def _evaluation(fields: Any) -> dict[str, float]:
    if not isinstance(fields, dict):
        raise Malformed("expected an object")
    numbers = {name: value for name, value in fields.items() if _is_number(value)}
    spliced = SPLICED_LOSSES if any(name.startswith("ce_") for name in fields) else ()
    for name in (*EVALUATION_NUMBERS, *spliced):
        if name not in numbers or not math.isfinite(numbers[name]):
            raise Malformed(f"{name} is {fields.get(name, 'missing')!r}, expected a finite number")
    return numbers


def read_left_out(workdir: Path) -> dict[str, str]:
    """Metric to the reason why ``evaluation.json``, which :func:`read_evaluation` accepts, does not have it."""
    path = workdir / "evaluation.json"
    fields = read_json(path) if path.exists() else {}
    return {name.removesuffix(LEFT_OUT): str(why) for name, why in fields.items() if name.endswith(LEFT_OUT)}


def read_concepts(workdir: Path) -> Concepts | None:
    """``concepts.json``; None when the run was not evaluated.

    Raises:
      InputError: it is damaged; the place is named.
    """
    path = workdir / "concepts.json"
    if not path.exists():
        return None
    fields = read_json(path)
    try:
        return _concepts(fields)
    except Malformed as error:
        raise _damaged(path, error) from error
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, Malformed(f"{type(error).__name__}: {error}")) from error


def _damaged(path: Path, error: Malformed) -> InputError:
    return InputError(f"{path} is damaged ({error}); run python -m train.evaluate {path.parent} again")


def _concepts(fields: dict[str, Any]) -> Concepts:
    frequency = fields["frequency_histogram"]
    log10_frequency = _histogram(frequency, "log10_edges", "frequency_histogram")
    if log10_frequency.edges[0] < -30 or log10_frequency.edges[-1] > 1:
        raise Malformed("frequency_histogram.log10_edges are not logarithms of fractions")
    concepts = tuple(_concept(c, f"concepts[{i}]") for i, c in enumerate(fields["concepts"]))
    if len({concept.id for concept in concepts}) < len(concepts):
        raise Malformed("concepts has one id twice")
    return Concepts(
        rows=_count(fields["rows"], "rows"),
        n_concepts=_count(fields["n_concepts"], "n_concepts"),
        active=_histogram(fields["active_histogram"], "edges", "active_histogram"),
        log10_frequency=log10_frequency,
        never=_count(frequency["never"], "frequency_histogram.never"),
        few=_contexts(fields["few"], "few"),
        many=_contexts(fields["many"], "many"),
        concepts=concepts,
    )


def _concept(fields: dict[str, Any], where: str) -> Concept:
    strengths = {
        name: _finite(fields[name], f"{where}.{name}") for name in ("frequency", "mean_activation", "max_activation")
    }
    contexts = _contexts(fields["contexts"], f"{where}.contexts")
    return Concept(id=_count(fields["id"], f"{where}.id"), contexts=contexts, **strengths)


def _contexts(listed: Sequence[dict[str, Any]], where: str) -> tuple[Context, ...]:
    return tuple(_context(fields, f"{where}[{i}]") for i, fields in enumerate(listed))


def _context(fields: dict[str, Any], where: str) -> Context:
    source, tokens, peak = fields["source"], fields["tokens"], _count(fields["peak"], f"{where}.peak")
    values = tuple(None if v is None else _finite(v, f"{where}.values") for v in fields["values"])
    if source is not None and not isinstance(source, str):
        raise Malformed(f"{where}.source is not text")
    if tokens is not None and not all(isinstance(token, str) for token in tokens):
        raise Malformed(f"{where}.tokens are not all text")
    if tokens is not None and len(tokens) != len(values):
        raise Malformed(f"{where} has {len(tokens)} tokens and {len(values)} values")
    if peak >= len(values):
        raise Malformed(f"{where}.peak is {peak} of {len(values)} values")
    row = _count(fields["row"], f"{where}.row")
    return Context(source, row, None if tokens is None else tuple(tokens), values, peak)


def _histogram(fields: dict[str, Any], edges_name: str, where: str) -> Histogram:
    edges = tuple(_finite(edge, f"{where}.{edges_name}") for edge in fields[edges_name])
    counts = tuple(_count(count, f"{where}.counts") for count in fields["counts"])
    if len(edges) != len(counts) + 1:
        raise Malformed(f"{where} has {len(edges)} edges and {len(counts)} counts, expected one edge more")
    if any(low >= high for low, high in itertools.pairwise(edges)):
        raise Malformed(f"{where}.{edges_name} do not increase")
    return Histogram(edges, counts)


def _finite(value: Any, where: str) -> float:
    if not _is_number(value) or not math.isfinite(value):
        raise Malformed(f"{where} is {value!r}, expected a finite number")
    return value


def _count(value: Any, where: str) -> int:
    if not _is_count(value):
        raise Malformed(f"{where} is {value!r}, expected a whole number, 0 or more")
    return value


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
