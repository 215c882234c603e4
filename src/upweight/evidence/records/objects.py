"""JSON objects that know where they were read, to say so when a field is not what it should be."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from upweight.errors import DataError
from upweight.evidence.records.nouns import Json

REMEDY = "Repair or remove it, then run upweight report again."


@dataclass(frozen=True, slots=True)
class JsonObject:
    fields: Json
    where: str

    def wrong(self, key: str, expected: str) -> DataError:
        if key not in self.fields:
            there = ", ".join(self.fields) or "nothing"
            return DataError(
                f'{self.where} has no "{key}" (it has: {there}). Expected {expected}. {REMEDY}'
            )
        found = json.dumps(self.fields[key])[:80]
        return DataError(f'{self.where}: "{key}" is {found}, expected {expected}. {REMEDY}')

    def number(self, key: str) -> float:
        value = self.fields.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(key, "a number")
        try:
            return float(value)
        except OverflowError:
            raise self.wrong(key, "a number that fits in a double") from None

    def whole(self, key: str) -> int:
        value = self.fields.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.wrong(key, "a whole number of at least 0")
        return value

    def text(self, key: str) -> str:
        value = self.fields.get(key)
        if not isinstance(value, str):
            raise self.wrong(key, "text")
        return value

    def object(self, key: str) -> JsonObject:
        value = self.fields.get(key)
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return JsonObject(cast(Json, value), f"{self.where}, {key}")

    def objects(self, key: str) -> tuple[JsonObject, ...]:
        value = self.fields.get(key)
        if not isinstance(value, list):
            raise self.wrong(key, "a list of objects")
        items = cast("list[object]", value)
        if not all(isinstance(item, dict) for item in items):
            raise self.wrong(key, "a list of objects")
        return tuple(
            JsonObject(cast(Json, item), f"{self.where}, {key}[{i}]")
            for i, item in enumerate(items)
        )

    def numbers(self) -> dict[str, float]:
        """Every field as a number; null, which stands for what is not finite, is nan."""
        return {
            sys.intern(key): math.nan if value is None else self.number(key)
            for key, value in self.fields.items()
        }

    def wholes(self) -> dict[str, int]:
        return {key: self.whole(key) for key in self.fields}


def parse_object(raw: bytes, file: str, line: int | None = None) -> JsonObject:
    """The JSON object in `raw`, which is line `line` of `file`, or all of it."""
    where = file if line is None else f"{file}:{line}"
    try:
        value: object = json.loads(raw.decode("utf-8"))
    except json.JSONDecodeError as error:
        at = f"{file}:{(line or 1) + error.lineno - 1}"
        found = f"{error.msg} at character {error.colno}"
        raise DataError(f"{at} is not valid JSON ({found}). {REMEDY}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON ({error}). {REMEDY}") from None
    if not isinstance(value, dict):
        raise DataError(f"{where} is a {type(value).__name__}, expected a JSON object. {REMEDY}")
    return JsonObject(cast(Json, value), where)


def read_bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes() if path.is_file() else None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None


def json_file(path: Path) -> JsonObject | None:
    raw = read_bytes(path)
    return None if raw is None else parse_object(raw, path.name)


def json_lines(path: Path, notes: list[str]) -> Iterator[JsonObject]:
    """The objects of a JSON Lines file; a last line that was cut off becomes a note."""
    lines = (read_bytes(path) or b"").split(b"\n")
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            continue
        try:
            parsed = parse_object(raw, path.name, number)
        except DataError:
            # Writers end each line with a newline: without one, the run stopped within this line.
            if number < len(lines):
                raise
            notes.append(
                f"The last line of {path.name} is cut off (the run stopped while writing it) "
                "and is left out."
            )
            return
        yield parsed
