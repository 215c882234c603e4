"""The evaluations of a run as points of reward and KL."""

from __future__ import annotations

import math
from collections.abc import Sequence

from upweight.evidence.records import Measurement, Records
from upweight.evidence.report.findings import judge, latest, main_set
from upweight.evidence.report.frontier import MARKERS, READING, TONES, Spot, Trail, frontier
from upweight.evidence.report.markup import count
from upweight.stats import Interval

_MOST_SETS = 5


def reward_against_kl(records: Records) -> str:
    """The frontier that training walked along, one line for each set; '' without both figures."""
    sets = sorted(records.evals, key=lambda name: name != main_set(records))[:_MOST_SETS]
    trails = [_trail(name, records.evals[name], i) for i, name in enumerate(sets)]
    trails = [trail for trail in trails if trail.spots]
    reference = [latest(records.evals[trail.name], "reference_reward") for trail in trails]
    # Sets differ in what their reference earns: a line for one would pass for all.
    level = reference[0].value if len(trails) == 1 and reference[0] else math.nan
    named = judge(records)
    return frontier(
        "Reward against KL",
        trails,
        f"mean reward{f' ({named})' if named else ''} of sampled answers",
        f"{READING} The line follows the evaluations in the order of their steps: where it turns "
        "down or only runs to the right, further training bought distance and no reward. A "
        "sampled KL can fall below 0 where the KL is small.",
        (level, "the reference's answers"),
    )


def _trail(name: str, rows: Sequence[Measurement], index: int) -> Trail:
    both = [row for row in rows if {"kl", "reward"} <= row.values.keys()]
    return Trail(
        name,
        TONES[index],
        [Spot(_interval(r, "kl"), _interval(r, "reward"), f"step {count(r.step)}") for r in both],
        [f"step {count(row.step)}" for row in both],
        MARKERS[index],
    )


def _interval(row: Measurement, key: str) -> Interval:
    low, high = (row.values.get(f"{key}_{end}", math.nan) for end in ("low", "high"))
    return Interval(row.values[key], low, high)
