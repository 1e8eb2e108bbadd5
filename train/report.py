"""``python -m train.report WORKDIR``: one self-contained page about a run, ``report.html`` in its folder.

The page is made of ``config.json``, ``metrics.jsonl``, ``evaluation.json`` and ``concepts.json`` and of
nothing else: no network, no scripts or fonts from elsewhere, the same bytes for the same files.
"""

import base64
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import numpy as np
import tyro

from jax_sae import InputError

from . import cli, report_distributions
from .charts import Chart, line_chart
from .files import write_text
from .metric_names import METRICS, MS_EMBEDDING
from .report_files import Concepts, Metrics, read_concepts, read_config, read_evaluation, read_left_out, read_metrics
from .report_text import (
    axis_labels,
    duration,
    percent,
    percent_labels,
    pieces,
    plural,
    safe_document,
    significant,
    strongest,
)

TEMPLATES = Path(__file__).with_name("templates")


def render(workdir: Path) -> Path:
    """Writes ``report.html`` of the run in ``workdir``; an older one is replaced only by a whole new one.

    Without an evaluation, or without metrics, the page says so and names the command that makes them.

    Returns:
      The path of the page.

    Raises:
      InputError: the folder holds no run, or one of its files is damaged; the file is named.
      OSError: the page cannot be written.
    """
    if not workdir.is_dir():
        raise InputError(f"{workdir} is not a folder; give the --workdir of a training run")
    config = read_config(workdir)
    metrics, evaluation, concepts = read_metrics(workdir), read_evaluation(workdir), read_concepts(workdir)
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    page = (
        environment()
        .get_template("report.html.j2")
        .render(
            script=markupsafe.Markup(script),
            script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            name=workdir.resolve().name,
            workdir=str(workdir),
            subject=_subject(config),
            preset=config["preset"],
            metrics=metrics,
            **_evaluated(evaluation, read_left_out(workdir), metrics),
            training=_describe_training(config, metrics),
            curves=_curves(config, metrics),
            concepts=concepts,
            active=_active(config, concepts) if concepts else None,
            frequencies=_frequencies(concepts) if concepts else None,
            settings=_settings(config),
            pieces=pieces,
            strongest=strongest,
        )
    )
    return write_text(workdir / "report.html", safe_document(page))


def _evaluated(evaluation: dict[str, float] | None, left_out: dict[str, str], metrics: Metrics) -> dict[str, Any]:
    """What the page says of the evaluation; without one, tiles of what training logged."""
    return {
        "evaluation": evaluation,
        "tiles": _evaluated_tiles(evaluation) if evaluation else _training_tiles(metrics),
        "measured": _measured(evaluation, left_out) if evaluation else [],
        "ms_embedding": MS_EMBEDDING,
        "losses": _losses(evaluation) if evaluation and "ce_clean" in evaluation else [],
    }


def environment() -> jinja2.Environment:
    """Templates in which everything from outside is escaped and a name that is missing is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"significant": significant, "percent": percent, "plural": plural}
    return environment


def _subject(config: dict[str, Any]) -> str:
    """What was decomposed, by what: a line under the headline."""
    source, sae = config["source"], config["sae"]
    parts = []
    if source.get("model") is not None:
        layer = f", layer {source['layer']}" if source.get("layer") is not None else ""
        parts.append(f"{source['model']}{layer}")
    elif config.get("data"):
        parts.append(Path(str(config["data"])).name)
    if isinstance(sae.get("n_concepts"), int) and isinstance(sae.get("d_in"), int):
        parts.append(f"{plural(sae['n_concepts'], 'concept')} on {plural(sae['d_in'], 'dimension')}")
    return " · ".join(parts)


@dataclasses.dataclass(frozen=True)
class Tile:
    """A key number: what it is, the number, what it means."""

    name: str
    value: str
    note: str


def _evaluated_tiles(evaluation: dict[str, float]) -> list[Tile]:
    tiles = [
        Tile("FVU", significant(evaluation["fvu"]), "variance left unexplained, per input"),
        Tile("Pooled FVU", significant(evaluation["fvu_pooled"]), "squared error against that of the mean"),
        Tile("Active concepts", significant(evaluation["active"]), "mean per input"),
        Tile("Dead concepts", percent(evaluation["dead_fraction"]), "never fire on held-out inputs"),
        Tile("Cosine similarity", significant(evaluation["cs"]), "input and reconstruction"),
    ]
    if "ce_clean" in evaluation:
        clean, spliced = evaluation["ce_clean"], evaluation["ce_sae"]
        tiles += [
            Tile("Loss recovered", percent(evaluation["loss_recovered"], 3), "of what zero ablation destroys"),
            Tile("Cross-entropy", f"{clean:.3f} → {spliced:.3f}", "clean → with SAE, nats per token"),
        ]
    return tiles


@dataclasses.dataclass(frozen=True)
class Measured:
    """A row of the table of all metrics: its name, which way is better, its value or why it has none, its meaning."""

    title: str
    better: str
    value: str
    left_out: str
    meaning: str


def _measured(evaluation: dict[str, float], left_out: dict[str, str]) -> list[Measured]:
    """Every number of the evaluation, and those that are missing with their reasons."""
    rows = []
    for metric in METRICS:
        reason = left_out.get(metric.name.partition("_")[0], "")
        value = metric.show(evaluation[metric.name]) if metric.name in evaluation else ""
        if value or (reason and metric.better):
            rows.append(Measured(metric.title, metric.better or "", value, "" if value else reason, metric.meaning))
    return rows


def _training_tiles(metrics: Metrics) -> list[Tile]:
    """The newest numbers of a run that was not evaluated yet."""
    tiles = []
    if metrics.validation:
        last = metrics.validation[-1]
        note = f"held-out rows, step {last['step']:,}"
        shown = (("val_fvu", "FVU"), ("val_active", "Active concepts"), ("val_loss", "Loss"))
        tiles += [Tile(label, significant(last[name]), note) for name, label in shown if name in last]
    if metrics.training and "dead_fraction" in metrics.training[-1]:
        last = metrics.training[-1]
        tiles.append(Tile("Dead concepts", percent(last["dead_fraction"]), f"training, step {last['step']:,}"))
    return tiles


def _describe_training(config: dict[str, Any], metrics: Metrics) -> str:
    """How far the run is, and how fast it went."""
    if not metrics.training:
        return ""
    last, planned = metrics.training[-1], config.get("steps")
    unfinished = isinstance(planned, int) and last["step"] < planned
    steps = f"{last['step']:,} of {planned:,} steps" if unfinished else plural(int(last["step"]), "step")
    of_rows = f" over {int(last['rows']):,} rows" if "rows" in last else ""
    sentences = [f"{steps}{of_rows}."]
    rates = [r["rows_per_second"] for r in metrics.training if r.get("rows_per_second", 0) > 0]
    if rates and all("rows" in r and r.get("rows_per_second", 0) > 0 for r in metrics.training):
        rows = np.diff([0, *(r["rows"] for r in metrics.training)])
        seconds = float(np.sum(rows / np.array(rates)))
        sentences.append(f"{duration(seconds)} of training at a median of {np.median(rates):,.0f} rows/s.")
    waits = [r["input_wait_fraction"] for r in metrics.training if "input_wait_fraction" in r]
    if waits:
        sentences.append(f"The median share of time spent waiting for input was {percent(float(np.median(waits)))}.")
    return " ".join(sentences)


@dataclasses.dataclass(frozen=True)
class Curve:
    """A chart of one quantity over steps, with its newest values in words."""

    title: str
    latest: str
    validated: str
    chart: Chart
    label: str


@dataclasses.dataclass(frozen=True)
class Quantity:
    """Something that was logged: its name in metrics.jsonl, its title, and how it is written and drawn."""

    name: str
    title: str
    show: Callable[[float], str] = significant
    labels: Callable[[Sequence[float]], list[str]] = axis_labels
    log_allowed: bool = False


_QUANTITIES = (
    Quantity("loss", "Loss", log_allowed=True),
    Quantity("fvu", "FVU", log_allowed=True),
    Quantity("active", "Active concepts"),
    Quantity("dead_fraction", "Dead concepts", percent, percent_labels),
    Quantity("rows_per_second", "Rows per second"),
    Quantity("input_wait_fraction", "Time waiting for input", percent, percent_labels),
)


def _curves(config: dict[str, Any], metrics: Metrics) -> list[Curve]:
    """One chart per quantity that was logged."""
    planned = config.get("steps")
    x_max = float(planned) if isinstance(planned, int) else 0.0
    curves = []
    for quantity in _QUANTITIES:
        name, title, show = quantity.name, quantity.title, quantity.show
        line = [(r["step"], r[name]) for r in metrics.training if name in r]
        dots = [(r["step"], r[f"val_{name}"]) for r in metrics.validation if f"val_{name}" in r]
        if not line:
            continue
        chart = line_chart(line, dots, x_max=x_max, show=show, labels=quantity.labels, log_allowed=quantity.log_allowed)
        latest, validated = show(line[-1][1]), show(dots[-1][1]) if dots else ""
        label = f"{title}: {show(line[0][1])} at step {line[0][0]:,}, {latest} at step {line[-1][0]:,}"
        if dots:
            label += f"; validation {validated} at step {dots[-1][0]:,}"
        curves.append(Curve(title, latest, validated, chart, label))
    return curves


@dataclasses.dataclass(frozen=True)
class Loss:
    """One row of the table of spliced losses; ``share`` is its length as a bar."""

    name: str
    meaning: str
    value: float
    above_clean: float
    share: float


def _losses(evaluation: dict[str, float]) -> list[Loss]:
    rows = (
        ("ce_clean", "Clean", "the model as it is"),
        ("ce_sae", "With the SAE", "every captured position replaced by its reconstruction"),
        ("ce_mean_ablated", "Mean-ablated", "replaced by the mean of the data"),
        ("ce_zero_ablated", "Zero-ablated", "replaced by zero"),
    )
    clean, largest = evaluation["ce_clean"], max(evaluation[name] for name, _, _ in rows)
    return [
        Loss(label, meaning, evaluation[name], evaluation[name] - clean, max(0.0, evaluation[name] / largest))
        for name, label, meaning in rows
    ]


@dataclasses.dataclass(frozen=True)
class Distribution:
    """A histogram, a note on how to read it, what it shows, and whether it holds more than one value."""

    chart: Chart | None
    note: str
    text: tuple[str, ...]
    varies: bool = True


def _active(config: dict[str, Any], concepts: Concepts) -> Distribution:
    drawing = report_distributions.draw_active(concepts.active)
    sentences = (
        report_distributions.describe_active(concepts.active),
        report_distributions.describe_selection(config["sae"]),
    )
    text = tuple(sentence for sentence in sentences if sentence)
    summary = report_distributions.summarise_active(concepts.active)
    varies = summary is not None and summary.least < summary.most
    return Distribution(drawing.chart if drawing else None, drawing.note if drawing else "", text, varies)


def _frequencies(concepts: Concepts) -> Distribution:
    drawing = report_distributions.draw_frequencies(concepts)
    text = report_distributions.describe_frequencies(concepts)
    return Distribution(drawing.chart if drawing else None, "", (text,))


def _settings(config: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """(group, [(name, value)]) of every setting; nested names are joined by dots."""
    groups = {"Run": {k: v for k, v in config.items() if not isinstance(v, dict)}}
    titles = {"sae": "Autoencoder", "source": "Source of the activations"}
    groups |= {titles.get(name, name): value for name, value in config.items() if isinstance(value, dict)}
    return [(title, list(_flat(values))) for title, values in groups.items() if values]


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    flat = []
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat += _flat(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            flat.append((f"{prefix}{name}", "none" if value is None else text))
    return flat


def main(workdir: tyro.conf.Positional[Path]) -> None:
    """Write report.html of a run.

    Args:
      workdir: of the run.
    """
    print(f"report: {render(workdir)}")


if __name__ == "__main__":
    cli.run(main, prog=f"python -m {__package__}.report")
