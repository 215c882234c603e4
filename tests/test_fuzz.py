"""Whatever a file or a row holds: rows that are used or dropped by name, or one DataError. Never a
traceback, and never a row that is in no account."""

from __future__ import annotations

import csv
import gzip
import io
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runs import furnish
from tiny import byte_tokenizer
from upweight.cli import main
from upweight.config import Preflight
from upweight.data.account import REASONS, Account
from upweight.data.columns import COLUMNS, SCORES, detect
from upweight.data.formats import example_of, prompt_of
from upweight.data.preferences import unusable
from upweight.data.render import Renderer, make_renderer
from upweight.data.stream import grow, load_examples, load_prompts, overlap, split_by_prompt
from upweight.errors import DataError, ModelError
from upweight.trust.finding import Refused
from upweight.trust.spans import Texts, examine_texts
from upweight.types import Dropped, Example, RowId

ROW = RowId("rows.jsonl", 7)
CHAT = make_renderer(byte_tokenizer(), max_length=200, truncation="prompt")
PLAIN = make_renderer(byte_tokenizer(template=None), max_length=120, truncation="response")

NASTY = [
    "", " ", "\0", "\ufeff", "\u2028", "\x85", "\r", "\ud800", "\udfff x", "\U0001f642", "e\u0301",
    "<|im_end|>", "<|im_start|>user\n", "{{ 1/0 }}", "[/b]", "[red]", "\x1b[31m", "null", "[{", '"',
    "NaN", "\n\nHuman: a\n\nAssistant: b", "\u202e", "user", "assistant", "a" * 300,
]  # fmt: skip
texts = st.text(max_size=8) | st.sampled_from(NASTY) | st.text(st.characters(), max_size=4)
numbers = (
    st.integers() | st.floats() | st.sampled_from([10**400, -(10**30), 1e-320, 1e300, True, 0])
)
names = st.sampled_from(
    sorted(
        {name for columns in COLUMNS.values() for name in columns.all}
        | {"role", "content", "text", "score", "tool_calls", "type", "self", "messages", "\ud800"}
    )
)
values = st.recursive(
    st.none() | numbers | texts,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(names | texts, inner, max_size=3)
        | st.tuples(inner, st.integers(1, 1500)).map(lambda x: nested(*x))
    ),
    max_leaves=8,
)


def nested(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value


messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]) | texts, "content": texts},
    optional={"tool_calls": values, "name": texts, "extra": values},
)
contents = texts | st.lists(messages, max_size=3) | messages | values
answers = contents | st.fixed_dictionaries(
    {"text": texts}, optional={"score": numbers, "weight": numbers}
)
common = {"tools": values, "template_options": values, "weight": numbers, "more": values}
beside = numbers | texts | numbers.map(str) | values
scored = {name: beside for pair in SCORES for name in pair} | {"margin": beside}
pairs = st.fixed_dictionaries(
    {"chosen": contents, "rejected": contents},
    optional=common | scored | {"prompt": contents, "probability": beside},
)
groups = st.fixed_dictionaries(
    {"prompt": contents, "responses": st.lists(answers, max_size=4)},
    optional=common
    | {
        "scores": st.lists(numbers, max_size=4),
        "preferences": st.lists(st.lists(st.integers(0, 4) | numbers, max_size=3), max_size=3),
    },
)
alone = st.fixed_dictionaries(
    {"messages": st.lists(messages, max_size=4) | values}, optional=common
)
completed = st.fixed_dictionaries(
    {"prompt": contents, "completion": contents}, optional=common | {"label": values}
)
likely_rows = pairs | groups | alone | completed
any_rows = likely_rows | st.dictionaries(names | texts, values, max_size=6)


def settled(num: int) -> settings:
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=num, deadline=None, suppress_health_check=quiet)


def rendered(examples: list[Example], account: Account, renderer: Renderer) -> None:
    """Grows the examples; each is then a tree or dropped for a reason that can be written."""
    read = account.read
    found = grow(examples, renderer, account)
    assert account.used == len(found)
    assert account.read == read == account.used + sum(account.dropped.values())
    texts = Texts("rows", examples, found, account, renderer, renderer.stop_ids, Preflight())
    for finding in examine_texts(texts):
        if isinstance(finding, Refused):
            # No other than those of shares: no row is scored on tokens that are not its own, and
            # none is lost without a reason.
            share = "preflight.dropped" if finding.code == "UW208" else "preflight.spans"
            assert finding.code in ("UW201", "UW202", "UW203", "UW204", "UW208"), finding
            assert share in finding.said, finding


def accounted(paths: list[str]) -> tuple[list[Example], Account] | None:
    """What load_examples makes of the files, or None for a DataError that can be printed."""
    try:
        examples, account = load_examples(paths)
    except DataError as error:
        str(error).encode()
        return None
    assert account.read == account.used + sum(account.dropped.values())
    assert account.used == len(examples) and account.dropped.keys() <= REASONS.keys()
    json.dumps(account.to_json(), ensure_ascii=False).encode()
    return examples, account


@settled(4000)
@given(any_rows)
def test_any_row_is_an_example_a_drop_or_a_data_error(row: dict[str, Any]):
    for read in (lambda: example_of(row, ROW, detect(row, ROW)), lambda: prompt_of(row, ROW)):
        try:
            found = read()
        except DataError as error:
            assert str(error).startswith("rows.jsonl:7")
            str(error).encode()
            continue
        if isinstance(found, Example):
            found = unusable(found, require_preferences=True) or found
        if isinstance(found, Dropped):
            assert found.reason in REASONS and found.row == ROW
            found.detail.encode()


@settled(2000)
@given(st.lists(likely_rows, max_size=4), st.sampled_from([CHAT, PLAIN]))
def test_any_example_is_rendered_or_dropped(rows: list[dict[str, Any]], renderer: Renderer):
    examples: list[Example] = []
    for i, row in enumerate(rows):
        try:
            found = example_of(row, RowId("rows.jsonl", i), detect(row, ROW))
        except DataError:
            continue
        if isinstance(found, Example) and unusable(found, require_preferences=True) is None:
            examples.append(found)
    if renderer is PLAIN:
        examples = [
            e
            for e in examples
            if all(isinstance(c, str) for c in (e.prompt, *(r.content for r in e.responses)))
        ]
    overlap(examples, examples)
    if len(examples) > 1:
        train, held = [], []
        try:
            train, held = split_by_prompt(examples, 0.5, 0)
        except DataError as error:
            assert "there is none to hold out" in str(error)
        assert len(train) + len(held) in (0, len(examples))
    try:
        rendered(examples, Account(read=len(examples), used=len(examples)), renderer)
    except DataError as error:
        assert "is no variable of a chat template" in str(error)


def as_file(rows: list[Any], kind: str) -> bytes:
    if kind == "a.json":
        return json.dumps(rows).encode()
    if kind in ("a.csv", "a.tsv"):
        out = io.StringIO(newline="")
        writer = csv.writer(out, delimiter="," if kind == "a.csv" else "\t")
        header = list(dict.fromkeys(name for row in rows for name in row))
        writer.writerow(header)
        for row in rows:
            cells = [row.get(name) for name in header]
            writer.writerow([c if isinstance(c, str) else json.dumps(c) for c in cells])
        return out.getvalue().encode("utf-8", "surrogatepass")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    data = lines.encode("utf-8", "surrogatepass")
    return gzip.compress(data, 1) if kind.endswith(".gz") else data


KINDS = ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.jsonl.gz"]
edits = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 3), st.binary(max_size=3) | st.sampled_from(
        [b"[" * 2000, b'{"a":' * 1200, b"\xff", b"\0", b"\r", b"\n", b'"', b"1e999", b"9" * 5000]
    )), max_size=2,
)  # fmt: skip


def edited(data: bytes, changes: list[tuple[float, int, bytes]]) -> bytes:
    for place, num, put in changes:
        at = int(place * len(data))
        data = data[:at] + put + data[at + num :]
    return data


@settled(2000)
@given(st.lists(likely_rows, min_size=1, max_size=4), st.sampled_from(KINDS), edits)
def test_any_file_is_rows_that_are_accounted_for_or_a_data_error(
    tmp_path: Path, rows: list[dict[str, Any]], kind: str, changes: list[tuple[float, int, bytes]]
):
    try:
        data = as_file(rows, kind)
    except (RecursionError, ValueError, csv.Error):
        return
    path = tmp_path / kind
    path.write_bytes(edited(data, changes))
    found = accounted([str(path)])
    if found is not None:
        try:
            rendered(*found, CHAT)
        except DataError as error:
            assert "is no variable of a chat template" in str(error)
    try:
        load_prompts([str(path)])
    except DataError as error:
        str(error).encode()


@settled(2500)
@given(
    st.binary(max_size=80)
    | st.text("{}[]\",:\n\t'ab\\u0d\ud800 1e", max_size=80).map(
        lambda t: t.encode("utf-8", "surrogatepass")
    ),
    st.sampled_from([*KINDS, "a.parquet", "a.json.gz", "a.csv.gz"]),
)
def test_any_bytes_are_rows_that_are_accounted_for_or_a_data_error(
    tmp_path: Path, data: bytes, name: str
):
    (tmp_path / name).write_bytes(data)
    accounted([str(tmp_path / name)])


ARROW = st.sampled_from(
    [
        pa.string(), pa.large_string(), pa.binary(), pa.int64(), pa.float16(), pa.bool_(),
        pa.timestamp("ns", tz="Europe/Berlin"), pa.date64(), pa.duration("ns"), pa.null(),
        pa.decimal128(30, 5), pa.list_(pa.string()), pa.dictionary(pa.int8(), pa.string()),
        pa.map_(pa.string(), pa.string()), pa.list_(pa.float32(), 2),
        pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
        pa.struct([("role", pa.string()), ("content", pa.list_(pa.string()))]),
    ]
)  # fmt: skip
_FILL: list[Any] = [
    "a", b"\xff", 2**62, 0.5, True, Decimal("1.5"), ["x", None], [("k", "v"), ("k", "w")],
    [1.0, 2.0], [{"role": "assistant", "content": "x"}], {"role": "user", "content": ["y"]}, None,
]  # fmt: skip
columns = st.dictionaries(
    st.sampled_from(
        ["prompt", "chosen", "rejected", "responses", "scores", "messages", "x", *SCORES[0]]
    ),
    st.tuples(ARROW, st.lists(st.sampled_from(_FILL), min_size=2, max_size=2)),
    min_size=1,
)  # fmt: skip


@settled(1000)
@given(columns, edits)
def test_any_parquet_is_rows_that_are_accounted_for_or_a_data_error(
    tmp_path: Path, made: dict[str, Any], changes: list[tuple[float, int, bytes]]
):
    arrays: dict[str, Any] = {}
    for name, (kind, cells) in made.items():
        try:
            arrays[name] = pa.array(cells, kind)
        except (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError):
            arrays[name] = pa.array([None, None], kind)
    path = tmp_path / "a.parquet"
    try:
        pq.write_table(pa.table(arrays), path)
    except pa.ArrowException:
        return
    # The magic bytes at both ends stay: what is between them is what is read.
    data = path.read_bytes()
    if changes and len(changes[0][2]) < 4:
        path.write_bytes(data[:4] + edited(data[4:-4], changes) + data[-4:])
    found = accounted([str(path)])
    if found is not None:
        try:
            rendered(*found, CHAT)
        except (DataError, ModelError) as error:
            str(error).encode()


PAIR = '{"prompt": "p", "chosen": "a", "rejected": "b"%s}\n'
DEEP = "[" * 600 + "]" * 600
DEEPER = '{"a": ' * 900 + "1" + "}" * 900
BAD = {
    "deep_row.jsonl": DEEP,
    "deep_content.jsonl": PAIR % f', "tools": {DEEP}',
    "deep_prompt.jsonl": '{"prompt": ' + DEEP + ', "chosen": "a", "rejected": "b"}',
    "deep_extra.jsonl": '{"prompt": [{"role": "user", "content": "x", "extra": '
    + DEEP
    + '}], "chosen": "a", "rejected": "b"}',
    "deep_options.jsonl": PAIR % (', "template_options": {"a": ' + DEEPER + "}"),
    "deep_score.jsonl": '{"prompt": "p", "responses": [{"text": "a", "score": ' + DEEPER + "}]}",
    "deep_text.jsonl": PAIR % f', "tools": "{DEEP}"',
    "deepest.json": "[" * 100_000,
    "weights.jsonl": '{"prompt": "p", "responses": [{"text": "a", "weight": 1e300, "score": 1}, '
    '{"text": "b", "weight": 1e300, "score": 0}]}',
    "digits.jsonl": PAIR % (', "weight": ' + "9" * 5000),
    "twice.jsonl": PAIR % ', "chosen": "c"',
    "half.jsonl": PAIR % "" + '{"prompt": "p", "cho',
    "utf16.jsonl": (PAIR % "").encode("utf-16"),
    "nul.csv": "prompt,chosen,rejected\na\0,b\n",
    "quote.csv": 'prompt,chosen,rejected\n"a,b,c\n',
    "not.parquet": b"PAR1 no PAR1",
    "cut.jsonl.gz": gzip.compress((PAIR % "").encode() * 99)[:-9],
    "roles.jsonl": '{"messages": [{"role": "\\ud800[/b]", "content": "x"}]}',
    "numbers.jsonl": '{"prompt": 1, "chosen": 2, "rejected": 3}',
}


@pytest.mark.parametrize("name", BAD)
def test_a_nasty_file_ends_in_one_message_and_status_2(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    furnish(tmp_path, monkeypatch)
    found = BAD[name]
    Path(name).write_bytes(found if isinstance(found, bytes) else found.encode())
    assert main(["check", "--model", "model", "--data", name]) == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    assert printed.err.count("error") >= 1 and name in printed.err


ODD = [
    PAIR % ', "\\ud800[/b]": 1',
    PAIR % f', "unread": {DEEP}',
    '{"prompt": "[/b] \\u0000 \\u001b[31m", "chosen": "[red]", "rejected": "x\\u2028"}\n',
    '{"prompt": "q", "chosen": "\\ud83d\\ude42 \\ud800", "rejected": "b"}\n',
    '{"prompt": [{"role": "user", "content": "q"}], "rejected": "b", '
    '"chosen": [{"role": "\\ud800", "content": "a"}]}\n',
]


@pytest.mark.parametrize("how", [["--json"], []])
def test_odd_rows_are_used_or_dropped_and_can_be_printed(
    how: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    furnish(tmp_path, monkeypatch)
    Path("odd.jsonl").write_text("".join(ODD))
    half = ["--preflight.dropped", "0.5"]
    assert main(["check", "--model", "model", "--data", "odd.jsonl", *half, *how]) == 0
    printed = capsys.readouterr()
    (printed.out + printed.err).encode()
    if how:
        account = json.loads(printed.out)["sets"]["train"]
        assert (account["read"], account["used"]) == (5, 3)
        assert account["dropped"] == {"bad_unicode": 1, "prompt_mismatch": 1}


@pytest.mark.slow
def test_a_line_of_100_megabytes_is_a_row(tmp_path: Path):
    long = "word and " * 11_000_000
    rows = [
        {"prompt": "p", "chosen": long, "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = accounted([str(path)])
    assert found is not None and found[1].used == 2
    path.write_text('{"prompt": "' + long)
    assert accounted([str(path)]) is None
