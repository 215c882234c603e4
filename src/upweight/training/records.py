"""Records that grow while a run goes on: lines of .jsonl files, and the rows of the ledger."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from upweight.errors import DataError
from upweight.training.rundir import replacing, write_atomic, writing


def append_jsonl(path: Path, record: Mapping[str, Any]) -> None:
    """Adds one line, whole or not at all; a kill of the process does not lose it afterwards.

    JSON has no nan and no infinity: they are written as null.
    """
    text = json.dumps(finite(record), ensure_ascii=False, allow_nan=False) + "\n"
    # A lone surrogate, which UTF-8 cannot hold, becomes \udxxx: that is JSON's own escape for it.
    line = text.encode("utf-8", "backslashreplace")
    with writing(path, len(line)):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            _append(descriptor, line)
        finally:
            os.close(descriptor)


def _append(descriptor: int, line: bytes) -> None:
    num_before = os.fstat(descriptor).st_size
    num_written = 0
    try:
        while num_written < len(line):
            num_written += os.write(descriptor, line[num_written:])
    except OSError:
        if num_written:
            os.ftruncate(descriptor, num_before)
        raise


def finite(value: Any) -> Any:
    """`value` as JSON has it: nan and infinity are null there."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {key: finite(item) for key, item in value.items()}
        case list() | tuple():
            return [finite(item) for item in value]
        case _:
            return value


def truncate_jsonl_after(path: Path, step: int) -> int:
    """Drops the records of later steps than `step`, and a last line that was cut off. Atomic.

    Returns how many were dropped; a file that is not there has none. Raises DataError for a line
    other than the last that is not a record with a step.
    """
    if not path.exists():
        return 0
    with writing(path):
        *lines, rest = path.read_bytes().split(b"\n")
    lines += [rest] if rest else []
    steps = [_step(line) for line in lines]
    for i, found in enumerate(steps[:-1]):
        if found is None:
            raise DataError(
                f'{path}:{i + 1} is not a JSON object with a "step". Remove the line to resume.'
            )
    kept = [
        line + b"\n" for line, s in zip(lines, steps, strict=True) if s is not None and s <= step
    ]
    if len(kept) < len(lines) or rest:
        write_atomic(path, b"".join(kept))
    return len(lines) - len(kept)


def _step(line: bytes) -> int | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) else None


def write_ledger(path: Path, table: pa.Table) -> None:  # pyright: ignore[reportUnknownParameterType]
    """Makes the table the whole of the Parquet file at `path`, or leaves it untouched."""
    with replacing(path, table.nbytes) as temporary, temporary.open("wb") as file:
        pq.write_table(table, file, compression="zstd")


def truncate_ledger_after(path: Path, step: int) -> int:
    """Drops the ledger's rows of later steps than `step` and returns how many. Atomic."""
    if not path.exists():
        return 0
    table = pq.read_table(path)
    kept = table.filter(pc.field("step") <= step)
    if kept.num_rows < table.num_rows:
        write_ledger(path, kept)
    return table.num_rows - kept.num_rows
