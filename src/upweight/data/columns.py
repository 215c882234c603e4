"""A row's columns as what its layout says they are, or a DataError that says what they are."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from upweight.errors import DataError, nearest
from upweight.rows import Message, RowId, Text

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Columns:
    """What a layout must have, and may have."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        return self.required + self.optional


_MOST_LEVELS = 100
_MOST_MARGIN = 1e6
_TEMPLATE = ("tools", "template_options", "chat_template_kwargs")
COLUMNS: dict[str, Columns] = {
    "pair": Columns(
        ("chosen", "rejected"), ("prompt", "weight", "margin", "probability", *_TEMPLATE)
    ),
    "responses": Columns(("prompt", "responses"), ("scores", "preferences", *_TEMPLATE)),
    "messages": Columns(("messages",), _TEMPLATE),
    "completion": Columns(("prompt", "completion"), _TEMPLATE),
}

READ = frozenset(name for columns in COLUMNS.values() for name in columns.all)
"""The columns that some layout reads."""

SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen-rating", "rejected-rating"),
    ("chosen_rating", "rejected_rating"),
)
"""What pairs may have beside them. No layout reads them; whether they agree with it is asked."""

CALLED_PROMPT = (
    "question", "instruction", "instructions", "query", "input", "problem", "context", "history",
    "conversation", "conversations", "dialogue", "dialog", "messages", "post",
)  # fmt: skip
"""What other data call the prompt."""

LOOKED_AT = READ.union(CALLED_PROMPT, (name for pair in SCORES for name in pair))
"""The columns whose values are wanted of every row."""

BESIDE_TEXT = ("score", "weight", "stopped")
"""What an item of the column responses may have beside its text."""
_OF_A_RESPONSE = ("text", "messages", "content", *BESIDE_TEXT)


def unread(row: Row, layout: str) -> set[str]:
    """The row's columns that the layout does not read, and the keys that no response has."""
    found = set(row) - set(COLUMNS[layout].all)
    items = row.get("responses") if layout == "responses" else None
    for item in items if isinstance(items, list | tuple) else ():
        # What has a role is a message, and all of it goes to the chat template.
        if isinstance(item, Mapping) and "role" not in item:
            filled = {str(key) for key, value in item.items() if value is not None}
            found |= {f"responses.{key}" for key in filled.difference(_OF_A_RESPONSE)}
    return found


def agrees(row: Row) -> bool | None:
    """Whether the row's scores of its two responses, or its margin, say that chosen is the better
    one; None where they say nothing."""
    for pair in SCORES:
        values = [row.get(name) for name in pair]
        chosen, rejected = (None if isinstance(v, bool) else finite_number(v) for v in values)
        if chosen is not None and rejected is not None and chosen != rejected:
            return chosen > rejected
    margin = finite_number(row.get("margin"))
    return margin > 0 if margin else None


def finite_number(value: Any) -> float | None:
    """A finite number, or text that is one, as every cell of a CSV file is; else None."""
    try:
        found = float(value) if isinstance(value, int | float | str) else math.nan
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def detect(row: Row, row_id: RowId) -> str:
    """The layout that the row's columns make: the first of COLUMNS whose required ones are there.

    Raises DataError when there is none, saying what is there and what each layout needs.
    """
    filled = {name for name, value in row.items() if value is not None}
    for names in (filled, set(row)):
        for layout, columns in COLUMNS.items():
            if names.issuperset(columns.required):
                return layout
    needs = "; ".join(f"{layout} needs {_words(c.required)}" for layout, c in COLUMNS.items())
    required = [name for columns in COLUMNS.values() for name in columns.required]
    raise DataError(
        f"{row_id} is of no known layout (it has: {listed(row)}). Allowed: {needs}."
        f"{_misspelt(row, required)}"
    )


def require_shallow(values: Iterable[Any], row_id: RowId) -> None:
    """Raises DataError for values inside values so deep that Python, or a chat template, would end
    in a RecursionError. What a row says is some ten levels deep, tool definitions included."""
    inner = list(values)
    for _ in range(_MOST_LEVELS):
        holders = [v for v in inner if isinstance(v, Mapping | list | tuple)]
        if not holders:
            return
        inner = [v for h in holders for v in (h.values() if isinstance(h, Mapping) else h)]
    raise DataError(
        f"{row_id} has values nested more than {_MOST_LEVELS} levels deep, in a column that is "
        "read. Make them shallower, or remove them."
    )


def require(row: Row, layout: str, row_id: RowId) -> None:
    """Raises DataError for the first required column that is not there."""
    required = COLUMNS[layout].required
    for name in required:
        if name not in row:
            raise DataError(
                f'{row_id} has no "{name}" (it has: {listed(row)}). The {layout} layout needs '
                f"{_words(required)}.{_misspelt(row, required)}"
            )


def require_unlabelled(row: Row, row_id: RowId) -> None:
    """Raises DataError for a single answer with a label: a bad one would be learned as a good."""
    if "label" in row:
        raise DataError(
            f'{row_id} has a "label" beside the answer, and labels of single answers '
            "(KTO) are not read. For dpo give pairs, in the columns prompt, chosen and rejected; "
            "for sft keep the good rows and remove the column."
        )


def require_no_other_prompt(row: Row, row_id: RowId) -> None:
    """Raises DataError for a row without a prompt that has one by another name: what chosen and
    rejected happen to share would be taken for it."""
    named = [name for name in CALLED_PROMPT if _says(row.get(name)) and row[name]]
    near = [name for name in row if "prompt" not in row and nearest(name, ["prompt"])]
    near = [name for name in near if row[name] is None or _says(row[name])]
    if found := named or near:
        lacks = 'an empty "prompt"' if "prompt" in row else 'no "prompt"'
        raise DataError(
            f"{row_id} has {lacks} (it has: {listed(row)}). Is {found[0]} meant to be prompt? "
            "Rename the column. If the texts of chosen and rejected begin with the prompt, remove "
            f"{found[0]}."
        )


def text_or_messages(value: Any, where: str, row_id: RowId) -> Text:
    """Text as it is, a message or a list of messages as a tuple, null as empty text. Text that is
    messages in JSON is those: files of cells hold them so, and nobody means to teach brackets."""
    if value is None:
        return ""
    if isinstance(value, str):
        found = _messages_in_json(value, where, row_id)
        if found is None:
            return value
        value = found
    if isinstance(value, Mapping):
        return (message(value, where, row_id),)
    if isinstance(value, list | tuple):
        return conversation(value, where, row_id)
    raise _wrong_type(value, where, row_id, "text, a list of messages, or one message")


def _messages_in_json(text: str, where: str, row_id: RowId) -> Any:
    start = text[:200].lstrip()
    if not start.startswith(("[", "{")) or "role" not in start:
        return None
    try:
        value = json_value(text, f"{row_id}: {where}")
    except (ValueError, RecursionError):
        if re.match(r"\[?\s*\{\s*'", start):
            raise DataError(
                f"{row_id} has Python's notation in {where}: {ascii(start[:40])}. Write messages "
                "as JSON, or save the data as JSON Lines or Parquet."
            ) from None
        return None
    turns = cast(list[Any], value) if isinstance(value, list) else [value]
    are_messages = turns and all(
        isinstance(t, Mapping) and "role" in t and ("content" in t or "tool_calls" in t)
        for t in turns
    )
    if not are_messages:
        return None
    require_shallow([value], row_id)
    return value


def conversation(value: Any, where: str, row_id: RowId) -> tuple[Message, ...]:
    turns = list_of(value, where, row_id, "a list of messages")
    return tuple(message(turn, f"{where}[{i}]", row_id) for i, turn in enumerate(turns))


def message(value: Any, where: str, row_id: RowId) -> Message:
    """A message with one text as its content and without nulls: columnar files fill in a null for
    every key that another row has."""
    if not isinstance(value, Mapping):
        raise _wrong_type(value, where, row_id, 'a message: {"role": ..., "content": ...}')
    turn = cast(dict[str, Any], _without_nulls(value))
    if "content" in value and "tool_calls" not in turn:
        turn.setdefault("content", "")
    needed = ("role",) if "tool_calls" in turn else ("role", "content")
    for name in needed:
        if name not in turn:
            raise DataError(
                f'{row_id}: {where} has no "{name}" (it has: {listed(value)}). '
                'A message is {"role": ..., "content": ...}.'
            )
    if not isinstance(turn["role"], str):
        raise _wrong_type(turn["role"], f"{where}.role", row_id, "text")
    if "content" in turn:
        turn["content"] = _content(turn["content"], f"{where}.content", row_id)
    return turn


def _content(value: Any, where: str, row_id: RowId) -> str:
    """Text, or the texts of a list of parts, which many templates would print as a Python list."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _wrong_type(value, where, row_id, "text")
    texts: list[str] = []
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise DataError(
                f"{row_id}: {where}[{i}] is {shown(part)}; only parts of text can be learned "
                'from: {"type": "text", "text": ...}.'
            )
        texts.append(part["text"])
    return "".join(texts)


def list_of(value: Any, where: str, row_id: RowId, allowed: str) -> list[Any]:
    """A list, or a text that is one in JSON: what a cell of a CSV file can hold."""
    if isinstance(value, str):
        value = _from_json(value, where, row_id, allowed)
    if not isinstance(value, list | tuple):
        raise _wrong_type(value, where, row_id, allowed)
    return list(value)


def mapping(value: Any, where: str, row_id: RowId, allowed: str) -> Mapping[str, Any]:
    if isinstance(value, str):
        value = _from_json(value, where, row_id, allowed)
    if not isinstance(value, Mapping):
        raise _wrong_type(value, where, row_id, allowed)
    return cast(Mapping[str, Any], value)


def number(value: Any, where: str, row_id: RowId) -> float:
    """A finite number, or text that is one."""
    found = finite_number(value)
    if found is None:
        raise DataError(f"{row_id}: {where} is {shown(value)}; allowed: a finite number.")
    return found


def weight(value: Any, where: str, row_id: RowId) -> float:
    """How much a preference counts, 1 where nothing is said."""
    if value is None or value == "":
        return 1.0
    found = number(value, where, row_id)
    if found <= 0:
        raise DataError(
            f"{row_id}: {where} is {shown(value)}; allowed: a number above 0. "
            "Remove what should not count."
        )
    return found


def margin(value: Any, row_id: RowId) -> float:
    """How much better the chosen response is, 0 where nothing is said."""
    if value is None or value == "":
        return 0.0
    found = number(value, "margin", row_id)
    if not 0 <= found <= _MOST_MARGIN:
        raise DataError(
            f"{row_id}: margin is {shown(value)}; allowed: a number from 0 to {_MOST_MARGIN:g}. "
            "Swap chosen and rejected where it is negative."
        )
    return found


def probability(value: Any, row_id: RowId) -> float:
    """How sure it is that the chosen response is the better one, 1 where nothing is said."""
    if value is None or value == "":
        return 1.0
    found = number(value, "probability", row_id)
    if not 0.5 <= found <= 1:
        raise DataError(
            f"{row_id}: probability is {shown(value)}; allowed: a number from 0.5 to 1, how sure "
            "it is that chosen is better. Swap chosen and rejected where it is below."
        )
    return found


def tools(row: Row, row_id: RowId) -> tuple[Mapping[str, Any], ...]:
    """The tool definitions that the chat template renders; a row without any has none."""
    value = row.get("tools")
    if value is None or value == "":
        return ()
    listed = list_of(value, "tools", row_id, "a list of tool definitions")
    return tuple(
        cast(Mapping[str, Any], _without_nulls(mapping(t, f"tools[{i}]", row_id, "an object")))
        for i, t in enumerate(listed)
    )


def template_options(row: Row, row_id: RowId) -> Mapping[str, Any] | None:
    """The row's own variables of the chat template."""
    names = [
        n for n in ("template_options", "chat_template_kwargs") if row.get(n) not in (None, "")
    ]
    if len(names) == 2:
        raise DataError(
            f"{row_id} has template_options and chat_template_kwargs, which are two names of one "
            "thing. Keep one."
        )
    if not names:
        return None
    value = mapping(row[names[0]], names[0], row_id, "an object")
    return cast(Mapping[str, Any], _without_nulls(value)) or None


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a value of nested lists and objects, the keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from texts_in(key)
            yield from texts_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_in(inner)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(v) for v in value]
    return value


def json_value(text: str, where: str) -> Any:
    """json.loads, but an object that has a key twice is a DataError: the last would win."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"{where} has the key {twice!r} twice in {shown(found)}. Keep one.")
        return found

    return json.loads(text, object_pairs_hook=unique)


def _from_json(value: str, where: str, row_id: RowId, allowed: str) -> Any:
    try:
        found = json_value(value, f"{row_id}: {where}")
    except (ValueError, RecursionError):
        raise _wrong_type(value, where, row_id, allowed) from None
    require_shallow([found], row_id)
    return found


def _wrong_type(value: Any, where: str, row_id: RowId, allowed: str) -> DataError:
    return DataError(f"{row_id}: {where} is {shown(value)}; allowed: {allowed}.")


_KINDS = {
    bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list",
    tuple: "a list", dict: "an object", type(None): "null",
}  # fmt: skip


def shown(value: Any) -> str:
    """What a value is and its beginning, in ASCII: it may hold what a terminal cannot print."""
    try:
        text = json.dumps(value, default=str)
    except RecursionError:
        text = "nested very deeply"
    except (ValueError, TypeError):
        text = "that cannot be written as JSON"
    kind = _KINDS.get(type(value), f"of type {type(value).__name__}")
    return kind if value is None else f"{kind} ({text if len(text) <= 60 else text[:57] + '...'})"


def _words(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def listed(row: Mapping[Any, Any]) -> str:
    return ", ".join(map(printable, row)) or "nothing"


def printable(name: Any) -> str:
    """A name as it can be printed and written: it may hold half of a surrogate pair."""
    return str(name).encode("utf-8", "backslashreplace").decode()


def _misspelt(row: Row, required: Iterable[str]) -> str:
    missing = list(dict.fromkeys(name for name in required if name not in row))
    others = [str(name) for name, value in row.items() if name not in READ and _says(value)]
    meant: dict[str, str] = {}
    for name in sorted(others, key=len):  # chosen_response is it, and chosen_response_model is not
        if (wanted := _meant(name, missing)) is not None:
            meant.setdefault(wanted, name)
    if not meant:
        return ""
    (wanted, first), *more = sorted(meant.items(), key=lambda found: others.index(found[1]))
    rest = [f'"{printable(name)}" "{other}"' for other, name in more]
    return " Is " + _words([f'"{printable(first)}" meant to be "{wanted}"', *rest]) + "?"


def _says(value: Any) -> bool:
    """Whether it can be something that somebody said."""
    return isinstance(value, str | list | tuple | Mapping)


def _meant(name: str, missing: Sequence[str]) -> str | None:
    """chosen for chosen_response, responses for response, prompt for question."""
    parts = name.lower().split("_")
    whole = [wanted for wanted in missing if wanted in parts]
    called = ["prompt"] if name in CALLED_PROMPT and "prompt" in missing else []
    return next(iter(whole or difflib.get_close_matches(name, missing, n=1) or called), None)
