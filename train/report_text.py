"""Numbers, tokens and sentences of the report as text."""

import dataclasses
import math
import unicodedata
from collections.abc import Sequence

from .report_files import Context

NBSP = "\N{NO-BREAK SPACE}"

_BLANKS = {"\n": "⏎", "\r": "␍", "\t": "→", " ": "·"}
_INLINE = str.maketrans({"\n": "⏎", "\r": "␍", "\t": "→"})
# Characters that a browser would act on or could not show: controls as their pictures, overrides of the
# writing direction and lone surrogates as a replacement sign. Line feeds stay: the page is made of lines.
_REPLACED = (
    *range(0x7F, 0xA0),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
    *range(0xD800, 0xE000),
    0xFFFE,
    0xFFFF,
)
_UNSAFE = {code: 0x2400 + code for code in range(0x20) if code != 0x0A} | dict.fromkeys(_REPLACED, 0xFFFD)


def safe_document(html: str) -> str:
    r"""``html`` without characters that no HTML document may hold or that reorder the text around them.

    Example:
      >>> safe_document("a\x00b\ud800\n")
      'a␀b�\n'
    """
    return html.translate(_UNSAFE)


def significant(value: float, digits: int = 3) -> str:
    """``value`` to a number of significant digits, in plain notation where that is short.

    Example:
      >>> [significant(v) for v in (0.07432, 3.4801, 127.4, 60312.0, 0.0, 1.2e-7)]
      ['0.0743', '3.48', '127', '60,312', '0', '1.2e-07']
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    magnitude = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if magnitude < -4 or magnitude > 8:
        return f"{value:.{digits}g}"
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"


def percent(fraction: float, digits: int = 2) -> str:
    r"""A fraction as a percentage; never rounded to 0 or to 100 where it is not.

    Example:
      >>> [percent(f) for f in (0.0, 0.00312, 0.1234, 0.98143, 0.9996, 1.0)]
      ['0\xa0%', '0.31\xa0%', '12\xa0%', '98\xa0%', '99.96\xa0%', '100\xa0%']
    """
    value = 100 * fraction
    text = significant(value, digits)
    for more in range(digits + 1, 9):
        if not 99 < value < 100 or float(text) < 100:
            break
        text = significant(value, more)
    return f"{text}{NBSP}%"


def axis_labels(values: Sequence[float]) -> list[str]:
    """Short labels of round values on one axis, all in the same unit.

    Example:
      >>> axis_labels([0, 0.2, 0.4]), axis_labels([0, 500, 1000]), axis_labels([0, 50_000, 100_000])
      (['0', '0.2', '0.4'], ['0', '500', '1,000'], ['0', '50k', '100k'])
    """
    largest = max(map(abs, values), default=0)
    size, letter = next(((s, x) for s, x in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if largest >= 20 * s), (1, ""))
    return [f"{value / size:,.10g}{letter if value else ''}" for value in values]


def percent_labels(fractions: Sequence[float]) -> list[str]:
    r"""Labels of round fractions on an axis, as percentages.

    Example:
      >>> percent_labels([0.002, 0.3])
      ['0.2\xa0%', '30\xa0%']
    """
    return [f"{100 * fraction:.10g}{NBSP}%" for fraction in fractions]


def duration(seconds: float) -> str:
    r"""Hours, minutes and seconds, the two largest that count.

    Example:
      >>> duration(7.24), duration(192.0), duration(7320.0)
      ('7.2\xa0s', '3\xa0min 12\xa0s', '2\xa0h 2\xa0min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f}{NBSP}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{NBSP}min {rest}{NBSP}s"
    return f"{minutes // 60}{NBSP}h {minutes % 60}{NBSP}min"


def plural(count: int, noun: str) -> str:
    """``count`` and the noun.

    Example:
      >>> plural(1, "concept"), plural(4608, "concept")
      ('1 concept', '4,608 concepts')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def visible(token: str) -> str:
    r"""A token as one can see it: line breaks and tabs marked, and so is a token of nothing but blanks.

    Example:
      >>> [visible(t) for t in (" the", "\n\n", "  ", ".\n", "", "\u200b")]
      [' the', '⏎⏎', '··', '.⏎', '∅', '⟨U+200B⟩']
    """
    if not token:
        return "∅"
    if all(unicodedata.category(char)[0] in "ZC" and char not in "\ufffd" for char in token):
        return "".join(_BLANKS.get(char) or _code_point(char) for char in token)
    return token.translate(_INLINE)


def _code_point(char: str) -> str:
    picture = _UNSAFE.get(ord(char))
    return chr(picture) if picture and picture != 0xFFFD else f"⟨U+{ord(char):04X}⟩"


@dataclasses.dataclass(frozen=True)
class Piece:
    """A run of text in one look.

    Attributes:
      text: visible text.
      strength: share of the strongest value, in (0, 1], of a token that fires; 0 for silent text.
      value: what a firing token says when pointed at.
      peak: whether the context is about this token.
      blank: whether it is silent text that only marks blanks.
    """

    text: str
    strength: float = 0.0
    value: str = ""
    peak: bool = False
    blank: bool = False


def pieces(context: Context, strongest: float, unit: str = "") -> list[Piece]:
    """The tokens of a context, marked by how strongly they fire; silent neighbours are one piece.

    Args:
      context: with tokens.
      strongest: the magnitude that is shown at full strength.
      unit: what the values count, for the text shown on pointing at one.
    """
    assert context.tokens is not None, "a context without tokens has no text"
    result: list[Piece] = []
    for index, (token, value) in enumerate(zip(context.tokens, context.values, strict=True)):
        text, is_peak = visible(token), index == context.peak
        if not value and not is_peak:
            _append_silent(result, text, blank=not token.strip())
            continue
        if text.startswith(" ") and len(text) > 1:  # the blank before a word belongs to no mark
            _append_silent(result, " ", blank=False)
            text = text[1:]
        strength = min(1.0, abs(value or 0.0) / strongest) if strongest else 0.0
        result.append(Piece(text, round(strength, 2), f"{significant(value or 0.0)}{unit}", is_peak))
    return result


def _append_silent(result: list[Piece], text: str, *, blank: bool) -> None:
    last = result[-1] if result else None
    if last and not last.value and last.blank == blank:
        result[-1] = dataclasses.replace(last, text=last.text + text)
    else:
        result.append(Piece(text, blank=blank))


def strongest(contexts: Sequence[Context]) -> float:
    """The largest magnitude in any of the contexts."""
    return max((abs(v) for context in contexts for v in context.values if v is not None), default=0.0)
