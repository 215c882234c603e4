"""A policy that does not start as its reference, and a model that is not quiet."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import upweight.recipes.start as run_start
from runs import furnish, plain_rows, train, write_rows
from tiny import save_tiny
from upweight.cli import main
from upweight.config import Run
from upweight.models.load import LanguageModel


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tmp_path, monkeypatch)


def test_an_adapter_that_does_not_start_at_zero_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    made = run_start.trained

    def stirred(run: Run, lm: LanguageModel, stop_ids: object) -> LanguageModel:
        lm = made(run, lm, stop_ids)
        with torch.no_grad():
            for name, p in lm.model.named_parameters():
                if "lora_B" in name:
                    p += 0.3
        return lm

    assert train("run", "--lora", "true") == 0
    monkeypatch.setattr(run_start, "trained", stirred)
    assert train("stirred", "--lora", "true") == 2
    said = capsys.readouterr().err
    assert "error[UW101]" in said and "nats per token" in said and "Traceback" not in said


def test_another_reference_that_was_named_is_reported(capsys: pytest.CaptureFixture[str]):
    write_rows("pairs.jsonl", plain_rows(24))
    assert train("start", "--epochs", "4") == 0
    assert train("run", "--reference", "start/model") == 0
    assert "warning[UW101]" in capsys.readouterr().err
    findings = json.loads(Path("run/account.json").read_text())["findings"]
    assert [found["code"] for found in findings] == ["UW101"]
    assert train("same", "--reference", "model") == 0
    assert "UW101" not in capsys.readouterr().err


def rounds(out: str, objective: str, *more: str, command: str = "train") -> int:
    words = (
        f"{command} --model model --data prompts.jsonl --objective {objective} --out {out} --dtype "
        "float32 --learning-rate 1e-3 --reward letters.py:score --prompts_per_round 2 --responses "
        "2 --max_tokens 6 --steps 1"
    )
    return main([*words.split(), *more])


@pytest.mark.parametrize("objective", ["ppo", "grpo", "rloo", "online_dpo"])
def test_another_reference_of_a_run_of_rounds_is_reported(
    objective: str, capsys: pytest.CaptureFixture[str]
):
    write_rows("prompts.jsonl", [{"prompt": f"question {i}"} for i in range(12)])
    Path("letters.py").write_text("def score(prompt, response, row):\n    return len(response)\n")
    save_tiny("other", seed=1)
    for command in ("check", "train"):
        assert rounds(f"{command}ed", objective, "--reference", "other", command=command) == 0
        said = capsys.readouterr()
        warned = [x for x in (said.out + said.err).splitlines() if x.startswith("warning[UW101]")]
        assert len(warned) == 1 and "so the first KL is not 0. The reference was" in warned[0]
    account = json.loads(Path("trained/account.json").read_text())
    assert [found["code"] for found in account["findings"]] == ["UW101"]
    assert account["figures"]["train"]["start_nats"]["value"] > 0.1


@pytest.mark.parametrize(
    "more",
    [
        ["--reference", "model"],
        ["--reference", "model", "--lora"],
        ["--reference", "other", "--beta", "0"],
        [],
    ],
    ids=" ".join,
)
def test_a_reference_that_is_the_start_or_pulls_nothing_is_not_reported(
    more: list[str], capsys: pytest.CaptureFixture[str]
):
    write_rows("prompts.jsonl", [{"prompt": f"question {i}"} for i in range(12)])
    Path("letters.py").write_text("def score(prompt, response, row):\n    return len(response)\n")
    save_tiny("other", seed=1)
    assert rounds("run", "grpo", *more, command="check") == 0
    said = capsys.readouterr()
    assert "UW101" not in said.out + said.err


def test_a_model_that_says_something_else_each_time_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    made = run_start.trained

    def noisy(run: Run, lm: LanguageModel, stop_ids: object) -> LanguageModel:
        lm = made(run, lm, stop_ids)
        embedding = lm.causal.get_input_embeddings()
        embedding.register_forward_hook(lambda _, __, out: torch.nn.functional.dropout(out, 0.1))
        return lm

    monkeypatch.setattr(run_start, "trained", noisy)
    assert train("run") == 2
    assert "error[UW106]" in capsys.readouterr().err


def test_the_dropout_of_an_adapter_is_asked_for_and_no_noise():
    assert train("run", "--lora", "true", "--lora.dropout", "0.2") == 0
