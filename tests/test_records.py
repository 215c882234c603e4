from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from run_records import account, eval_line, ledger_row, sample, train_line, write_jsonl, write_run
from upweight.config import dump, load_run
from upweight.errors import DataError
from upweight.evidence.records import Records, Setting, read_records


def test_a_finished_run_is_read_whole_and_without_notes(tmp_path: Path):
    records = read_records(write_run(tmp_path / "film"))
    assert records.name == "film" and records.notes == ()
    assert [m.step for m in records.train] == list(range(1, 21))
    assert [m.step for m in records.evals["heldout"]] == [0, 10, 20]
    assert records.evals["heldout"][2].values["kl"] == pytest.approx(2.0)
    assert [s.step for s in records.samples] == [0, 20, 20]
    assert records.accounts["train"].dropped == {"identical": 2}
    assert records.accounts["train"].examples["identical"][0][0] == "pairs.jsonl:7"
    assert records.accounts["train"].lengths["prompt"]["max"] == 1200
    assert records.template == "chat"
    assert records.environment["upweight"] == "0.1.0"
    assert records.comparison is None


def test_the_ledger_keeps_only_the_last_evaluation_of_each_set(tmp_path: Path):
    run = write_run(tmp_path)
    rows = [ledger_row(0, step=20), ledger_row(1, step=40), ledger_row(2, set="other", step=20)]
    pq.write_table(pa.Table.from_pylist(rows), run / "ledger.parquet")
    ledger = read_records(run).ledger
    assert [(r.set, r.step, r.row) for r in ledger] == [
        ("heldout", 40, "pairs.jsonl:2"),
        ("other", 20, "pairs.jsonl:3"),
    ]


def test_a_number_that_is_missing_from_the_ledger_is_nan(tmp_path: Path):
    run = write_run(tmp_path)
    rows = [ledger_row(0, margin=None), ledger_row(1, prompt_text=None)]
    pq.write_table(pa.Table.from_pylist(rows), run / "ledger.parquet")
    ledger = read_records(run).ledger
    assert math.isnan(ledger[0].margin) and ledger[1].prompt_text is None


@pytest.mark.parametrize(
    "name",
    [
        "run.yaml",
        "account.json",
        "environment.json",
        "metrics.jsonl",
        "ledger.parquet",
        "samples.jsonl",
    ],
)
def test_a_record_that_is_not_there_yet_is_a_note(tmp_path: Path, name: str):
    records = read_records(write_run(tmp_path, without=(name,)))
    assert len(records.notes) == 1 and records.notes[0].startswith(f"{name} is missing: ")


def test_a_folder_without_any_record_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="holds no run: it has none of run.yaml, account.json"):
        read_records(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        read_records(tmp_path / "absent")


def test_a_last_line_that_was_cut_off_is_a_note_and_an_earlier_one_an_error(tmp_path: Path):
    run = write_run(tmp_path)
    path = run / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 21, "epo')
    records = read_records(run)
    assert len(records.train) == 20
    assert records.notes[0].startswith("The last line of metrics.jsonl is cut off")
    path.write_bytes(b'{"step": 21, "epo\n' + whole)
    with pytest.raises(DataError, match=r"metrics.jsonl:1 is not valid JSON \(Unterminated"):
        read_records(run)


def test_steps_that_were_repeated_after_a_resume_count_once(tmp_path: Path):
    run = write_run(tmp_path)
    before = [train_line(1, loss=6.0), train_line(2), eval_line(2), train_line(3), eval_line(3)]
    after = [train_line(2, loss=7.0), eval_line(2, loss=8.0), eval_line(2, loss=9.0)]
    write_jsonl(run / "metrics.jsonl", before + after)
    records = read_records(run)
    assert [(m.step, m.values["loss"]) for m in records.train] == [(1, 6.0), (2, 7.0)]
    assert [(m.step, m.values["loss"]) for m in records.evals["heldout"]] == [(2, 9.0)]
    # Two training steps, two evaluations, and the evaluation that was written twice.
    assert "lines of metrics.jsonl that were written again later (5)" in records.notes[0]


def test_an_evaluation_before_its_own_training_line_is_kept(tmp_path: Path):
    run = write_run(tmp_path)
    write_jsonl(run / "metrics.jsonl", [train_line(1), eval_line(2), train_line(2)])
    assert [m.step for m in read_records(run).evals["heldout"]] == [2]


def test_a_metric_that_was_not_finite_is_nan(tmp_path: Path):
    run = write_run(tmp_path)
    write_jsonl(run / "metrics.jsonl", [train_line(1, loss=None, grad_norm=math.inf)])
    values = read_records(run).train[0].values
    assert math.isnan(values["loss"]) and values["grad_norm"] == math.inf


def test_lines_of_another_kind_are_counted(tmp_path: Path):
    run = write_run(tmp_path)
    write_jsonl(run / "metrics.jsonl", [train_line(1), {"kind": "watch", "code": "UW304"}])
    assert read_records(run).notes == ('metrics.jsonl: lines of kind "watch" are not shown (1).',)


def _replace(name: str, value: object) -> Callable[[Path], None]:
    return lambda run: (run / name).write_text(json.dumps(value) + "\n") and None


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda run: (run / name).write_bytes(content) and None


def _ledger(*rows: dict[str, Any]) -> Callable[[Path], None]:
    return lambda run: pq.write_table(pa.Table.from_pylist(list(rows)), run / "ledger.parquet")


def _less(row: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k != key}


TWICE = {"rows": [{"name": "KL"}, {"name": "KL"}], "title": "t"}
MALFORMED = {
    "metrics.jsonl:1 is a list, expected a JSON object": _write("metrics.jsonl", b"[1]\n"),
    'metrics.jsonl:1 has no "kind" (it has: step). Expected text.': _replace(
        "metrics.jsonl", {"step": 1}
    ),
    'metrics.jsonl:1: "loss" is "low", expected a number.': _replace(
        "metrics.jsonl", train_line(1, loss="low")
    ),
    'metrics.jsonl:1: "loss" is true, expected a number.': _replace(
        "metrics.jsonl", train_line(1, loss=True)
    ),
    "expected a number that fits in a double": _replace(
        "metrics.jsonl", train_line(1, loss=10**400)
    ),
    'metrics.jsonl:1: "step" is -1, expected a whole number of at least 0.': _replace(
        "metrics.jsonl", train_line(-1)
    ),
    "metrics.jsonl:1 is not valid JSON ('utf-8' codec": _write("metrics.jsonl", b'"\xff"\n{}\n'),
    "metrics.jsonl:1 is not valid JSON (maximum recursion": _write(
        "metrics.jsonl", b"[" * 100_000 + b"\n{}\n"
    ),
    'samples.jsonl:1 has no "policy" (it has: step,': _replace(
        "samples.jsonl", _less(sample(1), "policy")
    ),
    "account.json:2 is not valid JSON (Expecting value at character 1)": _write(
        "account.json", b'{"sets":\n'
    ),
    'account.json, sets, train: "dropped" is [], expected an object.': _replace(
        "account.json", {"sets": {"train": account(dropped=[])}}
    ),
    'account.json, sets, train, examples: "empty" is [[1, 2]], expected a list of [row, detail].': (
        _replace("account.json", {"sets": {"train": account(examples={"empty": [[1, 2]]})}})
    ),
    'evaluation.json: "rows" is {}, expected a list of objects.': _replace(
        "evaluation.json", {"title": "t", "rows": {}}
    ),
    'evaluation.json: "rows" is [1], expected a list of objects.': _replace(
        "evaluation.json", {"title": "t", "rows": [1]}
    ),
    'evaluation.json, rows[0] has no "reference" (it has: name).': _replace(
        "evaluation.json", TWICE
    ),
    "run.yaml:2 is not valid YAML": _write("run.yaml", b"a: 1\nb: ]\n"),
    "run.yaml:3 is not UTF-8 text": _write("run.yaml", b"a: 1\n\nb: \xff\n"),
    "run.yaml is not valid YAML (special characters are not allowed)": _write(
        "run.yaml", b"a: \x00\n"
    ),
    "run.yaml is nested too deeply": _write("run.yaml", b"a: &x [*x]\n"),
    "run.yaml:1 is not a mapping of keys to values": _write("run.yaml", b"- a\n"),
    "ledger.parquet is not a readable ledger": _write("ledger.parquet", b"PAR1"),
    "ledger.parquet has no column margin (it has: step, set,": _ledger(
        _less(ledger_row(1), "margin")
    ),
    "ledger.parquet is not a readable ledger (column row has an empty value)": _ledger(
        ledger_row(1, row=None), ledger_row(2)
    ),
    "ledger.parquet is not a readable ledger (column set or step has an empty value)": _ledger(
        ledger_row(1, set=None), ledger_row(2)
    ),
}


@pytest.mark.parametrize("message", MALFORMED)
def test_a_malformed_record_is_named_with_its_place(tmp_path: Path, message: str):
    run = write_run(tmp_path)
    MALFORMED[message](run)
    with pytest.raises(DataError) as caught:
        read_records(run)
    assert message in str(caught.value)
    assert "Repair or remove it, then run upweight report again." in str(caught.value)


def test_a_record_that_cannot_be_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = write_run(tmp_path)

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    # Permissions do not bind root, who runs tests in containers.
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match="run.yaml cannot be read: Permission denied"):
        read_records(run)


def test_settings_come_with_their_origin(tmp_path: Path):
    settings = read_records(write_run(tmp_path)).settings
    assert settings == (
        Setting("model", "folder #1/model", "file run.yaml"),
        Setting("data.path", "[a.jsonl, b: c.jsonl]", "flag"),
        Setting("data.max_length", "512", "resolved"),
        Setting("objective", "dpo", "default"),
        Setting("loss.beta", "0.05", "python"),
        Setting("reference", "null", "default"),
        Setting("evaluation.sets", "{}", "default"),
        Setting("evaluation.fraction", "0.1", "file run.yaml"),
    )


def test_the_config_that_a_run_writes_is_read_with_its_origins(tmp_path: Path):
    given = {"model": "m #1", "data": ["a b.jsonl", "c: d.jsonl"], "out": "runs/x"}
    resolved = load_run(None, ["beta=0.2"], given)
    (tmp_path / "run.yaml").write_text(dump(resolved), encoding="utf-8")
    records = read_records(tmp_path)
    assert {s.key: s.origin for s in records.settings} == dict(resolved.origins)
    assert records.setting("model") == "m #1"
    assert records.setting("data.path") == "[a b.jsonl, c: d.jsonl]"
    assert records.setting("loss.beta") == "0.2"


def test_settings_in_block_style_take_the_comment_of_their_key(tmp_path: Path):
    (tmp_path / "run.yaml").write_text(
        "path:  # file a.yaml\n  - x.jsonl\n  - {y: 1}\n"
        "note: |  # flag\n  two # no comment\n  lines\n"
    )
    assert read_records(tmp_path).settings == (
        Setting("path", "[x.jsonl, {y: 1}]", "file a.yaml"),
        Setting("note", "two # no comment\nlines\n", "flag"),
    )


def test_an_empty_config_has_no_settings(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("# nothing\n")
    records = read_records(tmp_path)
    assert records.settings == () and records.setting("model") is None


SCRATCH = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def _read_or_refuse(run: Path) -> Records | None:
    try:
        return read_records(run)
    except DataError:
        return None


@SCRATCH
@given(
    name=st.sampled_from(["metrics.jsonl", "samples.jsonl", "account.json", "evaluation.json"]),
    content=st.binary(max_size=200) | st.text(max_size=60).map(str.encode),
)
def test_any_bytes_are_read_or_refused(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "run.yaml").write_bytes(b"a: 1")
    _read_or_refuse(tmp_path)
    (tmp_path / name).unlink()


@SCRATCH
@given(
    content=st.text(alphabet="ab:#-[]{}'\"|> \n\t&*!%\x00\u2028", max_size=40),
)
def test_any_text_as_config_is_read_or_refused(tmp_path: Path, content: str):
    (tmp_path / "run.yaml").write_bytes(content.encode())
    _read_or_refuse(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@SCRATCH
@given(key=st.sampled_from(sorted(account())), value=JSON)
def test_any_value_in_the_account_is_read_or_refused(tmp_path: Path, key: str, value: object):
    sets = {"train": account(**{key: value})}
    (tmp_path / "account.json").write_text(json.dumps({"sets": sets, "template": "none"}))
    _read_or_refuse(tmp_path)
