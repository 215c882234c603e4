from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from upweight.stats import (
    accuracy_interval,
    mean_interval,
    sign_test,
    t_quantile,
    wilson_interval,
)


def test_wilson_solves_its_own_equation():
    # The bounds are the p at which the share lies z standard errors of p away.
    z = 1.959963984540054
    interval = wilson_interval(0.78, 212)
    for bound in (interval.low, interval.high):
        assert (0.78 - bound) ** 2 == pytest.approx(z * z * bound * (1 - bound) / 212, rel=1e-9)


def test_wilson_at_the_ends_has_its_closed_form():
    # share 1: low = n / (n + z^2); share 0 mirrors it.
    z2 = 1.959963984540054**2
    top, bottom = wilson_interval(1.0, 20), wilson_interval(0.0, 20)
    assert (top.low, top.high) == (pytest.approx(20 / (20 + z2), abs=1e-12), 1.0)
    assert (bottom.low, bottom.high) == (0.0, pytest.approx(z2 / (20 + z2), abs=1e-12))


def test_a_tie_counts_one_half():
    assert accuracy_interval([1.0, 0.0, -1.0, 2.0]).value == pytest.approx(2.5 / 4)
    assert accuracy_interval([0.0] * 10).value == 0.5


def test_one_preference_per_prompt_is_plain_wilson():
    margins = [1.0] * 7 + [-1.0] * 3
    assert accuracy_interval(margins, list(range(10))) == wilson_interval(0.7, 10)
    assert accuracy_interval(margins) == wilson_interval(0.7, 10)


def test_repeating_every_preference_does_not_narrow_the_interval():
    # Five copies each: the variance between prompts is 5 g/(g-1) times the independent one, so the
    # effective number is g - 1 of g prompts.
    margins, prompts = [1.0] * 14 + [-1.0] * 6, list(range(20))
    repeated = accuracy_interval(margins * 5, prompts * 5)
    expected = wilson_interval(0.7, 19)
    assert repeated.low == pytest.approx(expected.low, abs=1e-12)
    assert repeated.high == pytest.approx(expected.high, abs=1e-12)


def test_where_all_margins_agree_each_prompt_counts_once():
    assert accuracy_interval([1.0] * 12, ["a", "b", "c"] * 4) == wilson_interval(1.0, 3)
    assert accuracy_interval([1.0, -1.0], ["a", "a"]) == wilson_interval(0.5, 1)


def test_preferences_that_balance_within_prompts_count_in_full():
    # Every prompt is half right: no variance between prompts, design effect held at 1.
    margins, prompts = [1.0, -1.0] * 8, [i // 2 for i in range(16)]
    assert accuracy_interval(margins, prompts) == wilson_interval(0.5, 16)


def test_a_margin_that_is_nan_is_our_own_bug():
    with pytest.raises(AssertionError):
        accuracy_interval([math.nan])


def test_the_bootstrap_interval_matches_the_normal_one_for_many_values():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=2000)
    interval = mean_interval(values.tolist())
    error = values.std() / math.sqrt(2000)
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert interval.high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)


def test_the_bootstrap_resamples_prompts_not_values():
    values = np.random.default_rng(2).normal(size=200).tolist()
    prompts = list(range(200))
    assert mean_interval(values * 4, prompts * 4) == mean_interval(values, prompts)
    once, four = mean_interval(values), mean_interval(values * 4)
    assert four.high - four.low < 0.7 * (once.high - once.low)


def test_prompts_of_unequal_size_weigh_by_their_values():
    values, prompts = [1.0] * 30 + [5.0] * 10, [i // 3 for i in range(30)] + list(range(10, 20))
    interval = mean_interval(values, prompts)
    # Ten prompts of three ones and ten of one five: 2, not the 3 of the prompts' means.
    assert interval.value == 2.0
    assert 1.3 < interval.low < 1.6 and 2.5 < interval.high < 3.0


def test_values_that_are_sums_of_several_are_those_one_by_one():
    # Three times prompt a: 3 tokens of 1, 2 and 3, and prompt b: 1 of 6. Over all tokens, 3.
    prompts = [f"{i}{name}" for i in range(3) for name in "aaab"]
    each = mean_interval([1, 2, 3, 6] * 3, prompts)
    assert each.value == 3 and each.low < 3 < each.high
    assert mean_interval([6, 6] * 3, list("abcdef"), sizes=[3, 1] * 3) == each
    assert mean_interval([6, 6] * 3, sizes=[3, 1] * 3) == each


def test_the_same_seed_gives_the_same_interval_and_another_does_not():
    values = np.random.default_rng(5).normal(size=50).tolist()
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3)
    assert mean_interval(values, seed=3) != mean_interval(values, seed=4)


def test_a_few_prompts_say_nothing_about_the_spread():
    values, prompts = [1.0, 2.0, 4.0] * 5, [i // 3 for i in range(15)]
    interval = mean_interval(values, prompts)
    assert math.isnan(interval.low) and math.isnan(interval.high)
    assert interval.value == pytest.approx(7 / 3)
    six = mean_interval([*values, 3.0], [*prompts, 5])
    assert six.low < six.value < six.high


@pytest.mark.parametrize(
    ("freedom", "share", "t"),
    [
        # Abramowitz and Stegun 1964, table 26.10, has three decimals; those with more by closed
        # forms: tan(pi (p - 1/2)) with one degree of freedom, (2p - 1) / sqrt(2p (1 - p)) with two.
        (1, 0.975, math.tan(math.pi * 0.475)),
        (2, 0.975, 0.95 / math.sqrt(2 * 0.975 * 0.025)),
        (5, 0.975, 2.571),
        (5, 0.9995, 6.869),
        (7, 0.975, 2.365),
        (7, 0.995, 3.499),
        (8, 0.995, 3.355),
        (15, 0.975, 2.131),
        (30, 0.995, 2.750),
        (120, 0.975, 1.980),
        (20_000, 0.975, 1.959964),
    ],
)
def test_students_quantiles_are_those_of_the_tables(freedom: int, share: float, t: float):
    assert t_quantile(share, freedom) == pytest.approx(t, abs=5e-4 if freedom > 2 else 1e-9)


def test_half_of_students_t_is_below_0():
    assert [t_quantile(0.5, n) for n in (1, 2, 7)] == pytest.approx([0, 0, 0], abs=1e-12)


def test_sign_test_is_the_binomial_tail():
    # 8 of 10: 2 * (C(10,0) + C(10,1) + C(10,2)) / 2^10 = 112/1024.
    assert sign_test(8, 2) == sign_test(2, 8) == 112 / 1024
    assert sign_test(5, 5) == 1.0
    assert sign_test(0, 0) == 1.0
    assert sign_test(20, 0) == 2 / 2**20
    assert 0 <= sign_test(4000, 1000) < 1e-300


@given(
    st.lists(
        st.tuples(st.sampled_from([-1.0, 0.0, 1.0]), st.integers(0, 5)), min_size=1, max_size=60
    )
)
def test_an_accuracy_interval_holds_its_estimate_and_stays_in_range(rows: list[tuple[float, int]]):
    interval = accuracy_interval([margin for margin, _ in rows], [prompt for _, prompt in rows])
    assert 0 <= interval.low <= interval.value <= interval.high <= 1
