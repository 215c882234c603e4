"""A policy that does not start as its reference, and a model that is not quiet."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import upweight.recipes.start as run_start
from runs import furnish, plain_rows, train, write_rows
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
