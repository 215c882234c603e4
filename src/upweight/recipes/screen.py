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

    def warn(self, text: str) -> None:
        """A line that stays, of what may be wrong."""
        ...

    def row(self, shown: Shown) -> None:
        """A row as it is scored."""
        ...

    def record(self, record: Mapping[str, object], total_steps: int) -> None:
        """A logged training step or evaluation, as in metrics.jsonl."""
        ...


class AtEnd:
    """Another screen, which is warned of everything together, behind the rest."""

    def __init__(self, screen: Screen) -> None:
        self.stage, self.progress, self.note = screen.stage, screen.progress, screen.note
        self.table, self.row, self.record = screen.table, screen.row, screen.record
        self._last = screen.warn
        self.warned: list[str] = []

    def warn(self, text: str) -> None:
        self.warned.append(text)

    def __enter__(self) -> AtEnd:
        return self

    def __exit__(self, *error: object) -> None:
        for text in self.warned:
            self._last(text)


class Silent:
    def stage(self, name: str) -> None: ...

    def progress(self, done: int, total: int) -> None: ...

    def note(self, text: str) -> None: ...

    def table(self, head: Sequence[str], lines: Sequence[Sequence[str]]) -> None: ...

    def warn(self, text: str) -> None: ...

    def row(self, shown: Shown) -> None: ...

    def record(self, record: Mapping[str, object], total_steps: int) -> None: ...
