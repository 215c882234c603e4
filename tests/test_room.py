"""Steps that run out of memory, in runs on the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import upweight.recipes.train as run_train
from runs import PAIRS, furnish, rows_of, train, write_rows
from upweight.cli import main
from upweight.models.load import LanguageModel
from upweight.training.checkpoint import load as load_checkpoint
from upweight.training.objectives import Objective
from upweight.types import Forest, Step


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tmp_path, monkeypatch)


def recomputes(lm: LanguageModel) -> bool:
    return any(getattr(m, "gradient_checkpointing", False) for m in lm.causal.modules())


def with_room_for(monkeypatch: pytest.MonkeyPatch, tokens: int, least: int = 0) -> None:
    """A device that runs out of memory beyond so many tokens at once, `least` when layers are
    recomputed."""
    made = run_train.objectives.pair

    def limited(*args: object) -> Objective:
        objective = made(*args)

        def step(lm: LanguageModel, forest: Forest) -> Step:
            done = objective.step(lm, forest)
            if forest.num_tokens > max(tokens, least * recomputes(lm)):
                raise torch.OutOfMemoryError("out of room")
            return done

        return replace(objective, step=step)

    monkeypatch.setattr(run_train.objectives, "pair", limited)


def test_a_run_that_does_not_fit_goes_on_with_smaller_bins_and_so_does_its_resumption(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert train("run") == 0
    assert "memory: about" in capsys.readouterr().err
    with_room_for(monkeypatch, 120)
    assert train("small", "--checkpoint.every", "1") == 0
    assert "tokens ran out of memory: going on with" in capsys.readouterr().err
    newest = sorted(Path("small/checkpoints").iterdir())[-1]
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    assert main(["train", "small/run.yaml", "resume=true"]) == 0
    said = capsys.readouterr().err
    assert "tokens, which fitted into memory" in said and "ran out" not in said
    fitted = load_checkpoint(newest).position.tokens_per_bin
    assert fitted is not None and 30 < fitted <= 120
    for name in ("loss", "grad_norm"):
        whole, cut = (
            [r[name] for r in rows_of(f"{run}/metrics.jsonl") if r["kind"] == "train"]
            for run in ("run", "small")
        )
        assert cut == pytest.approx(whole, rel=1e-3)


def test_what_does_not_fit_alone_is_recomputed_and_then_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with_room_for(monkeypatch, 1, least=10_000)
    assert train("run") == 0
    assert "layers are recomputed from here on" in capsys.readouterr().err
    with_room_for(monkeypatch, 1, least=2)
    assert train("none") == 2
    said = capsys.readouterr().err
    assert "ran out of memory" in said and "lora=true" in said and "Traceback" not in said


@pytest.mark.parametrize(("pairs", "split"), [([[0, 1], [2, 3]], True), ([[0, 1], [1, 2]], False)])
def test_a_prompt_that_does_not_fit_is_read_in_passes_where_its_responses_are_not_compared(
    pairs: list[list[int]],
    split: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    answers = ["fine " * 4, "a bad thing, " * 2, "so so, " * 4, "not at all"]
    answers = answers if split else answers[:3]
    row = {"responses": answers, "preferences": pairs}
    write_rows("pairs.jsonl", [{"prompt": f"question {i}", **row} for i in range(12)])
    assert train("run", "--samples", "0") == 0
    capsys.readouterr()
    # Two pairs make a step here: a bin of two rows, then of one, has to go first.
    with_room_for(monkeypatch, 90, least=10_000)
    assert train("small", "--samples", "0") == 0
    said = capsys.readouterr().err
    assert ("its responses are read in passes" in said) == split
    assert ("layers are recomputed" in said) != split
    whole, cut = (
        [r["loss"] for r in rows_of(f"{run}/metrics.jsonl") if r["kind"] == "train"]
        for run in ("run", "small")
    )
    assert cut == pytest.approx(whole, rel=1e-3)


def test_the_largest_bin_of_a_long_run_is_tried_before_its_first_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    long = {"prompt": "question 99", "chosen": "fine " * 30, "rejected": "bad thing " * 9}
    write_rows("pairs.jsonl", [*PAIRS, long])
    monkeypatch.setattr(run_train, "WORTH_A_TRY", 5)
    assert train("run") == 0
    assert "ran out" not in capsys.readouterr().err
    with_room_for(monkeypatch, 300)
    assert train("small") == 0
    said = capsys.readouterr().err
    assert "the largest bin of the run with" in said and "step 1 with" not in said
    assert said.index("the largest bin of the run with") < said.index("step 1/")
    with_room_for(monkeypatch, 20)
    assert train("none") == 2
    assert "the largest bin of the run ran out of memory with" in capsys.readouterr().err
    assert not rows_of("none/metrics.jsonl") or rows_of("none/metrics.jsonl")[-1]["step"] == 0
