"""Every objective on the one engine, on a tiny model, through the commands that a user types."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import upweight as uw
from runs import PAIRS, furnish_rewarded, judge, online, records, rows_of, train, write_rows
from upweight.cli import main
from upweight.config import load_run
from upweight.models.load import load
from upweight.recipes.prepare import load_policy, prepare
from upweight.training.checkpoint import load as load_checkpoint
from upweight.types import ResponseId, RowId, Tree

ROW = RowId("x", 1)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish_rewarded(tmp_path, monkeypatch)


def test_sft_learns_the_chosen_responses_and_says_how_likely_they_are():
    assert train("run", "--objective", "sft") == 0
    evals = records("run", "eval")
    assert evals[-1]["loss"] < evals[0]["loss"]
    step = records("run", "train")[0]
    assert step["num_scored"] > 0 and "rewards/margins" not in step
    account = json.loads(Path("run/account.json").read_text())["sets"]["train"]
    assert account["left_out"]["not_chosen"] == account["used"]
    assert AutoModelForCausalLM.from_pretrained("run/model")


def test_weights_that_sft_does_not_read_are_counted(capsys: pytest.CaptureFixture[str]):
    weighed = [{**row, "weight": 2.0} for row in rows_of("pairs.jsonl")]
    write_rows("pairs.jsonl", weighed)
    assert train("sft", "--objective", "sft", "--steps", "1") == 0
    assert train("dpo", "--steps", "1") == 0
    answers = [{"text": "fine", "weight": 2.0}, {"text": "bad thing", "weight": 1.0}]
    stated = {"prompt": "stated", "responses": ["fine", "bad"], "preferences": [[0, 1, 3.0]]}
    plain = {"prompt": "plain", "responses": ["fine", "bad"], "preferences": [[0, 1]]}
    inside = [{"prompt": "one", "responses": answers}, {**stated, "prompt": "two"}, stated, plain]
    write_rows("pairs.jsonl", inside)
    assert train("inside", "--objective", "sft", "--steps", "1") == 0
    unused = [
        json.loads(Path(f"{run}/account.json").read_text())["sets"]["train"]["unused_columns"]
        for run in ("sft", "dpo", "inside")
    ]
    wanted = [{"weight": 24}, {}, {"responses.weight": 1, "preferences.weight": 2}]
    assert unused == wanted  # of the file, before it is split
    assert "column responses.weight is not read (1 row)" in capsys.readouterr().err


def test_sft_takes_every_turn_of_a_conversation_when_told_to():
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    messages = [{"role": role, "content": text} for role, text in turns]
    write_rows("pairs.jsonl", [{"messages": [*messages[:-1], {"role": "assistant", "content": c}]}
                               for c in "abcdefgh"])  # fmt: skip
    words = "--model model --data pairs.jsonl --objective sft --dtype float32 --out"
    assert main(["train", *words.split(), "last"]) == 0
    assert main(["train", *words.split(), "all", "--turns", "all"]) == 0
    last, every = (
        json.loads(Path(f"{run}/account.json").read_text())["sets"]["train"]
        for run in ("last", "all")
    )
    assert (last["used"], every["used"], every["earlier_turns"]) == (8, 16, 8)


def test_no_conversation_and_no_turns_prompt_is_trained_on_and_held_out():
    def said(role: str, text: str) -> dict[str, str]:
        return {"role": role, "content": text}

    # Two conversations each begin alike, and go apart after the assistant's first turn.
    talks = [
        [said("user", f"question {i // 2}"), said("assistant", f"answer {i // 2}"),
         said("user", f"more of {i}"), said("assistant", f"end of {i}")]
        for i in range(40)
    ]  # fmt: skip
    write_rows("pairs.jsonl", [{"messages": talk} for talk in talks])
    asked = {"model": "model", "data": "pairs.jsonl", "dtype": "float32", "fraction": 0.3}
    run = load_run(None, values={**asked, "objective": "sft", "turns": "all"}).run
    prepared = prepare(run, load_policy(run))
    prompts = {name: {t.prompt for t in trees} for name, trees in prepared.trees.items()}
    assert len(prompts["heldout"]) > 4 and not prompts["train"] & prompts["heldout"]
    lines = {name: {t.ids[0].row.line for t in trees} for name, trees in prepared.trees.items()}
    assert not lines["train"] & lines["heldout"]
    for name, account in prepared.accounts.items():
        talks = len(lines[name])
        assert (account.read, account.used, account.earlier_turns) == (2 * talks, 2 * talks, talks)


def test_every_turn_of_text_is_refused(capsys: pytest.CaptureFixture[str]):
    assert train("run", "--objective", "sft", "--turns", "all") == 2
    assert "data.turns is all, and no row is a conversation" in capsys.readouterr().err


@pytest.mark.parametrize("objective", ["ppo", "grpo", "rloo", "online_dpo"])
def test_a_policy_that_is_rewarded_for_small_letters_learns_to_write_them(objective):
    more = ["--steps", "24", "--prompts_per_round", "8", "--responses", "4"]
    assert online("run", objective, *more) == 0
    steps = records("run", "train")
    first, last = (sum(r["reward"] for r in part) / 4 for part in (steps[:4], steps[-4:]))
    assert last > first + 0.02
    evals = records("run", "eval")
    assert {"reward", "reward_low", "reference_reward", "kl", "length"} <= evals[-1].keys()
    end = evals[-1]
    assert end["reward_gain"] == pytest.approx(end["reward"] - end["reference_reward"])
    assert {"reward_gain_low", "reward_gain_high"} <= end.keys()
    assert AutoModelForCausalLM.from_pretrained("run/model")
    page = Path("run/report.html").read_text()
    assert "<h2>Reward against KL</h2>" in page and "<h2>Preferences</h2>" not in page
    assert "ledger.parquet" not in page


@pytest.mark.parametrize(
    ("objective", "more"),
    [
        ("ppo", ["--passes", "2", "--minibatches", "2"]),
        ("ppo", ["--value", "shared", "--kl_target", "1", "--steps", "6"]),
        ("grpo", ["--renew_reference", "1", "--responses", "4"]),
        ("rloo", ["--minibatches", "3", "--prompts_per_round", "8"]),
        ("online_dpo", ["--lora", "true", "--renew_reference", "1", "--log_every", "3"]),
    ],
)
def test_a_run_of_rounds_that_is_resumed_ends_bit_identically(objective, more):
    often = ["--checkpoint.every", "1", "--keep", "9", *more]
    assert online("whole", objective, *often) == 0
    assert online("cut", objective, *often) == 0
    require_resumed_alike()


def require_resumed_alike() -> None:
    """The run "cut" goes on from its second checkpoint, and ends as "whole" did."""
    for folder in sorted(Path("cut/checkpoints").iterdir())[2:]:
        shutil.rmtree(folder)
    assert main(["train", "cut/run.yaml", "resume=true"]) == 0
    ends = [sorted(Path(run, "checkpoints").iterdir())[-1] for run in ("whole", "cut")]
    whole, cut = map(load_checkpoint, ends)
    assert whole.weights.keys() == cut.weights.keys()
    assert all(torch.equal(w, cut.weights[name]) for name, w in whole.weights.items())
    for kind in ("train", "eval"):
        assert known_of(records("whole", kind)) == known_of(records("cut", kind))


def known_of(lines: list[dict]) -> list[dict]:
    """Records without what a clock says."""
    timed = {"seconds", "tokens_per_second"}
    return [{name: value for name, value in line.items() if name not in timed} for line in lines]


@pytest.mark.parametrize(
    "more", [["--renew_reference", "1"], ["--renew_reference", "2", "--log_every", "2"]]
)
def test_a_reference_that_is_renewed_is_not_taken_for_the_policy(more):
    # Right after a renewal the log-ratios are 0 but for rounding, at the end of a run too.
    long = ["--steps", "32", "--learning-rate", "1e-4", "--evaluation.every", "32"]
    assert online("run", "online_dpo", *long, *more) == 0
    steps = records("run", "train")
    assert {r["reference/renewed"] for r in steps} <= {0.5, 1.0}
    assert records("run", "warning") == []
    begun = [r["logratios/chosen"] for r in steps if r["reference/renewed"] == 1]
    assert begun == pytest.approx([0] * len(begun), abs=1e-4)


@pytest.mark.parametrize("objective", ["sft", "reward"])
def test_a_run_over_rows_that_is_resumed_ends_bit_identically(objective: str):
    often = ["--objective", objective, "--steps", "4", "--checkpoint.every", "1", "--keep", "9"]
    assert judge("whole", *often) == 0
    assert judge("cut", *often) == 0
    require_resumed_alike()


def test_answers_are_cut_where_they_fill_max_length_and_the_prompts_are_counted(
    capsys: pytest.CaptureFixture[str],
):
    write_rows("prompts.jsonl", [{"prompt": f"question {'x' * i}"} for i in range(0, 24, 2)])
    told = ["--max_tokens", "30", "--steps", "3", "--fraction", "0.2"]
    assert online("run", "grpo", "--max_length", "66", *told) == 0
    said = capsys.readouterr().err
    rounds = sorted(Path("run/rollouts").glob("*.parquet"))
    rows = [row for file in rounds for row in pq.read_table(file).to_pylist()]
    sizes = {row["line"]: (len(row["prompt"]), len(row["response"])) for row in rows}
    assert max(map(sum, sizes.values())) == 66
    short = sum(prompt > 36 for prompt, _ in sizes.values())
    wanted = f"{short} of {len(sizes)} prompts leave less than rollout.max_tokens=30 of "
    assert 0 < short < len(sizes) and f"{wanted}data.max_length=66, " in said
    assert online("free", "grpo", *told) == 0
    assert "leave less" not in capsys.readouterr().err


def test_rows_of_a_prompt_and_a_completion_are_learned_from_by_sft_alone(
    capsys: pytest.CaptureFixture[str],
):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
    write_rows("pairs.jsonl", rows)
    assert train("run", "--objective", "sft") == 0
    assert train("other") == 2
    assert "objective sft learns from such rows" in capsys.readouterr().err
    write_rows("pairs.jsonl", [row | {"label": i % 2 == 0} for i, row in enumerate(rows)])
    for objective in ("sft", "dpo"):
        assert train("other", "--objective", objective) == 2
        said = capsys.readouterr().err
        assert 'pairs.jsonl:1 has a "label" beside the answer' in said


@pytest.mark.parametrize("objective", ["ppo", "online_dpo"])
def test_a_run_without_an_evaluation_is_watched_by_its_rounds(objective):
    words = (
        f"train --model model --data prompts.jsonl --objective {objective} --dtype float32 "
        "--reward count.py:score --prompts_per_round 20 --max_tokens 8 --steps 4 --passes 1 --out"
    ).split()
    assert main([*words, "clean", "--learning-rate", "1e-5"]) == 0
    # Four such steps teach pairs next to nothing, and that alone is said.
    assert {r["code"] for r in records("clean", "warning")} <= {"UW307"}
    step = records("clean", "train")[0]
    assert step["length_low"] <= step["length"] <= step["length_high"]
    assert step["repetition_low"] <= step["repetition"] and step["stopped"] <= step["stopped_high"]
    assert main([*words, "run", "--learning-rate", "1e-2", "--watch.kl", "0.01"]) == 0
    (found,) = records("run", "warning")
    assert found["code"] == "UW308" and "set" not in found
    assert 'href="#warning-uw308"' in Path("run/report.html").read_text()


def test_the_best_checkpoint_may_be_told_by_prompts_alone():
    write_rows("asked.jsonl", [{"prompt": f"another {i}"} for i in range(4)])
    words = "--fraction 0 --prompt_files asked.jsonl --checkpoint.best reward --keep 1"
    assert online("run", "grpo", *words.split(), "--evaluation.every", "1") == 0
    rewards = [r["reward"] for r in records("run", "eval")]
    kept = sorted(folder.name for folder in Path("run/checkpoints").iterdir())
    assert f"step-{rewards.index(max(rewards)):08d}" in kept


def test_the_sampler_says_the_log_probs_of_the_trainer():
    from upweight.models.logprobs import token_logps
    from upweight.training.agreement import held_against
    from upweight.training.rollout import Sizes, by_response, draw_answers

    lm = load("model", dtype="float32")
    prompt = Tree(tuple(range(40, 60)), (), (), (ResponseId(RowId("x", 1), 0),), ())
    trees, said = draw_answers(lm, [prompt, prompt], 1, Sizes(2, 3, 9, None, 1, 1, 0), [2])
    found = by_response(lambda forest: token_logps(lm, forest), trees, 64)
    compared = held_against(found, said, 1e-5)
    assert len(found) == 6 and len(compared) == 4 and all(beside.agrees for beside in compared)


@pytest.mark.parametrize("objective", ["reward", "dpo"])
def test_the_held_out_loss_is_the_loss_of_training(objective):
    marked = [
        {**row, "weight": 1.0 + 8 * (i % 2), "margin": i % 3, "probability": 0.5 + i % 5 / 8}
        for i, row in enumerate(PAIRS)
    ]
    write_rows("pairs.jsonl", marked[:12])
    write_rows("other.jsonl", marked[12:])
    smoothing, share, centering = 0.2, (0.7 if objective == "reward" else 0.0), 0.3
    options = {"margin": share, "centering": centering} if objective == "reward" else {}
    words = f"train --model model --data pairs.jsonl --objective {objective} --out run"
    words += f" --dtype float32 --learning-rate 1e-3 --label_smoothing {smoothing}"
    words += "".join(f" --loss.{key} {value}" for key, value in options.items())
    words += " --samples 0" if objective == "dpo" else ""
    assert main([*words.split(), "evaluation.sets={other: other.jsonl}"]) == 0
    asked = {"reference": "model"} if objective == "dpo" else {}
    found = uw.score(model="run/model", data="other.jsonl", dtype="float32", **asked)
    total = weights = 0.0
    for row, scored in zip(marked[12:], found, strict=True):
        z = scored["margin"] - share * row["margin"]
        # Wrong if one of two turned it around and the other did not.
        sure = row["probability"]
        e = smoothing * sure + (1 - smoothing) * (1 - sure)
        loss = -(1 - e) * F.logsigmoid(torch.tensor(z)).item()
        loss -= e * F.logsigmoid(torch.tensor(-z)).item()
        if objective == "reward":
            loss += centering * (scored["score_chosen"] + scored["score_rejected"]) ** 2
        total, weights = total + row["weight"] * loss, weights + row["weight"]
    first, *_, last = records("run", "eval")
    assert last["loss"] == pytest.approx(total / weights, abs=1e-5)
    assert "loss_change" not in first
    assert last["loss_change"] == pytest.approx(last["loss"] - first["loss"])
    assert last["loss_change_low"] <= last["loss_change"] <= last["loss_change_high"]


def test_a_resumed_run_knows_by_how_much_its_loss_has_changed_since_the_start():
    often = ["--objective", "sft", "--steps", "2", "--samples", "0"]
    often += ["--checkpoint.every", "1", "--evaluation.every", "1"]
    assert train("whole", *often) == 0
    assert train("cut", *often) == 0
    shutil.rmtree(sorted(Path("cut/checkpoints").iterdir())[-1])
    assert main(["train", "cut/run.yaml", "resume=true"]) == 0
    changes = [r.get("loss_change") for r in records("whole", "eval")]
    assert changes[0] is None and len(changes) == 3
    assert [r.get("loss_change") for r in records("cut", "eval")] == changes
    evals = records("whole", "eval")
    # By the token, as the loss is.
    assert changes[2] == pytest.approx(evals[2]["loss"] - evals[0]["loss"])
