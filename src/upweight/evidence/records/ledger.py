"""ledger.parquet: one row per preference per evaluation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.dataset as pads

from upweight.errors import DataError
from upweight.evidence.records.nouns import LedgerRow
from upweight.evidence.records.objects import REMEDY

_NUMBERS = (
    "logp_chosen",
    "logp_rejected",
    "ref_logp_chosen",
    "ref_logp_rejected",
    "reward_chosen",
    "reward_rejected",
    "margin",
)
_TEXTS = ("prompt_text", "chosen_text", "rejected_text")
SCHEMA = pa.schema(
    [("step", pa.int64()), ("set", pa.string()), ("row", pa.string())]
    + [("chosen", pa.int64()), ("rejected", pa.int64())]
    + [(name, pa.float64()) for name in _NUMBERS]
    + [("tokens_chosen", pa.int64()), ("tokens_rejected", pa.int64())]
    + [(name, pa.string()) for name in _TEXTS]
)
"""The columns that evaluations write and the report reads."""


def read_ledger(path: Path) -> tuple[LedgerRow, ...]:
    """The rows of each set's last evaluation."""
    if not path.is_file():
        return ()
    try:
        source = pads.dataset(path, format="parquet")
        absent = [name for name in SCHEMA.names if name not in source.schema.names]
        if absent:
            there = ", ".join(source.schema.names)
            raise DataError(f"{path.name} has no column {absent[0]} (it has: {there}). {REMEDY}")
        last = source.to_table(["set", "step"]).group_by("set").aggregate([("step", "max")])
        rows: list[LedgerRow] = []
        for name, step in zip(last["set"].to_pylist(), last["step_max"].to_pylist(), strict=True):
            if name is None or step is None:
                raise TypeError("column set or step has an empty value")
            chosen = (pads.field("set") == name) & (pads.field("step") == step)
            table = source.to_table(SCHEMA.names, filter=chosen).cast(SCHEMA)
            rows.extend(map(_ledger_row, table.to_pylist()))
    except (pa.ArrowException, OSError, UnicodeDecodeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path.name} is not a readable ledger ({reason}). {REMEDY}") from None
    return tuple(rows)


def _ledger_row(row: dict[str, object]) -> LedgerRow:
    for name in _NUMBERS:
        if row[name] is None:
            row[name] = math.nan
    for name in ("step", "set", "row", "chosen", "rejected", "tokens_chosen", "tokens_rejected"):
        if row[name] is None:
            raise TypeError(f"column {name} has an empty value")
    return LedgerRow(**cast("dict[str, Any]", row))
