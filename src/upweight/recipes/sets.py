"""The rows of a run as text: read, split by prompt, and held against the keys that are about them.
Imports no torch: what is wrong with rows is said before there is a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from upweight.config import Run, write
from upweight.data.account import Account, require_used
from upweight.data.stream import (
    load_examples,
    load_prompts,
    prompt_key,
    split_account,
    split_by_prompt,
)
from upweight.data.supervised import each_turn, learned, opening_key
from upweight.errors import Refusal
from upweight.recipes.apart import require_apart
from upweight.recipes.kinds import KINDS
from upweight.recipes.screen import counted
from upweight.rows import Example

Rows = tuple[list[Example], Account]
"""Rows that can be used, and what became of all that were read."""


@dataclass(frozen=True)
class Sets:
    """What is trained on, what is held out by the name of its set, the prompts of
    evaluation.prompt_files, None without any, and how many prompts were held out of the data."""

    train: Rows
    held: dict[str, Rows]
    asked: Rows | None
    split: str | None

    def require_used(self, run: Run) -> None:
        """Raises DataError where one of them has nothing to use."""
        require_used(self.train[1], f"data {', '.join(run.data.path)}")
        for name, (_, account) in self.held.items():
            require_used(account, f"the evaluation set {name}")
        if self.asked is not None:
            files = ", ".join(run.evaluation.prompt_files or [])
            require_used(self.asked[1], f"evaluation.prompt_files {files}")


def read_sets(run: Run) -> Sets:
    """Raises DataError for a file that cannot be read or has nothing to use, Refusal UW209 when a
    prompt is on both sides, UW109 for a key about rows that has no effect on these."""
    kind = KINDS[run.objective]
    every_turn = run.data.turns == "all"

    def taken(found: list[Example], account: Account) -> Rows:
        if every_turn:
            found = each_turn(found, account)
        if kind.rows == "responses":
            found = learned(found, account, everything=run.data.learn == "all")
        return found, account

    train, account = read_rows_of(run, run.data.path, run.data.limit)
    require_used(account, f"data {', '.join(run.data.path)}")
    loaded = [(train, account)]
    held: dict[str, Rows] = {}
    key = opening_key if every_turn else prompt_key
    train, heldout = split_by_prompt(train, run.evaluation.fraction, run.seed, key)
    split = None
    if heldout:
        out, kept = ({key(row) for row in rows} for rows in (heldout, train))
        split = (
            f"{len(out):,} of {counted(len(out) + len(kept), 'prompt')} held out "
            f"(evaluation.fraction {run.evaluation.fraction:g}: each prompt as a whole, and by a "
            "draw of its own)"
        )
        account, held_account = split_account(account, len(heldout))
        held["heldout"] = taken(heldout, held_account)
    train, account = taken(train, account)
    for name, paths in run.evaluation.sets.items():
        loaded.append(read_rows_of(run, paths))
        held[name] = taken(*loaded[-1])
        require_apart(name, train, held[name][0])
    if not kind.draws:
        _require_scores(run, loaded)
        _require_turns(run, loaded)
    files = run.evaluation.prompt_files
    asked = None if files is None else load_prompts(files)
    sets = Sets((train, account), held, asked, split)
    sets.require_used(run)
    return sets


def read_rows_of(run: Run, paths: Sequence[str], limit: int | None = None) -> Rows:
    """The rows of the files, or the first `limit` of them, as the run's objective reads them."""
    kind = KINDS[run.objective]
    if kind.draws:
        return load_prompts(paths, limit)
    return load_examples(
        paths,
        layout=run.data.format,
        pairing=run.data.pairing,
        min_gap=run.data.min_score_gap,
        limit=limit,
        require_preferences=kind.rows == "preferences",
        passing_over=_unread_columns(run),
    )


def _require_scores(run: Run, loaded: Sequence[tuple[Sequence[Example], Account]]) -> None:
    """Raises Refusal UW109 for a key about scores where none makes a preference: no row has any, or
    all that have some state their preferences, which only a pairing of the scores passes over."""
    asked = {"data.pairing": run.data.pairing, "data.min_score_gap": run.data.min_score_gap}
    asked = {key: value for key, value in asked.items() if value not in ("auto", 0)}
    rows = [example for examples, _ in loaded for example in examples]
    scored = [row for row in rows if any(a.score is not None for a in row.responses)]
    # Scores that make a preference differ; a row whose scores were too close is not among the rows
    # any more.
    made = any(p.margin for row in scored for p in row.preferences)
    if not asked or made or any("no_preference" in account.dropped for _, account in loaded):
        return
    said = " and ".join(f"{key} is {write(value)}" for key, value in asked.items())
    if not scored:
        raise Refusal(
            "UW109",
            f"{said}, and no row has scores: their preferences are stated. Leave it out.",
        )
    raise Refusal(
        "UW109",
        f"{said}, and rows that have scores state their preferences too. Leave it out, or set "
        "data.pairing to all, adjacent or extremes to go by the scores.",
    )


def _require_turns(run: Run, loaded: Sequence[tuple[Sequence[Example], Account]]) -> None:
    """Raises Refusal UW109 for all turns of what is no conversation."""
    rows = [example for examples, _ in loaded for example in examples]
    if run.data.turns == "all" and all(isinstance(row.prompt, str) for row in rows):
        raise Refusal(
            "UW109",
            "data.turns is all, and no row is a conversation: text has no earlier turns. Leave it "
            "out.",
        )


def reads_margins(run: Run) -> bool:
    return run.objective == "reward" and run.loss.margin > 0


def _unread_columns(run: Run) -> list[str]:
    """Weights and probabilities are those of preferences, of which supervised fine-tuning makes
    plain responses."""
    labels = KINDS[run.objective].rows == "preferences"
    read = {"margin": reads_margins(run), "weight": labels, "probability": labels}
    return [name for name, is_read in read.items() if not is_read]
