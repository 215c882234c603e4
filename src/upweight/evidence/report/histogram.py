"""How many values lie where: bars on the frame of a chart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from upweight.evidence.report.charts import HEIGHT, WIDTH, figure, frame
from upweight.evidence.report.markup import count, esc, number, ticks
from upweight.evidence.report.scales import Scale, axis

_ABOUT_BINS = 40


@dataclass(frozen=True, slots=True)
class Bins:
    """Equal bins whose edges are `width` times the whole numbers from `first`.

    `num_outside` values beyond the ends are counted in the outermost bins.
    """

    first: int
    width: float
    counts: tuple[int, ...]
    num_outside: int

    def edge(self, i: int) -> float:
        # A multiple of the width, so that one edge is exactly 0.
        return (self.first + i) * self.width


def bins(values: Sequence[float]) -> Bins:
    """About 40 bins over all but the outermost half percent of finite values on either side.

    One far value would otherwise put all others into one bar.
    """
    ordered = sorted(values)
    cut = len(ordered) // 200
    low, high = min(ordered[cut], 0.0), max(ordered[-1 - cut], 0.0)
    width = (high - low) / _ABOUT_BINS or 0.05
    first, last = math.floor(low / width), max(math.ceil(high / width), 1)
    counts, num_outside = [0] * (last - first), 0
    for value in ordered:
        at = math.floor(value / width) - first
        # The bound may fall on the last edge or, by rounding, beyond it: it is not outside.
        num_outside += not (low <= value <= high or 0 <= at < len(counts))
        counts[max(0, min(at, len(counts) - 1))] += 1
    return Bins(first, width, tuple(counts), num_outside)


def histogram(title: str, unit: str, values: Sequence[float], how_to_read: str) -> str:
    """The figure: bars left of 0 in the colour of the rejected answer, right of it of the chosen.

    '' when no value is finite.
    """
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return ""
    binned = bins(finite)
    x = Scale(binned.edge(0), binned.edge(len(binned.counts)))
    y, y_ticks = axis([0.0, float(max(binned.counts))])
    x_ticks = [t for t in axis([x.low, x.high])[1] if x.low <= t <= x.high]
    bars = "".join(_bar(i, n, binned, y) for i, n in enumerate(binned.counts) if n)
    plot = frame(
        bars,
        list(zip(map(x.at, x_ticks), ticks(x_ticks), strict=True)),
        [(y.at(t), f"{t:g}") for t in y_ticks if t == int(t)],
        events=[(x.at(0.0), "")],
        label=f"{title}: {len(finite)} values, {number(min(finite))} to {number(max(finite))}",
    )
    if binned.num_outside:
        outside = count(binned.num_outside)
        how_to_read += f" Values beyond the axis ({outside}) are counted in its outermost bars."
    return figure(title, unit, plot, how_to_read)


def _bar(i: int, n: int, binned: Bins, y: Scale) -> str:
    top = HEIGHT * (1 - y.at(float(n)))
    left, right = WIDTH * i / len(binned.counts), WIDTH * (i + 1) / len(binned.counts)
    tone = "t-chosen" if binned.edge(i) >= 0 else "t-rejected"
    text = f"{number(binned.edge(i))} to {number(binned.edge(i + 1))}: {count(n)}"
    return (
        f'<path class="bar {tone}" d="M{left + 1:.1f} {HEIGHT:g}V{top:.1f}'
        f'H{right - 1:.1f}V{HEIGHT:g}Z"><title>{esc(text)}</title></path>'
    )
