"""The nouns. Each stage of the house takes one of these and gives the next.

rows -> Example -> Tree -> Forest -> token log-probs -> PairLogps -> Step
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from upweight.rows import (
    Dropped,
    Example,
    Message,
    Preference,
    Response,
    ResponseId,
    RowId,
    Text,
    Tree,
)

__all__ = [
    "Dropped",
    "Example",
    "Experience",
    "Forest",
    "Message",
    "PairLogps",
    "Preference",
    "Response",
    "ResponseId",
    "RowId",
    "Span",
    "Step",
    "Text",
    "Tree",
    "WAITING_DEVICES",
    "sent",
]

WAITING_DEVICES = {"cuda"}
"""Where operations are only begun, so that asking for a number waits for all that runs."""


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on `device`. A copy to a GPU is only begun: what runs there is not waited for, as it
    would be for memory that the system may move."""
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Span:
    """Where a tree lies in a forest: the prompt first, then its responses, without gaps."""

    start: int
    prompt: int
    responses: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + self.prompt + sum(self.responses)

    @property
    def depth(self) -> int:
        """Tokens of its longest sequence: the prompt and the longest response."""
        return self.prompt + max(self.responses, default=0)


@dataclass(frozen=True)
class Forest:
    """A batch: trees laid end to end, and a parent array that says what each token continues.

    parent[i] is the index of the token that token i continues, -1 at a root. Position is depth.
    A token attends to itself and its ancestors. The logits that predict token i live at
    parent[i]: a plain shift by one would read the logits of a sibling branch.

    `response_of` gives, for each scored token, the index of its response in the forest;
    `chosen` and `rejected` are such indices too. `flipped` is the probability that rejected is the
    better one, as the pair's row says.
    """

    token_ids: Int[Tensor, " tokens"]
    parent: Int[Tensor, " tokens"]
    position: Int[Tensor, " tokens"]
    scored: Int[Tensor, " scored"]
    response_of: Int[Tensor, " scored"]
    tokens_per_response: Int[Tensor, " responses"]
    chosen: Int[Tensor, " pairs"]
    rejected: Int[Tensor, " pairs"]
    weight: Float[Tensor, " pairs"]
    margin: Float[Tensor, " pairs"]
    flipped: Float[Tensor, " pairs"]
    spans: tuple[Span, ...]
    trees: tuple[Tree, ...]

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_responses(self) -> int:
        return self.tokens_per_response.shape[0]

    @property
    def num_pairs(self) -> int:
        return self.chosen.shape[0]

    @property
    def predicted_at(self) -> Int[Tensor, " scored"]:
        """The positions whose hidden state predicts each scored token."""
        return self.parent[self.scored]

    def to(self, device: torch.device | str) -> Forest:
        moved = {
            f.name: sent(getattr(self, f.name), device)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class PairLogps:
    """What a pair loss sees: summed log-probs in nats (fp32) and scored token counts, per pair, and
    the probability that the label is flipped (None: 0 for all)."""

    policy_chosen: Float[Tensor, " pairs"]
    policy_rejected: Float[Tensor, " pairs"]
    reference_chosen: Float[Tensor, " pairs"]
    reference_rejected: Float[Tensor, " pairs"]
    tokens_chosen: Int[Tensor, " pairs"]
    tokens_rejected: Int[Tensor, " pairs"]
    flipped: Float[Tensor, " pairs"] | None = None

    @property
    def chosen_logratio(self) -> Float[Tensor, " pairs"]:
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected_logratio(self) -> Float[Tensor, " pairs"]:
        return self.policy_rejected - self.reference_rejected

    @property
    def margin(self) -> Float[Tensor, " pairs"]:
        """log-ratio of chosen minus log-ratio of rejected, in nats; times beta: reward margin."""
        return self.chosen_logratio - self.rejected_logratio


@dataclass(frozen=True)
class Experience:
    """What is known of tokens that the policy drew, as it was then: in the order of forest.scored,
    fp32, in nats.

    `advantages` and `returns` are what the tokens turned out to be worth; `values` and `returns`
    are None where there is no value model.
    """

    logps: Float[Tensor, " scored"]
    reference_logps: Float[Tensor, " scored"]
    advantages: Float[Tensor, " scored"]
    values: Float[Tensor, " scored"] | None = None
    returns: Float[Tensor, " scored"] | None = None

    def to(self, device: torch.device | str) -> Experience:
        moved = {
            f.name: sent(value, device)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class Step:
    """What an objective makes of one forest: a sum, its count, metrics as (sum, count).

    Sums, never means: an optimizer step is made of several forests, on several ranks, and a mean
    of means is wrong when they hold different numbers of pairs.
    """

    loss_sum: Float[Tensor, ""]
    count: Float[Tensor, ""]
    metrics: Mapping[str, tuple[Float[Tensor, ""], Float[Tensor, ""]]]
