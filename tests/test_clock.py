"""Templates that write the date: a run, what resumes it and what it exports are of one day."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import upweight as uw
from families import FAMILIES, GRANITE, IM, LLAMA32, user
from families import tokenizer as tokenizer_of
from runs import furnish, train, write_rows
from test_resolved import cut, settings
from test_stages import TWO, written
from tiny import CHATML, byte_tokenizer
from upweight.cli import main
from upweight.data import render
from upweight.data.clock import on_day, reads_clock, today

DATED = "{{ 'It is ' + strftime_now('%d %b %Y') + '. ' }}" + CHATML
FRIDAY, SATURDAY = "2024-07-05", "2024-07-06"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tmp_path, monkeypatch)
    byte_tokenizer(DATED).save_pretrained("model")
    it_is(FRIDAY, monkeypatch)


def it_is(day: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "today", lambda: day)


def days_of(file: str) -> set[str]:
    """Every day that stands in a file of records."""
    return set(re.findall(r"It is (.*?)\.", Path(file).read_text()))


def written_by(template: str, day: str | None) -> str:
    tokenizer = tokenizer_of(IM, template=template, eos="<|im_end|>")
    dated = tokenizer if day is None else on_day(tokenizer, day)
    return dated.apply_chat_template([user("Why?")], tokenize=False)


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("%d %b %Y", "05 Jul 2024"),
        ("%B %-d, %y", "July 5, 24"),
        ("%Y-%m-%d %H:%M:%S", "2024-07-05 00:00:00"),
        ("%A the %j., 100%%", "Friday the 187., 100%"),
        ("%%d %F", "%d 2024-07-05"),
        ("no day", "no day"),
    ],
)
def test_a_template_is_told_the_day_in_any_form(form: str, said: str):
    for call in (f"strftime_now({form!r})", f"strftime_now(format={form!r})"):
        assert written_by("{{ " + call + " }}" + CHATML, FRIDAY).startswith(said + "<|im_start|>")


@pytest.mark.parametrize(
    "lead", ["", "\n", "\n\n  x", "  {% if true %}a{% endif %}\n", "{# c #}\nb", "{%- set x = 2 %}"]
)
@pytest.mark.parametrize("template", [DATED, LLAMA32, GRANITE, CHATML])
def test_a_day_that_is_held_is_all_that_it_changes(lead: str, template: str):
    before = today()
    found = written_by(lead + template, None)
    # Midnight may have passed.
    assert found in {written_by(lead + template, day) for day in (before, today())}


def test_a_tokenizer_that_is_held_to_a_day_leaves_the_models_own_as_it_was():
    tokenizer = byte_tokenizer(DATED)
    held = on_day(tokenizer, FRIDAY)
    assert tokenizer.chat_template == DATED and held.chat_template != DATED
    tokenizer.chat_template = {"default": DATED, "tool_use": DATED}  # pyright: ignore
    named = on_day(tokenizer, FRIDAY)
    assert "05 Jul 2024" in named.apply_chat_template([user("Why?")], tokenize=False)


def test_it_is_known_which_templates_read_the_clock():
    reading = {name for name, family in FAMILIES.items() if reads_clock(family.tokenizer)}
    assert reading == {name for name, family in FAMILIES.items() if family.date is not None}
    assert reads_clock(byte_tokenizer("{% broken strftime_now")) is True
    assert reads_clock(byte_tokenizer(None)) is False


@pytest.mark.parametrize("by", ["its run.yaml", "the words that began it"])
def test_a_run_that_is_resumed_on_another_day_ends_bit_identically(
    by: str, monkeypatch: pytest.MonkeyPatch
):
    often = ("--checkpoint.every", "1", "--keep", "9")
    assert train("whole", *often) == 0 == train("run", *often)
    before = settings("run")
    assert before["data.date"] == (FRIDAY, "resolved")
    cut("run")
    it_is(SATURDAY, monkeypatch)
    if by == "its run.yaml":
        assert main(["train", "run/run.yaml", "resume=true"]) == 0
    else:
        assert train("run", *often, "--resume") == 0
    assert settings("run") == before
    whole, again = (load_file(f"{out}/model/model.safetensors") for out in ("whole", "run"))
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_an_export_is_checked_and_trained_on_as_of_its_own_day(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert train("first") == 0
    assert f"may write the day's date: {FRIDAY} in every row (data.date)" in capsys.readouterr().err
    assert json.loads(Path("first/model/probes.json").read_text())["date"] == FRIDAY
    it_is(SATURDAY, monkeypatch)
    assert main(["check", "--model", "first/model"]) == 0
    assert f"as of {FRIDAY}" in capsys.readouterr().out
    assert train("second", "--model", "first/model") == 0
    assert settings("second")["data.date"] == (FRIDAY, "inherited from the model")
    assert days_of("second/samples.jsonl") == {"05 Jul 2024"}
    assert train("third", "--model", "first/model", "--date", SATURDAY) == 0
    assert settings("third")["data.date"] == (SATURDAY, "flag")


def test_a_reward_model_scores_as_of_its_own_day(monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {"data": "pairs.jsonl", "dtype": "float32"}
    uw.train(**asked, model="model", objective="reward", steps=2, out="judge")
    assert f"| date in the prompts | {FRIDAY} |" in Path("judge/model/README.md").read_text()
    asked |= {"model": "judge/model"}
    scores = uw.score(**asked)
    it_is(SATURDAY, monkeypatch)
    assert uw.score(**asked) == scores != uw.score(**asked, date=SATURDAY)


def test_stages_that_go_on_the_next_day_are_of_the_first_day(monkeypatch: pytest.MonkeyPatch):
    file = written(TWO)
    assert main(["train", file]) == 0
    shutil.rmtree("run/2-dpo")
    it_is(SATURDAY, monkeypatch)
    assert main(["train", file, "resume=true"]) == 0
    assert settings("run/2-dpo")["data.date"] == (FRIDAY, "inherited from the model")


def test_a_comparison_is_of_one_day_and_read_on_another(monkeypatch: pytest.MonkeyPatch):
    Path("letters.py").write_text("def score(prompt, response, row):\n    return len(response)\n")
    write_rows("prompts.jsonl", [{"prompt": f"another question {i}"} for i in range(6)])
    text = (
        "model: model\ndata: pairs.jsonl\ncompute.dtype: float32\nlearning_rate: 1e-3\nsteps: 1\n"
        "evaluation: {true_reward: letters.py:score, prompt_files: prompts.jsonl, samples: 6, "
        "max_new_tokens: 6}\nmethods:\n  dpo: {objective: dpo}\n"
        "  best: {objective: best_of_n, reward: letters.py:score, num: 2}\n"
    )
    Path("compare.yaml").write_text(text)
    assert main(["compare", "compare.yaml", "--out", "today"]) == 0
    it_is(SATURDAY, monkeypatch)
    assert main(["compare", "compare.yaml", "--out", "today"]) == 0
    # A day that is named is that of the best of n too, which would else be of the next.
    Path("compare.yaml").write_text(f"data.date: {FRIDAY}\n{text}")
    assert main(["compare", "compare.yaml", "--out", "named"]) == 0


def test_what_the_reference_said_on_a_day_is_known_when_the_day_is_named_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert train("first", "--date", FRIDAY) == 0
    it_is(SATURDAY, monkeypatch)
    capsys.readouterr()
    assert train("second", "--date", FRIDAY) == 0
    assert "reference: 0 responses computed" in capsys.readouterr().err
    assert train("third") == 0
    assert "reference: 0 responses computed" not in capsys.readouterr().err


def test_scores_and_samples_of_an_export_are_of_its_own_day(monkeypatch: pytest.MonkeyPatch):
    assert train("run") == 0

    def said(**more: str) -> tuple[Any, Any]:
        scores = uw.score(model="run/model", data="pairs.jsonl", dtype="float32", **more)
        samples = uw.sample(
            "run/model", "pairs.jsonl", temperature=0, limit=4, max_new_tokens=4, **more
        )
        return scores, samples

    before = said()
    it_is(SATURDAY, monkeypatch)
    assert said() == before
    moved, _ = said(date=SATURDAY)
    assert moved != before[0]


def test_a_day_that_no_template_writes_is_refused(capsys: pytest.CaptureFixture[str]):
    assert train("run", "--date", "2024-7-5", command="check") == 2
    said = capsys.readouterr().err
    assert 'date must be a day such as 2026-11-29 or null, found "2024-7-5".' in said
    byte_tokenizer().save_pretrained("model")
    assert train("run", "--date", FRIDAY, command="check") == 2
    said = capsys.readouterr().err
    assert "error[UW109]: data.date is" in said and "chat template writes no date" in said
    byte_tokenizer(None).save_pretrained("model")
    Path("model/chat_template.jinja").unlink()
    assert train("run", "--date", FRIDAY, command="check") == 2
    assert "no chat template is used" in capsys.readouterr().err
    assert train("run", command="check") == 0
    assert "day's date" not in capsys.readouterr().err


def test_probes_of_a_day_that_is_none_are_a_message(capsys: pytest.CaptureFixture[str]):
    assert train("run") == 0
    file = Path("run/model/probes.json")
    file.write_text(file.read_text().replace(FRIDAY, "Friday"))
    assert main(["check", "--model", "run/model"]) == 2
    assert "is not what an export writes (ValueError" in capsys.readouterr().err
