"""Conversations of which something else is learned than their rows say: turns that are not the
assistant's, and what the chat template does not write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import upweight as uw
from families import assistant, user
from runs import furnish, plain_rows, train, write_rows
from upweight.errors import Refusal


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tmp_path, monkeypatch)


ROWS = plain_rows()
Row = dict[str, Any]


def some(num: int, change: Callable[[Row], Row]) -> list[Row]:
    """The plain rows, `num` of the 60 changed."""
    return [change(row) if i < num else row for i, row in enumerate(ROWS)]


def check(rows: list[Row], **values: object) -> Any:
    write_rows("rows.jsonl", rows)
    return uw.check(**{"model": "model", "data": "rows.jsonl", "learning_rate": 1e-3, **values})


def findings(rows: list[Row], **values: object) -> dict[str, str]:
    """Code and sentence of what `check` finds in these rows."""
    return {f.code: f.sentence for f in check(rows, **values).findings}


def refused(code: str, rows: list[Row], **values: object) -> str:
    with pytest.raises(Refusal) as caught:
        check(rows, **values)
    assert caught.value.code == code, caught.value
    return str(caught.value)


# Turns that are not the assistant's


def early(row: Row) -> Row:
    """Whole conversations that come apart at their first answer."""
    return {
        side: [user(row["prompt"]), assistant(row[side]), user("and?"), assistant("ok")]
        for side in ("chosen", "rejected")
    }


def looked_up(row: Row) -> Row:
    """Answers with a tool's result inside."""
    result = {"role": "tool", "content": "TOOL OUTPUT"}
    sides = {side: [assistant("I look."), result, assistant(row[side])] for side in
             ("chosen", "rejected")}  # fmt: skip
    return {"prompt": [user(row["prompt"])], **sides}


@pytest.mark.parametrize(("change", "role"), [(early, "user"), (looked_up, "tool")])
def test_rows_whose_answers_hold_other_turns_are_refused(
    change: Callable[[Row], Row], role: str, capsys: pytest.CaptureFixture[str]
):
    said = refused("UW201", some(20, change))
    assert "20 of 60 rows and 0 of 80 responses were left out" in said
    assert f"response 0 holds a {role} turn" in said and "last user turn that both share" in said
    assert f"holds a {role} turn" in refused("UW201", some(60, change))
    write_rows("pairs.jsonl", some(60, change))
    assert train("run") == 2
    assert "error[UW201]" in capsys.readouterr().err


def test_a_few_answers_with_other_turns_are_dropped_by_name():
    found = check(some(4, early))
    assert not found.findings
    account = found.accounts["train"]
    assert account.dropped == {"other_turns_in_response": 4}
    row, detail = account.examples["other_turns_in_response"][0]
    assert (
        row == "rows.jsonl:1"
        and "response 0 holds a user turn (message 2 of 3 after the prompt)" in detail
    )


def test_one_of_several_responses_with_other_turns_is_left_out():
    rows = [
        {
            "prompt": [user(f"q {i}")],
            "responses": [
                {"text": "yes so", "score": 3},
                {"messages": [assistant("a"), user("b"), assistant("c")], "score": 2},
                {"text": "no so", "score": 1},
            ],
        }
        for i in range(9)
    ]
    found = check(rows, **{"preflight.spans": 0.5})
    assert found.accounts["train"].left_out == {"other_turns_in_response": 9}
    assert found.accounts["train"].preferences == 9
    assert "9 of 27 responses were left out" in refused("UW201", rows)


def test_sft_does_not_learn_what_a_user_says_in_a_completion():
    rows = [
        {"prompt": [user("p")], "completion": [assistant("a"), user("b"), assistant(f"c {i}")]}
        for i in range(9)
    ]
    said = refused("UW201", rows, objective="sft")
    assert "response 0 holds a user turn" in said and "data.turns=all" in said


def test_several_turns_of_the_assistants_are_one_answer():
    rows = some(
        60,
        lambda row: {
            "prompt": [user(row["prompt"])],
            "chosen": [assistant("Well."), assistant(row["chosen"])],
            "rejected": [assistant(row["rejected"])],
        },
    )
    assert "UW201" not in findings(rows)
