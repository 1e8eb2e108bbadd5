"""Runs that are compared: read from their folders, grouped where they differ in nothing but the seed."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_sae import InputError

from .files import read_json
from .metric_names import METRICS
from .report_files import read_config, read_evaluation, read_left_out

# Settings that say where and how a run was made, not what: runs that differ in these only are seeds of one group.
_NOT_THE_MODEL = {
    "data", "workdir", "seed", "verify", "checkpoint_every", "validation_rows", "log_every", "steps_per_call",
    "parallel", "mesh",
}  # fmt: skip
_BUDGET = ("steps", "batch_size", "sae.n_concepts")
_DERIVED = {"n_concepts", "sae.dead_after_rows", "sae.aux_k"}  # follow from other settings, so name no group
_ABOUT_EQUAL = 1.1


@dataclasses.dataclass(frozen=True)
class ComparedRun:
    """One run.

    Attributes:
      workdir: its folder.
      config: its ``config.json``.
      numbers: of its ``evaluation.json``; empty for a run that failed.
      left_out: metric to the reason why it has none.
      failure: (step, reason) of ``failed.json``.
    """

    workdir: Path
    config: dict[str, Any]
    numbers: dict[str, float]
    left_out: dict[str, str]
    failure: tuple[int, str] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What was trained: settings by dotted name, without those of :data:`_NOT_THE_MODEL`."""
        top = {name: value for name, value in self.config.items() if name not in _NOT_THE_MODEL}
        return dict(_flat(top))


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed.

    Attributes:
      label: the preset, and what sets the group apart from others of it.
      runs: those with numbers.
      failed: the others.
    """

    label: str
    runs: tuple[ComparedRun, ...]
    failed: tuple[ComparedRun, ...]

    @property
    def first(self) -> ComparedRun:
        return (*self.runs, *self.failed)[0]

    @property
    def preset(self) -> str:
        return self.first.config["preset"]

    @property
    def activation(self) -> str:
        return str(self.first.config["sae"].get("activation"))

    @property
    def k(self) -> int | None:
        """The k that TopK and BatchTopK were given."""
        k = self.first.config["sae"].get("k")
        return k if self.activation in ("topk", "batch_topk") and isinstance(k, int) else None

    @property
    def budget(self) -> tuple[str, ...]:
        """Steps, batch and dictionary, which must agree for numbers to be compared."""
        return tuple(json.dumps(self.first.settings.get(name)) for name in _BUDGET)

    @property
    def mean(self) -> dict[str, float]:
        """Means over the seeds of the metrics that every one of them has."""
        return {name: float(np.mean(values)) for name, values in self._values()}

    @property
    def std(self) -> dict[str, float]:
        """Standard deviations (ddof 1) over the seeds; empty for one seed."""
        return {name: float(np.std(values, ddof=1)) for name, values in self._values() if len(values) > 1}

    def _values(self) -> Iterator[tuple[str, list[float]]]:
        for metric in METRICS:
            if self.runs and all(metric.name in run.numbers for run in self.runs):
                yield metric.name, [run.numbers[metric.name] for run in self.runs]

    def to_json(self) -> dict[str, Any]:
        """What ``comparison.json`` holds of the group."""
        return {
            "label": self.label,
            "preset": self.preset,
            "k": self.k,
            "seeds": [run.config.get("seed") for run in self.runs],
            "mean": self.mean,
            "std": self.std,
            "runs": [str(run.workdir) for run in self.runs],
            "failed": [{"run": str(run.workdir), "seed": run.config.get("seed")} | failure(run) for run in self.failed],
        }


def failure(run: ComparedRun) -> dict[str, Any]:
    """``step`` and ``reason`` of a run that failed."""
    assert run.failure is not None
    return {"step": run.failure[0], "reason": run.failure[1]}


def read_run(workdir: Path) -> ComparedRun:
    """Reads ``config.json`` and ``evaluation.json`` (or ``failed.json``) of a run.

    Raises:
      InputError: one of them is missing or damaged; it is named.
    """
    if not workdir.is_dir():
        raise InputError(f"{workdir} is not a folder; give the --workdir of a training run")
    config = read_config(workdir)
    failed = workdir / "failed.json"
    if failed.is_file():
        return ComparedRun(workdir, config, {}, {}, _read_failure(failed))
    numbers = read_evaluation(workdir)
    if numbers is None:
        raise InputError(f"{workdir / 'evaluation.json'} is missing; run python -m train.evaluate {workdir}")
    return ComparedRun(workdir, config, numbers, read_left_out(workdir))


def _read_failure(path: Path) -> tuple[int, str]:
    fields = read_json(path)
    if not isinstance(fields, dict) or not isinstance(fields.get("step"), int):
        raise InputError(f"{path} does not say why a run failed; expected an object with step and reason")
    return fields["step"], str(fields.get("reason", ""))


def group_runs(runs: Sequence[ComparedRun]) -> list[Group]:
    """Groups of runs that differ in nothing but the seed, in the order of :func:`comparable`, failed ones last.

    Raises:
      InputError: runs on different activations, or one run twice.
    """
    _check_one_set(runs)
    by_settings: dict[str, list[ComparedRun]] = {}
    for run in runs:
        by_settings.setdefault(json.dumps(run.settings, sort_keys=True), []).append(run)
    members = list(by_settings.values())
    groups = [
        Group(
            _label(of[0], [others[0] for others in members]),
            tuple(run for run in of if run.failure is None),
            tuple(run for run in of if run.failure is not None),
        )
        for of in members
    ]
    ordered = [group for equals in comparable(groups) for group in equals]
    return [*ordered, *(group for group in groups if not group.runs)]


def _check_one_set(runs: Sequence[ComparedRun]) -> None:
    seen = set()
    for run in runs:
        if run.workdir.resolve() in seen:
            raise InputError(f"{run.workdir} is given twice; give every run once")
        seen.add(run.workdir.resolve())
        if run.config.get("fingerprint") != runs[0].config.get("fingerprint"):
            raise InputError(
                f"{run.workdir} was trained on other activations than {runs[0].workdir}; compare runs of one set"
            )


def _label(run: ComparedRun, others: Sequence[ComparedRun]) -> str:
    """The preset, with the settings in which runs of this preset differ."""
    preset, mine = run.config["preset"], run.settings
    same = [other.settings for other in others if other.config["preset"] == preset]
    names = [n for n in mine if any(other.get(n) != mine[n] for other in same)]
    telling = [name for name in names if name not in _DERIVED] or names
    return ", ".join([preset, *(f"{_short(name)} = {_text(mine[name])}" for name in telling)])


def _short(name: str) -> str:
    return name.rpartition(".")[2].replace("_", " ").removeprefix("sparsity ")


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def comparable(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups with numbers, put together where those may be compared.

    That is: the same steps, batch and dictionary, and about as many active concepts (within 10 % of the fewest of
    them); a group that keeps more concepts active reconstructs better for that reason alone.
    """
    together: list[list[Group]] = []
    for group in sorted((g for g in groups if g.runs), key=lambda g: (g.budget, g.mean["active"], g.label)):
        fewest = together[-1][0] if together else None
        if (
            fewest is not None
            and fewest.budget == group.budget
            and group.mean["active"] <= _ABOUT_EQUAL * fewest.mean["active"]
        ):
            together[-1].append(group)
        else:
            together.append([group])
    return together


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
