"""The tables of a comparison, and what they say about the number of active concepts, as text."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from .comparison_groups import Group, comparable
from .metric_names import BY_NAME, Metric
from .report_text import NBSP, percent, plural, significant

_RECONSTRUCTION = ("l0", "fvu", "fvu_pooled", "cs", "cknna", "do", "ms_mean", "ms_max", "dead_fraction")
_LANGUAGE_MODEL = ("nmse", "ce_clean", "ce_sae", "ce_degradation", "loss_recovered")
_NONE = "\N{EN DASH}"
_ARROW = {"lower": " ↓", "higher": " ↑", None: ""}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A number, its standard deviation over seeds if it has one, and whether it is the best of comparable ones."""

    text: str
    spread: str = ""
    best: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    """A group.

    Attributes:
      label: what it is called.
      note: seeds and failures.
      cells: one a column; empty for a group without numbers.
      begins: whether the rows from here on are comparable with each other and not with those above.
    """

    label: str
    note: str
    cells: tuple[Cell, ...]
    begins: bool


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns have a title with an arrow that says which way is better."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def tables(groups: Sequence[Group]) -> list[Table]:
    """Reconstruction and interpretability; and, where groups were measured in their language model, that."""
    shown = [_table("Reconstruction and interpretability", groups, _RECONSTRUCTION)]
    if any("ce_sae" in group.mean for group in groups):
        shown.append(_table("Language model", groups, _LANGUAGE_MODEL))
    return shown


def _table(title: str, groups: Sequence[Group], names: Sequence[str]) -> Table:
    metrics = [BY_NAME[name] for name in names if any(name in group.mean for group in groups)]
    rows = []
    for equals in comparable(groups):
        best = {metric.name: _best(metric, equals) for metric in metrics}
        for group in equals:
            cells = (Cell(_count(group)), *(_cell(metric, group, best[metric.name]) for metric in metrics))
            rows.append(Row(group.label, _note(group), cells, begins=group is equals[0]))
    for group in groups:
        if not group.runs:
            rows.append(Row(group.label, _note(group), (), begins=True))
    return Table(title, ("k or active", *(m.title + _ARROW[m.better] for m in metrics)), tuple(rows))


def _best(metric: Metric, equals: Sequence[Group]) -> float | None:
    """The best mean of several groups; None where no way is better, or nothing is compared."""
    values = [group.mean[metric.name] for group in equals if metric.name in group.mean]
    if metric.better is None or len(values) < 2:
        return None
    return min(values) if metric.better == "lower" else max(values)


def _cell(metric: Metric, group: Group, best: float | None) -> Cell:
    if metric.name not in group.mean:
        return Cell(_NONE)
    value, std = group.mean[metric.name], group.std.get(metric.name, 0.0)
    text = metric.show(value)
    spread = percent(std, 1) if text.endswith("%") else significant(std, 1)
    return Cell(text, spread if std else "", best is not None and text == metric.show(best))


def _count(group: Group) -> str:
    """The k that was given, and the number of active concepts where it is another."""
    active = significant(group.mean["active"])
    if group.k is None:
        return active
    return f"k = {group.k}" + (f" ({active})" if group.mean["active"] != group.k else "")


def _note(group: Group) -> str:
    """How many seeds, and which failed when."""
    parts = [f"{len(group.runs)} seeds"] if len(group.runs) > 1 else []
    for run in group.failed:
        assert run.failure is not None
        step, reason = run.failure
        seed = f"seed {run.config.get('seed')} " if group.runs or len(group.failed) > 1 else ""
        parts.append(f"{seed}diverged at step {step:,}" + (f" ({reason})" if reason else ""))
    return "; ".join(parts)


@dataclasses.dataclass(frozen=True)
class Match:
    """A fixed-k group beside an adaptive one of the same number of active concepts.

    Attributes:
      label: of the fixed-k group.
      preset: of it.
      fvu: of it.
      change: ``fvu / fvu of the adaptive group - 1``.
    """

    label: str
    preset: str
    fvu: float
    change: float


@dataclasses.dataclass(frozen=True)
class Guide:
    """What the number that an adaptive group settles on is worth as the k of TopK and BatchTopK."""

    label: str
    k: int
    fvu: float
    matches: tuple[Match, ...]

    @property
    def sentence(self) -> str:
        """The numbers in words."""
        own = f"At its own {plural(self.k, 'active concept')}, {self.label} has FVU {significant(self.fvu)}; "
        if not self.matches:
            return f"{own}neither topk nor batch_topk was trained with k = {self.k}."
        one_each = len({match.preset for match in self.matches}) == len(self.matches)
        others = [
            f"{f'{m.preset} with k = {self.k}' if one_each else m.label} has {significant(m.fvu)} ({_change(m.change)})"
            for m in self.matches
        ]
        return f"{own}{', '.join(others)}."


def _change(change: float) -> str:
    size = percent(abs(change))
    if float(size.removesuffix(f"{NBSP}%")) == 0:
        return "the same"
    return f"{size} {'lower' if change < 0 else 'higher'}"


def guides(groups: Sequence[Group]) -> Iterator[Guide]:
    """One for every sparsemax and entmax group, with the TopK and BatchTopK groups of k == round(active)."""
    for group in groups:
        if group.activation not in ("sparsemax", "entmax") or not group.runs:
            continue
        k, fvu = round(group.mean["active"]), group.mean["fvu"]
        matches = [
            Match(other.label, other.preset, other.mean["fvu"], other.mean["fvu"] / fvu - 1 if fvu else 0.0)
            for other in groups
            if other.preset in ("topk", "batch_topk") and other.runs and other.k == k and other.budget == group.budget
        ]
        yield Guide(group.label, k, fvu, tuple(matches))


def describe(described: dict[str, Any]) -> list[str]:
    """Sentences on the data, the budget, the dictionary and the machine: of what is known."""
    d = {name: value for name, value in described.items() if value not in (None, "", [], {})}
    source = d.get("source") if isinstance(d.get("source"), dict) else {}
    assert isinstance(source, dict)
    model = f"{source['model']}, layer {source.get('layer')}" if source.get("model") else ""
    parts = [f"Data: {' · '.join(filter(None, (model, str(d.get('data', '')))))}" if model or "data" in d else ""]
    if isinstance(d.get("steps"), int) and isinstance(d.get("batch_size"), int):
        rows = d["steps"] * d["batch_size"]
        parts.append(f"Budget: {plural(d['steps'], 'step')} x {d['batch_size']:,} rows = {rows:,} rows")
    if isinstance(d.get("n_concepts"), int):
        parts.append(f"Dictionary: {plural(d['n_concepts'], 'concept')}")
    if isinstance(d.get("seeds"), list):
        parts.append(f"{'Seed' if len(d['seeds']) == 1 else 'Seeds'}: {', '.join(map(str, d['seeds']))}")
    parts.append(f"Machine: {d['device']}" if "device" in d else "")
    return [f"{part}." for part in parts if part]


HOW_TO_READ = (
    "Bold: the best of rows that may be compared, which have the same budget and dictionary and about as many active "
    "concepts (within 10 %); rows are in blocks of those. Numbers after ± are standard deviations over seeds.",
    "L0 is the fraction of concepts that are zero. CE degradation is CE with SAE - CE clean.",
    "CKNNA compares scalar products of raw rows, as published. Where a few rows are far longer than the rest, as in "
    "language models, these are everyone's neighbours: it can then exceed 1 and says little.",
)


def markdown(about: Sequence[str], tables: Sequence[Table], sentences: Sequence[str], notes: Sequence[str]) -> str:
    """``comparison.md``: the description, the tables, the sentences on k, the notes."""
    parts = ["# Comparison", " ".join(_escaped(part) for part in about)]
    for table in tables:
        parts += [f"## {table.title}", _markdown_table(table)]
    if sentences:
        parts += ["## The number of active concepts as k", "\n".join(f"- {_escaped(s)}" for s in sentences)]
    return "\n\n".join(filter(None, (*parts, *map(_escaped, notes)))) + "\n"


def _markdown_table(table: Table) -> str:
    lines = [_line("Model", *table.columns), _line("---", *("---:" for _ in table.columns))]
    for row in table.rows:
        label = _escaped(f"{row.label} ({row.note})" if row.note and row.cells else row.label)
        cells = [_markdown_cell(cell) for cell in row.cells]
        if not cells:
            cells = [_escaped(row.note), *(_NONE for _ in table.columns[1:])]
        lines.append(_line(label, *cells))
    return "\n".join(lines)


def _markdown_cell(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.best else cell.text
    return f"{text} ± {cell.spread}" if cell.spread else text


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    r"""``text`` as one line of a Markdown table.

    Example:
      >>> _escaped("a|b <i>\n*c*")
      'a\\|b &lt;i> \\*c\\*'
    """
    text = " ".join(text.split())
    return "".join(f"\\{char}" if char in "\\|*[]`" else "&lt;" if char == "<" else char for char in text)
