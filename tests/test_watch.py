"""Each failure of training is planted in a run, and a run without it raises nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import upweight.recipes.train as run_train
from oracles import loaded
from runs import furnish, plain_rows, rows_of, train, write_rows
from upweight.config import Watch as Limits
from upweight.errors import Refusal
from upweight.models.load import LanguageModel
from upweight.models.logprobs import pair_logps, token_logps
from upweight.training.objectives import pair_metrics
from upweight.trust.watch import RECENT, Watch
from upweight.types import Forest, Step


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tmp_path, monkeypatch)


def warnings(out: str) -> dict[str, str]:
    return {
        row["code"]: row["said"]
        for row in rows_of(f"{out}/metrics.jsonl")
        if row["kind"] == "warning"
    }


def test_a_run_with_nothing_wrong_raises_nothing():
    write_rows("pairs.jsonl", plain_rows())
    assert train("run") == 0
    assert warnings("run") == {}
    assert json.loads(Path("run/account.json").read_text())["findings"] == []


def test_updates_that_the_weights_cannot_hold_are_refused(capsys: pytest.CaptureFixture[str]):
    assert train("run", "--learning-rate", "1e-30") == 2
    said = capsys.readouterr().err
    assert "error[UW103]" in said and "raise optimizer.learning_rate" in said
    assert "Traceback" not in said


def without_gradient(reference: object, loss: object, beta: float) -> Callable[..., Step]:
    """An objective in which no weight has a say."""

    def objective(lm: LanguageModel, forest: Forest) -> Step:
        tokens = token_logps(lm, forest)
        logps = pair_logps(tokens, tokens.detach() + 1.0, forest)
        nothing = sum((p * 0).sum() for p in lm.model.parameters())
        return Step(nothing + 1.0, forest.weight.sum(), pair_metrics(logps, beta))

    return objective


def test_a_step_without_a_gradient_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(run_train, "pair", without_gradient)
    assert train("run") == 2
    said = capsys.readouterr().err
    assert "error[UW103]" in said and "every gradient is 0" in said


def against_itself(reference: object, loss: Callable[..., torch.Tensor], beta: float):
    """The policy as its own reference."""

    def objective(lm: LanguageModel, forest: Forest) -> Step:
        tokens = token_logps(lm, forest)
        logps = pair_logps(tokens, tokens.detach(), forest)
        return Step(loss(logps).sum(), forest.weight.sum(), pair_metrics(logps, beta))

    return objective


def test_a_policy_that_is_its_own_reference_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(run_train, "pair", against_itself)
    assert train("run") == 2
    said = capsys.readouterr().err
    assert "error[UW102]" in said and "step 2" in said


def record(step: int, **values: float) -> dict[str, object]:
    base = {
        "loss": 0.6, "grad_norm": 1.0, "learning_rate": 1e-6, "rewards/accuracies": 0.6,
        "logratios/chosen": -0.1, "logratios/rejected": -0.2, "tokens/chosen": 10.0,
        "tokens/rejected": 10.0,
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
    watch = Watch(loaded(), Limits(**limits))
    watch.seen.moved = 1.0
    return watch


def codes(watch: Watch, records: list[dict[str, object]]) -> list[str]:
    return [finding.code for row in records for finding in watch.after(row)]


def test_chosen_responses_that_lose_probability_are_reported_once():
    falling = [record(step, **{"logratios/chosen": -11.0}) for step in range(1, 3 * RECENT)]
    assert codes(moving(), falling) == ["UW304"]
    assert codes(moving(displaced=1.2), falling) == []
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
    base = {"rewards/accuracies": 0.7, "rewards/accuracies_low": 0.6}
    base |= {"length": 30.0, "reference_length": 30.0, "kl": 3.0, "kl_low": 2.0}
    return {"kind": "eval", "set": "heldout", "step": step, **base, **values}


def test_memory_of_the_training_rows_is_told_from_learning():
    learned = [record(step, **{"rewards/accuracies": 0.95}) for step in range(1, RECENT + 1)]
    by_heart = evaluation(4, **{"rewards/accuracies": 0.55, "rewards/accuracies_low": 0.45})
    assert codes(moving(), [*learned, by_heart]) == ["UW306"]
    assert codes(moving(), [*learned, evaluation(4)]) == []
    assert codes(moving(), [by_heart]) == []


@pytest.mark.parametrize("length", [91.0, 9.0])
def test_answers_that_grow_or_shrink_are_reported(length: float):
    assert codes(moving(), [evaluation(4, length=length)]) == ["UW305"]
    assert codes(moving(length=4.0), [evaluation(4, length=length)]) == []


def test_a_policy_far_from_its_reference_is_reported_by_the_lower_end_of_the_interval():
    assert codes(moving(), [evaluation(4, kl=80.0, kl_low=60.0)]) == ["UW308"]
    assert codes(moving(), [evaluation(4, kl=80.0, kl_low=40.0)]) == []


def test_what_a_run_warns_of_is_in_the_terminal_the_records_and_the_report(
    capsys: pytest.CaptureFixture[str],
):
    # A few words learned by heart, and no limit on how far that may go.
    rows = [
        {"prompt": f"question {i}", "chosen": "yes", "rejected": "no way at all"} for i in range(24)
    ]
    write_rows("pairs.jsonl", rows)
    assert train("run", "--epochs", "12", "--kl", "0", "--shortcut", "0.99") == 0
    said = capsys.readouterr().err
    assert said.count("warning[UW308]") == 1
    found = warnings("run")
    assert "nats an answer away" in found["UW308"]
    page = Path("run/report.html").read_text()
    assert "<code>UW308</code>" in page and "nats an answer away" in page
