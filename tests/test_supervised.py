"""Which responses supervised fine-tuning learns: what was chosen, and nothing that was rejected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import upweight as uw
from runs import furnish, plain_rows, write_rows
from upweight.data.account import Account
from upweight.data.stream import load_examples
from upweight.data.supervised import learned
from upweight.errors import UpweightError


def taken(tmp_path: Path, *rows: dict[str, Any]) -> tuple[Any, Account]:
    """The texts that are learned of each row, and the account."""
    path = f"{tmp_path}/rows.jsonl"
    write_rows(path, list(rows))
    examples, account = load_examples([path], require_preferences=False)
    found = learned(examples, account)
    return [[answer.content for answer in e.responses] for e in found], account


def pair(chosen: Any, rejected: Any) -> dict[str, Any]:
    return {"prompt": "p", "chosen": chosen, "rejected": rejected}


def scored(*scores: float, texts: str = "abcd") -> dict[str, Any]:
    answers = [{"text": t.strip("-"), "score": s} for t, s in zip(texts, scores, strict=False)]
    return {"prompt": "p", "responses": answers}


def test_a_row_whose_chosen_response_cannot_be_used_teaches_the_rejected_one_to_nobody(
    tmp_path: Path,
):
    rows = (scored(1, 0, texts="-b"), scored(2, 1, 0, texts="-bc"))
    texts, account = taken(tmp_path, *rows)
    assert texts == [] and account.dropped == {"empty_response": 2}
    texts, account = taken(tmp_path, pair("good", "bad"), pair(" ", "bad"))
    assert texts == [["good"]]
    assert account.dropped == {"empty_response": 1} and account.left_out == {"not_chosen": 1}
    assert account.examples["empty_response"][0] == (
        f"{tmp_path}/rows.jsonl:2",
        "the chosen response ' '",
    )


def test_a_rejected_response_that_cannot_be_used_takes_nothing_from_the_chosen_one(tmp_path: Path):
    texts, account = taken(tmp_path, pair("good", ""))
    assert texts == [["good"]] and account.left_out == {"empty_response": 1}


def test_what_is_rejected_too_is_not_learned(tmp_path: Path):
    stated = {"prompt": "p", "responses": ["a", "b", "c"], "preferences": [[0, 1], [1, 0]]}
    texts, account = taken(tmp_path, stated, {**stated, "preferences": [[0, 1]]}, scored(2, 1, 2))
    assert texts == [["a"], ["a", "c"]]
    assert account.dropped == {"not_chosen": 1}
    assert account.left_out == {"not_chosen": 2, "unpaired": 1}


@pytest.mark.parametrize("turn", ["tool", "user"])
def test_agents_rows_train_on_no_rejected_answer(
    turn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    furnish(tmp_path, monkeypatch)
    rows: list[dict[str, Any]] = plain_rows(60)
    for row in rows[::10]:
        answer = {"role": "assistant", "content": "it is"}
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
        row["chosen"] = [answer, {"role": turn, "content": "and"}, answer]
        row["rejected"] = [{"role": "assistant", "content": "WRONG"}]
    write_rows("pairs.jsonl", rows)
    trees = uw.check(model="model", data="pairs.jsonl", objective="sft", learning_rate=1e-3)
    account = trees.accounts["train"]
    assert (account.used, account.dropped) == (54, {"other_turns_in_response": 6})
    assert account.responses == 54


def test_how_long_a_response_is_that_nobody_learns_is_nothing_to_sft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    furnish(tmp_path, monkeypatch)
    write_rows("pairs.jsonl", [{**row, "rejected": "so on " * 80} for row in plain_rows(20)])
    values = {"model": "model", "data": "pairs.jsonl", "learning_rate": 1e-3, "max_length": 128}
    for truncation in ("drop", "response"):
        found = uw.check(objective="sft", **values, truncation=truncation)
        account = found.accounts["train"]
        assert account.used == 20 and not any(account.truncated.values())
        assert len(account.lengths["response"]) == 20 and not account.lengths["chosen"]
        assert "UW205" not in {finding.code for finding in found.findings}
        with pytest.raises(UpweightError):
            uw.check(objective="dpo", **values, truncation=truncation)
