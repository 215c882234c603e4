"""What rewards are asked before step 1 and in rounds, and what is said where they cannot tell."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from runs import LETTERS, furnish_rewarded, online, records, rows_of, train, write_rows
from tiny import save_tiny
from upweight.cli import main
from upweight.types import RowId

ROW = RowId("x", 1)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish_rewarded(tmp_path, monkeypatch)


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
