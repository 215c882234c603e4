from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upweight.errors import ConfigError
from upweight.training.schedules import SCHEDULES, learning_rate_factor, summed_factors

SHAPES = {
    "total_steps": st.integers(1, 300),
    "warmup": st.floats(0, 0.99),
    "schedule": st.sampled_from(sorted(SCHEDULES)),
}


def factors(total_steps: int, warmup: float, schedule: str) -> list[float]:
    return [
        learning_rate_factor(step, total_steps, warmup, schedule) for step in range(total_steps)
    ]


def test_linear_rises_by_equal_parts_to_one_and_falls_by_equal_parts() -> None:
    assert factors(9, 0.4, "linear") == pytest.approx(
        [1 / 4, 2 / 4, 3 / 4, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6], abs=1e-12
    )


def test_without_warmup_the_first_update_has_the_peak() -> None:
    assert factors(4, 0.0, "linear") == pytest.approx([1, 3 / 4, 2 / 4, 1 / 4], abs=1e-12)


def test_cosine_passes_its_known_points() -> None:
    # Five updates after the peak: x = 1/6 ... 5/6, so cos(pi x) = sqrt(3)/2, 1/2, 0, -1/2, ...
    half = math.sqrt(3) / 2
    expected = [1, (1 + half) / 2, 3 / 4, 1 / 2, 1 / 4, (1 - half) / 2]
    assert factors(6, 0.1, "cosine") == pytest.approx(expected, abs=1e-12)


def test_constant_stays_at_the_peak() -> None:
    assert factors(5, 0.3, "constant") == [0.5, 1, 1, 1, 1]


def test_a_single_update_has_the_full_rate() -> None:
    assert [factors(1, warmup, s)[0] for warmup in (0.0, 0.5) for s in SCHEDULES] == [1.0] * 6


def test_a_warmup_that_is_a_whole_number_of_updates_is_not_one_longer() -> None:
    assert math.ceil(0.07 * 100) == 8  # what binary fractions make of it
    assert factors(100, 0.07, "constant").index(1.0) == 6


@given(**SHAPES)
def test_every_update_learns_and_the_peak_is_reached(
    total_steps: int, warmup: float, schedule: str
) -> None:
    rates = factors(total_steps, warmup, schedule)
    assert all(0 < rate <= 1 for rate in rates)
    assert max(rates) == 1
    peak = rates.index(1)
    assert peak == max(1, math.ceil(round(warmup * total_steps, 9))) - 1
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


@given(**SHAPES)
def test_a_run_sums_to_half_its_updates_whatever_the_warmup(
    total_steps: int, warmup: float, schedule: str
) -> None:
    # Warmup: (w + 1) / 2. Linear and cosine after it: (total - w) / 2, by symmetry about 1/2.
    total = sum(factors(total_steps, warmup, schedule))
    peak = factors(total_steps, warmup, schedule).index(1)
    expected = (total_steps + 1) / 2 if schedule != "constant" else total_steps - peak / 2
    assert total == pytest.approx(expected, rel=1e-12)
    assert summed_factors(total_steps, warmup, schedule) == pytest.approx(total, rel=1e-12)


def test_an_unknown_schedule_is_answered_with_the_nearest() -> None:
    said = '"cosin" is not a schedule; there are: linear, cosine, constant. Did you mean cosine?'
    with pytest.raises(ConfigError, match=re.escape(said)):
        learning_rate_factor(0, 1, 0.0, "cosin")
