"""Axes and the drawing of many points: plain functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]
"""(x, y); y is nan where the line has a gap."""

_BUCKETS = 300


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps low..high onto 0..1, by logarithm where `log`, by square root where `root`: a
    value below 0 is at 0 then, though `low` may be below it."""

    low: float
    high: float
    log: bool = False
    root: bool = False

    def at(self, value: float) -> float:
        if self.root:
            low, high = (math.copysign(math.sqrt(abs(v)), v) for v in (self.low, self.high))
            return (math.sqrt(max(0.0, value)) - low) / (high - low)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that cover low..high."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # Rounded to the step's own digits, so that 3 * 0.1 is 0.3.
    digits = max(0, 1 - math.floor(math.log10(step)))
    return [round(i * step, digits) + 0.0 for i in range(first, last + 1)]


def root_ticks(high: float) -> list[float]:
    """Nice ticks from 0 to `high`, and a fifth of the first one: half of its way by the root."""
    zero, first, *others = nice_ticks(0.0, high, about=8)
    return [t for t in (zero, first / 5, first, *others) if t <= high]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten that cover low..high, with 2 and 5 between where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if last - first <= 2:
        marks = [m * 10.0**p for p in range(first, last + 1) for m in (1, 2, 5)]
        start = max((i for i, mark in enumerate(marks) if mark <= low), default=0)
        stop = min((i for i, mark in enumerate(marks) if mark >= high), default=len(marks) - 1)
        return marks[start : stop + 1]
    stride = math.ceil((last - first) / 6)
    powers = range(first, last + stride, stride)
    return [10.0**p for p in powers]


def axis(values: Sequence[float], *, log: bool = False) -> tuple[Scale, list[float]]:
    """The scale from tick to tick that holds all finite values, and its ticks."""
    low, high = min(values), max(values)
    if low == high:
        pad = abs(low) / 2
        low, high = (low / 2, high * 2) if log else (low - pad, high + (pad or 1.0))
    ticks = log_ticks(low, high) if log else nice_ticks(low, high)
    return Scale(ticks[0], ticks[-1], log), ticks


def thin(points: Sequence[Point], buckets: int = _BUCKETS) -> list[Point]:
    """At most two points of each of `buckets` runs of neighbours: the lowest and the highest.

    What is left out lies between what is drawn, so no spike is lost. Short lines are untouched.
    """
    if len(points) <= 2 * buckets:
        return list(points)
    kept: list[Point] = []
    for b in range(buckets):
        group = points[b * len(points) // buckets : (b + 1) * len(points) // buckets]
        finite = [i for i, (_, y) in enumerate(group) if math.isfinite(y)]
        if not finite:
            kept.append(group[0])
            continue
        extremes = {min(finite, key=lambda i: group[i][1]), max(finite, key=lambda i: group[i][1])}
        kept.extend(group[i] for i in sorted(extremes))
    return kept


def widen(
    band: Sequence[tuple[float, float, float]], buckets: int = 2 * _BUCKETS
) -> list[tuple[float, float, float]]:
    """An (x, low, high) band of at most `buckets` points that holds every point of a longer one."""
    if len(band) <= buckets:
        return list(band)
    wide: list[tuple[float, float, float]] = []
    for b in range(buckets):
        group = band[b * len(band) // buckets : (b + 1) * len(band) // buckets]
        lows, highs = [low for _, low, _ in group], [high for _, _, high in group]
        wide.append((group[len(group) // 2][0], min(lows), max(highs)))
    return wide


def running_mean(points: Sequence[Point], window: int, at_most: int = 2 * _BUCKETS) -> list[Point]:
    """The mean of the finite y among the `window` points around evenly spaced ones.

    nan where none is finite. `window` is odd; at the ends the window is what there is of it.
    """
    half, num_means = window // 2, min(len(points), at_most)
    means: list[Point] = []
    for k in range(num_means):
        i = round(k * (len(points) - 1) / max(1, num_means - 1))
        around = [y for _, y in points[max(0, i - half) : i + half + 1] if math.isfinite(y)]
        means.append((points[i][0], math.fsum(around) / len(around) if around else math.nan))
    return means


def smoothing_window(num_points: int) -> int:
    """An odd number of steps to average over: about a thirtieth of the run, 1 for a short one."""
    return num_points // 30 | 1 if num_points >= 60 else 1
