"""Whether DPO's frontier of reward and KL is not below PPO's, as far as the intervals tell."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from upweight.evidence.comparison.nouns import Claim, Method, Pair, Start, widening
from upweight.evidence.report.markup import interval, number, plural
from upweight.stats import Interval


@dataclass(frozen=True, slots=True)
class Knot:
    """A place of a frontier: the reward with its interval at a KL, in nats, and the bounds of that
    where it is estimated."""

    kl: float
    reward: Interval
    kl_low: float
    kl_high: float


@dataclass(frozen=True, slots=True)
class Gap:
    """DPO's reward minus PPO's at one KL."""

    kl: float
    gap: Interval


@dataclass(frozen=True, slots=True)
class Facing:
    """The frontiers of a run of DPO and one of PPO, their differences where both reach, and how far
    below DPO's may lie there for it to be called not below."""

    dpo: Method
    ppo: Method
    ours: Sequence[Knot]
    theirs: Sequence[Knot]
    gaps: Sequence[Gap]
    margin: float


MARGIN = 0.1
"""Of what the better of both gains where they are compared: who gains nine tenths of what another
method gains, at the same KL, has not chosen wrongly. A share and no number, since rewards have no
unit in common. Of a gain: where both lose reward, the range of what they lost is no room to lose
more."""


def claim(methods: Sequence[Method], start: Start | None = None) -> Claim:
    """Whether DPO's frontier is not below PPO's at equal KL, and the sentence that says so.

    Both frontiers go through their evaluations by KL, straight in its square root, from the start
    at KL 0 if it is given; they are compared where either has an evaluation, within the KL that
    both reach. False: somewhere below, by the whole interval of the difference. True: nowhere
    below by more than MARGIN, by the whole interval at every place. None: neither is shown, though
    one may be above at some KL, or neither gains anything, or there is nothing to compare. Of
    several runs of DPO or PPO every pair is compared: False if one is, True if all are that can be
    compared.

    The intervals hold at all places of all pairs together, in 95 of 100 comparisons, also where few
    prompts were asked. They have in them what the sampling of KL makes uncertain, as far as a
    frontier's slope turns it into reward.
    """
    of = {name: _of(methods, name.lower()) for name in ("DPO", "PPO")}
    for name, found in of.items():
        if not found:
            return Claim(None, f"DPO and PPO are not compared: {_why_not(methods, name)}.")
    facing = [_facing(dpo, ppo, start) for dpo in of["DPO"] for ppo in of["PPO"]]
    places = sum(len(each.gaps) for each in facing)
    num_prompts = _fewest_asked([*of["DPO"], *of["PPO"]], start)
    pairs = tuple(_of_two(each, widening(places, num_prompts)) for each in facing)
    if len(pairs) == 1:
        return Claim(pairs[0].holds, _alone(pairs[0]), pairs, places, num_prompts)
    shown = {pair.holds for pair in pairs if pair.compared}
    holds = False if False in shown else (True if shown == {True} else None)
    return Claim(holds, _of_all(pairs), pairs, places, num_prompts)


def _fewest_asked(methods: Sequence[Method], start: Start | None) -> int:
    """The prompts of the evaluation that has the fewest: no interval is known better."""
    asked = [point.num_prompts for method in methods for point in method.points]
    return min(asked if start is None else [*asked, start.num_prompts])


def _alone(pair: Pair) -> str:
    """The sentence where DPO and PPO were run once each."""
    if not pair.compared:
        return f"DPO and PPO are {pair.said}."
    return f"DPO's frontier is {pair.said}."


def _of_all(pairs: Sequence[Pair]) -> str:
    """The sentence over several pairs, in which each is counted."""
    found = [pair.way for pair in pairs if pair.compared]
    left = len(pairs) - len(found)
    if not found:
        return f"DPO and PPO are not compared: no KL was reached by both in any of {left} pairs."
    way, *others = [way for way in _WHOSE if way in found]
    rest = "".join(f", {way} in {found.count(way)}" for way in others)
    besides = f" {left} more could not be compared." if left else ""
    return (
        f"DPO's frontier is {_WHOSE[way]} in {found.count(way)} of "
        f"{plural(len(found), 'comparison')}{rest}.{besides}"
    )


_WHOSE = {
    "below": "below PPO's at equal KL",
    "not below": "not below PPO's at equal KL",
    "above at some KL": "above PPO's at some KL, and not shown either way elsewhere,",
    "without a gain": "without a gain, as is PPO's,",
    "not shown to differ": "not shown to differ from PPO's at equal KL",
}
"""What a pair shows, and how a sentence over several goes on with it."""


def _facing(dpo: Method, ppo: Method, start: Start | None) -> Facing:
    ours, theirs = knots(dpo, start), knots(ppo, start)
    gaps = compared(_with_kl(ours), _with_kl(theirs))
    low = max(ours[0].kl, theirs[0].kl)
    places = [low, *(gap.kl for gap in gaps)]
    gains = [at(f, kl).value - at(f, low).value for f in (ours, theirs) for kl in places]
    return Facing(dpo, ppo, ours, theirs, gaps, MARGIN * max(gains))


def _of_two(facing: Facing, times: float) -> Pair:
    """What a pair shows by intervals that are `times` as wide as each for itself."""
    names, ours, theirs = (facing.dpo.name, facing.ppo.name), facing.ours, facing.theirs
    if not facing.gaps:
        said = f"not compared: no KL was reached by both (DPO {_reach(ours)}, PPO {_reach(theirs)})"
        return Pair(*names, False, None, said)
    gaps = [Gap(each.kl, _wider(each.gap, times)) for each in facing.gaps]
    holds, in_part, said = _said(gaps, max(ours[0].kl, theirs[0].kl), facing.margin)
    return Pair(*names, True, holds, said, in_part, gained=facing.margin > 0)


def _wider(found: Interval, times: float) -> Interval:
    low, high = found.value - found.low, found.high - found.value
    return Interval(found.value, found.value - times * low, found.value + times * high)


def _said(gaps: Sequence[Gap], low: float, margin: float) -> tuple[bool | None, bool, str]:
    """Whether the claim holds, whether it is shown in part, and what the differences show, as the
    end of "DPO's frontier is ..."."""
    where = f"between KL {number(low)} and {number(gaps[-1].kl)} nats"
    below = [g for g in gaps if g.gap.high < 0]
    above = [g for g in gaps if g.gap.low > 0]
    best = max(above, key=lambda g: g.gap.value, default=None)
    if below:
        worst = min(below, key=lambda g: g.gap.value)
        crossing = ""
        if best is not None:
            crossing = f". They cross: at KL {number(best.kl)} it is {_by(best)} higher"
        return (
            False,
            False,
            f"below PPO's: at KL {number(worst.kl)} its reward is {_by(worst)} lower{crossing}",
        )
    widest = max(gaps, key=lambda g: abs(g.gap.value))
    if not margin > 0:
        return (
            None,
            False,
            f"without a gain, as is PPO's: {where} neither earns more than where both begin, so "
            f"that neither is worth its KL; the largest difference in reward is {_signed(widest)}, "
            f"at KL {number(widest.kl)}",
        )
    least = min(gaps, key=lambda g: g.gap.low)
    allowed = f"{number(margin)} (a tenth of what the better gains there)"
    if all(g.gap.low > -margin for g in gaps):
        higher = ""
        if best is not None:
            higher = f" its reward is higher by up to {_by(best)}, at KL {number(best.kl)}, and"
        nowhere = f"nowhere lower by more than {allowed}" if least.gap.low < 0 else "nowhere lower"
        its = "" if higher else " its reward is"
        return True, False, f"not below PPO's at equal KL: {where}{higher}{its} {nowhere}"
    if best is not None:
        return (
            None,
            True,
            "above PPO's at some KL, and not shown either way elsewhere: at KL "
            f"{number(best.kl)} its reward is {_by(best)} higher; at KL {number(least.kl)} the "
            f"difference is {_signed(least)}, and that it is lower by more than {allowed} is not "
            "ruled out",
        )
    return (
        None,
        False,
        f"not shown to differ from PPO's at equal KL: {where} the largest difference in reward is "
        f"{_signed(widest)}, at KL {number(widest.kl)}",
    )


def _by(found: Gap) -> str:
    """The size of a difference whose sign is said in words."""
    low, high = sorted((abs(found.gap.low), abs(found.gap.high)))
    return f"{number(abs(found.gap.value))} {interval(low, high)}"


def _signed(found: Gap) -> str:
    if not math.isfinite(found.gap.low + found.gap.high):
        return f"{number(found.gap.value)} (no interval is known)"
    return f"{number(found.gap.value)} {interval(found.gap.low, found.gap.high)}"


def _of(methods: Sequence[Method], objective: str) -> list[Method]:
    return [m for m in methods if m.objective == objective and m.failed is None and _known(m)]


def _why_not(methods: Sequence[Method], name: str) -> str:
    tried = [m for m in methods if m.objective == name.lower()]
    failed = next((m.failed for m in tried if m.failed is not None), None)
    if failed is not None:
        return f"{name} failed ({failed.rstrip('.')})"
    return f"{name} has no evaluation with reward and KL" if tried else f"{name} was not run"


def _reach(found: Sequence[Knot]) -> str:
    return f"from {number(found[0].kl)} to {number(found[-1].kl)} nats"


def _known(method: Method) -> list[Knot]:
    known = [p for p in method.points if math.isfinite(p.kl + p.reward)]
    return [Knot(p.kl, p.reward_interval, p.kl_low, p.kl_high) for p in known]


def knots(method: Method, start: Start | None) -> list[Knot]:
    """The frontier by ascending KL. Evaluations of one KL are averaged.

    With a start, what is estimated at or below its KL of 0 is left to it: it was measured there.
    """
    found = _known(method)
    if start is not None:
        origin = Knot(0.0, Interval(start.reward, start.low, start.high), 0.0, 0.0)
        found = [origin, *(knot for knot in found if knot.kl > 0)]
    by_kl: dict[float, list[Knot]] = {}
    for knot in found:
        by_kl.setdefault(knot.kl, []).append(knot)
    return [_mean(by_kl[kl]) for kl in sorted(by_kl)]


def _mean(found: Sequence[Knot]) -> Knot:
    n = len(found)
    reward = Interval(
        math.fsum(k.reward.value for k in found) / n,
        math.fsum(k.reward.low for k in found) / n,
        math.fsum(k.reward.high for k in found) / n,
    )
    low, high = (
        math.fsum(b) / n for b in zip(*((k.kl_low, k.kl_high) for k in found), strict=True)
    )
    return Knot(found[0].kl, reward, low, high)


def _with_kl(frontier: Sequence[Knot]) -> list[Knot]:
    """The frontier with intervals of its rewards that have those of its KLs in them.

    An evaluation whose KL is further than was estimated, by so many units of its root, earned at
    the estimate less than was measured, by so many times the frontier's slope (the delta method).
    The two errors are taken for independent: answers that went further than others mostly earned
    more than others too, and then they cancel in part.
    """
    slope = _slope(frontier)
    return [replace(knot, reward=_shifted(knot, slope)) for knot in frontier]


def _shifted(knot: Knot, slope: float) -> Interval:
    here, value = distance(knot.kl), knot.reward.value
    nearer = slope * (here - distance(knot.kl_low))
    further = slope * (distance(knot.kl_high) - here)
    down, up = (further, nearer) if slope > 0 else (nearer, further)
    low, high = value - knot.reward.low, knot.reward.high - value
    return Interval(value, value - math.hypot(low, down), value + math.hypot(high, up))


def _slope(frontier: Sequence[Knot]) -> float:
    """Reward for a unit of the root of KL, over the whole frontier by least squares: from one
    evaluation to the next it would be mostly noise. 0 where there is only one."""
    roots = [distance(knot.kl) for knot in frontier]
    mean = math.fsum(roots) / len(roots)
    spread = math.fsum((root - mean) ** 2 for root in roots)
    if not spread > 0:
        return 0.0
    pairs = zip(roots, frontier, strict=True)
    return math.fsum((root - mean) * knot.reward.value for root, knot in pairs) / spread


def distance(kl: float) -> float:
    """sqrt(KL), with the sign of a KL that was estimated below 0.

    Gao, Schulman and Hilton 2022 (arXiv:2210.10760) fit d (a - b d) to the reward that best of n
    gains and d (a - b log d) to RL's, d being this root: nearly straight in d, and bending down.
    Against KL itself both are steep at 0, and a chord lies far below, the more so the fewer
    evaluations there are.
    """
    return math.copysign(math.sqrt(abs(kl)), kl)


def at(frontier: Sequence[Knot], kl: float) -> Interval:
    """Reward and bounds at a KL that the frontier reaches, on the line between its neighbours in
    the square root of KL."""
    i = min(bisect_right(frontier, kl, key=lambda knot: knot.kl), len(frontier) - 1)
    a, b = frontier[max(0, i - 1)], frontier[i]
    left, here, right = distance(a.kl), distance(kl), distance(b.kl)
    share = (here - left) / (right - left) if right > left else 0.0
    share = min(1.0, max(0.0, share))
    return Interval(
        _between(a.reward.value, b.reward.value, share),
        _between(a.reward.low, b.reward.low, share),
        _between(a.reward.high, b.reward.high, share),
    )


def _between(x: float, y: float, share: float) -> float:
    # The ends themselves: a bound that is not known at one end says nothing of the other.
    return x + share * (y - x) if 0 < share < 1 else (x if share == 0 else y)


def compared(ours: Sequence[Knot], theirs: Sequence[Knot]) -> list[Gap]:
    """The difference at every evaluation of either within the KL that both reach, by KL.

    Where both are at one start there is no difference to measure. Between two evaluations the
    difference is a line in the square root of KL, so that none is larger than those at the ends.
    """
    low = max(ours[0].kl, theirs[0].kl)
    high = min(ours[-1].kl, theirs[-1].kl)
    places = sorted({k.kl for k in (*ours, *theirs) if low <= k.kl <= high} | {low, high})
    if low > high or (ours[0] == theirs[0] and low == high):
        return []
    same = ours[0] == theirs[0]
    return [
        Gap(kl, difference(at(ours, kl), at(theirs, kl)))
        for kl in places
        if not (same and kl == low)
    ]


def difference(a: Interval, b: Interval) -> Interval:
    """a - b of independent estimates, from their intervals: Zou and Donner 2008, equation 3.

    A difference that lies inside both intervals lies inside this one.
    """
    value = a.value - b.value
    low = value - math.hypot(a.value - a.low, b.high - b.value)
    high = value + math.hypot(a.high - a.value, b.value - b.low)
    return Interval(value, low, high)
