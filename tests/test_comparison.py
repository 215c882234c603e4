"""The comparison page says every number of its record, and claims no more than the intervals."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, replace
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from run_records import NASTY
from studies import START, line, method, named, point, study
from upweight.errors import DataError, OutputError
from upweight.evidence.comparison import (
    ROWS,
    Claim,
    Noticed,
    Pair,
    Start,
    Study,
    Taught,
    claim,
    read_study,
    render,
    write_comparison,
)
from upweight.evidence.comparison.given import unequal
from upweight.evidence.comparison.page import common_kl
from upweight.evidence.report.frontier import MARKERS, TONES, Spot, Trail, _beside, _box, _meet
from upweight.evidence.report.markup import count, duration, number
from upweight.evidence.report.scales import Scale, root_ticks
from upweight.stats import Interval

STYLE = (files("upweight.evidence.report") / "style.css").read_text(encoding="utf-8")


def spots(html: str) -> list[tuple[str, str]]:
    """Shape, tone and tooltip of each mark."""
    return re.findall(r'<i class="spot ([^"]*)" style="[^"]*" title="([^"]*)"', html)


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
            kls = (p.kl,) if one is best else (p.kl, p.kl_low, p.kl_high)
            shown = [number(v) for v in (*kls, p.reward, p.reward_low, p.reward_high, p.length)]
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
    assert len(spots(html)) == 3 and "Best at KL ≤ 2.00" in html
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
    found = study(
        method("dpo", point(1, 1.5, 0.4, **nan)), start=Start(0.2, math.nan, math.nan, 48)
    )
    whole = json.loads(json.dumps(asdict(found)))
    for entry in (whole["start"], whole["methods"][0]["points"][0]):
        for key in entry:
            entry[key] = None if entry[key] != entry[key] else entry[key]
    (tmp_path / "comparison.json").write_text(json.dumps(whole))
    html = write_comparison(tmp_path).read_text(encoding="utf-8")
    assert "1.50" in html and "0.400" in html and 'class="bars"' not in html and "nan" not in html


def test_the_kl_of_best_of_n_is_shown_as_the_bound_that_it_is():
    # As a record has it whose bounds are the bound itself, and one that has it above 0.
    exact = method("best_of_n", point(8, 1.2, 0.6, kl_half=0), name="best")
    for best in (exact, replace(exact, points=(point(8, 1.2, 0.6, kl_low=0.0, kl_high=1.2),))):
        html = render(study(line("dpo", 0.1, 1, 2), best))
        assert html.count("<td>≤ 1.20</td>") == 2 and "n = 8, KL ≤ 1.20" in html
        ((kind, said),) = [spot for spot in spots(html) if "best" in spot[1]]
        assert said == "best, n = 8: reward 0.600\u00a0[0.550, 0.650] at KL ≤ 1.20"
        # Its bar goes from 0, where the start has its mark, to the mark at the bound.
        (bars,) = re.findall(r'class="bars" d="([^"]*)"/></g>(?=<g class="t-reference">)', html)
        left, right = (float(x) for x in re.findall(r"M([\d.]+) [\d.]+H([\d.]+)", bars)[0])
        marks = [float(x) for x in re.findall(r'<i class="spot [^>]*left:([\d.]+)%', html)]
        assert left == pytest.approx(10 * marks[-1], abs=0.1)
        assert right == pytest.approx(10 * marks[-2], abs=0.1)


def test_what_was_reported_of_a_method_stands_beside_the_verdict_and_in_a_table(tmp_path: Path):
    seen = (
        Noticed("UW308", 9, "KL is 61 nats"), Noticed("UW305", 9, "answers are <3 times> as long"),
        Noticed("UW305", 18, "4 in 5 do not stop"),
    )  # fmt: skip
    far = replace(named("ppo <b>", line("ppo", 0.1, 1, 2)), noticed=seen)
    found = study(line("dpo", 0.1, 1, 2), far)
    assert read_study(write(tmp_path, found)) == found
    assert found.noticed == (
        "ppo <b> was reported while it trained: UW308 at step 9, UW305 at step 9, "
        "UW305 at step 18.",
    )
    html = render(found)
    head = html.split("<nav")[0]
    assert "<h2>Reported of 1 method while training</h2>" in head
    assert "<li><bdi>ppo &lt;b&gt;</bdi>: UW308, UW305</li>" in head
    table = html[html.index('<section id="reported-while-training">') :].split("</section>")[0]
    assert "answers are &lt;3 times&gt; as long" in table and table.count("<tr>") == 4
    quiet = render(study(line("dpo", 0.1, 1, 2)))
    assert "reported-while-training" not in quiet and "Reported of" not in quiet


def test_a_record_from_before_reports_and_parts_were_kept_is_read(tmp_path: Path):
    pair = Pair("dpo", "ppo", True, None, "not shown to differ")
    found = study(line("dpo", 0.1, 1), claim=Claim(None, "Not shown.", (pair,), 1))
    whole = json.loads(json.dumps(asdict(found)))
    del whole["methods"][0]["noticed"], whole["claim"]["pairs"][0]["in_part"]
    del whole["claim"]["pairs"][0]["gained"]
    (tmp_path / "comparison.json").write_text(json.dumps(whole))
    assert read_study(tmp_path) == found


def test_best_of_n_are_points_and_trained_methods_lines_from_the_start():
    path = line("dpo", 0.1, 1, 2)
    one = render(study(path))
    both = render(study(path, method("best_of_n", point(2, 0.19, 0.3), point(4, 0.64, 0.4))))
    assert one.count('<path class="line') == both.count('<path class="line') == 1
    # The start has a mark of its own, and a line goes from it through its evaluations by step.
    assert len(spots(one)) == 3 and len(spots(both)) == 5
    assert [kind for kind, _ in spots(one)] == [
        "m-dot t-1",
        "m-dot t-1 last",
        "m-star t-reference last",
    ]
    (drawn,) = re.findall(r'<path class="line" d="([^"]*)"', one)
    across = [float(x) for x in re.findall(r"[ML]([\d.]+) ", drawn)]
    assert len(across) == 3 and across == sorted(across)
    lefts = [float(x) for x in re.findall(r'<i class="spot [^>]*left:([\d.]+)%', one)]
    assert across == pytest.approx([10 * x for x in (lefts[2], *lefts[:2])], abs=0.1)


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
        (lambda w: w["methods"][0]["points"][0].pop("num_prompts"), "num_prompts"),
        (lambda w: w["start"].update(num_prompts=8.5), "num_prompts"),
        (lambda w: w["claim"].pop("num_prompts"), "num_prompts"),
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


def test_pairs_stand_in_a_table_below_a_headline_that_does_not_repeat_them():
    methods = [
        line("dpo", 0.1, 2), named("dpo <b>", line("dpo", 0.2, 2)), line("ppo", 0.05, 2),
        named("best <p>", line("ppo", 0.15, 2)),
    ]  # fmt: skip
    found = study(*methods, claim=claim(methods, START))
    html = render(found)
    head, table = html.split('<section id="dpo-against-ppo">')
    table = table.split("</section>")[0]
    assert table.count("<tr>") == 5 and table.count("not below") >= 3
    assert "<bdi>dpo &lt;b&gt;</bdi> against <bdi>best &lt;p&gt;</bdi>" in table
    assert "<td>Between KL 0 and 2.00 nats its reward is higher by up to" in table
    assert "<td>At KL 2.00 its reward is" in table and "its reward is" not in head
    assert "below PPO&#x27;s at equal KL in 1 of 4 comparisons" in head
    one = [line("dpo", 0.1, 2), line("ppo", 0.05, 2)]
    alone = render(study(*one, claim=claim(one, START)))
    assert 'id="dpo-against-ppo"' not in alone and "its reward is higher by up to" in alone


def test_a_claim_that_some_pairs_show_and_none_contradicts_is_said_to_be_shown_in_part():
    methods = [line("dpo", 0.1, 2), line("ppo", 0.05, 2), line("ppo", 0.1, 2, half=0.3)]
    html = render(study(*methods, claim=claim(methods, START)))
    assert "Shown in part" in html and "The claim holds" not in html
    nothing = Pair("dpo", "c", True, None, "without a gain, as is PPO's: none", gained=False)
    html = render(study(claim=Claim(None, "None.", (nothing, nothing), 2)))
    assert "Not shown either way" in html and "> without a gain</span>" in html
    above = [Pair("dpo", name, True, None, "above PPO's at KL 1", True) for name in ("a", "b")]
    for pairs in (above[:1], above):
        html = render(study(line("dpo", 0.1, 1), claim=Claim(None, "Above.", tuple(pairs), 2)))
        assert "Shown in part" in html and ("> above at some KL</span>" in html) == (pairs is above)


def test_eight_methods_have_a_colour_and_a_marker_each_and_names_that_do_not_meet():
    methods = [
        named(f"method number {i}", line("dpo", 0.02 * i, 0.5, 1 + i / 10)) for i in range(8)
    ]
    # What draws nothing takes no colour.
    html = render(study(method("reward"), *methods))
    legend = html[html.index('<div class="legend">') : html.index('<div class="plot')]
    keys = re.findall(r'<span class="key (t-\S+)"><i class="spot (m-\S+)"', legend)
    assert len(keys) == 9 and len({tone for tone, _ in keys}) == 9
    assert len({marker for _, marker in keys}) == 9
    pairs = {(TONES[i % len(TONES)], MARKERS[i % len(MARKERS)]) for i in range(72)}
    assert len(pairs) == 72
    shapes = [f"m-{marker}" for marker in (*MARKERS, "star") if marker != "square"]
    assert all(f".{name}" in STYLE for name in (*TONES, *shapes))


def test_texts_beside_spots_stand_apart_and_off_the_lines_where_they_can():
    def spot(kl: float, reward: float) -> Spot:
        return Spot(Interval(kl, math.nan, math.nan), Interval(reward, math.nan, math.nan), "")

    x, y = Scale(0.0, 1.0), Scale(0.0, 1.0)
    crowd = [Trail(f"n{i}", "t-1", [spot(0.5, 0.5 + i / 500)], ["a long name"]) for i in range(9)]
    boxes = [_box(b.x, b.y, b.side, b.text) for b in _beside(crowd, x, y)]
    assert 1 <= len(boxes) < 9
    assert not any(_meet(a, b) for i, a in enumerate(boxes) for b in boxes[:i])
    # A line that goes on up and to the right takes that side.
    rising = Trail("up", "t-1", [spot(0.4, 0.4), spot(0.8, 0.8)], ["first", ""])
    (beside,) = _beside([rising], x, y)
    assert beside.side != "ne"


VISION = {
    "all": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "no red": (
        (0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "no green": (
        (0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "no blue": (
        (1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}  # fmt: skip
"""What is seen of linear red, green and blue without one kind of cone: Machado et al. 2009."""


def seen(colour: str, vision: str) -> tuple[float, ...]:
    """CIE L*a*b* (D65) of #rrggbb."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    rgb = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    rgb = [sum(a * b for a, b in zip(row, rgb, strict=True)) for row in VISION[vision]]
    rgb = [min(1.0, max(0.0, c)) for c in rgb]
    to_xyz = (
        (0.4124564 / 0.95047, 0.3575761 / 0.95047, 0.1804375 / 0.95047),
        (0.2126729, 0.7151522, 0.0721750),
        (0.0193339 / 1.08883, 0.1191920 / 1.08883, 0.9503041 / 1.08883),
    )
    xyz = [sum(a * b for a, b in zip(row, rgb, strict=True)) for row in to_xyz]
    x, y, z = (v ** (1 / 3) if v > 216 / 24389 else (24389 / 27 * v + 16) / 116 for v in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_any_two_tones_are_told_apart_with_and_without_each_kind_of_cone(scheme: str, vision: str):
    # Later blocks (dark) override earlier ones (light); of print only the page's.
    light, dark, *_ = (dict(re.findall(r"--(\w+): (#\w{6})", b)) for b in STYLE.split(":root")[1:])
    named_colours = light if scheme == "light" else light | dark
    of_tone = dict(re.findall(r"\.(t-\d)(?:, \.t-\d)* \{ color: var\(--(\w+)\)", STYLE))
    labs = [seen(named_colours[of_tone[tone]], vision) for tone in TONES]
    # A just noticeable difference is about 2.3; marks a few pixels wide need several of them.
    assert min(math.dist(a, b) for a, b in combinations(labs, 2)) > 15


def test_a_kl_wholly_below_zero_is_named_on_the_comparison():
    odd = method("dpo", point(3, -0.5, 0.4), point(4, 0.5, 0.4))
    html = render(study(odd))
    assert "lies below 0 here: DPO, step 3. Either" in html
    assert "lies below 0 here" not in render(study(line("dpo", 0.1, 1)))


def test_the_line_that_is_drawn_is_the_frontier_that_is_compared():
    back = method("dpo", point(1, 4, 0.5), point(2, 1, 0.4), point(3, -0.3, 0.9))
    html = render(study(back))
    (drawn,) = re.findall(r'<path class="line" d="([^"]*)"', html)
    across = [float(x) for x in re.findall(r"[ML]([\d.]+) ", drawn)]
    # From the start by KL, not by step; by the root KL 1 lies midway from 0 to 4.
    assert len(across) == 3
    assert across[1] - across[0] == pytest.approx(across[2] - across[1], abs=0.2)
    # What was estimated below 0 is drawn at 0, and read as it is.
    lefts = [float(x) for x in re.findall(r'<i class="spot [^>]*left:([\d.]+)%', html)]
    assert 10 * lefts[2] == pytest.approx(across[0], abs=0.1)
    assert "step 3: reward 0.900\u00a0[0.850, 0.950] at KL −0.300" in html
    assert "by its square root" in html


def test_the_page_says_how_sure_the_verdict_is_below_it_and_that_training_was_once():
    methods = [line("dpo", 0.1, 1, 2, 3), line("ppo", 0.05, 2, 3)]
    found = study(*methods, claim=claim(methods, START))
    head = render(found).split("<nav")[0]
    assert "compared at 3 places; the intervals, which have the sampling of rewards and" in head
    assert "of KL in them, are 1.22 times as wide as a bootstrap of 10,000 prompts alone" in head
    assert "trained once, with one seed" in head
    assert "Bonferroni" in render(found) and "prompt by prompt" in render(found)


def taught(kind: str, there: int, by: str, **rest: Any) -> Taught:
    base: dict[str, Any] = {"seen": 2 * there, "steps": 27, "answers": 0}
    return Taught(kind=kind, there=there, by=by, **base | rest)


def test_data_and_budget_of_every_method_are_numbers_on_the_page(tmp_path: Path):
    judge = method("reward", name="the <model>", taught=taught("preferences", 1504, ROWS))
    ppo = taught("prompts", 120, "method:the <model>", seen=512, answers=513, steps=32)
    best = taught("prompts", 48, "method:the <model>", seen=48, answers=384, steps=0)
    found = study(
        replace(line("dpo", 0.1, 1, 2), taught=taught("preferences", 218, ROWS)),
        judge,
        replace(line("ppo", 0.1, 1, 2), taught=ppo),
        replace(method("best_of_n", point(8, 1.2, 0.3)), taught=best),
        method("grpo", failed="diverged"),
    )
    assert read_study(write(tmp_path, found)) == found
    html = render(found)
    table = html[html.index("Data and budget") : html.index('id="what-each-method-is"')]
    for cell in (
        "218 preferences", "436", "1\u202f504 preferences", "120 prompts", "512", "513", "32",
        "384", "<bdi>the &lt;model&gt;</bdi>", "1\u202f234\u202f567", "1 min 1 s",
    ):  # fmt: skip
        assert f"<td>{cell}</td>" in table
    assert (
        "DPO: by the labels that stand in the rows (218 preferences). PPO and best of n: by the "
        "scores of a reward model, which has learned such labels (1\u202f504 preferences) and "
        "errs. If the labels were made by vader, DPO heard the judge and PPO and best of n a model "
        "of it"
    ) in table


def test_who_was_told_by_whom_is_said_only_where_it_differs():
    labelled = replace(line("dpo", 0.1, 1), taught=taught("preferences", 218, ROWS))
    direct = replace(line("ppo", 0.1, 1), taught=taught("prompts", 9, "vader", answers=9))
    assert unequal(study(labelled)) == unequal(study(direct)) == unequal(study()) == ""
    said = unequal(study(labelled, direct))
    assert "PPO: by vader itself, which judges here." in said and "model" not in said


def test_an_axis_by_the_root_has_ticks_in_nats_and_nothing_below_zero():
    # From -0.04 to 1.04 of the root of 4, of which 0 is 0.04 / 1.08 and 1 is 0.54 / 1.08 away.
    scale = Scale(-4 * 0.04**2, 4 * 1.04**2, root=True)
    places = [scale.at(kl) for kl in (-3.0, 0.0, 1.0, 4.0)]
    assert places == pytest.approx([0.04 / 1.08, 0.04 / 1.08, 0.54 / 1.08, 1.04 / 1.08])
    assert root_ticks(5.2) == [0, 0.2, 1, 2, 3, 4, 5]
    assert root_ticks(0.11) == pytest.approx([0, 0.004, 0.02, 0.04, 0.06, 0.08, 0.1])
