"""From files to results, on a tiny model, through the commands that a user types."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import upweight as uw
import upweight.recipes.train as run_train
from tiny import save_tiny
from upweight.cli import main


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPWEIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    save_tiny("model")
    rows = [
        {"prompt": f"question {i}", "chosen": "fine " * (1 + i % 3), "rejected": f"bad thing {i}"}
        for i in range(24)
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(out: str, *more: str) -> int:
    words = "--model model --data pairs.jsonl --pairs_per_step 4 --learning-rate 1e-3 --dtype"
    words += f" float32 --fraction 0.2 --samples 2 --max_new_tokens 8 --out {out}"
    return main(["train", *words.split(), *more])


def test_one_command_trains_evaluates_exports_and_reports():
    assert train("run") == 0
    run = Path("run")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [r for r in records if r["kind"] == "eval"]
    assert evaluations[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert evaluations[-1]["rewards/margins"] > evaluations[0]["rewards/margins"] == 0
    account = json.loads((run / "account.json").read_text())["sets"]
    assert sum(s["read"] for s in account.values()) == 24
    ledger = pq.read_table(run / "ledger.parquet").to_pylist()
    assert ledger[-1]["chosen_text"].startswith("fine")
    assert "<html" in (run / "report.html").read_text()
    assert AutoTokenizer.from_pretrained(run / "model").chat_template


def test_a_run_that_is_resumed_ends_bit_identically():
    assert train("whole", "--checkpoint.every", "1", "--keep", "9") == 0
    assert train("cut", "--checkpoint.every", "1", "--keep", "9") == 0
    for folder in sorted(Path("cut/checkpoints").iterdir())[2:]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    assert main(["train", "cut/run.yaml", "resume=true"]) == 0
    assert same_weights_and_steps("whole", "cut")


def after_step(step: int, do: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """`do` happens as soon as the record of `step` is written."""
    append = run_train.append_jsonl

    def append_then(path: Path, record: dict[str, object]) -> None:
        append(path, record)
        if path.name == "metrics.jsonl" and (record["step"], record["kind"]) == (step, "train"):
            do()

    monkeypatch.setattr(run_train, "append_jsonl", append_then)


def same_weights_and_steps(one: str, other: str) -> bool:
    ours, theirs = (load_file(f"{run}/model/model.safetensors") for run in (one, other))
    lines = [Path(f"{run}/metrics.jsonl").read_text().splitlines() for run in (one, other)]
    steps = [[(r["step"], r["kind"], r["loss"]) for r in map(json.loads, found)] for found in lines]
    return all(torch.equal(ours[name], theirs[name]) for name in ours) and steps[0] == steps[1]


def test_a_killed_run_loses_at_most_one_interval_and_then_ends_bit_identically(
    monkeypatch: pytest.MonkeyPatch,
):
    assert train("whole", "--checkpoint.every", "2") == 0
    child = os.fork()
    if child == 0:
        after_step(4, lambda: os.kill(os.getpid(), signal.SIGKILL), monkeypatch)
        train("cut", "--checkpoint.every", "2")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [f.name for f in Path("cut/checkpoints").iterdir()] == ["step-00000002"]
    assert main(["train", "cut/run.yaml", "resume=true"]) == 0
    assert same_weights_and_steps("whole", "cut")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_prints_the_command_that_goes_on(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert train("whole") == 0
    with monkeypatch.context() as patched:
        after_step(2, lambda: signal.raise_signal(number), patched)
        assert train("cut", "--checkpoint.every", "99") == 130
    said = capsys.readouterr().err
    assert "stopped after step 2" in said and "upweight train cut/run.yaml resume=true" in said
    assert main(["train", "cut/run.yaml", "resume=true"]) == 0
    assert same_weights_and_steps("whole", "cut")


def test_resuming_with_other_settings_is_refused(capsys: pytest.CaptureFixture[str]):
    assert train("run") == 0
    assert main(["train", "run/run.yaml", "resume=true", "beta=0.3"]) == 2
    assert "started with other settings" in capsys.readouterr().err


def test_lora_exports_an_adapter_and_on_request_the_merged_model():
    assert train("run", "--lora.rank", "4", "--merge", "true") == 0
    merged = AutoModelForCausalLM.from_pretrained("run/model")
    base = AutoModelForCausalLM.from_pretrained("model")
    changed = [
        name
        for (name, a), b in zip(merged.named_parameters(), base.parameters(), strict=True)
        if not torch.equal(a, b)
    ]
    assert changed and all("proj" in name for name in changed)
    assert Path("run/adapter/adapter_model.safetensors").is_file()


def test_score_writes_one_object_per_preference_and_leaves_the_reference_open():
    score = [
        "score",
        "--model",
        "model",
        "--data",
        "pairs.jsonl",
        "--dtype",
        "float32",
        "--out",
        "s.jsonl",
    ]
    assert main(score) == 0
    rows = [json.loads(line) for line in Path("s.jsonl").read_text().splitlines()]
    assert len(rows) == 24 and rows[0]["margin"] is None and rows[0]["logp_chosen"] < 0
    assert main([*score, "--reference", "model"]) == 0
    rows = [json.loads(line) for line in Path("s.jsonl").read_text().splitlines()]
    assert all(abs(row["margin"]) < 1e-5 for row in rows)


def test_sample_writes_the_k_responses_layout():
    rows = uw.sample("model", ["pairs.jsonl"], num=2, max_new_tokens=4, limit=3)
    assert len(rows) == 3
    assert all(len(row["responses"]) == 2 for row in rows)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train --model model --data pairs.jsonl --out o betta=1", "Did you mean beta"),
        ("train --model nowhere/at/all --data pairs.jsonl --out o", "no folder nowhere/at/all"),
        ("train --model model --data missing.jsonl --out o", "missing.jsonl"),
        ("train --model model --data pairs.jsonl", "out is missing"),
        ("train --model model --data bad.jsonl --out o", "bad.jsonl:1"),
        ("train --model empty --data pairs.jsonl --out o", "no config.json"),
        ("train --model bare --data pairs.jsonl --out o", "tokenizer"),
        ("train --model model --data pairs.jsonl --out model", "model"),
        ("report empty", "no run.yaml"),
    ],
)
def test_a_users_mistake_is_one_message_and_exit_2(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
):
    Path("bad.jsonl").write_text("{not json\n")
    Path("empty").mkdir()
    Path("bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        Path("bare", name).write_bytes(Path("model", name).read_bytes())
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
