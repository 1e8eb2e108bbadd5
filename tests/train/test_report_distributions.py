"""Sentences about histograms against the numbers that were counted."""

import numpy as np
import pytest

from train.report_distributions import (
    describe_active,
    describe_frequencies,
    describe_selection,
    draw_active,
    draw_frequencies,
    summarise_active,
)
from train.report_files import Concepts, Histogram


def histogram_of(numbers):
    counts = np.bincount(numbers)
    return Histogram(tuple(range(len(counts) + 1)), tuple(map(int, counts)))


def concepts_of(frequencies, n_concepts, edges):
    counts, _ = np.histogram(np.log10(frequencies), edges)
    histogram = Histogram(tuple(map(float, edges)), tuple(map(int, counts)))
    return Concepts(5000, n_concepts, Histogram((), ()), histogram, n_concepts - len(frequencies), (), (), ())


@pytest.mark.parametrize("seed", range(5))
def test_percentiles_are_those_of_the_numbers(seed):
    rng = np.random.default_rng(seed)
    numbers = rng.poisson(rng.gamma(3, 6, size=rng.integers(1, 3000)))
    summary = summarise_active(histogram_of(numbers))
    expected = np.percentile(numbers, [5, 50, 95], method="inverted_cdf")
    assert [summary.low, summary.median, summary.high] == list(expected)
    assert [summary.least, summary.most, summary.inputs] == [numbers.min(), numbers.max(), len(numbers)]
    assert summary.exact


@pytest.mark.parametrize("shift", [0.0, -0.5])
def test_edges_between_or_on_the_numbers_mean_the_same(shift):
    histogram = Histogram(tuple(edge + shift for edge in range(6)), (0, 1, 3, 1, 0))
    assert describe_active(histogram) == describe_active(histogram_of([1, 2, 2, 2, 3]))


def test_a_varying_number_is_described_by_its_range():
    numbers = [2] * 10 + [16] * 80 + [31] * 9 + [118]
    assert describe_active(histogram_of(numbers)) == (
        "The median of the 100 held-out inputs uses 16 concepts. From the 5th to the 95th percentile "
        "the number runs from 2 to 31, a factor of 16; all of them use between 2 and 118."
    )


def test_a_fixed_number_is_described_as_fixed():
    assert describe_active(histogram_of([32] * 500)) == "Each of the 500 held-out inputs uses exactly 32 concepts."
    assert describe_active(histogram_of([1])) == "The one held-out input uses exactly 1 concept."


def test_exceptions_from_a_fixed_number_are_counted():
    numbers = [32] * 980 + [12] * 15 + [20] * 5
    assert describe_active(histogram_of(numbers)) == (
        "98\xa0% of the 1,000 held-out inputs use exactly 32 concepts; the others use from 12 to 20."
    )


def test_wide_bins_give_approximate_numbers_and_say_so():
    text = describe_active(Histogram((0, 10, 20, 30), (10, 80, 10)))
    assert "uses about 14 concepts" in text
    assert "from about 4 to about 24" in text
    assert text.endswith("none uses more than 29.")


def test_no_factor_where_some_inputs_use_none():
    assert "factor" not in describe_active(histogram_of([0] * 10 + [5] * 10))


def test_nothing_evaluated_is_said():
    empty = Histogram((0.0, 1.0), (0,))
    assert describe_active(empty) == "No held-out input was evaluated."
    assert draw_active(empty) is None


@pytest.mark.parametrize("activation", ["sparsemax", "topk", "batch_topk", "relu"])
def test_each_kind_says_what_decides_the_number(activation):
    text = describe_selection({"activation": activation, "k": 23})
    assert ("k = 23" in text) == (activation in ("topk", "batch_topk"))
    assert ("a setting, not a finding" in text) == (activation == "topk")
    assert ("no k" in text) == (activation == "sparsemax")


def test_an_unknown_kind_says_nothing():
    assert describe_selection({"activation": "step"}) == ""


def test_bars_stand_over_their_numbers_and_show_their_counts():
    chart = draw_active(histogram_of([3] * 6 + [4] * 24 + [5] * 60 + [12] * 10)).chart
    centres = [bar.left + bar.width / 2 for bar in chart.bars]
    ticks = {tick.label: tick.at for tick in chart.x_ticks}
    assert centres == pytest.approx([ticks[number] for number in ("3", "4", "5", "12")])
    at_60 = next(100 - tick.at for tick in chart.y_ticks if tick.label == "60")
    assert [bar.height for bar in chart.bars] == pytest.approx([at_60 * count / 60 for count in (6, 24, 60, 10)])
    assert chart.bars[2].label == "5 active: 60 inputs (60\xa0%)"
    assert chart.marks[0].at == pytest.approx(centres[2])


def test_the_tails_are_quiet():
    numbers = [1] * 2 + [5] * 90 + [6] * 6 + [9] * 2
    drawing = draw_active(histogram_of(numbers))
    assert [bar.quiet for bar in drawing.chart.bars] == [True, False, False, True]
    assert drawing.note == "Full colour: the middle 90\xa0%."


def test_a_long_tail_is_counted_not_drawn():
    drawing = draw_active(histogram_of([10] * 500 + [12] * 499 + [400]))
    assert drawing.note.endswith("Not drawn: 1 input (0.10\xa0%) with more than 12 active concepts, up to 400.")
    assert len(drawing.chart.bars) == 2
    whole = draw_active(histogram_of([10] * 500 + [12] * 480 + [13] * 20))
    assert "Not drawn" not in whole.note


def test_many_bins_are_merged_without_losing_an_input():
    numbers = np.random.default_rng(0).integers(0, 1000, 5000)
    chart = draw_active(histogram_of(numbers)).chart
    assert 60 <= len(chart.bars) <= 72
    assert sum(int(bar.label.split(": ")[1].split(" ")[0].replace(",", "")) for bar in chart.bars) == 5000


def test_frequencies_are_described_by_silent_common_and_median_concepts():
    frequencies = 10 ** np.random.default_rng(0).uniform(-4, 0, 4000)
    concepts = concepts_of(frequencies, 5000, np.linspace(-4, 0, 41))
    often = int((frequencies >= 0.1).sum())
    text = describe_frequencies(concepts)
    assert text.startswith("1,000 of 5,000 concepts (20\xa0%) never fire on the 5,000 held-out inputs.")
    assert text.endswith(f"; {often:,} fire on a tenth of them or more.")
    shown = float(text.split("less than about ")[1].split("\xa0")[0])
    assert shown == pytest.approx(100 * np.median(frequencies), rel=0.1)


def test_no_silent_concept_and_no_edge_at_a_tenth():
    text = describe_frequencies(concepts_of(np.full(7, 0.03), 7, [-2.0, -1.3, 0.0]))
    assert text.startswith("All 7 concepts fire at least once on the 5,000 held-out inputs. Half of them fire on")
    assert "tenth" not in text


def test_silent_concepts_stand_apart():
    chart = draw_frequencies(concepts_of(np.full(80, 0.03), 100, np.linspace(-4, 0, 9))).chart
    never, others = chart.bars
    assert never.quiet and never.left + never.width < others.left
    assert never.label == "on no input: 20 concepts"
    assert never.height / others.height == pytest.approx(20 / 80)
    assert chart.x_ticks[0].label == "never"


def test_all_concepts_silent():
    concepts = concepts_of(np.array([]), 10, [-2.0, -1.0, 0.0])
    assert describe_frequencies(concepts) == "10 of 10 concepts (100\xa0%) never fire on the 5,000 held-out inputs."
    assert [bar.label for bar in draw_frequencies(concepts).chart.bars] == ["on no input: 10 concepts"]
