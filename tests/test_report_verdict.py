from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from run_records import (
    eval_line,
    evaluated,
    ledger,
    ledger_row,
    measured,
    set_account,
    trained,
)
from upweight.evidence.records import (
    LedgerRow,
    Records,
    Setting,
    Warned,
)
from upweight.evidence.report.findings import accuracy, length_rule
from upweight.evidence.report.verdict import masthead, verdict
from upweight.stats import wilson_interval


def right(share: float, low: float | None, high: float | None, step: int = 20) -> dict[str, Any]:
    bounds = {"rewards/accuracies_low": low, "rewards/accuracies_high": high}
    return eval_line(step, **{"rewards/accuracies": share}, **bounds)


def test_an_interval_above_chance_is_said_with_its_numbers():
    said = verdict(evaluated(eval_line(0), right(0.78, 0.71, 0.84), ledger=ledger(212)))
    assert (said.tone, said.label) == ("good", "Better than chance")
    assert said.headline == (
        "The policy prefers the chosen answer on 78\u202f%\u00a0[71, 84] of 212 held-out "
        "preferences; before training 50\u202f%."
    )
    assert said.facts == (
        "KL 2.00 nats [1.60, 2.40] from the reference, per sampled answer.",
        "Mean answer length 41.0 tokens (reference 44.0).",
    )
    assert said.cautions == ()


def test_an_interval_that_includes_chance_shows_nothing():
    said = verdict(evaluated(eval_line(0), right(0.53, 0.46, 0.6)))
    assert said.tone == "unclear"
    assert said.headline.startswith("It is not shown that the policy learned the preferences")
    assert "includes chance (50\u202f%)" in said.headline
    assert said.facts[0] == "Before training 50\u202f%."


def test_an_interval_below_chance_says_that_labels_may_be_swapped():
    said = verdict(evaluated(right(0.31, 0.25, 0.38)))
    assert said.tone == "bad"
    assert said.headline.startswith("The policy prefers the rejected answers")
    assert said.facts[0] == "Check that chosen and rejected are not swapped."


def test_without_an_interval_chance_is_not_excluded():
    said = verdict(evaluated(right(0.9, None, None)))
    assert (said.tone, said.label) == ("unclear", "No interval")


@pytest.mark.parametrize(("num", "tone"), [(5, "unclear"), (6, "good")])
def test_of_fewer_than_six_prompts_nothing_is_claimed(num: int, tone: str):
    said = verdict(evaluated(eval_line(0), right(1.0, 0.57, 1.0), ledger=ledger(num)))
    assert said.tone == tone and ("of fewer than 6 nothing is claimed" in said.headline) == (
        num < 6
    )


def test_an_interval_that_was_not_logged_comes_from_the_ledger():
    records = evaluated(right(0.8, None, None), ledger=ledger(30))
    found = accuracy(records, "heldout")
    # 30 rows of one prompt each; i % 9 >= 7 is wrong: 7, 8, 16, 17, 25, 26.
    expected = wilson_interval(24 / 30, 30)
    assert found is not None and (found.low, found.high) == (expected.low, expected.high)
    other_step = evaluated(right(0.8, None, None, step=10), ledger=ledger(30))
    assert verdict(other_step).label == "No interval"


def test_without_held_out_preferences_the_report_does_not_know():
    said = verdict(Records("run", train=trained(60)))
    assert (said.tone, said.label) == ("unknown", "Not measured")
    assert said.headline.endswith("is not known: none were held out.")
    assert "the last 50 logged steps the policy was right on 70\u202f%" in said.facts[0]
    assert "evaluation.fraction" in said.facts[-1]


@pytest.mark.parametrize(
    "setting",
    [
        Setting("evaluation.fraction", "0.1", "flag"),
        Setting("evaluation.sets", "{a: b.jsonl}", "flag"),
        Setting("evaluation.sets.a", "b.jsonl", "flag"),
    ],
)
def test_held_out_preferences_without_an_evaluation_are_told_apart_from_none(setting: Setting):
    said = verdict(Records("run", train=trained(3), settings=(setting,)))
    assert said.headline.endswith("no evaluation is recorded.")


def test_the_evaluation_before_training_is_no_verdict():
    said = verdict(evaluated(eval_line(0)))
    assert (said.tone, said.label) == ("unknown", "Not trained yet")


def test_a_run_without_the_usual_set_speaks_of_the_one_it_has():
    records = Records("run", evals={"hard": (measured(right(0.8, 0.7, 0.9)),)})
    assert "of the preferences of the set “hard”" in verdict(records).headline
    told = replace(records, accounts={"hard": set_account(preferences=1)})
    assert "of 1 preference of the set “hard”" in verdict(told).headline


def test_a_measure_that_is_missing_is_said_to_be_missing():
    line = eval_line(20)
    del line["kl"], line["length"]
    said = verdict(evaluated(line))
    assert said.facts == ("The distance from the reference (sampled KL) was not measured.",)


def ratio(value: float, low: float, high: float) -> dict[str, float]:
    return {"length_ratio": value, "length_ratio_low": low, "length_ratio_high": high}


CAUTIONS: dict[str, Callable[[], Records]] = {
    "The run had not finished when this page was written: the last recorded step is 20.": lambda: (
        evaluated(eval_line(20), environment={"upweight": "0.1.0"})
    ),
    "The run had not finished when this page was written: no step is recorded.": lambda: Records(
        "run", environment={"finished": None}
    ),
    "The loss was not a finite number at 2 logged steps.": lambda: Records(
        "run", train=trained(2, loss=None)
    ),
    "by 3.00 nats on average, the rejected ones by 8.00": lambda: evaluated(
        eval_line(20, **{"logratios/chosen": -3.0, "logratios/rejected": -8.0})
    ),
    "by 3.00 nats on average, while the rejected ones rose by 1.00": lambda: evaluated(
        eval_line(20, **{"logratios/chosen": -3.0, "logratios/rejected": 1.0})
    ),
    "Sampled answers are 50\u202f% longer than the reference's.": lambda: evaluated(
        eval_line(20, length=66.0, **ratio(1.5, 1.2, 1.8))
    ),
    "Sampled answers are 50\u202f% shorter than the reference's.": lambda: evaluated(
        eval_line(20, length=22.0, **ratio(0.5, 0.3, 0.8))
    ),
    "10\u202f% of the training rows were not used: the report says why under Rows.": lambda: (
        evaluated(eval_line(20), accounts={"train": set_account(used=90, dropped={"empty": 10})})
    ),
    "always taking the longer answer is right on 100\u202f%": lambda: evaluated(
        eval_line(20), ledger=ledger(30, tokens_chosen=50)
    ),
    "always taking the shorter answer is right on 100\u202f%": lambda: evaluated(
        eval_line(20), ledger=ledger(30, tokens_chosen=5)
    ),
    "a note from the records": lambda: evaluated(eval_line(20), notes=("a note from the records",)),
}


@pytest.mark.parametrize("caution", CAUTIONS)
def test_what_is_worth_knowing_is_said(caution: str):
    assert any(caution in said for said in verdict(CAUTIONS[caution]()).cautions)


@pytest.mark.parametrize("length", [22.0, 66.0])
def test_a_length_that_has_no_interval_or_one_with_the_references_in_it_is_not_claimed(
    length: float,
):
    for known in ({"length_ratio": length / 44}, ratio(length / 44, 0.4, 1.6)):
        said = verdict(evaluated(eval_line(20, length=length, **known))).cautions
        assert not any("Sampled answers are" in caution for caution in said)


def test_the_length_rule_is_compared_prompt_by_prompt():
    # Policy right on 1 and 2, wrong on 3; the longer answer is chosen on 1 and 3.
    margins, lengths = (1.0, 1.0, -1.0), (9, 1, 9)
    pairs = [
        LedgerRow(**ledger_row(i, margin=m, tokens_chosen=n, tokens_rejected=5))
        for i, (m, n) in enumerate(zip(margins, lengths, strict=True))
    ]
    rule = length_rule(pairs)
    assert rule is not None and rule.longer
    assert rule.accuracy == wilson_interval(2 / 3, 3)
    assert rule.lead.value == pytest.approx(0.0)
    assert (rule.num_more, rule.num_fewer, rule.p) == (1, 1, 1.0)
    assert length_rule([]) is None


def test_of_a_few_prompts_nothing_is_said_against_the_length_rule():
    """Forty preferences of four prompts, all of them right by length and by the policy."""
    rows = [
        LedgerRow(
            **ledger_row(i, margin=1.0, tokens_chosen=9, tokens_rejected=5)
            | {"prompt_text": f"{i % 4}"}
        )
        for i in range(40)
    ]
    rule = length_rule(rows)
    assert rule is not None and math.isnan(rule.lead.low)
    said = verdict(evaluated(eval_line(20), ledger=tuple(rows))).cautions
    assert not any("know more than length" in caution for caution in said)


def warned(code: str, metric: str = "", step: int | None = 20, **rest: Any) -> Warned:
    return Warned(code, "said", (), step, metric, **rest)


GOOD = eval_line(0), right(0.78, 0.71, 0.84)
ANSWERS = {
    "length_ratio": 5.1, "length_ratio_low": 4.0, "repetition": 0.62, "reference_repetition": 0.01,
    "stopped": 0.02, "reference_stopped": 0.77,
}  # fmt: skip
DEGENERATE = {
    "length": "they are 5.1 times as long as the reference's",
    "repetition": "62\u202f% of four tokens in a row were in the answer before (the reference's "
    "1\u202f%)",
    "stopped": "2\u202f% of them end by themselves (the reference's 77\u202f%)",
}


def sampled(**values: float) -> dict[str, Any]:
    return right(0.78, 0.71, 0.84) | ANSWERS | values


@pytest.mark.parametrize("metric", DEGENERATE)
def test_answers_that_degenerate_are_the_headline_and_no_success(metric: str):
    records = evaluated(eval_line(0), sampled(), warnings=(warned("UW305", metric, set="heldout"),))
    said = verdict(records)
    assert (said.tone, said.label) == ("bad", "Answers degenerate")
    assert said.headline == f"The policy's answers degenerate: {DEGENERATE[metric]}."
    assert said.facts[0].startswith("The policy prefers the chosen answer on 78")


def test_every_way_in_which_answers_degenerate_is_named():
    found = tuple(warned("UW305", metric) for metric in DEGENERATE)
    said = verdict(evaluated(eval_line(0), sampled(), warnings=found))
    assert said.headline == (
        f"The policy's answers degenerate: {', and '.join(DEGENERATE.values())}."
    )
    short = verdict(evaluated(eval_line(0), sampled(length_ratio=0.2), warnings=found[:1]))
    assert "they have 20\u202f% of the length of the reference's" in short.headline


def test_answers_that_recovered_are_not_called_degenerate():
    well = {"length_ratio": 1.1, "repetition": 0.02, "stopped": 0.8}
    found = tuple(warned("UW305", metric, 10) for metric in DEGENERATE)
    assert verdict(evaluated(eval_line(0), sampled(**well), warnings=found)).tone == "good"
    # A limit of the run's own is what is asked.
    lifted = (Setting("watch.length", "6.0", "flag"),)
    long = evaluated(eval_line(0), sampled(), warnings=found[:1], settings=lifted)
    assert verdict(long).tone == "good"
    strict = (Setting("watch.length", "1.05", "flag"),)
    long = evaluated(eval_line(0), sampled(**well), warnings=found[:1], settings=strict)
    assert verdict(long).label == "Answers degenerate"


def test_answers_of_rounds_are_held_against_the_first_round_where_nothing_is_evaluated():
    rounds = tuple(
        measured({"step": i, "epoch": 0.1, "reward": i, "stopped": s})
        for i, s in ((1, 0.9), (2, 0.1))
    )
    asked = (Setting("objective", "ppo", "flag"),)
    records = Records("run", train=rounds, settings=asked, warnings=(warned("UW305", "stopped"),))
    said = verdict(records)
    assert said.headline == (
        "The policy's answers degenerate: 10\u202f% of them end by themselves (the first round's "
        "90\u202f%)."
    )


def test_a_run_that_was_ended_did_not_succeed_whatever_it_measured_before():
    ended = warned("UW303", "loss", 12, refused=True)
    said = verdict(evaluated(*GOOD, warnings=(ended,)))
    assert (said.tone, said.label) == ("bad", "Refused")
    assert said.headline == "The run did not finish: UW303 ended it at step 12, see Warnings."
    before = warned("UW210", step=None)
    assert verdict(evaluated(*GOOD, warnings=(before,))).tone == "good"
    assert verdict(Records("run", warnings=(ended,))).label == "Refused"


def test_a_policy_far_from_its_reference_is_no_plain_success():
    far = sampled(kl=80.0, kl_low=70.0, kl_high=90.0)
    said = verdict(evaluated(eval_line(0), far, warnings=(warned("UW308", "kl"),)))
    assert (said.tone, said.label) == ("unclear", "Far from the reference")
    assert said.headline.endswith("But its answers are 80.0 nats from the reference (UW308).")
    assert verdict(evaluated(*GOOD, warnings=(warned("UW308", "kl"),))).tone == "good"
    # What was said of an estimate below 0 says nothing of a distance that may still be chance.
    wide = sampled(kl=80.0, kl_low=-5.0, kl_high=190.0)
    below = (warned("UW308", "kl_high"),)
    assert "UW308" not in verdict(evaluated(eval_line(0), wide, warnings=below)).headline
    fell = right(0.78, 0.71, 0.84) | {"logratios/chosen": -40.0}
    said = verdict(evaluated(eval_line(0), fell, warnings=(warned("UW304"),)))
    assert (said.tone, said.label) == ("unclear", "Chosen answers less likely")
    assert "the chosen answers lost 40.0 nats" in said.headline


def test_an_accuracy_by_margins_of_nothing_is_no_success():
    little = right(0.78, 0.71, 0.84) | {"rewards/spread": 0.0004}
    said = verdict(evaluated(eval_line(0), little))
    assert (said.tone, said.label) == ("unclear", "Hardly trained")
    assert said.headline.startswith(
        "The policy hardly differs from its start: margins are 4e-4 in size, and 0 there."
    )
    much = right(0.78, 0.71, 0.84) | {"rewards/spread": 0.4}
    assert verdict(evaluated(eval_line(0), much)).tone == "good"
    # A limit of the run's own is what is asked.
    for line, flat, tone in ((little, "0.0001", "good"), (much, "0.5", "unclear")):
        own = (Setting("watch.flat", flat, "flag"),)
        assert verdict(evaluated(eval_line(0), line, settings=own)).tone == tone


def test_a_run_that_did_not_move_its_margins_says_so_first():
    still = {"rewards/spread": 0.0004}
    said = verdict(evaluated(eval_line(0), right(0.55, 0.44, 0.66) | still))
    assert (said.tone, said.label) == ("unclear", "Hardly trained")
    assert said.headline.startswith("The policy hardly differs from its start")
    assert "not shown that the policy learned" in said.facts[0]


def test_a_loss_that_is_not_shown_to_be_below_its_start_is_no_success():
    last = right(0.78, 0.71, 0.84)
    change = {"loss_change": -0.01, "loss_change_low": -0.05, "loss_change_high": 0.03}
    said = verdict(evaluated(eval_line(0), last | {"loss": 0.68} | change))
    assert (said.tone, said.label) == ("unclear", "Loss not below its start")
    assert "was 0.690 before training and is 0.680 (change [−0.0500, 0.0300])" in said.headline
    sure = {**change, "loss_change_high": -0.001}
    assert verdict(evaluated(eval_line(0), last | {"loss": 0.68} | sure)).tone == "good"
    assert verdict(evaluated(eval_line(0), last | {"loss": 0.7})).tone == "unclear"
    # Without an evaluation before training nothing is known of a change.
    assert verdict(evaluated(last | {"loss": 0.7})).tone == "good"


def in_sets(*warnings: Warned, **last: dict[str, float]) -> Records:
    """Of each set an evaluation before training, and the last one."""
    evals = {
        name: (measured(eval_line(0, name)), measured(sampled(**values) | {"set": name}))
        for name, values in last.items()
    }
    return Records("run", evals=evals, warnings=warnings)


WELL = {
    "length_ratio": 1.1, "length_ratio_low": 0.9, "length_ratio_high": 1.3, "repetition": 0.02,
    "repetition_low": 0.0, "repetition_high": 0.04, "stopped": 0.8, "stopped_low": 0.7,
    "stopped_high": 0.9,
}  # fmt: skip


@pytest.mark.parametrize("metric", DEGENERATE)
def test_answers_that_degenerate_on_another_set_are_the_headline_which_names_it(metric: str):
    said = verdict(in_sets(warned("UW305", metric, set="hard"), heldout=WELL, hard={}))
    assert said.label == "Answers degenerate"
    assert said.headline == (
        f"The policy's answers degenerate: {DEGENERATE[metric]}, on the set “hard”."
    )
    # It is the set that was warned of, whatever the others say by their points.
    said = verdict(in_sets(warned("UW305", metric, set="hard"), heldout={}, hard=WELL))
    assert said.tone == "good"


def test_a_set_that_degenerates_after_another_one_is_found_by_its_interval():
    # The records of a run whose watch spoke once of a metric, and spoke of the other set.
    spoken = warned("UW305", "stopped", 10, set="heldout")
    sure = {"stopped": 0.02, "stopped_low": 0.0, "stopped_high": 0.1}
    said = verdict(in_sets(spoken, heldout=WELL, hard=sure))
    assert said.headline.endswith("(the reference's 77\u202f%), on the set “hard”.")
    assert verdict(in_sets(spoken, heldout=WELL, hard=sure | {"stopped_high": 0.9})).tone == "good"


def test_a_policy_far_from_its_reference_on_another_set_is_no_plain_success():
    near, far = ({**WELL, "kl": v, "kl_low": v - 5, "kl_high": v + 5} for v in (9.0, 80.0))
    said = verdict(in_sets(warned("UW308", "kl", set="hard"), heldout=near, hard=far))
    assert (said.tone, said.label) == ("unclear", "Far from the reference")
    assert said.headline.endswith(
        "But its answers are 80.0 nats from the reference, on the set “hard” (UW308)."
    )
    assert verdict(in_sets(warned("UW308", "kl", set="hard"), heldout=far, hard=near)).tone == (
        "unclear"
    )
    assert verdict(in_sets(warned("UW308", "kl", set="hard"), heldout=near, hard=near)).tone == (
        "good"
    )


@pytest.mark.parametrize(
    ("model", "shown"),
    [("org/name", "org/name"), ("runs/a/model", "runs/a/model"), ("/home/me/b/model", "b/model")],
)
def test_a_model_on_this_machine_is_named_by_the_end_of_its_path(model: str, shown: str):
    page = masthead(Records("run", environment={"model": model}))
    assert f"<span>{shown}</span>" in page
