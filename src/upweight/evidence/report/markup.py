"""Text and numbers as HTML. Whatever came from a run goes through `esc`."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence

from upweight.stats import Interval

NARROW_SPACE = "\u202f"
_MINUS = "\u2212"
# Controls, lone surrogates and non-characters: HTML or UTF-8 cannot carry them. The two overrides
# of writing direction would turn around our own words after them.
_UNSHOWABLE = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202d\u202e\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)
_SHOWN_AT_ONCE = 320
_SHOWN_AT_MOST = 6000


def esc(text: str) -> str:
    """`text` for an element or a quoted attribute; what cannot be shown becomes U+FFFD."""
    return html.escape(_UNSHOWABLE.sub("\ufffd", text), quote=True)


def number(value: float | int, digits: int = 3) -> str:
    """A measured number to so many significant digits: 0.693, 12.4, 5e-7, 1 240."""
    if not math.isfinite(value):
        return "not finite"
    value = float(f"{value:.{digits}g}")
    if value != 0 and not 1e-3 <= abs(value) < 1e7:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        if "." in mantissa:
            mantissa = mantissa.rstrip("0").rstrip(".")
        text = f"{mantissa}e{int(exponent)}"
    elif abs(value) >= 10 ** (digits - 1):
        text = f"{value:,.0f}".replace(",", NARROW_SPACE)
    else:
        decimals = digits - 1 - (math.floor(math.log10(abs(value))) if value else digits - 1)
        text = f"{value:.{max(0, decimals)}f}"
    # The exponent keeps its hyphen, so that the number can be copied.
    return _MINUS + text[1:] if text.startswith("-") else text


def signed(value: float) -> str:
    return ("+" if value > 0 else "") + number(value)


def ticks(values: Sequence[float]) -> list[str]:
    """The labels of an axis, all with the decimals that the finest of them needs."""
    if any(value and not 1e-3 <= abs(value) < 1e5 for value in values):
        return [number(value, 2) if value else "0" for value in values]
    decimals = max(len(f"{value:.4f}".rstrip("0").partition(".")[2]) for value in values)
    texts = (f"{value:,.{decimals}f}".replace(",", NARROW_SPACE) for value in values)
    return [_MINUS + text[1:] if text.startswith("-") else text for text in texts]


def count(value: int) -> str:
    """A whole number with its thousands apart."""
    return f"{value:,}".replace(",", NARROW_SPACE)


def percent(share: float) -> str:
    """A share in whole percent; close to 0 and 1 with the decimal that keeps it from them."""
    return f"{_percent_digits(share)}{NARROW_SPACE}%"


def percent_interval(low: float, high: float) -> str:
    return f"[{_percent_digits(low)}, {_percent_digits(high)}]"


def _percent_digits(share: float) -> str:
    near_an_end = 0 < share < 0.0095 or 0.9905 <= share < 1
    return f"{100 * share:.{1 if near_an_end else 0}f}"


def points(difference: Interval) -> str:
    """A difference of two shares in percentage points, with its interval where there is one."""
    text = f"{100 * difference.value:+.0f} percentage points".replace("-", _MINUS)
    if not math.isfinite(difference.low):
        return text
    return f"{text} [{100 * difference.low:.0f}, {100 * difference.high:.0f}]".replace("-", _MINUS)


def interval(low: float, high: float) -> str:
    return f"[{number(low)}, {number(high)}]"


def plural(value: int, one: str, many: str | None = None) -> str:
    return f"{count(value)} {one if value == 1 else many or one + 's'}"


def duration(seconds: float) -> str:
    """Seconds as a person would say them: 42 s, 4 min 12 s, 3 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def reading(text: str) -> str:
    """The sentence that says how to read a chart or table. Plain text."""
    return f'<p class="reading">{esc(text)}</p>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of cells that are HTML already. The first column names its row."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def details(summary: str, body: str, kind: str = "") -> str:
    return f'<details class="{kind}"><summary>{summary}</summary>{body}</details>'


def passage(text: str) -> str:
    """A text of the run: as it is when short, folded when long, cut with its count when huge."""
    if not text.strip():
        return '<p class="text empty">(empty)</p>'
    if len(text) <= _SHOWN_AT_ONCE:
        return f'<p class="text" dir="auto">{esc(text)}</p>'
    preview = text[:_SHOWN_AT_ONCE].rsplit(" ", 1)[0]
    hidden = len(text) - _SHOWN_AT_MOST
    cut = f'<p class="cut">{count(hidden)} more characters are not shown.</p>'
    rest = cut if hidden > 0 else ""
    return details(
        f'<span class="text preview" dir="auto">{esc(preview)} …</span>'
        f'<span class="more">show all {count(len(text))} characters</span>',
        f'<p class="text" dir="auto">{esc(text[:_SHOWN_AT_MOST])}</p>{rest}',
        "long",
    )
