"""How the learning rate moves over a run: pure functions of the update's number."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from upweight.errors import ConfigError, nearest

SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
    "constant": lambda x: 1.0,
}
"""Factor after the peak, of x: 0 at the peak, 1 at the update after the last."""


def learning_rate_factor(step: int, total_steps: int, warmup: float, schedule: str) -> float:
    """The share of the peak learning rate for update `step` (from 0) of `total_steps`.

    With w = max(1, ceil(warmup * total_steps)) updates up to and including the peak:

        (step + 1) / w                                     for step < w
        f((step + 1 - w) / (total_steps + 1 - w))          after that

    where f(x) is 1 - x (linear), (1 + cos(pi x)) / 2 (cosine) or 1 (constant). Every factor is
    above 0 and update w - 1 has factor 1: the zeros lie at the updates before the first and after
    the last, so that none is spent on a rate of 0. Linear and cosine therefore both sum to
    (total_steps + 1) / 2, whatever the warmup.

    Raises ConfigError for a schedule that is not in SCHEDULES.
    """
    if schedule not in SCHEDULES:
        raise ConfigError(
            f'"{schedule}" is not a schedule; there are: {", ".join(SCHEDULES)}.'
            f"{nearest(schedule, SCHEDULES)}"
        )
    assert 0 <= step < total_steps, f"update {step} of a run of {total_steps}"
    assert 0.0 <= warmup < 1.0, f"warmup is a share of the steps, not {warmup}"
    num_warmup = _num_warmup(total_steps, warmup)
    if step < num_warmup:
        return (step + 1) / num_warmup
    return SCHEDULES[schedule]((step + 1 - num_warmup) / (total_steps + 1 - num_warmup))


def summed_factors(total_steps: int, warmup: float, schedule: str) -> float:
    """The sum of learning_rate_factor over a run. The w updates of the warmup come to (w + 1) / 2;
    what falls afterwards is one half on average, by its symmetry."""
    if schedule != "constant":
        return (total_steps + 1) / 2
    return total_steps - (_num_warmup(total_steps, warmup) - 1) / 2


def _num_warmup(total_steps: int, warmup: float) -> int:
    # Without the rounding, binary fractions add an update: 0.07 * 100 is a little above 7.
    return max(1, math.ceil(round(warmup * total_steps, 9)))
