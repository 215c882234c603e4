"""How a method's evaluations are said, on the page and in a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from upweight.evidence.comparison.nouns import Method, Point, Study
from upweight.evidence.report.frontier import shown
from upweight.evidence.report.markup import count, duration, number
from upweight.stats import Interval


def measured_points(method: Method) -> list[Point]:
    return [p for p in method.points if math.isfinite(p.kl + p.reward)]


def shown_kl(method: Method, point: Point) -> str:
    return shown(point.kl_interval) if method.is_path else at_most(method, point)


def at_most(method: Method, point: Point) -> str:
    return f"{'' if method.is_path else '≤ '}{number(point.kl)}"


def when(method: Method, point: Point) -> str:
    return f"{'step' if method.is_path else 'n ='} {count(point.step)}"


def in_short(study: Study) -> tuple[Sequence[str], list[Sequence[str]]]:
    """The headings and lines of a table with a line for the start and for each method: its last
    evaluation, rounded as the line that a terminal had of it, and what it cost."""
    start = Interval(study.start.reward, study.start.low, study.start.high)
    lines: list[Sequence[str]] = [("start", "", _reward(start), "0", "", "")]
    for method in study.methods:
        name = method.name if method.failed is None else f"{method.name} (failed)"
        cost = (f"{method.tokens:,}", duration(method.seconds))
        points = measured_points(method)
        if not points:
            lines.append((name, "", "–", "–", *cost))
            continue
        last = points[-1]
        most = "" if method.is_path else "≤ "
        kl = f"{most}{last.kl:.{1 if last.kl >= 10 else 2}f}"
        lines.append((name, when(method, last), _reward(last.reward_interval), kl, *cost))
    return ("method", "after", study.reward, "KL, nats", "tokens", "training"), lines


def _reward(found: Interval) -> str:
    known = math.isfinite(found.low + found.high)
    return f"{found.value:.3f}" + (f" [{found.low:.3f}, {found.high:.3f}]" if known else "")
