"""A folder with a tiny model and preferences, and runs on it through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tiny import save_tiny
from upweight.cli import main

PAIRS = [
    {"prompt": f"question {i}", "chosen": "fine " * (1 + i % 3), "rejected": f"bad thing {i}"}
    for i in range(24)
]


def furnish(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`folder` becomes the current one, with model/, pairs.jsonl and a cache of its own."""
    monkeypatch.setenv("UPWEIGHT_CACHE", str(folder / "cache"))
    monkeypatch.chdir(folder)
    save_tiny("model")
    write_rows("pairs.jsonl", PAIRS)


def write_rows(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(name: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def train(out: str, *more: str, command: str = "train") -> int:
    words = "--model model --data pairs.jsonl --pairs_per_step 4 --learning-rate 1e-3 --dtype"
    words += " float32 --fraction 0.2 --samples 2 --max_new_tokens 8 --out"
    return main([command, *words.split(), out, *more])
