"""``python -m train.comparison RUN RUN ... --out DIR``: finished runs side by side, as tables, a page and JSON."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import tyro

from jax_sae import InputError, Preset

from . import cli
from .comparison_groups import ComparedRun, Group, failure, group_runs, read_run
from .comparison_tables import HOW_TO_READ, describe, guides, markdown, tables
from .files import make_writable_folder, write_json, write_text
from .metric_names import MS_EMBEDDING
from .report import environment
from .report_text import plural, safe_document, significant
from .scatter import Point, Scatter, pareto_front, scatter

_PLOTTED = {"fvu": "FVU", "fvu_pooled": "Pooled FVU"}


def write(workdir: Path, runs: Sequence[Path], described: dict[str, Any]) -> Path:
    """Writes ``comparison.json``, ``comparison.md`` and ``report.html`` into ``workdir``.

    Each is written whole or not at all.

    Args:
      workdir: the folder to write to; made where there is none.
      runs: at least one, all on one activation set; each with ``config.json`` and ``evaluation.json``, or with
        ``failed.json`` (``{"step": N, "reason": "..."}``), which becomes a row without numbers.
      described: what the runs have in common, as far as it is known: ``data``, ``source``, ``steps``,
        ``batch_size``, ``n_concepts``, ``device``, ``seeds``.

    Returns:
      The path of ``report.html``.

    Raises:
      InputError: a folder is no run, a file is missing or damaged, or the runs are of different activations.
    """
    if not runs:
        raise InputError("no runs are given; expected the --workdir of at least one training run")
    groups = group_runs([read_run(run) for run in runs])
    make_writable_folder(workdir)
    parts: dict[str, Any] = {
        "about": describe(described),
        "tables": tables(groups),
        "sentences": [guide.sentence for guide in guides(groups)],
        "notes": _notes(groups),
    }
    drawn = {"plots": _plots(groups), "families": _families(groups)}
    name, subject = workdir.resolve().name, _subject(groups, described)
    template = environment().get_template("comparison.html.j2")
    page = template.render(script="", name=name, subject=subject, **parts, **drawn)
    write_json(workdir / "comparison.json", _to_json(groups, described))
    write_text(workdir / "comparison.md", markdown(**parts))
    return write_text(workdir / "report.html", safe_document(page))


def _to_json(groups: Sequence[Group], described: dict[str, Any]) -> dict[str, Any]:
    fronts = {name: [point.label for point in pareto_front(_points(groups, name))] for name in _PLOTTED}
    return {
        "described": described,
        "groups": [group.to_json() for group in groups],
        "runs": [_run_to_json(group, run) for group in groups for run in (*group.runs, *group.failed)],
        "pareto": fronts,
        "k": [dataclasses.asdict(guide) | {"sentence": guide.sentence} for guide in guides(groups)],
    }


def _run_to_json(group: Group, run: ComparedRun) -> dict[str, Any]:
    fields = {
        "run": str(run.workdir),
        "group": group.label,
        "preset": group.preset,
        "seed": run.config.get("seed"),
        "numbers": run.numbers,
        "left_out": run.left_out,
    }
    return fields | ({"failed": failure(run)} if run.failure else {})


def _notes(groups: Sequence[Group]) -> list[str]:
    """How to read the tables, and what is missing from them."""
    runs = [run for group in groups for run in group.runs]
    notes = list(HOW_TO_READ)
    if any("ms_mean" in run.numbers for run in runs):
        notes.append(MS_EMBEDDING)
    reasons: dict[tuple[str, str], int] = {}
    for run in runs:
        for metric, reason in run.left_out.items():
            reasons[metric, reason] = reasons.get((metric, reason), 0) + 1
    for (metric, reason), count in reasons.items():
        of = "" if count == len(runs) else f" for {count} of {len(runs)} runs"
        notes.append(f"{metric.upper()} is left out{of}: {reason}.")
    silent = [group.label for group in groups if group.runs and not group.mean["active"] > 0]
    if silent:
        notes.append(f"Not drawn, since no concept is active: {', '.join(silent)}.")
    return notes


def _subject(groups: Sequence[Group], described: dict[str, Any]) -> str:
    runs = sum(len(group.runs) + len(group.failed) for group in groups)
    source = described.get("source")
    model = source.get("model") if isinstance(source, dict) else None
    parts = [f"{model}, layer {source.get('layer')}" if isinstance(source, dict) and model else ""]
    return " · ".join(filter(None, (*parts, plural(len(groups), "form"), plural(runs, "run"))))


@dataclasses.dataclass(frozen=True)
class Family:
    """An entry of the legend: the marker of a preset."""

    index: int
    name: str


def _families(groups: Sequence[Group]) -> list[Family]:
    known = [*get_args(Preset), *sorted(group.preset for group in groups)]
    presets = sorted({group.preset for group in groups if group.runs}, key=known.index)
    return [Family(index, preset) for index, preset in enumerate(presets)]


def _points(groups: Sequence[Group], name: str) -> list[Point]:
    """Groups by their number of active concepts and the metric ``name``, both means over seeds."""
    family = {family.name: family.index for family in _families(groups)}
    return [
        Point(
            group.mean["active"],
            group.mean[name],
            group.label,
            family[group.preset],
            tuple((run.numbers["active"], run.numbers[name]) for run in group.runs if run.numbers["active"] > 0),
        )
        for group in groups
        if group.runs and group.mean["active"] > 0
    ]


@dataclasses.dataclass(frozen=True)
class Plot:
    """A chart of one metric over the number of active concepts; ``label`` is it in words."""

    title: str
    chart: Scatter
    label: str


def _plots(groups: Sequence[Group]) -> list[Plot]:
    plots = []
    for name, title in _PLOTTED.items():
        points = _points(groups, name)
        if not points:
            continue

        def show(point: Point, title: str = title) -> str:
            return f"{point.label}: {significant(point.x)} active, {title} {significant(point.y)}"

        front = ", ".join(point.label for point in pareto_front(points))
        label = f"{title} over active concepts. {'; '.join(map(show, points))}. Not beaten in both: {front}."
        plots.append(Plot(title, scatter(points, show), label))
    return plots


def _in_common(runs: Sequence[Path]) -> dict[str, Any]:
    """``described`` from the configurations of the runs: what all of them agree on."""
    configs = [read_run(run).config for run in runs]
    described: dict[str, Any] = {"seeds": sorted({config.get("seed", 0) for config in configs})}
    for name in ("data", "source", "steps", "batch_size", "n_concepts"):
        values = [config.get(name) for config in configs]
        if values[0] is not None and all(value == values[0] for value in values):
            described[name] = values[0]
    return described


def main(runs: Annotated[tuple[Path, ...], tyro.conf.Positional], out: Path) -> None:
    """Compare finished runs: comparison.md, comparison.json and report.html.

    Args:
      runs: workdirs of runs on one activation set, all of them evaluated.
      out: the folder to write to.
    """
    missing = [run for run in runs if (run / "config.json").is_file() and not _has_result(run)]
    if missing:
        raise InputError(
            f"{plural(len(missing), 'run')} of {len(runs)} have no evaluation.json; "
            f"run python -m train.evaluate {' '.join(map(str, missing))}"
        )
    page = write(out, runs, _in_common(runs) if runs else {})
    print(f"comparison: {page.with_name('comparison.md')}, {page}")


def _has_result(run: Path) -> bool:
    return (run / "evaluation.json").is_file() or (run / "failed.json").is_file()


if __name__ == "__main__":
    cli.run(main, prog=f"python -m {__package__}.comparison")
