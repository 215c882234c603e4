"""Read comparison.json."""

from __future__ import annotations

import math
from pathlib import Path

from upweight.errors import DataError
from upweight.evidence.comparison.nouns import (
    Claim,
    Method,
    Noticed,
    Pair,
    Point,
    Start,
    Study,
    Taught,
)
from upweight.evidence.records.objects import JsonObject, json_file


def read_study(folder: Path) -> Study:
    """The study in `folder`/comparison.json; null stands for a number that is not known.

    Raises DataError when it is not there or malformed.
    """
    whole = json_file(folder / "comparison.json")
    if whole is None:
        raise DataError(
            f"{folder} has no comparison.json. Give the folder that a comparison was written to."
        )
    start, said = whole.object("start"), whole.object("claim")
    return Study(
        title=whole.text("title"),
        reward=whole.text("reward"),
        start=Start(
            _number(start, "reward"),
            _number(start, "low"),
            _number(start, "high"),
            start.whole("num_prompts"),
        ),
        methods=tuple(map(read_method, whole.objects("methods"))),
        budget=whole.text("budget"),
        machine=whole.text("machine"),
        seconds=whole.number("seconds"),
        claim=Claim(
            _holds(said),
            said.text("said"),
            tuple(map(_pair, said.objects("pairs"))),
            said.whole("places"),
            said.whole("num_prompts"),
        ),
    )


def _pair(entry: JsonObject) -> Pair:
    return Pair(
        dpo=entry.text("dpo"),
        ppo=entry.text("ppo"),
        compared=_compared(entry),
        holds=_holds(entry),
        said=entry.text("said"),
        in_part=entry.fields.get("in_part") is True,
        gained=entry.fields.get("gained") is not False,
    )


def _compared(entry: JsonObject) -> bool:
    found = entry.fields.get("compared")
    if not isinstance(found, bool):
        raise entry.wrong("compared", "true or false")
    return found


def _holds(entry: JsonObject) -> bool | None:
    found = entry.fields.get("holds")
    if found is not None and not isinstance(found, bool):
        raise entry.wrong("holds", "true, false or null")
    return found


def read_method(entry: JsonObject) -> Method:
    """A method as `asdict` writes it, with null where a number is not known."""
    return Method(
        name=entry.text("name"),
        objective=entry.text("objective"),
        note=entry.text("note"),
        seconds=entry.number("seconds"),
        tokens=entry.whole("tokens"),
        points=tuple(map(_point, entry.objects("points"))),
        failed=None if entry.fields.get("failed") is None else entry.text("failed"),
        taught=None if entry.fields.get("taught") is None else _taught(entry.object("taught")),
        # A record from before reports were kept has none.
        noticed=tuple(map(_noticed, entry.objects("noticed"))) if "noticed" in entry.fields else (),
    )


def _noticed(entry: JsonObject) -> Noticed:
    return Noticed(entry.text("code"), entry.whole("step"), entry.text("said"))


def _taught(entry: JsonObject) -> Taught:
    return Taught(
        kind=entry.text("kind"),
        there=entry.whole("there"),
        seen=entry.whole("seen"),
        steps=entry.whole("steps"),
        answers=entry.whole("answers"),
        by=entry.text("by"),
    )


def _point(entry: JsonObject) -> Point:
    return Point(
        step=entry.whole("step"),
        kl=_number(entry, "kl"),
        kl_low=_number(entry, "kl_low"),
        kl_high=_number(entry, "kl_high"),
        reward=_number(entry, "reward"),
        reward_low=_number(entry, "reward_low"),
        reward_high=_number(entry, "reward_high"),
        length=_number(entry, "length"),
        num_prompts=entry.whole("num_prompts"),
    )


def _number(entry: JsonObject, key: str) -> float:
    if key in entry.fields and entry.fields[key] is None:
        return math.nan
    return entry.number(key)
