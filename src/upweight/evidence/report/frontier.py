"""Reward against KL: what was gained at what distance from the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from upweight.evidence.report.charts import HEIGHT, WIDTH, Beside, figure, frame, path
from upweight.evidence.report.markup import esc, interval, number, ticks
from upweight.evidence.report.scales import Scale, axis
from upweight.stats import Interval

READING = (
    "Up is more reward, right is further from the reference: of two points at the same KL the "
    "upper one is better. Thin bars are 95 % intervals."
)

_LETTER, _LINE = 0.0075, 0.065
"""About what a letter and a line take of a plot's width and height."""

_SIDES = {"ne": (0.0, 0.6), "nw": (-1.0, 0.6), "se": (0.0, -0.6), "sw": (-1.0, -0.6)}
"""Where a text stands beside its point, in its own widths and heights: between the bars."""


@dataclass(frozen=True, slots=True)
class Spot:
    """One evaluation. A bound that is not known is nan; `said` names the spot, as in a tooltip."""

    kl: Interval
    reward: Interval
    said: str


@dataclass(frozen=True, slots=True)
class Trail:
    """The evaluations of one policy in the order they were made; not `joined`: points alone.

    `marker` is dot, ring, square or frame. `texts` are shown beside the spots where there is room,
    '' for none; the last ones come first.
    """

    name: str
    tone: str
    spots: Sequence[Spot]
    texts: Sequence[str] = ()
    marker: str = "dot"
    joined: bool = True
    dashed: bool = False


def frontier(
    title: str, trails: Sequence[Trail], unit: str, how_to_read: str, level: tuple[float, str]
) -> str:
    """The figure; '' when nothing has both a KL and a reward. `level` is a reward worth a line."""
    shown = [t for t in map(_finite, trails) if t.spots]
    if not shown:
        return ""
    spots = [spot for trail in shown for spot in trail.spots]
    x, x_ticks = _close([0.0, *(v for s in spots for v in _extent(s.kl))])
    levels = [level] if math.isfinite(level[0]) else []
    y, y_ticks = _close([v for s in spots for v in _extent(s.reward)] + [at for at, _ in levels])
    plot = frame(
        "".join(_draw(trail, x, y) for trail in shown),
        list(zip(map(x.at, x_ticks), ticks(x_ticks), strict=True)),
        list(zip(map(y.at, y_ticks), ticks(y_ticks), strict=True)),
        guides=[(y.at(at), text) for at, text in levels],
        beside=_beside(shown, x, y),
        label=f"{title}: " + "; ".join(map(_summary, shown)),
    )
    body = f'{_legend(shown)}{plot}<p class="x-title">KL, nats per answer</p>'
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
    spots = [trail.spots[i] for i in known]
    return Trail(trail.name, trail.tone, spots, texts, trail.marker, trail.joined, trail.dashed)


def _extent(found: Interval) -> list[float]:
    return [v for v in (found.value, found.low, found.high) if math.isfinite(v)]


def _draw(trail: Trail, x: Scale, y: Scale) -> str:
    line = ""
    if trail.joined and len(trail.spots) > 1:
        points = [(s.kl.value, s.reward.value) for s in trail.spots]
        line = f'<path class="line{" dashed" if trail.dashed else ""}" d="{path(points, x, y)}"/>'
    spots = "".join(_spot(spot, trail, x, y) for spot in trail.spots)
    return f'<g class="{trail.tone}">{line}{spots}</g>'


def _spot(spot: Spot, trail: Trail, x: Scale, y: Scale) -> str:
    across, up = WIDTH * x.at(spot.kl.value), HEIGHT * (1 - y.at(spot.reward.value))
    bars = ""
    if math.isfinite(spot.reward.low + spot.reward.high):
        low, high = (HEIGHT * (1 - y.at(v)) for v in (spot.reward.low, spot.reward.high))
        bars += f"M{across:.1f} {low:.1f}V{high:.1f}"
    if math.isfinite(spot.kl.low + spot.kl.high):
        left, right = (WIDTH * x.at(v) for v in (spot.kl.low, spot.kl.high))
        bars += f"M{left:.1f} {up:.1f}H{right:.1f}"
    at = f"M{across:.1f} {up:.1f}h0"
    hollow = f'<path class="hole" d="{at}"/>' if trail.marker in ("ring", "frame") else ""
    return (
        f"<g><title>{esc(f'{trail.name}, {_said(spot)}')}</title>"
        + (f'<path class="bars" d="{bars}"/>' if bars else "")
        + f'<g class="m-{trail.marker}"><path class="spot" d="{at}"/>{hollow}</g></g>'
    )


def _said(spot: Spot) -> str:
    return f"{spot.said}: reward {shown(spot.reward)} at KL {shown(spot.kl)}"


def shown(found: Interval) -> str:
    """The value with its interval where one is known: 0.41 [0.35, 0.47]."""
    known = math.isfinite(found.low + found.high)
    return number(found.value) + (f"\u00a0{interval(found.low, found.high)}" if known else "")


def _legend(trails: Sequence[Trail]) -> str:
    keys = "".join(
        f'<span class="key {t.tone}"><i class="m-{t.marker}"></i><bdi>{esc(t.name)}</bdi></span>'
        for t in trails
    )
    return f'<div class="legend">{keys}</div>'


def _summary(trail: Trail) -> str:
    first, last = trail.spots[0], trail.spots[-1]
    ends = [first] if first is last else [first, last]
    return f"{trail.name}, " + ", then ".join(map(_said, ends))


Box = tuple[float, float, float, float]


def _beside(trails: Sequence[Trail], x: Scale, y: Scale) -> list[Beside]:
    """Every text that has a free side of its spot; the others stand in tooltip and legend."""
    spots = [(x.at(s.kl.value), y.at(s.reward.value)) for t in trails for s in t.spots]
    taken: list[Box] = [(px - 0.005, px + 0.005, py - 0.01, py + 0.01) for px, py in spots]
    placed: list[Beside] = []
    wanted = [
        (rank, trail.tone, spot, text)
        for trail in trails
        for rank, (spot, text) in enumerate(
            zip(reversed(trail.spots), reversed(trail.texts), strict=False)
        )
        if text
    ]
    for _, tone, spot, text in sorted(wanted, key=lambda entry: entry[0]):
        px, py = x.at(spot.kl.value), y.at(spot.reward.value)
        for side in _SIDES:
            box = _box(px, py, side, text)
            if box[0] >= -0.02 and box[1] <= 1.03 and not any(_meet(box, b) for b in taken):
                taken.append(box)
                placed.append(Beside(px, py, side, text, tone))
                break
    return placed


def _box(px: float, py: float, side: str, text: str) -> Box:
    width = _LETTER * len(text)
    across, up = _SIDES[side]
    px += 0.008 if side.endswith("e") else -0.008
    left, middle = px + across * width, py + up * _LINE
    return left, left + width, middle - _LINE / 2, middle + _LINE / 2


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]
