"""Files to examples to trees, the split by prompt, and which trees make which optimizer step.

Everything here is a function of its arguments and a seed: a run that resumes at step n asks for
step n.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import Any, Literal

from upweight.data.account import Account
from upweight.data.columns import Row, agrees, detect, printable, unread
from upweight.data.formats import FORMATS, example_of, prompt_of
from upweight.data.preferences import (
    Pairing,
    by_scores,
    left_out,
    unusable,
    weights_inside,
)
from upweight.data.read import read_rows
from upweight.data.render import Renderer
from upweight.data.trees import trees
from upweight.errors import ConfigError, DataError, nearest
from upweight.rows import Dropped, Example, RowId, Tree


def load_examples(
    paths: Sequence[str],
    *,
    layout: str = "auto",
    pairing: Pairing | Literal["auto"] = "auto",
    min_gap: float | int = 0.0,
    limit: int | None = None,
    require_preferences: bool = True,
    passing_over: Collection[str] = (),
) -> tuple[list[Example], Account]:
    """The rows of the files that can be learned from, in order, and the account of all of them.

    `layout` is a key of FORMATS, or auto: that of each file's first row. `limit` takes the first
    rows of all files together. Without `require_preferences` rows keep preferences about responses
    that cannot be used, for `learned` to know of them. The columns `passing_over` are counted as
    what no layout reads; with `weight` among them so are the weights inside of responses and
    preferences. Raises DataError for files and rows that cannot be read.
    """
    if layout != "auto" and layout not in FORMATS:
        raise ConfigError(
            f"data.format is {layout}; allowed: auto, {', '.join(FORMATS)}."
            f"{nearest(layout, FORMATS)}"
        )
    account, examples, passed_over = Account(), list[Example](), set(passing_over)
    layouts: dict[str, str] = {}
    origins = _Origins()
    seen: set[bytes] = set()
    for row_id, row in islice(read_rows(paths), limit):
        account.read += 1
        if row_id.source not in layouts:
            layouts[row_id.source] = detect(row, row_id) if layout == "auto" else layout
        found = layouts[row_id.source]
        for name in map(printable, unread(row, found) | passed_over.intersection(row)):
            account.unread(name)
        if found == "pair" and (agreed := agrees(row)) is not None:
            account.rate([agreed], row_id)
        row = {name: value for name, value in row.items() if name not in passed_over}
        example = example_of(row, row_id, found, pairing=pairing, min_gap=min_gap,
                             of_usable=require_preferences)  # fmt: skip
        if isinstance(example, Example):
            for name in weights_inside(example) if "weight" in passed_over else ():
                account.unread(name)
            scored = any(answer.score is not None for answer in example.responses)
            if pairing != "auto" and scored and row.get("preferences") is not None:
                account.unread("preferences")
            if found == "responses" and pairing == "auto" and row.get("preferences") is not None:
                account.rate(by_scores(example), row_id)
            states = row.get("preferences") not in (None, "") and not (pairing != "auto" and scored)
            out = unusable(example, require_preferences=require_preferences, states=states)
            if found == "pair" and out is not None and out.reason == "empty_response":
                account.blank([i for i, why in left_out(example).items() if why == out.reason])
            example = out or example
        if isinstance(example, Dropped):
            account.drop(example)
            continue
        key = _digest([example.prompt, [[a.content, a.score] for a in example.responses],
                       [[p.chosen, p.rejected] for p in example.preferences]])  # fmt: skip
        account.duplicates += key in seen
        seen.add(key)
        account.used += 1
        examples.append(example)
        origins.note(row, example)
    origins.settle(account)
    return examples, account.check()


@dataclass
class _Origins:
    """Where the rows' prompts come from: the files in which some row states one, the rows of texts
    that state none, and those of them whose texts begin alike."""

    stated: set[str] = field(default_factory=set[str])
    missing: list[RowId] = field(default_factory=list[RowId])
    shared: list[RowId] = field(default_factory=list[RowId])

    def note(self, row: Row, example: Example) -> None:
        if row.get("prompt") not in (None, ""):
            self.stated.add(example.row.source)
        elif isinstance(example.prompt, str):
            self.missing.append(example.row)
            if example.prompt.strip():
                self.shared.append(example.row)

    def settle(self, account: Account) -> None:
        account.shared_prompts = [str(row) for row in self.shared]
        account.unprompted = [str(row) for row in self.missing if row.source in self.stated]


def load_prompts(paths: Sequence[str], limit: int | None = None) -> tuple[list[Example], Account]:
    """The prompts of rows of any layout, as examples without responses, for `prompt_ids`.

    Raises DataError for files and rows that cannot be read.
    """
    account, examples, origins = Account(), list[Example](), _Origins()
    for row_id, row in islice(read_rows(paths), limit):
        account.read += 1
        example = prompt_of(row, row_id)
        if isinstance(example, Dropped):
            account.drop(example)
        else:
            account.used += 1
            examples.append(example)
            origins.note(row, example)
    origins.settle(account)
    return examples, account.check()


def grow(examples: Sequence[Example], renderer: Renderer, account: Account) -> list[Tree]:
    """The examples as trees, in order. The account, which has all of them as used, is told what
    was done to each and which are dropped after all."""
    grown: list[Tree] = []
    for result in trees(examples, renderer):
        if isinstance(result, Dropped):
            account.used -= 1
            account.drop(result)
        else:
            account.add(*result)
            grown.append(result[0])
    account.check()
    return grown


def split_by_prompt(
    examples: Sequence[Example],
    fraction: float | int,
    seed: int,
    key: Callable[[Example], str] | None = None,
) -> tuple[list[Example], list[Example]]:
    """(train, held out): all rows of a prompt on one side, about `fraction` of prompts held out.

    `key` names what of an example counts as its prompt: prompt_key unless told otherwise.
    The side follows from the prompt and the seed alone, whatever else is in the data, but for this:
    where one side would have no prompt, it gets the one that came nearest. Raises DataError for a
    single prompt.
    """
    if fraction == 0:
        return list(examples), []
    key = key or prompt_key
    place = {name: _uniform(name, seed) for name in map(key, examples)}
    if len(place) < 2:
        raise DataError(
            f"evaluation.fraction is {fraction}, and the data have {len(place) or 'no'} prompt: "
            "there is none to hold out. Name a set of its own under evaluation.sets."
        )
    held = {name for name, u in place.items() if u < fraction}
    held = held or {min(place, key=lambda k: place[k])}
    if len(held) == len(place):
        held.remove(max(place, key=lambda k: place[k]))
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        sides[key(example) in held].append(example)
    return sides


def split_account(account: Account, num_held_out: int) -> tuple[Account, Account]:
    """The accounts of the two sides, before `grow`: rows dropped so far stay on the first."""
    rest = replace(account, read=account.read - num_held_out, used=account.used - num_held_out)
    return rest.check(), Account(read=num_held_out, used=num_held_out).check()


def overlap(train: Sequence[Example], other: Sequence[Example]) -> list[tuple[RowId, RowId]]:
    """For each row of `other` whose prompt train has too: the first such row of train, and it."""
    first: dict[str, RowId] = {}
    for example in train:
        first.setdefault(prompt_key(example), example.row)
    keys = ((prompt_key(example), example.row) for example in other)
    return [(first[key], row) for key, row in keys if key in first]


def prompt_key(example: Example) -> str:
    """The same for prompts that differ in nothing but white space around their texts, or in being
    text or one user turn."""
    prompt = example.prompt
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return _digest([{**t, "content": str(t.get("content", "")).strip()} for t in turns]).hex()


def _digest(value: Any) -> bytes:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).digest()


def _uniform(key: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Which trees make optimizer step `step` (from 0), and how many epochs are done after it."""

    step: int
    epoch: int
    trees: tuple[int, ...]
    epochs_done: float


def epoch_order(num: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(num), another one each epoch, the same on every platform."""
    # Python promises that random() repeats across versions, and does not promise it of shuffle().
    draw = random.Random(f"{seed}:{epoch}").random
    keys = [draw() for _ in range(num)]
    return sorted(range(num), key=keys.__getitem__)


def plan_epoch(
    grown: Sequence[Tree], pairs_per_step: int, seed: int, epoch: int
) -> list[list[int]]:
    """The trees of each step of an epoch: taken in the epoch's order until a step has enough pairs.

    A step holds whole trees, so it may have more pairs than asked for; the last one of an epoch
    may have fewer. Trees without preferences count one for each response.
    """
    assert grown and pairs_per_step >= 1
    plan: list[list[int]] = []
    num_pairs = pairs_per_step
    for i in epoch_order(len(grown), seed, epoch):
        if num_pairs >= pairs_per_step:
            plan.append([])
            num_pairs = 0
        plan[-1].append(i)
        num_pairs += _num_items(grown[i])
    return plan


def steps(
    grown: Sequence[Tree], pairs_per_step: int, seed: int, start: int = 0
) -> Iterator[StepPlan]:
    """The plan of every step from `start` on, epoch after epoch, without end."""
    step = 0
    for epoch in count():
        num_done = 0
        for chosen in plan_epoch(grown, pairs_per_step, seed, epoch):
            num_done += len(chosen)
            if step >= start:
                yield StepPlan(step, epoch, tuple(chosen), epoch + num_done / len(grown))
            step += 1


def planned(grown: Sequence[Tree], pairs_per_step: int, seed: int) -> Callable[[int], StepPlan]:
    """The plan of any step. Steps that are asked for in turn shuffle each epoch once."""
    ahead, now = steps(grown, pairs_per_step, seed), StepPlan(-1, 0, (), 0.0)

    def plan(step: int) -> StepPlan:
        nonlocal ahead, now
        if step < now.step:
            ahead, now = steps(grown, pairs_per_step, seed, step), StepPlan(-1, 0, (), 0.0)
        while now.step < step:
            now = next(ahead)
        return now

    return plan


def num_steps(grown: Sequence[Tree], pairs_per_step: int, seed: int, epochs: float | int) -> int:
    """How many steps it takes until `epochs` epochs are done; part of an epoch is a number too."""
    before = 0
    if len({_num_items(tree) for tree in grown}) == 1:
        # Then every epoch has as many steps, whatever its order.
        whole = max(0, math.ceil(epochs) - 2)
        before, epochs = whole * len(plan_epoch(grown, pairs_per_step, seed, 0)), epochs - whole
    for plan in steps(grown, pairs_per_step, seed):
        if plan.epochs_done >= epochs - 1e-9:
            return before + plan.step + 1
    raise AssertionError("steps never end")


def _num_items(tree: Tree) -> int:
    """What a tree counts for where steps are made up: its preferences, or else its responses."""
    return len(tree.preferences) or len(tree.responses)
