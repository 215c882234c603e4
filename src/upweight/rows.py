"""The nouns of a row, from its text to its token ids. Imports no torch, so that rows can be read
before it is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]
"""One turn of a conversation as chat templates read it: {"role": ..., "content": ...}."""

Text = str | tuple[Message, ...]
"""Plain text, or a conversation."""


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
