"""score and sample: the model's own numbers and words, as JSONL."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

from upweight.config import Run, require_read
from upweight.data.stream import load_prompts
from upweight.data.supervised import plant
from upweight.data.trees import text_after
from upweight.errors import ConfigError, DataError, Refusal
from upweight.evidence.evaluate import higher, rank_trees, score_trees
from upweight.models.named import resolve
from upweight.models.sample import sample, sample_trees, tree_logps
from upweight.models.scalar import is_reward_model
from upweight.models.weights import load_tokenizer
from upweight.recipes.prepare import (
    account_lines,
    ended_answers,
    fill_reference,
    load_policy,
    load_scorer,
    note_smaller,
    prepare,
    tokens_read_at_once,
)
from upweight.recipes.reference import reference_model, require_same_tokens
from upweight.recipes.rendering import renderer_for, require_rows_read
from upweight.recipes.screen import Screen, Silent, counted
from upweight.recipes.sets import read_sets
from upweight.training.rundir import require_file, write_atomic
from upweight.types import Example


def score_file(
    run: Run, screen: Screen | None = None, *, overwrite: bool = False
) -> list[dict[str, object]]:
    """Log-probs, implicit rewards and margins per preference, in nats; written to run.out if set.
    Of a reward model's folder its scores and margins. In how many the chosen is worth more is said
    last.

    Without run.reference the ref_ and reward fields are None. Raises ConfigError for settings that
    scoring does not read, OutputError for a file that holds something, unless it is to `overwrite`.
    """
    screen = screen or Silent()
    require_read("score", run)
    _require_out(run, overwrite)
    judges = is_reward_model(resolve(run.model))
    if judges and run.reference is not None:
        raise Refusal(
            "UW109",
            f"reference is {run.reference}, and {run.model} is a reward model: its scores are not "
            "measured against another model. Leave it out.",
        )
    sets = read_sets(run)
    screen.stage("model")
    lm = load_scorer(run) if judges else load_policy(run)
    if run.reference is not None:
        trusted = run.compute.trust_remote_code
        require_same_tokens(run, lm, load_tokenizer(run.reference, trust_remote_code=trusted))
    screen.stage("rows")
    prepared = prepare(run, lm, sets)
    if judges:
        prepared = ended_answers(prepared, lm)
    for line in account_lines(prepared):
        screen.note(line)
    trees = prepared.trees["train"]
    screen.stage("scores")
    smaller = functools.partial(note_smaller, screen, "scoring")
    at_once = tokens_read_at_once(run, lm)
    if judges:
        rows = rank_trees(lm, trees, at_once, smaller)
    else:
        reference = None
        if run.reference is not None:
            with reference_model(run, lm) as model:
                reference = fill_reference(run, model, trees, screen)
        rows = score_trees(lm, trees, reference, run.loss.beta, at_once, smaller)
    _write(run, rows, screen)
    if rows:
        screen.note(higher(rows, trees))
    return rows


def sample_file(
    run: Run,
    *,
    num: int = 1,
    top_p: float | int = 1.0,
    screen: Screen | None = None,
    overwrite: bool = False,
) -> list[dict[str, object]]:
    """`num` responses to every prompt of the data files, in the K-responses layout; written to
    run.out if set.

    evaluation.max_new_tokens and evaluation.temperature say how they are drawn. Raises ConfigError
    for settings that sampling does not read, OutputError for a file that holds something, unless it
    is to `overwrite`.
    """
    screen = screen or Silent()
    if num < 1:
        raise ConfigError(f"num is {num}; it must be a whole number >= 1 (-n on the command line).")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p is {top_p}; it must be a number > 0 and <= 1 (1: off).")
    require_read("sample", run)
    _require_out(run, overwrite)
    examples, account = load_prompts(run.data.path, run.data.limit)
    screen.stage("model")
    lm = load_policy(run)
    renderer = renderer_for(run, lm)
    require_rows_read(examples, renderer)
    rows_of = {example.row: example for example in examples}
    trees = plant(examples, renderer, account)
    prompts = [tree.prompt for tree in trees]
    kept = [_asked(rows_of[tree.ids[0].row]) for tree in trees]
    drops = ", ".join(f"{times} {reason}" for reason, times in account.dropped.items())
    screen.note(
        f"{counted(account.read, 'prompt')} read, {account.used:,} used"
        + (f" ({drops})" if drops else "")
    )
    if not prompts:
        raise DataError(f"{', '.join(run.data.path)}: no prompt can be used ({drops}).")
    screen.stage("samples")
    drawn = sample(
        lm,
        prompts,
        num=num,
        max_new_tokens=run.evaluation.max_new_tokens,
        temperature=run.evaluation.temperature,
        top_p=top_p,
        seed=run.seed,
        stop_token_ids=renderer.stop_ids,
        on_progress=screen.progress,
    )
    logps = tree_logps(lm, sample_trees(prompts, drawn), tokens_read_at_once(run, lm))
    rows: list[dict[str, object]] = [
        {
            **prompt,
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
    _write(run, rows, screen)
    return rows


def _asked(example: Example) -> dict[str, object]:
    """The row's columns that made its prompt: without one, training would render another."""
    columns: dict[str, object] = {
        "prompt": example.prompt if isinstance(example.prompt, str) else list(example.prompt)
    }
    if example.tools:
        columns["tools"] = list(example.tools)
    if example.template_options:
        columns["template_options"] = dict(example.template_options)
    return columns


def _require_out(run: Run, overwrite: bool) -> None:
    if run.out is not None:
        require_file(Path(run.out), overwrite=overwrite)


def _write(run: Run, rows: Sequence[dict[str, object]], screen: Screen) -> None:
    if run.out is not None:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        write_atomic(Path(run.out), "".join(lines))
        screen.note(f"{counted(len(rows), 'line')} written to {run.out}")
