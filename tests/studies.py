"""Comparisons made by hand: methods, their evaluations, and studies of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from upweight.evidence.comparison import Claim, Method, Point, Start, Study

MANY = 10_000
"""So many prompts that Student's distribution is the normal one, to a 5,000th."""

START = Start(0.2, 0.15, 0.25, MANY)


def point(
    step: int, kl: float, reward: float, half: float = 0.05, kl_half: float = 0.1, **rest: Any
) -> Point:
    kl, reward = float(kl), float(reward)
    kls = {"kl_low": kl - kl_half, "kl_high": kl + kl_half}
    rewards = {"reward_low": reward - half, "reward_high": reward + half}
    base = {"step": step, "kl": kl, "reward": reward, "length": 30.0 + step, "num_prompts": MANY}
    return Point(**base | kls | rewards | rest)


def method(objective: str, *points: Point, **rest: Any) -> Method:
    base: dict[str, Any] = {
        "name": objective.upper(), "objective": objective, "note": f"{objective} note",
        "seconds": 61.0, "tokens": 1234567, "points": points, "failed": None,
    }  # fmt: skip
    return Method(**base | rest)


def line(objective: str, slope: float, *kls: float, half: float = 0.01) -> Method:
    """A frontier that rises from the start by `slope` a nat, at KLs that are known exactly."""
    found = (point(i, kl, 0.2 + slope * kl, half, 0) for i, kl in enumerate(kls, start=1))
    return method(objective, *found)


def study(*methods: Method, **rest: Any) -> Study:
    base: dict[str, Any] = {
        "title": "On questions", "reward": "vader", "start": START, "methods": methods,
        "budget": "1000 steps each", "machine": "two cores", "seconds": 7384.0,
        "claim": Claim(None, "Not shown."),
    }  # fmt: skip
    return Study(**base | rest)


def named(name: str, found: Method) -> Method:
    return replace(found, name=name)
