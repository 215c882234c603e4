"""Each failure of training is planted in a real run, and its code appears; without it none does."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import upweight.data.stream as stream
import upweight.recipes.online as run_online
import upweight.recipes.start as run_start
import upweight.recipes.train as run_train
import upweight.training.objectives as objectives
from runs import even_odds_to_stop, furnish, plain_rows, rows_of, sentence, train, write_rows
from tiny import FAMILIES
from upweight.cli import main
from upweight.data.pack import bins_of_step
from upweight.models.load import LanguageModel
from upweight.models.logprobs import pair_logps, token_logps
from upweight.training.objectives import Objective, pair, pair_metrics
from upweight.types import Forest, PairLogps, Step, Tree


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tmp_path, monkeypatch)


def warned(out: str = "run") -> dict[str, dict[str, Any]]:
    """By code, the first of each. Each is written once of training and once of a set, and stands in
    the report, on its curve too."""
    found = [row for row in rows_of(f"{out}/metrics.jsonl") if row["kind"] == "warning"]
    page = Path(f"{out}/report.html").read_text()
    for row in found:
        assert f'<code id="warning-{row["code"].lower()}">' in page
        assert f'href="#warning-{row["code"].lower()}"' in page, "no curve is marked"
    said = [(row["code"], row["metric"], row.get("observer"), row.get("set")) for row in found]
    assert len(set(said)) == len(said)
    return {row["code"]: row for row in reversed(found)}


def preferring(chosen: str, rejected: str, num: int = 24) -> list[dict[str, str]]:
    return [{"prompt": f"question {i}", "chosen": chosen, "rejected": rejected} for i in range(num)]


def test_a_run_with_nothing_wrong_raises_nothing():
    write_rows("pairs.jsonl", plain_rows())
    assert train("run", "--epochs", "2", "--learning-rate", "1e-4") == 0
    assert warned() == {}
    page = Path("run/report.html").read_text()
    assert 'class="chip-code"' not in page and "<h2>Warnings</h2>" not in page


# What the weights do


def test_updates_that_the_weights_cannot_hold_are_refused(capsys: pytest.CaptureFixture[str]):
    assert train("run", "--learning-rate", "1e-30") == 2
    said = capsys.readouterr().err
    assert "error[UW103]" in said and "raise optimizer.learning_rate" in said


def frozen(*args: Any) -> Objective:
    """An objective in which no weight has a say."""
    whole = pair(*args)

    def step(lm: LanguageModel, forest: Forest) -> Step:
        made = whole.step(lm, forest)
        nothing = sum((p * 0).sum() for p in lm.model.parameters())
        return Step(made.loss_sum.detach() + nothing, made.count, made.metrics)

    return replace(whole, step=step)


def test_a_step_without_a_gradient_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(objectives, "pair", frozen)
    assert train("run") == 2
    said = capsys.readouterr().err
    assert "error[UW103]" in said and "every gradient is 0" in said


def of_four_layers() -> None:
    """model/ with twice as many layers as usual."""
    config = AutoConfig.for_model("llama", **FAMILIES["llama"] | {"num_hidden_layers": 4})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained("model")


def cut_off(_layer: Any, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
    return given[0] + (out - given[0]).detach()


def detached(monkeypatch: pytest.MonkeyPatch, *cut: int) -> None:
    """What the layers with these numbers add to their input has no gradient."""
    trained = run_start.trained

    def planted(*args: Any) -> LanguageModel:
        lm = trained(*args)
        for number in cut:
            lm.model.get_submodule(f"{lora_prefix(lm)}model.layers.{number}").register_forward_hook(
                cut_off
            )
        return lm

    monkeypatch.setattr(run_start, "trained", planted)


def lora_prefix(lm: LanguageModel) -> str:
    return "base_model.model." if lm.has_adapter else ""


@pytest.mark.parametrize(
    ("cut", "more"),
    [
        ((2,), ()),
        ((0, 1, 3), ()),
        ((0, 1, 2, 3), ()),
        ((2,), ("--lora",)),
        ((0, 1, 3), ("--lora",)),
    ],
)
def test_layers_that_no_gradient_reaches_are_refused(
    cut: tuple[int, ...],
    more: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    of_four_layers()
    detached(monkeypatch, *cut)
    assert train("run", *more, "--samples", "0") == 2
    said = capsys.readouterr().err
    assert "error[UW103]: step 1: nothing in" in said
    assert f"in {', '.join(f'layers.{number}' for number in cut)} has moved" in said


@pytest.mark.parametrize("more", [(), ("--lora",)])
def test_layers_that_all_learn_are_not(more: tuple[str, ...]):
    of_four_layers()
    assert train("run", *more, "--samples", "0", "--steps", "2", "--flat", "0") == 0
    assert warned() == {}


def test_layers_are_looked_at_again_once_updates_are_large_enough(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    of_four_layers()
    detached(monkeypatch, 1, 2, 3)
    # A warmup whose first update is smaller than what most weights can hold.
    slow = ("--learning-rate", "4e-8", "--warmup", "0.9", "--epochs", "40", "--samples", "0")
    assert train("run", *slow) == 2
    said = capsys.readouterr().err
    assert "nothing in layers.1, layers.2, layers.3 has moved" in said
    assert "step 1:" not in said


def ppo(*more: str) -> int:
    Path("count.py").write_text("def score(prompt, response, row):\n    return len(response)\n")
    words = "train --model model --data pairs.jsonl --objective ppo --dtype float32 --out run"
    words += " --learning-rate 1e-3 --reward count.py:score --prompts_per_round 4 --max_tokens 6"
    return main([*words.split(), "--steps", "5", *more])


@pytest.mark.parametrize("value", ["own", "shared"])
def test_a_value_model_that_no_gradient_reaches_is_refused(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    loss = objectives.clipped_value_loss
    monkeypatch.setattr(objectives, "clipped_value_loss", lambda *a, **k: loss(*a, **k).detach())
    assert ppo("--value", value) == 2
    assert "error[UW103]: step 1: nothing in value.head has moved" in capsys.readouterr().err
    # Who gives its loss no weight asked for that.
    if value == "shared":
        assert ppo("--out", "asked", "--value", value, "--value_coefficient", "0") == 0


def test_a_layer_of_a_value_model_that_no_gradient_reaches_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with_head = run_online.with_scalar_head

    def planted(*args: Any) -> LanguageModel:
        critic = with_head(*args)
        critic.model.get_submodule("model.layers.0").register_forward_hook(cut_off)
        return critic

    monkeypatch.setattr(run_online, "with_scalar_head", planted)
    # The layer behind it would learn.
    assert ppo("--out", "early", "--steps", "1") == 0
    for patience, step in ((64, 5), (2, 2)):
        assert ppo("--out", f"run{step}", "--patience", str(patience)) == 2
        said = capsys.readouterr().err
        assert f"step {step}: nothing in value.layers.0 has moved" in said


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--lora",),
        ("--value", "shared"),
        ("--steps", "1"),
        # All values go further than they may in the first step of the only round.
        ("--steps", "4", "--value_clip", "1e-9", "--value_learning_rate", "0.1"),
    ],
)
def test_a_value_model_that_learns_is_not(more: tuple[str, ...]):
    assert ppo(*more) == 0
    assert not [r for r in rows_of("run/metrics.jsonl") if r.get("code") == "UW103"]


def test_half_precision_weights_that_swallow_their_updates_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    trained = run_start.trained

    def rounded(*args: Any) -> LanguageModel:
        lm = trained(*args)
        lm.model.to(torch.bfloat16)  # pyright: ignore
        return lm

    monkeypatch.setattr(run_start, "trained", rounded)
    assert train("run", "--learning-rate", "1e-4", "--dtype", "bfloat16", "--samples", "0") == 2
    said = capsys.readouterr().err
    assert "error[UW104]" in said and "bfloat16" in said


def aliased(
    reference: Any, loss: Callable[[PairLogps], torch.Tensor], beta: float, *rest: Any
) -> Objective:
    """The policy of the moment as its own reference."""

    def step(lm: LanguageModel, forest: Forest) -> Step:
        tokens = token_logps(lm, forest)
        logps = pair_logps(tokens, tokens.detach(), forest)
        return Step(loss(logps).sum(), forest.weight.sum(), pair_metrics(logps, beta))

    return replace(pair(reference, loss, beta, *rest), step=step)


def test_a_policy_that_is_its_own_reference_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(objectives, "pair", aliased)
    assert train("run") == 2
    said = capsys.readouterr().err
    assert "error[UW102]" in said and "step 3" in said
    assert warned()["UW102"]["refused"]
    assert "step 3, and ended the run" in Path("run/report.html").read_text()


def test_updates_that_bf16_rounds_away_are_no_policy_that_is_its_own_reference(
    capsys: pytest.CaptureFixture[str],
):
    small = ("--lora", "--learning-rate", "1e-8", "--dtype", "bfloat16", "--steps", "9")
    assert train("run", *small) == 0
    rows = [row for row in rows_of("run/metrics.jsonl") if row["kind"] == "train"]
    assert all(row["logratios/chosen"] == 0 for row in rows)
    assert "UW102" not in capsys.readouterr().err


# How a step is made


def test_an_objective_that_takes_means_of_micro_batches_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def of_means(*args: Any) -> Objective:
        whole = pair(*args)

        def step(lm: LanguageModel, forest: Forest) -> Step:
            made = whole.step(lm, forest)
            return Step(made.loss_sum / made.count, torch.ones_like(made.count), made.metrics)

        return replace(whole, step=step)

    monkeypatch.setattr(objectives, "pair", of_means)
    assert train("run", "--tokens_per_bin", "120") == 2
    said = capsys.readouterr().err
    assert "error[UW302]" in said and "micro-batches weigh 4" in said


def losing(trees: list[Tree], capacity: int, *, splitting: bool) -> list[list[Tree]]:
    return bins_of_step(trees, capacity, splitting=splitting)[:-1]


def test_a_packing_that_loses_a_bin_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(run_train, "bins_of_step", losing)
    assert train("run", "--tokens_per_bin", "120") == 2
    said = capsys.readouterr().err
    assert "error[UW302]" in said and "its rows have 4 preferences and 8 responses" in said


@pytest.mark.parametrize("objective", ["sft", "ppo"])
def test_a_packing_that_loses_responses_without_preferences_is_refused(
    objective: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(run_train, "bins_of_step", losing)
    small = ("--tokens_per_bin", "80")
    if objective == "sft":
        assert train("run", "--objective", "sft", "--samples", "0", *small) == 2
    else:
        assert ppo(*small) == 2
    said = capsys.readouterr().err
    assert "error[UW302]: step 1: its rows have 0 preferences and 4 responses" in said


def test_one_order_for_all_epochs_is_reported(monkeypatch: pytest.MonkeyPatch):
    order = stream.epoch_order
    monkeypatch.setattr(stream, "epoch_order", lambda num, seed, epoch: order(num, seed, 0))
    write_rows("pairs.jsonl", plain_rows())
    assert train("run", "--epochs", "3", "--learning-rate", "1e-4") == 0
    found = warned()
    assert list(found) == ["UW309"]
    assert "epoch 2" in found["UW309"]["said"] and "epoch 1" in found["UW309"]["said"]
    # At the step that ends the second epoch, of three.
    assert found["UW309"]["step"] == max(
        row["step"]
        for row in rows_of("run/metrics.jsonl")
        if row["kind"] == "train" and row["epoch"] <= 2.001
    )


# What is not a number


def test_a_weight_that_is_not_a_number_stops_before_the_optimizer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def spoiled(*args: Any) -> Objective:
        whole = pair(*args)

        def step(lm: LanguageModel, forest: Forest) -> Step:
            with torch.no_grad():
                next(p for p in lm.model.parameters() if p.ndim == 1)[0] = torch.nan
            return whole.step(lm, forest)

        return replace(whole, step=step)

    monkeypatch.setattr(objectives, "pair", spoiled)
    assert train("run") == 2
    said = capsys.readouterr().err
    assert "error[UW303]" in said and "Its rows: pairs.jsonl:" in said
    assert "before this step" in said and "layernorm" in said


def test_a_loss_that_overflows_stops_before_the_optimizer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def exploding(reference: Any, loss: Any, beta: float, *rest: Any) -> Objective:
        return pair(reference, lambda logps: loss(logps) * torch.inf, beta, *rest)

    monkeypatch.setattr(objectives, "pair", exploding)
    assert train("run") == 2
    assert "error[UW303]: step 1: the loss is inf" in capsys.readouterr().err
    last = rows_of("run/metrics.jsonl")[-1]
    assert (last["code"], last["step"], last["refused"]) == ("UW303", 1, True)
    assert '<code id="warning-uw303">' in Path("run/report.html").read_text()


# What the curves do


def test_near_identical_pairs_at_a_large_rate_displace_what_is_chosen():
    draw = random.Random(4)
    same = [sentence(draw, 8) for _ in range(40)]
    rows = [
        {"prompt": f"question {i}", "chosen": f"{text} is so", "rejected": f"{text} is no"}
        for i, text in enumerate(same)
    ]
    write_rows("pairs.jsonl", rows)
    assert train("run", "--learning-rate", "3e-2", "--epochs", "3") == 0
    found = warned()["UW304"]
    assert "share 9" in found["said"] and "data.min_score_gap" in found["said"]
    assert found["metric"] == "logratios/chosen"


def test_pairs_that_a_letter_tells_apart_are_soon_solved():
    write_rows("pairs.jsonl", preferring("yes", "no"))
    assert train("run", "--epochs", "14", "--learning-rate", "5e-3", "--shortcut", "0.999") == 0
    found = warned()["UW306"]
    assert "nothing is left to learn" in found["said"] and "known by heart" in found["said"]


def test_held_out_pairs_that_are_all_right_show_no_improvement():
    write_rows("pairs.jsonl", preferring("yes", "no", 300))
    solved = ("--fraction", "0.5", "--learning-rate", "5e-3", "--evaluation.every", "12")
    assert train("run", *solved, "--shortcut", "0.999", "--samples", "0") == 0
    found = warned()["UW306"]
    assert "held-out pairs" in found["said"] and found["set"] == "heldout"


def test_rows_learned_by_heart_are_told_from_learning():
    draw = random.Random(5)
    rows = [
        {"prompt": f"q {i}", "chosen": sentence(draw, 3), "rejected": sentence(draw, 3)}
        for i in range(60)
    ]
    write_rows("pairs.jsonl", rows)
    by_heart = ("--epochs", "12", "--learning-rate", "5e-3", "--fraction", "0.4", "--samples", "0")
    assert train("run", *by_heart) == 0
    found = warned()["UW306"]
    assert "by heart" in found["said"] and found["set"] == "heldout"


def test_a_beta_for_means_saturates_sums():
    write_rows("pairs.jsonl", plain_rows())
    assert train("run", "--beta", "5", "--learning-rate", "3e-3") == 0
    found = warned()["UW307"]
    assert "loss.beta is 5" in found["said"] and "summed over a response" in found["said"]


def test_a_learning_rate_that_saturates_the_usual_beta_is_named_instead():
    write_rows("pairs.jsonl", plain_rows())
    assert train("run", "--learning-rate", "0.1", "--kl", "10", "--spread", "2") == 0
    said = warned()["UW307"]["said"]
    assert "lower optimizer.learning_rate" in said and "nats apart" in said


def test_means_in_place_of_sums_leave_margins_at_zero(monkeypatch: pytest.MonkeyPatch):
    def averaged(*args: Any) -> PairLogps:
        logps = pair_logps(*args)
        return PairLogps(
            logps.policy_chosen / logps.tokens_chosen,
            logps.policy_rejected / logps.tokens_rejected,
            logps.reference_chosen / logps.tokens_chosen,
            logps.reference_rejected / logps.tokens_rejected,
            logps.tokens_chosen,
            logps.tokens_rejected,
        )

    write_rows("pairs.jsonl", plain_rows())
    usual = ("--learning-rate", "1e-4", "--epochs", "4", "--samples", "0")
    assert train("right", *usual) == 0
    assert warned("right") == {}
    monkeypatch.setattr(objectives, "pair_logps", averaged)
    assert train("run", *usual) == 0
    assert "log-probs are averaged over tokens" in warned()["UW307"]["said"]


@pytest.mark.parametrize(
    ("more", "cause"),
    [
        (("--beta", "1e-9"), "loss.beta is 1e-09: raise it"),
        (("--optimizer.epsilon", "1000"), "optimizer.epsilon is too large"),
        (("--lora", "--learning-rate", "1e-9"), "the peak learning rate is too small"),
    ],
)
def test_a_run_of_a_few_steps_that_moves_nothing_says_so(
    more: tuple[str, ...], cause: str, capsys: pytest.CaptureFixture[str]
):
    write_rows("pairs.jsonl", plain_rows())
    for out, held_out in (("run", "0.2"), ("alone", "0")):
        sampled = ("--samples", "0") if held_out != "0" else ()
        words = "train --model model --data pairs.jsonl --learning-rate 1e-3 --dtype float32"
        words += f" --pairs_per_step 8 --steps 8 --fraction {held_out} --out {out}"
        assert main([*words.split(), *sampled, *more]) == 0
        assert cause in warned(out)["UW307"]["said"]
        assert "warning[UW307]" in capsys.readouterr().err
        assert "The policy hardly differs from its start" in Path(f"{out}/report.html").read_text()


# What the policy says


def test_a_huge_learning_rate_runs_away_from_the_reference():
    write_rows("pairs.jsonl", plain_rows())
    wild = ("--learning-rate", "0.1", "--samples", "6", "--max_new_tokens", "48")
    assert train("run", *wild) == 0
    assert "lower optimizer.learning_rate" in warned()["UW308"]["said"]


def test_a_policy_that_learns_to_repeat_itself_is_reported():
    draw = random.Random(6)
    rows = [
        {"prompt": f"question {i}", "chosen": "a" * 40, "rejected": sentence(draw, 6)}
        for i in range(40)
    ]
    write_rows("pairs.jsonl", rows)
    loose = ("--learning-rate", "1e-2", "--beta", "1e-3", "--epochs", "3", "--kl", "100")
    said = ("--samples", "6", "--max_new_tokens", "32")
    assert train("run", *loose, *said, "--shortcut", "0.999") == 0
    found = warned()
    assert "four tokens in a row" in found["UW305"]["said"]
    assert found["UW305"]["metric"] == "repetition" and found["UW305"]["set"] == "heldout"


def test_a_small_beta_is_named_where_the_policy_runs_away():
    write_rows("pairs.jsonl", plain_rows())
    loose = ("--learning-rate", "0.03", "--beta", "1e-3", "--epochs", "2", "--kl", "25")
    assert train("run", *loose, "--max_new_tokens", "48", "--samples", "8") == 0
    assert "at which that distance costs" in warned()["UW308"]["said"]


def test_responses_without_their_stop_token_teach_not_to_stop():
    even_odds_to_stop()
    rows = [
        {
            "prompt": f"question {i}",
            "chosen": "stone " * (40 if i % 3 else 2),
            "rejected": "stone",
        }
        for i in range(40)
    ]
    write_rows("pairs.jsonl", rows)
    fast = ("--learning-rate", "3e-2", "--beta", "0.01", "--epochs", "3")
    cut = ("--max_length", "60", "--truncation", "response", "--cut", "0.95", "--shortcut", "0.999")
    assert train("run", *cut, "--samples", "8", "--length", "99", *fast) == 0
    found = warned()["UW305"]
    assert "end by themselves" in found["said"] and "lack their end" in found["said"]
    assert found["metric"] == "stopped"


def test_short_answers_that_sft_teaches_a_model_that_never_stopped_are_no_degeneration():
    write_rows("pairs.jsonl", preferring("yes, it is", "no", 40))
    taught = ("--objective", "sft", "--learning-rate", "1e-2", "--epochs", "5", "--samples", "8")
    assert train("run", *taught, "--max_new_tokens", "96") == 0
    last = [row for row in rows_of("run/metrics.jsonl") if row["kind"] == "eval"][-1]
    assert last["length_ratio_high"] < 1 / 3 and last["kl_low"] > 50
    assert warned() == {}
    assert "Held-out loss fell" in Path("run/report.html").read_text()


def test_training_responses_without_their_stop_token_teach_sft_not_to_stop():
    even_odds_to_stop()
    rows = [
        {"prompt": f"question {i}", "completion": "stone " * (40 if i % 3 else 2)}
        for i in range(40)
    ]
    write_rows("pairs.jsonl", rows)
    cut = ("--max_length", "60", "--truncation", "response", "--cut", "0.95", "--length", "99")
    fast = ("--objective", "sft", "--learning-rate", "3e-2", "--epochs", "3", "--samples", "8")
    assert train("run", *cut, *fast) == 0
    found = [r for r in rows_of("run/metrics.jsonl") if r["kind"] == "warning"]
    (stopped,) = [r["said"] for r in found if r["metric"] == "stopped"]
    assert "% of the training responses lack their end" in stopped


def test_a_resumed_run_does_not_say_again_what_it_has_said(capsys: pytest.CaptureFixture[str]):
    write_rows("pairs.jsonl", plain_rows(48))
    far = ("--kl", "0", "--learning-rate", "3e-3", "--evaluation.every", "1", "--samples", "8")
    assert train("run", *far, "--checkpoint.every", "1", "--keep", "99") == 0
    assert capsys.readouterr().err.count("warning[UW308]") == 1
    for folder in sorted(Path("run/checkpoints").iterdir())[4:]:
        shutil.rmtree(folder)
    assert main(["train", "run/run.yaml", "resume=true"]) == 0
    assert "warning[UW308]" not in capsys.readouterr().err
    assert warned()["UW308"]["step"] <= 4
