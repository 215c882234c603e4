"""Rewards: the table, a user's own file, an endpoint; and what is said when there is none."""

import json
import math
import sys
import threading
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from addresses import serving
from upweight.errors import RewardError
from upweight.training.rewards import (
    REWARDS,
    Sampled,
    _analyzer,
    final_number,
    open_reward,
    score_responses,
)
from upweight.types import RowId

SHARED = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_responses.jsonl"


def sampled(response, line=1, **row):
    return Sampled("2 + 2?", response, row, RowId("prompts.jsonl", line))


# The final number


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("42", 42),
        ("It is 42.", 42),
        ("She pays $1,234.50.", "1234.5"),
        ("18 + 4 = 22 dollars, so $22.00!", 22),
        ("from 16-3", 3),
        ("it fell to -3", -3),
        ("a loss of -$5", -5),
        ("a balance of $-5", -5),
        ("\u22127 degrees", -7),
        ("(4)-2", 2),
        ("So the total is\n- 42", 42),
        ("Answer - 18", 18),
        ("16 - 3", 3),
        ("Profit \u2212 $7", 7),
        ("it fell by -.5", "-0.5"),
        ("about .5", "0.5"),
        ("wait...5", 5),
        ("3/4", "3/4"),
        ("3/0", 0),
        ("3/4.5", "4.5"),
        ("1,2,3", 3),
        ("1234,567", 567),
        ("12,3456", 3456),
        ("50%", 50),
        ("<<9*2=18>>18", 18),
        (r"\boxed{42}", 42),
        ("#### 42", 42),
        ("12 eggs\n#### 1,042\nQuestion: 7 ducks?", 1042),
        ("#### 41\n#### $42.", 42),
        ("#### Step 2: add\nThe sum is 9", 9),
        ("#### 1. Add\nThe sum is 9", 9),
        ("####42", 42),
        ("no number", None),
        ("", None),
        ("####", None),
        ("7" * 5000, None),
    ],
)
def test_the_final_number_is_the_marked_one_or_the_last(text, wanted):
    assert final_number(text) == (None if wanted is None else Fraction(wanted))


WORDS = st.text(
    st.sampled_from("-\u2212 ")
    | st.characters(exclude_categories=["N", "Cs"], exclude_characters="#/.$")
)


@given(
    before=WORDS,
    cents=st.integers(-(10**12), 10**12),
    dollar=st.sampled_from(["", "$"]),
    after=WORDS,
)
def test_a_number_is_read_however_it_is_written(before, cents, dollar, after):
    for written in (f"{abs(cents) / 100:,.2f}", f"{abs(cents) / 100:.2f}", f"{abs(cents)}/100"):
        text = f"{before} {'-' if cents < 0 else ''}{dollar}{written}"
        assert final_number(f"{text} {after}") == Fraction(cents, 100)
        assert final_number(f"{text}.") == Fraction(cents, 100)
        assert final_number(f"9 {after}\n#### {written}\n9 {after}") == Fraction(abs(cents), 100)


@given(st.text(st.sampled_from("0123456789,./-$# \n\u2212ae()")))
def test_any_text_has_a_final_number_or_none(text):
    found = final_number(text)
    assert found is None or isinstance(found, Fraction)
    assert (found is None) <= (not any(c.isdigit() for c in text) or len(text) > 1000)


def test_the_rewards_of_gsm8k_are_the_scores_of_its_authors():
    if not SHARED.exists():
        pytest.skip("gsm8k is not here")
    num = agree = 0
    for line in SHARED.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answer = next(r["text"] for r in row["responses"] if r["source"] == "human")
        items = [sampled(r["text"], answer=answer) for r in row["responses"]]
        for reward, response in zip(
            score_responses("number", items), row["responses"], strict=True
        ):
            num += 1
            agree += reward == response["score"]
    assert agree == num


# The table


def test_number_and_contains_compare_with_the_answer_of_the_row():
    items = [
        sampled("so 42.0", answer="6 * 7 = <<6*7=42>>42\n#### 42"),
        sampled("so 43", answer=42),
        sampled("no idea", answer="42"),
        sampled("It is 0.5", answer=0.5),
    ]
    assert score_responses("number", items) == [1, 0, 0, 1]
    items = [sampled("In PARIS, of course", answer=" Paris "), sampled("In Rome", answer="Paris")]
    assert score_responses("contains", items) == [1, 0]


def test_vader_likes_what_is_good():
    pytest.importorskip("vaderSentiment")
    good, bad = score_responses("vader", [sampled("I love it"), sampled("I hate it")])
    assert good > 0.5 and bad < -0.5


def test_vader_without_its_extra_says_what_to_install(monkeypatch):
    _analyzer.cache_clear()
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(RewardError, match="Run: pip install vaderSentiment"):
        score_responses("vader", [sampled("good")])


@pytest.mark.parametrize(
    ("spec", "row", "said"),
    [
        ("number", {"text": "7"}, r'the row has no "answer" .*it has: text'),
        ("contains", {}, r'the row has no "answer" .*it has: nothing'),
        ("number", {"answer": "seven"}, "\"answer\" has no number: 'seven'"),
        ("contains", {"answer": " "}, '"answer" is empty'),
    ],
)
def test_a_row_that_cannot_be_compared_is_named(spec, row, said):
    with pytest.raises(RewardError, match=f"^prompts.jsonl:3: .*{said}"):
        score_responses(spec, [sampled("7", 3, **row)])


def test_what_is_no_reward_is_answered_with_what_can_be():
    with pytest.raises(RewardError, match=r"can be: vader, .*Did you mean number\?"):
        open_reward("numbr")
    for url in ("http://", "http://[1"):
        with pytest.raises(RewardError, match="names no host"):
            open_reward(url)
    for name in REWARDS:
        open_reward(name)


# A function of one's own


def own(tmp_path, text):
    file = tmp_path / "my_reward.py"
    file.write_text(text, encoding="utf-8")
    return file


GOOD = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Weights:
    word: float = 2.0

def words(prompt, response, row, *, weights=Weights()):
    return weights.word * len(response.split()) + row["extra"]
"""


def test_the_function_that_is_named_scores_each_response(tmp_path):
    file = own(tmp_path, GOOD)
    got = score_responses(f"{file}:words", [sampled("a b c", extra=1), sampled("a", extra=0.5)])
    assert got == [7, 2.5]


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        (GOOD, "word", r"has no function word \(it has: words\)\. Did you mean words\?"),
        ("x = 1", "x", r"has no function x \(it has: none\)"),
        (
            "def f(prompt): return 1",
            "f",
            r"is f\(prompt\), and is called as f\(prompt, resp",
        ),
        ("import nothing_of_that_name", "f", "cannot be run: ModuleNotFoundError"),
        ("def f(:", "f", "cannot be run: SyntaxError"),
    ],
)
def test_a_file_without_the_function_says_what_is_there(tmp_path, text, name, said):
    with pytest.raises(RewardError, match=said):
        open_reward(f"{own(tmp_path, text)}:{name}")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RewardError, match=r"none\.py, which is not a file"):
        open_reward(f"{tmp_path / 'none.py'}:f")


def test_an_exception_in_the_users_function_names_the_row_and_the_line(tmp_path):
    file = own(tmp_path, "def f(prompt, response, row):\n\n    return row['missing']\n")
    with pytest.raises(RewardError, match=r"^prompts.jsonl:2: .*KeyError: 'missing' \(line 3 of"):
        score_responses(f"{file}:f", [sampled("a", 2)])


@pytest.mark.parametrize("value", ["float('nan')", "-float('inf')", "None", "'1.0'", "[1]", "1j"])
def test_what_is_no_finite_number_names_the_row(tmp_path, value):
    file = own(tmp_path, f"def f(prompt, response, row): return {value} if row['bad'] else 1")
    score = open_reward(f"{file}:f")
    assert score([sampled("a", bad=False)]) == [1.0]
    with pytest.raises(RewardError, match="^prompts.jsonl:9: .*one finite number"):
        score([sampled("a", bad=False), sampled("b", 9, bad=True)])


def test_numbers_of_libraries_are_numbers(tmp_path):
    file = own(tmp_path, "import torch\ndef f(prompt, response, row): return torch.tensor(0.5)")
    got = score_responses(f"{file}:f", [sampled("a")])
    assert got == [0.5] and not isinstance(got[0], torch.Tensor)


# An endpoint


@contextmanager
def endpoint(answer):
    """A server that answers POST with answer(items) -> (status, bytes); gives (url, bodies)."""
    bodies = []

    def of_items(path, document):
        bodies.append(document)
        return answer(document["items"])

    with serving(of_items) as url:
        yield f"{url}/score", bodies


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def lengths(items):
    return 200, json.dumps({"rewards": [len(i["response"]) for i in items]}).encode()


def test_an_endpoint_is_asked_in_batches_and_answers_in_order():
    items = [sampled("é" * n, n, answer=str(n), seen=Path("x")) for n in range(1, 6)]
    with endpoint(lengths) as (url, bodies):
        assert open_reward(url, batch_size=2)(items) == [1, 2, 3, 4, 5]
        assert open_reward(url)([]) == []
    assert [len(body["items"]) for body in bodies] == [2, 2, 1]
    assert bodies[0]["items"][0] == {
        "prompt": "2 + 2?",
        "response": "é",
        "row": {"answer": "1", "seen": "x"},
    }


def test_what_json_has_no_form_for_is_sent_as_its_text():
    row = {"score": math.nan, "bounds": [-math.inf, 0.5, None], "in": {"most": math.inf, "n": True}}
    with endpoint(lengths) as (url, bodies):
        score_responses(url, [sampled("a", **row)])
    wanted = {"score": "nan", "bounds": ["-inf", 0.5, None], "in": {"most": "inf", "n": True}}
    assert bodies[0]["items"][0]["row"] == wanted


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (500, b"out of memory", "answered 500 .*out of memory"),
        (200, b"<html>", "<html>.*which is not"),
        (200, b"[1.0, 2.0]", "which is not"),
        (200, b'{"rewards": 1.0}', "which is not"),
        (200, b'{"scores": [1, 2]}', "scores.*which is not"),
        (200, b"\xff", "which is not"),
        (
            200,
            b'{"rewards": [1]}',
            r"1 rewards for 2 responses \(prompts.jsonl:4 to .*:5\)",
        ),
        (200, b'{"rewards": [1, null]}', "^prompts.jsonl:5: .*None.*one finite number"),
        (200, b'{"rewards": [NaN, 1]}', "^prompts.jsonl:4: .*nan"),
    ],
)
def test_an_endpoint_that_answers_otherwise_is_quoted(status, body, said):
    with endpoint(lambda _: (status, body)) as (url, _), pytest.raises(RewardError, match=said):
        score_responses(url, [sampled("a", 4), sampled("b", 5)])


def test_an_endpoint_that_is_not_there_or_hangs_up_is_named():
    with endpoint(lengths) as (url, _):
        pass
    with pytest.raises(RewardError, match=f"{url}, .* cannot be reached: .*refused"):
        score_responses(url, [sampled("a")])
    with pytest.raises(RewardError, match="cannot be reached"):
        score_responses("http://a..b/", [sampled("a")])
    with pytest.raises(RewardError, match="names no host"):
        score_responses("http://127.0.0.1:port/", [sampled("a")])


def test_an_endpoint_that_does_not_answer_in_time_is_named():
    done = threading.Event()

    def wait(items):
        done.wait(30)
        return lengths(items)

    with endpoint(wait) as (url, _):
        try:
            with pytest.raises(RewardError, match=r"of 1 responses, gave no answer within 0.05 s"):
                open_reward(url, timeout_seconds=0.05)([sampled("a")])
        finally:
            done.set()
