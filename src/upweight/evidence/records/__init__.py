"""A run directory as frozen records: what the report is a pure function of.

A run that is still going, or that was killed, has a readable directory: a file that is not there
yet and a last line that was cut off become notes. A file that is there and is not what it is said
to be is a DataError that names the file and the line.
"""

from __future__ import annotations

from upweight.evidence.records.nouns import (
    Comparison,
    ComparisonRow,
    LedgerRow,
    Measurement,
    Records,
    Sample,
    SetAccount,
    Setting,
    Suspected,
    Warned,
)
from upweight.evidence.records.read import read_records

__all__ = [
    "Comparison",
    "ComparisonRow",
    "LedgerRow",
    "Measurement",
    "Records",
    "Sample",
    "SetAccount",
    "Setting",
    "Suspected",
    "Warned",
    "read_records",
]
