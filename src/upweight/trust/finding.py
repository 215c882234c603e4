"""What the preflight and the watch report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """A diagnosis code, what was seen, a few of the rows that it was seen in, and the metric whose
    curve shows it."""

    code: str
    said: str
    rows: tuple[str, ...] = ()
    metric: str = ""

    def __str__(self) -> str:
        return f"warning[{self.code}]: {self.sentence}  Run: upweight explain {self.code}"

    @property
    def sentence(self) -> str:
        return self.said + (f" Rows: {', '.join(self.rows)}." if self.rows else "")
