"""What was said: files, values and overrides, flattened to one Setting per key that was given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

from upweight.config.base import Section
from upweight.config.keys import SWITCHED, candidates, keys
from upweight.config.sections import SECTIONS
from upweight.config.written import NULL, Plain, parse, parse_value, quote, settle, write
from upweight.errors import ConfigError, nearest


@dataclass(frozen=True, slots=True)
class Layer:
    """One source of settings. Of two settings of a key, the one from the higher rank holds.

    What is said in one breath (a file; or all flags and overrides, `command`) must not contradict
    itself. `lines` are the lines of a file's keys, and `prefix` is what a user types before a key.
    """

    rank: float | int
    origin: str
    file: str = ""
    lines: Mapping[tuple[str, ...], int] = field(default_factory=dict[tuple[str, ...], int])
    prefix: str = ""
    command: bool = False

    def in_one_breath_with(self, other: Layer) -> bool:
        return self.rank == other.rank or (self.command and other.command)


@dataclass(frozen=True, slots=True)
class Setting:
    """A value given under the name `typed`, as yet unchecked.

    `leaf` is the key's full name, or "" where `typed` is not the name of one key.
    """

    leaf: str
    typed: str
    value: Any
    layer: Layer
    line: int = 0

    @property
    def place(self) -> str:
        return f"{self.layer.file}:{self.line}: " if self.layer.file else ""

    @property
    def shown(self) -> str:
        return self.layer.prefix + self.typed

    @property
    def settled(self) -> Any:
        return settle(self.value, keys()[self.leaf].is_text)


class Problem(NamedTuple):
    rank: float | int
    line: int
    text: str


class Problems(list[Problem]):
    """All that is wrong with a configuration, raised as one error in the order of its layers."""

    def at(self, setting: Setting, said: str) -> None:
        self.append(Problem(setting.layer.rank, setting.line, setting.place + said))

    def raise_any(self) -> None:
        if self:
            in_order = sorted(self, key=lambda problem: (problem.rank, problem.line))
            lines = [" ".join(problem.text.splitlines()) for problem in in_order]
            raise ConfigError("\n".join(dict.fromkeys(lines)))


def read_file(file: Path, problems: Problems) -> list[Setting]:
    """The settings in a run.yaml. Raises ConfigError where it is no YAML mapping at all."""
    name = str(file)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        there = [str(path) for path in file.parent.glob("*.y*ml")]
        key, equals, value = name.partition("=")
        if equals:
            raise ConfigError(
                f"{name} stands where the run.yaml is expected, and there is no such file. Without "
                f"one, say --{key} {value}."
            ) from None
        raise ConfigError(f"{name} does not exist.{nearest(name, there)}") from None
    except IsADirectoryError:
        raise ConfigError(f"{name} is a folder; name the run.yaml in it.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not UTF-8 text (byte {error.start + 1}).") from None
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}.") from None
    document = parse(text, name)
    problems += [Problem(0, line, f"{name}:{line}: {said}") for line, said in document.problems]
    if document.value is None:
        return []
    if not isinstance(document.value, dict):
        raise ConfigError(f'{name} must hold "key: value" lines, found {show(document.value)}.')
    layer = Layer(0, f"file {name}", file=name, lines=document.lines)
    return list(collect(cast("dict[str, Any]", document.value), layer, problems))


def read_override(override: str, rank: int, problems: Problems) -> list[Setting]:
    """The settings in `key=value`: one, or several where the key is a section."""
    typed, equals, text = override.partition("=")
    typed = typed.strip()
    try:
        if not equals or not typed:
            raise ConfigError(f"{quote(override)} is no override; write key=value, as in beta=0.2.")
        value = parse_value(text, typed)
    except ConfigError as error:
        problems.append(Problem(rank, 0, str(error)))
        return []
    return list(collect({typed: value}, Layer(rank, "override", command=True), problems))


def collect(
    given: Mapping[str, Any], layer: Layer, problems: Problems, above: tuple[str, ...] = ()
) -> Iterator[Setting]:
    """The settings in a mapping that stands under the keys `above`."""
    for name, value in given.items():
        path = (*above, str(name))
        typed = ".".join(path)
        if isinstance(value, Section):
            value = value.model_dump(exclude_unset=True)
        names = candidates(typed)
        leaf = names[0] if len(names) == 1 else ""
        setting = Setting(leaf, typed, value, layer, layer.lines.get(path, 0))
        section = SECTIONS.get(typed)
        if section is not None and isinstance(value, Mapping):
            if typed == SWITCHED:
                yield Setting(SWITCHED, typed, True, layer, setting.line)
            yield from collect(cast("Mapping[str, Any]", value), layer, problems, path)
        elif leaf == SWITCHED:
            switch = settle(value, False)
            if switch is None or isinstance(switch, bool):
                yield setting
            else:
                problems.at(setting, _wants_keys(setting, "true, false or a section"))
        elif section is None or leaf:
            yield setting
        elif settle(value, False) is not None:
            # A section whose keys are all commented out is null in YAML, and says nothing.
            problems.at(setting, _wants_keys(setting, "a section"))


def _wants_keys(setting: Setting, kind: str) -> str:
    own = ", ".join(SECTIONS[setting.typed].model_fields)
    return f"{setting.shown} must be {kind} with the keys {own}; found {show(setting.value)}."


def show(value: Any) -> str:
    """A value that was found, short enough for an error."""
    if isinstance(value, Plain):
        read = settle(value, False)
        text = quote(read) if isinstance(read, str) else str(value)
        text = "null" if value in NULL else text
    else:
        text = quote(value) if isinstance(value, str) else write(settle(value, False))
    return text if len(text) <= 60 else f"{text[:57]}..."
