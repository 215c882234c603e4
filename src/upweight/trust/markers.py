"""What a chat template writes around texts, found inside of them: rows that were rendered before,
or that lost only a part of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from upweight.data.columns import texts_in
from upweight.data.render import Renderer, any_of
from upweight.trust.reread import turns_of, written
from upweight.types import Example, Message, Response, RowId

TOKENS = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "</s>", "<|system|>",
    "<|user|>", "<|assistant|>", "<|end|>", "<|eot|>", "<｜User｜>", "<｜Assistant｜>",
    "<｜end▁of▁sentence｜>",
)  # fmt: skip
"""Special tokens of the usual templates. To a tokenizer that does not have them they are text."""

WORDS = ("[INST]", "[/INST]", "<<SYS>>", "### Instruction:", "### Response:")
"""What is text to every tokenizer; transcripts beside it."""

_TRANSCRIPT = r"(?:\A|\n\n)(?:Human|Assistant):"

Held = dict[RowId, str]
"""Rows, with the first marker that each has."""


def specials_written(renderer: Renderer) -> re.Pattern[str]:
    """The special tokens that the chat template itself writes into every conversation."""
    blank = Example(({"role": "user", "content": "x"},), (), (), RowId("", 0))
    said = written(blank, Response(({"role": "assistant", "content": "x"},)), renderer) or ""
    return any_of(renderer.specials.findall(said))


def other_markers(renderer: Renderer) -> re.Pattern[str]:
    """What other models' templates write. Where text is used as it is, it may well be a transcript,
    or instructions under headings."""
    foreign = [token for token in TOKENS if not renderer.specials.fullmatch(token)]
    if renderer.template == "none":
        return any_of(foreign)
    return re.compile(f"{any_of([*foreign, *WORDS]).pattern}|{_TRANSCRIPT}")


def in_prompts(examples: Sequence[Example], pattern: re.Pattern[str]) -> Held:
    return _held(((e, turns_of(e.prompt, "user")) for e in examples), pattern)


def in_texts(examples: Sequence[Example], pattern: re.Pattern[str]) -> Held:
    """In prompts and responses."""
    answers = ((e, turns_of(r.content, "assistant")) for e in examples for r in e.responses)
    return in_prompts(examples, pattern) | _held(answers, pattern)


def _held(said: Iterator[tuple[Example, tuple[Message, ...]]], pattern: re.Pattern[str]) -> Held:
    found: Held = {}
    for example, turns in said:
        for text in texts_in([turn.get("content", "") for turn in turns]):
            if example.row not in found and (match := pattern.search(text)):
                found[example.row] = match.group().strip()
    return found
