"""The comparison page says every number of its record, and claims no more than the intervals."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from run_records import NASTY
from upweight.errors import DataError, OutputError
from upweight.evidence.comparison import (
    Claim,
    Method,
    Point,
    Start,
    Study,
    claim,
    read_study,
    render,
    write_comparison,
)
from upweight.evidence.comparison.claim import at, difference, knots
from upweight.evidence.comparison.page import common_kl
from upweight.evidence.report.markup import count, duration, number
from upweight.stats import Interval

START = Start(0.2, 0.15, 0.25)


def point(step: int, kl: float, reward: float, half: float = 0.05, **rest: Any) -> Point:
    kl, reward = float(kl), float(reward)
    kls = {"kl_low": kl - 0.1, "kl_high": kl + 0.1}
    rewards = {"reward_low": reward - half, "reward_high": reward + half}
    return Point(**{"step": step, "kl": kl, "reward": reward, "length": 30.0 + step}
                 | kls | rewards | rest)  # fmt: skip


def method(objective: str, *points: Point, **rest: Any) -> Method:
    base: dict[str, Any] = {
        "name": objective.upper(), "objective": objective, "note": f"{objective} note",
        "seconds": 61.0, "tokens": 1234567, "points": points, "failed": None,
    }  # fmt: skip
    return Method(**base | rest)


def line(objective: str, slope: float, *kls: float, half: float = 0.01) -> Method:
    """A frontier that rises from the start by `slope` a nat."""
    found = (point(i, kl, 0.2 + slope * kl, half) for i, kl in enumerate(kls, start=1))
    return method(objective, *found)


def study(*methods: Method, **rest: Any) -> Study:
    base: dict[str, Any] = {
        "title": "On questions", "reward": "vader", "start": START, "methods": methods,
        "budget": "1000 steps each", "machine": "two cores", "seconds": 7384.0,
        "claim": Claim(None, "Not shown."),
    }  # fmt: skip
    return Study(**base | rest)


def write(folder: Path, found: Study) -> Path:
    (folder / "comparison.json").write_text(json.dumps(asdict(found)))
    return folder


def test_the_record_is_the_fields_of_a_study(tmp_path: Path):
    found = study(line("dpo", 0.1, 1, 2), method("ppo", failed="diverged"))
    assert read_study(write(tmp_path, found)) == found


def test_every_number_of_the_record_is_on_the_page(tmp_path: Path):
    first = method("dpo", point(20, 1.23, 0.345), point(40, 3.21, 0.567), seconds=3725.0)
    second = method("ppo", point(30, 0.987, 0.31), tokens=7654321, seconds=62.0)
    best = method("best_of_n", point(16, 1.83, 0.61), name="Best of n", seconds=5.0, tokens=17)
    found = study(first, second, best)
    page = write_comparison(write(tmp_path, found))
    assert page == tmp_path / "comparison.html"
    html = page.read_text(encoding="utf-8")
    table = html[html.index('id="every-evaluation"') :]
    for one in found.methods:
        assert one.name in html and one.note in html
        assert count(one.tokens) in html and duration(one.seconds) in html
        for p in one.points:
            when = f"n = {p.step}" if one is best else f"step {p.step}"
            shown = [number(v) for v in (p.kl, p.kl_low, p.kl_high, p.reward, p.reward_low,
                                         p.reward_high, p.length)]  # fmt: skip
            assert all(value in table for value in (when, *shown))
            assert f"{when}: reward" in html[: html.index('id="methods"')]
    for text in ("0.200\u00a0[0.150, 0.250]", "1000 steps each", "two cores", "2 h 3 min"):
        assert text in html
    assert "On questions" in html and "vader" in html


@pytest.mark.parametrize(
    ("holds", "label"),
    [(True, "The claim holds"), (False, "does not hold"), (None, "Not shown either way")],
)
def test_the_claim_is_the_headline(holds: bool | None, label: str):
    html = render(study(line("dpo", 0.1, 1), claim=Claim(holds, "DPO and <PPO>.")))
    assert label in html
    assert '<h1 class="verdict" dir="auto">DPO and &lt;PPO&gt;.</h1>' in html


def test_the_table_has_the_last_evaluation_of_each_method():
    html = render(study(method("dpo", point(20, 1.23, 0.345), point(40, 3.21, 0.567))))
    table = html[html.index('id="methods"') : html.index('id="what-each-method-is"')]
    for cell in ("0.567\u00a0[0.517, 0.617]", "3.21\u00a0[3.11, 3.31]", "70.0"):
        assert f"<td>{cell}</td>" in table
    assert "0.345" not in table


def test_methods_that_failed_are_named_with_why():
    html = render(study(line("dpo", 0.1, 1), method("ppo", failed="out of memory at step 3")))
    assert "1 method failed" in html
    assert html.count("out of memory at step 3") == 2
    assert "methods failed" not in render(study(line("dpo", 0.1, 1)))


def test_one_method_only_and_none_with_a_point_have_a_page():
    html = render(study(line("sft", 0.1, 1, 2)))
    assert html.count('class="spot"') == 4 and "Best at KL ≤ 2.00" in html
    for bare in (study(), study(method("dpo"), method("ppo")), study(method("best_of_n"))):
        html = render(bare)
        assert "No method was evaluated." in html and "Best at KL" not in html
        assert "nan" not in html and "not finite" not in html


def test_every_text_is_escaped_and_the_page_loads_nothing():
    bad = method(NASTY, point(1, 1.0, 0.5), name=NASTY, note=NASTY, failed=NASTY)
    html = render(
        study(
            bad, title=NASTY, reward=NASTY, budget=NASTY, machine=NASTY, claim=Claim(None, NASTY)
        )  # fmt: skip
    )
    html.encode("utf-8")
    assert "<script>document" not in html and "\x00" not in html
    assert html.count("<script>") == 1
    assert all(
        link.startswith("#") or link == "data:," for link in re.findall(r'href="(.*?)"', html)
    )
    assert not re.search(r"url\(|@import| src=", html)


def test_bounds_that_are_not_known_are_left_out(tmp_path: Path):
    nan = dict.fromkeys(("kl_low", "kl_high", "reward_low", "reward_high"), math.nan)
    found = study(method("dpo", point(1, 1.5, 0.4, **nan)), start=Start(0.2, math.nan, math.nan))
    whole = json.loads(json.dumps(asdict(found)))
    for entry in (whole["start"], whole["methods"][0]["points"][0]):
        for key in entry:
            entry[key] = None if entry[key] != entry[key] else entry[key]
    (tmp_path / "comparison.json").write_text(json.dumps(whole))
    html = write_comparison(tmp_path).read_text(encoding="utf-8")
    assert "1.50" in html and "0.400" in html and 'class="bars"' not in html and "nan" not in html


def test_best_of_n_are_points_and_trained_methods_lines_from_the_start():
    path = line("dpo", 0.1, 1, 2)
    one = render(study(path))
    both = render(study(path, method("best_of_n", point(2, 0.19, 0.3), point(4, 0.64, 0.4))))
    assert one.count('<path class="line') == both.count('<path class="line') == 1
    # The start, and the line's own beginning at it, beside the evaluations.
    assert one.count('class="spot"') == 4 and both.count('class="spot"') == 6


def test_the_level_is_the_kl_that_dpo_and_ppo_both_reached():
    sft, dpo, ppo = line("sft", 0.1, 0.3), line("dpo", 0.1, 1, 5), line("ppo", 0.1, 4)
    assert common_kl([sft, dpo, ppo]) == 4
    assert common_kl([sft, dpo]) == 0.3
    assert common_kl([dpo, replace(ppo, failed="gone")]) == 5
    assert common_kl([]) is None
    # Beyond the level a reward is not the best within it.
    html = render(study(line("dpo", 0.1, 1, 5), line("ppo", 0.1, 4)))
    table = html[html.index('id="methods"') : html.index('id="what-each-method-is"')]
    assert "step 1, KL 1.00" in table and "step 2, KL 5.00" not in table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("title"), "title"),
        (lambda w: w["claim"].update(holds="yes"), "true, false or null"),
        (lambda w: w["methods"][0].update(tokens=-1), "tokens"),
        (lambda w: w["methods"][0]["points"][0].pop("kl"), "kl"),
    ],
)
def test_a_malformed_record_is_named(tmp_path: Path, change: Any, message: str):
    whole = asdict(study(line("dpo", 0.1, 1)))
    whole["methods"] = [{**m, "points": list(m["points"])} for m in whole["methods"]]
    change(whole)
    (tmp_path / "comparison.json").write_text(json.dumps(whole))
    with pytest.raises(DataError, match=f"comparison.json.*{message}"):
        write_comparison(tmp_path)


def test_a_folder_without_a_record_or_without_room_is_said(tmp_path: Path):
    with pytest.raises(DataError, match="has no comparison.json"):
        write_comparison(tmp_path)
    write(tmp_path, study())
    (tmp_path / "comparison.html").mkdir()
    with pytest.raises(OutputError, match="comparison.html cannot be written"):
        write_comparison(tmp_path)


def test_a_higher_frontier_is_not_below():
    # At KL 2, which both reach: 0.4 against 0.3, each +-0.01, and linear in between.
    holds, said = claim([line("dpo", 0.1, 1, 2), line("ppo", 0.05, 2, 3)], START)
    assert holds is True
    assert said == (
        "DPO's frontier is not below PPO's at equal KL: between KL 0 and 2.00 nats its reward is "
        "higher by up to 0.100 [0.0859, 0.114], at KL 2.00, and nowhere shown to be lower."
    )


def test_a_lower_frontier_is_below():
    holds, said = claim([line("dpo", 0.05, 2), line("ppo", 0.1, 4)], START)
    assert holds is False
    # PPO at 2 lies between start (0.2 +-0.05) and 4 (0.6 +-0.01): 0.4 +-0.03.
    half = math.hypot(0.01, 0.03)
    bounds = f"[{number(0.1 - half)}, {number(0.1 + half)}]"
    assert said == f"DPO's frontier is below PPO's: at KL 2.00 its reward is 0.100 {bounds} lower."


def test_frontiers_that_cross_are_below_and_said_to_cross():
    dpo = method("dpo", point(1, 1, 0.5, 0.01), point(2, 2, 0.5, 0.01))
    ppo = method("ppo", point(1, 1, 0.4, 0.01), point(2, 2, 0.6, 0.01))
    holds, said = claim([dpo, ppo], START)
    assert holds is False and "They cross: at KL 1.00 it is 0.100" in said


def test_a_difference_inside_both_intervals_is_not_shown():
    wide = {"half": 0.2}
    holds, said = claim([line("dpo", 0.1, 1, 2, **wide), line("ppo", 0.05, 2, **wide)], START)
    assert holds is None
    assert said.startswith("DPO's frontier is not shown to differ from PPO's at equal KL")
    assert "is 0.100 [−0.183, 0.383], at KL 2.00" in said
    assert claim([line("dpo", 0.1, 1), line("ppo", 0.1, 1)], START)[0] is None
    holds, said = claim([line("dpo", 0.05, 2, **wide), line("ppo", 0.1, 2, **wide)], START)
    assert holds is None and "is −0.100 [−0.383, 0.183], at KL 2.00" in said


def test_without_intervals_nothing_is_shown():
    nan = {"reward_low": math.nan, "reward_high": math.nan}
    dpo = method("dpo", point(1, 1.0, 0.9, **nan))
    holds, said = claim([dpo, line("ppo", 0.1, 1)], START)
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
    assert claim(methods, START) == (None, claim(methods, START)[1])
    assert said in claim(methods, START)[1]


def test_without_a_start_only_the_kl_that_both_cover_is_compared():
    dpo = method("dpo", point(1, 1, 0.9, 0.01), point(2, 2, 0.9, 0.01))
    ppo = method("ppo", point(1, 1.5, 0.1, 0.01), point(2, 9, 0.95, 0.01))
    holds, said = claim([dpo, ppo])
    assert holds is True and "between KL 1.50 and 2.00 nats" in said
    assert "share" not in said and claim([dpo, method("ppo", point(1, 5, 0.1))])[0] is None


def test_of_several_runs_of_an_objective_every_pair_is_compared_in_whatever_order():
    tuned = replace(line("ppo", 0.3, 2), name="PPO, true reward")
    dpo, low = line("dpo", 0.1, 2), line("ppo", 0.05, 2)
    assert claim([dpo, low], START)[0] is True
    for methods in ([dpo, tuned, low], [low, tuned, dpo]):
        holds, said = claim(methods, START)
        assert holds is False
        assert "DPO against PPO, true reward: DPO's frontier is below PPO's" in said
        assert "DPO against PPO: DPO's frontier is not below PPO's" in said
    short = replace(line("dpo", 0.1, 2), name="dpo, never asked", points=())
    assert claim([short, dpo, low], START)[0] is True


def test_a_frontier_is_a_line_by_kl_whatever_the_order_of_steps():
    back = method("dpo", point(1, 3, 0.5, 0.1), point(2, 1, 0.3, 0.1), point(3, -0.1, 0.9))
    found = knots(back, START)
    assert [knot.kl for knot in found] == [0.0, 1, 3]
    assert at(found, 2.0).value == pytest.approx(0.4)
    assert at(found, 0.5).low == pytest.approx((0.15 + 0.2) / 2)
    assert at(found, 0.0) == Interval(0.2, 0.15, 0.25) and at(found, 3.0).value == 0.5
    twice = method("dpo", point(1, 1, 0.4, 0.1), point(2, 1, 0.6, 0.1))
    assert at(knots(twice, None), 1.0).value == pytest.approx(0.5)


def test_a_difference_of_symmetric_intervals_adds_their_squares():
    found = difference(Interval(0.5, 0.2, 0.8), Interval(0.1, -0.3, 0.5))
    assert (found.value, found.low, found.high) == pytest.approx((0.4, -0.1, 0.9))
    # Lowest where a is low and b is high: 0.3 and 0.4 below; highest by 0.5 and 1.2.
    found = difference(Interval(0.5, 0.2, 1.0), Interval(0.1, -1.1, 0.5))
    assert (found.low, found.high) == pytest.approx((0.4 - 0.5, 0.4 + 1.3))
