"""Every objective on the one engine, on a tiny model, through the commands that a user types."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import upweight as uw
from runs import PAIRS, furnish, rows_of, train, write_rows
from tiny import save_tiny
from upweight.cli import main
from upweight.config import load_run
from upweight.errors import DataError
from upweight.models.load import load
from upweight.models.scalar import load_reward_model, one_response_at_a_time, tree_scores
from upweight.recipes.online import values_of
from upweight.recipes.prepare import load_policy, prepare
from upweight.recipes.rewarding import make_scorer
from upweight.training.checkpoint import load as load_checkpoint
from upweight.types import ResponseId, RowId, Tree

ROW = RowId("x", 1)
LETTERS = "def score(prompt, response, row):\n    return sum(map(str.islower, response)) / 8\n"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tmp_path, monkeypatch)
    Path("count.py").write_text(LETTERS)
    write_rows("prompts.jsonl", [{"prompt": f"question {i}"} for i in range(12)])


def records(run: str, kind: str) -> list[dict]:
    return [r for r in rows_of(f"{run}/metrics.jsonl") if r["kind"] == kind]


def online(out: str, objective: str, *more: str) -> int:
    words = (
        f"train --model model --objective {objective} --out {out} --dtype "
        "float32 --learning-rate 3e-3 --reward count.py:score --prompts_per_round 4 --max_tokens 8 "
        "--fraction 0.2 --samples 2 --max_new_tokens 8 --steps 4 --beta 0.05"
    )
    data = [] if "--data" in more else ["--data", "prompts.jsonl"]
    return main([*words.split(), *data, *more])


def judge(out: str, *more: str) -> int:
    words = f"train --model model --data pairs.jsonl --objective reward --out {out} --dtype float32"
    words += " --learning-rate 1e-3 --fraction 0.2 --pairs_per_step 4"
    return main([*words.split(), *more])


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


def test_a_reward_is_asked_about_the_turn_that_is_answered():
    Path("count.py").write_text(
        "def score(prompt, response, row):\n"
        "    with open('asked', 'a') as asked:\n"
        "        print(row['messages'][-1]['content'], prompt, file=asked)\n"
        "    return 0.0\n"
    )
    turns = [("user", "one"), ("assistant", "two"), ("user", "three")]
    messages = [{"role": role, "content": text} for role, text in turns]
    write_rows("pairs.jsonl", [{"messages": [*messages, {"role": "assistant", "content": c}]}
                               for c in "abcd"])  # fmt: skip
    first, last = ({"role": r, "content": c} for r, c in (("user", "four"), ("assistant", "end")))
    write_rows("other.jsonl", [{"messages": [first, *messages[1:], last]}])
    words = "--model model --data pairs.jsonl --objective sft --turns all --dtype float32 --out run"
    words += " --true_reward count.py:score --steps 1 --max_new_tokens 4"
    assert main(["train", *words.split(), "evaluation.sets={other: other.jsonl}"]) == 0
    assert set(Path("asked").read_text().splitlines()) == {"end four", "end three"}
    assert records("run", "eval")[-1]["reward"] == 0.0


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


@pytest.mark.parametrize("lora", [(), ("--lora", "true", "--learning-rate", "3e-2")])
def test_a_reward_model_learns_to_rank_and_plain_transformers_reads_its_scores(lora):
    assert judge("run", "--epochs", "3", *lora) == 0
    evals = records("run", "eval")
    assert evals[-1]["rewards/accuracies"] == 1.0 > evals[0]["rewards/accuracies"] - 1e-9
    model = load_reward_model("run/model", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained("run/model")
    ids = [tuple(tokenizer(text)["input_ids"]) for text in ("question 3", "fine ", "bad thing")]
    where = tuple(ResponseId(RowId("x", 1), k) for k in range(2))
    tree = Tree(ids[0], (ids[1], ids[2]), (), where, (False, False))
    plain = AutoModelForSequenceClassification.from_pretrained("run/model").eval()
    assert plain.config.pad_token_id == tokenizer.pad_token_id is not None
    # fp32's 1e-5 is of what a score is a sum of, some 1 each, also where the sum itself is near 0.
    found = pytest.approx(one_response_at_a_time(plain, tree), rel=1e-5, abs=1e-5)
    assert tree_scores(model, [tree])[0] == found
    # In a padded batch too: the score is read at the last token that is not padding.
    rows = [[*ids[0], *ids[1]], [*ids[0], *ids[2]]]
    width = max(map(len, rows))
    padded = torch.tensor([r + [plain.config.pad_token_id] * (width - len(r)) for r in rows])
    with torch.no_grad():
        batch = plain(padded, attention_mask=(padded != plain.config.pad_token_id).long())
    assert batch.logits[:, 0].tolist() == pytest.approx(tree_scores(model, [tree])[0], abs=1e-4)


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


def test_a_policy_without_a_reward_is_told_what_to_give(capsys: pytest.CaptureFixture[str]):
    words = "train --model model --data prompts.jsonl --objective grpo --out run"
    assert main(words.split()) == 2
    assert "grpo needs rollout.reward, which scores the answers" in capsys.readouterr().err


def test_a_reward_that_rows_cannot_answer_is_found_before_step_1(
    capsys: pytest.CaptureFixture[str],
):
    for command in ("check", "train"):
        words = f"{command} --model model --data prompts.jsonl --objective grpo --out run --reward"
        for reward, why in (
            ("number", 'prompts.jsonl:1: the row has no "answer" to compare with (it has: prompt)'),
            ("bad.py:score", "raised KeyError: 'gold'"),
            ("none.py:score", "gave None for the response 'a'. A reward is one finite number."),
        ):
            Path("bad.py").write_text("def score(prompt, response, row):\n    return row['gold']\n")
            Path("none.py").write_text("def score(prompt, response, row):\n    pass\n")
            assert main([*words.split(), reward]) == 2
            said = capsys.readouterr().err
            assert "rollout.reward, asked about a few rows before step 1: " in said and why in said
            assert not Path("run").exists()


def test_check_says_from_where_to_where_the_rewards_of_rows_reach(
    capsys: pytest.CaptureFixture[str],
):
    rows = [
        {"prompt": f"what is {i}", "completion": f"{i} it is", "answer": i % 2} for i in range(9)
    ]
    write_rows("prompts.jsonl", rows)
    words = "check --model model --objective rloo --data"
    assert main([*words.split(), "prompts.jsonl", "--reward", "number"]) == 0
    said = capsys.readouterr().out
    assert "rollout.reward: number gives 0 to 1 to the answers of 8 rows\n" in said
    write_rows("alone.jsonl", [{"prompt": row["prompt"]} for row in rows[:3]])
    assert main([*words.split(), "alone.jsonl", "--reward", "count.py:score"]) == 0
    said = 'count.py:score gives 0.125 to the answers of 3 rows ("a" where a row has none)'
    assert said in capsys.readouterr().out
    # What is made up is asked about only where there is no answer to be had.
    Path("seen.py").write_text("def score(prompt, response, row):\n    return len(response)\n")
    known = {"prompt": "how", "completion": "known"}
    for beside, said in (
        (known, "5 to the answers of 2 rows (that of another row where a row has none)"),
        ({"prompt": "how", "answer": "it"}, '1 to 2 to the answers of 2 rows ("a", its column'),
    ):
        write_rows("some.jsonl", [{"prompt": "what"}, beside])
        assert main([*words.split(), "some.jsonl", "--reward", "seen.py:score"]) == 0
        assert said in capsys.readouterr().out
    # Nobody answers there.
    address = "http://127.0.0.1:9/score"
    assert main([*words.split(), "alone.jsonl", "--reward", address]) == 0
    said = f"rollout.reward: {address} is an address, and was not asked about any row"
    assert said in capsys.readouterr().out


def test_a_row_of_several_sets_is_asked_about_once_and_counted_once(
    capsys: pytest.CaptureFixture[str],
):
    Path("count.py").write_text(
        "def score(prompt, response, row):\n    with open('asked', 'a') as asked:\n"
        "        print(prompt, file=asked)\n    return 1.0\n"
    )
    write_rows("other.jsonl", [{"prompt": f"other {i}"} for i in range(3)])
    words = "check --model model --objective grpo --data prompts.jsonl --reward count.py:score"
    words += " --fraction 0 --samples 8"
    assert main([*words.split(), "evaluation.sets={one: other.jsonl, two: other.jsonl}"]) == 0
    assert "to the answers of 11 rows" in capsys.readouterr().out  # 8 of prompts.jsonl
    asked = Path("asked").read_text().splitlines()
    assert len(asked) == len(set(asked)) == 11


def test_a_reward_is_asked_about_a_turn_with_the_answer_of_that_turn(
    capsys: pytest.CaptureFixture[str],
):
    Path("same.py").write_text(
        "def score(prompt, response, row):\n"
        "    assert prompt.replace('ask', 'say') == response\n    return len(prompt)\n"
    )

    def talk(row: int) -> dict[str, object]:
        words = [f"{does} {turn} {row}" for turn in (1, 10) for does in ("ask", "say")]
        roles = ("user", "assistant") * 2
        pairs = zip(roles, words, strict=True)
        return {"messages": [{"role": role, "content": text} for role, text in pairs]}

    write_rows("pairs.jsonl", [talk(row) for row in range(6)])
    write_rows("other.jsonl", [talk(row) for row in range(6, 9)])
    words = "check --model model --data pairs.jsonl --objective sft --turns all --fraction 0"
    words += " --samples 8 --true_reward same.py:score"
    assert main([*words.split(), "evaluation.sets={other: other.jsonl}"]) == 0
    said = capsys.readouterr().out
    assert "same.py:score gives 7 to 8 to the answers of 3 rows" in said


def test_a_reward_that_is_the_same_for_all_answers_of_rows_is_a_warning(
    capsys: pytest.CaptureFixture[str],
):
    rows = [{"prompt": f"what is {i}", "completion": f"{i}", "answer": i} for i in range(8)]
    write_rows("right.jsonl", rows)
    write_rows("one.jsonl", [*rows[:7], {**rows[7], "answer": 1}])
    words = "check --model model --objective rloo --fraction 0 --reward"
    for reward, data, warned in (
        ("contains", "right.jsonl", True),
        ("contains", "one.jsonl", False),
        # "a" is what all of these are asked about.
        ("count.py:score", "prompts.jsonl", False),
    ):
        assert main([*words.split(), reward, "--data", data]) == 0
        said = " ".join(capsys.readouterr().out.split())
        told = "warning: rollout.reward: contains gives 1 to each of the 8 answers that rows have"
        assert (told in said) == warned and ("warning: rollout" in said) == warned


def test_a_reward_reads_any_column_of_a_parquet_file(capsys: pytest.CaptureFixture[str]):
    rows = [{"prompt": f"what is {i}", "answer": i} for i in range(6)]
    pq.write_table(pa.Table.from_pylist(rows), "prompts.parquet")
    assert online("run", "grpo", "--data", "prompts.parquet", "--reward", "contains") == 0
    assert "rollout.reward: contains gives 1 to the answers of" in capsys.readouterr().err


def test_a_parquet_column_that_no_reward_reads_may_hold_what_python_cannot(
    capsys: pytest.CaptureFixture[str],
):
    columns = {
        "prompt": [f"what is {i}" for i in range(6)],
        "answer": list(range(6)),
        "at": pa.array(range(1, 7), pa.timestamp("ns")),
        "tags": pa.array([[("a", 1), ("a", 2)]] * 6, pa.map_(pa.string(), pa.int64())),
    }
    pq.write_table(pa.table(columns), "prompts.parquet")
    often = ["--data", "prompts.parquet", "--checkpoint.every", "1", "--keep", "9"]
    assert online("contains", "grpo", *often, "--reward", "contains") == 0
    # No random word has a sentiment: the rows are read, and UW103 says so when the run is through.
    assert online("vader", "grpo", *often, "--reward", "vader") == 2
    assert "step 4: no answer so far earned more than" in capsys.readouterr().err
    shutil.rmtree("contains/checkpoints/step-00000004")
    assert main(["train", "contains/run.yaml", "resume=true"]) == 0
    capsys.readouterr()
    assert online("own", "grpo", "--data", "prompts.parquet") == 2
    said = capsys.readouterr().err
    assert "prompts.parquet has a value in the column 'at', among rows 1 to 6, that Python" in said
    assert "or remove it where no reward reads it." in said and not Path("own").exists()
    del columns["at"], columns["tags"]
    pq.write_table(pa.table(columns), "prompts.parquet")
    assert online("own", "grpo", "--data", "prompts.parquet") == 0


def test_what_judges_evaluations_is_asked_about_their_rows_first(
    capsys: pytest.CaptureFixture[str],
):
    for command in ("check", "train"):
        assert train("run", "--true_reward", "number", command=command) == 2
        said = capsys.readouterr().err
        assert "evaluation.true_reward, asked about a few rows before step 1: pairs.jsonl:" in said
    assert not Path("run").exists()


def test_a_reward_model_is_no_policy_and_no_reference(capsys: pytest.CaptureFixture[str]):
    assert judge("judge", "--steps", "1") == 0
    capsys.readouterr()
    rows = "--data pairs.jsonl"
    for words in (
        f"train --model judge/model {rows} --out run",
        f"train --model judge/model {rows} --objective sft --out run",
        f"train --model model --reference judge/model {rows} --out run",
        f"check --model judge/model {rows}",
        "sample --model judge/model --prompts prompts.jsonl --out answers.jsonl",
        f"score --model model --reference judge/model {rows} --out scores.jsonl",
    ):
        assert main(words.split()) == 2
        said = capsys.readouterr().err
        assert "judge/model is a reward model (its config.json names LlamaForSequence" in said
        assert "Give the model that it was trained from. A reward model goes to rollout" in said
    assert not Path("run").exists()
    assert main(["check", "--model", "judge/model"]) == 2
    said = capsys.readouterr().err
    assert "judge/model is a reward model: it gives no log-probs to compare" in said
    assert "upweight score --model judge/model --data FILE" in said


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


def test_a_reward_that_tells_nothing_apart_ends_online_dpo(capsys: pytest.CaptureFixture[str]):
    Path("count.py").write_text("def score(prompt, response, row):\n    return 1.0\n")
    assert online("run", "online_dpo") == 2
    assert "told no two answers to a prompt apart in 8 rounds" in capsys.readouterr().err
    # What they were and earned can be read.
    for number in range(1, 9):
        rows = pq.read_table(f"run/rollouts/round-{number:06d}.parquet").to_pylist()
        assert {row["score"] for row in rows} == {1.0} and len({r["line"] for r in rows}) == 4
        assert all(row["prompt"] and row["response"] and row["text"] is not None for row in rows)
        asked = rows_of("prompts.jsonl")
        assert all(asked[row["line"] - 1]["prompt"] in row["prompt_text"] for row in rows)


@pytest.mark.parametrize(
    ("objective", "value", "more"),
    [
        ("grpo", 0.0, ["--kl_estimator", "k3"]),
        ("rloo", 1.0, []),
        ("ppo", 0.0, []),
        # What has an advantage here has it of values that foresee nothing, or of the KL term.
        ("ppo", -1.0, []),
        ("ppo", 0.3, ["--log_every", "3", "--passes", "1"]),
        ("grpo", 1.0, ["--reference", "other"]),
        ("rloo", 0.3, ["--reference", "other"]),
    ],
)
def test_a_reward_that_never_tells_answers_apart_is_refused(objective, value, more, capsys):
    save_tiny("other", seed=1)
    Path("count.py").write_text(f"def score(prompt, response, row):\n    return {value}\n")
    assert online("run", objective, "--checkpoint.every", "1", *more) == 2
    said = capsys.readouterr().err
    assert "error[UW103]: step 4: no answer so far earned more than" in said
    assert not Path("run/model").exists()
    # Gone on with from its third step, it comes to the same end.
    assert main(["train", "run/run.yaml", "resume=true"]) == 2
    assert "error[UW103]: step 4" in capsys.readouterr().err


def test_a_run_that_has_learned_may_end_with_a_round_that_teaches_nothing():
    # Rewards of 8 rows before step 1 and of the first two rounds, of 4 prompts with 8 answers each.
    Path("count.py").write_text(
        "def score(prompt, response, row):\n    with open('asked', 'a') as asked:\n"
        "        asked.write('.')\n        early = asked.tell() <= 8 + 64\n"
        "    return early * sum(map(str.islower, response))\n"
    )
    Path("judge.py").write_text(LETTERS)
    judged = ["--true_reward", "judge.py:score", "--checkpoint.every", "1", "--keep", "9"]
    assert online("run", "grpo", *judged, "--kl_estimator", "k3") == 0
    assert [r["advantages/nonzero"] > 0 for r in records("run", "train")] == [1, 1, 0, 0]
    shutil.rmtree("run/checkpoints/step-00000004")
    assert main(["train", "run/run.yaml", "resume=true"]) == 0
    assert records("run", "train")[-1]["advantages/nonzero"] == 0


def test_a_reward_that_failed_in_the_first_round_is_mended_and_tried_again(capsys):
    # What it is asked about the rows themselves says nothing of it.
    Path("count.py").write_text(
        "def score(prompt, response, row):\n    return 0.0 if response == 'a' else row['wrong']\n"
    )
    assert online("run", "grpo") == 2
    assert "KeyError" in capsys.readouterr().err and Path("run/run.yaml").exists()
    Path("count.py").write_text(LETTERS)
    assert online("run", "grpo") == 0
    assert "stopped before its first checkpoint. It is begun anew; removed: account.json" in (
        capsys.readouterr().err
    )
    assert [r["step"] for r in records("run", "train")] == [1, 2, 3, 4]
    assert online("run", "grpo") == 2
    assert "holds a run already. Set resume: true" in capsys.readouterr().err


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


def test_a_run_is_resumed_with_the_rewards_that_it_began_with_only(capsys):
    Path("both.py").write_text(LETTERS)
    assert online("run", "grpo", "--true_reward", "both.py:score", "--checkpoint.every", "1") == 0
    resume = ["train", "run/run.yaml", "resume=true"]

    def refused() -> str:
        capsys.readouterr()
        assert main(resume) == 2
        return capsys.readouterr().err

    changed = LETTERS.replace("islower", "isupper")
    for key, file in (("rollout.reward", "count.py"), ("evaluation.true_reward", "both.py")):
        Path(file).write_text(changed)
        assert f"resume: {key} is {file}:score, whose content is not what the run" in refused()
        Path(file).write_text(LETTERS)
    rows = rows_of("prompts.jsonl")
    write_rows("prompts.jsonl", [{**row, "answer": 1} for row in rows])
    assert "resume: the rows that the rewards of the run in run are given differ" in refused()
    write_rows("prompts.jsonl", rows)
    assert main(resume) == 0


def test_a_run_is_resumed_with_the_reward_model_that_it_began_with_only(capsys):
    assert judge("judge", "--steps", "1") == 0
    assert online("run", "grpo", "--reward", "judge/model", "--steps", "2") == 0
    # Its rows are not read by a model: a column more does not matter.
    write_rows("prompts.jsonl", [{**row, "answer": 1} for row in rows_of("prompts.jsonl")])
    assert main(["train", "run/run.yaml", "resume=true"]) == 0
    assert judge("other", "--steps", "2") == 0
    shutil.rmtree("judge")
    Path("other").rename("judge")
    assert main(["train", "run/run.yaml", "resume=true"]) == 2
    assert "resume: rollout.reward is judge/model, whose content is" in capsys.readouterr().err


def test_the_best_checkpoint_may_be_told_by_prompts_alone():
    write_rows("asked.jsonl", [{"prompt": f"another {i}"} for i in range(4)])
    words = "--fraction 0 --prompt_files asked.jsonl --checkpoint.best reward --keep 1"
    assert online("run", "grpo", *words.split(), "--evaluation.every", "1") == 0
    rewards = [r["reward"] for r in records("run", "eval")]
    kept = sorted(folder.name for folder in Path("run/checkpoints").iterdir())
    assert f"step-{rewards.index(max(rewards)):08d}" in kept


def test_a_value_model_has_the_reward_models_trunk_and_a_head_of_zeros():
    assert judge("judge") == 0
    assert online("run", "ppo", "--reward", "judge/model") == 0
    run = load_run("run/run.yaml").run
    lm = load("model", dtype="float32")
    values = values_of(run, lm, [2])
    assert values is not None and values.critic is not None
    found, theirs = values.critic.model.state_dict(), load_file("judge/model/model.safetensors")
    head = {name for name in theirs if name.startswith("score.")}
    assert found.keys() == theirs.keys() and head == {"score.weight"}
    assert not found["score.weight"].any()
    assert all(torch.equal(found[name], theirs[name]) for name in theirs.keys() - head)
    # The policy's own would be another start: the reward model has learned since.
    policy = lm.causal.state_dict()
    assert not any(torch.equal(found[name], policy[name]) for name in theirs.keys() - head)


def test_a_reward_model_says_the_same_of_a_cut_answer_wherever_it_is_asked():
    rows = rows_of("pairs.jsonl")
    for i, row in enumerate(rows):
        best = {"text": row.pop("chosen"), "score": 1, "stopped": i % 2 == 0}
        row["responses"] = [best, {"text": row.pop("rejected"), "score": 0}]
    write_rows("pairs.jsonl", rows)
    assert judge("judge", "--steps", "1") == 0
    found = uw.score(model="judge/model", data="pairs.jsonl", dtype="float32")
    run = load_run(None, values={"model": "model", "data": {"path": "pairs.jsonl"}}).run
    lm = load("model", dtype="float32")
    prepared = prepare(run, lm)
    trees = prepared.trees["train"]
    assert {tree.stopped for tree in trees} == {(True, True), (False, True)}
    scores = make_scorer("judge/model", run, lm, prepared.renderer.end)(trees)
    wanted = {str(t.ids[0].row): s[0] for t, s in zip(trees, scores, strict=True)}
    assert all(r["score_chosen"] == pytest.approx(wanted[r["row"]], abs=1e-4) for r in found)


def test_a_reward_model_of_fewer_positions_than_an_answer_says_so():
    assert judge("judge") == 0
    config = json.loads(Path("judge/model/config.json").read_text())
    config["max_position_embeddings"] = 16
    Path("judge/model/config.json").write_text(json.dumps(config))
    run = load_run(None, values={"model": "model", "data": {"path": "pairs.jsonl"}}).run
    score = make_scorer("judge/model", run, load("model", dtype="float32"), 2)
    fits = Tree((5,) * 12, ((8, 9, 7, 6),), (), (ResponseId(ROW, 0),), (False,))
    assert len(score([fits])[0]) == 1
    for stopped in (True, False):
        long = Tree((5,) * 12, ((8,) * 5,), (), (ResponseId(ROW, 0),), (stopped,))
        with pytest.raises(DataError, match="made for 16 tokens, and a prompt with its answer has"):
            score([long])


def test_a_reward_model_reads_an_answer_that_was_cut_with_a_stop_token_behind_it():
    assert judge("judge") == 0
    run, lm = (
        load_run(
            None, values={"model": "model", "dtype": "float32", "data": {"path": "pairs.jsonl"}}
        ).run,
        load("model", dtype="float32"),
    )
    plain = AutoModelForSequenceClassification.from_pretrained("judge/model").eval()
    score, ids = make_scorer("judge/model", run, lm, 2), tuple(ResponseId(ROW, k) for k in range(3))
    long = (7,) * (plain.config.max_position_embeddings - 3)
    said = Tree((5, 6, 7), ((8, 9), (8, 2), long), (), ids, (False, True, False))
    whole = Tree((5, 6, 7), ((8, 9, 2), (8, 2), (*long[:-1], 2)), (), ids, (True,) * 3)
    assert score([said])[0] == pytest.approx(one_response_at_a_time(plain, whole), abs=1e-5)
    assert score([said])[0] != pytest.approx(one_response_at_a_time(plain, said), abs=1e-3)


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


def test_score_gives_a_reward_models_scores_of_each_preference(
    capsys: pytest.CaptureFixture[str],
):
    assert judge("run") == 0
    group = [{"text": "fine", "score": 3}, {"text": "so so", "score": 1}, {"text": "bad thing"}]
    write_rows(
        "scored.jsonl",
        [
            {"prompt": "one", "responses": ["fine fine", "bad"], "preferences": [[0, 1]]},
            {"prompt": "two", "responses": group, "preferences": [[0, 2], [1, 2]]},
            {"prompt": "three", "responses": group},
        ],
    )
    words = "score --model run/model --data scored.jsonl --dtype float32 --out"
    assert main([*words.split(), "scores.jsonl"]) == 0
    rows = rows_of("scores.jsonl")
    right = sum(row["margin"] > 0 for row in rows)
    said = capsys.readouterr().err.splitlines()[-1]
    assert "by the reward model's score: " in said
    assert said.endswith(f", {right} of 4 preferences of 3 prompts")
    assert [(r["row"], r["chosen"], r["rejected"]) for r in rows] == [
        ("scored.jsonl:1", 0, 1),
        ("scored.jsonl:2", 0, 2),
        ("scored.jsonl:2", 1, 2),
        ("scored.jsonl:3", 0, 1),
    ]
    tokenizer = AutoTokenizer.from_pretrained("run/model")
    plain = AutoModelForSequenceClassification.from_pretrained("run/model").eval()

    def score(prompt: str, answer: str) -> tuple[float, int]:
        asked = [{"role": "user", "content": prompt}]
        start = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        ids, own = (tokenizer(text)["input_ids"] for text in (start, f"{answer}<|im_end|>"))
        with torch.no_grad():
            return plain(torch.tensor([[*ids, *own]])).logits.item(), len(own)

    for row, prompt, chosen, rejected in zip(
        rows,
        ["one", "two", "two", "three"],
        ["fine fine", "fine", "so so", "fine"],
        ["bad", "bad thing", "bad thing", "so so"],
        strict=True,
    ):
        (c, tokens_chosen), (r, tokens_rejected) = score(prompt, chosen), score(prompt, rejected)
        assert row["score_chosen"] == pytest.approx(c, abs=1e-5)
        assert row["score_rejected"] == pytest.approx(r, abs=1e-5)
        assert row["margin"] == row["score_chosen"] - row["score_rejected"]
        assert (row["tokens_chosen"], row["tokens_rejected"]) == (tokens_chosen, tokens_rejected)
    assert uw.score(model="run/model", data="scored.jsonl", dtype="float32") == rows
    assert main([*words.split(), "no.jsonl", "--reference", "model"]) == 2
    said = capsys.readouterr().err
    assert "UW109" in said and "reference is model, and run/model is a reward model" in said
    assert not Path("no.jsonl").exists()


def test_a_reward_model_is_asked_for_the_rows_margins(capsys: pytest.CaptureFixture[str]):
    pairs = [
        {**row, "margin": 4.0 if i % 2 else 0.0} for i, row in enumerate(rows_of("pairs.jsonl"))
    ]
    write_rows("margins.jsonl", pairs)
    Path("margins.jsonl").rename("pairs.jsonl")
    assert judge("run", "--steps", "2", "--loss.margin", "0.5") == 0
    assert judge("none", "--steps", "2") == 0
    # Step 1 has the same scores in both: what is added is what -log sigmoid(z - m) adds.
    asked, plain = (records(run, "train")[0] for run in ("run", "none"))
    assert asked["rewards/margins"] == plain["rewards/margins"]
    assert 0.1 < asked["loss"] - plain["loss"] < 2.0
    unused = json.loads(Path("none/account.json").read_text())["sets"]["train"]["unused_columns"]
    assert unused == {"margin": 24}  # of the file, before it is split
    # A margin that a run does not read may be anything.
    write_rows("words.jsonl", [{**row, "margin": "large"} for row in pairs])
    assert train("words", "--data", "words.jsonl", "--steps", "1") == 0
    capsys.readouterr()
    write_rows("pairs.jsonl", PAIRS)
    assert judge("no", "--loss.margin", "0.5") == 2
    assert "loss.margin is 0.5, and no row has a margin, or scores" in capsys.readouterr().err


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
