"""The one engine, from configs, on a language of twelve strings: one or two letters and the stop.

A first run teaches a tiny model the language. From there, each objective is run as a user would run
it, and its end is held against what theory says, by plain transformers over every string.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from runs import furnish, write_rows
from upweight.config import load_run
from upweight.recipes.train import train_model

BETA = 0.5
LETTERS = "abc"
TEXTS = [*LETTERS, *map("".join, itertools.product(LETTERS, repeat=2))]
REWARDS = {text: round(math.sin(3.7 * n), 2) for n, text in enumerate(TEXTS)}
SCORE = f"PAYS = {REWARDS}\ndef score(prompt, text, row):\n    return PAYS.get(text, 0.0)\n"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tmp_path, monkeypatch)


def run(out: str, model: str, data: str, objective: str, **more: Any) -> None:
    values = {
        "model": model, "data": data, "out": out, "objective": objective, "dtype": "float32",
        "checkpoint.every": 10_000, **more,
    }  # fmt: skip
    assert train_model(load_run(None, values=values)).finished


def taught() -> None:
    """`start`: a model that writes the twelve strings, some more often than others."""
    often = [text for n, text in enumerate(TEXTS) for _ in range(1 + n % 3)]
    write_rows("strings.jsonl", [{"prompt": "say", "completion": text} for text in often])
    often = {"pairs_per_step": len(often), "steps": 80, "learning_rate": 5e-3}
    run("said", "model", "strings.jsonl", "sft", **often)
    Path("said/model").rename("start")


def ids_of(text: str = "") -> list[int]:
    """The prompt, as a run renders it, and a string behind it."""
    tokenizer = AutoTokenizer.from_pretrained("start")
    turn = [{"role": "user", "content": "say"}]
    prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return tokenizer(prompt + text, add_special_tokens=False)["input_ids"]


def logps(folder: str) -> Float[Tensor, " strings"]:
    """log p of each string and its stop, in the order of TEXTS."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stop, prompt = AutoTokenizer.from_pretrained("start").eos_token_id, len(ids_of())

    def logp(text: str) -> Tensor:
        ids = torch.tensor([*ids_of(text), stop])
        with torch.no_grad():
            each = model(ids[None]).logits[0].double().log_softmax(-1)
        return each[prompt - 1 : -1].gather(1, ids[prompt:, None]).sum()

    return torch.stack([logp(text) for text in TEXTS])


def total_variation(p: Tensor, q: Tensor) -> float:
    """Of two distributions, in which what is outside the twelve strings counts as one more."""
    rest = (p.sum() - q.sum()).abs()
    return float((p - q).abs().sum() + rest) / 2


def optimum(start: Float[Tensor, " strings"]) -> Float[Tensor, " strings"]:
    """pi* = pref exp(r/beta)/Z; strings outside the language earn 0."""
    tilted = start.exp() * (torch.tensor(list(REWARDS.values())).double() / BETA).exp()
    return tilted / (tilted.sum() + 1 - start.exp().sum())


def write_preferences() -> None:
    """All pairs of strings, as often preferred as Bradley-Terry's model says."""
    rows: list[dict[str, Any]] = []
    for pair in itertools.combinations(TEXTS, 2):
        chosen, rejected = sorted(pair, key=lambda text: -REWARDS[text])
        sure = 1 / (1 + math.exp(REWARDS[rejected] - REWARDS[chosen]))
        rows.append({"prompt": "say", "chosen": chosen, "rejected": rejected, "probability": sure})
    write_rows("pairs.jsonl", rows)


ALL_PAIRS = {"pairs_per_step": 66, "steps": 150, "learning_rate": 1e-3}


@pytest.mark.slow
def test_dpo_reaches_the_optimum_and_the_reward_model_its_reward():
    """DPO on these strings says nothing of the others, so shares are taken among the strings. A
    reward model knows the reward up to a number for each prompt."""
    taught()
    write_preferences()
    start = logps("start")
    run("dpo", "start", "pairs.jsonl", "dpo", **ALL_PAIRS, **{"loss.beta": BETA})
    before, found, best = (
        p / p.sum() for p in (start.exp(), logps("dpo/model").exp(), optimum(start))
    )
    assert total_variation(before, best) > 0.4
    assert total_variation(found, best) < 0.005
    run("judge", "start", "pairs.jsonl", "reward", **ALL_PAIRS)
    model = AutoModelForSequenceClassification.from_pretrained("judge/model").eval()
    stop = AutoTokenizer.from_pretrained("start").eos_token_id
    with torch.no_grad():
        scores = [model(torch.tensor([[*ids_of(t), stop]])).logits.item() for t in TEXTS]
    errors = [score - reward for score, reward in zip(scores, REWARDS.values(), strict=True)]
    assert max(errors) - min(errors) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "rate"), [("rloo", 4e-3), ("grpo", 3e-3), ("ppo", 3e-3)])
def test_a_run_from_its_own_answers_reaches_the_optimum(objective: str, rate: float):
    """From a total variation of 0.49. 448 answers a round estimate each share to 0.02 or so, and
    a falling rate averages over rounds: 0.010 was left with rloo, 0.009 with grpo and with ppo,
    whose values have to be learned too."""
    taught()
    write_rows("prompts.jsonl", [{"prompt": "say"}])
    Path("pays.py").write_text(SCORE)
    more: dict[str, Any] = {
        "rollout.reward": "pays.py:score", "prompts_per_round": 1, "responses": 448,
        "rollout.max_tokens": 3, "steps": 120, "learning_rate": rate, "loss.beta": BETA,
        "passes": 1,
    }  # fmt: skip
    run("run", "start", "prompts.jsonl", objective, **more)
    start = logps("start")
    best = optimum(start)
    assert total_variation(start.exp(), best) > 0.4
    assert total_variation(logps("run/model").exp(), best) < 0.02
