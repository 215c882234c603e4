"""One row's tokens against its text: decoded, and tokenized again as serving does it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeGuard, cast

from upweight.data.preferences import THOUGHTS, is_blank
from upweight.data.render import TEMPLATE_ERRORS, Renderer
from upweight.types import Example, Message, Response, RowId, Tree

Ids = tuple[int, ...]
Kind = Literal["span", "prompt", "rewritten", "unwritten", "unsaid"]
"""What is not as the row has it: the scored tokens, the prompt's tokens, a response's text because
of the chat template, or because of the tokenizer, or what the prompt says."""

_THOUGHTS = re.compile(r"<(think|thinking|thought|reasoning)>.*?</\1>|^.*</think>", re.DOTALL)
"""What templates take out of the assistant's earlier turns, as serving does."""


_OPENED = re.compile(r"<(?:think|thinking|thought|reasoning)>\s*\Z")
"""What a generation prompt may end in. A response that begins with it goes on from there."""

_OPENING_IDS = 32
"""As many tokens as such an end may have, a byte each."""

_BESIDE_CONTENT = ("tool_calls", *THOUGHTS)


@dataclass(frozen=True, slots=True)
class Odd:
    """A row whose tokens are not as it says, and in what. `stands_for` is how many rows it speaks
    for where only some were asked."""

    row: RowId
    kind: Kind
    detail: str
    stands_for: float = 1.0


def plainly_says(span: str, response: Response, renderer: Renderer) -> bool:
    """Whether the span is the response's text and no more than header and stop beside it."""
    content = response.content
    if not isinstance(content, str):
        if len(content) != 1 or any(not is_blank(content[0].get(k)) for k in _BESIDE_CONTENT):
            return False
        content = str(content[0].get("content", ""))
    body = renderer.stops.sub("", span).strip().removeprefix(renderer.header.strip())
    if body.strip() == content.strip():
        return content != ""
    return _letters(content) != "" and _letters(content) == _letters(body)


def again(example: Example, tree: Tree, renderer: Renderer) -> Odd | None:
    """Tokenizes one row as serving does, and says what is not as in the tree."""
    alone = served(example, None, renderer)
    base = _base(alone, tree.prompt, renderer)
    if base is None:
        first = alone[: len(tree.prompt)] == tree.prompt
        return Odd(example.row, *(_SCORED_PROMPT if first else _OTHER_PROMPT))
    (end,) = decode([tree.prompt[-_OPENING_IDS:]], renderer)
    opened = found.group().strip() if (found := _OPENED.search(end)) else ""
    for ids, stopped, of in zip(tree.responses, tree.stopped, tree.ids, strict=True):
        response = example.responses[of.index]
        whole = served(example, response, renderer)
        if whole[: len(base)] != base:
            return Odd(example.row, *_OTHER_PROMPT)
        rest = whole[len(base) :]
        # Where the template writes no stop one was appended, and the text before it may end in
        # white space that the template joins with its own.
        same = rest[: len(ids)] == ids
        if (stopped or not response.stopped) and renderer.stop_ids.isdisjoint(rest):
            own = ids[:-1] if stopped else ids
            text, body = (t.strip() for t in decode([rest, own], renderer))
            same = same or text.removesuffix((renderer.after or "").strip()).rstrip() == body
        if not same:
            return Odd(example.row, "span", f"response {of.index} is scored on {_OTHER_TOKENS}")
        odd = _text_lost(example, response, ids, renderer, opened) if stopped else None
        if odd is not None:
            return odd
    return None


_SCORED_PROMPT: tuple[Kind, str] = ("span", "the prompt's last tokens are scored as a response.")
_OTHER_TOKENS = "other tokens than those that prompt and response have as one text."
_OTHER_PROMPT: tuple[Kind, str] = (
    "prompt",
    "the prompt's tokens are not those that serving gives the model, alone or with a response.",
)


def _base(alone: Ids, prompt: Ids, renderer: Renderer) -> Ids | None:
    """Serving's prompt up to where the tree's ends: all of it, or all but white space. None if the
    tree's is another one. One that was cut has lost its beginning."""
    cut = renderer.truncation == "prompt" and len(prompt) < len(alone)
    body = prompt[1:] if cut and prompt[:1] == (renderer.bos,) else prompt
    for end in range(len(alone), -1, -1):
        kept = alone[:end]
        if kept == prompt or (cut and body and kept[-len(body) :] == body):
            return kept
        (rest,) = decode([alone[max(0, end - 1) :]], renderer)
        if rest.strip():
            break
    # Where all of the prompt is white space, beginning-of-text stands for it.
    (text,) = decode([alone], renderer)
    return () if prompt == (renderer.bos,) and not text.strip() else None


def _text_lost(
    example: Example, response: Response, ids: Ids, renderer: Renderer, opened: str
) -> Odd | None:
    """`opened`: what the prompt has of the response already, a thought's beginning."""
    (span,) = map(_letters, decode([ids], renderer))
    if call := _unwritten_call(example, response, renderer):
        return Odd(example.row, "rewritten", call)
    turns = turns_of(response.content, "assistant")
    if thought := _unwritten_thought(example, response, renderer):
        return Odd(example.row, "rewritten", thought)
    # Of earlier answers' thoughts templates write none, and serving shows none.
    last = [turns[-1].get(key) for key in THOUGHTS]
    for content in [*(str(turn.get("content", "")) for turn in turns), *last]:
        if not isinstance(content, str):
            continue
        letters = _letters(content)
        if letters in span or _letters(content.lstrip().removeprefix(opened)) in span:
            continue
        near = ascii(content[:60])
        if letters not in _letters(_written(example, response, renderer)):
            return Odd(example.row, "rewritten", near)
        encoded = renderer.tokenizer(content, add_special_tokens=False)["input_ids"]
        (back,) = map(_letters, decode([tuple(cast("list[int]", encoded))], renderer))
        if letters not in back:
            return Odd(example.row, "unwritten", near)
        return Odd(example.row, "span", f"the scored tokens do not say {near}.")
    return None


def unsaid(example: Example, renderer: Renderer) -> Odd | None:
    """What the chat template leaves out of the prompt: a turn's text or a part of it, a tool, or a
    tool call."""
    if renderer.template == "none":
        return Odd(example.row, "unsaid", _TOOLS_UNREAD) if example.tools else None
    whole = str(_apply(example, None, renderer, tokenize=False))
    text = _letters(whole)
    for turn in turns_of(example.prompt, "user"):
        content = str(turn.get("content", ""))
        if turn["role"] == "assistant":
            content = _THOUGHTS.sub("", content)
        if not _is_in(content, text):
            return Odd(example.row, "unsaid", f"the {turn['role']} turn {ascii(content[:60])}")
    if example.tools and whole == written(replace(example, tools=()), None, renderer):
        return Odd(example.row, "unsaid", _TOOLS_UNREAD)
    for tool in example.tools:
        if _letters(_name(tool)) not in text:
            return Odd(example.row, "unsaid", f"the tool {ascii(_name(tool))}")
    call = _unwritten_call(example, None, renderer)
    return Odd(example.row, "unsaid", call) if call else None


_TOOLS_UNREAD = "the tools, which it does not read"


def _is_in(content: str, text: str) -> bool:
    """Whether the letters of all of it are there: in one piece, or word by word, as where line
    breaks are written as in JSON."""
    return _letters(content) in text or all(_letters(word) in text for word in content.split())


def _unwritten_call(example: Example, response: Response | None, renderer: Renderer) -> str | None:
    """The first tool call, of the response or else of the prompt, without which the template writes
    the same."""
    if renderer.template == "none":
        return None
    turns = turns_of(example.prompt, "user")
    if response is not None:
        turns = turns_of(response.content, "assistant")
    for i, turn in enumerate(turns):
        if not turn.get("tool_calls"):
            continue
        bare = {key: value for key, value in turn.items() if key != "tool_calls"}
        changed = (*turns[:i], {"content": "", **bare}, *turns[i + 1 :])
        if response is None:
            other = written(replace(example, prompt=changed), None, renderer)
        else:
            other = written(example, replace(response, content=changed), renderer)
        if other == str(_apply(example, response, renderer, tokenize=False)):
            return f"the tool call {ascii(_first_name(turn['tool_calls']))}"
    return None


def _unwritten_thought(example: Example, response: Response, renderer: Renderer) -> str | None:
    """A thought of the last turn's, given as something else than text, without which the template
    writes the same."""
    *earlier, last = turns_of(response.content, "assistant")
    for key in THOUGHTS:
        if is_blank(last.get(key)) or isinstance(last[key], str):
            continue
        bare = {name: value for name, value in last.items() if name != key}
        other = written(example, replace(response, content=(*earlier, bare)), renderer)
        if other == _written(example, response, renderer):
            return f"the message's {key}"
    return None


def _first_name(calls: object) -> str:
    """Of calls as they stand in a row, which may be anything."""
    return _name(calls[0]) if isinstance(calls, list | tuple) else _name(calls)


def written(example: Example, response: Response | None, renderer: Renderer) -> str | None:
    """The text that the template writes, None where it refuses: then it has looked."""
    try:
        return str(_apply(example, response, renderer, tokenize=False))
    except TEMPLATE_ERRORS:
        return None


def _name(tool: object) -> str:
    """Of a tool's definition, or of a call."""
    inner: object = tool.get("function", tool) if _is_object(tool) else None
    return str(inner.get("name", "")) if _is_object(inner) else ""


def _is_object(value: object) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping)


def served(example: Example, response: Response | None, renderer: Renderer) -> Ids:
    """The ids that serving makes of the prompt, or of the prompt with its response."""
    tokenizer, bos = renderer.tokenizer, renderer.bos
    if renderer.template == "chat":
        return tuple(cast("list[int]", _apply(example, response, renderer, tokenize=True)))
    text = str(example.prompt) + (str(response.content) if response else "")
    ids = tuple(cast("list[int]", tokenizer(text)["input_ids"]))
    if (
        response is None
        and ids[-1:] == (tokenizer.eos_token_id,)
        and not text.endswith(str(tokenizer.eos_token))
    ):
        ids = ids[:-1]
    if bos is not None and ids[:2] == (bos, bos):
        return ids[1:]
    return (bos, *ids) if not example.prompt and bos is not None and ids[:1] != (bos,) else ids


def _written(example: Example, response: Response, renderer: Renderer) -> str:
    if renderer.template == "none":
        return str(response.content)
    return str(_apply(example, response, renderer, tokenize=False))


def _apply(example: Example, response: Response | None, renderer: Renderer, tokenize: bool) -> Any:
    turns = turns_of(example.prompt, "user")
    if response is not None:
        turns = (*turns, *turns_of(response.content, "assistant"))
    return renderer.tokenizer.apply_chat_template(
        [dict(turn) for turn in turns],
        tools=[dict(tool) for tool in example.tools] or None,
        add_generation_prompt=response is None,
        tokenize=tokenize,
        **({"return_dict": False} if tokenize else {}),
        **{**renderer.template_options, **(example.template_options or {})},
    )


def turns_of(content: str | tuple[Message, ...], role: str) -> tuple[Message, ...]:
    return ({"role": role, "content": content},) if isinstance(content, str) else content


def decode(spans: Sequence[Ids], renderer: Renderer) -> list[str]:
    listed = [list(ids) for ids in spans]
    return renderer.tokenizer.batch_decode(
        listed, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def _letters(text: str) -> str:
    """Letters and digits alone, in one form: what a tokenizer's normalization leaves."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return "".join(filter(str.isalnum, text.casefold()))
