"""The account of a set of rows: each one read is used or dropped for a reason that is counted."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from upweight.data.trees import TreeNotes
from upweight.errors import DataError, Refusal
from upweight.rows import Dropped, RowId, Tree

REASONS: dict[str, str] = {
    "bad_unicode": "text that is not Unicode: half of a surrogate pair",
    "prompt_mismatch": "chosen and rejected do not continue the same prompt",
    "not_assistant": "the last message is not the assistant's",
    "empty_prompt": "no prompt, and no beginning-of-text token to stand for it",
    "empty_response": "a response without a word",
    "other_turns_in_response": "a response that holds turns which are not the assistant's",
    "identical_responses": "responses that are the same, as text or as tokens after cutting",
    "no_preference": "no two responses of which one is preferred",
    "unlabelled": "neither preferences nor two scores",
    "template": "the chat template refuses the conversation",
    "stop_in_response": "a response whose text holds a special token",
    "boundary": "prompt and response do not come apart under this template or tokenizer",
    "too_long": "longer than max_length",
    "not_chosen": "a response that is not the chosen one (sft learns from chosen ones)",
    "unpaired": "in no preference, by its score or the pairing asked for",
}
"""Why a row is dropped or a response left out, as the account's reader is told."""

ONE_ANSWER = (
    "Give as prompt the messages up to the last user turn that both share, and as chosen and "
    "rejected one answer each. For sft give the whole conversation in the column messages, with "
    "data.turns=all."
)
"""What to do about rows whose responses hold other turns than the assistant's."""

_NUM_EXAMPLES = 5
_PERCENTILES = (50, 90, 99)


@dataclass
class Account:
    """What became of the rows of one set.

    `dropped` counts rows by reason, `examples` holds the first few of each as (row, detail).
    `left_out` counts the responses of used rows that are not used. `truncated` counts prompts and
    responses that were cut, and the preferences whose chosen, or rejected, response was.
    `unfinished` counts responses whose rows say that they did not stop, `boundary_repaired` rows
    whose prompt gave white space to the responses, `rewritten` responses whose content the chat
    template changed, `special_in_prompt` rows that hold a special token's text before the template
    adds any (rendered twice, perhaps), `duplicates` rows that say the same as an earlier one and
    are used, `earlier_turns` rows that were made of a conversation's earlier turns,
    `unused_columns` rows by the columns (and the keys of responses) that no layout reads, or that
    `pairing` passes over. `shared_prompts` are the rows whose prompt is what the texts of chosen
    and rejected begin with alike, `unprompted` those of texts that have none where other rows of
    their file have one. `rated` counts pairs beside which stand scores or a margin, and `against`
    are the rows of those that say the rejected response is the better one. `empty` counts the rows
    of chosen and rejected that are dropped for an empty response by which of the two it is.
    `lengths` are in tokens: each prompt, the two sides of each preference, and the responses of
    rows that have none.
    """

    read: int = 0
    used: int = 0
    dropped: dict[str, int] = field(default_factory=dict[str, int])
    examples: dict[str, list[tuple[str, str]]] = field(
        default_factory=dict[str, list[tuple[str, str]]]
    )
    left_out: dict[str, int] = field(default_factory=dict[str, int])
    truncated: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("prompt", "response", "chosen", "rejected"), 0)
    )
    appended_stop: int = 0
    unfinished: int = 0
    boundary_repaired: int = 0
    rewritten: int = 0
    special_in_prompt: int = 0
    duplicates: int = 0
    earlier_turns: int = 0
    shared_prompts: list[str] = field(default_factory=list[str])
    unprompted: list[str] = field(default_factory=list[str])
    rated: int = 0
    against: list[str] = field(default_factory=list[str])
    preferences: int = 0
    responses: int = 0
    lengths: dict[str, list[int]] = field(
        default_factory=lambda: {"prompt": [], "chosen": [], "rejected": [], "response": []}
    )
    unused_columns: dict[str, int] = field(default_factory=dict[str, int])
    empty: dict[str, int] = field(default_factory=dict[str, int])

    def drop(self, dropped: Dropped) -> None:
        assert dropped.reason in REASONS, dropped
        self.dropped[dropped.reason] = self.dropped.get(dropped.reason, 0) + 1
        shown = self.examples.setdefault(dropped.reason, [])
        if len(shown) < _NUM_EXAMPLES:
            shown.append((str(dropped.row), dropped.detail))

    def blank(self, responses: Collection[int]) -> None:
        """Counts a pair of which these are without a word: 0 is the chosen one, 1 the rejected."""
        which = " and ".join(("chosen", "rejected")[i] for i in sorted(responses))
        self.empty[which] = self.empty.get(which, 0) + 1

    def rate(self, agreed: Sequence[bool], row: RowId) -> None:
        """Counts preferences of the row of which scores say whether they are right."""
        self.rated += len(agreed)
        self.against += [str(row)] * (len(agreed) - sum(agreed))

    def unread(self, column: str) -> None:
        self.unused_columns[column] = self.unused_columns.get(column, 0) + 1

    def add(self, tree: Tree, notes: TreeNotes) -> None:
        """Counts what a used row's tree holds and what was done to it."""
        for reason in notes.left_out.values():
            assert reason in REASONS, reason
            self.left_out[reason] = self.left_out.get(reason, 0) + 1
        self.appended_stop += notes.num_appended
        self.unfinished += notes.num_unfinished
        self.boundary_repaired += notes.repaired
        self.rewritten += notes.num_rewritten
        self.special_in_prompt += notes.special_in_prompt
        self.preferences += len(tree.preferences)
        self.responses += len(tree.responses)
        sides = {
            "chosen": [p.chosen for p in tree.preferences],
            "rejected": [p.rejected for p in tree.preferences],
        }
        cut = {k for k, num in enumerate(notes.response_cut) if num}
        self.truncated["prompt"] += notes.prompt_cut > 0
        self.truncated["response"] += len(cut)
        self.lengths["prompt"].append(len(tree.prompt))
        for side, ks in sides.items():
            self.truncated[side] += sum(k in cut for k in ks)
            self.lengths[side] += [len(tree.responses[k]) for k in ks]
        if not tree.preferences:
            self.lengths["response"] += map(len, tree.responses)

    def check(self) -> Account:
        """The account itself, once read == used + dropped holds."""
        assert self.read == self.used + sum(self.dropped.values()), (self.read, self.used)
        return self

    def to_json(self) -> dict[str, Any]:
        """One set of account.json; lengths as percentiles, empty where there is nothing."""
        self.check()
        return {
            "read": self.read,
            "used": self.used,
            "dropped": dict(self.dropped),
            "examples": {
                reason: [list(e) for e in shown] for reason, shown in self.examples.items()
            },
            "left_out": dict(self.left_out),
            "truncated": dict(self.truncated),
            "appended_stop": self.appended_stop,
            "unfinished": self.unfinished,
            "boundary_repaired": self.boundary_repaired,
            "rewritten": self.rewritten,
            "special_in_prompt": self.special_in_prompt,
            "duplicates": self.duplicates,
            "earlier_turns": self.earlier_turns,
            "shared_prompts": len(self.shared_prompts),
            "unprompted": len(self.unprompted),
            "rated": self.rated,
            "against": len(self.against),
            "preferences": self.preferences,
            "responses": self.responses,
            "lengths": {side: percentiles(found) for side, found in self.lengths.items()},
            "unused_columns": dict(self.unused_columns),
        }


def percentiles(values: Sequence[int]) -> Mapping[str, int]:
    """p50, p90, p99 and max: the smallest value that so many percent do not exceed."""
    if not values:
        return {}
    ordered = sorted(values)
    found = {f"p{q}": ordered[math.ceil(q * len(ordered) / 100) - 1] for q in _PERCENTILES}
    return found | {"max": ordered[-1]}


def require_used(account: Account, what: str) -> None:
    """Raises DataError, with what became of the rows, where none is left to use.

    Where most rows fail at what a diagnosis is about, it is a Refusal.
    """
    if account.used:
        return
    lines = [
        f"  {num} x {reason}: {REASONS[reason]} ({row}: {detail})"
        for reason, num in sorted(account.dropped.items(), key=lambda x: -x[1])
        for row, detail in account.examples[reason][:1]
    ]
    said = "\n".join([f"{what}: none of {account.read} rows can be used.", *lines])
    most = max(account.dropped, key=lambda reason: account.dropped[reason], default="")
    code = {
        "boundary": "UW202",
        "stop_in_response": "UW203",
        "other_turns_in_response": "UW201",
    }.get(most)
    if code == "UW201":
        said = f"{said}\n{ONE_ANSWER}"
    raise Refusal(code, said) if code else DataError(said)
