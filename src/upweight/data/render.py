"""Examples to text: one prompt and, for each response, what follows it up to its stop token.

What is rendered here is what serving renders. The prompt is the chat template's, with a generation
prompt. A response is all that the template writes after that, up to and including the first stop
token after the last message's content: so also what it puts before the content, such as an empty
block of thought, and, where a response is several of the assistant's messages, their headers.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, cast

import jinja2

from upweight.data.clock import on_day, reads_clock, today
from upweight.data.columns import texts_in
from upweight.data.preferences import clipped, is_empty
from upweight.errors import ConfigError, DataError, ModelError
from upweight.rows import Dropped, Example, Message, Response, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any

Truncation = Literal["drop", "prompt", "response"]

# What templates raise on a conversation that they do not take.
TEMPLATE_ERRORS = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
)  # fmt: skip
_NO_TOKEN = re.compile(r"(?!)")
_ANSWER = "Heron."
_PROBE = ({"role": "user", "content": "Name a bird."}, {"role": "assistant", "content": _ANSWER})
# For templates that insist on a system message.
_PROBES = (_PROBE, ({"role": "system", "content": "Be brief."}, *_PROBE))


@dataclass(frozen=True)
class Renderer:
    """How one model's rows become token ids: the tokenizer and what was found out about it.

    `header` and `after` are what the chat template writes before and after an answer's content
    (None: it refuses every conversation that was tried).
    `stops` matches the stop tokens' text, `specials` that of every special token, `splits` those
    at which text can be cut and tokenized apart. `added_stop` is appended where no stop is
    rendered, and `end` is the stop that a rendered answer has: that one, or the template's. `lead`
    are the ids that the tokenizer itself puts before a text (beginning-of-text, if it adds it),
    used where no chat template is. `date` is the day that the tokenizer's template writes (None: it
    writes none), whatever day it is.
    """

    tokenizer: Tokenizer
    template: Literal["chat", "none"]
    template_options: Mapping[str, Any]
    header: str
    after: str | None
    stops: re.Pattern[str]
    specials: re.Pattern[str]
    splits: re.Pattern[str]
    stop_ids: frozenset[int]
    added_stop: int
    end: int
    lead: tuple[int, ...]
    bos: int | None
    max_length: int | None
    truncation: Truncation
    date: str | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """Why one response of a row is not used: reason and detail as in Dropped."""

    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What follows the prompt. `stopped`: it ends in its stop token, else one is to be appended,
    but for one that is `unfinished`: the row says that it was cut off. `num_stops`: how many the
    text holds. `rewritten`: the template changed the content by more than white space at its ends.
    """

    text: str
    stopped: bool
    num_stops: int
    rewritten: bool = False
    unfinished: bool = False


@dataclass(frozen=True, slots=True)
class Rendering:
    """A row as text: the prompt, and its responses by their number in the row.

    `special_in_prompt`: the row itself holds the text of a special token before the template adds
    any, as where it was rendered once already.
    """

    prompt: str
    answers: Mapping[int, Answer]
    problems: Mapping[int, Problem]
    special_in_prompt: bool = False


def make_renderer(
    tokenizer: Tokenizer,
    *,
    template: Literal["auto", "chat", "none"] = "auto",
    stop_token_ids: Sequence[int] = (),
    max_length: int | None = None,
    truncation: Truncation = "drop",
    template_options: Mapping[str, Any] | None = None,
    date: str | None = None,
) -> Renderer:
    """Finds out once what every row needs to know about a tokenizer and its chat template.

    `stop_token_ids` are the generation config's, `max_length` counts the tokens of a prompt and
    one response (None: no limit). Template auto is chat where the tokenizer has a template. `date`
    is the day for a template that reads the clock (None: today).
    Raises ModelError where there is no template or no stop token to use, ConfigError for options
    that are not the template's.
    """
    options = dict(template_options or {})
    reserved = _reserved(type(tokenizer)).intersection(options)
    if reserved:
        raise ConfigError(
            f"data.template_options.{min(reserved)} is no variable of a chat template: upweight "
            "sets it itself. Remove it."
        )
    if template == "chat" and not tokenizer.chat_template:
        raise ModelError(f"data.template is chat, and {_NO_TEMPLATE}")
    chat = bool(tokenizer.chat_template) and template != "none"
    if chat and reads_clock(tokenizer):
        date = date or today()
        tokenizer = on_day(tokenizer, date)
    else:
        date = None
    header, after = _probe(tokenizer, options) if chat else ("", None)
    added = dict(tokenizer.added_tokens_decoder)
    texts = {i: str(token) for i, token in added.items()}
    eos = cast("int | None", tokenizer.eos_token_id)
    if eos is not None:
        texts.setdefault(eos, str(tokenizer.eos_token))
    written = _first_token(after or "", texts)
    stop_ids = [i for i in (eos, written, *stop_token_ids) if i is not None]
    if not stop_ids:
        raise ModelError(
            "The tokenizer has no end-of-text token, and nothing else says where a response stops. "
            "Set eos_token in tokenizer_config.json, or eos_token_id in generation_config.json."
        )
    stops = {texts[i] for i in stop_ids if i in texts}
    special = {str(t) for t in added.values() if t.special} | set(tokenizer.all_special_tokens)
    splits = {str(t) for t in added.values() if t.special and not (t.lstrip or t.single_word)}
    return Renderer(
        tokenizer=tokenizer,
        template="chat" if chat else "none",
        template_options=options,
        header=header,
        after=after,
        stops=any_of(stops),
        specials=any_of(special | stops),
        splits=any_of(splits) if chat else _NO_TOKEN,
        stop_ids=frozenset(stop_ids),
        added_stop=stop_ids[0],
        end=stop_ids[0] if written is None else written,
        lead=() if chat else _lead(tokenizer),
        bos=cast("int | None", tokenizer.bos_token_id),
        max_length=max_length,
        truncation=truncation,
        date=date,
    )


_NO_TEMPLATE = (
    "the tokenizer has no chat template. Use a model that has one (its name often ends in "
    "-Instruct or -it), put a chat_template.jinja into its folder, or give prompts and responses "
    "as text with data.template none."
)


def render(example: Example, indices: Sequence[int], renderer: Renderer) -> Rendering | Dropped:
    """The row's prompt and those of its responses, as text.

    A response that cannot be used is a problem; a prompt that cannot be used drops the row.
    Raises ModelError for messages where no chat template is used.
    """
    if renderer.template == "none":
        return _render_text(example, indices, renderer)
    prompt = _turns(example.prompt, "user")
    if is_empty(prompt):
        return Dropped(example.row, "empty_prompt", "the prompt has no words")
    try:
        prompt_text = _apply(prompt, example, renderer, add_generation_prompt=True)
    except TEMPLATE_ERRORS as error:
        return Dropped(example.row, "template", _said(error))
    written = _special_in([_without_roles(turn) for turn in prompt], renderer) is not None
    answers: dict[int, Answer] = {}
    problems: dict[int, Problem] = {}
    for i in indices:
        turns = _turns(example.responses[i].content, "assistant")
        special = _special_in([_without_roles(turn) for turn in turns], renderer)
        if special:
            problems[i] = special
            continue
        try:
            full = _apply((*prompt, *turns), example, renderer, add_generation_prompt=False)
        except TEMPLATE_ERRORS as error:
            problems[i] = Problem("template", _said(error))
            continue
        found = _answer(prompt_text, full, turns, renderer)
        if isinstance(found, Problem):
            problems[i] = found
        else:
            answers[i] = _as_said(found, example.responses[i], renderer)
    return Rendering(prompt_text, answers, problems, written)


def _answer(
    prompt: str, full: str, turns: tuple[Message, ...], renderer: Renderer
) -> Answer | Problem:
    """What `full` has after the prompt, cut after the first stop token that follows the content."""
    if not full.startswith(prompt):
        at = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), 0)
        return Problem(
            "boundary",
            f"the template writes {clipped(prompt[at:])} at the end of the prompt alone, and "
            f"{clipped(full[at:])} with the response",
        )
    rest = full[len(prompt) :]
    content = str(turns[-1].get("content", "")).strip()
    end = _content_end(rest, content, len(turns), renderer.after)
    stops = list(renderer.stops.finditer(rest))
    if end is None:
        stop = stops[0 if len(turns) == 1 else -1] if stops else None
        end = len(rest)
    else:
        stop = next((m for m in stops if m.end() > end), None)
    if stop is None and renderer.after is None:
        return Problem("template", f"no known stop token after the content: {clipped(rest[-40:])}")
    inner = rest[: stop.start() if stop else end]
    if not inner.removeprefix(renderer.header).strip():
        return Problem("empty_response", f"the template leaves nothing of {clipped(content)}")
    text = rest[: stop.end()] if stop else inner
    num_stops = len(renderer.stops.findall(text))
    return Answer(text, stop is not None, num_stops, content not in inner)


def _as_said(answer: Answer, response: Response, renderer: Renderer) -> Answer:
    """Without its stop token, if the row says that the response was cut off before it."""
    if response.stopped:
        return answer
    if not answer.stopped:
        return replace(answer, unfinished=True)
    (*_, last) = renderer.stops.finditer(answer.text)
    return replace(
        answer,
        text=answer.text[: last.start()],
        stopped=False,
        num_stops=answer.num_stops - 1,
        unfinished=True,
    )


def _content_end(rest: str, content: str, num_turns: int, after: str | None) -> int | None:
    """Where the last message's content ends; None if the template shows nothing of it."""
    if after is not None and rest.endswith(after):
        return len(rest) - len(after)
    if not content:
        return None
    # One message: its first occurrence cannot lie behind the content. Several: an earlier turn may
    # say the same.
    at = rest.find(content) if num_turns == 1 else rest.rfind(content)
    return None if at < 0 else at + len(content)


def _render_text(
    example: Example, indices: Sequence[int], renderer: Renderer
) -> Rendering | Dropped:
    answers: dict[int, Answer] = {}
    problems: dict[int, Problem] = {}
    prompt = _require_text(example.prompt, example, renderer)
    for i in indices:
        content = _require_text(example.responses[i].content, example, renderer)
        text = content.rstrip()
        last = next((m for m in renderer.stops.finditer(text) if m.end() == len(text)), None)
        body = text[: last.start()] if last else content
        problem = _special_in([body], renderer)
        if problem or not body.strip():
            problems[i] = problem or Problem("empty_response", clipped(content))
        else:
            found = Answer(text if last else content, last is not None, int(last is not None))
            answers[i] = _as_said(found, example.responses[i], renderer)
    if prompt == "" and renderer.bos is None:
        return Dropped(
            example.row,
            "empty_prompt",
            "the tokenizer has no beginning-of-text token to stand for it",
        )
    return Rendering(prompt, answers, problems)


def _require_text(content: Text, example: Example, renderer: Renderer) -> str:
    if isinstance(content, str):
        return content
    has_template = bool(renderer.tokenizer.chat_template)
    why = "data.template is none. Set it to chat." if has_template else _NO_TEMPLATE
    raise ModelError(f"{example.row} is a conversation, and {why}")


def _apply(
    turns: Sequence[Message], example: Example, renderer: Renderer, *, add_generation_prompt: bool
) -> str:
    options = renderer.template_options
    if example.template_options:
        reserved = _reserved(type(renderer.tokenizer)).intersection(example.template_options)
        if reserved:
            raise DataError(
                f"{example.row}: template_options.{min(reserved)} is no variable of a chat "
                "template: upweight sets it itself. Remove it."
            )
        options = {**options, **example.template_options}
    rendered = renderer.tokenizer.apply_chat_template(
        [dict(turn) for turn in turns],
        tools=[dict(tool) for tool in example.tools] or None,
        add_generation_prompt=add_generation_prompt,
        tokenize=False,
        **options,
    )
    return cast(str, rendered)


def _probe(tokenizer: Tokenizer, options: Mapping[str, Any]) -> tuple[str, str | None]:
    """What the template writes before and after an answer's content."""
    for turns in _PROBES:
        listed = [dict(turn) for turn in turns]
        try:
            full = str(tokenizer.apply_chat_template(listed, tokenize=False, **options))
            prompt = tokenizer.apply_chat_template(
                listed[:-1], add_generation_prompt=True, tokenize=False, **options
            )
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                f"The chat template cannot be parsed: {str(error).rstrip('.')}."
            ) from None
        except TEMPLATE_ERRORS:
            continue
        before, found, after = full.rpartition(_ANSWER)
        if found:
            header = before.removeprefix(str(prompt)) if before.startswith(str(prompt)) else ""
            return header, after
    return "", None


def _first_token(after: str, texts: Mapping[int, str]) -> int | None:
    """The added token that comes first in what follows an answer's content."""
    by_text = {text: i for i, text in texts.items()}
    found = any_of(text for text in by_text if text.strip()).search(after)
    return by_text[found.group()] if found else None


def _lead(tokenizer: Tokenizer) -> tuple[int, ...]:
    alone = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full)):
        if full[start : start + len(alone)] == alone:
            return tuple(full[:start])
    return ()


@cache
def _reserved(tokenizer: type) -> frozenset[str]:
    """The names that apply_chat_template takes itself; documents are for the template."""
    names = inspect.signature(tokenizer.apply_chat_template).parameters  # pyright: ignore
    return frozenset(names) - {"self", "kwargs", "documents"} | {"messages"}


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of the texts, the longest first, as a tokenizer looks for them."""
    ordered = sorted({t for t in texts if t}, key=lambda t: (-len(t), t))
    return re.compile("|".join(map(re.escape, ordered))) if ordered else _NO_TOKEN


def _turns(content: Text, role: str) -> tuple[Message, ...]:
    return ({"role": role, "content": content},) if isinstance(content, str) else content


def _without_roles(turn: Message) -> Message:
    return {key: value for key, value in turn.items() if key != "role"}


def _special_in(contents: Sequence[Any], renderer: Renderer) -> Problem | None:
    for text in texts_in(contents):
        found = renderer.specials.search(text)
        if found:
            near = clipped(text[max(0, found.start() - 20) :])
            return Problem("stop_in_response", f"the text holds {found.group()}: {near}")
    return None


def _said(error: Exception) -> str:
    return f"the chat template says: {clipped(str(error), 120)}"
