"""What a run of rounds records, and how often it has asked its prompts."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from oracles import random_trees
from runs import furnish, rows_of, write_rows
from test_rollout import round_of
from upweight.cli import main
from upweight.training.rollout import Credit, credited

TREES = [
    replace(tree, preferences=())
    for tree in random_trees([(3, 4, 1, 2), (2, 5, 5, 1), (4, 2, 3, 6)], seed=2)
]


def test_a_prompt_is_tied_by_what_its_answers_are_compared_by():
    scores = [1.0, 2.0, 1.0, 2.0, 2.0, 1.0, 3.0, 3.0, 3.0]
    stopped = [True, False, True, False, False, True, True, True, False]
    made = round_of(TREES, values=False, scores=scores, stopped=stopped)
    assert made.tied == pytest.approx(1 / 3)
    # Answers that were cut pay 1: to two prompts all earn the same then, to the third no more.
    paid = replace(made, stop_penalty=1.0)
    assert paid.tied == pytest.approx(2 / 3)
    assert [paid.compared[i] for i in TREES[1].ids] == [1.0, 1.0, 1.0]
    assert [paid.compared[i] for i in TREES[2].ids] == [3.0, 3.0, 2.0]
    advantages = credited(paid, Credit(group="rloo", kl=None)).advantages
    for tree, is_tied in zip(TREES, (True, True, False), strict=True):
        assert all(not advantages[i].any() for i in tree.ids) == is_tied
    # The score itself is what is shown.
    assert paid.means["reward"] == pytest.approx(statistics.fmean(scores))


def test_a_round_with_values_is_tied_where_all_its_answers_earn_the_same():
    alone = random_trees([(3, 4), (2, 5), (4, 2)], seed=2)
    assert round_of(alone, scores=[1.0, 1.0, 1.0]).tied == 1
    assert round_of(alone, scores=[1.0, 1.0, 2.0]).tied == 0
    cut = round_of(alone, scores=[1.0, 1.0, 1.0], stopped=[True, True, False])
    assert cut.tied == 1 and replace(cut, stop_penalty=1.0).tied == 0
    assert round_of(TREES, scores=[1.0] * 4 + [2.0] * 5).tied == 0
    assert round_of(alone, values=False).tied is None and round_of(alone[:1]).tied is None


def test_a_round_says_its_entropy_and_the_spread_of_rewards_and_lengths():
    made = round_of(TREES)
    means = made.means
    assert means["reward_std"] == pytest.approx(statistics.stdev(made.scores.values()))
    tokens = torch.cat(list(made.logps.values())).double()
    assert means["entropy"] == pytest.approx(-tokens.mean().item())
    assert (means["length/min"], means["length/max"]) == (1, 6)
    alone = random_trees([(3, 4)], seed=1)
    assert "reward_std" not in round_of(alone).means


def test_the_sampled_entropy_is_the_entropy_in_expectation():
    """Over all tokens of one distribution, weighted by how often they are drawn."""
    logps = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    times = (4, 2, 1, 1)
    trees = random_trees([(2, *[1] * 8)], seed=1)
    made = round_of(trees, values=False)
    drawn = [logps[k : k + 1] for k, n in enumerate(times) for _ in range(n)]
    made = replace(made, logps=dict(zip(made.logps, drawn, strict=True)))
    assert made.entropy == pytest.approx(1.75 * math.log(2))


def test_the_explained_variance_is_that_of_the_returns():
    made = round_of(TREES)
    values, returns = (torch.cat(list(x.values())).double() for x in (made.values, made.returns))
    wanted = 1 - (returns - values).var() / returns.var()
    assert made.means["explained_variance"] == pytest.approx(wanted.item())
    assert replace(made, values=made.returns).means["explained_variance"] == 1
    # A constant below what is earned foresees none of its spread, and costs none.
    level = {i: torch.full_like(x, -3.0) for i, x in made.values.items()}
    assert replace(made, values=level).means["explained_variance"] == pytest.approx(0)
    assert "explained_variance" not in replace(made, returns=level).means
    assert "explained_variance" not in round_of(TREES, values=False).means


# Through runs


@pytest.fixture
def _prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tmp_path, monkeypatch)
    write_rows("prompts.jsonl", [{"prompt": f"question {i}"} for i in range(9)])
    Path("small.py").write_text(
        "def score(prompt, response, row):\n    return sum(map(str.islower, response)) / 8\n"
    )
    # Of every third prompt all answers earn the same.
    Path("tied.py").write_text(
        "def score(prompt, response, row):\n"
        "    return 0 if prompt[-1] in '0369' else sum(map(ord, response))\n"
    )


def trained(out: str, objective: str, *more: str) -> list[dict]:
    words = (
        f"train --model model --data prompts.jsonl --objective {objective} --out {out} --dtype "
        "float32 --learning-rate 3e-3 --prompts_per_round 3 --max_tokens 6 --reward small.py:score"
    )
    assert main([*words.split(), *more]) == 0
    return [r for r in rows_of(f"{out}/metrics.jsonl") if r["kind"] == "train"]


@pytest.mark.usefixtures("_prompts")
def test_a_run_whose_rounds_end_early_asks_its_prompts_as_often_as_epochs_say(
    capsys: pytest.CaptureFixture[str],
):
    more = ["--passes", "3", "--responses", "2", "--checkpoint.every", "1", "--keep", "99"]
    steps = trained("run", "grpo", *more, "--kl_stop", "1e-9")
    # The first step of a round learns from answers of the policy as it is; the second is too far,
    # as its own record says.
    assert [r["epoch"] for r in steps] == pytest.approx([n / 9 for n in (1, 2, 4, 5, 7, 8)])
    assert "after step 6 of 9: rounds ended early" in capsys.readouterr().err
    assert len(list(Path("run/rollouts").glob("round-*.parquet"))) == 3
    assert Path("run/model/config.json").is_file()
    # A resumed run knows that it is done, or goes on.
    for left in (6, 3):
        for folder in sorted(Path("run/checkpoints").iterdir())[left + 1 :]:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
        assert main(["train", "run/run.yaml", "resume=true"]) == 0
        again = [r for r in rows_of("run/metrics.jsonl") if r["kind"] == "train"]
        assert [r["loss"] for r in again] == [r["loss"] for r in steps]


@pytest.mark.usefixtures("_prompts")
def test_tied_prompts_of_online_dpo_are_asked_once_an_epoch_like_the_others():
    write_rows("others.jsonl", [{"prompt": "another question"}, {"prompt": "one more"}])
    more = "--reward tied.py:score --minibatches 3 --epochs 2 --prompt_files others.jsonl"
    more += " --evaluation.every 99 --max_new_tokens 4"
    steps = trained("run", "online_dpo", *more.split())
    assert steps[-1]["epoch"] == pytest.approx(2)
    last = [r for r in rows_of("run/metrics.jsonl") if r["kind"] == "eval"][-1]
    assert last["step"] == steps[-1]["step"] and last["epoch"] == pytest.approx(2)
    rounds = sorted(Path("run/rollouts").glob("round-*.parquet"))
    lines = [r["line"] for file in rounds for r in pq.read_table(file).to_pylist()]
    assert len(steps) < 3 * len(rounds)
    asked = {line: lines.count(line) / 2 for line in lines}
    assert set(asked.values()) == {2.0}


@pytest.mark.usefixtures("_prompts")
@pytest.mark.parametrize("objective", ["ppo", "grpo", "online_dpo"])
def test_the_records_of_rounds_have_what_dashboards_look_for(objective: str):
    steps = trained("run", objective, "--steps", "4", "--responses", "2", "--passes", "2")
    always = {"entropy", "reward", "reward_std", "length/min", "length/max", "kl", "beta"}
    gradient = {"ratio", "approx_kl", "clip_fraction", "advantages/nonzero"}
    ppo = {"policy_loss", "value_loss", "explained_variance"}
    for record in steps:
        assert always <= record.keys()
        assert (gradient <= record.keys()) == (objective != "online_dpo")
        assert (ppo <= record.keys()) == (objective == "ppo")
        if objective == "ppo":
            assert record["loss"] == pytest.approx(
                record["policy_loss"] + record["value_loss"], abs=1e-6
            )
    if objective == "ppo":
        # In the first step of a round the policy is the one that drew it.
        assert steps[0]["ratio"] == pytest.approx(1, abs=1e-5)
        assert steps[0]["explained_variance"] == pytest.approx(0, abs=1e-6)  # its head is 0
