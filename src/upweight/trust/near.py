"""What says nearly the same: rows like an earlier one, and pairs that differ in next to nothing."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence

from upweight.rows import Example, RowId, Text, Tree

Ids = tuple[int, ...]

ENDS = " .!?…\"'“”‘’"
"""What may stand around a text without changing what it says."""

NEIGHBOURS = 16
"""Rows of one prompt, next to each other by length, that a row is compared with."""


def copies(examples: Sequence[Example]) -> dict[RowId, RowId]:
    """For each row that says what an earlier one says: that one.

    Case, white space and the punctuation around a text do not count; all else does. A prompt that
    differs in one word or one number asks something else.
    """
    first: dict[str, RowId] = {}
    found: dict[RowId, RowId] = {}
    for example in examples:
        order = [(p.chosen, p.rejected) for p in example.preferences]
        said = [_plain(example.prompt), [_plain(a.content) for a in example.responses], order]
        key = json.dumps(said, sort_keys=True, default=str)
        earlier = first.setdefault(key, example.row)
        if earlier != example.row:
            found[example.row] = earlier
    return found


def _plain(said: Text) -> object:
    if isinstance(said, str):
        return " ".join(said.casefold().split()).strip(ENDS)
    return [
        {**turn, "content": _plain(turn["content"])}
        if isinstance(turn.get("content"), str)
        else turn
        for turn in said
    ]


def shared_prompts(train: Sequence[Example], other: Sequence[Example]) -> list[tuple[RowId, RowId]]:
    """For each row of `other` whose prompt asks what one of train asks: the first such row, and it.

    What does not count is as in `copies`, and a system message.
    """
    first: dict[str, RowId] = {}
    for example in train:
        first.setdefault(_asked(example.prompt), example.row)
    keys = ((_asked(example.prompt), example.row) for example in other)
    return [(first[key], row) for key, row in keys if key in first]


def _asked(prompt: Text) -> str:
    turns = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    said = [
        (turn["role"], _plain(str(turn.get("content", ""))), turn.get("tool_calls"))
        for turn in turns
        if turn["role"] not in ("system", "developer")
    ]
    return json.dumps(said, sort_keys=True, default=str)


def near_copies(trees: Sequence[Tree], share: float) -> dict[RowId, RowId]:
    """For each row whose responses are nearly those of another row of its prompt, one by one, and
    preferred alike: that one. The first of them in the data is no copy."""
    by_prompt: dict[tuple[Ids, int], list[Tree]] = defaultdict(list)
    for tree in trees:
        by_prompt[tree.prompt, len(tree.responses)].append(tree)
    place = {id(tree): i for i, tree in enumerate(trees)}
    found: dict[RowId, RowId] = {}
    for group in by_prompt.values():
        group.sort(key=lambda tree: tree.num_tokens)
        for i, tree in enumerate(group):
            for other in group[max(0, i - NEIGHBOURS) : i]:
                if tree.preferences == other.preferences and all(
                    nearly_same(a, b, share)
                    for a, b in zip(tree.responses, other.responses, strict=True)
                ):
                    early, late = sorted((tree, other), key=lambda t: place[id(t)])
                    found[late.ids[0].row] = early.ids[0].row
    return found


def nearly_same(a: Ids, b: Ids, share: float) -> bool:
    """Whether `share` of the longer one's tokens are enough edits to make one into the other."""
    return edits(a, b, int(share * max(len(a), len(b)))) is not None


def edits(a: Ids, b: Ids, limit: int) -> int | None:
    """The fewest tokens to put in, leave out or exchange to make `a` into `b`; None above `limit`.

    The furthest that so many edits reach on each diagonal of the table (Ukkonen 1985): the time
    grows with `limit`, not with the product of the lengths.
    """
    if abs(len(a) - len(b)) > limit:
        return None
    # An edit changes one token of either side, so most pairs are told apart by counting.
    if limit and (Counter(a) - Counter(b)).total() > limit:
        return None
    reach = {0: _same_from(a, b, 0, 0)}
    for done in range(limit + 1):
        if reach.get(len(b) - len(a)) == len(a):
            return done
        further: dict[int, int] = {}
        for shift in range(-done - 1, done + 2):
            steps = [
                reach[shift + by] + moved
                for by, moved in ((0, 1), (-1, 0), (1, 1))
                if shift + by in reach
            ]
            at = min(max(steps, default=-1), len(a), len(b) - shift)
            if at >= max(0, -shift):
                further[shift] = _same_from(a, b, at, at + shift)
        reach = further
    return None


def _same_from(a: Ids, b: Ids, i: int, j: int) -> int:
    while i < len(a) and j < len(b) and a[i] == b[j]:
        i, j = i + 1, j + 1
    return i
