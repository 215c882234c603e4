"""YAML as people write it, in and out.

Reading differs from YAML 1.1 where that would surprise: 1e-5 is a number, `no` and 2024-01-31 are
text, a key may not stand twice, and anchors, aliases and tags are refused. A value without quotes
stays `Plain` until the key it belongs to says whether text is wanted (a folder may be called 1e-5).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import yaml

from upweight.errors import ConfigError

NULL = frozenset({"", "~", "null", "Null", "NULL"})
BOOLEAN = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
# Python refuses to read integers of thousands of digits, with an exception of its own.
# A leading zero is no number: 010 is 8 to YAML 1.1, and 10 to everyone else.
WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]{0,399})")
NUMBER = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
BARE = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./+-]*")
TEXT_TAG = "tag:yaml.org,2002:str"


class Plain(str):
    """A value without quotes, as it stands in the text."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed YAML text: its value, the line of every key (by path), and (line, problem) pairs."""

    value: Any
    lines: Mapping[tuple[str, ...], int]
    problems: Sequence[tuple[int, str]]


class _Loader(yaml.BaseLoader):
    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor or event.tag:
            mark = event.start_mark
            problem = "anchors, aliases and tags (& * !) are not read here; quote the value"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        return super().compose_node(parent, index)


def parse(text: str, name: str) -> Document:
    """The YAML document in `text`; `name` says in errors where it came from.

    Raises ConfigError with line and column where the text is not YAML.
    """
    lines: dict[tuple[str, ...], int] = {}
    problems: list[tuple[int, str]] = []
    try:
        node = yaml.compose(text, Loader=_Loader)
        value = None if node is None else _value(node, (), lines, problems)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{where}: this is not valid YAML: {said}.") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        found = f"U+{error.character:04X}"
        raise ConfigError(f"{name}:{line}: YAML does not allow the character {found}.") from None
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply to be a configuration.") from None
    return Document(value, lines, problems)


def _value(
    node: yaml.Node,
    path: tuple[str, ...],
    lines: dict[tuple[str, ...], int],
    problems: list[tuple[int, str]],
) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return Plain(node.value) if node.style is None else str(node.value)
    if isinstance(node, yaml.SequenceNode):
        items = cast("list[yaml.Node]", node.value)
        return [_value(item, (*path, str(i)), lines, problems) for i, item in enumerate(items)]
    mapping: dict[str, Any] = {}
    for key_node, value_node in cast("list[tuple[yaml.Node, yaml.Node]]", node.value):
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append((line, "a key must be a single word, found a list or a mapping."))
            continue
        key = str(key_node.value)
        inner = (*path, key)
        if inner in lines:
            problems.append(
                (line, f"{'.'.join(inner)} is given twice, first in line {lines[inner]}.")
            )
            continue
        lines[inner] = line
        mapping[key] = _value(value_node, inner, lines, problems)
    return mapping


def parse_value(text: str, name: str) -> Any:
    """A value as typed on a command line: YAML in brackets or quotes, else one plain value.

    Outside of brackets and quotes nothing is special: `*.jsonl` is no alias and `a #1` has no
    comment, so no part of what was typed is lost. Raises ConfigError for nothing at all: a shell
    variable that is not set would else be null, and what it was meant to name left out.
    """
    stripped = text.strip()
    if not stripped:
        null = f"{name} null" if name.startswith("--") else f"{name}=null"
        raise ConfigError(
            f"{name} is given no value. Write {null} where none is meant, or leave it out."
        )
    if not stripped.startswith(("[", "{", '"', "'")):
        return Plain(stripped)
    document = parse(text, name)
    if document.problems:
        raise ConfigError(f"{name}: {document.problems[0][1]}")
    return document.value


def settle(value: Any, as_text: bool) -> Any:
    """`value` with every Plain in it read as null, true, false, a number or text.

    as_text: numbers stay as they are written, and paths become text.
    """
    if isinstance(value, Plain):
        return _settle_plain(value, as_text)
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value)
        return {str(key): settle(item, as_text) for key, item in items.items()}
    if isinstance(value, list | tuple):
        return [settle(item, as_text) for item in cast("Sequence[Any]", value)]
    if as_text and isinstance(value, os.PathLike):
        return os.fspath(cast("os.PathLike[str]", value))
    return value


def _settle_plain(value: Plain, as_text: bool) -> None | bool | int | float | str:
    text = str(value)
    if text in NULL:
        return None
    if text in BOOLEAN:
        return BOOLEAN[text]
    if not as_text and WHOLE.fullmatch(text):
        return int(text)
    if not as_text and NUMBER.fullmatch(text):
        return float(text)
    return text


def write(value: Any) -> str:
    """`value` on one line of YAML, which 1.1 readers understand the same way.

    Values that YAML has no form for (only ever shown in errors) are written as Python would.
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        text = repr(value)
        return text.replace("e", ".0e") if "e" in text and "." not in text else text
    if isinstance(value, str):
        return value if _is_bare(value) else quote(value)
    if isinstance(value, list):
        return "[" + ", ".join(map(write, cast("list[Any]", value))) + "]"
    if isinstance(value, dict):
        items = cast("dict[Any, Any]", value)
        return "{" + ", ".join(f"{write(key)}: {write(item)}" for key, item in items.items()) + "}"
    return repr(value)


def _is_bare(text: str) -> bool:
    """Whether `text` means itself without quotes, here and to YAML 1.1 (no dates, no `yes`)."""
    if not BARE.fullmatch(text) or not isinstance(_settle_plain(Plain(text), False), str):
        return False
    return yaml.resolver.Resolver().resolve(yaml.ScalarNode, text, (True, False)) == TEXT_TAG


def quote(text: str) -> str:
    """`text` in double quotes, with escapes for what is not printable."""
    return '"' + "".join(map(_escape, text)) + '"'


def _escape(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character.isprintable():
        return character
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
