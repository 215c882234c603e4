"""Which responses are preferred to which: stated by the row, or made from scores."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from upweight.rows import Dropped, Example, Preference, Text

Pairing = Literal["all", "adjacent", "extremes"]


def preferences_from_scores(
    scores: Sequence[float | int | None], pairing: Pairing, min_gap: float | int = 0.0
) -> tuple[Preference, ...]:
    """Which response is preferred to which, by scores that differ by strictly more than min_gap.

    all: every such pair. adjacent: each response against the best of those more than the gap below
    it (all of them where several tie). extremes: one pair, the best against the worst, the first
    of each where several tie. A response without a score (None) is in no preference. The margin of
    a preference is the gap of its scores.
    """
    scored = [(s, i) for i, s in enumerate(scores) if s is not None]

    def above(a: float | int, b: float | int) -> bool:
        # 0.8 - 0.6 is a little more than 0.2 in floating point; a gap of 0.2 means what it says.
        return a - b > min_gap and not math.isclose(a - b, min_gap, rel_tol=1e-9)

    if pairing == "extremes":
        if not scored:
            return ()
        best, worst = max(scored, key=lambda x: (x[0], -x[1])), min(scored)
        gap = float(best[0] - worst[0])
        made = (Preference(best[1], worst[1], margin=gap),)
        return made if above(best[0], worst[0]) else ()
    found: list[Preference] = []
    for score, i in scored:
        below = [(s, j) for s, j in scored if above(score, s)]
        if pairing == "adjacent" and below:
            top = max(s for s, _ in below)
            below = [(s, j) for s, j in below if s == top]
        found += [Preference(i, j, margin=float(score - s)) for s, j in below]
    return tuple(found)


def left_out(example: Example) -> dict[int, str]:
    """The responses that no preference may use, and why: empty, equal to an earlier one, or with
    turns inside that are not the assistant's, which would be learned with it."""
    reasons: dict[int, str] = {}
    for i, first in enumerate(_first_equal(example)):
        if is_empty(example.responses[i].content):
            reasons[i] = "empty_response"
        elif _other_turn(example.responses[i].content) is not None:
            reasons[i] = "other_turns_in_response"
        elif first != i:
            reasons[i] = "identical_responses"
    return reasons


def with_preferences(
    example: Example, pairing: Pairing, min_gap: float | int, *, of_usable: bool = True
) -> Example:
    """The example with its preferences: those it states, or else those that its scores make.

    None of them uses a response of `left_out`, unless preferences between all responses are wanted
    (`of_usable` False). What is stated about a copy is said of the first of its kind instead. Each
    weighs what was stated times the weights of its two responses.
    """
    out = left_out(example) if of_usable else {}
    answers = example.responses
    if example.preferences:
        first = _first_equal(example)
        moved = (
            replace(p, chosen=first[p.chosen], rejected=first[p.rejected])
            for p in example.preferences
        )
        kept = (p for p in moved if p.chosen != p.rejected)
        made = tuple(p for p in kept if p.chosen not in out and p.rejected not in out)
    else:
        scores = [None if i in out else a.score for i, a in enumerate(answers)]
        made = preferences_from_scores(scores, pairing, min_gap)
    weighted = (
        replace(p, weight=p.weight * answers[p.chosen].weight * answers[p.rejected].weight)
        for p in made
    )
    return replace(example, preferences=tuple(weighted))


def by_scores(example: Example) -> list[bool]:
    """Whether the scores say so too, of each preference whose two responses have unequal ones."""
    scores = [answer.score for answer in example.responses]
    pairs = [(scores[p.chosen], scores[p.rejected]) for p in example.preferences]
    return [a > b for a, b in pairs if a is not None and b is not None and a != b]


def weights_inside(example: Example) -> list[str]:
    """The columns whose entries have weights of their own, other than 1."""
    weights = [answer.weight for answer in example.responses]
    stated = any(p.weight != weights[p.chosen] * weights[p.rejected] for p in example.preferences)
    found = {"responses.weight": any(w != 1 for w in weights), "preferences.weight": stated}
    return [name for name, there in found.items() if there]


def unusable(
    example: Example, *, require_preferences: bool, states: bool = False
) -> Dropped | None:
    """Why nothing can be learned from the example, or None. `states`: the row says itself what is
    preferred, be it nothing."""
    out = left_out(example)
    num_usable = len(example.responses) - len(out)
    if example.preferences if require_preferences else num_usable:
        return None
    if num_usable < 2 and out:
        reason = next(reason for reason in _WORST if reason in out.values())
        if reason == "other_turns_in_response":
            return Dropped(example.row, reason, said_other(example, out))
        shown = " | ".join(clipped(a.content) for a in example.responses[:3])
        return Dropped(example.row, reason, shown)
    if states:
        return Dropped(example.row, "no_preference", "preferences is an empty list")
    scores = [a.score for a in example.responses]
    num_scored = sum(s is not None for s in scores)
    if num_scored > 1:
        detail = f"no two scores differ by more than the gap: {clipped(scores)}"
        return Dropped(example.row, "no_preference", detail)
    detail = f"responses: {len(scores)}, {num_scored or 'none'} with a score, and no preferences"
    if len(scores) == 1:
        detail = "one response and nothing to prefer it to; objective sft learns from such rows"
    return Dropped(example.row, "unlabelled", detail)


_WORST = ("other_turns_in_response", "empty_response", "identical_responses")
"""Of several reasons the one that a row is dropped for."""


def _other_turn(content: Text) -> int | None:
    """The place of the first turn that is not the assistant's."""
    turns = () if isinstance(content, str) else content
    return next((i for i, turn in enumerate(turns) if turn["role"] != "assistant"), None)


def said_other(example: Example, out: Mapping[int, str]) -> str:
    i = next(i for i, reason in out.items() if reason == "other_turns_in_response")
    turns, at = example.responses[i].content, _other_turn(example.responses[i].content)
    assert isinstance(turns, tuple) and at is not None
    where = f"message {at + 1} of {len(turns)} after the prompt"
    return f"response {i} holds a {clipped(turns[at]['role'])[1:-1]} turn ({where})"


def is_empty(content: Text) -> bool:
    """No word, no tool call, no thought in any message: nothing, or white space."""
    if isinstance(content, str):
        return not content.strip()
    said = ("content", "tool_calls", *THOUGHTS)
    return all(is_blank(turn.get(key)) for turn in content for key in said)


THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""The keys of a message under which templates look for what the assistant thought."""


def clipped(content: Any, length: int = 60) -> str:
    """The beginning of a text or conversation in ASCII, for a line of the account."""
    text = content if isinstance(content, str) else json.dumps(content, default=str)
    return ascii(text if len(text) <= length else text[: length - 3] + "...")


def _first_equal(example: Example) -> list[int]:
    """For each response the index of the first that is equal to it."""
    first: dict[str, int] = {}
    keys = (json.dumps(a.content, sort_keys=True, default=str) for a in example.responses)
    return [first.setdefault(key, i) for i, key in enumerate(keys)]


def is_blank(value: Any) -> bool:
    return not value or (isinstance(value, str) and not value.strip())
