"""run.yaml: the resolved config, each value with where it came from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from upweight.errors import DataError
from upweight.evidence.records.nouns import Setting
from upweight.evidence.records.objects import REMEDY, read_bytes


def read_settings(path: Path) -> tuple[Setting, ...]:
    """The leaves of run.yaml in their order. The trailing comment of a line is the origin."""
    raw = read_bytes(path)
    if raw is None:
        return ()
    try:
        text = raw.decode("utf-8")
        leaves = _parse(text)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{path.name}:{line} is not UTF-8 text. {REMEDY}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path.name}:{mark.line + 1}" if mark else path.name
        reason = getattr(error, "problem", None) or getattr(error, "reason", "not YAML")
        raise DataError(f"{where} is not valid YAML ({reason}). {REMEDY}") from None
    except RecursionError:
        raise DataError(f"{path.name} is nested too deeply to be a config. {REMEDY}") from None
    if leaves is None:
        raise DataError(f"{path.name}:1 is not a mapping of keys to values. {REMEDY}")
    return leaves


def _parse(text: str) -> tuple[Setting, ...] | None:
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is None:
        return ()
    return tuple(_leaves(root, "", text)) if isinstance(root, yaml.MappingNode) else None


def _leaves(node: yaml.MappingNode, prefix: str, text: str) -> Iterator[Setting]:
    for key, value in node.value:
        name = prefix + str(key.value)
        if isinstance(value, yaml.MappingNode) and value.value and not value.flow_style:
            yield from _leaves(value, f"{name}.", text)
        else:
            yield Setting(name, _as_written(value), _comment_after(key, value, text))


def _as_written(node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode):
        return "[" + ", ".join(map(_as_written, node.value)) + "]"
    if isinstance(node, yaml.MappingNode):
        return "{" + ", ".join(f"{_as_written(k)}: {_as_written(v)}" for k, v in node.value) + "}"
    return str(node.value)


def _comment_after(key: yaml.Node, value: yaml.Node, text: str) -> str:
    """The comment that ends the value's line, or the key's line where the value has several."""
    block = isinstance(value, yaml.CollectionNode) and not value.flow_style
    literal = isinstance(value, yaml.ScalarNode) and value.style in ("|", ">")
    mark = key.end_mark if block or literal else value.end_mark
    rest = text[mark.index :].split("\n", 1)[0]
    return rest.partition("#")[2].strip()
