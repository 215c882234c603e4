"""Rows to examples: one pure function per layout.

    pair       {prompt, chosen, rejected}, as text or messages; without a prompt column the prompt
               is what chosen and rejected share
    responses  {prompt, responses: [{text, score, weight, stopped}, ...]}, K >= 1, optionally with
               preferences: [[chosen, rejected], ...]
    messages   {messages}: the last message, the assistant's, is the response
    completion {prompt, completion}: one response, as TRL's supervised rows have it

Every layout also takes tools and template_options (or chat_template_kwargs), and pair a weight,
a margin and a probability. A row that is not what its layout says is a DataError; a row that is,
but cannot be learned from, is a Dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

from upweight.data.columns import (
    BESIDE_TEXT,
    COLUMNS,
    READ,
    Row,
    conversation,
    list_of,
    listed,
    margin,
    message,
    number,
    printable,
    probability,
    require,
    require_no_other_prompt,
    require_shallow,
    require_unlabelled,
    shown,
    template_options,
    text_or_messages,
    texts_in,
    tools,
    weight,
)
from upweight.data.preferences import Pairing, clipped, with_preferences
from upweight.data.prompts import explicit, implicit
from upweight.errors import DataError
from upweight.rows import Dropped, Example, Preference, Response, RowId, Text


def pair(row: Row, row_id: RowId) -> Example | Dropped:
    """{prompt, chosen, rejected}, each as text or messages; without a prompt, what both share.

    Raises DataError where a column is missing or of another type.
    """
    require(row, "pair", row_id)
    chosen = text_or_messages(row["chosen"], "chosen", row_id)
    rejected = text_or_messages(row["rejected"], "rejected", row_id)
    if row.get("prompt") is None:
        split = implicit(chosen, rejected, row_id)
        if isinstance(chosen, str) or (not isinstance(split, Dropped) and not split[0]):
            require_no_other_prompt(row, row_id)
    else:
        prompt = text_or_messages(row["prompt"], "prompt", row_id)
        split = explicit(prompt, (chosen, rejected), ("chosen", "rejected"), row_id)
    if isinstance(split, Dropped):
        return split
    prompt, (chosen, rejected) = split
    preference = Preference(
        0,
        1,
        weight(row.get("weight"), "weight", row_id),
        margin(row.get("margin"), row_id),
        probability(row.get("probability"), row_id),
    )
    answers = (Response(chosen), Response(rejected))
    return _example(row, row_id, prompt, answers, (preference,))


def responses(row: Row, row_id: RowId) -> Example | Dropped:
    """{prompt, responses: [{text | messages | content, score, weight, stopped}, ...]}, K >= 1.

    A response may also be a plain string, and its score stand in a list `scores`. Preferences are
    those of the column `preferences` ([chosen, rejected] or [chosen, rejected, weight], counted
    from 0); without it, `with_preferences` makes them from the scores. An empty list says that
    there are none, whatever the scores, as long as no pairing of the scores is asked for. A
    response's weight multiplies that of the preferences it is in; one whose `stopped` is false was
    cut off, and gets no stop token.
    Raises DataError where a column is missing or of another type.
    """
    require(row, "responses", row_id)
    prompt = text_or_messages(row["prompt"], "prompt", row_id)
    items = list_of(row["responses"], "responses", row_id, "a list of responses")
    if not items:
        return Dropped(row_id, "empty_response", "responses is an empty list")
    scores = _scores(row, len(items), row_id)
    names = [f"responses[{i}]" for i in range(len(items))]
    answers = [_response(item, name, row_id) for item, name in zip(items, names, strict=True)]
    preferences = _preferences(row, len(items), row_id)
    split = explicit(prompt, [a.content for a in answers], names, row_id)
    if isinstance(split, Dropped):
        return split
    prompt, contents = split
    for name, answer, score in zip(names, answers, scores, strict=True):
        if score is not None and answer.score is not None:
            raise DataError(f"{row_id} has a score in {name} and one in scores. Keep one.")
    said_none = isinstance(row.get("preferences"), list | tuple) and not preferences
    answers = tuple(
        replace(
            a,
            content=content,
            score=None if said_none else a.score if score is None else score,
        )
        for content, a, score in zip(contents, answers, scores, strict=True)
    )
    return _example(row, row_id, prompt, answers, preferences)


def messages(row: Row, row_id: RowId) -> Example | Dropped:
    """{messages}: a conversation whose last message, the assistant's, is the response (K = 1)."""
    require(row, "messages", row_id)
    if isinstance(row.get("label"), bool):
        # Any other may say what the conversation is about.
        require_unlabelled(row, row_id)
    turns = conversation(row["messages"], "messages", row_id)
    if not turns or turns[-1]["role"] != "assistant":
        last = f"ends with a {printable(turns[-1]['role'])} message" if turns else "is empty"
        return Dropped(row_id, "not_assistant", f"the conversation {last}, not with an answer")
    return _example(row, row_id, turns[:-1], (Response(turns[-1:]),), ())


def completion(row: Row, row_id: RowId) -> Example | Dropped:
    """{prompt, completion}, each as text or messages: one response (K = 1) without a preference.

    Raises DataError where a column is missing or of another type, or where a label says that the
    response is good or bad.
    """
    require(row, "completion", row_id)
    require_unlabelled(row, row_id)
    prompt = text_or_messages(row["prompt"], "prompt", row_id)
    answer = text_or_messages(row["completion"], "completion", row_id)
    split = explicit(prompt, (answer,), ("completion",), row_id)
    if isinstance(split, Dropped):
        return split
    prompt, (answer,) = split
    return _example(row, row_id, prompt, (Response(answer),), ())


_LEAST_WEIGHT = 1e-12

FORMATS: dict[str, Callable[[Row, RowId], Example | Dropped]] = {
    "pair": pair,
    "responses": responses,
    "messages": messages,
    "completion": completion,
}


def example_of(
    row: Row,
    row_id: RowId,
    layout: str,
    *,
    pairing: Pairing | Literal["auto"] = "auto",
    min_gap: float | int = 0.0,
    of_usable: bool = True,
) -> Example | Dropped:
    """One row as an example with its preferences, or why it cannot be one.

    `layout` is a key of FORMATS. With `pairing` auto, preferences are those that the row states, or
    else all that its scores make; any other pairing is one of the scores, whatever is stated
    beside them, and rows without scores keep what they state. Raises DataError where the row is
    not of that layout.
    """
    require_shallow((row[name] for name in READ.intersection(row)), row_id)
    example = FORMATS[layout](row, row_id)
    if isinstance(example, Example) and pairing != "auto" and row.get("preferences") is not None:
        scored = FORMATS[layout]({**row, "preferences": None}, row_id)
        if isinstance(scored, Example) and any(a.score is not None for a in scored.responses):
            example = scored
    if isinstance(example, Dropped):
        return example
    by = "all" if pairing == "auto" else pairing
    found = with_preferences(example, by, min_gap, of_usable=of_usable)
    return _bad_unicode(example) or _weighed(found)


def _weighed(example: Example) -> Example:
    """Raises DataError for a weight that is no number above 0 in the arithmetic of training."""
    for preference in example.preferences:
        if not _LEAST_WEIGHT <= preference.weight <= 1 / _LEAST_WEIGHT:
            raise DataError(
                f"{example.row}: the weights of a preference and its two responses make "
                f"{preference.weight:g}; allowed: {_LEAST_WEIGHT:g} to {1 / _LEAST_WEIGHT:g}."
            )
    return example


def prompt_of(row: Row, row_id: RowId) -> Example | Dropped:
    """An example of no responses, from a row of any layout or one that is only a prompt."""
    require_shallow((row[name] for name in READ.intersection(row)), row_id)
    if row.get("prompt") is not None:
        prompt = text_or_messages(row["prompt"], "prompt", row_id)
    elif "messages" in row:
        turns = conversation(row["messages"], "messages", row_id)
        prompt = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
    elif "chosen" in row and "rejected" in row:
        example = pair(row, row_id)
        if isinstance(example, Dropped):
            return example
        prompt = example.prompt
    else:
        raise DataError(
            f"{row_id} has no prompt (it has: {listed(row)}). Allowed: prompt, as text or a list "
            "of messages; messages; or chosen and rejected that share a prompt."
        )
    example = _example(row, row_id, prompt, (), ())
    return _bad_unicode(example) or example


def answer_of(row: Row, row_id: RowId) -> Text | None:
    """The first response of a row of any layout, None of a row that is only a prompt, or is not
    what its layout says."""
    filled = {name for name, value in row.items() if value is not None}
    layouts = (name for name, columns in COLUMNS.items() if filled.issuperset(columns.required))
    if (layout := next(layouts, None)) is None:
        return None
    try:
        example = example_of(row, row_id, layout)
    except DataError:
        return None
    if not isinstance(example, Example) or not example.responses:
        return None
    return example.responses[0].content


def _bad_unicode(example: Example) -> Dropped | None:
    contents = [answer.content for answer in example.responses]
    for text in texts_in([example.prompt, contents, example.tools, example.template_options]):
        if not text.isascii() and _has_surrogate(text):
            detail = f"half of a surrogate pair in {clipped(text)}"
            return Dropped(example.row, "bad_unicode", detail)
    return None


def _example(
    row: Row,
    row_id: RowId,
    prompt: Text,
    answers: tuple[Response, ...],
    preferences: tuple[Preference, ...],
) -> Example:
    return Example(
        prompt, answers, preferences, row_id, tools(row, row_id), template_options(row, row_id)
    )


def _response(item: Any, where: str, row_id: RowId) -> Response:
    if item is None or isinstance(item, str):
        return Response(text_or_messages(item, where, row_id))
    if not isinstance(item, Mapping):
        raise DataError(
            f"{row_id}: {where} is {shown(item)}; allowed: text, or an object with text, "
            "messages or content, and score, weight and stopped."
        )
    score, own_weight = item.get("score"), weight(item.get("weight"), f"{where}.weight", row_id)
    names = [n for n in ("text", "messages", "content") if item.get(n) is not None]
    if "role" in item:
        rest = {k: v for k, v in item.items() if k not in BESIDE_TEXT}
        content: Text = (message(rest, where, row_id),)
    elif len(names) == 1:
        content = text_or_messages(item[names[0]], f"{where}.{names[0]}", row_id)
    elif not names and {"text", "messages", "content"}.intersection(item):
        content = ""
    else:
        raise DataError(
            f"{row_id}: {where} has {' and '.join(names) or 'no text'} (it has: "
            f"{listed(item)}). A response has one of text, messages, "
            "content."
        )
    found = None if score is None else number(score, f"{where}.score", row_id)
    return Response(content, found, own_weight, _stopped(item.get("stopped"), where, row_id))


def _stopped(value: Any, where: str, row_id: RowId) -> bool:
    if value is None or isinstance(value, bool):
        return value is not False
    raise DataError(
        f"{row_id}: {where}.stopped is {shown(value)}; allowed: true, or false where the text was "
        "cut off before its end."
    )


def _scores(row: Row, num_responses: int, row_id: RowId) -> list[float | None]:
    if row.get("scores") in (None, ""):
        return [None] * num_responses
    listed = list_of(row["scores"], "scores", row_id, "a list of numbers")
    if len(listed) != num_responses:
        raise DataError(
            f"{row_id} has {len(listed)} scores for {num_responses} responses. "
            "Give one for each; null where there is none."
        )
    return [None if s is None else number(s, f"scores[{i}]", row_id) for i, s in enumerate(listed)]


def _preferences(row: Row, num_responses: int, row_id: RowId) -> tuple[Preference, ...]:
    if row.get("preferences") in (None, ""):
        return ()
    found: list[Preference] = []
    for i, item in enumerate(list_of(row["preferences"], "preferences", row_id, "a list of pairs")):
        where = f"preferences[{i}]"
        entry: list[Any] = list(item) if isinstance(item, list | tuple) else []
        numbers = all(isinstance(x, int) and not isinstance(x, bool) for x in entry[:2])
        if len(entry) not in (2, 3) or not numbers or entry[0] == entry[1]:
            raise DataError(
                f"{row_id}: {where} is {shown(item)}; allowed: [chosen, rejected] or "
                "[chosen, rejected, weight], the numbers of two responses, counted from 0."
            )
        if not all(0 <= x < num_responses for x in entry[:2]):
            raise DataError(
                f"{row_id}: {where} is {shown(item)}, and the responses are numbered 0 to "
                f"{num_responses - 1}."
            )
        own_weight = weight(entry[2], f"{where}[2]", row_id) if len(entry) == 3 else 1.0
        found.append(Preference(entry[0], entry[1], own_weight))
    return tuple(found)


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
