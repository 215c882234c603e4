"""Charts as HTML with inline SVG. Lines stretch with the page; labels are HTML and keep their size.

A chart is readable without scripts. The numbers of its lines stand beside it as JSON, from which
script.js makes the crosshair.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from upweight.evidence.report.markup import count, esc, number, percent, reading, ticks
from upweight.evidence.report.scales import (
    Point,
    Scale,
    axis,
    running_mean,
    smoothing_window,
    thin,
    widen,
)

WIDTH, HEIGHT = 1000.0, 400.0
"""The drawing's own units; it is stretched to the space there is."""

CHIP = 0.2
"""The share of a narrow plot's width that a code takes."""


@dataclass(frozen=True, slots=True)
class Series:
    """One line. `tone` is a colour class of style.css; `band` holds (x, low, high)."""

    name: str
    points: Sequence[Point]
    tone: str
    band: Sequence[tuple[float, float, float]] = ()
    dashed: bool = False
    marked: bool = False
    smooth: bool = False


@dataclass(frozen=True, slots=True)
class Guide:
    """A horizontal line at a value that means something, such as chance."""

    value: float
    label: str


@dataclass(frozen=True, slots=True)
class Event:
    """A vertical line at a step where something happened."""

    x: float
    label: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A warning at the step where it was raised: its code on the chart, the rest on pointing."""

    x: float
    code: str
    said: str


@dataclass(frozen=True, slots=True)
class Beside:
    """A text beside a point of the plot, to its ne, nw, se or sw."""

    x: float
    y: float
    side: str
    text: str


@dataclass(frozen=True, slots=True)
class Chart:
    """What a line chart shows. `reading` is the sentence that says how to read it.

    The y axis holds `include` besides the values; the x axis spans `domain`, or else the points.
    """

    title: str
    unit: str
    reading: str
    series: tuple[Series, ...]
    guides: tuple[Guide, ...] = ()
    events: tuple[Event, ...] = ()
    marks: tuple[Mark, ...] = ()
    percent: bool = False
    log: bool = False
    include: tuple[float, ...] = ()
    domain: tuple[float, float] | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A series as it is drawn: the bold line, what it was smoothed from, and what was left out."""

    series: Series
    line: Sequence[Point]
    raw: Sequence[Point]
    band: Sequence[tuple[float, float, float]]
    window: int
    num_thinned: int


def line_chart(chart: Chart) -> str:
    """The chart as a figure; '' when no series has a single finite value."""
    drawn = [_prepare(series) for series in chart.series]
    values = [y for d in drawn for y in _extent(d) if math.isfinite(y)]
    # Zero and below have no place on a logarithmic axis.
    log = chart.log and bool(values) and min(values) > 0
    if not values:
        return ""
    y, y_ticks = axis([*values, *chart.include], log=log)
    xs = [x for d in drawn for x, _ in d.series.points]
    first, last = chart.domain or (min(xs), max(xs))
    x, x_ticks = axis([first, last])
    x = Scale(first, last) if last > first else x
    shape = "".join(_draw(i, d, x, y) for i, d in enumerate(drawn))
    plot = frame(
        shape,
        [(x.at(t), _step(t)) for t in x_ticks if x.low <= t <= x.high],
        list(zip(map(y.at, y_ticks), _labels(y_ticks, chart.percent, log), strict=True)),
        guides=[(y.at(g.value), g.label) for g in chart.guides if y.low <= g.value <= y.high],
        events=[(x.at(e.x), e.label) for e in chart.events if x.low <= e.x <= x.high],
        marks=[(x.at(m.x), m) for m in chart.marks if x.low <= m.x <= x.high],
        label=_summary(chart, drawn),
    )
    sentences = [chart.reading, *_caveats(chart, drawn, log)]
    return figure(
        chart.title,
        f"{chart.unit}, log scale" if log else chart.unit,
        _legend(drawn) + plot + _numbers(drawn, x, chart),
        " ".join(s for s in sentences if s),
        chart.note,
    )


def figure(title: str, unit: str, body: str, how_to_read: str, note: str = "") -> str:
    """A titled figure with the sentence that says how to read it, and a remark when it has one."""
    remark = f'<p class="remark">{esc(note)}</p>' if note else ""
    return (
        f'<figure class="chart"><figcaption>{esc(title)} <small>{esc(unit)}</small></figcaption>'
        f"{body}{reading(how_to_read)}{remark}</figure>"
    )


def frame(
    shape: str,
    x_ticks: Iterable[tuple[float, str]],
    y_ticks: Iterable[tuple[float, str]],
    *,
    guides: Sequence[tuple[float, str]] = (),
    events: Sequence[tuple[float, str]] = (),
    marks: Sequence[tuple[float, Mark]] = (),
    beside: Sequence[Beside] = (),
    over: str = "",
    label: str,
) -> str:
    """Grid, guides and labels around an SVG shape. Positions are 0..1 from the left and bottom.

    `over` is HTML that lies over the shape and is not stretched.
    """
    rows, columns = list(y_ticks), list(x_ticks)
    grid = "".join(f"M0 {HEIGHT * (1 - at):.1f}H{WIDTH:g}" for at, _ in rows)
    lines = "".join(
        f'<path class="guide" d="M0 {HEIGHT * (1 - at):.1f}H{WIDTH:g}"/>' for at, _ in guides
    )
    lines += "".join(
        f'<path class="warned" d="M{WIDTH * at:.1f} 0V{HEIGHT:g}"/>' for at, _ in marks
    )
    lines += "".join(
        f'<path class="event" d="M{WIDTH * at:.1f} 0V{HEIGHT:g}"><title>{esc(text)}</title></path>'
        for at, text in events
    )
    labels = [_label("y", f"bottom:{100 * at:.2f}%", text) for at, text in rows]
    labels += [_label("x", f"left:{100 * at:.2f}%", text) for at, text in columns]
    labels += [_label("at-guide", f"bottom:{100 * at:.2f}%", text) for at, text in guides]
    labels += [_event_label(at, text) for at, text in events if text]
    labels += [
        _label(f"beside {b.side}", f"left:{100 * b.x:.2f}%;bottom:{100 * b.y:.2f}%", b.text)
        for b in beside
    ]
    chips, levels = _chips(marks)
    kind = f'plot" style="--levels:{levels}' if levels else "plot"
    return (
        f'<div class="{kind}"><svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" preserveAspectRatio="none" '
        f'role="img" aria-label="{esc(label)}"><path class="rules" d="{grid}"/>{lines}{shape}</svg>'
        f"{over}{''.join(labels)}{chips}</div>"
    )


def _chips(marks: Sequence[tuple[float, Mark]]) -> tuple[str, int]:
    """The codes above the plot, one above the other where they would meet, and how many high."""
    last: list[float] = []
    chips = ""
    for at, mark in sorted(marks, key=lambda found: found[0]):
        level = next((n for n, end in enumerate(last) if at - end >= CHIP), len(last))
        last[level : level + 1] = [at]
        chips += (
            f'<a class="chip-code" style="left:{100 * at:.2f}%;--level:{level}" '
            f'href="#{anchor(mark.code)}" title="{esc(mark.said)}">{esc(mark.code)}</a>'
        )
    return chips, len(last)


def anchor(code: str) -> str:
    """Where the Warnings section has the line of a code, for a quoted attribute."""
    return esc(f"warning-{code.lower()}")


def _label(kind: str, style: str, text: str) -> str:
    return f'<span class="{kind}" style="{style}" aria-hidden="true">{esc(text)}</span>'


def _event_label(at: float, text: str) -> str:
    # Near the right edge the label stands left of its line, inside the plot.
    style = f"left:{100 * at:.2f}%" if at < 0.8 else f"right:{100 - 100 * at:.2f}%"
    return _label("at-event", style, text)


def _prepare(series: Series) -> Drawn:
    window = smoothing_window(len(series.points)) if series.smooth else 1
    kept = thin(series.points)
    num_thinned = len(series.points) if len(kept) < len(series.points) else 0
    band = widen([b for b in series.band if math.isfinite(b[1] + b[2])])
    if window == 1:
        return Drawn(series, kept, (), band, 1, num_thinned)
    return Drawn(series, running_mean(series.points, window), kept, band, window, num_thinned)


def _extent(drawn: Drawn) -> list[float]:
    bounds = [bound for _, low, high in drawn.band for bound in (low, high)]
    return [y for _, y in (*drawn.line, *drawn.raw)] + bounds


def _draw(index: int, drawn: Drawn, x: Scale, y: Scale) -> str:
    series = drawn.series
    band = _band(drawn.band, x, y)
    raw = f'<path class="raw" d="{path(drawn.raw, x, y)}"/>' if drawn.raw else ""
    kind = "line dashed" if series.dashed else "line"
    line = f'<path class="{kind}" d="{path(drawn.line, x, y)}"/>'
    finite = [(px, py) for px, py in drawn.line if math.isfinite(py)]
    # A line of one point has no length: it shows as its mark.
    if (series.marked and len(finite) <= 60) or len(finite) == 1:
        d = "".join(f"M{WIDTH * x.at(px):.1f} {HEIGHT * (1 - y.at(py)):.1f}h0" for px, py in finite)
        line += f'<path class="mark" d="{d}"/>'
    return f'<g class="series {series.tone}" data-series="{index}">{band}{raw}{line}</g>'


def path(points: Sequence[Point], x: Scale, y: Scale) -> str:
    """The `d` of a line through the points; a y that is not finite interrupts it."""
    parts: list[str] = []
    command = "M"
    for px, py in points:
        if not math.isfinite(py):
            command = "M"
            continue
        parts.append(f"{command}{WIDTH * x.at(px):.1f} {HEIGHT * (1 - y.at(py)):.1f}")
        command = "L"
    return "".join(parts)


def _band(band: Sequence[tuple[float, float, float]], x: Scale, y: Scale) -> str:
    if len(band) < 2:
        # One evaluation: its interval is an upright stroke.
        return "".join(
            f'<path class="whisker" d="M{WIDTH * x.at(px):.1f} {HEIGHT * (1 - y.at(low)):.1f}'
            f'V{HEIGHT * (1 - y.at(high)):.1f}"/>'
            for px, low, high in band
        )
    top = path([(px, high) for px, _, high in band], x, y)
    bottom = path([(px, low) for px, low, _ in reversed(band)], x, y)
    return f'<path class="band" d="{top}L{bottom[1:]}Z"/>'


def _legend(drawn: Sequence[Drawn]) -> str:
    keys = "".join(
        f'<span class="key {d.series.tone}{" dashed" if d.series.dashed else ""}" '
        f'data-series="{i}"><i></i><bdi>{esc(d.series.name)}</bdi></span>'
        for i, d in enumerate(drawn)
        if d.line
    )
    return f'<div class="legend">{keys}</div>'


def _caveats(chart: Chart, drawn: Sequence[Drawn], log: bool) -> list[str]:
    caveats: list[str] = []
    window = max((d.window for d in drawn), default=1)
    if window > 1:
        caveats.append(f"Bold is the mean of {count(window)} logged steps, faint is each of them.")
    thinned = max((d.num_thinned for d in drawn), default=0)
    if thinned:
        caveats.append(
            f"Drawn from {count(thinned)} logged values: in each of 300 stretches the lowest and "
            "the highest are kept."
        )
    gaps = sum(not math.isfinite(y) for s in chart.series for _, y in s.points)
    if gaps:
        caveats.append(f"Values that are not finite ({count(gaps)}) are gaps.")
    if chart.log and not log:
        caveats.append("The axis is linear because a value is zero or less.")
    return caveats


def _summary(chart: Chart, drawn: Sequence[Drawn]) -> str:
    parts: list[str] = []
    for d in drawn:
        finite = [(x, y) for x, y in d.line if math.isfinite(y)]
        if finite:
            (x0, y0), (x1, y1) = finite[0], finite[-1]
            first, last = _value(y0, chart.percent), _value(y1, chart.percent)
            parts.append(f"{d.series.name} from {first} at {x0:g} to {last} at {x1:g}")
    return f"{chart.title}: {'; '.join(parts)}"


def _numbers(drawn: Sequence[Drawn], x: Scale, chart: Chart) -> str:
    """The bold lines to five digits, for the crosshair; escaped: no text ends the element."""
    lines = [
        {
            "name": d.series.name,
            "tone": d.series.tone,
            "x": [_five(px) for px, _ in d.line],
            "y": [_five(py) for _, py in d.line],
            "band": [[_five(b) for b in bounds] for bounds in d.band],
        }
        for d in drawn
    ]
    marks = [{"x": m.x, "code": m.code, "said": m.said} for m in chart.marks]
    content = json.dumps(
        {"x": [x.low, x.high], "percent": chart.percent, "lines": lines, "marks": marks},
        separators=(",", ":"),
    )
    return f'<script type="application/json">{content.replace("<", chr(92) + "u003c")}</script>'


def _five(value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.5g}") if abs(value) < 1e5 else round(value, 1)
    return int(rounded) if rounded == int(rounded) else rounded


def _labels(values: Sequence[float], as_percent: bool, log: bool) -> list[str]:
    if as_percent:
        return [percent(value) for value in values]
    return [number(value, 1) for value in values] if log else ticks(values)


def _value(value: float, as_percent: bool) -> str:
    return percent(value) if as_percent else number(value)


_UNITS: tuple[tuple[float, str], ...] = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def _step(value: float) -> str:
    for size, letter in _UNITS:
        if abs(value) >= 10 * size or (size > 1e3 and abs(value) >= size):
            return f"{value / size:g}{letter}"
    return f"{value:g}"
