"""What the watch cannot see in a run is said before step 1, with what to set."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

import upweight as uw
from oracles import loaded
from runs import even_odds_to_stop, furnish, plain_rows, train, write_rows
from test_recipes import after_step
from upweight.cli import main
from upweight.config import Watch, load_run
from upweight.recipes.unwatched import by_first_round
from upweight.stats import wilson_interval
from upweight.trust.watch.answers import sees_lost_ends
from upweight.trust.watch.rounds import rounds_do_not_stop
from upweight.trust.watch.seen import Seen, Told


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tmp_path, monkeypatch)
    write_rows("pairs.jsonl", plain_rows())


HELD_OUT = {"evaluation.fraction": 0.3}


def unwatched(**options: Any) -> tuple[str, ...]:
    return uw.check(model="model", data="pairs.jsonl", **options).prepared.unwatched


def codes(sentence: str) -> list[str]:
    return [code for code in ("UW305", "UW306", "UW308") if code in sentence]


@pytest.mark.parametrize(
    ("objective", "unseen"),
    [
        ("dpo", ["UW305", "UW306", "UW308"]),
        ("sft", ["UW305"]),
        ("reward", ["UW306"]),
    ],
)
def test_a_run_that_holds_nothing_out_says_what_nobody_looks_at(objective: str, unseen: list[str]):
    (said,) = unwatched(objective=objective)
    assert said.startswith("nothing is held out") and codes(said) == unseen
    assert "Set evaluation.fraction" in said


def test_prompts_alone_hold_no_pairs_out():
    even_odds_to_stop()
    write_rows("prompts.jsonl", [{"prompt": f"another question {i}"} for i in range(8)])
    prompts = {"evaluation.prompt_files": ["prompts.jsonl"]}
    (said,) = unwatched(**prompts)
    assert said.startswith("no pairs are held out") and codes(said) == ["UW306"]
    assert "Set evaluation.fraction" in said
    said, few = unwatched(**prompts, **{"evaluation.samples": 3})
    assert codes(said) == ["UW306"] and codes(few) == ["UW305", "UW308"]
    assert unwatched(**prompts, **HELD_OUT) == unwatched(objective="sft", **prompts) == ()


@pytest.mark.parametrize(
    ("options", "words", "unseen"),
    [
        ({"evaluation.samples": 0}, "Set evaluation.samples, to 6 or more", ["UW305", "UW308"]),
        ({"evaluation.samples": 3}, "Set evaluation.samples, to 6 or more", ["UW305", "UW308"]),
        ({"evaluation.fraction": 0.05}, "Hold out more prompts", ["UW305", "UW308"]),
        ({"evaluation.temperature": 0.5}, "Leave evaluation.temperature at 1", ["UW308"]),
    ],
)
def test_settings_that_leave_the_watch_blind_are_named(
    options: dict[str, Any], words: str, unseen: list[str]
):
    even_odds_to_stop()
    (said,) = unwatched(**HELD_OUT | options)
    assert words in said and codes(said) == unseen


def test_of_sft_nobody_is_promised_a_look_at_its_distance():
    even_odds_to_stop()
    sft = {"objective": "sft", **HELD_OUT}
    for samples in (0, 3):
        (said,) = unwatched(**sft, **{"evaluation.samples": samples})
        assert codes(said) == ["UW305"]
    assert unwatched(**sft, **{"evaluation.temperature": 0.5}) == ()


def test_nothing_is_said_where_everything_is_watched():
    even_odds_to_stop()
    assert unwatched(**HELD_OUT) == ()
    write_rows("pairs.jsonl", [row | {"answer": "7"} for row in plain_rows()])
    rounds = {"objective": "grpo", "rollout.reward": "number", "loss.beta": 0.05}
    assert unwatched(**rounds) == ()
    (said,) = unwatched(**rounds, **{"rollout.prompts_per_round": 2})
    assert "rollout.prompts_per_round is 2" in said and codes(said) == ["UW305", "UW308"]


@pytest.mark.parametrize("objective", ["dpo", "sft"])
def test_a_reference_whose_own_answers_are_cut_leaves_lost_ends_unseen(objective: str):
    # A random model all but never stops.
    (said,) = unwatched(objective=objective, **HELD_OUT)
    assert "% of the reference's answers to heldout end by themselves within" in said
    # What imitates is meant to leave its start.
    seen = ["UW305"] if objective == "sft" else ["UW305", "UW308"]
    assert codes(said) == seen and "to 256 for a start" in said
    # Who has raised it is told once the run has drawn them all.
    assert unwatched(objective=objective, **HELD_OUT | {"evaluation.max_new_tokens": 65}) == ()
    # What was switched off is not missed.
    assert unwatched(objective=objective, **HELD_OUT, **{"watch.stopped": 0.0}) == ()


def test_lost_ends_are_seen_where_no_answer_with_its_end_would_be_reported():
    assert sees_lost_ends(Watch(), 1.0, 6) and sees_lost_ends(Watch(), 0.7, 8)
    assert not sees_lost_ends(Watch(), 0.6, 8) and sees_lost_ends(Watch(), 0.6, 12)
    assert not sees_lost_ends(Watch(stopped=0.3), 1.0, 6)


@pytest.mark.parametrize("command", ["train", "check"])
def test_what_is_not_watched_is_in_the_terminal_and_in_the_records(
    command: str, capsys: pytest.CaptureFixture[str]
):
    words = [command, "--model", "model", "--data", "pairs.jsonl", "--learning-rate", "1e-3"]
    if command == "train":
        assert main([*words, "--out", "run", "--steps", "2"]) == 0
        said = capsys.readouterr().err
        record = json.loads(Path("run/account.json").read_text())
    else:
        assert main(words) == 0
        said = capsys.readouterr().out
        assert main([*words, "--json"]) == 0
        record = json.loads(capsys.readouterr().out)
    (sentence,) = record["unwatched"]
    assert said.count("not watched: nothing is held out") == 1
    assert " ".join(said.split()).count(sentence) == 1


def test_a_run_says_it_of_the_answers_that_its_reference_gave(capsys: pytest.CaptureFixture[str]):
    assert train("run", "--samples", "6", "--max_new_tokens", "70", "--steps", "1") == 0
    assert "% of the reference's answers to heldout" in capsys.readouterr().err
    (sentence,) = json.loads(Path("run/account.json").read_text())["unwatched"]
    assert "to 280 for a start" in sentence


def test_a_run_of_rounds_says_it_of_its_own_first_answers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    Path("pays.py").write_text(
        "def score(prompt, response, row):\n    return response.count('e') + len(response)\n"
    )
    rounds = {"rollout.reward": "pays.py:score", "rollout.responses": 4, "rollout.max_tokens": 6}
    few = {"rollout.prompts_per_round": 2}

    def said(out: str, **more: Any) -> int:
        uw.train(
            model="model", data="pairs.jsonl", objective="rloo", out=out, steps=2, **rounds | more
        )
        text = " ".join(capsys.readouterr().err.split())
        return text.count("% of the first round's answers end by themselves within")

    assert said("cut") == 1
    (sentence,) = json.loads(Path("cut/account.json").read_text())["unwatched"]
    assert "the first round's answers" in sentence
    assert said("few", **few) == 0  # of which it is said that nobody sees anything
    assert said("off", **{"watch.stopped": 0.0}) == 0
    with monkeypatch.context() as patched:
        after_step(1, lambda: signal.raise_signal(signal.SIGINT), patched)
        assert said("stopped") == 1
    # A run that goes on writes its account anew, and its first round is over.
    assert said("stopped", resume=True) == 1
    assert json.loads(Path("stopped/account.json").read_text())["unwatched"] == [sentence]
    even_odds_to_stop()
    assert said("whole", **{"rollout.max_tokens": 64}) == 0


def test_lost_ends_of_rounds_are_said_to_be_watched_where_the_watch_can_fire():
    """However many answers a prompt has, it counts once."""
    run = load_run(None, values={"model": "m", "data": "d", "objective": "grpo"}).run
    lm = loaded("llama")
    for num_prompts in (6, 8, 16, 64):
        for tenths in range(1, 11):
            first = wilson_interval(tenths / 10, num_prompts)
            none = wilson_interval(0.0, num_prompts)
            seen = Seen(lm, run.watch, Told(), lm.model, {})
            seen.first = {"stopped_low": first.low, "stopped": tenths / 10}
            later = {"step": 9.0, "reward": 0.0, "kl": 0.0, "stopped": 0.0}
            fires = rounds_do_not_stop(seen, later | {"stopped_high": none.high}) is not None
            quiet = not by_first_round(run, tenths / 10, num_prompts)
            assert fires <= quiet
            # Of very few prompts nothing is seen, whatever the first round says.
            can = none.high < run.watch.stopped * wilson_interval(1.0, num_prompts).low
            assert quiet == (fires or not can)
