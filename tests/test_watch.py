"""Each failure of training is planted in a run, and a run without it raises nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from oracles import loaded, random_trees
from runs import furnish, rows_of, train, write_rows
from upweight.config import Watch as Limits
from upweight.data.stream import StepPlan
from upweight.errors import Refusal
from upweight.evidence.evaluate import answers_record
from upweight.models.sample import Sample
from upweight.stats import repeated
from upweight.trust.watch import RECENT, Told, Watch
from upweight.trust.watch.orders import Orders
from upweight.types import Tree


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tmp_path, monkeypatch)


HIGH = "rewards/accuracies_high"


def warnings(out: str) -> dict[str, str]:
    return {
        row["code"]: row["said"]
        for row in rows_of(f"{out}/metrics.jsonl")
        if row["kind"] == "warning"
    }


def record(step: int, **values: float) -> dict[str, object]:
    base = {
        "loss": 0.6, "grad_norm": 1.0, "learning_rate": 1e-6, "rewards/accuracies": 0.6,
        "logratios/chosen": -0.1, "logratios/rejected": -0.2, "tokens/chosen": 10.0,
        "tokens/rejected": 10.0, "rewards/margins": 0.1,
    }  # fmt: skip
    return {"kind": "train", "step": step, **base, **values}


def test_weights_in_bf16_that_swallow_their_updates_are_refused():
    lm = loaded()
    lm.model.to(torch.bfloat16)  # pyright: ignore
    watch = Watch(lm, Limits())
    with torch.no_grad():
        for p in lm.model.parameters():
            p += 1e-4  # as AdamW's first step, in which every element moves by the rate
    with pytest.raises(Refusal, match=r"% of the weights have moved.*bfloat16.*UW104"):
        watch.after(record(1))


def test_weights_in_fp32_hold_the_same_updates():
    lm = loaded()
    watch = Watch(lm, Limits())
    with torch.no_grad():
        for p in lm.model.parameters():
            p += 1e-4
    assert watch.after(record(1)) == []


def moving(**limits: float) -> Watch:
    watch = Watch(loaded(), Limits(**limits), Told(trees=random_trees([(6, 5, 4)])))
    watch.seen.moved, watch.seen.judged = 1.0, True
    return watch


def codes(watch: Watch, records: list[dict[str, object]]) -> list[str]:
    return [finding.code for row in records for finding in watch.after(row)]


def test_a_policy_is_told_from_its_reference_unless_that_was_just_renewed():
    same = {"logratios/chosen": 0.0, "logratios/rejected": 0.0}

    def after_two_records(move: bool, **more: float) -> list[str]:
        watch = moving()
        found = codes(watch, [record(2, **same, **more)])
        with torch.no_grad():
            for p in watch.seen.lm.model.parameters():
                p += 1e-3 * move
        return found + codes(watch, [record(3, **same, **more)])

    assert after_two_records(True, **{"reference/renewed": 1.0}) == []
    # Updates may be too small for what a forward pass holds: its log-probs are those of before.
    assert after_two_records(False) == []
    for more in ({}, {"reference/renewed": 0.5}):
        with pytest.raises(Refusal, match="the reference is the policy itself"):
            after_two_records(True, **more)


def test_a_policy_without_rows_is_told_from_its_reference_by_its_prompts():
    bare = [replace(t, responses=(), ids=t.ids[:1], stopped=()) for t in random_trees([(6, 5, 4)])]
    watch = moving()
    watch.seen.told = Told(trees=bare)
    assert not watch.seen.says_something_else()
    with torch.no_grad():
        for p in watch.seen.lm.model.parameters():
            p += 1e-3
    assert watch.seen.says_something_else()


def test_chosen_responses_that_lose_probability_are_reported_once():
    falling = [record(step, **{"logratios/chosen": -11.0}) for step in range(1, 3 * RECENT)]
    assert codes(moving(), falling) == ["UW304"]
    assert codes(moving(displaced=1.2), falling) == []
    assert codes(moving(), [row | {"logratios/rejected": 4.0} for row in falling]) == ["UW304"]
    # One step's pairs are few: a mean over several decides.
    single = [record(step) for step in range(1, RECENT + 1)]
    single[-1] |= {"logratios/chosen": -11.0}
    assert codes(moving(), single) == []


def test_pairs_that_are_all_told_apart_are_reported():
    solved = {"rewards/accuracies": 1.0, "loss": 0.001}
    assert codes(moving(), [record(step, **solved) for step in range(1, 20)]) == ["UW306"]
    learned = {"rewards/accuracies": 1.0, "loss": 0.1}
    assert codes(moving(), [record(step, **learned) for step in range(1, 20)]) == []


def evaluation(step: int, **values: float) -> dict[str, object]:
    base = {"rewards/accuracies": 0.7, "rewards/accuracies_low": 0.6, HIGH: 0.8}
    base |= {"length": 30.0, "reference_length": 30.0, "kl": 3.0, "kl_low": 2.0}
    return {"kind": "eval", "set": "heldout", "step": step, **base, **values}


SOLVED = {"rewards/accuracies": 1.0, "loss": 0.001}
AT_CHANCE = {"rewards/accuracies": 0.5, "rewards/accuracies_low": 0.4, HIGH: 0.6}


def test_pairs_that_are_solved_do_not_silence_that_they_are_learned_by_heart():
    rows = [record(step, **SOLVED) for step in range(1, 20)]
    rows += [evaluation(step, **AT_CHANCE) for step in (20, 40)]
    watch = moving()
    said = [finding.said for row in rows for finding in watch.after(row)]
    assert len(said) == 2
    assert "nothing is left to learn" in said[0] and "learned by heart" in said[1]


def test_a_set_that_is_solved_does_not_silence_another_one_at_chance():
    easy = {"rewards/accuracies": 0.99, "rewards/accuracies_low": 0.975, HIGH: 1.0}
    rows = [record(step, **{"rewards/accuracies": 0.95}) for step in range(1, 20)]
    for step in (20, 40):
        rows.append(evaluation(step, **easy) | {"set": "easy"})
        rows += [evaluation(step, **AT_CHANCE) | {"set": name} for name in ("hard", "harder")]
    watch = moving()
    seen = [(f.observer, row["set"]) for row in rows for f in watch.after(row)]
    assert seen == [
        ("held_out_is_solved", "easy"),
        ("not_better_than_chance", "hard"),
        ("not_better_than_chance", "harder"),
    ]


def test_a_watch_that_is_resumed_says_only_what_was_not_said():
    def resumed(*lines: dict[str, object]) -> list[str]:
        watch = moving()
        watch.resumed(lines)
        return codes(watch, [*rows, at_chance])

    rows = [record(step, **SOLVED) for step in range(1, 20)]
    at_chance = evaluation(20, **AT_CHANCE)
    watch = moving()
    (solved,) = [finding for row in rows for finding in watch.after(row)]
    (by_heart,) = watch.after(at_chance)
    first = {"kind": "warning", "step": 8, **asdict(solved)}
    second = {"kind": "warning", "step": 20, "set": "heldout", **asdict(by_heart)}
    assert resumed(first) == ["UW306"]
    assert resumed(first, second) == []


def test_held_out_chosen_responses_that_lose_probability_are_reported():
    lost = {"logratios/chosen": -160.0, "tokens/chosen": 300.0}
    lost |= {"logratios/rejected": -190.0, "tokens/rejected": 300.0, "num_pairs": 20}
    (found,) = moving().after(evaluation(4, **lost))
    assert found.code == "UW304" and "held-out chosen responses have lost 0.53" in found.said
    assert "rejected ones have lost 0.63" in found.said
    assert codes(moving(displaced=0.6), [evaluation(4, **lost)]) == []
    assert codes(moving(), [evaluation(4, **lost | {"num_pairs": 5})]) == []


def test_a_run_that_moves_as_far_as_a_healthy_one_displaces_nothing():
    # The demo at its end: a rate of 5e-4 with LoRA, some 6 nats from its reference.
    little = {"logratios/chosen": -6.0, "tokens/chosen": 24.0, "num_pairs": 60}
    little |= {"logratios/rejected": -14.0, "tokens/rejected": 24.0}
    rows = [record(step, **little) for step in range(1, 3 * RECENT)]
    assert codes(moving(), [*rows, evaluation(40, **little)]) == []


def test_memory_of_the_training_rows_is_told_from_learning():
    learned = [record(step, **{"rewards/accuracies": 0.95}) for step in range(1, RECENT + 1)]
    by_heart = evaluation(4, **{"rewards/accuracies": 0.55, "rewards/accuracies_low": 0.45})
    assert codes(moving(), [*learned, by_heart]) == ["UW306"]
    assert codes(moving(), [*learned, evaluation(4)]) == []
    assert codes(moving(), [by_heart]) == []


def test_a_sampled_kl_that_is_negative_beyond_chance_is_named_once():
    below = {"kl": -1.5, "kl_low": -2.5, "kl_high": -0.4}
    watch = moving()
    assert codes(watch, [evaluation(4, **below), evaluation(8, **below)]) == ["UW308"]
    assert codes(watch, [record(9, **below), record(10, **below)]) == ["UW308"]
    # It does not stand in the way of what is said of a policy that is far.
    far = {"kl": 80.0, "kl_low": 60.0, "kl_high": 90.0}
    (found,) = watch.after(evaluation(12, **far))
    assert found.metric == "kl"
    (found,) = moving().after(record(3, **below))
    assert found.metric == "kl_high" and "which no KL can be" in found.said
    near = {"kl": -0.05, "kl_low": -0.08, "kl_high": -0.03}
    wide = {"kl": -1.5, "kl_low": -3.5, "kl_high": 0.2}
    assert codes(moving(), [evaluation(4, **near), evaluation(8, **wide), record(9, **wide)]) == []


def times_as_long(low: float, high: float) -> dict[str, float]:
    keys = ("length_ratio_low", "length_ratio", "length_ratio_high")
    return dict(zip(keys, (low, (low * high) ** 0.5, high), strict=True))


@pytest.mark.parametrize(("low", "high"), [(3.1, 3.5), (0.2, 0.32)])
def test_answers_that_grow_or_shrink_are_reported(low: float, high: float):
    told = evaluation(4, **times_as_long(low, high))
    assert codes(moving(), [told]) == ["UW305"]
    assert codes(moving(length=5.5), [told]) == []


@pytest.mark.parametrize(("low", "high"), [(2.9, 9.0), (0.1, 0.34)])
def test_lengths_that_a_few_answers_may_have_by_chance_are_not(low: float, high: float):
    assert codes(moving(), [evaluation(4, **times_as_long(low, high))]) == []


def test_supervised_fine_tuning_may_leave_its_start_for_its_training_responses():
    def found(*row: dict[str, float]) -> list[str]:
        watch = moving()
        watch.seen.told = Told(trees=random_trees([(6, 5, 4)]), objective="sft")
        return codes(watch, [evaluation(4, **{k: v for part in row for k, v in part.items()})])

    # Training responses have 4.5 tokens.
    shorter, longer = times_as_long(0.1, 0.2), times_as_long(4, 5)
    assert found(shorter, {"length": 4.0}) == found(shorter, {"length": 9.0}) == []
    assert found(longer, {"length": 5.0}) == found(longer, {"length": 13.0}) == []
    assert found(shorter, {"length": 1.0}) == found(longer, {"length": 14.0}) == ["UW305"]
    assert found({"kl": 80.0, "kl_low": 60.0}) == []
    # What no response asks for is told as ever.
    assert found({"stopped": 0.0, "stopped_high": 0.3, "reference_stopped": 1.0}) == ["UW305"]
    says = {"repetition": 0.6, "repetition_low": 0.4, "reference_repetition": 0.1}
    assert found(says) == ["UW305"]


def test_the_ratio_of_lengths_is_that_of_answers_to_the_same_prompt():
    def said(*lengths: int) -> list[Sample]:
        return [Sample(tuple(range(num)), True) for num in lengths]

    found = answers_record(said(8, 20, 50, 6, 2, 4), said(4, 10, 25, 3, 1, 2))
    assert [found[f"length_ratio{end}"] for end in ("", "_low", "_high")] == pytest.approx([2] * 3)
    found = answers_record(said(*[40, 5] * 3), said(*[5, 40] * 3))
    assert found["length_ratio"] == pytest.approx(1)
    assert found["length_ratio_low"] < 0.5 and found["length_ratio_high"] > 2


def test_nothing_is_held_against_training_before_its_first_step():
    far = {"kl": 80.0, "kl_low": 60.0, **times_as_long(4, 5)}
    watch = moving()
    assert codes(watch, [evaluation(0, **far)]) == []
    assert codes(watch, [evaluation(4, **far)]) == ["UW305", "UW308"]


def test_a_code_is_reported_again_for_another_metric():
    watch = moving()
    assert codes(watch, [evaluation(4, **times_as_long(4, 5))]) == ["UW305"]
    endless = {"stopped": 0.0, "stopped_high": 0.3, "reference_stopped": 1.0}
    again = evaluation(8, **times_as_long(4, 5), **endless)
    assert codes(watch, [again, again]) == ["UW305"]


def after_a_step(move: Callable[[str, Tensor], None], **values: float) -> list[str]:
    lm = loaded()
    watch = Watch(lm, Limits())
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            move(name, parameter)
    return [finding.code for finding in watch.after(record(1, **values))]


def test_weights_that_decay_without_a_gradient_have_learned_nothing():
    def decays(name: str, parameter: Tensor) -> None:
        parameter.mul_(0.999)

    assert after_a_step(decays) == []
    with pytest.raises(Refusal, match="move by weight decay alone; every gradient is 0"):
        after_a_step(decays, grad_norm=0.0)
    # Answers that all earned the same have no gradient, and the next may.
    assert after_a_step(decays, grad_norm=0.0, **{"advantages/nonzero": 0.0}) == []


def test_layers_that_stand_still_between_others_are_named():
    def but_the_first(name: str, parameter: Tensor) -> None:
        parameter += 0.0 if "layers.0." in name else 1e-3

    with pytest.raises(Refusal, match=r"nothing in layers\.0 has moved"):
        after_a_step(but_the_first)

    def hardly(name: str, parameter: Tensor) -> None:
        if name.endswith("norm.weight") and "layers.0." not in name:
            parameter += 1e-3

    assert after_a_step(hardly) == []


def test_records_that_are_means_of_many_steps_are_enough():
    falling = [record(50 * n, **{"logratios/chosen": -90.0}) for n in range(1, 4)]
    assert codes(moving(), falling) == []
    watch = Watch(loaded(), Limits(), Told(log_every=50))
    watch.seen.moved, watch.seen.judged = 1.0, True
    assert codes(watch, falling) == ["UW304"]


def test_pairs_are_too_easy_by_their_margins_where_labels_are_smoothed():
    solved = {"rewards/accuracies": 1.0, "loss": 0.33, "rewards/margins": 6.0}
    assert codes(moving(), [record(step, **solved) for step in range(1, 20)]) == ["UW306"]


def test_what_a_distance_costs_is_told_by_the_coefficient_that_a_round_was_made_with():
    """policy.kl_target moves it: advice by the one that was set would be the opposite."""
    (found,) = moving().after(evaluation(4, kl=80.0, kl_low=60.0, beta=0.001))
    assert "loss.beta has come to 0.001 (policy.kl_target), at which" in found.said
    (found,) = moving().after(evaluation(4, kl=80.0, kl_low=60.0, beta=0.9))
    assert "which would hold it" in found.said


def test_a_policy_far_from_its_reference_is_reported_by_the_lower_end_of_the_interval():
    assert codes(moving(), [evaluation(4, kl=80.0, kl_low=60.0)]) == ["UW308"]
    assert codes(moving(), [evaluation(4, kl=80.0, kl_low=40.0)]) == []


def a_round(step: int, **values: tuple[float, float, float]) -> dict[str, object]:
    usual = {
        "length": (30.0, 25.0, 35.0), "stopped": (0.9, 0.8, 1.0), "repetition": (0.1, 0.05, 0.15),
        "kl": (3.0, 2.0, 4.0), **values,
    }  # fmt: skip
    flat = {f"{key}{end}": v for key, three in usual.items()
            for end, v in zip(("", "_low", "_high"), three, strict=True)}  # fmt: skip
    return record(step, reward=0.5, **flat)


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"length": (120.0, 110.0, 130.0)}, "UW305"),
        ({"length": (6.0, 5.0, 7.0)}, "UW305"),
        ({"length": (120.0, 100.0, 130.0)}, None),
        ({"length": (9.0, 8.0, 10.0)}, None),
        ({"stopped": (0.2, 0.1, 0.35)}, "UW305"),
        ({"stopped": (0.2, 0.1, 0.45)}, None),
        ({"repetition": (0.5, 0.4, 0.6)}, "UW305"),
        ({"repetition": (0.5, 0.3, 0.6)}, None),
        ({"kl": (60.0, 55.0, 65.0)}, "UW308"),
        ({"kl": (60.0, 45.0, 75.0)}, None),
    ],
)
def test_the_answers_of_a_round_are_held_against_those_of_the_first(values, code):
    changed = a_round(2, **values)
    assert codes(moving(), [a_round(1), changed]) == ([code] if code else [])
    # A run that is resumed still knows its first round; a single prompt has no interval.
    resumed = moving()
    resumed.resumed([a_round(1)])
    assert codes(resumed, [changed]) == ([code] if code else [])
    alone = {k: v for k, v in changed.items() if not k.endswith(("_low", "_high"))}
    assert codes(moving(), [a_round(1), alone]) == []


def test_answers_that_grow_do_not_silence_that_they_repeat_themselves_and_no_longer_end():
    longer = {"length": (120.0, 110.0, 130.0)}
    worse = {**longer, "repetition": (0.5, 0.4, 0.6), "stopped": (0.2, 0.1, 0.35)}
    watch = moving()
    rows = [a_round(1), a_round(2, **longer), a_round(3, **worse), a_round(4, **worse)]
    said = [[finding.metric for finding in watch.after(row)] for row in rows]
    assert said == [[], ["length"], ["repetition", "stopped"], []]


def test_values_learn_from_rewards_that_differ_between_rounds():
    def last(*rewards: float, **more: float) -> None:
        watch = Watch(loaded(), Limits(), Told(total_steps=len(rewards)))
        watch.seen.moved, watch.seen.judged = 1.0, True
        tied = {"tied": 1.0, "advantages/nonzero": 1.0, **more}
        rows = [record(n, reward=earned, **tied) for n, earned in enumerate(rewards, start=1)]
        assert codes(watch, rows) == []

    last(0.0, 1.0, 1.0, value_loss=0.1)
    # Sums of fp32 numbers.
    for same in ({"value_loss": 0.1}, {}):
        with pytest.raises(Refusal, match="step 3: no answer so far earned more"):
            last(0.3, 0.30000001, 0.3, **same)
    # The answers to a prompt are compared with each other alone.
    with pytest.raises(Refusal, match="gives all answers to a prompt the same"):
        last(0.0, 1.0, 1.0)


def test_what_a_run_warns_of_is_in_the_terminal_the_records_and_the_report(
    capsys: pytest.CaptureFixture[str],
):
    # A few words learned by heart, and no limit on how far that may go.
    rows = [
        {"prompt": f"question {i}", "chosen": "yes", "rejected": "no way at all"} for i in range(40)
    ]
    write_rows("pairs.jsonl", rows)
    usual = ("--epochs", "8", "--kl", "0", "--shortcut", "0.99", "--samples", "8")
    assert train("run", *usual) == 0
    said = capsys.readouterr().err
    assert said.count("warning[UW308]") == 1
    found = warnings("run")
    assert "nats an answer away" in found["UW308"]
    page = Path("run/report.html").read_text()
    assert '<code id="warning-uw308">UW308</code>' in page and "nats an answer away" in page


def test_held_out_pairs_that_are_surely_solved_are_reported():
    solved = {"rewards/accuracies": 0.99, "rewards/accuracies_low": 0.975}
    assert codes(moving(), [evaluation(4, **solved)]) == ["UW306"]
    assert codes(moving(easy=0.98), [evaluation(4, **solved)]) == []
    assert codes(moving(), [evaluation(0, **solved)]) == []


def test_few_held_out_pairs_say_nothing_against_the_training_pairs():
    learned = [record(step, **{"rewards/accuracies": 0.95}) for step in range(1, RECENT + 1)]
    few = {"rewards/accuracies": 0.5, "rewards/accuracies_low": 0.1}
    assert codes(moving(), [*learned, evaluation(8, **few, **{HIGH: 0.96})]) == []
    assert codes(moving(), [*learned, evaluation(8, **few, **{HIGH: 0.94})]) == ["UW306"]


def test_margins_far_out_before_training_on_their_pairs_are_reported():
    far = [record(step, epoch=0.5, **{"rewards/spread": 12.0}) for step in range(1, RECENT + 1)]
    assert codes(moving(), far) == ["UW307"]
    assert codes(moving(spread=13.0), far) == []
    again = [{**row, "epoch": 1.5} for row in far]
    assert codes(moving(), again) == []
    assert codes(moving(), [evaluation(9, epoch=1.5, **{"rewards/spread": 12.0})]) == ["UW307"]


@pytest.mark.parametrize(
    ("beta", "cause"), [(2.0, "fits log-probs that are averaged"), (0.1, "120 nats apart")]
)
def test_a_wide_spread_is_blamed_on_what_is_unusual(beta: float, cause: str):
    watch = Watch(loaded(), Limits(), Told(beta))
    (found,) = watch.after(evaluation(9, **{"rewards/spread": 12.0}))
    assert found.code == "UW307" and cause in found.said


def test_margins_that_stay_at_zero_are_reported_at_the_end_of_a_run():
    def ending(num: int, size: float) -> list[str]:
        watch = Watch(loaded(), Limits(), Told(0.1, num))
        watch.seen.moved, watch.seen.judged = 1.0, True
        rows = [record(step, **{"rewards/spread": size}) for step in range(1, num + 1)]
        assert codes(watch, rows[:-1]) == []
        return codes(watch, rows[-1:])

    assert ending(40, 0.004) == ["UW307"]
    assert ending(40, 0.02) == []
    # Of a few steps, the largest but for the first: that is from before any update.
    assert ending(8, 0.004) == ending(2, 0.004) == ["UW307"]
    assert ending(8, 0.02) == ending(1, 0.004) == []


@pytest.mark.parametrize(
    ("beta", "size", "cause"), [(1e-3, 0.004, "raise it"), (0.1, 0.004, "averaged over tokens")]
)
def test_a_flat_run_is_blamed_on_beta_or_on_distance(beta: float, size: float, cause: str):
    watch = Watch(loaded(), Limits(), Told(beta, 30))
    watch.seen.moved, watch.seen.judged = 1.0, True
    rows = [record(step, **{"rewards/spread": size}) for step in range(1, 31)]
    found = [finding for row in rows for finding in watch.after(row)]
    assert [f.code for f in found] == ["UW307"] and cause in found[0].said


def test_repetition_is_reported_by_the_lower_end_of_its_interval():
    says = {"repetition": 0.6, "repetition_low": 0.4, "reference_repetition": 0.1}
    assert codes(moving(), [evaluation(4, **says)]) == ["UW305"]
    assert codes(moving(repetition=0.31), [evaluation(4, **says)]) == []
    assert codes(moving(), [evaluation(4, **{**says, "reference_repetition": 0.21})]) == []


def test_a_lost_stop_token_is_reported_by_the_upper_end_of_its_interval():
    says = {"stopped": 0.0, "stopped_high": 0.49, "reference_stopped": 1.0}
    assert codes(moving(), [evaluation(4, **says)]) == ["UW305"]
    assert codes(moving(), [evaluation(4, **{**says, "reference_stopped": 0.75})]) == []
    assert codes(moving(stopped=0.4), [evaluation(4, **says)]) == []


def test_four_answers_that_lost_their_end_are_enough_and_three_are_not():
    def answers(*stopped: bool) -> list[Sample]:
        return [Sample((1, 2, 3, 4, 5), end) for end in stopped]

    def found(*stopped: bool) -> list[str]:
        said = answers_record(answers(*stopped), answers(*[True] * len(stopped)))
        return codes(moving(), [evaluation(4, **said)])

    assert found(False, False, False, False) == ["UW305"]
    assert found(False, False, False, True) == []
    assert found(False, False, False) == []


def test_repeated_windows_are_counted():
    assert repeated([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repeated([7] * 13) == pytest.approx(1 - 1 / 10)
    assert repeated([1, 2, 3]) == repeated([1, 2, 3, 4]) == 0.0


def plan_of(step: int, epoch: int, done: float) -> StepPlan:
    return StepPlan(step, epoch, (), done)


def test_orders_are_compared_epoch_by_epoch():
    trees = random_trees([(3, 2, 2)] * 12, seed=1)
    first, second = trees[:6], trees[6:]

    def orders(*epochs: list[Tree]) -> Orders:
        seen = Orders()
        for epoch, order in enumerate(epochs):
            seen.saw(plan_of(2 * epoch, epoch, epoch + 0.5), order[:6])
            # A step that ran out of memory is taken again.
            seen.saw(plan_of(2 * epoch, epoch, epoch + 0.5), order[:6])
            seen.saw(plan_of(2 * epoch + 1, epoch, epoch + 1.0), order[6:])
        return seen

    assert orders(trees, trees[::-1], [*second, *first]).repeated is None
    assert orders(trees, trees[::-1], trees).repeated == (3, 1)
    assert orders(trees, trees).repeated == (2, 1)
    few = Orders()
    for epoch in range(3):
        few.saw(plan_of(epoch, epoch, epoch + 1.0), trees[:9])
    assert few.repeated is None


def test_an_epoch_that_is_seen_from_its_middle_is_like_no_other():
    trees = random_trees([(3, 2, 2)] * 24, seed=1)
    resumed = Orders()
    resumed.saw(plan_of(1, 0, 1.0), trees[12:])
    resumed.saw(plan_of(2, 1, 1.5), trees[:12])
    resumed.saw(plan_of(3, 1, 2.0), trees[12:])
    assert resumed.repeated is None


def test_records_without_preferences_raise_nothing():
    bare = {"kind": "train", "loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-5, "epoch": 0.5}
    assert codes(moving(), [{**bare, "step": step} for step in range(1, 20)]) == []
    assert codes(moving(), [{"kind": "eval", "set": "x", "step": 3, "loss": 1.0}]) == []
