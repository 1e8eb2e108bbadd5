"""The harness's arithmetic and bookkeeping; nothing here depends on how fast the machine is."""

import jax.numpy as jnp
import pytest

from benchmarks import harness
from benchmarks.harness import Row, interleave, measure, paired_ratio, seconds_per_call, tabulate


def recording(log, name, value=1.0):
    def sampler():
        log.append(name)
        return value

    return sampler


def test_interleave_runs_every_candidate_once_a_round_in_rotating_order():
    log = []
    samples = interleave({name: recording(log, name) for name in "abc"}, rounds=3)
    assert log == [*"abc", *"bca", *"cab"]
    assert {name: len(seconds) for name, seconds in samples.items()} == {"a": 3, "b": 3, "c": 3}


def test_interleave_keeps_the_round_order_of_each_candidate():
    clock = iter(range(100))
    samples = interleave({"a": lambda: next(clock), "b": lambda: next(clock)}, rounds=2)
    assert samples == {"a": (0, 3), "b": (1, 2)}


@pytest.mark.parametrize(("samplers", "rounds"), [({}, 3), ({"a": lambda: 1.0}, 0)])
def test_interleave_refuses_nothing_to_measure(samplers, rounds):
    with pytest.raises(ValueError, match="expected at least 1 of each"):
        interleave(samplers, rounds=rounds)


def test_measure_warms_up_before_it_times():
    log = []
    measure({"a": recording(log, "a"), "b": recording(log, "b")}, rounds=2, warmup=3)
    assert log == [*"aaabbb", *"abba"]


def test_measure_repeats_a_fast_candidate_up_to_the_minimum_time():
    log = []
    samples = measure({"a": recording(log, "a")}, rounds=1, warmup=1, minimum_seconds=0.02)
    assert len(log) > 2
    assert len(samples["a"]) == 1
    assert samples["a"][0] < 0.02  # per call, not per round


def test_measure_waits_for_arrays_inside_any_tree():
    assert seconds_per_call(lambda: {"x": (jnp.ones(3), 2)}, calls=2) > 0


def test_ratio_is_taken_within_a_round_before_the_median():
    assert paired_ratio((2.0, 30.0, 4.0), (1.0, 10.0, 2.0)) == 2.0


def test_row_median_and_interquartile_range():
    row = Row("a", (4.0, 1.0, 2.0, 3.0, 5.0))
    assert row.median == 3.0
    assert row.interquartile_range == 2.0


def test_tabulate_compares_with_baseline_limit_and_items():
    samples = {"copy": (1.0, 2.0, 3.0), "sort": (10.0, 20.0, 30.0)}
    table = tabulate("t", samples, baseline="copy", limits={"sort": 5.0}, items=100, unit="rows")
    assert (table["copy"].ratio, table["sort"].ratio) == (1.0, 10.0)
    assert (table["copy"].limit_fraction, table["sort"].limit_fraction) == (None, 0.25)
    assert (table["copy"].items_per_second, table["sort"].items_per_second) == (50.0, 5.0)


def test_tabulate_counts_items_by_name():
    table = tabulate("t", {"a": (2.0,), "b": (2.0,)}, items={"a": 8.0})
    assert (table["a"].items_per_second, table["b"].items_per_second) == (4.0, None)


@pytest.mark.parametrize("names", [{"baseline": "c"}, {"limits": {"c": 1.0}}])
def test_tabulate_refuses_a_name_that_was_not_measured(names):
    with pytest.raises(ValueError, match=r"found the names \['c'\], measured were \['a'\]"):
        tabulate("t", {"a": (1.0,)}, **names)


def test_rates_divide_the_work_of_one_call_by_its_best_time(monkeypatch):
    def two_and_four_seconds(candidates, *, rounds):
        for candidate in candidates.values():
            candidate()
        return dict.fromkeys(candidates, (4.0, 2.0))

    monkeypatch.setattr(harness, "measure", two_and_four_seconds)
    assert harness.matmul_rate(m=2, k=3, n=5) == 2 * 2 * 3 * 5 / 2.0
    assert harness.copy_bandwidth(megabytes=1) == 2 * 1_000_000 / 2.0
