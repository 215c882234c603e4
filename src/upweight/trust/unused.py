"""Rows that do not become tokens: each has a reason, and what is left must still be like all."""

from __future__ import annotations

from collections.abc import Mapping

from upweight.config import Preflight
from upweight.data.account import REASONS, Account
from upweight.trust.finding import Finding, Refused

_SAY_NOTHING = ("no_preference", "not_chosen")
"""Reasons that are what a row says, and no fault of it."""

_OWN_LIMITS = {
    "too_long": "cut", "identical_responses": "identical", "empty_response": "empty",
    **dict.fromkeys(("boundary", "stop_in_response", "other_turns_in_response"), "spans"),
}  # fmt: skip
"""Reasons with a key of their own, and that key."""

_MOST = 0.5


def accounted(name: str, account: Account, num_trees: int) -> list[Finding]:
    """Every row that was read is a tree, or dropped for a reason."""
    num = sum(account.dropped.values())
    if account.read == num_trees + num:
        return []
    said = f"{account.read} rows were read, {num_trees} became tokens and {num} were dropped for a "
    return [Refused("UW208", f"{name}: {said}reason.")]


def dropped(name: str, account: Account, limits: Preflight) -> list[Finding]:
    """So many rows are not used that the others need not be like all of them.

    Not counted again: a reason of which its own key permits more, or that is reported under its own
    code. Rows that prefer no response have nothing to teach, and some data are full of them; where
    most are such, what was meant to prefer one may not have been read.
    """
    lost: dict[str, int] = {}
    for reason, num in account.dropped.items():
        own = _OWN_LIMITS.get(reason)
        limit = limits.dropped if own is None else getattr(limits, own)
        if own is None or (num <= limit * account.read and limit <= limits.dropped):
            lost[reason] = num
    faulty = {reason: num for reason, num in lost.items() if reason not in _SAY_NOTHING}
    if sum(faulty.values()) > limits.dropped * account.read:
        found = _many(name, account, limits, faulty)
        return [Refused(found.code, found.said, found.rows)]
    if sum(lost.values()) > max(_MOST, limits.dropped) * account.read:
        return [_many(name, account, limits, lost)]
    return []


def _many(name: str, account: Account, limits: Preflight, lost: Mapping[str, int]) -> Finding:
    order = sorted(lost, key=lambda reason: -lost[reason])
    causes: list[str] = []
    for reason in order:
        row, detail = account.examples[reason][0]
        causes.append(f"{lost[reason]} x {reason}: {REASONS[reason]} ({row}: {detail})")
    said = (
        f"{name}: {sum(lost.values())} of {account.read} rows are not used (preflight.dropped is "
        f"{limits.dropped:.0%}): {'; '.join(causes)}."
    )
    return Finding("UW208", said, tuple(row for row, _ in account.examples[order[0]]))
