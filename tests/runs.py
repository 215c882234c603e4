"""A folder with a tiny model and preferences, and runs on it through the command line."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tiny import VOCAB_SIZE, save_tiny
from upweight.cli import main

PAIRS = [
    {"prompt": f"question {i}", "chosen": "fine " * (1 + i % 3), "rejected": f"bad thing {i}"}
    for i in range(24)
]


WORDS = ["river", "stone", "cloud", "lamp", "paper", "seven", "green", "north", "salt", "wheel"]


def sentence(draw: random.Random, num: int | None = None) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(num or draw.randint(3, 9)))


def plain_rows(num: int = 60) -> list[dict[str, Any]]:
    """Neither length nor words tell chosen from rejected."""
    draw = random.Random(1)
    return [
        {"prompt": f"question {i}", "chosen": sentence(draw), "rejected": sentence(draw)}
        for i in range(num)
    ]


def furnish(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`folder` becomes the current one, with model/, pairs.jsonl and a cache of its own."""
    monkeypatch.setenv("UPWEIGHT_CACHE", str(folder / "cache"))
    monkeypatch.chdir(folder)
    save_tiny("model")
    write_rows("pairs.jsonl", PAIRS)


def even_odds_to_stop() -> None:
    """model/ says its stop token with about even odds, wherever it is."""
    model = AutoModelForCausalLM.from_pretrained("model")
    width, stop = model.config.hidden_size, model.config.eos_token_id
    with torch.no_grad():
        # A first channel that is large everywhere is about sqrt(width) after the last norm, and
        # the logits of the others are about as many as exp(sqrt(width)).
        model.get_input_embeddings().weight[:, 0] = 50.0
        model.get_output_embeddings().weight[:, 0] = 0.0
        model.get_output_embeddings().weight[stop, 0] = math.log(VOCAB_SIZE) / width**0.5
    model.save_pretrained("model")


def write_rows(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(name: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def train(out: str, *more: str, command: str = "train") -> int:
    words = "--model model --pairs_per_step 4 --learning-rate 1e-3 --dtype"
    sampled = "" if "--samples 0" in " ".join(more) else " --samples 2 --max_new_tokens 8"
    words += " float32" + ("" if "--data" in more else " --data pairs.jsonl")
    words += f" --fraction 0.2{sampled} --out"
    return main([command, *words.split(), out, *more])


LETTERS = "def score(prompt, response, row):\n    return sum(map(str.islower, response)) / 8\n"


def furnish_rewarded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts beside what `furnish` gives, and count.py, which rewards small letters."""
    furnish(folder, monkeypatch)
    Path("count.py").write_text(LETTERS)
    write_rows("prompts.jsonl", [{"prompt": f"question {i}"} for i in range(12)])


def records(run: str, kind: str) -> list[dict[str, Any]]:
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
