"""Methods from one start, judged by one reward, on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from runs import furnish, write_rows
from upweight.cli import main

SHARED = """
title: Small letters
model: model
data: pairs.jsonl
compute.dtype: float32
learning_rate: 1e-3
steps: 2
evaluation:
  true_reward: letters.py:score
  prompt_files: prompts.jsonl
  samples: 6
  max_new_tokens: 6
methods:
"""
JUDGE = "  judge: {objective: reward, note: ranks}\n"
DPO = "  dpo: {objective: dpo, pairs_per_step: 4, evaluation.every: 1}\n"
PPO = "  ppo: {objective: ppo, reward: 'method:judge', prompts_per_round: 4, max_tokens: 6}\n"
BEST = "  best of 3: {objective: best_of_n, reward: 'method:judge', num: 3}\n"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tmp_path, monkeypatch)
    Path("letters.py").write_text(
        "def score(prompt, response, row):\n    return sum(map(str.islower, response)) / 8\n"
    )
    write_rows("prompts.jsonl", [{"prompt": f"another question {i}"} for i in range(6)])


def compared(methods: str) -> dict:
    Path("compare.yaml").write_text(SHARED + methods)
    assert main(["compare", "compare.yaml", "--out", "out"]) == 0
    return json.loads(Path("out/comparison.json").read_text())


def test_each_method_is_judged_on_the_same_prompts_from_the_same_start():
    found = compared(DPO + JUDGE + PPO + BEST)
    methods = {method["name"]: method for method in found["methods"]}
    assert [m["failed"] for m in methods.values()] == [None] * 4
    assert [p["step"] for p in methods["dpo"]["points"]] == [1, 2]
    assert [p["step"] for p in methods["ppo"]["points"]] == [1, 2]
    assert methods["judge"]["points"] == []
    (best,) = methods["best of 3"]["points"]
    assert best["kl"] == pytest.approx(math.log(3) - 2 / 3)
    assert found["start"]["low"] <= found["start"]["reward"] <= found["start"]["high"]
    assert all(methods[name]["tokens"] > 0 for name in ("dpo", "ppo", "best of 3"))
    page = Path("out/comparison.html").read_text()
    assert "Small letters" in page and "best of 3" in page


def test_of_a_few_prompts_no_interval_is_known_and_nothing_is_claimed(
    capsys: pytest.CaptureFixture[str],
):
    few = SHARED.replace("samples: 6", "samples: 3")
    Path("compare.yaml").write_text(few + DPO + JUDGE + PPO + BEST)
    assert main(["compare", "compare.yaml", "--out", "out"]) == 0

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    found = json.loads(Path("out/comparison.json").read_text(), parse_constant=refuse)
    points = [p for method in found["methods"] for p in method["points"]]
    assert points and all(p["reward_low"] is None is p["reward_high"] for p in points)
    assert found["start"]["low"] is None and found["claim"]["holds"] is None
    assert "nan" not in Path("out/comparison.html").read_text().lower().split()
    assert "nan" not in capsys.readouterr().err


def test_the_terminal_ends_in_a_verdict_and_one_line_for_each_pair(
    capsys: pytest.CaptureFixture[str],
):
    closer = DPO.replace("dpo: {", "closer: {beta: 0.5, ")
    claim = compared(DPO + closer + JUDGE + PPO)["claim"]
    *_, verdict, sure, first, second, took, page = capsys.readouterr().err.splitlines()
    assert verdict == claim["said"] and verdict.endswith(".")
    assert sure.startswith(f"  The frontiers were compared at {claim['places']} places; ")
    assert first.startswith("  dpo against ppo: ") and second.startswith("  closer against ppo: ")
    assert took.startswith("4 methods in ") and took.endswith(" s")
    assert page.startswith("comparison: ")


def test_a_method_that_has_finished_is_not_run_again():
    before = compared(DPO)
    written = Path("out/dpo/metrics.jsonl").stat().st_mtime_ns
    assert compared(DPO)["methods"] == before["methods"]
    assert Path("out/dpo/metrics.jsonl").stat().st_mtime_ns == written


def test_what_a_method_cost_holds_its_rounds_and_the_reward_model_that_it_uses():
    found = compared(DPO + JUDGE + PPO + BEST)
    methods = {m["name"]: m for m in found["methods"]}
    charged = sum(m["seconds"] for m in methods.values())
    assert found["seconds"] == pytest.approx(charged - 2 * methods["judge"]["seconds"])

    def trained(folder: str) -> int:
        lines = Path("out", folder, "metrics.jsonl").read_text().splitlines()
        return [r for r in map(json.loads, lines) if r["kind"] == "train"][-1]["num_tokens"]

    judge = methods["judge"]["tokens"]
    assert judge == trained("judge")
    # 4 prompts and their answers: drawn, and read by policy, reference, values and reward model.
    (rounds,) = Path("out/ppo/rollouts").glob("round-*.parquet")
    rows = pq.read_table(rounds).to_pylist()
    size = sum(len(row["prompt"]) + len(row["response"]) for row in rows)
    # What a step trains on is read by the policy and by its value model.
    assert methods["ppo"]["tokens"] == judge + 2 * trained("ppo") + 5 * size
    assert methods["dpo"]["tokens"] > trained("dpo")
    assert methods["best of 3"]["tokens"] > judge


def test_what_a_method_was_given_is_counted():
    sft = "  sft: {objective: sft, steps: 8, pairs_per_step: 5}\n"
    found = compared(DPO + JUDGE + PPO + BEST + sft)
    given = {m["name"]: m["taught"] for m in found["methods"]}
    # 24 rows of two responses each, of which one is preferred.
    fields = ("kind", "there", "seen", "steps", "answers", "by")
    assert {name: tuple(each[f] for f in fields) for name, each in given.items()} == {
        "dpo": ("preferences", 24, 2 * 4, 2, 0, "the rows"),
        "judge": ("preferences", 24, 2 * 24, 2, 0, "the rows"),
        "ppo": ("prompts", 24, 4, 2, 4, "method:judge"),
        "best of 3": ("prompts", 6, 6, 0, 18, "method:judge"),
        "sft": ("responses", 24, 24 + 24 * 3 // 5, 8, 0, "the rows"),
    }


def test_a_finished_method_is_not_taken_for_one_with_other_settings(
    capsys: pytest.CaptureFixture[str],
):
    compared(DPO)
    Path("compare.yaml").write_text(SHARED + DPO.replace("dpo,", "dpo, beta: 0.7,"))
    assert main(["compare", "compare.yaml", "--out", "out"]) == 2
    said = capsys.readouterr().err
    assert "the run in out/dpo is finished, with other settings (loss.beta is 0.7 here" in said


def test_a_method_that_fails_is_named_and_the_others_go_on():
    Path("broken.py").write_text("def score(prompt, response, row):\n    return row['nothing']\n")
    lost = "  lost: {objective: grpo, reward: broken.py:score}\n"
    Path("compare.yaml").write_text(SHARED + lost + DPO)
    assert main(["compare", "compare.yaml", "--out", "out"]) == 2
    first, dpo = json.loads(Path("out/comparison.json").read_text())["methods"]
    assert "broken.py" in first["failed"] and dpo["failed"] is None
    assert dpo["note"] == "batch.pairs_per_step: 4, evaluation.every: 1"
    page = Path("out/comparison.html").read_text()
    assert "broken.py" in page and "batch.pairs_per_step: 4" in page


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (SHARED + PPO, "no reward model before it is called so"),
        ("model: model\n", "has no methods"),
        ("methods: [", "compare.yaml"),
        (SHARED + DPO.replace("4,", "4, discount: 0.5,"), "policy.discount is 0.5"),
        (SHARED.replace("samples: 6", "samples: 0") + DPO, "evaluation.samples of at least 1"),
        (SHARED.replace("  prompt_files: prompts.jsonl\n", "") + DPO, "evaluation.prompt_files"),
        (SHARED.replace("letters.py", "lettres.py") + DPO, "method dpo: evaluation.true_reward"),
        (SHARED + "  a: {objective: grpo}\n", "method a: objective grpo needs rollout.reward"),
        (SHARED + DPO + "  b: {samples: 2}\n", "evaluation.samples differs between methods"),
        (
            "model: model\ndata: pairs.jsonl\nmethods:\n" + JUDGE,
            "needs a method that answers prompts",
        ),
    ],
)
def test_a_mistake_in_the_file_is_told(text, said, capsys: pytest.CaptureFixture[str]):
    Path("compare.yaml").write_text(text)
    assert main(["compare", "compare.yaml", "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_a_file_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str]):
    assert main(["compare", "nowhere.yaml", "--out", "out"]) == 2
    assert "nowhere.yaml cannot be read" in capsys.readouterr().err
