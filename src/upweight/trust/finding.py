"""What the preflight and the watch report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """A diagnosis code, what was seen, and a few of the rows that it was seen in."""

    code: str
    said: str
    rows: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"warning[{self.code}]: {self.sentence}  Run: upweight explain {self.code}"

    @property
    def sentence(self) -> str:
        return self.said + (f" Rows: {', '.join(self.rows)}." if self.rows else "")
