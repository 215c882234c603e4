"""What a report says and draws of each objective, from records as its runs write them."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from run_records import RUN_YAML, eval_line, measured, sample, set_account, train_line, write_run
from upweight.evidence.records import Records, Sample, Setting, Warned, read_records
from upweight.evidence.report import render
from upweight.evidence.report.findings import SUBJECTS, gain
from upweight.evidence.report.sections_curves import curves
from upweight.evidence.report.sections_frontier import reward_against_kl
from upweight.evidence.report.sections_numbers import key_numbers
from upweight.evidence.report.sections_record import rows
from upweight.evidence.report.verdict import verdict
from upweight.recipes.kinds import KINDS

ANSWERS = {
    "kl": 2.0, "kl_low": 1.6, "kl_high": 2.4, "length": 40.0, "reference_length": 41.0,
    "repetition": 0.01, "repetition_low": 0.0, "repetition_high": 0.02,
    "reference_repetition": 0.01, "stopped": 0.9, "stopped_low": 0.8, "stopped_high": 0.95,
    "reference_stopped": 0.92,
}  # fmt: skip
REWARD = {"reward": 0.6, "reward_low": 0.5, "reward_high": 0.7, "reference_reward": 0.4}
ROUND = {"reward": 0.5, "kl": 1.0, "length": 40.0, "stopped": 0.9, "beta": 0.05}
SPEED = {"grad_norm": 1.0, "learning_rate": 1e-5, "num_tokens": 9.0, "tokens_per_second": 5.0}
POLICY = {"clip_fraction": 0.1, "approx_kl": 0.01, "advantages/nonzero": 0.9}
PAIRS = {"rewards/chosen": 1.0, "rewards/rejected": 0.0, "rewards/margins": 1.0}
RIGHT = {"rewards/accuracies": 0.8}

TRAIN: dict[str, dict[str, float]] = {
    "sft": {"logps/response": -20.0, "tokens/response": 9.0},
    "reward": {**PAIRS, **RIGHT},
    "online_dpo": {
        **ROUND, **PAIRS, **RIGHT, "logratios/chosen": 1.0, "logratios/rejected": 0.5,
        "tokens/chosen": 8.0, "tokens/rejected": 8.0,
    },
    "ppo": {**ROUND, **POLICY, "value_loss": 0.1, "grad_norm/value": 0.2},
    "grpo": {**ROUND, **POLICY},
    "rloo": {**ROUND, **POLICY},
}  # fmt: skip
EVAL: dict[str, dict[str, float]] = {
    "sft": {"logps/response": -19.0, "tokens/response": 9.0, "num_responses": 24, **ANSWERS},
    "reward": {
        **PAIRS, **RIGHT, "rewards/accuracies_low": 0.7, "rewards/accuracies_high": 0.87,
        "num_pairs": 50,
    },
    **dict.fromkeys(("online_dpo", "ppo", "grpo", "rloo"), {**ANSWERS, **REWARD}),
}  # fmt: skip
LOSS = ("sft", "reward")


def run_of(objective: str, *, evals: int = 3, **last: Any) -> Records:
    """Five steps, and evaluations after steps 0, 10 and 20; `last` replaces in the last one."""
    steps = [
        {"step": step, "epoch": step / 5, "loss": 2.0 / step, **SPEED, **TRAIN[objective]}
        for step in range(1, 6)
    ]
    lines: list[dict[str, Any]] = []
    for step in (0, 10, 20)[:evals]:
        loss = {"loss": 3.0 - step / 20} if objective in LOSS else {}
        start = {"rewards/accuracies": 0.5} if objective == "reward" and step == 0 else {}
        line = {"step": step, "epoch": step / 5, "set": "heldout"}
        lines.append(line | loss | EVAL[objective] | start)
    if lines:
        lines[-1] |= last
    answers = tuple(Sample(**sample(20, f"Prompt {i}")) for i in range(8))
    asked = {"objective": objective, "rollout.reward": "vader", "evaluation.fraction": "0.1"}
    return Records(
        "run",
        train=tuple(map(measured, steps)),
        evals={"heldout": tuple(map(measured, lines))} if lines else {},
        samples=() if objective == "reward" else answers,
        settings=tuple(Setting(key, value, "flag") for key, value in asked.items()),
    )


def titles(html: str) -> list[str]:
    return re.findall(r"<figcaption>(.*?) <small>", html)


def test_every_objective_has_a_subject():
    assert SUBJECTS.keys() == KINDS.keys()
    for name, kind in KINDS.items():
        assert (SUBJECTS[name] == "answers") == kind.draws
        assert (SUBJECTS[name] == "ranking") == (not kind.answers)


@pytest.mark.parametrize("objective", TRAIN)
def test_a_page_has_no_empty_chart_and_speaks_of_preferences_only_where_there_are_some(objective):
    html = render(run_of(objective))
    charts = re.findall(r'<figure class="chart">(.*?)</figure>', html, re.S)
    assert charts and all('<path class="line' in c or '<path class="mark' in c for c in charts)
    assert "Not recorded in this run" not in html
    assert "<h2>Preferences</h2>" not in html
    if objective != "reward":
        assert "held-out preference" not in html
    assert ("<h2>Samples</h2>" in html) == (objective != "reward")
    assert ("<h2>Reward against KL</h2>" in html) == KINDS[objective].draws


def test_the_curves_of_each_objective_are_its_own():
    named = {objective: set(titles(curves(run_of(objective)))) for objective in TRAIN}
    assert {"Loss", "Log-prob of responses", "Scored length"} <= named["sft"]
    assert not {"Accuracy", "Reward margin", "Reward of sampled answers"} & named["sft"]
    assert {"Score margin", "Accuracy", "Scores of training answers"} == named["reward"] - {
        "Loss", "Gradient norm", "Learning rate", "Throughput",
    }  # fmt: skip
    assert {"Reward of sampled answers", "Reward of rollouts", "Sampled KL"} <= named["ppo"]
    assert "Reward margin" not in named["ppo"]
    assert {"Change of log-prob: train", "Accuracy"} <= named["grpo"] ^ named["online_dpo"]


def test_a_round_s_measure_that_never_changes_is_not_drawn():
    records = run_of("ppo")
    assert "Weight of the KL term" not in titles(curves(records))
    steered = tuple(
        measured({"step": i, "epoch": 0.1, **TRAIN["ppo"], "beta": 0.05 * i}) for i in (1, 2)
    )
    assert "Weight of the KL term" in titles(curves(Records(
        "run", train=steered, settings=records.settings
    )))  # fmt: skip


def test_the_loss_of_sft_is_read_in_nats_per_token_and_starts_at_no_known_value():
    html = curves(run_of("sft"))
    assert "Loss <small>nats per token" in html and "ln 2" not in html
    assert "ln 2: equal scores" in curves(run_of("reward"))


def test_sft_says_from_where_to_where_the_held_out_loss_went():
    said = verdict(run_of("sft"))
    assert (said.tone, said.label) == ("good", "Held-out loss fell")
    assert said.headline == (
        "The loss on 24 held-out responses fell from 3.00 to 2.00 nats per token."
    )
    assert said.facts[0] == "Perplexity went from 20.1 to 7.39."
    assert said.facts[1].startswith("No interval is recorded")
    assert said.facts[2] == "KL 2.00 nats [1.60, 2.40] from the reference, per sampled answer."


def test_answers_as_long_as_those_that_sft_imitates_are_not_called_degenerate():
    seen = tuple(
        Warned(code, "said", (), 10, metric, "heldout")
        for code, metric in (("UW305", "length"), ("UW308", "kl"), ("UW305", "stopped"))
    )

    def said(*warnings: Warned, **last: float) -> str:
        far = {"kl": 80.0, "kl_low": 70.0, "kl_high": 90.0, "length_ratio": 0.14, "length": 9.0}
        return verdict(replace(run_of("sft", **far | last), warnings=warnings)).label

    assert said(*seen) == "Held-out loss fell"
    # Training responses have 9 tokens.
    assert said(*seen, length=2.0) == "Answers degenerate"
    assert said(*seen, stopped=0.1) == "Answers degenerate"


def test_sft_says_when_the_held_out_loss_rose_and_where_it_was_lowest():
    said = verdict(run_of("sft", loss=3.5))
    assert (said.tone, said.label) == ("bad", "Held-out loss rose")
    assert "rose from 3.00 to 3.50" in said.headline
    assert any("lowest at step 10, 2.50" in fact for fact in said.facts)
    assert verdict(run_of("sft", loss=3.0)).tone == "unclear"
    assert verdict(run_of("sft", evals=1)).label == "Not trained yet"
    gone = run_of("sft", loss=math.nan)
    assert "fell from 3.00 to 2.50" in verdict(gone).headline


def changed(change: float, low: float, high: float) -> dict[str, float]:
    return {"loss_change": change, "loss_change_low": low, "loss_change_high": high}


def test_sft_claims_no_change_of_the_loss_that_its_interval_does_not_show():
    said = verdict(run_of("sft", loss=2.9, **changed(-0.1, -0.3, 0.1)))
    assert (said.tone, said.label) == ("unclear", "Held-out loss not shown to change")
    assert said.headline.startswith("It is not shown that training changed the loss on 24 held-out")
    assert "from 3.00 to 2.90" in said.headline
    assert said.facts[0] == "The change is −0.100\u00a0[−0.300, 0.100]."
    fell = verdict(run_of("sft", loss=2.9, **changed(-0.1, -0.15, -0.05)))
    assert (fell.tone, fell.label) == ("good", "Held-out loss fell")
    assert not any("No interval" in fact for fact in fell.facts)
    rose = verdict(run_of("sft", loss=3.1, **changed(0.1, 0.05, 0.15)))
    assert rose.tone == "bad"
    # Sure, and too little to be seen in the numbers.
    little = verdict(run_of("sft", loss=2.9999, **changed(-1e-4, -2e-4, -1e-5)))
    assert (little.tone, little.label) == ("unclear", "Held-out loss unchanged")
    assert "is what it was before training, 3.00" in little.headline


def test_a_ranking_that_was_as_good_before_training_was_not_learned():
    records = run_of("reward")
    first, *rest = records.evals["heldout"]
    before = replace(first, values={**first.values, "rewards/accuracies": 0.75})
    said = verdict(replace(records, evals={"heldout": (before, *rest)}))
    assert (said.tone, said.label) == ("unclear", "No better than before")
    assert said.headline.startswith(
        "It is not shown that training made the reward model right more often: before it, it was "
        "on 75\u202f%. The reward model scores the chosen answer higher on 80\u202f%"
    )


def test_a_reward_model_ranks_and_has_no_answers():
    said = verdict(run_of("reward"))
    assert (said.tone, said.label) == ("good", "Better than chance")
    assert said.headline.startswith("The reward model scores the chosen answer higher on 80\u202f%")
    assert "[70, 87]" in said.headline
    assert said.facts == ("Mean score: chosen 1.00, rejected 0.",)
    low = {"rewards/accuracies_low": 0.4}
    assert "not shown that the reward model learned" in verdict(run_of("reward", **low)).headline


@pytest.mark.parametrize("objective", ["ppo", "grpo", "rloo", "online_dpo"])
def test_an_online_run_says_its_reward_the_reference_s_and_the_kl(objective: str):
    said = verdict(run_of(objective))
    assert (said.tone, said.label) == ("good", "Above the reference")
    assert said.headline == (
        "The policy's answers to 8 held-out prompts earn 0.600\u00a0[0.500, 0.700] on average, "
        "the reference's 0.400, at a sampled KL of 2.00 nats\u00a0[1.60, 2.40]."
    )
    assert "The reward is vader, the one that was trained for." in said.facts


def test_the_difference_prompt_by_prompt_decides_where_it_is_recorded():
    # The mean's own interval is above the reference's mean, that of the difference is not above 0.
    paired = {"reward_gain": 0.2, "reward_gain_low": -0.05, "reward_gain_high": 0.45}
    said = verdict(run_of("ppo", **paired))
    assert (said.tone, said.label) == ("unclear", "Not told apart from the reference")
    assert said.facts[0] == "The difference is +0.200\u00a0[−0.0500, 0.450]."
    worse = {"reward_gain": -0.2, "reward_gain_low": -0.3, "reward_gain_high": -0.1}
    assert verdict(run_of("ppo", **worse)).tone == "bad"
    unpaired = gain(run_of("ppo").evals["heldout"])
    assert unpaired is not None
    assert (unpaired.value, unpaired.low, unpaired.high) == pytest.approx((0.2, 0.1, 0.3))


def test_another_reward_than_the_trained_one_is_named():
    records = run_of("ppo")
    judged = (*records.settings, Setting("evaluation.true_reward", "count.py:f", "flag"))
    said = verdict(Records("run", evals=records.evals, settings=judged))
    assert "The reward is count.py:f; trained for was vader." in said.facts


@pytest.mark.parametrize("objective", ["sft", "ppo"])
def test_a_kl_whose_whole_interval_is_below_zero_is_not_called_small(objective: str):
    records = run_of(objective, kl=-0.5, kl_low=-0.8, kl_high=-0.2)
    facts = " ".join(verdict(records).facts)
    assert "The whole interval of the KL lies below 0, where no KL is" in facts
    assert "Take it as not known." in facts and "small beside its noise" not in facts
    assert "below 0: see the top" in key_numbers(records)
    assert "see the top" not in key_numbers(run_of(objective))


@pytest.mark.parametrize("objective", ["sft", "ppo"])
def test_an_estimate_of_kl_below_zero_is_called_one(objective: str):
    said = verdict(run_of(objective, kl=-0.1, kl_low=-0.3, kl_high=0.1))
    assert any("estimate from samples that falls below 0" in fact for fact in said.facts)
    assert not any("below 0" in fact for fact in verdict(run_of(objective)).facts)


@pytest.mark.parametrize(
    ("objective", "question", "steps"),
    [
        ("sft", "more than its training responses", "0.913 nats per token, after 2.00"),
        ("reward", "Whether the reward model learned", "right on 80\u202f%"),
        ("ppo", "earns more than its reference", "earned 0.500, after 0.500"),
    ],
)
def test_without_an_evaluation_each_says_what_is_not_known(objective, question, steps):
    records = run_of(objective, evals=0)
    assert verdict(records).headline.endswith("no evaluation is recorded.")
    settings = tuple(s for s in records.settings if s.key != "evaluation.fraction")
    said = verdict(Records("run", train=records.train, settings=settings))
    assert said.tone == "unknown" and question in said.headline
    assert steps in said.facts[0] and "evaluation.fraction" in said.facts[-1]


def test_prompts_without_sampled_answers_are_not_a_verdict():
    bare = measured({"step": 20, "epoch": 1.0, "set": "heldout"})
    records = Records("run", evals={"heldout": (bare,)}, settings=run_of("ppo").settings)
    said = verdict(records)
    assert "no answers to held-out prompts were rewarded" in said.headline
    assert "Set evaluation.samples to find out." in said.facts


def test_answers_to_prompts_of_their_own_are_the_verdict_and_not_missed():
    asked = run_of("ppo")
    bare = tuple(measured({"step": s, "epoch": s / 5, "set": "heldout"}) for s in (0, 10, 20))
    answered = tuple(replace(row, set="prompts") for row in asked.evals["heldout"])
    evals = {"heldout": bare, "prompts": answered}
    said = verdict(replace(asked, samples=(), evals=evals))
    assert (said.tone, said.label) == ("good", "Above the reference")
    assert "answers to prompts of the set “prompts” earn 0.600" in said.headline
    # A run about preferences or likelihood takes them as facts.
    lines = {s: {"step": s, "epoch": 0.1, "set": "heldout"} for s in (0, 20)}
    loss = tuple(measured({**line, "loss": 3.0 - s / 20}) for s, line in lines.items())
    imitated = replace(run_of("sft"), evals={"heldout": loss, "prompts": answered})
    said, where = verdict(imitated), "on the set “prompts”"
    assert f"KL 2.00 nats [1.60, 2.40] from the reference, per sampled answer, {where}." in (
        said.facts
    )
    assert f"Mean answer length 40.0 tokens (reference 41.0), {where}." in said.facts
    assert (
        f"Mean reward of sampled answers by vader 0.600 [0.500, 0.700] (reference 0.400), {where}."
        in said.facts
    )
    tiles = key_numbers(imitated)
    assert f"[1.60, 2.40], per answer, {where}" in tiles and f"reference 41.0, {where}" in tiles
    assert "reference 0.400, set prompts" in tiles
    ratio = {"length_ratio": 2.0, "length_ratio_low": 1.5, "length_ratio_high": 2.7}
    longer = tuple(replace(r, values={**r.values, "length": 82.0, **ratio}) for r in answered)
    said = verdict(replace(imitated, evals={"heldout": loss, "prompts": longer}))
    assert f"Sampled answers are 100\u202f% longer than the reference's, {where}." in said.cautions
    # What is of the headline's own set is not said to be of another.
    assert "on the set" not in " ".join(verdict(run_of("sft")).facts) + key_numbers(run_of("sft"))


def test_a_true_reward_beside_preferences_is_said_drawn_and_not_the_verdict():
    lines = (eval_line(0, **REWARD), eval_line(20, **REWARD))
    judged = (Setting("evaluation.true_reward", "vader", "flag"),)
    records = Records("run", evals={"heldout": tuple(map(measured, lines))}, settings=judged)
    said = verdict(records)
    assert said.label == "Better than chance"
    assert "Mean reward of sampled answers by vader 0.600 [0.500, 0.700] (reference 0.400)." in (
        said.facts
    )
    assert "Reward of sampled answers" in titles(curves(records))
    assert "Reward <small>vader" not in titles(key_numbers(records))
    assert "[0.500, 0.700], reference 0.400, set heldout" in key_numbers(records)


def test_the_frontier_has_every_evaluation_with_its_intervals():
    html = reward_against_kl(run_of("ppo"))
    for step in (0, 10, 20):
        said = f"step {step}: reward 0.600\u00a0[0.500, 0.700] at KL 2.00\u00a0[1.60, 2.40]"
        assert f'title="heldout, {said}"' in html
    assert html.count('<i class="spot m-dot t-1') == 3
    (bars,) = re.findall(r'<path class="bars" d="(.*?)"', html)
    assert bars.count("V") == bars.count("H") == 3
    assert "mean reward (vader)" in html and "the reference&#x27;s answers" in html
    assert reward_against_kl(run_of("sft")) == reward_against_kl(Records("run")) == ""
    bare = reward_against_kl(run_of("ppo", kl=math.nan))
    assert bare.count('<i class="spot') == 3


def test_a_record_that_the_objective_does_not_write_is_not_missed(tmp_path: Path):
    gone = ("ledger.parquet", "samples.jsonl")
    run = write_run(tmp_path, without=gone)
    assert len(read_records(run).notes) == 2
    (run / "run.yaml").write_text(RUN_YAML.replace("objective: dpo", "objective: reward"))
    assert read_records(run).notes == ()
    (run / "run.yaml").write_text(RUN_YAML.replace("objective: dpo", "objective: ppo"))
    assert read_records(run).notes == ("samples.jsonl is missing: there are no sampled answers.",)


def test_columns_of_rows_that_no_set_has_are_left_out():
    prompts = set_account(preferences=0, responses=0, lengths={"prompt": {"p50": 3}, "chosen": {}})
    html = rows(Records("run", accounts={"train": prompts}))
    assert "Preferences" not in html and '<th scope="col">Responses</th>' not in html
    assert "train</bdi>, prompt" in html and "train</bdi>, chosen" not in html
    imitated = Records(
        "run",
        accounts={"train": set_account(left_out={"not_chosen": 98})},
        settings=run_of("sft").settings,
    )
    html = rows(imitated)
    assert "Preferences" not in html and "98 not_chosen" in html
    assert "preference" not in key_numbers(imitated) and "2 dropped" in key_numbers(imitated)


def test_the_train_lines_of_dpo_are_as_they_were():
    records = Records("run", train=tuple(measured(train_line(step)) for step in (1, 2, 3)))
    assert titles(curves(records)) == [
        "Loss", "Reward margin", "Accuracy", "Change of log-prob: train", "Gradient norm",
        "Learning rate", "Scored length", "Throughput",
    ]  # fmt: skip
