"""Whether the model says of a row what it says of the row alone, says it twice, and starts as its
reference: asked on a few of the rows themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from upweight.data.pack import collate, unshared
from upweight.errors import Refusal
from upweight.models.finite import finite
from upweight.models.load import LanguageModel, evaluation_mode
from upweight.models.logprobs import token_logps
from upweight.models.proof import TOLERANCE_NATS as ROUNDING_NATS
from upweight.models.proof import exact_dtype
from upweight.models.reference import Reference, largest_difference
from upweight.models.sample import first_logps
from upweight.stats import Interval
from upweight.trust.finding import Finding
from upweight.trust.preflight import Seen
from upweight.types import Forest, Tree

PROBES = 4
"""Trees that are asked: a fault of the start is in all of them."""

TOGETHER = 3
TOKENS_TOGETHER = 512
"""Trees that are computed together and alone, and their tokens alone: enough to have neighbours on
either side, and seconds on a CPU."""


def computed_together(trees: Sequence[Tree]) -> list[Tree]:
    """What `require_alone` is asked about: trees spread over the lengths that fit, else the
    shortest two, each with its first two responses."""
    small = [
        replace(tree, responses=tree.responses[:2], preferences=(), ids=tree.ids[:2],
                stopped=tree.stopped[:2])
        for tree in trees
    ]  # fmt: skip
    small.sort(key=_tokens_alone)
    fitting = [tree for tree in small if TOGETHER * _tokens_alone(tree) <= TOKENS_TOGETHER]
    if len(fitting) < 2:
        return small[:2]
    last = len(fitting) - 1
    return [fitting[i] for i in sorted({last * k // (TOGETHER - 1) for k in range(TOGETHER)})]


def _tokens_alone(tree: Tree) -> int:
    return sum(len(tree.prompt) + len(response) for response in tree.responses)


def require_alone(lm: LanguageModel, trees: Sequence[Tree]) -> float:
    """The largest difference, in nats, between a token's log-prob in a row that is computed with
    others, as training and sampling do it, and in the row alone. Raises Refusal UW301.

    In the dtype that the model's attention was proved in, and with the same tolerance: a score's
    rounding does not depend on how many are averaged, so rows that are longer than the proof's
    need no more.
    """
    exact = replace(lm, compute_dtype=exact_dtype(lm, lm.plan))
    alone = replace(exact, plan=replace(lm.plan, shared=False))
    forest = collate(trees)
    rows = unshared(forest).trees
    with torch.no_grad(), evaluation_mode(lm):
        truth = [finite(token_logps, alone)(collate([row])).cpu() for row in rows]
        packed = token_logps(exact, forest).cpu().split(forest.tokens_per_response.tolist())
        worst = _worst("packed with others", rows, packed, truth, exact.compute_dtype)
        depth = lm.plan.exact_depth
        if not lm.plan.shared or (depth is not None and int(forest.position.max()) >= depth):
            # Such families are sampled by transformers, padding included; and where length changes
            # the position scaling, a batch of samples has its longest row's.
            return worst
        first = [0, *accumulate(len(tree.responses) for tree in trees)][:-1]
        padded = first_logps(exact, [(rows[i].prompt, rows[i].responses[0][0]) for i in first])
    return max(
        worst,
        _worst(
            "padded, as sampling does it,",
            [rows[i] for i in first],
            list(padded.cpu()[:, None]),
            [truth[i][:1] for i in first],
            exact.compute_dtype,
        ),
    )


def _worst(
    way: str,
    rows: Sequence[Tree],
    found: Sequence[Tensor],
    truth: Sequence[Tensor],
    dtype: torch.dtype,
) -> float:
    """The largest difference. Raises Refusal UW301 where it is more than rounding."""
    off = [(a - b).abs().max().item() for a, b in zip(found, truth, strict=True)]
    for row, difference in zip(rows, off, strict=True):
        if not difference <= ROUNDING_NATS[dtype]:
            raise Refusal(
                "UW301",
                f"{row.ids[0].row} says something else {way} than alone: a token's log-prob "
                f"differs by {difference:.3g} nats (rounding: {ROUNDING_NATS[dtype]}).",
            )
    return max(off)


def starts_elsewhere(
    lm: LanguageModel, reference: Reference, trees: Sequence[Tree], so: str, *, named: bool
) -> Seen:
    """The policy, as it is trained, against the reference's log-probs on a few trees; `so` is what
    a difference does to the first step.

    Raises Refusal UW101 where they differ by more than rounding and the reference is meant to be
    the policy's start; a finding where another was `named`.
    """
    with evaluation_mode(lm):
        largest = largest_difference(reference, lm, trees, PROBES)
    figures = {"start_nats": Interval(largest.found, largest.found, largest.found)}
    if largest.is_rounding:
        return Seen(figures)
    said = (
        f"the policy does not start as its reference: {largest.row} differs by "
        f"{largest.found:.3g} nats per token (rounding: {largest.allowed:.2g}), so {so}"
    )
    if named:
        said = f"{said}. The reference was named; is another meant?"
        return Seen(figures, Finding("UW101", said))
    raise Refusal("UW101", f"{said}.")


def require_quiet(
    lm: LanguageModel,
    tree: Tree,
    forward: Callable[[LanguageModel, Forest], Tensor] = token_logps,
) -> None:
    """Two passes `forward` as in training must agree to the bit. Raises Refusal UW106.

    Of a prompt alone its own beginning stands for the answer that is yet to be drawn.
    """
    if not tree.responses:
        tree = replace(tree, responses=(tree.prompt[:TOGETHER],), stopped=(False,))
    forest = collate([tree])
    with torch.no_grad():
        first, second = finite(forward, lm)(forest), forward(lm, forest)
    if not torch.equal(first, second):
        worst = (first - second).abs().max().item()
        what = "nats in a token" if forward is token_logps else "in a score"
        raise Refusal(
            "UW106",
            f"{lm.name} says something else each time: two forward passes over "
            f"{tree.ids[0].row} differ by {worst:.3g} {what}. Dropout is on, or the model draws "
            "random numbers.",
        )
