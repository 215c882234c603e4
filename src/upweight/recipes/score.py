"""score and sample: the model's own numbers and words, as JSONL."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from upweight.config import Run
from upweight.data.stream import load_prompts
from upweight.data.trees import prompt_ids, text_after
from upweight.errors import DataError
from upweight.evidence.evaluate import score_trees
from upweight.models.sample import sample, sample_trees, tree_logps
from upweight.recipes.prepare import (
    account_lines,
    fill_reference,
    load_policy,
    prepare,
    renderer_for,
)
from upweight.recipes.screen import Screen, Silent
from upweight.training.rundir import write_atomic
from upweight.types import Dropped


def score_file(run: Run, out: Path | None, screen: Screen | None = None) -> list[dict[str, object]]:
    """Log-probs, implicit rewards and margins per preference, in nats; written to `out` if given.

    Without run.reference the ref_ and reward fields are None.
    """
    screen = screen or Silent()
    screen.stage("model")
    lm = load_policy(run)
    screen.stage("rows")
    prepared = prepare(run, lm)
    for line in account_lines(prepared):
        screen.note(line)
    trees = prepared.trees["train"]
    screen.stage("scores")
    reference = None if run.reference is None else fill_reference(run, lm, trees, screen)
    rows = score_trees(lm, trees, reference, run.loss.beta, run.batch.tokens_per_bin)
    _write(out, rows, screen)
    return rows


def sample_file(
    run: Run,
    out: Path | None,
    *,
    num: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    screen: Screen | None = None,
) -> list[dict[str, object]]:
    """`num` responses to every prompt of the data files, in the K-responses layout."""
    screen = screen or Silent()
    screen.stage("model")
    lm = load_policy(run)
    renderer = renderer_for(run, lm)
    examples, account = load_prompts(run.data.path, run.data.limit)
    prompts: list[tuple[int, ...]] = []
    kept: list[object] = []
    for example in examples:
        ids = prompt_ids(example, renderer)
        if isinstance(ids, Dropped):
            account.used -= 1
            account.drop(ids)
            continue
        prompts.append(tuple(ids))
        kept.append(example.prompt if isinstance(example.prompt, str) else list(example.prompt))
    drops = ", ".join(f"{num} {reason}" for reason, num in account.dropped.items())
    screen.note(
        f"{account.read} prompts read, {len(prompts)} used" + (f" ({drops})" if drops else "")
    )
    if not prompts:
        raise DataError(f"{', '.join(run.data.path)}: no prompt can be used ({drops}).")
    screen.stage("samples")
    drawn = sample(
        lm,
        prompts,
        num=num,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=run.seed,
        on_progress=screen.progress,
    )
    logps = tree_logps(lm, sample_trees(prompts, drawn), run.batch.tokens_per_bin)
    rows: list[dict[str, object]] = [
        {
            "prompt": prompt,
            "responses": [
                {
                    "text": text_after(ids, s.tokens[:-1] if s.stopped else s.tokens, lm.tokenizer),
                    "logp": logp,
                    "tokens": len(s.tokens),
                    "stopped": s.stopped,
                }
                for s, logp in zip(answers, its_logps, strict=True)
            ],
        }
        for prompt, ids, answers, its_logps in zip(kept, prompts, drawn, logps, strict=True)
    ]
    _write(out, rows, screen)
    return rows


def _write(out: Path | None, rows: Sequence[dict[str, object]], screen: Screen) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        write_atomic(out, "".join(lines))
        screen.note(f"{len(rows)} lines written to {out}")
