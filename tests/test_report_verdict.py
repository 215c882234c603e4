from __future__ import annotations

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
)
from upweight.evidence.report.findings import accuracy, length_rule
from upweight.evidence.report.verdict import verdict
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
        eval_line(20, length=66.0)
    ),
    "Sampled answers are 50\u202f% shorter than the reference's.": lambda: evaluated(
        eval_line(20, length=22.0)
    ),
    "10\u202f% of the training rows were not used: see Rows.": lambda: evaluated(
        eval_line(20), accounts={"train": set_account(used=90, dropped={"empty": 10})}
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
