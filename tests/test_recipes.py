"""From files to results, on a tiny model, through the commands that a user types."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import upweight as uw
import upweight.recipes.state as run_state
from runs import PAIRS, furnish, plain_rows, rows_of, sentence, train, write_rows
from tiny import CHATML, byte_tokenizer, save_tiny
from upweight.cli import main
from upweight.config import load_run
from upweight.data.stream import load_prompts
from upweight.evidence import evaluate
from upweight.evidence.records import read_records
from upweight.evidence.report.verdict import verdict
from upweight.models import reference
from upweight.models.load import LanguageModel
from upweight.models.logprobs import token_logps
from upweight.recipes.best import metrics
from upweight.recipes.screen import Silent
from upweight.recipes.train import train_model
from upweight.stats import wilson_interval
from upweight.training import objectives
from upweight.training.checkpoint import load as load_checkpoint
from upweight.types import Forest


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tmp_path, monkeypatch)


def test_the_reference_is_read_in_the_bins_that_train(monkeypatch: pytest.MonkeyPatch):
    # In bf16 a log-prob moves by hundredths of a nat with its bin; in the same one it does not, and
    # the first step costs ln 2 to the last digit.
    write_rows("pairs.jsonl", plain_rows())
    read: dict[str, list[list[int]]] = {"reference": [], "training": []}
    for name, module in (("reference", reference), ("training", objectives)):

        def noted(lm: LanguageModel, forest: Forest, name: str = name) -> torch.Tensor:
            read[name].append(forest.token_ids.tolist())
            return token_logps(lm, forest)

        monkeypatch.setattr(module, "token_logps", noted)
    options = ["--dtype", "bfloat16", "--steps", "2", "--tokens_per_bin", "256"]
    assert train("run", *options) == 0
    assert len(read["training"]) >= 4
    assert all(tokens in read["reference"] for tokens in read["training"])
    first, *_ = [r for r in rows_of("run/metrics.jsonl") if r["kind"] == "train"]
    assert first["rewards/margins"] == first["rewards/spread"] == 0
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)


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


def test_the_exported_model_stops_where_its_training_answers_stop():
    tokenizer = AutoTokenizer.from_pretrained("model")
    tokenizer.eos_token = "<|endoftext|>"  # as base models have it; ChatML ends with <|im_end|>
    tokenizer.save_pretrained("model")
    assert train("run") == 0
    written = json.loads(Path("run/model/generation_config.json").read_text())
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in written["eos_token_id"]


def test_a_run_that_is_resumed_ends_bit_identically():
    assert train("whole", "--checkpoint.every", "1", "--keep", "9") == 0
    assert train("cut", "--checkpoint.every", "1", "--keep", "9") == 0
    for folder in sorted(Path("cut/checkpoints").iterdir())[2:]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    assert main(["train", "cut/run.yaml", "resume=true"]) == 0
    assert same_weights_and_steps("whole", "cut")


def after_step(
    step: int, do: Callable[[], None], monkeypatch: pytest.MonkeyPatch, kind: str = "train"
) -> None:
    """`do` happens as soon as the record of `step` is written."""
    append = run_state.append_jsonl

    def append_then(path: Path, record: dict[str, object]) -> None:
        append(path, record)
        if path.name == "metrics.jsonl" and (record["step"], record["kind"]) == (step, kind):
            do()

    monkeypatch.setattr(run_state, "append_jsonl", append_then)


TIMES = {"seconds", "tokens_per_second"}


def same_weights_and_steps(one: str, other: str) -> bool:
    ours, theirs = (load_file(f"{run}/model/model.safetensors") for run in (one, other))
    records = [
        [{key: value for key, value in r.items() if key not in TIMES} for r in found]
        for found in (rows_of(f"{run}/metrics.jsonl") for run in (one, other))
    ]
    rest = [
        (
            *(rows_of(f"{run}/{name}.jsonl") for name in ("samples", "margins")),
            pq.read_table(f"{run}/ledger.parquet").to_pylist(),
        )
        for run in (one, other)
    ]
    same = all(torch.equal(ours[name], theirs[name]) for name in ours)
    return same and records[0] == records[1] and rest[0] == rest[1]


@pytest.mark.parametrize("log_every", ["1", "3"])
def test_a_killed_run_loses_at_most_one_interval_and_then_ends_bit_identically(
    log_every: str, monkeypatch: pytest.MonkeyPatch
):
    often = ("--checkpoint.every", "2", "--log_every", log_every, "--evaluation.every", "2")
    assert train("whole", *often) == 0
    child = os.fork()
    if child == 0:
        after_step(3, lambda: os.kill(os.getpid(), signal.SIGKILL), monkeypatch)
        train("cut", *often)
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


def test_8_bit_moments_resume_bit_identically_or_name_the_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "bitsandbytes", None)
        patched.delitem(sys.modules, "bitsandbytes.optim", raising=False)
        assert train("run", "--moments", "8bit") == 2
    assert "pip install 'upweight[eightbit]'" in capsys.readouterr().err
    pytest.importorskip("bitsandbytes")
    assert train("whole", "--moments", "8bit") == 0
    with monkeypatch.context() as patched:
        after_step(2, lambda: signal.raise_signal(signal.SIGINT), patched)
        assert train("cut", "--moments", "8bit", "--checkpoint.every", "99") == 130
    assert main(["train", "cut/run.yaml", "resume=true"]) == 0
    assert same_weights_and_steps("whole", "cut")


def test_a_run_that_stops_before_its_first_step_is_evaluated_there_once(
    monkeypatch: pytest.MonkeyPatch,
):
    assert train("whole") == 0
    with monkeypatch.context() as patched:
        after_step(0, lambda: signal.raise_signal(signal.SIGINT), patched, kind="eval")
        assert train("cut") == 130
    assert [f.name for f in Path("cut/checkpoints").iterdir()] == ["step-00000000"]
    assert main(["train", "cut/run.yaml", "resume=true"]) == 0
    assert same_weights_and_steps("whole", "cut")


def test_a_signal_before_training_ends_the_run_at_once_and_leaves_its_folder_free():
    # A shell that put the tests into the background has them ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    class Stopping(Silent):
        def progress(self, done: int, total: int) -> None:
            signal.raise_signal(signal.SIGINT)

    resolved = load_run(None, values={"model": "model", "data": "pairs.jsonl", "out": "run"})
    with pytest.raises(KeyboardInterrupt):
        train_model(resolved, Stopping())
    signal.signal(signal.SIGINT, before)
    assert train("run") == 0


def test_a_run_that_failed_before_its_first_step_is_in_nobodys_way():
    assert train("run", "--lora.targets", "[qproj]") == 2
    assert train("run", "--reference", "nowhere/at/all") == 2
    assert train("run", "--steps", "1") == 0


def test_an_evaluation_that_does_not_fit_goes_on_with_smaller_bins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    made = evaluate.token_logps

    def limited(lm: LanguageModel, forest: Forest) -> torch.Tensor:
        if forest.num_tokens > 120:
            raise torch.OutOfMemoryError("out of room")
        return made(lm, forest)

    assert train("run") == 0
    monkeypatch.setattr(evaluate, "token_logps", limited)
    assert train("small") == 0
    said = capsys.readouterr().err
    assert said.count("the evaluation after step") == 1 and "going on with bins of" in said
    for name in ("loss", "rewards/margins"):
        whole, cut = (
            [r[name] for r in rows_of(f"{run}/metrics.jsonl") if r["kind"] == "eval"]
            for run in ("run", "small")
        )
        assert cut == pytest.approx(whole, rel=1e-3, abs=1e-5)


def test_resuming_with_other_settings_is_refused(capsys: pytest.CaptureFixture[str]):
    assert train("run", "--steps", "1") == 0
    assert main(["train", "run/run.yaml", "resume=true", "beta=0.3"]) == 2
    said = capsys.readouterr().err
    assert "started with other settings (loss.beta is 0.3 here and was 0.1)" in said


@pytest.mark.parametrize("command", ["train", "check"])
def test_resuming_with_other_rows_is_refused(command: str, capsys: pytest.CaptureFixture[str]):
    assert train("run", "--steps", "1") == 0
    swapped = [r | {"chosen": r["rejected"], "rejected": r["chosen"]} for r in PAIRS]
    write_rows("pairs.jsonl", swapped)
    assert main([command, "run/run.yaml", "resume=true"]) == 2
    said = capsys.readouterr().err
    assert "the rows of the set train are not those that the run in run began with" in said
    assert "Put pairs.jsonl back as it was" in said


def test_resuming_from_another_start_is_refused_whatever_the_reference(
    capsys: pytest.CaptureFixture[str],
):
    save_tiny("other", seed=1)
    assert train("run", "--reference", "other", "--lora.rank", "2", "--steps", "1") == 0
    save_tiny("model", seed=2)
    assert main(["train", "run/run.yaml", "resume=true"]) == 2
    assert "the run in run was started from another model" in capsys.readouterr().err
    save_tiny("other", seed=2)
    assert main(["train", "run/run.yaml", "resume=true"]) == 2
    assert "the run in run was trained against another reference" in capsys.readouterr().err


def test_a_run_whose_checkpoints_are_damaged_is_not_begun_again(
    capsys: pytest.CaptureFixture[str],
):
    assert train("run", "--steps", "1") == 0
    for folder in Path("run/checkpoints").iterdir():
        (folder / "weights.safetensors").write_bytes(b"")
    assert main(["train", "run/run.yaml", "resume=true"]) == 2
    assert "run has no whole checkpoint to resume" in capsys.readouterr().err


@pytest.mark.parametrize(("best", "at"), [("heldout/logps/chosen", 1), ("kl", 0)])
def test_the_best_checkpoint_is_kept_wherever_the_best_evaluation_is(best: str, at: int):
    often = ("--checkpoint.every", "99", "--keep", "1", "--evaluation.every", "1")
    assert train("run", "--checkpoint.best", best, *often, "--learning-rate", "0.1") == 0
    key = best.removeprefix("heldout/")
    found = {r["step"]: r[key] for r in rows_of("run/metrics.jsonl") if r["kind"] == "eval"}
    choose = min if key == "kl" else max
    assert choose(found, key=found.__getitem__) == at, "the run peaks off the grid"
    kept = sorted(folder.name for folder in Path("run/checkpoints").iterdir())
    assert kept == [f"step-{at:08d}", f"step-{max(found):08d}"]


def test_the_best_checkpoint_may_be_that_of_any_set():
    write_rows("more.jsonl", [r | {"prompt": f"more {r['prompt']}"} for r in PAIRS[:4]])
    sets = ("--evaluation.sets", "{more: more.jsonl}", "--checkpoint.best", "more/loss")
    assert train("run", *sets, "--steps", "2") == 0
    newest = load_checkpoint(Path("run/checkpoints/step-00000002")).position
    losses = {r["step"]: r["loss"] for r in rows_of("run/metrics.jsonl") if r.get("set") == "more"}
    assert (newest.best_step, newest.best) == min(losses.items(), key=lambda item: item[1])


def test_what_checkpoint_best_takes_is_what_an_evaluation_records():
    write_rows("pairs.jsonl", plain_rows(40))
    for more in ((), ("--temperature", "0.5"), ("--samples", "0"), ("--samples", "8")):
        out = "run-" + "-".join(more)
        assert train(out, "--steps", "1", *more) == 0
        run = load_run(f"{out}/run.yaml").run
        (record, *_) = (r for r in rows_of(f"{out}/metrics.jsonl") if r["kind"] == "eval")
        numbers = {k for k, v in record.items() if isinstance(v, float)} - {"epoch"}
        assert ("kl_low" in numbers) == (more == ("--samples", "8"))
        assert set(metrics(run, "heldout")) == numbers


def test_a_limit_is_one_on_training_rows():
    write_rows("held.jsonl", [r | {"prompt": f"held {r['prompt']}"} for r in PAIRS])
    sets = ("--evaluation.sets", "{held: held.jsonl}", "--fraction", "0", "--limit", "3")
    assert train("run", *sets, "--steps", "1") == 0
    account = json.loads(Path("run/account.json").read_text())["sets"]
    assert (account["train"]["used"], account["held"]["used"]) == (3, 24)


def test_the_reference_of_every_evaluation_is_that_of_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    after_step(2, lambda: save_tiny("model", seed=3), monkeypatch)
    assert train("run") == 2
    said = capsys.readouterr().err
    assert "error[UW108]: the reference model is not what it was when the run began" in said


@pytest.mark.parametrize("more", [(), ("--lora.rank", "2"), ("--reference", "other")])
def test_the_reference_answers_alike_at_every_evaluation(more: tuple[str, ...]):
    save_tiny("other", seed=1)
    assert train("run", "--compute.checkpointing", "true", *more) == 0
    answers = {(row["prompt"], row["reference"]) for row in rows_of("run/samples.jsonl")}
    assert len(answers) == len({prompt for prompt, _ in answers}) == 2
    environment = json.loads(Path("run/environment.json").read_text())
    same = environment["model_fingerprint"] == environment["reference_fingerprint"]
    assert same == ("--reference" not in more)


def test_check_writes_nothing_and_trains_nothing():
    before = sorted(Path().rglob("*"))
    assert train("run", command="check") == 0
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--reference nowhere/at/all", "no folder nowhere/at/all"),
        ("--reference foreign", "another vocabulary"),
        ("--lora.targets [qproj]", "match no layer"),
        ("--out pairs.jsonl/run", "pairs.jsonl/run cannot be written"),
        ("--checkpoint.best heldout/lost", "Did you mean heldout/loss?"),
        ("--checkpoint.best kl --temperature 0.5", "checkpoint.best is kl, which no evaluation"),
    ],
)
def test_check_raises_what_train_would(more: str, said: str, capsys: pytest.CaptureFixture[str]):
    save_tiny("foreign")
    tokenizer = AutoTokenizer.from_pretrained("foreign")
    tokenizer.add_tokens(["word"])
    tokenizer.save_pretrained("foreign")
    errors: list[str] = []
    for command in ("check", "train"):
        capsys.readouterr()
        # The last --out wins.
        assert train("new", *more.split(), command=command) == 2
        errors.append(capsys.readouterr().err.partition("error")[2])
    assert errors[0] == errors[1] and said in errors[0]


def test_check_passes_over_a_run_in_out_and_ends_in_a_verdict(capsys: pytest.CaptureFixture[str]):
    assert train("run", "--steps", "1") == 0
    capsys.readouterr()
    assert train("run", command="check") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    verdict = "ready to train with another out, since this one holds a run: nothing refused"
    assert last.startswith(verdict)
    assert train("run", "--json", command="check") == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == last
    assert train("new", "--learning_rate", "1e-9", command="check") == 0
    said = capsys.readouterr().out.splitlines()
    codes = "UW103, UW207, UW211"
    assert said[-1] == f"ready to train: nothing refused, 3 warnings ({codes}), 1 not watched"
    begins = [line.partition("[")[0].partition(":")[0] for line in said]
    assert sorted(begins[-5:-1]) == ["not watched", "warning", "warning", "warning"]
    assert not {"warning", "not watched"} & set(begins[:-5])


def test_a_run_ends_in_what_its_report_says_at_the_top_with_its_doubts(
    capsys: pytest.CaptureFixture[str],
):
    draw = random.Random(0)
    longer = [
        {"prompt": f"q {i}", "chosen": sentence(draw, 8), "rejected": sentence(draw, 4)}
        for i in range(60)
    ]
    write_rows("pairs.jsonl", longer)
    assert train("run", "--steps", "2", "--samples", "0") == 0
    said = verdict(read_records(Path("run")))
    assert any("not shown to know more than length" in doubt for doubt in said.cautions)
    ends = capsys.readouterr().err.splitlines()[-3 - len(said.cautions) :]
    assert ends[:-2] == [" ".join(line.split()) for line in (said.headline, *said.cautions)]


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


def test_how_many_prompts_are_held_out_is_said(capsys: pytest.CaptureFixture[str]):
    twice = [{**row, "prompt": f"question {i // 2}"} for i, row in enumerate(PAIRS[:20])]
    write_rows("few.jsonl", twice)
    words = "check --model model --data few.jsonl --fraction 0.2 --samples 0 --dtype float32"
    assert main(words.split()) == 0
    said = " ".join(capsys.readouterr().out.split())
    found = re.search(r"heldout: (\d+) rows read .*?; (\d+) of 10 prompts held out", said)
    assert found and int(found[1]) == 2 * int(found[2])
    assert "(evaluation.fraction 0.2: each prompt as a whole, and by a draw of its own)" in said


def test_score_writes_one_object_per_preference_and_leaves_the_reference_open(
    capsys: pytest.CaptureFixture[str],
):
    score = [
        "score",
        "--model",
        "model",
        "--data",
        "pairs.jsonl",
        "--dtype",
        "float32",
        "--out",
        "new/s.jsonl",
    ]
    assert main(score) == 0
    rows = rows_of("new/s.jsonl")
    assert len(rows) == 24 and rows[0]["margin"] is None and rows[0]["logp_chosen"] < 0
    assert capsys.readouterr().err.splitlines()[-1] == last_line(
        "log-prob (without a reference)",
        [row["logp_chosen"] - row["logp_rejected"] for row in rows],
    )
    save_tiny("other", seed=1)
    assert main([*score, "--reference", "other", "--beta", "0.5", "--overwrite"]) == 0
    theirs = uw.score(model="other", data="pairs.jsonl", dtype="float32")
    for row, plain, other in zip(rows_of("new/s.jsonl"), rows, theirs, strict=True):
        assert row["logp_chosen"] == plain["logp_chosen"] != other["logp_chosen"]
        for side in ("chosen", "rejected"):
            assert row[f"ref_logp_{side}"] == pytest.approx(other[f"logp_{side}"], abs=1e-4)
            ratio = row[f"logp_{side}"] - other[f"logp_{side}"]
            assert row[f"reward_{side}"] == pytest.approx(0.5 * ratio, abs=1e-4)
        assert row["margin"] == row["reward_chosen"] - row["reward_rejected"]
    margins = [row["margin"] for row in rows_of("new/s.jsonl")]
    assert capsys.readouterr().err.splitlines()[-1] == last_line("implicit reward", margins)
    # A policy is as good as itself.
    assert main([*score, "--reference", "model", "--overwrite"]) == 0
    said = capsys.readouterr().err.splitlines()[-1]
    assert "50.0% [" in said and "0 of 24 preferences and 24 ties, which count half, of" in said


def last_line(by: str, margins: list[float]) -> str:
    num = sum(margin > 0 for margin in margins)
    assert 0 < num < len(margins) == 24
    found = wilson_interval(num / 24, 24)  # a prompt each
    share, low, high = (100 * x for x in (found.value, found.low, found.high))
    said = f"{share:.1f}% [{low:.1f}, {high:.1f}], {num} of 24 preferences of 24 prompts"
    return f"chosen above rejected by {by}: {said}"


def test_sample_writes_the_k_responses_layout():
    rows = uw.sample("model", ["pairs.jsonl"], num=2, max_new_tokens=4, limit=3)
    assert len(rows) == 3
    assert all(len(row["responses"]) == 2 for row in rows)


def test_what_sample_writes_is_learned_from_as_it_was_drawn():
    style = "{{ style }}{% if tools %}{{ tools | tojson }}{% endif %}"
    byte_tokenizer(style + CHATML).save_pretrained("model")
    own = {"template_options": {"style": "curt"}, "tools": [{"name": "f"}]}
    write_rows("asked.jsonl", [{"prompt": "question", **own}, {"prompt": "another"}])
    rows = uw.sample("model", "asked.jsonl", num=2, max_new_tokens=4)
    for row in rows:
        row["preferences"] = [[0, 1]]
    write_rows("drawn.jsonl", rows)
    prompts = []
    for name in ("asked.jsonl", "drawn.jsonl"):
        examples, _ = load_prompts([name])
        prompts.append([(e.prompt, e.tools, e.template_options) for e in examples])
    assert prompts[0] == prompts[1]
    found = uw.check(model="model", data="drawn.jsonl", fraction=0, samples=0)
    assert found.accounts["train"].unfinished == 4
    assert not any(any(tree.stopped) for tree in found.trees["train"])


def test_temperature_zero_is_the_same_answer_every_time():
    greedy = uw.sample("model", "pairs.jsonl", num=2, max_new_tokens=4, temperature=0, limit=2)
    for row in greedy:
        first, second = (answer["text"] for answer in row["responses"])
        assert first == second
