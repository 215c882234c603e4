"""What the reference's log-probs say against the rows, before step 1."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from upweight.models.load import LanguageModel
from upweight.models.reference import Reference
from upweight.models.sample import sample
from upweight.stats import Interval, accuracy_interval, mean_interval
from upweight.trust.finding import Finding
from upweight.trust.preflight import Examined, Figures, Seen, longer, settle
from upweight.types import Preference, Tree

OWN_ANSWERS = 8
OWN_TOKENS = 24
"""Enough for a mean that is known to half a nat: one answer's differs from another's by about a
nat, and data that are far from a model lie several below it."""


def own_nats(
    reference: LanguageModel, trees: Sequence[Tree], stop_ids: Collection[int], seed: int
) -> Interval:
    """What the model gives a token of its own text: the mean log-prob in nats, as it was drawn,
    over its answers to a few of the prompts at temperature 1."""
    prompts = spread(list(dict.fromkeys(tree.prompt for tree in trees)), OWN_ANSWERS)
    drawn = sample(
        reference, prompts, max_new_tokens=OWN_TOKENS, seed=seed, stop_token_ids=stop_ids
    )
    means = [sum(answer.logps) / len(answer.logps) for answers in drawn for answer in answers]
    return mean_interval(means, num_resamples=500)


T = TypeVar("T")


def spread(things: Sequence[T], num: int) -> list[T]:
    """`num` of them, evenly spaced; all where there are no more."""
    if len(things) <= num:
        return list(things)
    return [things[i * len(things) // num] for i in range(num)]


@dataclass(frozen=True)
class Asked:
    """A preference under the reference: the mean log-prob per token of either response, in nats."""

    tree: Tree
    preference: Preference
    chosen: float
    rejected: float

    @property
    def row(self) -> str:
        return str(self.tree.ids[self.preference.chosen].row)


def by_reference(
    examined: Examined, reference: Reference, own: Interval
) -> tuple[Figures, list[Finding]]:
    """What the reference says of the preferences that it was asked about, all of them or a few."""
    unknown = set(map(id, reference.missing(examined.trees)))
    asked = [
        Asked(tree, p, *(_mean(reference, tree, k) for k in (p.chosen, p.rejected)))
        for tree, p in examined.preferences()
        if id(tree) not in unknown
    ]
    return settle([swapped(examined, asked), improbable(examined, asked, own)])


def _mean(reference: Reference, tree: Tree, response: int) -> float:
    return float(np.mean(reference.token_logps(tree, response)))


def swapped(examined: Examined, asked: Sequence[Asked]) -> Seen:
    """The reference finds the rejected responses likelier, token by token, nearly always; or the
    rejected ones are nearly always longer, and the reference does not say that this is right.

    Data are collected because a model does not prefer as people do, so a share below one half is
    common; one that is far below is what swapped columns look like. People and judges, asked which
    of two answers is better, mostly take the longer one.
    """
    limit = examined.limits.swapped
    figures: Figures = {}
    agrees = False
    if asked:
        found = accuracy_interval(
            [one.chosen - one.rejected for one in asked], [one.tree.prompt for one in asked]
        )
        figures["likelier"] = found
        agrees = found.low > 0.5
        if found.high < limit:
            worst = sorted(asked, key=lambda one: one.chosen - one.rejected)
            said = "the reference finds the chosen response likelier by the token"
            rows = [one.row for one in worst]
            return Seen(figures, _swapped(examined, said, found, rows, _BY_REFERENCE))
    measured = longer(examined)
    if measured is None or agrees or not measured.high < limit:
        return Seen(figures)
    by_length = sorted(
        (len(tree.responses[p.chosen]) - len(tree.responses[p.rejected]), i, tree, p)
        for i, (tree, p) in enumerate(examined.preferences())
    )
    rows = [str(tree.ids[p.chosen].row) for _, _, tree, p in by_length]
    said = "the longer response is the chosen one"
    return Seen(figures, _swapped(examined, said, measured, rows, _BY_LENGTH))


_BY_REFERENCE = "What people chose may well be what this model would not write."
_BY_LENGTH = (
    "This is a guess from their lengths alone: people and judges mostly take the longer answer, "
    "and where short ones were wanted it says nothing."
)


def _swapped(
    examined: Examined, said: str, found: Interval, rows: Sequence[str], doubt: str
) -> Finding:
    return Finding(
        "UW207",
        f"{examined.name}: {said} in only {found.value:.0%} of preferences [{found.low:.0%}, "
        f"{found.high:.0%}] (preflight.swapped is {examined.limits.swapped:.0%}): chosen and "
        f"rejected may be swapped. {doubt} Read a few rows: if the rejected response is mostly the "
        "better one, they are.",
        tuple(dict.fromkeys(rows))[:5],
    )


def improbable(examined: Examined, asked: Sequence[Asked], own: Interval) -> Seen:
    """Both responses are texts that the reference would not write."""
    if not asked:
        return Seen()
    best = [max(one.chosen, one.rejected) for one in asked]
    found = mean_interval(best, [one.tree.prompt for one in asked], num_resamples=500)
    figures: Figures = {"data_nats": found, "own_nats": own}
    limit = examined.limits.improbable
    if not own.low - found.high > limit:
        return Seen(figures)
    worst = sorted(asked, key=lambda one: max(one.chosen, one.rejected))
    return Seen(
        figures,
        Finding(
            "UW212",
            f"{examined.name}: the likelier response of a preference has {found.value:.2f} nats a "
            f"token under the reference [{found.low:.2f}, {found.high:.2f}], and what it writes "
            f"itself has {own.value:.2f} [{own.low:.2f}, {own.high:.2f}] (preflight.improbable is "
            f"{limit}): the data are far from anything that this model says.",
            tuple(dict.fromkeys(one.row for one in worst))[:5],
        ),
    )
