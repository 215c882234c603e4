"""Reward against KL: what was gained at what distance from the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from upweight.evidence.report.charts import HEIGHT, WIDTH, Beside, figure, frame, path
from upweight.evidence.report.markup import esc, interval, number, ticks
from upweight.evidence.report.scales import Scale, axis, root_ticks
from upweight.stats import Interval

READING = (
    "Up is more reward, right is further from the reference: of two points at the same KL the "
    "upper one is better. The axis goes by the square root of KL, in which rewards rise about "
    "straight; what is estimated below 0, which no KL is, stands at 0. Thin bars are 95 % "
    "intervals."
)

TONES = ("t-1", "t-2", "t-3", "t-4", "t-5", "t-6", "t-7", "t-8")
"""Classes of style.css whose colours are told apart with any colour blindness."""

MARKERS = ("dot", "square", "triangle", "diamond", "ring", "cross", "frame", "wedge", "plus")
"""Shapes of style.css. Their number shares no factor with that of the tones: one tone and one
marker go together once in 72."""

_LETTER, _LINE = 0.0075, 0.06
"""About what a letter and a line take of a plot's width and height."""

_SIDES = {"ne": (0.0, 0.6), "nw": (-1.0, 0.6), "se": (0.0, -0.6), "sw": (-1.0, -0.6)}
"""Where a text stands beside its point, in its own widths and heights: between the bars."""


@dataclass(frozen=True, slots=True)
class Spot:
    """One evaluation. A bound that is not known is nan; `said` names the spot, as in a tooltip. Its
    KL is an estimate, or, `at_most`, a bound of it."""

    kl: Interval
    reward: Interval
    said: str
    at_most: bool = False


@dataclass(frozen=True, slots=True)
class Trail:
    """The evaluations of one policy in the order they were made; not `joined`: points alone.

    `marker` is one of MARKERS, or star. `texts` are shown beside the spots where there is room, ''
    for none; the last ones come first. `line` is what is joined where that is not all spots in
    their order, as where it begins in one that another trail marks.
    """

    name: str
    tone: str
    spots: Sequence[Spot]
    texts: Sequence[str] = ()
    marker: str = "dot"
    joined: bool = True
    dashed: bool = False
    line: Sequence[Spot] | None = None

    @property
    def drawn(self) -> Sequence[Spot]:
        """What is joined."""
        if not self.joined:
            return ()
        return self.spots if self.line is None else self.line


def frontier(
    title: str, trails: Sequence[Trail], unit: str, how_to_read: str, level: tuple[float, str]
) -> str:
    """The figure; '' when nothing has both a KL and a reward. `level` is a reward worth a line."""
    shown = [t for t in map(_finite, trails) if t.spots]
    if not shown:
        return ""
    spots = [spot for trail in shown for spot in (*trail.spots, *trail.drawn)]
    furthest = max((v for s in spots for v in _extent(s.kl)), default=0.0)
    # At both ends 0.04 of the axis beyond the values, which by the root is the square of it.
    reach = furthest if furthest > 0 else 1.0
    x = Scale(-(0.04**2) * reach, 1.04**2 * reach, root=True)
    x_ticks = root_ticks(x.high)
    levels = [level] if math.isfinite(level[0]) else []
    y, y_ticks = _close([v for s in spots for v in _extent(s.reward)] + [at for at, _ in levels])
    plot = frame(
        "".join(_draw(trail, x, y) for trail in shown),
        [(x.at(t), f"{t:g}") for t in x_ticks],
        list(zip(map(y.at, y_ticks), ticks(y_ticks), strict=True)),
        guides=[(y.at(at), text) for at, text in levels],
        over="".join(_marks(trail, x, y) for trail in shown),
        beside=_beside(shown, x, y),
        label=f"{title}: " + "; ".join(map(_summary, shown)),
    )
    body = f'{_legend(shown)}{plot}<p class="x-title">KL, nats per answer, by its square root</p>'
    return f'<div class="wide tall">{figure(title, unit, body, how_to_read)}</div>'


def _close(values: Sequence[float]) -> tuple[Scale, list[float]]:
    """An axis that ends just beyond its values, and the ticks on it: intervals reach far enough."""
    wide, marks = axis(values)
    low, high = min(values), max(values)
    if low == high:
        return wide, marks
    around = Scale(low - 0.04 * (high - low), high + 0.04 * (high - low))
    return around, [t for t in marks if around.low <= t <= around.high]


def _finite(trail: Trail) -> Trail:
    known = [i for i, s in enumerate(trail.spots) if math.isfinite(s.kl.value + s.reward.value)]
    texts = [trail.texts[i] for i in known] if trail.texts else []
    return replace(trail, spots=[trail.spots[i] for i in known], texts=texts)


def _extent(found: Interval) -> list[float]:
    return [v for v in (found.value, found.low, found.high) if math.isfinite(v)]


def _draw(trail: Trail, x: Scale, y: Scale) -> str:
    line = ""
    if len(trail.drawn) > 1:
        points = [(s.kl.value, s.reward.value) for s in trail.drawn]
        line = f'<path class="line{" dashed" if trail.dashed else ""}" d="{path(points, x, y)}"/>'
    bars = "".join(_bars(spot, x, y) for spot in trail.spots)
    bars = f'<path class="bars" d="{bars}"/>' if bars else ""
    return f'<g class="{trail.tone}">{bars}{line}</g>'


def _bars(spot: Spot, x: Scale, y: Scale) -> str:
    across, up = WIDTH * x.at(spot.kl.value), HEIGHT * (1 - y.at(spot.reward.value))
    bars = ""
    if math.isfinite(spot.reward.low + spot.reward.high):
        low, high = (HEIGHT * (1 - y.at(v)) for v in (spot.reward.low, spot.reward.high))
        bars += f"M{across:.1f} {low:.1f}V{high:.1f}"
    if math.isfinite(spot.kl.low + spot.kl.high):
        left, right = (WIDTH * x.at(v) for v in (spot.kl.low, spot.kl.high))
        bars += f"M{left:.1f} {up:.1f}H{right:.1f}"
    return bars


def _marks(trail: Trail, x: Scale, y: Scale) -> str:
    """The spots, which keep their shape whatever the plot is stretched to; a line's last is
    larger."""
    ends = len(trail.spots) - 1 if trail.joined else -1
    kind = f"spot m-{trail.marker} {trail.tone}"
    return "".join(
        f'<i class="{kind}{" last" if i == ends else ""}" style="left:'
        f'{100 * x.at(spot.kl.value):.2f}%;bottom:{100 * y.at(spot.reward.value):.2f}%" '
        f'title="{esc(f"{trail.name}, {_said(spot)}")}"></i>'
        for i, spot in enumerate(trail.spots)
    )


def _said(spot: Spot) -> str:
    kl = f"≤ {number(spot.kl.value)}" if spot.at_most else shown(spot.kl)
    return f"{spot.said}: reward {shown(spot.reward)} at KL {kl}"


def shown(found: Interval) -> str:
    """The value with its interval where one is known: 0.41 [0.35, 0.47]."""
    known = math.isfinite(found.low + found.high)
    return number(found.value) + (f"\u00a0{interval(found.low, found.high)}" if known else "")


def _legend(trails: Sequence[Trail]) -> str:
    keys = "".join(
        f'<span class="key {t.tone}"><i class="spot m-{t.marker}"></i>'
        f"<bdi>{esc(t.name)}</bdi></span>"
        for t in trails
    )
    return f'<div class="legend">{keys}</div>'


def _summary(trail: Trail) -> str:
    first, last = trail.spots[0], trail.spots[-1]
    ends = [first] if first is last else [first, last]
    return f"{trail.name}, " + ", then ".join(map(_said, ends))


Box = tuple[float, float, float, float]


def _beside(trails: Sequence[Trail], x: Scale, y: Scale) -> list[Beside]:
    """Every text that has a free side of its spot, one without lines if there is one; the others
    stand in tooltip and legend."""

    def place(spot: Spot) -> tuple[float, float]:
        return x.at(spot.kl.value), y.at(spot.reward.value)

    spots = [place(s) for t in trails for s in t.spots]
    taken: list[Box] = [(px - 0.008, px + 0.008, py - 0.02, py + 0.02) for px, py in spots]
    lines = [p for t in trails for a, b in pairwise(t.drawn) for p in _along(place(a), place(b))]
    placed: list[Beside] = []
    wanted = [
        (rank, spot, text)
        for trail in trails
        for rank, (spot, text) in enumerate(
            zip(reversed(trail.spots), reversed(trail.texts), strict=False)
        )
        if text
    ]
    for _, spot, text in sorted(wanted, key=lambda entry: entry[0]):
        px, py = place(spot)
        sides = {side: _box(px, py, side, text) for side in _SIDES}
        free = {
            side: sum(_holds(box, point) for point in lines)
            for side, box in sides.items()
            if box[0] >= -0.02 and box[1] <= 1.03 and not any(_meet(box, b) for b in taken)
        }
        if free:
            side = min(free, key=free.__getitem__)
            taken.append(sides[side])
            placed.append(Beside(px, py, side, text))
    return placed


def _along(a: tuple[float, float], b: tuple[float, float]) -> list[tuple[float, float]]:
    """Places on a line, closer together than a text is high."""
    return [(a[0] + i / 40 * (b[0] - a[0]), a[1] + i / 40 * (b[1] - a[1])) for i in range(41)]


def _holds(box: Box, point: tuple[float, float]) -> bool:
    return box[0] < point[0] < box[1] and box[2] < point[1] < box[3]


def _box(px: float, py: float, side: str, text: str) -> Box:
    width = _LETTER * len(text)
    across, up = _SIDES[side]
    px += 0.008 if side.endswith("e") else -0.008
    left, middle = px + across * width, py + up * _LINE
    return left, left + width, middle - _LINE / 2, middle + _LINE / 2


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]
