"""What is said of DPO's frontier and PPO's is no more than the intervals show."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest

import studies
from studies import MANY, START, line, method, named
from upweight.evidence.comparison import Claim, Method, Point, Start, claim
from upweight.evidence.comparison.claim import _with_kl, at, compared, difference, knots
from upweight.evidence.comparison.nouns import widening
from upweight.evidence.report.markup import number
from upweight.stats import Interval, mean_interval

point = partial(studies.point, kl_half=0)
"""Of a KL that is known exactly: what a test says of rewards is not about it."""


def told(methods: Sequence[Method], start: Start | None = None) -> tuple[bool | None, str]:
    found = claim(methods, start)
    return found.holds, found.said


def test_a_higher_frontier_is_not_below():
    # At KL 2, which both reach: 0.4 against 0.3, each +-0.01. KL 1 is looked at too, and two
    # intervals that hold together are z(1 - 0.05/4) / z(1 - 0.05/2) = 2.2414 / 1.9600 times as
    # wide: 1.1436 sqrt(2) 0.01 = 0.0162 to each side.
    holds, said = told([line("dpo", 0.1, 1, 2), line("ppo", 0.05, 2, 3)], START)
    assert holds is True
    assert said == (
        "DPO's frontier is not below PPO's at equal KL: between KL 0 and 2.00 nats its reward is "
        "higher by up to 0.100 [0.0838, 0.116], at KL 2.00, and nowhere lower."
    )


def test_a_lower_frontier_is_below():
    holds, said = told([line("dpo", 0.05, 1), line("ppo", 0.1, 4)], START)
    assert holds is False
    # By the root PPO at 1 lies amid start (0.2 +-0.05) and 4 (0.6 +-0.01): 0.4 +-0.03, and DPO has
    # 0.25 +-0.01 there. It is the one place, with nothing to widen for.
    half = math.hypot(0.01, 0.03)
    bounds = f"[{number(0.15 - half)}, {number(0.15 + half)}]"
    assert said == f"DPO's frontier is below PPO's: at KL 1.00 its reward is 0.150 {bounds} lower."


def test_frontiers_that_cross_are_below_and_said_to_cross():
    dpo = method("dpo", point(1, 1, 0.5, 0.01), point(2, 2, 0.5, 0.01))
    ppo = method("ppo", point(1, 1, 0.4, 0.01), point(2, 2, 0.6, 0.01))
    holds, said = told([dpo, ppo], START)
    assert holds is False and "They cross: at KL 1.00 it is 0.100" in said


def test_a_difference_inside_both_intervals_is_not_shown():
    wide = {"half": 0.2}
    holds, said = told([line("dpo", 0.1, 1, 2, **wide), line("ppo", 0.05, 2, **wide)], START)
    assert holds is None
    assert said.startswith("DPO's frontier is not shown to differ from PPO's at equal KL")
    # sqrt(2) 0.2 = 0.283 to each side, by 1.1438 for the two places (Student's, of 10,000 prompts);
    # by 1.0002 for the one below.
    assert "is 0.100 [−0.224, 0.424], at KL 2.00" in said
    assert told([line("dpo", 0.1, 1), line("ppo", 0.1, 1)], START)[0] is None
    holds, said = told([line("dpo", 0.05, 2, **wide), line("ppo", 0.1, 2, **wide)], START)
    assert holds is None and "is −0.100 [−0.383, 0.183], at KL 2.00" in said


def test_without_intervals_nothing_is_shown():
    nan = {"reward_low": math.nan, "reward_high": math.nan}
    dpo = method("dpo", point(1, 1.0, 0.9, **nan))
    holds, said = told([dpo, line("ppo", 0.1, 1)], START)
    assert holds is None and "no interval is known" in said


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ([], "DPO was not run"),
        ([line("dpo", 0.1, 1)], "PPO was not run"),
        ([line("dpo", 0.1, 1), method("ppo")], "PPO has no evaluation with reward and KL"),
        ([line("dpo", 0.1, 1), method("ppo", point(1, 1, 1), failed="Nan.")], "PPO failed (Nan)"),
        ([line("dpo", 0.1, 1), line("ppo", 0.1, -0.5)], "no KL was reached by both"),
    ],
)
def test_what_cannot_be_compared_is_said(methods: list[Method], said: str):
    holds, found = told(methods, START)
    assert holds is None and said in found


def test_without_a_start_only_the_kl_that_both_cover_is_compared():
    dpo = method("dpo", point(1, 1, 0.9, 0.01), point(2, 2, 0.9, 0.01))
    ppo = method("ppo", point(1, 1.5, 0.1, 0.01), point(2, 9, 0.95, 0.01))
    holds, said = told([dpo, ppo])
    assert holds is True and "between KL 1.50 and 2.00 nats" in said
    assert "share" not in said and told([dpo, method("ppo", point(1, 5, 0.1))])[0] is None


def test_of_several_runs_of_an_objective_every_pair_is_compared_in_whatever_order():
    tuned = replace(line("ppo", 0.3, 2), name="PPO, true reward")
    dpo, low = line("dpo", 0.1, 2), line("ppo", 0.05, 2)
    assert told([dpo, low], START)[0] is True
    for methods in ([dpo, tuned, low], [low, tuned, dpo]):
        found = claim(methods, START)
        assert found.holds is False
        assert found.said == (
            "DPO's frontier is below PPO's at equal KL in 1 of 2 comparisons, not below in 1."
        )
        below, above = sorted(found.lines, key=lambda said: "not below" in said)
        assert below.startswith("DPO against PPO, true reward: below PPO's: at KL 2.00 its reward")
        assert above.startswith("DPO against PPO: not below PPO's at equal KL: between KL 0 and")
    short = replace(line("dpo", 0.1, 2), name="dpo, never asked", points=())
    assert told([short, dpo, low], START)[0] is True


def test_the_verdict_over_several_pairs_counts_each_and_holds_only_where_all_do():
    dpo, low = line("dpo", 0.1, 2), line("ppo", 0.05, 2)
    wide = named("wide", line("ppo", 0.1, 2, half=0.3))
    far = named("far", method("ppo", point(1, -0.5, 0.3)))
    found = claim([dpo, named("again", dpo), low], START)
    assert found.holds is True
    assert found.said == "DPO's frontier is not below PPO's at equal KL in 2 of 2 comparisons."
    holds, said = told([dpo, low, wide], START)
    assert holds is None
    assert said == (
        "DPO's frontier is not below PPO's at equal KL in 1 of 2 comparisons, not shown to differ "
        "in 1."
    )
    holds, said = told([dpo, wide, named("wider", wide)], START)
    assert holds is None
    assert said == (
        "DPO's frontier is not shown to differ from PPO's at equal KL in 2 of 2 comparisons."
    )
    holds, said = told([dpo, low, far], START)
    assert holds is True
    assert said == (
        "DPO's frontier is not below PPO's at equal KL in 1 of 1 comparison. 1 more could not be "
        "compared."
    )
    holds, said = told([dpo, far, named("farther", far)], START)
    assert holds is None and said.endswith("no KL was reached by both in any of 2 pairs.")


def test_a_frontier_is_a_line_by_kl_whatever_the_order_of_steps():
    back = method("dpo", point(1, 3, 0.5, 0.1), point(2, 1, 0.3, 0.1), point(3, -0.1, 0.9))
    found = knots(back, START)
    assert [knot.kl for knot in found] == [0.0, 1, 3]
    assert at(found, 2.0).value == pytest.approx(0.3 + 0.2 * (2**0.5 - 1) / (3**0.5 - 1))
    assert at(found, 0.25).low == pytest.approx((0.15 + 0.2) / 2)
    assert at(found, 0.0) == Interval(0.2, 0.15, 0.25) and at(found, 3.0).value == 0.5
    twice = method("dpo", point(1, 1, 0.4, 0.1), point(2, 1, 0.6, 0.1))
    assert at(knots(twice, None), 1.0).value == pytest.approx(0.5)


def on_a_root(objective: str, *kls: float, half: float = 0.09) -> Method:
    """Evaluations that lie exactly on 0.19 + 0.2 sqrt(KL)."""
    found = (point(i, kl, 0.19 + 0.2 * kl**0.5, half) for i, kl in enumerate(kls, start=1))
    return method(objective, *found)


@pytest.mark.parametrize("few", [(8.0, 10.0), (9.0,), (0.5, 10.0)])
def test_where_a_method_happened_to_be_evaluated_does_not_decide(few: tuple[float, ...]):
    # Both are on one frontier, which has 0.47 at KL 2. A chord by KL to 8 from the start has 0.33.
    start, often = Start(0.19, 0.1, 0.28, MANY), (1.0, 2.0, 4.0, 9.0)
    for pair in ((few, often), (often, few)):
        dpo, ppo = on_a_root("dpo", *pair[0]), on_a_root("ppo", *pair[1])
        gaps = compared(knots(dpo, start), knots(ppo, start))
        assert [g.gap.value for g in gaps] == pytest.approx([0.0] * len(gaps), abs=1e-12)
        assert told([dpo, ppo], start)[0] is None
        # The same without doubt about any reward: the places themselves make no difference.
        tight = [replace(m, points=tuple(replace(p, reward_low=p.reward - 1e-6,
                 reward_high=p.reward + 1e-6) for p in m.points)) for m in (dpo, ppo)]  # fmt: skip
        holds, said = told(tight, Start(0.19, 0.19 - 1e-6, 0.19 + 1e-6, MANY))
        assert holds is True and "its reward is nowhere lower by more than" in said


def test_a_kl_that_was_estimated_below_zero_has_its_place_on_a_frontier_without_a_start():
    found = knots(method("dpo", point(1, -1, 0.2, 0.1), point(2, 4, 0.5, 0.1)), None)
    # By the signed root from -1 to 2: KL 0 is a third of the way, KL 1 two.
    assert at(found, 0.0).value == pytest.approx(0.3)
    assert at(found, 1.0).value == pytest.approx(0.4)
    assert at(found, -1.0).value == 0.2 and at(found, 4.0).value == 0.5


def test_many_places_need_wider_intervals():
    assert widening(1, MANY) == widening(0, MANY) == pytest.approx(1, abs=5e-4)
    # z(0.975) = 1.959964 and z(1 - 0.05/20) = z(0.9975) = 2.807034, as tables have them.
    assert widening(10, MANY) == pytest.approx(2.807034 / 1.959964, rel=5e-4)
    # Of 8 prompts: t(0.975) = 2.364624 and t(0.9975) = 4.029337 with 7 degrees of freedom.
    for places, t in ((1, 2.364624), (10, 4.029337)):
        assert widening(places, 8) == pytest.approx((8 / 7) ** 0.5 * t / 1.959964, rel=1e-6)
    # 0.1 apart and known to sqrt(2) 0.06 = 0.085: below by the one place, not among four, for which
    # z(1 - 0.05/8) / z(1 - 0.05/2) = 1.274 makes it 0.108.
    ppo, many = (method("ppo", *(point(i, kl, 0.4, 0.06) for i, kl in enumerate(kls)))
                 for kls in ((4,), (1, 2, 3, 4)))  # fmt: skip
    dpo, level = (method("dpo", *(point(i, kl, 0.3, 0.06) for i, kl in enumerate(kls)))
                  for kls in ((4,), (1, 4)))  # fmt: skip
    assert told([dpo, ppo])[0] is False
    found = claim([level, many])
    assert found.places == 4 and found.holds is None
    assert "compared at 4 places" in found.sure and f"{widening(4, MANY):.2f} times" in found.sure
    # Another run of DPO is another four chances to be wrong.
    assert claim([level, named("again", level), many]).places == 8
    few = replace(dpo, points=(replace(dpo.points[0], num_prompts=5),))
    assert claim([few, ppo]).num_prompts == 5
    assert claim([few, ppo]).sure == (
        "The frontiers were compared at one place, by 5 prompts: of fewer than 6 no interval is "
        "known."
    )
    assert claim([dpo]).sure == "" and "at one place" in claim([dpo, ppo]).sure


def decided(found: Claim) -> bool:
    """Whether one of equal methods is called better or worse somewhere. That it is not below is no
    mistake; that it is above at some KL would be."""
    return any(p.holds is False or p.in_part or " higher" in p.said for p in found.pairs)


@pytest.mark.parametrize(("num_dpo", "num_evaluations"), [(1, 4), (3, 8)])
@pytest.mark.parametrize("kl_share", [0.0, 0.5])
def test_of_equal_methods_one_is_called_better_or_worse_in_at_most_5_of_100(
    num_dpo: int, num_evaluations: int, kl_share: float
):
    """All methods are on one frontier, every reward is known to +-0.03 at 95 %, and every KL to
    a share of itself.

    Bonferroni: any of the m intervals misses 0 in at most m * 0.05/m of the draws. Of 200 draws
    that is 10, with a standard deviation of sqrt(200 * 0.05 * 0.95) = 3.1; 16 is two of them above.
    Intervals each for itself miss somewhere in more, and so do those that leave out the KL's.
    """
    rng, half = random.Random(0), 0.03

    def measured(mean: float, half: float) -> float:
        return rng.gauss(mean, half / 1.959964)

    def trained(objective: str) -> Method:
        found: list[Point] = []
        for i in range(num_evaluations):
            kl = rng.uniform(0.2, 10)
            reward = measured(0.19 + 0.2 * kl**0.5, half)
            estimate = measured(kl, kl_share * kl)
            found.append(point(i, estimate, reward, half, kl_half=kl_share * kl))
        return method(objective, *found)

    num_decided = num_by_each = num_without_kl = 0
    for _ in range(200):
        reward = measured(0.19, half)
        start, ppo = Start(reward, reward - half, reward + half, MANY), trained("ppo")
        runs = [named(f"dpo {i}", trained("dpo")) for i in range(num_dpo)]
        num_decided += decided(claim([*runs, ppo], start))
        exact = [
            replace(m, points=tuple(replace(p, kl_low=p.kl, kl_high=p.kl) for p in m.points))
            for m in (*runs, ppo)
        ]
        num_without_kl += decided(claim(exact, start))
        gaps = [g.gap for dpo in runs for g in compared(knots(dpo, start), knots(ppo, start))]
        num_by_each += any(gap.high < 0 or gap.low > 0 for gap in gaps)
    assert num_decided <= 16
    assert num_by_each > 16
    assert (num_without_kl > 16) == (kl_share > 0)


def test_by_eight_prompts_one_of_equal_methods_is_better_or_worse_in_at_most_5_of_100():
    """As above, by real bootstraps of eight prompts' rewards at eight KLs that are known exactly.

    Widened for as many prompts as one likes, some interval misses 0 in about a fifth.
    """
    rng = random.Random(0)

    def measured(mean: float) -> Interval:
        return mean_interval([rng.gauss(mean, 0.1) for _ in range(8)])

    def trained(objective: str) -> Method:
        found: list[Point] = []
        for kl in range(1, 9):
            r = measured(0.19 + 0.2 * kl**0.5)
            bounds = {"reward_low": r.low, "reward_high": r.high}
            found.append(point(kl, kl, r.value, num_prompts=8, **bounds))
        return method(objective, *found)

    def of_many(found: Method) -> Method:
        return replace(found, points=tuple(replace(p, num_prompts=MANY) for p in found.points))

    num_decided = num_by_many = 0
    for _ in range(200):
        r, dpo, ppo = measured(0.19), trained("dpo"), trained("ppo")
        start = Start(r.value, r.low, r.high, 8)
        num_decided += decided(claim([dpo, ppo], start))
        start = replace(start, num_prompts=MANY)
        num_by_many += decided(claim([of_many(dpo), of_many(ppo)], start))
    assert num_decided <= 16
    assert num_by_many > 16


def test_a_frontier_that_may_be_far_below_somewhere_is_not_said_to_hold():
    # Above at KL 0.3 by 0.05 +-0.04, and at KL 5 by -0.15 +-0.2: both intervals together, each for
    # itself about z(1 - 0.05/4) / z(1 - 0.05/2) = 1.1436 times as narrow.
    def by(rewards: tuple[float, float], halves: tuple[float, float]) -> list[Point]:
        return [point(i, kl, r, h / 2**0.5 / widening(2, MANY)) for i, (kl, r, h) in
                enumerate(zip((0.3, 5), rewards, halves, strict=True))]  # fmt: skip

    dpo, ppo = (method(name, *by(rewards, (0.04, 0.2))) for name, rewards in
                (("dpo", (0.35, 0.55)), ("ppo", (0.3, 0.7))))  # fmt: skip
    found = claim([dpo, ppo])
    assert found.holds is None and found.pairs[0].in_part
    # A tenth of what PPO gains, from 0.3 to 0.7.
    assert found.said == (
        "DPO's frontier is above PPO's at some KL, and not shown either way elsewhere: at KL 0.300 "
        "its reward is 0.0500 [0.0100, 0.0900] higher; at KL 5.00 the difference is −0.150 "
        "[−0.350, 0.0500], and that it is lower by more than 0.0400 (a tenth of what the "
        "better gains there) is not ruled out."
    )
    again = claim([dpo, named("again", dpo), ppo]).said
    assert again == (
        "DPO's frontier is above PPO's at some KL, and not shown either way elsewhere, in 2 of 2 "
        "comparisons."
    )


@pytest.mark.parametrize(("short", "holds"), [(0.039, True), (0.041, None)])
def test_not_below_is_shown_by_the_whole_interval_less_a_tenth_of_what_is_gained(
    short: float, holds: bool | None
):
    # Both rise from 0.3 to 0.7, of which a tenth is 0.04. They begin in one place, and of the two
    # others the interval reaches `short` below at KL 2, and next to nothing at KL 3.
    half, tight = short / 2**0.5 / widening(2, MANY), 1e-6
    kls, rewards = (1, 2, 3), (0.3, 0.5, 0.7)
    pair = [
        method(name, *(point(i, kl, r, half if kl == 2 else tight) for i, (kl, r) in
                       enumerate(zip(kls, rewards, strict=True))))
        for name in ("dpo", "ppo")
    ]  # fmt: skip
    found, said = told(pair)
    assert found is holds
    if holds:
        assert said == (
            "DPO's frontier is not below PPO's at equal KL: between KL 1.00 and 3.00 nats its "
            "reward is nowhere lower by more than 0.0400 (a tenth of what the better gains "
            "there)."
        )


def test_where_neither_gains_the_claim_does_not_hold():
    # Both fall by 0.8 of reward: DPO's interval is above minus 0.08, which is a tenth of a loss.
    lost = [line(name, -0.4, 1, 2) for name in ("dpo", "ppo")]
    found = claim(lost, START)
    assert found.holds is None and not found.pairs[0].in_part
    assert found.said.startswith(
        "DPO's frontier is without a gain, as is PPO's: between KL 0 and 2.00 nats neither earns "
        "more than where both begin, so that neither is worth its KL; the largest difference"
    )
    # Nor where DPO's is surely above, having lost less; that it lost more is said all the same.
    less, more = line("dpo", -0.1, 1, 2), line("dpo", -0.9, 1, 2)
    assert told([less, lost[1]], START)[0] is None
    assert told([more, lost[1]], START)[0] is False
    gained = line("dpo", 0.1, 1, 2)
    assert told([gained, lost[1]], START)[0] is True
    assert told([gained, named("less", less), lost[1]], START) == (
        None,
        "DPO's frontier is not below PPO's at equal KL in 1 of 2 comparisons, without a gain in 1.",
    )


def test_what_may_be_lost_is_a_tenth_of_what_the_better_gains_over_the_start():
    # Both fall by 1 before they gain 0.1 in all: a tenth is 0.01, and not a tenth of 1.1.
    def there(name: str, half: float) -> Method:
        return method(name, point(1, 1, -0.8, half), point(2, 4, 0.3, 1e-6))

    assert told([there("dpo", 1e-6), there("ppo", 1e-6)], START)[0] is True
    assert told([there("dpo", 0.02), there("ppo", 0.02)], START)[0] is None


def test_what_is_uncertain_of_a_kl_is_in_the_interval_by_the_slope_of_the_frontier():
    # 0.19 + 0.2 sqrt(KL): an evaluation at KL 4 [2.25, 6.25] is at root 2 [1.5, 2.5], and 0.5 in
    # the root are 0.1 of reward. With the reward's own 0.03 and 0.04: 0.1044 and 0.1077.
    sure = studies.point(2, 4, 0.59, reward_low=0.56, reward_high=0.63, kl_half=0)
    wide = replace(sure, kl_low=2.25, kl_high=6.25)
    found = knots(method("dpo", wide), Start(0.19, 0.18, 0.2, MANY))
    start, knot = _with_kl(found)
    assert start.reward == Interval(0.19, 0.18, 0.2)
    assert knot.reward.low == pytest.approx(0.59 - math.hypot(0.03, 0.1))
    assert knot.reward.high == pytest.approx(0.59 + math.hypot(0.04, 0.1))
    # The nearer bound of a frontier that rises is what its reward would be higher for.
    skewed = [found[0], replace(found[1], kl_low=3.61)]
    assert _with_kl(skewed)[1].reward.high == pytest.approx(0.59 + math.hypot(0.04, 0.02))
    falling = [replace(found[0], reward=Interval(0.99, 0.9, 1.1)), skewed[1]]
    assert _with_kl(falling)[1].reward.low == pytest.approx(0.59 - math.hypot(0.03, 0.02))
    # Of one evaluation no slope is known.
    assert _with_kl(found[1:]) == found[1:]
    nan = replace(found[1], kl_low=math.nan)
    assert math.isnan(_with_kl([found[0], nan])[1].reward.high)


def test_a_difference_of_symmetric_intervals_adds_their_squares():
    found = difference(Interval(0.5, 0.2, 0.8), Interval(0.1, -0.3, 0.5))
    assert (found.value, found.low, found.high) == pytest.approx((0.4, -0.1, 0.9))
    # Lowest where a is low and b is high: 0.3 and 0.4 below; highest by 0.5 and 1.2.
    found = difference(Interval(0.5, 0.2, 1.0), Interval(0.1, -1.1, 0.5))
    assert (found.low, found.high) == pytest.approx((0.4 - 0.5, 0.4 + 1.3))
