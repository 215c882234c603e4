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
from tiny import CHATML, byte_tokenizer
from upweight.errors import Refusal
from upweight.trust import spans


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


# What the chat template does not write

HEAD = "<|im_start|>{{ m['role'] }}\n"
TEXT = "{{ m['content'] }}"


def template(old: str, new: str) -> None:
    """model/ with a ChatML in which `old` is `new`."""
    assert old in CHATML
    byte_tokenizer(CHATML.replace(old, new)).save_pretrained("model")


def asked(*before: Row) -> Callable[[Row], Row]:
    """Rows of messages, with these in front."""
    return lambda row: {
        "prompt": [*before, user(row["prompt"])],
        "chosen": [assistant(row["chosen"])],
        "rejected": [assistant(row["rejected"])],
    }


SYSTEM = {"role": "system", "content": "Be terse."}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "find", "arguments": {"a": "b"}}}
CALLING = {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]}


def with_tools(row: Row) -> Row:
    return row | {"tools": TOOLS}


def calling(row: Row) -> Row:
    return asked()(row) | {"chosen": [assistant(row["chosen"]) | {"tool_calls": [CALL]}]}


SKIPS = "{% if m['role'] == 'ROLE' %}{% continue %}{% endif %}" + HEAD
CUTS = "{{ m['content'] if m['role'] == 'assistant' else m['content'][:6] }}"


@pytest.mark.parametrize(
    ("change", "old", "new", "code", "says"),
    [
        (asked(SYSTEM), HEAD, SKIPS.replace("ROLE", "system"), "UW202", "the system turn 'Be t"),
        (asked(user("a"), CALLING), HEAD, HEAD, "UW202", "the tool call 'find'"),
        (with_tools, HEAD, HEAD, "UW202", "the tools, which it does not read"),
        (calling, HEAD, HEAD, "UW201", "the tool call 'find'"),
    ],
)  # fmt: skip
def test_what_the_template_does_not_write_is_refused_or_reported(
    change: Callable[[Row], Row], old: str, new: str, code: str, says: str
):
    template(old, new)
    said = refused(code, some(60, change))
    assert "in 60 of 60 rows the chat template leaves out part of" in said and says in said
    assert "rows.jsonl:1" in said
    few = findings(some(4, change))
    assert "in 4 of 60 rows" in few[code] and says in few[code]


@pytest.mark.parametrize(("old", "new"), [(HEAD, SKIPS.replace("ROLE", "user")), (TEXT, CUTS)])
def test_a_template_that_loses_or_cuts_the_question_is_refused(old: str, new: str):
    template(old, new)
    said = refused("UW202", ROWS)
    assert "in 60 of 60 rows the chat template leaves out part of the prompt" in said
    assert "such as the user turn 'question 0'" in said


def test_prompts_that_end_in_an_answer_are_reported():
    def begun(row: Row) -> Row:
        return asked()(row) | {"prompt": [user(row["prompt"]), assistant("Sure, ")]}

    assert "in 60 of 60 rows the prompt ends in a turn of" in findings(some(60, begun))["UW202"]
    assert findings(some(4, begun)) == {}


def test_text_without_a_template_has_no_tools():
    plain = {"data.template": "none"}
    assert "does not read" in refused("UW202", some(60, with_tools), **plain)


def test_a_template_that_writes_tools_and_calls_raises_nothing():
    tools = "{% for t in tools or [] %}{{ t.function.name }}\n{% endfor %}"
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
    written = tools + CHATML.replace(TEXT, TEXT + calls)
    byte_tokenizer(written).save_pretrained("model")
    for change in (with_tools, calling, asked(user("a"), CALLING), asked(SYSTEM)):
        # That only chosen answers call is a shortcut.
        assert findings(some(60, change)).keys() <= {"UW211"}


def test_thoughts_and_white_space_that_a_template_takes_out_of_a_prompt_raise_nothing():
    template(TEXT, "{{ m['content'].split('</think>')[-1].strip() if m['role'] == 'assistant' "
             "else m['content'] | tojson }}")  # fmt: skip
    before = (user(" a\n\tlong\u00a0way "), assistant("<think>hm, well</think>\n\nYes?"))
    assert findings(some(60, asked(*before))) == {}


def test_a_large_set_is_judged_by_its_sample(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(spans, "NUM_AGAIN", 6)
    assert "in 60 of 60 rows" in refused("UW202", some(60, with_tools)).replace("about ", "")
    assert "UW201" in refused("UW201", some(60, calling))


# Rows that were rendered before


def rendered(row: Row) -> Row:
    said = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
    return row | {"prompt": said}


def test_prompts_that_were_rendered_already_are_refused():
    said = refused("UW204", some(30, rendered))
    assert "30 of 60 rows hold <|im_start|>, which the chat template writes" in said
    assert "data.template=none" in said and "rows.jsonl:1" in said
    found = check(some(4, rendered))
    assert not found.findings and found.accounts["train"].special_in_prompt == 4


def test_prompts_that_were_rendered_already_are_refused_where_answers_are_drawn():
    drawing = {"objective": "grpo", "rollout.reward": "vader"}
    assert "<|im_start|>" in refused("UW204", some(30, rendered), **drawing)
    assert "does not read" in refused("UW202", some(30, with_tools), **drawing)
    assert findings(ROWS, **drawing) == {}


def test_prompts_with_special_tokens_that_no_template_writes_are_reported():
    said = findings(some(30, lambda row: row | {"prompt": f"<|endoftext|> {row['prompt']}"}))
    assert "30 of 60 rows hold <|endoftext|>" in said["UW204"]


@pytest.mark.parametrize(
    ("change", "marker"),
    [
        (lambda row: row | {"prompt": f"[INST] {row['prompt']} [/INST]"}, "[INST]"),
        (lambda row: row | {"chosen": f"{row['chosen']}</s>"}, "</s>"),
        (lambda row: row | {"prompt": f"\n\nHuman: {row['prompt']}\n\nAssistant:"}, "Human:"),
        (lambda row: row | {"rejected": f"{row['rejected']}\n\nHuman: ok"}, "Human:"),
        (lambda row: row | {"chosen": f"<start_of_turn>{row['chosen']}"}, "<start_of_turn>"),
    ],
)
def test_markers_of_other_templates_are_reported(change: Callable[[Row], Row], marker: str):
    said = findings(some(3, change))["UW204"]
    assert "3 of 60 rows hold what a chat template writes, such as" in said
    assert marker in said and "rows.jsonl:1" in said and "preflight.markers is 2%" in said
    assert "UW204" not in findings(some(1, change))
    assert "UW204" not in findings(some(3, change), **{"preflight.markers": 0.1})


def test_text_without_a_template_may_be_a_transcript_but_holds_no_other_models_tokens():
    def changed(row: Row) -> Row:
        return row | {"prompt": f"\n\nHuman: {row['prompt']}\n\nAssistant:"}

    plain = {"data.template": "none"}
    assert findings(some(60, changed), **plain) == {}
    said = findings(some(30, lambda row: row | {"chosen": f"{row['chosen']}</s>"}), **plain)
    assert "</s>" in said["UW204"]
