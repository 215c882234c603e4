"""What a run of a comparison measured, learned from and cost, as its folder says."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upweight.config import Run
from upweight.config.methods import Method
from upweight.evidence import comparison as scored
from upweight.recipes.beside import has_own_critic
from upweight.recipes.kinds import KINDS, PROMPTS
from upweight.recipes.resume import Beginning, beginning_of
from upweight.training.round import Spent, spent_on

POINT = ("length", "kl", "kl_low", "kl_high", "reward", "reward_low", "reward_high")
"""What is kept of an evaluation."""


@dataclass(frozen=True)
class Measured:
    """A method as it is shown, what its start earned, and what its run began with: None where it
    answers no prompts, or did not get so far."""

    shown: scored.Method
    start: scored.Start | None = None
    began: Beginning | None = None


def told(method: Method) -> str:
    """What is said of a method, and what it was told for itself."""
    own = [f"{s.leaf}: {s.value}" for s in method.own if s.leaf != "objective"]
    return "; ".join(filter(None, (method.note, ", ".join(own))))


def measured(method: Method, run: Run, out: Path, failed: str | None = None) -> Measured:
    """What the records of a method's run say, also where it `failed` on its way."""
    records = _lines_of(out / "metrics.jsonl")
    answers = _lines_of(out / "samples.jsonl")
    asked = Counter(answer["step"] for answer in answers if answer["set"] == PROMPTS)
    points = [
        scored.Point(
            r["step"],
            **{key: math.nan if r[key] is None else r[key] for key in POINT},
            num_prompts=asked[r["step"]],
        )
        for r in records
        if r["kind"] == "eval" and r["set"] == PROMPTS and "reward" in r and "kl" in r
    ]
    steps = [r for r in records if r["kind"] == "train"]
    first = points.pop(0) if points and points[0].step == 0 else None
    spent = spent_on(out / "rollouts")
    shown = scored.Method(
        method.name,
        method.objective,
        told(method),
        steps[-1]["seconds"] if steps else 0.0,
        steps[-1]["num_tokens"] + _computed_besides(run, steps[-1], spent) if steps else 0,
        tuple(points),
        failed,
        _taught(method, out, steps, spent) if steps else None,
        tuple(_noticed(r) for r in records if r["kind"] == "warning"),
    )
    start = first and scored.Start(
        first.reward, first.reward_low, first.reward_high, first.num_prompts
    )
    return Measured(shown, start, beginning_of(out) if KINDS[run.objective].answers else None)


def _lines_of(file: Path) -> list[dict[str, Any]]:
    """No lines where the file is not there yet, as where the evaluation before step 1 failed."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def _noticed(record: Mapping[str, Any]) -> scored.Noticed:
    return scored.Noticed(record["code"], record["step"], record["said"])


def _taught(
    method: Method, out: Path, steps: Sequence[Mapping[str, Any]], spent: Spent
) -> scored.Taught:
    """What a run learned from, as its account, metrics and rounds say."""
    kind, last = KINDS[method.trains_by], steps[-1]
    account = json.loads((out / "account.json").read_text(encoding="utf-8"))["sets"]["train"]
    if kind.draws:
        return scored.Taught(
            "prompts", account["used"], spent.asked, last["step"], spent.drawn, method.reward
        )
    if kind.rows == "preferences":
        there, seen = account["preferences"], sum(r["num_pairs"] for r in steps)
    else:
        there = account["responses"]
        seen = sum(round(r["num_scored"] / r["tokens/response"]) for r in steps)
    return scored.Taught(kind.rows, there, seen, last["step"], 0, scored.ROWS)


def _computed_besides(run: Run, last: Mapping[str, Any], spent: Spent) -> int:
    """Tokens that were computed beside the policy's own steps: the reference's pass over the rows
    of an epoch; what drawing and scoring the rounds took, and the steps of a value model with a
    trunk of its own."""
    if KINDS[run.objective].by_reference:
        return round(last["num_tokens"] / last["epoch"])
    return spent.computed + (last["num_tokens"] if has_own_critic(run) else 0)
