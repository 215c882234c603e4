"""What is held beside the policy is in the plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from oracles import loaded, random_trees
from runs import furnish
from upweight.cli import main
from upweight.config import load_run
from upweight.recipes.beside import held_beside
from upweight.training.memory import plan_memory

BASE = {"model": "model", "data.path": "pairs.jsonl"}


def held(**values: object) -> dict[str, int]:
    return held_beside(load_run(None, values={**BASE, **values}).run, loaded("llama"))


def test_dpo_and_sft_hold_nothing_beside_their_policy():
    assert held(objective="dpo") == held(objective="sft") == {}


def test_ppo_holds_a_value_model_with_what_its_training_needs_and_a_copy_of_the_start():
    weights = sum(p.numel() for p in loaded("llama").model.parameters())
    found = held(objective="ppo", reward="number")
    # fp32 weights, their gradients and two moments; the reference's weights.
    assert found == {"value model": 16 * weights, "reference's copy": 4 * weights}
    assert held(objective="ppo", reward="number", value="shared") == {
        "reference's copy": 4 * weights
    }
    assert held(objective="grpo", reward="number", reference="other") == {}


def test_a_reward_model_is_counted_once_however_often_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    furnish(tmp_path, monkeypatch)
    words = "train --model model --data pairs.jsonl --objective reward --steps 1 --out judge"
    assert main([*words.split(), "--dtype", "float32"]) == 0
    stored = Path("judge/model/model.safetensors").stat().st_size
    found = held(objective="grpo", reward="judge/model", true_reward="judge/model")
    assert found["reward model"] == stored


def test_bins_are_smaller_by_what_is_held_beside_the_policy(monkeypatch: pytest.MonkeyPatch):
    lm, trees = loaded("llama"), random_trees([(9 + i, 5, 7) for i in range(20)])
    steps = [range(len(trees))]
    alone = plan_memory(lm, trees, steps)
    two = plan_memory(lm, trees, steps, passes=2)
    assert two.per_token == 2 * alone.per_token and two.fixed == 2 * alone.fixed
    more = plan_memory(lm, trees, steps, beside={"value model": 7 << 20})
    assert more.needed == alone.needed + (7 << 20)
    assert "value model 7 MiB" in more.describe() and "value model" not in alone.describe()
    room = alone.gradients + alone.moments + alone.activations(1000)
    monkeypatch.setattr("upweight.training.memory.free_bytes", lambda device: int(room / 0.8))
    tight = plan_memory(lm, trees, steps)
    beside = plan_memory(lm, trees, steps, beside={"value model": alone.activations(600)})
    assert 256 <= beside.tokens_per_bin < tight.tokens_per_bin <= 1000
    assert replace(tight, beside=beside.beside) != tight
