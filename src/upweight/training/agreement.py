"""What the sampler says it drew tokens with, beside what the trainer says of the same tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.models.reference import explained
from upweight.training.round import ByResponse
from upweight.types import ResponseId

FEWEST = 30
"""Tokens from which on a standard error is trusted."""

SURE = 4.0
"""Standard errors: a run of 10,000 rounds meets one such by chance, and not the allowance beside
it."""


@dataclass(frozen=True)
class Beside:
    """One way to hold the two against each other: `found`, and what rounding explains, `allowed`.
    `said` is found in words."""

    said: str
    found: float
    allowed: float

    @property
    def beyond(self) -> float:
        """How many times what rounding explains."""
        return math.inf if math.isnan(self.found) else self.found / self.allowed

    @property
    def agrees(self) -> bool:
        return self.beyond <= 1


def held_against(
    found: ByResponse, said: Mapping[ResponseId, tuple[float, ...]], tolerance: float
) -> tuple[Beside, ...]:
    """The trainer's log-probs against the sampler's, in four ways.

    `tolerance` is the mean difference per token that rounding explains. In bf16, of which the
    allowances are made, a token's rounding is a few hundredths of a nat, 0.25 at the worst of
    1,400 tokens (SmolLM2-135M: a mean of 0.021, a standard deviation of 0.031), of either sign and
    nearly independent from token to token. So

    - a mean over n tokens is 0.02 to 0.05 and scatters by about that over sqrt(n): 0.1
      (1 + 4/sqrt(n)) holds it over all tokens, over the answers' last ones, which are the stops,
      and over any one answer. Rows that were mixed up stand out there, though they are few;
    - with its sign rounding averages out. What is left of it is -KL(sampler, trainer), half the
      variance of what rounding does, 0.0005 to 0.002 nats, which 0.005 holds. A sampler that leaves
      out a twentieth of the probability (top-p 0.95) is 0.05 above;
    - rounding does not know how likely its token was (0.0004 nats a nat there), a temperature T
      does: the difference then grows by 1 - 1/T for each nat of log-prob, 0.048 at T = 1.05, where
      0.01 is allowed.
    """
    gaps = {
        i: found[i].double() - torch.tensor(logps, dtype=torch.float64) for i, logps in said.items()
    }
    flat = torch.cat(list(gaps.values()))
    logps = torch.cat([found[i].double() for i in gaps])
    ends = torch.stack([gap[-1] for gap in gaps.values()])
    whole = {"tokens with": flat, "the last tokens of answers with": ends}
    alone = {i: f"answer {i.index} to {i.row} with" for i in gaps}
    made = (
        _largest(whole, tolerance),
        _largest({name: gaps[i] for i, name in alone.items()}, tolerance),
    )
    if len(flat) < FEWEST:
        return made
    lengths = torch.tensor([len(gap) for gap in gaps.values()])
    return (*made, _level(flat, lengths, tolerance), *_tilt(flat, logps, tolerance))


def _largest(gaps: Mapping[str, Tensor], tolerance: float) -> Beside:
    """Of these parts, by what was drawn, the one whose mean size is furthest beyond rounding."""

    def beside(what: str) -> Beside:
        gap = gaps[what].abs().mean().item()
        return Beside(
            f"the log-probs it drew {what} differ by {gap:.3g} nats a token from the trainer's",
            gap,
            explained(tolerance, len(gaps[what])),
        )

    return max(map(beside, gaps), key=lambda found: found.beyond)


def _level(gaps: Float[Tensor, " tokens"], lengths: Tensor, tolerance: float) -> Beside:
    mean = gaps.mean().item()
    apart = gaps - mean
    # Tokens of one answer may round alike: the larger of the two standard errors holds.
    answer = torch.arange(len(lengths)).repeat_interleave(lengths)
    sums = apart.new_zeros(len(lengths)).index_add(0, answer, apart)
    error = max(apart.square().sum().sqrt().item(), sums.square().sum().sqrt().item()) / len(gaps)
    return Beside(
        f"the log-probs it drew tokens with are on average {abs(mean):.3g} nats a token "
        f"{'below' if mean > 0 else 'above'} the trainer's",
        abs(mean),
        SURE * error + tolerance / 20,
    )


def _tilt(
    gaps: Float[Tensor, " tokens"], logps: Float[Tensor, " tokens"], tolerance: float
) -> tuple[Beside, ...]:
    """The least-squares slope of the difference by the log-prob; none where all are as likely."""
    across = logps - logps.mean()
    total = across.square().sum().item()
    if total == 0:
        return ()
    slope = (across * gaps).sum().item() / total
    rest = gaps - gaps.mean() - slope * across
    error = ((across * rest).square().sum().sqrt() / total).item()
    heat = f", as at a temperature of {1 / (1 - slope):.3g}" if slope < 1 else ""
    return (
        Beside(
            f"the log-probs it drew tokens with differ by {abs(slope):.3g} nats more from the "
            f"trainer's for each nat that a token is less likely{heat}",
            abs(slope),
            SURE * error + tolerance / 10,
        ),
    )
