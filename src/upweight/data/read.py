"""Files to rows, each with the line or row that it came from. Files are read once, in order.

Every reader takes a path and yields (line, row). JSON Lines and CSV count the file's lines from 1
(a CSV row is at the line it begins on), JSON and Parquet count rows from 1.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from upweight.data.columns import COLUMNS, LOOKED_AT, READ, Row, json_value, shown
from upweight.errors import DataError, nearest
from upweight.rows import RowId

Lines = Iterator[tuple[int, Row]]


def read_rows(
    paths: Iterable[str], columns: Collection[str] | None = LOOKED_AT
) -> Iterator[tuple[RowId, Row]]:
    """Every row of every file, the files in the order given.

    A column of a Parquet file that is none of `columns` (None: all are wanted) is null in its rows:
    it may hold what Python has no value for, and be large. Raises DataError for a file that is
    missing, empty, of an unknown kind or not what its name says, with the line and column where
    that is known.
    """
    for path in paths:
        num_rows = 0
        with _readable(path):
            reader = reader_of(path)
            for line, row in _parquet(path, columns) if reader is _parquet else reader(path):
                num_rows += 1
                yield RowId(path, line), row
            if num_rows == 0:
                raise DataError(
                    f"{path} {'has no rows' if Path(path).stat().st_size else 'is empty'}."
                )


def is_data_file(name: str) -> bool:
    """Whether a file of this name would be read, if it was there."""
    return _kind(Path(name)) in READERS


def reader_of(path: str) -> Callable[[str], Lines]:
    """The reader for a file's name. Raises DataError where there is no such file or no reader."""
    file = Path(path)
    if file.is_dir():
        inside = sorted(f.name for f in file.iterdir() if _kind(f) in READERS)
        held = f" It holds: {', '.join(inside[:8])}." if inside else ""
        raise DataError(f"{path} is a folder. Name its files.{held}")
    if not file.exists():
        folder = file.parent
        if not folder.is_dir():
            raise DataError(f"{path} does not exist, nor does the folder {folder}.")
        hint = nearest(file.name, (f.name for f in folder.iterdir() if f.is_file()))
        raise DataError(f"{path} does not exist.{hint}")
    kind = _kind(file)
    if kind not in READERS:
        raise DataError(
            f"{path} is no known kind of data file. Allowed: {', '.join(READERS)}; all but "
            f".parquet also with .gz.{nearest(kind, READERS)}"
        )
    return READERS[kind]


@contextmanager
def _readable(path: str) -> Generator[None]:
    """Says what the operating system or gzip has against a file as a DataError."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is not a whole gzip file: {error}.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None


def _kind(file: Path) -> str:
    suffixes = [s.lower() for s in file.suffixes]
    if suffixes[-1:] == [".gz"]:
        return suffixes[-2] if len(suffixes) > 1 and suffixes[-2] != ".parquet" else ".gz"
    return suffixes[-1] if suffixes else ""


def _opened(path: str) -> io.BufferedIOBase:
    return gzip.GzipFile(path) if path.lower().endswith(".gz") else open(path, "rb")


def _text(found: bytes, path: str, offset: int = 0) -> str:
    """The bytes at `offset` as text, without the byte-order mark that some editors write."""
    try:
        return found.decode().removeprefix("" if offset else "\ufeff")
    except UnicodeDecodeError as error:
        at = error.start
        raise DataError(
            f"{path} is not UTF-8: byte {found[at]:#04x} at offset {offset + at}. Save it as UTF-8."
        ) from None


def _json_lines(path: str) -> Lines:
    offset = 0
    with _opened(path) as file:
        # Binary lines end at line feeds alone: text may hold the other characters that
        # splitlines() breaks at.
        for line, chunk in enumerate(file, start=1):
            text = _text(chunk, path, offset).rstrip()
            offset += len(chunk)
            if text:
                yield line, _row(_parsed(text, path, line), path, line)


def _json(path: str) -> Lines:
    """A list of rows, an object that holds one, a single row, or JSON Lines under another name."""
    with _opened(path) as file:
        text = _text(file.read(), path)
    if not text.strip():
        return
    try:
        value = _parsed(text, path, 1)
    except DataError:
        first = text.lstrip().split("\n", 1)
        if len(first) == 2 and _is_object(first[0]):
            yield from _json_lines(path)
            return
        raise
    columns = {name for c in COLUMNS.values() for name in c.required if name != "prompt"}
    if isinstance(value, Mapping) and not columns.intersection(value):
        lists = [v for v in cast(Mapping[str, Any], value).values() if isinstance(v, list)]
        if len(lists) != 1:
            raise DataError(
                f"{path} is an object with {len(lists)} lists. Allowed: a list of rows, or an "
                "object with one list of rows."
            )
        value = lists[0]
    rows = cast(list[Any], value) if isinstance(value, list) else [value]
    for number, row in enumerate(rows, start=1):
        yield number, _row(row, path, number)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), Mapping)
    except (ValueError, RecursionError):
        return False


def _parsed(text: str, path: str, line: int) -> Any:
    """`line` is where the text begins in its file."""
    try:
        return json_value(text, f"{path}:{line}")
    except json.JSONDecodeError as error:
        near = ascii(text[max(0, error.pos - 20) : error.pos + 20])
        where = f"{path}:{line + error.lineno - 1}"
        raise DataError(
            f"{where} is not JSON: {error.msg} at column {error.colno}, near {near}."
        ) from None
    except RecursionError:
        raise DataError(f"{path}:{line} is nested too deeply to be a row.") from None
    except ValueError as error:
        raise DataError(f"{path}:{line} is not JSON that can be read: {error}.") from None


def _row(value: Any, path: str, line: int) -> Row:
    if not isinstance(value, Mapping):
        raise DataError(
            f"{path}:{line} is no object but {shown(value)}. A row is an object, such as "
            '{"prompt": ..., "chosen": ..., "rejected": ...}.'
        )
    return cast(Row, value)


def _csv(path: str, delimiter: str = ",") -> Lines:
    with _opened(path) as file:
        text = _text(file.read(), path)
    # The default refuses a cell of 128 KiB, which a long conversation is.
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in rows:
            if cells and header is None:
                header = _header(cells, path)
            elif cells:
                yield line, _record(header or [], cells, path, line)
            line = rows.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}:{line} is not CSV: {error}. Quote a cell that holds a comma, a quote or a "
            "line break, and write a quote inside it twice."
        ) from None


def _tsv(path: str) -> Lines:
    return _csv(path, "\t")


def _header(cells: list[str], path: str) -> list[str]:
    twice = sorted({c for c in cells if cells.count(c) > 1})
    if twice:
        raise DataError(f"{path}:1 names the column {twice[0]!r} twice.")
    return cells


def _record(header: list[str], cells: list[str], path: str, line: int) -> Row:
    if len(cells) != len(header):
        raise DataError(
            f"{path}:{line} has {len(cells)} cells, and the header names {len(header)} columns: "
            f"{', '.join(header)}."
        )
    return dict(zip(header, cells, strict=True))


def _parquet(path: str, columns: Collection[str] | None = LOOKED_AT) -> Lines:
    """A column that is not wanted stays on disk, and is null in the rows: it may hold what Python
    has no value for."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if Path(path).stat().st_size == 0:
            return
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            twice = next((n for n in names if names.count(n) > 1), None)
            if twice is not None:
                raise DataError(f"{path} names the column {twice!r} twice. Rename or remove one.")
            read = [n for n in names if columns is None or n in columns]
            line = 0
            for batch in file.iter_batches(batch_size=1024, columns=read):
                for row in _values(batch, path, line):
                    line += 1
                    yield line, {name: row.get(name) for name in names}
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no Parquet file that can be read: {error}.") from None


def _values(batch: Any, path: str, num_before: int) -> list[Row]:
    try:
        return batch.to_pylist(maps_as_pydicts="strict")
    except (ValueError, OverflowError, KeyError) as error:
        name = next((n for n in batch.schema.names if not _holds(batch.select([n]))), None)
        assert name is not None
        remove = "" if name in READ else ", or remove it where no reward reads it"
        raise DataError(
            f"{path} has a value in the column {name!r}, among rows {num_before + 1} to "
            f"{num_before + len(batch)}, that Python cannot hold: {error}. Save the column as text "
            f"or numbers{remove}."
        ) from None


def _holds(batch: Any) -> bool:
    try:
        batch.to_pylist(maps_as_pydicts="strict")
    except (ValueError, OverflowError, KeyError):
        return False
    return True


READERS: dict[str, Callable[[str], Lines]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
