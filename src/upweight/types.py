"""The nouns. Each stage of the house takes one of these and gives the next.

rows -> Example -> Tree -> Forest -> token log-probs -> PairLogps -> Step
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

Message = Mapping[str, Any]
"""One turn of a conversation as chat templates read it: {"role": ..., "content": ...}."""

Text = str | tuple[Message, ...]
"""Plain text, or a conversation."""


WAITING_DEVICES = {"cuda"}
"""Where operations are only begun, so that asking for a number waits for all that runs."""


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on `device`. A copy to a GPU is only begun: what runs there is not waited for, as it
    would be for memory that the system may move."""
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class RowId:
    """Where a row came from: the file as the user named it, and its line or row, from 1. `turn` is
    the number of the message that answers, where it is not a conversation's last."""

    source: str
    line: int
    turn: int | None = None

    def __str__(self) -> str:
        where = f"{self.source}:{self.line}"
        return where if self.turn is None else f"{where} (message {self.turn})"


@dataclass(frozen=True, slots=True)
class Response:
    """One answer to a prompt: plain text or the assistant's messages, and its score if it has one.

    A preference weighs its own weight times those of its two responses. `stopped` is False for
    text that was cut off before its end, such as a sample that met its limit: no stop token follows
    it.
    """

    content: Text
    score: float | None = None
    weight: float = 1.0
    stopped: bool = True


@dataclass(frozen=True, slots=True)
class Preference:
    """Response `chosen` is preferred to response `rejected` (indices into the responses).

    `margin` is how much better it is: what the row says, or the gap of its scores. `probability` is
    that of the label: how sure the row is that chosen is the better one (a soft label).
    """

    chosen: int
    rejected: int
    weight: float = 1.0
    margin: float = 0.0
    probability: float = 1.0


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt with K responses and the preferences among them, as text.

    `template_options` are extra variables of the chat template (such as enable_thinking), and
    `tools` are the tool definitions that the template renders.
    """

    prompt: Text
    responses: tuple[Response, ...]
    preferences: tuple[Preference, ...]
    row: RowId
    tools: tuple[Mapping[str, Any], ...] = ()
    template_options: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that is not used, and why: a short reason word for the account and a sentence."""

    row: RowId
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class ResponseId:
    """Response `index` of the row, in the row's own numbering."""

    row: RowId
    index: int


@dataclass(frozen=True, slots=True)
class Tree:
    """One prompt with K responses, as token ids: a trie of depth two.

    Every response's first token is predicted at the prompt's last token. `stopped[k]` says
    whether response k ends in its stop token (False when truncation cut it off, or the row says
    that it was). `ids` says which row each response came from: trees with equal prompts are
    merged, and the ledger still has to name the rows.
    """

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    preferences: tuple[Preference, ...]
    ids: tuple[ResponseId, ...]
    stopped: tuple[bool, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + sum(map(len, self.responses))


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
