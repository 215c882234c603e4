"""Methods from one start, judged by one reward, on a tiny model."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from runs import furnish, rows_of, write_rows
from test_recipes import after_step
from tiny import save_tiny
from upweight.cli import main
from upweight.errors import ConfigError
from upweight.recipes.alike import JUDGE as TRUE_REWARD
from upweight.recipes.alike import require_same_start
from upweight.recipes.resume import Beginning

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
    of_each = [found["start"], *(p for m in methods.values() for p in m["points"])]
    assert [each["num_prompts"] for each in of_each] == [6] * 6 and found["claim"]["places"]
    assert found["claim"]["num_prompts"] == 6
    assert all(methods[name]["tokens"] > 0 for name in ("dpo", "ppo", "best of 3"))
    page = Path("out/comparison.html").read_text()
    assert "Small letters" in page and "best of 3" in page


def test_no_method_begins_after_one_that_was_asked_to_stop_in_its_last_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    Path("compare.yaml").write_text(SHARED + DPO + JUDGE)
    with monkeypatch.context() as patched:
        after_step(2, lambda: signal.raise_signal(signal.SIGINT), patched)
        assert main(["compare", "compare.yaml", "--out", "out"]) == 130
    assert "stopped; the same command goes on here" in capsys.readouterr().err
    assert Path("out/dpo/model").is_dir() and not Path("out/judge").exists()


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


def test_the_terminal_has_a_line_for_each_method_also_where_nothing_is_claimed(
    capsys: pytest.CaptureFixture[str],
):
    found = compared(DPO + JUDGE + BEST)
    said = capsys.readouterr().err.splitlines()
    *table, empty, verdict, _, _ = said[said.index(next(x for x in said if "KL, nats" in x)) :]
    assert (empty, verdict) == ("", "DPO and PPO are not compared: PPO was not run.")
    cells = [re.split(r"\s{2,}", line.strip()) for line in table]
    assert cells[0] == ["method", "after", "letters.py:score", "KL, nats", "tokens", "training"]
    start, *methods = cells[2:]
    assert start == ["start", reward(found["start"], ""), "0"]
    dpo, judge, best = found["methods"]
    last = dpo["points"][-1]
    assert methods[0][:4] == ["dpo", "step 2", reward(last), f"{last['kl']:.2f}"]
    assert methods[0][4] == f"{dpo['tokens']:,}" and methods[0][5].endswith(" s")
    assert methods[1][:3] == ["judge", "–", "–"]
    assert methods[2][:4] == ["best of 3", "n = 3", reward(best["points"][0]), "≤ 0.43"]
    assert f"{judge['tokens']:,}" == methods[1][3]


def reward(point: dict, of: str = "reward_") -> str:
    return f"{point['reward']:.3f} [{point[f'{of}low']:.3f}, {point[f'{of}high']:.3f}]"


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
        "sft": ("responses", 24, 24 + 3 * 5, 8, 0, "the rows"),
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


def test_a_method_that_fails_at_the_evaluation_before_its_first_step_is_named_like_any_other():
    # Six answers are asked about before anything is computed; the seventh is the first that the
    # first method gives at step 0.
    Path("letters.py").write_text(
        "from pathlib import Path\nasked = Path('asked.txt')\n"
        "def score(prompt, response, row):\n"
        "    num = int(asked.read_text()) if asked.exists() else 0\n"
        "    asked.write_text(str(num + 1))\n"
        "    return 1.0 if num != 6 else row['nothing']\n"
    )
    Path("compare.yaml").write_text(SHARED + DPO + DPO.replace("dpo:", "again:"))
    assert main(["compare", "compare.yaml", "--out", "out"]) == 2
    assert Path("out/dpo/environment.json").exists()
    first, second = json.loads(Path("out/comparison.json").read_text())["methods"]
    assert "nothing" in first["failed"] and first["points"] == []
    assert second["failed"] is None and [p["step"] for p in second["points"]] == [1, 2]


def again(capsys: pytest.CaptureFixture[str]) -> str:
    """What is said where the same comparison is refused."""
    capsys.readouterr()
    assert main(["compare", "compare.yaml", "--out", "out"]) == 2
    return capsys.readouterr().err


def test_a_finished_method_is_not_read_beside_what_is_made_of_something_else(
    capsys: pytest.CaptureFixture[str],
):
    compared(DPO + JUDGE + PPO)
    files = ("letters.py", "prompts.jsonl", "pairs.jsonl", "model/model.safetensors")
    kept = {file: Path(file).read_bytes() for file in files}
    Path("letters.py").write_text("def score(prompt, response, row):\n    return len(response)\n")
    said = again(capsys)
    assert "method dpo: the run in out/dpo is finished, and what it was made of has changed" in said
    assert "since: the content of evaluation.true_reward, letters.py:score. What it mad" in said
    assert "Put it back as it was, remove out/dpo to have it trained again, or choose anoth" in said
    Path("letters.py").write_bytes(kept["letters.py"])
    write_rows("prompts.jsonl", [{"prompt": f"another question {i}!"} for i in range(6)])
    assert "since: the rows of the set prompts in prompts.jsonl; a column that" in again(capsys)
    Path("prompts.jsonl").write_bytes(kept["prompts.jsonl"])
    # A column that no token comes from: the function of the user may read it.
    write_rows("prompts.jsonl", [r | {"key": 1} for r in rows_of("prompts.jsonl")])
    assert "since: a column that its rewards may read, in pairs.jsonl, prompts." in again(capsys)
    Path("prompts.jsonl").write_bytes(kept["prompts.jsonl"])
    save_tiny("model", seed=1)
    assert "since: model model (" in again(capsys)
    Path("model/model.safetensors").write_bytes(kept["model/model.safetensors"])
    # A reward model that was trained again since PPO learned from it, or is to be.
    weights = Path("out/judge/model/model.safetensors")
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    said = again(capsys)
    assert "method ppo: the run in out/ppo is finished, and" in said
    assert "since: the content of rollout.reward, out/judge/model." in said
    weights.write_bytes(before)
    Path("out/judge").rename("judge")
    assert "method ppo: the run in out/ppo is finished, and its reward is the model" in again(
        capsys
    )
    Path("judge").rename("out/judge")
    write_rows("pairs.jsonl", rows_of("pairs.jsonl")[1:])
    assert "since: the rows of the set train in pairs.jsonl" in again(capsys)
    Path("pairs.jsonl").write_bytes(kept["pairs.jsonl"])
    assert main(["compare", "compare.yaml", "--out", "out"]) == 0


def test_the_best_of_n_that_were_found_are_read_and_not_drawn_again():
    first = compared(DPO + JUDGE + BEST)
    kept = Path("out/best-of-3/chosen.json").stat().st_mtime_ns
    # Its seconds are those of the first time: nothing was drawn.
    assert compared(DPO + JUDGE + BEST)["methods"] == first["methods"]
    assert Path("out/best-of-3/chosen.json").stat().st_mtime_ns == kept
    *_, best = compared(DPO + JUDGE + BEST.replace("num: 3", "num: 3, note: chosen"))["methods"]
    assert best == {**first["methods"][-1], "note": f"chosen; {first['methods'][-1]['note']}"}


def test_bounds_that_were_not_known_of_the_best_of_n_are_not_known_when_they_are_read():
    few = SHARED.replace("samples: 6", "samples: 3") + DPO + JUDGE + BEST
    Path("compare.yaml").write_text(few)
    for _ in range(2):
        assert main(["compare", "compare.yaml", "--out", "out"]) == 0
        *_, best = json.loads(Path("out/comparison.json").read_text())["methods"]
        assert best["points"][0]["reward_low"] is None


def test_the_best_of_n_are_not_read_beside_what_they_were_not_found_from(
    capsys: pytest.CaptureFixture[str],
):
    compared(DPO + JUDGE + BEST)
    out = "method best of 3: the run in out/best-of-3 is finished, "
    Path("compare.yaml").write_text(SHARED + DPO + JUDGE + BEST.replace("num: 3", "num: 4"))
    assert f"{out}with other settings (num is 4 here and was 3). Put them back, remo" in again(
        capsys
    )
    Path("compare.yaml").write_text(SHARED + DPO + JUDGE + BEST)
    shutil.rmtree("out/dpo")
    write_rows("prompts.jsonl", [{"prompt": f"another question {i}!"} for i in range(6)])
    said = again(capsys)
    assert f"{out}and what it was made of has changed since: the rows of the set prompts" in said
    assert "remove out/best-of-3 to have it drawn again, or choose another out" in said
    write_rows("prompts.jsonl", [{"prompt": f"another question {i}"} for i in range(6)])
    judge = Path("letters.py").read_text()
    Path("letters.py").write_text(judge + "# by another hand\n")
    assert "since: the content of evaluation.true_reward, letters.py:score" in again(capsys)
    Path("letters.py").write_text(judge)
    Path("out/judge").rename("judge")
    assert f"{out}and its reward is the model of method judge, which is to be" in again(capsys)
    Path("judge").rename("out/judge")
    assert main(["compare", "compare.yaml", "--out", "out"]) == 0


def test_the_best_of_n_are_not_written_into_another_runs_folder():
    compared(DPO + DPO.replace("dpo:", "best:"))
    trained = DPO.replace("dpo:", "again:")
    Path("compare.yaml").write_text(
        SHARED + trained + "  best: {objective: best_of_n, reward: vader}\n"
    )
    assert main(["compare", "compare.yaml", "--out", "out"]) == 2
    _, best = json.loads(Path("out/comparison.json").read_text())["methods"]
    assert "out/best holds a run already" in best["failed"]


def test_a_reward_model_that_was_trained_from_another_start_is_not_taken_as_it_is(
    capsys: pytest.CaptureFixture[str],
):
    compared(JUDGE.replace("ranks", "ranks, lora: true") + DPO)
    assert main(["compare", "compare.yaml", "--out", "out"]) == 0
    # What a run began with stands in a checkpoint too.
    record = Path("out/judge/environment.json")
    said = json.loads(record.read_text())
    del said["data_digests"]
    record.write_text(json.dumps(said))
    assert main(["compare", "compare.yaml", "--out", "out"]) == 0
    save_tiny("model", seed=1)
    assert "method judge: the run in out/judge is finished, and what it was" in again(capsys)
    Path("out/judge/checkpoints").rename("gone")
    assert "method judge: the run in out/judge is finished, and nothing says" in again(capsys)


def test_a_method_that_was_judged_otherwise_than_the_first_has_failed():
    # A judge that is edited whenever it is asked: what it says while best of 3 is measured is not
    # what it said of DPO.
    Path("letters.py").write_text(
        "from pathlib import Path\nitself = Path('letters.py')\n"
        "def score(prompt, response, row):\n"
        "    itself.write_text(itself.read_text() + '# and on\\n')\n    return 1.0\n"
    )
    Path("compare.yaml").write_text(
        SHARED + DPO + "  best: {objective: best_of_n, reward: vader}\n"
    )
    assert main(["compare", "compare.yaml", "--out", "out"]) == 2
    dpo, best = json.loads(Path("out/comparison.json").read_text())["methods"]
    assert dpo["failed"] is None and dpo["points"]
    assert best["points"] == [] and best["tokens"] > 0
    assert (
        "does not compare with dpo, which was measured before it: not the same " in best["failed"]
    )
    assert "are what judged it (" in best["failed"]


def test_of_two_starts_what_differs_is_said():
    its = Beginning("a" * 64, "a" * 64, {"prompts": "p", "train": "t"}, {TRUE_REWARD: "j"})
    alike = replace(its, data_digests={"prompts": "p", "train": "u"}, reward_digests=
                    {TRUE_REWARD: "j", "rollout.reward": "r"})  # fmt: skip
    require_same_start("dpo", its, alike)
    for other, said in (
        (
            replace(its, model_fingerprint="b" * 64),
            "the model that it started from (bbbbbbbbbbbb, ",
        ),
        (
            replace(its, reference_fingerprint="b"),
            "what its KL is measured to (b, not aaaaaaaaaaaa)",
        ),
        (replace(its, data_digests={"prompts": "q"}), "the prompts that it was asked (q, not p)"),
        (replace(its, reward_digests={}), "what judged it (None, not j)"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            require_same_start("dpo", its, other)


def test_what_a_method_measured_before_it_failed_counts_and_is_shown():
    Path("late.py").write_text(
        "from pathlib import Path\nasked = Path('asked.txt')\n"
        "def score(prompt, response, row):\n"
        "    num = int(asked.read_text()) if asked.exists() else 0\n"
        "    asked.write_text(str(num + 1))\n"
        "    return num % 2 if num < 24 else row['nothing']\n"
    )
    # Eight rows are asked about before step 1, and two rounds of eight answers are learned from.
    late = (
        "  late: {objective: grpo, reward: 'late.py:score', responses: 2, prompts_per_round: 4, "
        "max_tokens: 4, evaluation.every: 1, steps: 3}\n"
    )
    Path("compare.yaml").write_text(SHARED + late + DPO)
    assert main(["compare", "compare.yaml", "--out", "out"]) == 2
    whole = json.loads(Path("out/comparison.json").read_text())
    found, dpo = whole["methods"]
    assert "nothing" in found["failed"] and dpo["failed"] is None
    assert [p["step"] for p in found["points"]] == [1, 2]
    assert found["seconds"] > 0 and found["tokens"] > 0
    taught = found["taught"]
    assert (taught["steps"], taught["seen"], taught["answers"]) == (2, 8, 16)
    assert whole["seconds"] == pytest.approx(found["seconds"] + dpo["seconds"])
    # Of a run that is refused before it goes on, the records in its folder are none of its own.
    Path("compare.yaml").write_text(SHARED + late.replace("steps: 3", "steps: 4") + DPO)
    assert main(["compare", "compare.yaml", "--out", "out"]) == 2
    found, _ = json.loads(Path("out/comparison.json").read_text())["methods"]
    assert "with other settings" in found["failed"] and found["points"] == []


def test_prompts_of_which_no_answer_is_better_are_counted_as_asked_all_the_same():
    # Of the first round's answers none is better than another; of the second's, some.
    Path("tied.py").write_text(
        "from pathlib import Path\nasked = Path('asked.txt')\n"
        "def score(prompt, response, row):\n"
        "    num = int(asked.read_text()) if asked.exists() else 0\n"
        "    asked.write_text(str(num + 1))\n"
        "    return float(num >= 8 + 18 and num % 3 == 0)\n"
    )
    online = (
        "  online: {objective: online_dpo, reward: 'tied.py:score', responses: 3, "
        "prompts_per_round: 6, max_tokens: 4, steps: 1}\n"
    )
    (found,) = compared(online)["methods"]
    taught = found["taught"]
    assert (taught["seen"], taught["answers"], taught["steps"]) == (12, 36, 1)


def test_what_was_reported_while_a_method_trained_is_on_the_page(
    capsys: pytest.CaptureFixture[str],
):
    far = DPO.replace("every: 1", "every: 1, learning_rate: 3e-2, watch.kl: 1e-3, steps: 4")
    (found,) = compared(far)["methods"]
    (noticed,) = [n for n in found["noticed"] if n["code"] == "UW308"]
    assert noticed["said"]
    said = f"dpo was reported while it trained: UW308 at step {noticed['step']}"
    assert said in capsys.readouterr().err
    assert noticed["said"][:40] in Path("out/comparison.html").read_text()


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
        *(
            (
                SHARED + DPO + f"  b: {{{key}: {value}}}\n",
                f"{key} differs between methods, which could not be compared then: dpo has {now}, "
                f"and b {value}. Write it beside methods.",
            )
            for key, value, now in (
                ("model", "other", "model"),
                ("lora.quantize", "nf4", "null"),
                ("compute.dtype", "bfloat16", "float32"),
                ("data.template", "none", "auto"),
                ("data.max_length", "300", "null"),
                ("data.date", '"2024-07-05"', "null"),
            )
        ),
        (SHARED + DPO + "  b: {reference: other}\n", "method b: reference is other, and a comp"),
        (
            SHARED + DPO + "  b: {objective: best_of_n, reward: vader, rollout.responses: 32, "
            "learning_rate: 1}\n",
            "error[UW109]: method b: compare.yaml:15: rollout.responses is 32, and best_of_n does "
            "not read it: ppo, grpo, rloo and online_dpo do.\ncompare.yaml:15: optimizer.learning_"
            "rate is 1, and best_of_n does not",
        ),
        *(
            (SHARED + methods, "a comparison needs a method that is trained and answers prompts: w")
            for methods in (JUDGE, JUDGE + BEST, BEST.replace("method:judge", "vader"))
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
