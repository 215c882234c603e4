"""Each failure is planted in rows, and the rows without it raise nothing."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

import upweight as uw
from runs import furnish, plain_rows, sentence, train, write_rows
from upweight.cli import main
from upweight.errors import Refusal
from upweight.trust.preflight import _in_circles


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tmp_path, monkeypatch)


def findings(rows: list[dict[str, Any]], **values: object) -> list[tuple[str, str]]:
    """(code, sentence) of what `check` finds in these rows."""
    write_rows("rows.jsonl", rows)
    found = uw.check(**{"model": "model", "data": "rows.jsonl", "learning_rate": 1e-3, **values})
    return [(f.code, f.sentence) for f in found.findings]


def test_rows_with_nothing_wrong_raise_nothing():
    assert findings(plain_rows()) == []


def test_preferences_in_both_orders_are_found_with_their_rows():
    rows = plain_rows()
    rows.append(rows[4] | {"chosen": rows[4]["rejected"], "rejected": rows[4]["chosen"]})
    ((code, said),) = findings(rows)
    assert code == "UW210" and "2 of 61 preferences contradict" in said
    assert "rows.jsonl:5, rows.jsonl:61" in said
    assert findings(rows, **{"preflight.contradictory": 0.1}) == []


def test_preferences_in_a_circle_are_found():
    a, b, c = ({"prompt": "which", "chosen": x, "rejected": y} for x, y in ("ab", "bc", "ca"))
    assert findings([*plain_rows(), a, b]) == []
    ((code, said),) = findings([*plain_rows(), a, b, c])
    assert code == "UW210" and "3 of 63 preferences contradict" in said


def test_preferences_of_one_row_in_a_circle_are_found():
    texts = ["river stone", "cloud", "lamp paper seven"]
    rows = [
        {"prompt": f"which {i}", "responses": [f"{text} {i}" for text in texts]} for i in range(20)
    ]
    around = [row | {"preferences": [[0, 1], [1, 2], [2, 0]]} for row in rows]
    assert "60 of 60 preferences contradict each other" in dict(findings(around))["UW210"]
    assert "UW210" not in dict(findings([row | {"scores": [3, 2, 1]} for row in rows]))


def test_only_what_lies_on_circles_or_between_them_is_left():
    edges = {"ab": 0, "ba": 1, "bc": 2, "cd": 3, "dc": 4, "xa": 5, "de": 6, "ef": 7}
    left = _in_circles([((ord(x),), (ord(y),)) for x, y in edges])
    assert left == {0, 1, 2, 3, 4}
    assert _in_circles([]) == set()


def test_a_long_chain_of_preferences_takes_no_longer_than_its_rows():
    edges = [((i,), (i + 1,)) for i in range(20_000)]
    began = time.process_time()
    assert _in_circles(edges) == set()
    assert _in_circles([*edges, ((20_000,), (0,))]) == set(range(20_001))
    # 150 s where every round of the peeling looks at all of them.
    assert time.process_time() - began < 5


def test_rows_that_repeat_are_found():
    rows = plain_rows()
    ((code, said),) = findings([*rows, *rows[:5]])
    assert code == "UW210" and "5 of 65 rows repeat an earlier one" in said
    assert findings([*rows, *rows[:2]]) == []


@pytest.mark.parametrize(("longer", "word"), [("chosen", "longer"), ("rejected", "shorter")])
def test_a_rule_by_length_is_found(longer: str, word: str):
    draw = random.Random(2)
    shorter = {"chosen": "rejected", "rejected": "chosen"}[longer]
    rows = [
        {"prompt": f"q {i}", longer: sentence(draw, 8), shorter: sentence(draw, 4)}
        for i in range(40)
    ]
    found = dict(findings(rows))
    assert f"the {word} response is the chosen one in 100% of preferences" in found["UW211"]


def test_a_rule_by_length_is_told_by_the_lower_end_of_its_interval():
    draw = random.Random(2)
    rows = [
        {
            "prompt": f"q {i}",
            "chosen": sentence(draw, 4 if i % 8 else 8),
            "rejected": sentence(draw, 6),
        }
        for i in range(40)
    ]
    assert "UW211" not in dict(findings(rows)), "7 of 8 of 40 is 0.875, and above 0.74 for sure"
    assert "UW211" in dict(findings(rows, **{"preflight.shortcut": 0.6}))


def test_a_rule_by_words_is_found_where_length_says_nothing():
    draw = random.Random(3)
    rows = [
        {
            "prompt": f"q {i}",
            "chosen": f"sorry {sentence(draw, 5)}",
            "rejected": f"sure {sentence(draw, 5)}",
        }
        for i in range(40)
    ]
    ((code, said),) = findings(rows)
    assert code == "UW211" and "a count of words" in said
    assert findings(rows, **{"preflight.shortcut": 0.99}) == []


def test_cutting_many_responses_is_refused():
    rows = plain_rows()
    for row in rows[:30]:
        row["rejected"] = "river " * 200
    cut = {"data.max_length": 120, "data.truncation": "response"}
    with pytest.raises(Refusal, match=r"50% of rejected responses cut.*UW205"):
        findings(rows, **cut)
    with pytest.raises(Refusal, match=r"50% of rows dropped as too long.*UW205"):
        findings(rows, **{"data.max_length": 120})
    assert "UW205" not in dict(findings(rows, **cut, **{"preflight.cut": 0.6}))


CUT = {"data.max_length": 120, "data.truncation": "response"}


def test_cutting_the_responses_of_supervised_rows_is_refused():
    answers = (f"river {i} " * (2 + 20 * (i % 2)) for i in range(20))
    rows = [{"prompt": f"question {i}", "responses": [answer]} for i, answer in enumerate(answers)]
    with pytest.raises(Refusal, match=r"50% of responses cut.*UW205"):
        findings(rows, objective="sft", **CUT)


def test_cutting_all_of_many_responses_is_refused():
    texts = [f"{chr(97 + k)} river" * 40 for k in range(8)]
    rows = [
        {"prompt": f"question {i}", "responses": texts, "scores": list(range(8))} for i in range(9)
    ]
    with pytest.raises(Refusal, match="100% of chosen responses cut, 100% of rejected responses"):
        findings(rows, **CUT)


def test_responses_too_long_and_prompts_cut_count_as_what_is_cut():
    draw = random.Random(5)
    rows = [
        {"prompt": f"question {i}", "scores": [1, 2, 3],
         "responses": [sentence(draw, 3), sentence(draw, 4), "river " * 30]}
        for i in range(20)
    ]  # fmt: skip
    with pytest.raises(Refusal, match=r"33% of responses left out as too long.*UW205"):
        findings(rows, **{"data.max_length": 120})
    with pytest.raises(Refusal, match=r"50% of prompts cut.*UW205"):
        findings(rows, **{"data.max_length": 210, "data.truncation": "prompt"})


def test_a_refusal_takes_nothing_that_was_found_with_it(capsys: pytest.CaptureFixture[str]):
    rows = plain_rows()
    for row in rows[:30]:
        row["rejected"] = "river " * 200
    for row in rows[30:34]:
        row["rejected"] = row["chosen"]
    echo = "which of these is the better answer"
    rows += [{"prompt": f"{echo} {i}", "chosen": f"{echo} {i} a", "rejected": f"{echo} {i} b"}
             for i in range(20)]  # fmt: skip
    write_rows("rows.jsonl", rows)
    words = ["check", "--model", "model", "--data", "rows.jsonl", "--max_length", "150"]
    assert main(words) == 2
    shown = capsys.readouterr()
    assert "warning[UW201]" in shown.out and "warning[UW206]" in shown.out
    assert "responses cut on one side, or rows too long" in shown.out
    assert "error[UW205]" in shown.err and "Found besides, above: UW201, UW206" in shown.err
    assert main([*words, "--json"]) == 2
    said = json.loads(capsys.readouterr().out)
    assert said["error"]["code"] == "UW205" and said["sets"]["train"]["read"] == 80
    assert {"UW201", "UW205", "UW206"} <= {found["code"] for found in said["findings"]}
    assert said["figures"]["train"]["cut"]["value"] == pytest.approx(30 / 80)


def test_what_a_run_warns_of_is_said_and_written(capsys: pytest.CaptureFixture[str]):
    rows = plain_rows(24)
    write_rows("pairs.jsonl", [*rows, *rows[:5]])
    assert train("run") == 0
    assert "warning[UW210]: train:" in capsys.readouterr().err
    (found, *_) = json.loads(Path("run/account.json").read_text())["findings"]
    assert found["code"] == "UW210" and "repeat an earlier one" in found["said"]


@pytest.mark.parametrize(("command", "end"), [("train", ""), ("check", " of the river" * 18)])
def test_swapped_columns_are_suspected_where_the_reference_disagrees_nearly_always(
    command: str, end: str, capsys: pytest.CaptureFixture[str]
):
    # A policy that has learned to prefer is the reference of data that are the other way round.
    right = [
        {"prompt": f"question {i}{end}", "chosen": "fine fine fine", "rejected": "no no no"}
        for i in range(24)
    ]
    write_rows("pairs.jsonl", right)
    assert train("run", "--epochs", "6") == 0
    capsys.readouterr()
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in right]
    write_rows("pairs.jsonl", swapped)
    assert train("again", "--model", "run/model", command=command) == 0
    said = "".join(capsys.readouterr())
    assert "warning[UW207]: train: the reference finds the chosen" in said
    write_rows("pairs.jsonl", right)
    assert train("third", "--model", "run/model", command=command) == 0
    assert "UW207" not in "".join(capsys.readouterr())


def test_check_says_the_same_to_machines(capsys: pytest.CaptureFixture[str]):
    rows = plain_rows()
    write_rows("rows.jsonl", [*rows, *rows[:5]])
    words = ["check", "--model", "model", "--data", "rows.jsonl", "--learning-rate", "1e-3"]
    words += ["--json"]
    assert main(words) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["sets"]["train"]["read"] == 65
    assert [found["code"] for found in said["findings"]] == ["UW210"]
    assert main([*words, "--data.max_length", "20"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["message"]
    assert main([*words[:-1], "--out", "never"]) == 0
    assert "train: tokens (median / 99 % / most): prompt" in capsys.readouterr().out
