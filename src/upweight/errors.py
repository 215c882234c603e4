"""Everything upweight raises on purpose.

UpweightError                 a user's mistake or a refusal; printed without a traceback, exit 2
├── ConfigError               an unknown key, a wrong value, keys that contradict each other
├── DataError                 a file or row that cannot be read as what it is said to be
├── ModelError                a model folder, tokenizer, template or adapter that cannot be used
├── OutputError               a folder in use, no space, a file that cannot be written
├── RewardError               a reward that is missing, fails or gives no finite number
└── Refusal                   training would be silently wrong; carries a diagnosis code (UW101 ...)

Our own bugs are assertions and keep their traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence


class UpweightError(Exception):
    """Says where, what was found, what is allowed and what to do. `str(error)` is what is shown."""

    code: str | None = None


class ConfigError(UpweightError):
    """The configuration cannot be what the user meant."""


class DataError(UpweightError):
    """A data file or row is not readable as the format it is read with."""


class ModelError(UpweightError):
    """A model, tokenizer, template or adapter cannot be used as asked."""


class OutputError(UpweightError):
    """The output folder cannot be used or written to."""


class RewardError(UpweightError):
    """A reward cannot be computed as asked."""


class Refusal(UpweightError):
    """The run would finish and be wrong. `code` is one of the diagnosis codes, such as "UW107", and
    `said` the message without where to read about it. `found` is all that was known when it was
    raised, as JSON has it."""

    def __init__(self, code: str, message: str, found: Mapping[str, object] | None = None) -> None:
        super().__init__(f"{message}  Run: upweight explain {code}")
        self.code = code
        self.said = message
        self.found = found or {}


def nearest(word: str, allowed: Iterable[str]) -> str:
    """A trailing ' Did you mean X?' for the allowed word most like `word`, or ''."""
    matches = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean {matches[0]}?" if matches else ""


def some_of(names: Sequence[str], most: int = 8) -> str:
    """The first few names and how many more there are, for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
