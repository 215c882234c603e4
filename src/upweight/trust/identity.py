"""Whether the policy starts as its reference, and says the same thing twice."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from upweight.data.pack import collate
from upweight.errors import Refusal
from upweight.models.load import LanguageModel, evaluation_mode
from upweight.models.logprobs import token_logps
from upweight.models.reference import TOLERANCE_NATS, Reference, largest_difference
from upweight.trust.finding import Finding
from upweight.types import Tree

PROBES = 4
"""Trees that are asked: a fault of the start is in all of them."""


def starts_elsewhere(
    lm: LanguageModel, reference: Reference, trees: Sequence[Tree], *, named: bool
) -> Finding | None:
    """The policy, as it is trained, against the reference's log-probs on a few trees.

    Raises Refusal UW101 where they differ by more than rounding and the reference is meant to be
    the policy's start; a Finding where another was `named`.
    """
    with evaluation_mode(lm):
        worst, where = largest_difference(reference, lm, trees, PROBES)
    rounding = TOLERANCE_NATS[lm.compute_dtype]
    if worst <= rounding:
        return None
    said = (
        f"the policy does not start as its reference: {where} differs by {worst:.3g} nats per "
        f"token (rounding: {rounding}), so the first loss is not ln 2"
    )
    if named:
        return Finding("UW101", f"{said}. The reference was named; is another meant?")
    raise Refusal("UW101", f"{said}.")


def require_quiet(lm: LanguageModel, trees: Sequence[Tree]) -> None:
    """Two forward passes as in training must agree to the bit. Raises Refusal UW106."""
    for tree in trees[:1]:
        forest = collate([tree])
        with torch.no_grad():
            first, second = token_logps(lm, forest), token_logps(lm, forest)
        if not torch.equal(first, second):
            worst = (first - second).abs().max().item()
            raise Refusal(
                "UW106",
                f"{lm.name} says something else each time: two forward passes over "
                f"{tree.ids[0].row} differ by {worst:.3g} nats in a token. Dropout is on, or the "
                "model draws random numbers.",
            )
