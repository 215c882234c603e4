"""What the rows themselves say against training on them, before step 1.

An examination is a pure function of one set's trees and account: it gives what it found, or
nothing. The page of a code says whether it warns or refuses.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from upweight.config import Preflight
from upweight.data.account import Account
from upweight.errors import Refusal
from upweight.models.reference import Reference
from upweight.stats import Interval, accuracy_interval
from upweight.trust.codes import page
from upweight.trust.finding import Finding
from upweight.trust.words import Compared, count_words
from upweight.types import Preference, Tree

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Examined:
    """One set, and from when on a suspicion is reported."""

    name: str
    trees: Sequence[Tree]
    account: Account
    limits: Preflight

    def preferences(self) -> Iterator[tuple[Tree, Preference]]:
        for tree in self.trees:
            for preference in tree.preferences:
                yield tree, preference


def examine(examined: Examined) -> list[Finding]:
    """What the examinations warn of, in the order of their codes. Raises Refusal for what they
    refuse."""
    asked = (examination(examined) for examination in EXAMINATIONS)
    found = [finding for finding in asked if finding is not None]
    for finding in found:
        if page(finding.code).severity == "refuses":
            raise Refusal(finding.code, finding.sentence)
    return found


def cut(examined: Examined) -> Finding | None:
    """So many responses lost their end, or did not fit, that what is learned is length."""
    account, limit = examined.account, examined.limits.cut
    shares = {
        f"{side} responses cut": account.truncated[side] / max(1, account.preferences)
        for side in ("chosen", "rejected")
    }
    shares["rows dropped as too long"] = account.dropped.get("too_long", 0) / max(1, account.read)
    high = {what: share for what, share in shares.items() if share > limit}
    if not high:
        return None
    said = ", ".join(f"{share:.0%} of {what}" for what, share in high.items())
    return Finding("UW205", f"{examined.name}: {said} (preflight.cut is {limit:.0%}).")


def contradictory(examined: Examined) -> Finding | None:
    """Preferences of one prompt that go round in a circle, of two or of more."""
    by_prompt: dict[Ids, list[Tree]] = defaultdict(list)
    for tree in examined.trees:
        by_prompt[tree.prompt].append(tree)
    rows: list[str] = []
    total = 0
    for trees in by_prompt.values():
        total += sum(len(tree.preferences) for tree in trees)
        # The scores of one row cannot contradict themselves.
        if len(trees) > 1:
            edges = [
                (t.responses[p.chosen], t.responses[p.rejected], _row(t, p.chosen))
                for t in trees
                for p in t.preferences
            ]
            rows += [edges[i][2] for i in sorted(_in_circles([edge[:2] for edge in edges]))]
    limit = examined.limits.contradictory
    if not rows or len(rows) <= limit * total:
        return None
    return Finding(
        "UW210",
        f"{examined.name}: {len(rows)} of {total} preferences contradict each other: the same "
        f"responses in both orders, or in a circle (preflight.contradictory is {limit:.0%}).",
        tuple(dict.fromkeys(rows))[:6],
    )


def _in_circles(edges: Sequence[tuple[Ids, Ids]]) -> set[int]:
    """The edges that stay when those that begin where none ends, or end where none begins, are
    taken away until there is none: they lie on circles, or between two."""
    left = set(range(len(edges)))
    while True:
        begins, ends = {edges[i][0] for i in left}, {edges[i][1] for i in left}
        gone = {i for i in left if edges[i][0] not in ends or edges[i][1] not in begins}
        if not gone:
            return left
        left -= gone


def repeated(examined: Examined) -> Finding | None:
    """Rows that say what an earlier row said weigh twice."""
    account, limit = examined.account, examined.limits.repeated
    if account.duplicates <= limit * account.read:
        return None
    return Finding(
        "UW210",
        f"{examined.name}: {account.duplicates} of {account.read} rows repeat an earlier one, and "
        f"weigh again (preflight.repeated is {limit:.0%}).",
    )


def by_length(examined: Examined) -> Finding | None:
    """Taking the longer response, or the shorter one, is nearly always right."""
    if not any(tree.preferences for tree in examined.trees):
        return None
    margins = [
        len(tree.responses[p.chosen]) - len(tree.responses[p.rejected])
        for tree, p in examined.preferences()
    ]
    found = accuracy_interval(margins, [tree.prompt for tree, _ in examined.preferences()])
    longer = found.value >= 0.5
    if not longer:
        found = Interval(1 - found.value, 1 - found.high, 1 - found.low)
    rule = f"the {'longer' if longer else 'shorter'} response is the chosen one"
    return _shortcut(examined, rule, found)


def by_words(examined: Examined) -> Finding | None:
    """The words alone, whatever the prompt, tell chosen from rejected.

    A naive Bayes classifier over tokens, asked about prompts that it has not counted.
    """
    compared = [
        Compared(tree.prompt, tree.responses[p.chosen], tree.responses[p.rejected])
        for tree, p in examined.preferences()
    ]
    words = count_words(compared)
    if words is None:
        return None
    margins = words.margins(compared).tolist()
    found = accuracy_interval(margins, [tree.prompt for tree, _ in examined.preferences()])
    return _shortcut(examined, "a count of words that knows no prompt finds the chosen one", found)


def _shortcut(examined: Examined, rule: str, found: Interval) -> Finding | None:
    limit = examined.limits.shortcut
    if not found.low > limit:
        return None
    return Finding(
        "UW211",
        f"{examined.name}: {rule} in {found.value:.0%} of preferences [{found.low:.0%}, "
        f"{found.high:.0%}] (preflight.shortcut is {limit:.0%}): accuracy will not show that more "
        "than that was learned.",
    )


EXAMINATIONS: tuple[Callable[[Examined], Finding | None], ...] = (
    cut,
    contradictory,
    repeated,
    by_length,
    by_words,
)


def swapped(examined: Examined, reference: Reference) -> Finding | None:
    """The reference finds the rejected responses likelier, token by token, nearly always.

    Data are collected because a model does not prefer as people do, so a share below one half is
    common; one that is far below is what swapped columns look like.
    """
    margins: list[float] = []
    rows: list[str] = []
    for tree, preference in examined.preferences():
        chosen, rejected = (
            float(np.mean(reference.token_logps(tree, k)))
            for k in (preference.chosen, preference.rejected)
        )
        margins.append(chosen - rejected)
        rows.append(_row(tree, preference.chosen))
    if not margins:
        return None
    found = accuracy_interval(margins, [tree.prompt for tree, _ in examined.preferences()])
    limit = examined.limits.swapped
    if not found.high < limit:
        return None
    worst = [row for _, row in sorted(zip(margins, rows, strict=True))]
    return Finding(
        "UW207",
        f"{examined.name}: the reference finds the chosen response likelier by the token in only "
        f"{found.value:.0%} of preferences [{found.low:.0%}, {found.high:.0%}] (preflight.swapped "
        f"is {limit:.0%}): chosen and rejected may be swapped. Read these.",
        tuple(dict.fromkeys(worst))[:5],
    )


def _row(tree: Tree, response: int) -> str:
    return str(tree.ids[response].row)
