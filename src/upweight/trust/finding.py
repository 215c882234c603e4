"""What the preflight and the watch report, and what ends a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """A diagnosis code, what was seen, a few of the rows that it was seen in, the metric whose
    curve shows it, and which observer of the watch saw it."""

    code: str
    said: str
    rows: tuple[str, ...] = ()
    metric: str = ""
    observer: str = ""

    def __str__(self) -> str:
        return f"{self.level}[{self.code}]: {self.sentence}  Run: upweight explain {self.code}"

    @property
    def level(self) -> str:
        return "warning"

    @property
    def sentence(self) -> str:
        return self.said + (f" Rows: {', '.join(self.rows)}." if self.rows else "")


@dataclass(frozen=True)
class Refused(Finding):
    """A finding with which no run begins."""

    @property
    def level(self) -> str:
        return "error"
