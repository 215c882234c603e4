"""Several runs in one run.yaml, each from the model of the one before it."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import upweight as uw
from runs import PAIRS, furnish, rows_of, write_rows
from test_recipes import TIMES, after_step
from upweight.cli import main
from upweight.config import load_stages
from upweight.errors import ConfigError, UpweightError
from upweight.models.load import fingerprint, load

SHARED = """\
model: model
data: pairs.jsonl
out: {out}
batch: {{pairs_per_step: 4}}
compute: {{dtype: float32}}
learning_rate: 1e-3
beta: 0.3
evaluation: {{fraction: 0.2, samples: 2, max_new_tokens: 8}}
"""
TWO = SHARED + "stages:\n  - objective: sft\n    seed: 3\n  - {{objective: dpo, epochs: 2}}\n"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tmp_path, monkeypatch)


def written(text: str, name: str = "run.yaml", out: str = "run") -> str:
    Path(name).write_text(text.format(out=out))
    return name


def environment(folder: str) -> dict[str, Any]:
    return json.loads(Path(folder, "environment.json").read_text())


def steps(folder: str) -> list[dict[str, Any]]:
    found = rows_of(f"{folder}/metrics.jsonl")
    return [{key: value for key, value in r.items() if key not in TIMES} for r in found]


def said(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_stages(written(text), required=("out",))
    return str(caught.value)


def test_a_stage_is_the_files_keys_with_its_own_over_them_and_overrides_over_both():
    text = SHARED + "stages:\n  - {{objective: sft, learning_rate: 5e-4}}\n  - objective: dpo\n"
    sft, dpo = load_stages(written(text), ["seed=7"], {"epochs": 3})
    assert [r.run.objective for r in (sft, dpo)] == ["sft", "dpo"]
    assert [r.run.optimizer.learning_rate for r in (sft, dpo)] == [5e-4, 1e-3]
    assert [(r.run.seed, r.run.epochs) for r in (sft, dpo)] == [(7, 3.0)] * 2
    assert sft.origins["optimizer.learning_rate"] == "file run.yaml, stage 1-sft"
    (sft, dpo) = load_stages(written(text), ["learning_rate=1"])
    assert [r.run.optimizer.learning_rate for r in (sft, dpo)] == [1, 1]


def test_stages_are_a_chain_of_models_and_folders():
    text = SHARED + "stages: [{{objective: sft}}, {{objective: reward}}, {{objective: ppo}}, "
    text += "{{objective: dpo, model: other, reference: third}}]\n"
    runs = [r.run for r in load_stages(written(text), values={"model": "said"})]
    assert [r.out for r in runs] == ["run/1-sft", "run/2-reward", "run/3-ppo", "run/4-dpo"]
    # A reward model answers no prompts: what follows it goes on with the model before it.
    assert [r.model for r in runs] == ["said", "run/1-sft/model", "run/1-sft/model", "other"]
    assert [r.rollout.reward for r in runs] == [None, None, "run/2-reward/model", None]
    assert [r.reference for r in runs] == [None, None, None, "third"]


def test_what_stands_beside_the_stages_holds_for_those_that_read_it():
    sft, dpo = (r.run for r in load_stages(written(TWO)))
    assert (sft.loss.beta, dpo.loss.beta) == (0.1, 0.3)
    text = SHARED + "rollout: {{stop_penalty: 1}}\nstages: [{{objective: sft}}]\n"
    with pytest.raises(UpweightError, match="stop_penalty is 1.0, and objective sft does not read"):
        uw.train(written(text))


def test_a_file_without_stages_is_one_run():
    (run,) = load_stages(written(SHARED))
    assert (run.run.out, run.run.objective) == ("run", "dpo")


def test_what_was_learned_in_four_bits_is_not_put_into_four_bits_again():
    shared = SHARED + "lora: {{quantize: nf4}}\n"
    with pytest.raises(ConfigError, match="its adapter would be merged and rounded away"):
        load_stages(written(shared + "stages:\n  - objective: sft\n  - objective: dpo\n"))
    other = "stages:\n  - objective: sft\n  - {{objective: dpo, model: model}}\n"
    assert len(load_stages(written(shared + other))) == 2


def test_mistakes_name_the_line_and_the_stage():
    two = SHARED + "stages:\n  - objective: sft\n    learnin_rate: 1\n  - objective: dpo\n"
    wrong = said(two + "    epochs: none\n    lora: {{rang: 8}}\n")
    assert "run.yaml:11: stage 1-sft: learnin_rate is not a key of a run" in wrong
    assert "run.yaml:13: stage 2-dpo: epochs must be a number > 0" in wrong
    assert "run.yaml:14: stage 2-dpo: lora.rang is not a key of lora" in wrong
    assert "stage 2 has no objective. It is one of: dpo, sft" in said(
        SHARED + "stages: [{{objective: sft}}, {{beta: 1}}]\n"
    )
    assert "stage 2-dop: objective must be dpo, sft, reward" in said(
        SHARED + "stages: [{{objective: sft}}, {{objective: dop}}]\n"
    )
    inside = SHARED + "stages:\n  - objective: sft\n    stages: [{{objective: dpo}}]\n"
    assert "run.yaml:11: stage 1-sft: stages cannot stand inside of a stage." in said(inside)
    for key in ("out: there", "resume: true"):
        own = said(SHARED + f"stages: [{{{{objective: sft, {key}}}}}]\n")
        assert f"stage 1-sft: {key.partition(':')[0]} stands beside the stages" in own
    assert 'stages must be a list of runs, found "sft"' in said(SHARED + "stages: sft\n")
    assert "stages must be a list of runs, found []" in said(SHARED + "stages: []\n")
    assert 'stage 1 must hold keys and values, found "sft"' in said(SHARED + "stages: [sft]\n")
    assert "objective has no effect beside stages" in said(TWO + "objective: dpo\n")
    assert "run.yaml: out is missing, and needed." in said(TWO.replace("out: {out}\n", ""))
    assert "run.yaml: stage 1-sft: data.path is missing" in said(
        TWO.replace("data: pairs.jsonl\n", "")
    )
    with pytest.raises(ConfigError, match="stages is a list of runs in a run.yaml, or among"):
        load_stages(None, ["stages=[]"], {"model": "model", "data": "pairs.jsonl"})


def test_two_stages_end_in_dpo_whose_reference_is_what_sft_made(
    capsys: pytest.CaptureFixture[str],
):
    assert main(["train", written(TWO)]) == 0
    printed = capsys.readouterr().err
    assert "stage 1 of 2, 1-sft" in printed and "stage 2 of 2, 2-dpo" in printed
    tuned = fingerprint(load("run/1-sft/model", device="cpu", dtype="float32"))
    start = fingerprint(load("model", device="cpu", dtype="float32"))
    assert environment("run/2-dpo")["reference_fingerprint"] == tuned != start
    assert environment("run/2-dpo")["model_fingerprint"] == tuned
    assert environment("run/1-sft")["model_fingerprint"] == start
    # At step 0 policy and reference are the same: ln 2.
    first = next(r for r in rows_of("run/2-dpo/metrics.jsonl") if r["kind"] == "eval")
    assert first["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert Path("run/2-dpo/report.html").is_file()


def test_the_stage_after_an_adapter_starts_from_it_merged():
    text = SHARED + "stages: [{{objective: sft, lora: true}}, {{objective: dpo, epochs: 1}}]\n"
    result = uw.train(written(text))
    assert result.model == Path("run/2-dpo/model")
    tuned = fingerprint(load("run/1-sft/model", device="cpu", dtype="float32"))
    assert environment("run/2-dpo")["reference_fingerprint"] == tuned


def test_python_takes_stages_as_a_keyword():
    result = uw.train(
        stages=[{"objective": "reward"}, {"objective": "sft", "data": "pairs.jsonl"}],
        model="model",
        data="pairs.jsonl",
        out="run",
        dtype="float32",
        steps=1,
    )
    assert (result.out, result.finished) == (Path("run/2-sft"), True)
    # Neither starts from the reward model.
    assert [environment(f"run/{name}")["model"] for name in ("1-reward", "2-sft")] == ["model"] * 2


def test_no_stage_begins_after_one_that_was_asked_to_stop_in_its_last_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    file = written(SHARED + "steps: 2\nstages: [{{objective: sft}}, {{objective: dpo}}]\n")
    with monkeypatch.context() as patched:
        after_step(2, lambda: signal.raise_signal(signal.SIGINT), patched)
        assert main(["train", file]) == 130
    said = " ".join(capsys.readouterr().err.split())
    assert "The stages after it: the command that began them, with resume=true" in said
    assert Path("run/1-sft/model").is_dir() and not Path("run/2-dpo").exists()
    assert main(["train", file, "resume=true"]) == 0
    assert "1-sft: finished before" in capsys.readouterr().err


@pytest.mark.parametrize(("stage", "step"), [("1-sft", 2), ("2-dpo", 3)])
def test_stages_that_are_stopped_and_resumed_end_bit_identically(
    stage: str, step: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert main(["train", written(TWO, "whole.yaml", "whole")]) == 0
    file = written(TWO, "cut.yaml", "cut")
    if stage == "2-dpo":
        # The first stage is there and finished.
        Path("cut").mkdir()
        shutil.copytree("whole/1-sft", "cut/1-sft")
        record = Path("cut/1-sft/run.yaml")
        record.write_text(record.read_text().replace("whole", "cut"))
    with monkeypatch.context() as patched:
        after_step(step, lambda: signal.raise_signal(signal.SIGINT), patched)
        again = ["resume=true"] if stage == "2-dpo" else []
        assert main(["train", file, *again]) == 130
    said = " ".join(capsys.readouterr().err.split())
    assert ("the command that began them, with resume=true" in said) == (stage == "1-sft")
    before = Path(f"cut/{stage}/metrics.jsonl").read_text()
    assert main(["train", file, "resume=true"]) == 0
    assert Path(f"cut/{stage}/metrics.jsonl").read_text().startswith(before)
    printed = capsys.readouterr().err
    assert ("stage 1 of 2, 1-sft: finished before" in printed) == (stage == "2-dpo")
    for name in ("1-sft", "2-dpo"):
        whole, cut = (
            load_file(f"{run}/{name}/model/model.safetensors") for run in ("whole", "cut")
        )
        assert whole.keys() == cut.keys()
        assert all(torch.equal(whole[key], cut[key]) for key in whole)
        assert steps(f"whole/{name}") == steps(f"cut/{name}")


def test_stages_that_are_gone_on_with_must_be_the_same(capsys: pytest.CaptureFixture[str]):
    file = written(TWO)
    assert main(["train", file]) == 0
    assert main(["train", file]) == 2
    assert "stage 1-sft: run/1-sft holds a run already" in capsys.readouterr().err
    shutil.rmtree("run/1-sft")
    # Seen before the first stage is trained again.
    assert main(["train", file]) == 2
    assert "stage 2-dpo: run/2-dpo holds a run already" in capsys.readouterr().err
    assert not Path("run/1-sft").exists()
    shutil.rmtree("run/2-dpo")
    assert main(["train", file, "resume=true"]) == 2
    assert "stage 1-sft: run/1-sft has no run to resume" in capsys.readouterr().err
    assert main(["train", file, "epochs=1"]) == 0
    assert main(["train", file, "epochs=1", "learning_rate=1e-4", "resume=true"]) == 2
    said = capsys.readouterr().err
    assert "stage 1-sft: the run in run/1-sft is finished, with other settings" in said
    assert "optimizer.learning_rate is 0.0001 here and was 0.001" in said


def test_stages_that_are_all_finished_are_left_as_they_are(capsys: pytest.CaptureFixture[str]):
    file = written(SHARED + "steps: 2\nstages: [{{objective: sft}}, {{objective: dpo}}]\n")
    result = uw.train(file)
    before = {p: p.stat().st_mtime_ns for p in Path("run").rglob("*")}
    assert main(["train", file, "resume=true"]) == 0
    *_, first, last, model, report = capsys.readouterr().err.splitlines()
    assert first == "stage 1 of 2, 1-sft: finished before"
    assert last == "stage 2 of 2, 2-dpo: finished before"
    assert (model, report) == (f"model:  {result.model}", f"report: {result.report}")
    assert uw.train(file, resume=True) == result
    assert {p: p.stat().st_mtime_ns for p in Path("run").rglob("*")} == before


def test_a_finished_stage_is_of_the_rows_and_models_that_there_are(
    capsys: pytest.CaptureFixture[str],
):
    # The second has rows of its own and a named reference, so that each is looked at by itself.
    shutil.copytree("model", "third")
    write_rows("more.jsonl", PAIRS[:10])
    text = SHARED + (
        "steps: 1\nstages: [{{objective: sft}}, "
        "{{objective: dpo, data: more.jsonl, reference: third}}, {{objective: sft}}]\n"
    )
    file = written(text)
    assert main(["train", file]) == 0
    shutil.rmtree("run/3-sft/model")  # not finished, by that
    rows, other = Path("more.jsonl").read_text(), json.dumps(rows_of("more.jsonl")[0])
    Path("more.jsonl").write_text(rows + other.replace("?", "!") + "\n")
    capsys.readouterr()
    assert main(["train", file, "resume=true"]) == 2
    printed = capsys.readouterr().err
    assert "stage 1 of 3, 1-sft: finished before" in printed
    assert "stage 2-dpo: the run in run/2-dpo is finished, and what it was made of" in printed
    assert "the rows of the set train in more.jsonl" in printed
    Path("more.jsonl").write_text(rows)
    weights = load_file("third/model.safetensors")
    save_file(
        {k: v + 1e-3 for k, v in weights.items()}, "third/model.safetensors", {"format": "pt"}
    )
    assert main(["train", file, "resume=true"]) == 2
    printed = capsys.readouterr().err
    assert "reference third" in printed and "rows of the set" not in printed
    save_file(weights, "third/model.safetensors", {"format": "pt"})
    assert main(["train", file, "resume=true"]) == 0
    assert "stage 2 of 3, 2-dpo: finished before" in capsys.readouterr().err


def test_an_error_in_the_middle_names_its_stage(capsys: pytest.CaptureFixture[str]):
    text = SHARED + "stages: [{{objective: sft}}, {{objective: dpo, data: gone.jsonl}}]\n"
    assert main(["check", written(text)]) == 2
    assert "error: stage 2-dpo: gone.jsonl does not exist" in capsys.readouterr().err
    unread = SHARED + "stages: [{{objective: sft}}, {{objective: dpo, centering: 1}}]\n"
    assert main(["train", written(unread)]) == 2
    assert "error[UW109]: stage 2-dpo: run.yaml:9: loss.centering is 1" in capsys.readouterr().err
    assert not Path("run").exists()


def test_check_looks_at_every_stage_and_writes_nothing(capsys: pytest.CaptureFixture[str]):
    write_rows("more.jsonl", PAIRS[:10])
    text = SHARED + "stages: [{{objective: sft}}, {{objective: dpo, data: more.jsonl}}]\n"
    file = written(text)
    found = uw.check(file)
    (later,) = found.later
    assert (found.accounts["train"].read, later.accounts["train"].read) == (19, 9)
    assert not Path("run").exists()
    assert main(["check", file, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [s["sets"]["train"]["read"] for s in record["later_stages"]] == [9]
    # The model of the second stage is there once the first is trained, and is asked then.
    assert "start_nats" not in later.figures["train"]
    uw.train(file, steps=1)
    shutil.rmtree("run/2-dpo")
    (later,) = uw.check(file, resume=True, steps=1).later
    assert later.figures["train"]["start_nats"].value < 1e-5
    assert torch.isfinite(torch.tensor(later.memory.needed))
