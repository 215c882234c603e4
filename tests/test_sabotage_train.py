"""What the rows bring with them is planted in a run: `train` refuses before its first step, or goes
on and says it in the terminal, the account and the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import upweight.data.stream as stream
import upweight.data.trees as trees
from runs import furnish, plain_rows, train, write_rows
from tiny import CHATML, byte_tokenizer


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tmp_path, monkeypatch)
    write_rows("pairs.jsonl", plain_rows())


Change = Callable[[int, dict[str, Any]], dict[str, Any]]


def rows(change: Change) -> None:
    write_rows("pairs.jsonl", [row | change(i, row) for i, row in enumerate(plain_rows())])


def a_prompt_that_changes_once_answered(_: pytest.MonkeyPatch) -> None:
    byte_tokenizer("{{ messages|length }}" + CHATML).save_pretrained("model")


def a_doubled_stop(_: pytest.MonkeyPatch) -> None:
    rows(lambda i, row: {"chosen": row["chosen"] + "<|im_end|>\n" * (i % 3 == 0)})


def a_second_beginning(_: pytest.MonkeyPatch) -> None:
    rows(lambda i, row: {"prompt": "<|im_start|>" * (i % 2) + row["prompt"]})


def a_row_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    grown = trees.trees
    monkeypatch.setattr(stream, "trees", lambda *args: iter(list(grown(*args))[1:]))


def a_prompt_on_both_sides(_: pytest.MonkeyPatch) -> None:
    write_rows("held.jsonl", plain_rows()[:30])


def as_they_are(_: pytest.MonkeyPatch) -> None: ...


@pytest.mark.parametrize(
    ("code", "plant", "more"),
    [
        ("UW202", a_prompt_that_changes_once_answered, ()),
        ("UW203", a_doubled_stop, ()),
        ("UW204", a_second_beginning, ()),
        ("UW205", as_they_are, ("--max_length", "75")),
        ("UW208", a_row_that_is_lost, ()),
        ("UW209", a_prompt_on_both_sides, ("--evaluation.sets", "{held: [held.jsonl]}")),
    ],
)
def test_a_run_is_refused_before_its_first_step(
    code: str,
    plant: Callable[[pytest.MonkeyPatch], None],
    more: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    plant(monkeypatch)
    assert train("run", *more) == 2
    assert f"error[{code}]" in capsys.readouterr().err
    assert not Path("run").exists()


def equal_responses(_: pytest.MonkeyPatch) -> None:
    rows(lambda i, row: {"rejected": row["chosen"]} if i < 9 else {})


def a_word_that_gives_it_away(_: pytest.MonkeyPatch) -> None:
    rows(lambda i, row: {"chosen": "yes", "rejected": "no"})


@pytest.mark.parametrize(
    ("code", "plant"), [("UW206", equal_responses), ("UW211", a_word_that_gives_it_away)]
)
def test_a_run_goes_on_and_says_what_is_suspicious(
    code: str,
    plant: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    plant(monkeypatch)
    assert train("run", "--steps", "1", "--samples", "0") == 0
    assert f"warning[{code}]" in capsys.readouterr().err
    found = json.loads(Path("run/account.json").read_text())["findings"]
    assert code in {finding["code"] for finding in found}
    assert f"<code>{code}</code>" in Path("run/report.html").read_text()


def test_a_run_with_none_of_it_says_none_of_it(capsys: pytest.CaptureFixture[str]):
    assert train("run", "--steps", "1", "--samples", "0", "--flat", "0") == 0
    said = capsys.readouterr().err
    assert "warning[" not in said and "error[" not in said
