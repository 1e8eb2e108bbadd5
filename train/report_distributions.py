"""The two histograms of the report, and what may truthfully be said about them."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from .charts import Chart, Column, bar_chart, linear_ticks, log_ticks, merge_bins
from .report_files import Concepts, Histogram
from .report_text import percent, percent_labels, plural, significant

# Where the last inputs would stretch the axis by more than this factor, they are counted, not drawn.
LONGEST_TAIL = 1.6
DRAWN_FRACTION = 0.995


@dataclasses.dataclass(frozen=True)
class WholeNumbers:
    """The whole numbers in one bin, from ``first`` to ``last``."""

    first: int
    last: int
    count: int

    @property
    def middle(self) -> int:
        return (self.first + self.last) // 2


def whole_numbers(histogram: Histogram) -> list[WholeNumbers]:
    """The bins of a histogram of whole numbers, empty ones at both ends left out.

    Example:
      >>> whole_numbers(Histogram((0, 1, 2, 5), (0, 4, 6)))
      [WholeNumbers(first=1, last=1, count=4), WholeNumbers(first=2, last=4, count=6)]
    """
    bins = [
        WholeNumbers(math.ceil(low), max(math.ceil(low), math.ceil(high) - 1), count)
        for low, high, count in zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False)
    ]
    filled = [index for index, numbers in enumerate(bins) if numbers.count]
    return bins[filled[0] : filled[-1] + 1] if filled else []


@dataclasses.dataclass(frozen=True)
class ActiveSummary:
    """How many concepts are active per input.

    Attributes:
      inputs: how many inputs.
      least, low, median, high, most: minimum, 5th, 50th and 95th percentile (nearest rank), maximum.
      exact: whether each of them is known exactly; False where bins hold several numbers.
      share_at_median: fraction of inputs in the bin of the median.
    """

    inputs: int
    least: int
    low: int
    median: int
    high: int
    most: int
    exact: bool
    share_at_median: float


def summarise_active(histogram: Histogram) -> ActiveSummary | None:
    """None when there are no inputs."""
    bins = whole_numbers(histogram)
    if not bins:
        return None
    total = histogram.total

    def percentile(fraction: float) -> WholeNumbers:
        rank, seen = max(1, math.ceil(fraction * total - 1e-9)), 0
        for numbers in bins:
            seen += numbers.count
            if seen >= rank:
                return numbers
        return bins[-1]

    low, median, high = (percentile(fraction) for fraction in (0.05, 0.5, 0.95))
    return ActiveSummary(
        inputs=total,
        least=bins[0].first,
        low=low.middle,
        median=median.middle,
        high=high.middle,
        most=bins[-1].last,
        exact=all(numbers.first == numbers.last for numbers in bins if numbers.count),
        share_at_median=median.count / total,
    )


def describe_active(histogram: Histogram) -> str:
    """One or two sentences on how the number of active concepts varies, all of it read off the histogram."""
    summary = summarise_active(histogram)
    if summary is None:
        return "No held-out input was evaluated."
    s, inputs = summary, plural(summary.inputs, "held-out input")
    if s.exact and s.least == s.most:
        whole = "The one held-out input uses" if s.inputs == 1 else f"Each of the {inputs} uses"
        return f"{whole} exactly {plural(s.median, 'concept')}."
    if s.exact and s.low == s.high:
        numbers = [n.first for n in whole_numbers(histogram) if n.count and n.first != s.median]
        others = f"from {numbers[0]:,} to {numbers[-1]:,}" if len(numbers) > 1 else f"{numbers[0]:,}"
        return (
            f"{percent(s.share_at_median)} of the {inputs} use exactly {plural(s.median, 'concept')}; "
            f"the others use {others}."
        )
    about = "" if s.exact else "about "
    ratio = f", a factor of {significant(s.high / s.low, 2)}" if s.low else ""
    ends = f"all of them use between {s.least:,} and {s.most:,}" if s.exact else f"none uses more than {s.most:,}"
    return (
        f"The median of the {inputs} uses {about}{plural(s.median, 'concept')}. From the 5th to the 95th "
        f"percentile the number runs from {about}{s.low:,} to {about}{s.high:,}{ratio}; {ends}."
    )


def describe_selection(sae: dict[str, Any]) -> str:
    """What decides the number of active concepts in this kind of autoencoder; empty for an unknown kind."""
    k = sae.get("k")
    return {
        "sparsemax": "Sparsemax has no k and no sparsity penalty: the scores of each input decide how many "
        "concepts stay active.",
        "topk": f"TopK keeps the k = {k} largest scores of every input: the number is a setting, not a finding.",
        "batch_topk": f"BatchTopK fixes the number only on average over a training batch, at k = {k}; "
        "single inputs may use more or fewer.",
        "relu": "ReLU keeps every concept with a positive score: the number follows from the weight of the L1 penalty.",
    }.get(str(sae.get("activation")), "")


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A chart, and a note on how to read it."""

    chart: Chart
    note: str = ""


def draw_active(histogram: Histogram) -> Drawing | None:
    """Bars of inputs by number of active concepts; those outside the middle 90 % are quiet."""
    summary, bins = summarise_active(histogram), whole_numbers(histogram)
    if summary is None:
        return None
    shown, note = _without_tail(bins, summary)
    edges = (*(numbers.first - 0.5 for numbers in shown), shown[-1].last + 0.5)
    columns = list(_active_columns(edges, [numbers.count for numbers in shown], summary))
    low, high = edges[0], edges[-1]
    padding = max(0.0, (9 - (high - low)) / 2)  # a single bar would fill the whole width
    low, high = max(-0.5, low - padding), high + padding
    ticks = [at for at in linear_ticks(low, high, 8) if at == round(at)]
    chart = bar_chart(
        columns,
        domain=(low, high),
        x_ticks=[(at, f"{at:,.0f}") for at in ticks],
        marks=[(summary.median, f"median {'' if summary.exact else 'about '}{summary.median:,}")],
    )
    quiet = any(bar.quiet for bar in chart.bars)
    return Drawing(
        chart,
        " ".join(filter(None, ("Full colour: the middle 90\N{NO-BREAK SPACE}%." if quiet else "", note))),
    )


def _without_tail(bins: list[WholeNumbers], summary: ActiveSummary) -> tuple[list[WholeNumbers], str]:
    """The bins worth an axis, and a note on the inputs beyond them."""
    seen, end = 0, 0
    while seen < DRAWN_FRACTION * summary.inputs:
        seen += bins[end].count
        end += 1
    left_out = summary.inputs - seen
    shown_span = bins[end - 1].last - bins[0].first + 1
    if not left_out or bins[-1].last - bins[0].first + 1 <= LONGEST_TAIL * shown_span:
        return bins, ""
    note = (
        f"Not drawn: {plural(left_out, 'input')} ({percent(left_out / summary.inputs)}) with more than "
        f"{bins[end - 1].last:,} active concepts, up to {summary.most:,}."
    )
    return bins[:end], note


def _active_columns(edges: tuple[float, ...], counts: list[int], summary: ActiveSummary) -> Iterator[Column]:
    edges, merged = merge_bins(edges, counts)
    for low, high, count in zip(edges, edges[1:], merged, strict=False):
        first, last = math.ceil(low), math.floor(high)
        numbers = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        label = f"{numbers} active: {plural(count, 'input')} ({percent(count / summary.inputs)})"
        yield Column(low, high, count, label, quiet=last < summary.low or first > summary.high)


def describe_frequencies(concepts: Concepts) -> str:
    """Sentences on how often concepts fire, read off the histogram."""
    histogram, never = concepts.log10_frequency, concepts.never
    on_rows = f"the {plural(concepts.rows, 'held-out input')}"
    total = plural(concepts.n_concepts, "concept")
    share = f" ({percent(never / concepts.n_concepts)})" if never and concepts.n_concepts else ""
    silent = f"{never:,} of {total}{share} never {'fires' if never == 1 else 'fire'}" if never else f"All {total} fire"
    sentences = [f"{silent} on {on_rows}." if never else f"{silent} at least once on {on_rows}."]
    if histogram.total:
        rest = "the others" if never else "them"
        median = percent(10 ** _median(histogram))
        sentences.append(f"Half of {rest} fire on less than about {median} of the inputs{_often(histogram)}.")
    return " ".join(sentences)


def _often(histogram: Histogram) -> str:
    """How many concepts fire on at least a tenth of the inputs, where an edge of the histogram tells."""
    for index, edge in enumerate(histogram.edges[:-1]):
        if abs(edge + 1) < 1e-9:
            count = sum(histogram.counts[index:])
            return f"; {count:,} {'fires' if count == 1 else 'fire'} on a tenth of them or more"
    return ""


def _median(histogram: Histogram) -> float:
    """By linear interpolation inside the bin of the median."""
    wanted, seen = histogram.total / 2, 0
    for low, high, count in zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False):
        if count and seen + count >= wanted:
            return low + (high - low) * (wanted - seen) / count
        seen += count
    return histogram.edges[-1]


def draw_frequencies(concepts: Concepts) -> Drawing | None:
    """Bars of concepts by log10 of the fraction of inputs they fire on; silent ones stand apart."""
    histogram = concepts.log10_frequency
    if not histogram.total and not concepts.never:
        return None
    filled = [i for i, count in enumerate(histogram.counts) if count] or [0]
    edges = histogram.edges[filled[0] : filled[-1] + 2]
    low, high = edges[0], edges[-1]
    edges, counts = merge_bins(edges, histogram.counts[filled[0] : filled[-1] + 1])
    columns = [
        Column(a, b, count, f"on {percent(10**a)} to {percent(10**b)} of inputs: {plural(count, 'concept')}")
        for a, b, count in zip(edges, edges[1:], counts, strict=False)
    ]
    shares = log_ticks(10**low, 10**high)
    ticks = [(math.log10(at), label) for at, label in zip(shares, percent_labels(shares), strict=True)]
    unit = (high - low) / 24
    left = low
    if concepts.never:
        left = low - 3 * unit
        label = f"on no input: {plural(concepts.never, 'concept')}"
        columns.insert(0, Column(left + unit / 2, left + 2 * unit, concepts.never, label, quiet=True))
        ticks = [(left + 1.25 * unit, "never"), *(tick for tick in ticks if tick[0] > left + 4 * unit)]
    return Drawing(bar_chart(columns, domain=(left, high), x_ticks=ticks))
