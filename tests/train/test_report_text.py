"""Tokens as one can see them, and numbers as they are."""

import pytest

from train.report_files import Context
from train.report_text import Piece, percent, pieces, safe_document, significant, visible


def context(tokens, values, peak=0):
    return Context(None, 0, tuple(tokens), tuple(values), peak)


def test_silent_neighbours_are_one_piece_and_firing_tokens_are_not():
    shown = pieces(context([" a", " b", " c", " d"], [0.0, 0.0, 2.0, 1.0], peak=2), strongest=4.0)
    assert shown == [
        Piece(" a b "),
        Piece("c", 0.5, "2.00", peak=True),
        Piece(" "),
        Piece("d", 0.25, "1.00"),
    ]


def test_strength_is_proportional_to_the_magnitude():
    values = [0.5, -1.0, 2.0]
    shown = [p for p in pieces(context("abc", values), strongest=2.0) if p.value]
    assert [(p.strength, p.value) for p in shown] == [(0.25, "0.500"), (0.5, "-1.00"), (1.0, "2.00")]


def test_the_peak_is_marked_even_where_it_is_silent_or_outside_the_set():
    for value in (0.0, None):
        assert pieces(context(["a", "b"], [value, 1.0]), strongest=1.0)[0] == Piece("a", 0.0, "0", peak=True)


def test_blank_tokens_are_marked_and_quiet_where_silent():
    shown = pieces(context(["x", "\n", " ", "y", "\n"], [0.0, 0.0, 0.0, 0.0, 1.0], peak=4), strongest=1.0)
    assert shown == [Piece("x"), Piece("⏎·", blank=True), Piece("y"), Piece("⏎", 1.0, "1.00", peak=True)]


@pytest.mark.parametrize("token", ["", " ", "\t", "\n", "\r\n", "\u200b", "\ufeff", "\u202e", "\x00", "\xa0", "\ud800"])
def test_no_token_is_invisible(token):
    shown = safe_document(visible(token))
    assert shown.strip()
    assert shown.isprintable()


@pytest.mark.parametrize("value", [0.999949, 0.99996, 0.00000123, 0.5, 0.9949, 1 - 1e-7])
def test_a_percentage_is_0_or_100_only_where_it_is(value):
    number = float(percent(value).split("\xa0")[0])
    assert 0 < number < 100
    assert number == pytest.approx(100 * value, rel=0.05)


def test_significant_digits_survive_rounding_up():
    assert significant(0.09996) == "0.100"
    assert significant(999.6) == "1,000"
    assert significant(-0.0123) == "-0.0123"
    assert float(significant(123456.0).replace(",", "")) == 123456
