"""What a recipe tells the person who runs it. The terminal implements it; Silent says nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from upweight.data.trees import Shown


def counted(num: int, one: str) -> str:
    """1 row, 1,234 rows."""
    return f"{num:,} {one}{'' if num == 1 else 's'}"


@runtime_checkable
class Screen(Protocol):
    def stage(self, name: str) -> None:
        """A named part of the run begins."""
        ...

    def progress(self, done: int, total: int) -> None:
        """How far the stage is."""
        ...

    def note(self, text: str) -> None:
        """One line that stays."""
        ...

    def table(self, head: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
        """A table that stays; its first column names the lines, the others are numbers."""
        ...

    def row(self, shown: Shown) -> None:
        """A row as it is scored."""
        ...

    def record(self, record: Mapping[str, object], total_steps: int) -> None:
        """A logged training step or evaluation, as in metrics.jsonl."""
        ...


class Silent:
    def stage(self, name: str) -> None: ...

    def progress(self, done: int, total: int) -> None: ...

    def note(self, text: str) -> None: ...

    def table(self, head: Sequence[str], lines: Sequence[Sequence[str]]) -> None: ...

    def row(self, shown: Shown) -> None: ...

    def record(self, record: Mapping[str, object], total_steps: int) -> None: ...
