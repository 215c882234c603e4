"""Rows whose tokens are not what they say: each failure is planted in a run, by its cause where a
user can bring it about, and else in the code that makes the tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import upweight as uw
from runs import furnish, plain_rows, train, write_rows
from tiny import CHATML, SPECIALS, byte_tokenizer
from upweight.cli import main
from upweight.data import stream, trees
from upweight.errors import ModelError, Refusal
from upweight.trust import spans


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tmp_path, monkeypatch)


ROWS = plain_rows()
Change = Callable[[dict[str, Any]], dict[str, Any]]


def some(num: int, change: Change) -> list[dict[str, Any]]:
    """The plain rows, `num` of the 60 changed."""
    return [change(row) if i < num else row for i, row in enumerate(ROWS)]


def findings(rows: list[dict[str, Any]], **values: object) -> dict[str, str]:
    """Code and sentence of what `check` finds in these rows."""
    write_rows("rows.jsonl", rows)
    found = uw.check(**{"model": "model", "data": "rows.jsonl", "learning_rate": 1e-3, **values})
    return {f.code: f.sentence for f in found.findings}


def refused(code: str, rows: list[dict[str, Any]], **values: object) -> str:
    with pytest.raises(Refusal) as caught:
        findings(rows, **values)
    assert caught.value.code == code, caught.value
    return str(caught.value)


def small_tokenizer(
    template: str | None = CHATML,
    merges: tuple[tuple[str, str], ...] = (),
    without: str = "",
    bos: str | None = None,
    normalized: bool = False,
) -> PreTrainedTokenizerFast:
    """Bytes of ASCII, so that there is room for merges under the tiny model's 260 ids."""
    alphabet = [c for c in sorted(pre_tokenizers.ByteLevel.alphabet()) if c not in without]
    plain = [c for c in alphabet if c.isascii() or c in "ĠĊ"]
    vocab = {s: i for i, s in enumerate((*SPECIALS, *plain, *(a + b for a, b in merges)))}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    if normalized:
        bpe.normalizer = normalizers.Lowercase()
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=normalized) for t in SPECIALS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", bos_token=bos, pad_token="<|endoftext|>"
    )
    fast.chat_template = template
    return fast


def generation_ends_at(*ids: int) -> None:
    config = Path("model/generation_config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": list(ids)}))


def test_rows_that_are_rendered_right_raise_nothing():
    assert findings(ROWS) == {}
    assert findings(ROWS, **{"data.template": "none"}) == {}
    cut = {"data.max_length": 75, "preflight.cut": 0.99}
    assert findings(ROWS, **cut, **{"data.truncation": "response"}) == {}
    assert findings(ROWS, **cut, **{"data.truncation": "prompt"}) == {}
    turns = [
        {
            "prompt": [{"role": "user", "content": f"question {i}"}],
            "chosen": [
                {"role": "assistant", "content": row["chosen"]},
                {"role": "assistant", "content": f"{i} more"},
            ],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for i, row in enumerate(ROWS)
    ]
    assert "UW201" not in findings(turns) and "UW203" not in findings(turns)


WITHOUT_THOUGHTS = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")


def without_thoughts(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"chosen": "<think>hm, so it is</think>" + row["chosen"]}


def test_a_template_that_takes_thoughts_out_of_answers_is_found():
    byte_tokenizer(WITHOUT_THOUGHTS).save_pretrained("model")
    said = refused("UW201", some(60, without_thoughts))
    assert "in 60 of 60 rows the chat template leaves out part of a response" in said
    assert "'<think>hm, so it is</think>" in said
    assert "in 3 of 60 rows the chat" in findings(some(3, without_thoughts))["UW201"]
    everything = {"preflight.spans": 0.99}
    assert findings(some(50, without_thoughts), **everything)["UW201"]


THINKING = CHATML.replace(
    "{{ m['content'] }}",
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m['content'] }}",
)


def thoughtful(row: dict[str, Any], key: str = "reasoning_content") -> dict[str, Any]:
    answer = {"role": "assistant", "content": row["chosen"], key: "First the river, then the salt."}
    return row | {"chosen": [answer]}


def test_thoughts_in_a_field_that_the_template_does_not_write_are_found():
    said = refused("UW201", some(40, thoughtful))
    assert "in 40 of 60 rows the chat template leaves out part of a response" in said
    assert "such as 'First the river, then the salt.'" in said
    for key in ("reasoning_content", "reasoning", "thinking"):
        rows = some(3, lambda row, key=key: thoughtful(row, key))
        assert "in 3 of 60 rows the chat template" in findings(rows)["UW201"]
    byte_tokenizer(THINKING).save_pretrained("model")
    assert "UW201" not in findings(some(40, thoughtful))
    listed = some(3, thoughtful)
    for row in listed[:3]:
        row["chosen"][0]["reasoning"] = [{"type": "text", "text": "So it is."}]
    assert "such as the message's reasoning" in findings(listed)["UW201"]


def test_thoughts_of_earlier_answers_are_left_to_the_template():
    late = THINKING.replace("{% if m.reasoning", "{% if loop.last and m.reasoning")
    byte_tokenizer(late).save_pretrained("model")

    def twice(row: dict[str, Any]) -> dict[str, Any]:
        answer = thoughtful(row)["chosen"][0]
        return row | {"chosen": [answer, answer]}

    assert "UW201" not in findings(some(60, twice))


def test_one_thought_that_is_not_written_is_found_among_many_rows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(spans, "NUM_AGAIN", 2)
    rows = [thoughtful(row) if i == 31 else row for i, row in enumerate(ROWS)]
    assert "in 1 of 60 rows" in findings(rows)["UW201"]


def test_a_tokenizer_without_tokens_for_the_text_is_found(capsys: pytest.CaptureFixture[str]):
    small_tokenizer(without="z").save_pretrained("model")
    said = refused("UW201", some(30, lambda row: row | {"chosen": "zebra " + row["chosen"]}))
    assert "in 30 of 60 rows the tokenizer has no tokens for part of a response" in said
    write_rows("pairs.jsonl", some(2, lambda row: row | {"chosen": "zebra " + row["chosen"]}))
    assert train("run") == 0
    assert "warning[UW201]: train: in 2 of" in capsys.readouterr().err


def test_responses_that_begin_with_their_whole_prompt_are_reported():
    def echo(row: dict[str, Any]) -> dict[str, Any]:
        prompt = f"Write down {row['prompt']} and its answer:"
        both = {side: f"{prompt} {row[side]}" for side in ("chosen", "rejected")}
        return {"prompt": prompt, **both}

    said = findings(some(60, echo))["UW201"]
    assert "in 60 of 60 rows every response begins with the whole prompt" in said
    assert "UW201" not in findings(some(3, echo))


def planted(monkeypatch: pytest.MonkeyPatch, change: Callable[[trees._Tokens], Any]) -> None:
    """From here on what `change` makes of prompt and responses is what is trained on."""
    right = trees._split
    monkeypatch.setattr(
        trees, "_split", lambda *args: replace(right(*args), **change(right(*args)))
    )


def each(tokens: trees._Tokens, change: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Any:
    return {"responses": {i: change(ids) for i, ids in tokens.responses.items()}}


LAST = "the prompt's last tokens are scored"
OTHER = "is scored on other tokens"
PROMPT = "the prompt's tokens are not those that serving gives"


@pytest.mark.parametrize(
    ("code", "says", "change"),
    [
        ("UW201", LAST, lambda t: {"prompt": t.prompt[:-9]} | each(t, lambda r: t.prompt[-9:] + r)),
        ("UW201", OTHER, lambda t: each(t, lambda r: r[1:])),
        ("UW201", OTHER, lambda t: each(t, lambda r: r[:-2] + r[-1:])),
        ("UW201", OTHER, lambda t: each(t, lambda r: t.prompt[-4:] + r)),
        ("UW202", PROMPT, lambda t: {"prompt": t.prompt[1:]}),
        ("UW202", PROMPT, lambda t: {"prompt": (*t.prompt, 40)}),
        ("UW203", "has 2 stop tokens", lambda t: each(t, lambda r: (*r, r[-1]))),
        ("UW203", "has 0 stop tokens", lambda t: each(t, lambda r: r[:-1])),
        ("UW203", "right is one, the last", lambda t: each(t, lambda r: (r[-1], *r[:-1]))),
    ],
)  # fmt: skip
@pytest.mark.parametrize("template", ["chat", "none"])
def test_tokens_that_are_not_the_rows_stop_the_run(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    template: str,
    code: str,
    says: str,
    change: Callable[[trees._Tokens], Any],
):
    planted(monkeypatch, change)
    write_rows("rows.jsonl", [row | {"prompt": f"A rather long {row['prompt']}"} for row in ROWS])
    words = ["check", "--model", "model", "--data", "rows.jsonl", "--template", template, "--json"]
    assert main(words) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == code and says in error["message"]


def test_prompts_and_responses_that_do_not_come_apart_are_refused():
    small_tokenizer(merges=(("(", ")"),)).save_pretrained("model")

    def joined(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": f"{row['prompt']} f(", "chosen": ")", "rejected": "x)"}

    plain = {"data.template": "none"}
    said = refused("UW202", some(20, joined), **plain)
    assert "20 of 60 rows and 0 of" in said and "rows.jsonl:1: the prompt alone ends in" in said
    assert findings(some(6, joined), **plain) == {}
    assert "none of 60 rows can be used" in refused("UW202", some(60, joined), **plain)


def test_a_template_whose_prompt_changes_once_it_is_answered_is_refused():
    byte_tokenizer("{{ messages|length }}" + CHATML).save_pretrained("model")
    assert "none of 60 rows can be used" in refused("UW202", ROWS)


def test_texts_that_hold_stop_tokens_are_refused():
    twice = refused("UW203", some(20, lambda r: r | {"chosen": f"{r['chosen']}<|im_end|>\n"}))
    assert "20 of 60 rows and 0 of 80 responses were left out, whose text holds" in twice
    assert "none of" in refused("UW203", some(60, lambda r: r | {"chosen": "a<|im_end|>"}))


def test_a_stop_that_is_an_ordinary_token_is_refused():
    period = byte_tokenizer().convert_tokens_to_ids(".")
    generation_ends_at(2, period)
    said = refused("UW203", some(30, lambda row: row | {"chosen": f"Yes. {row['chosen']}"}))
    assert "its tokens hold ., at which generation stops: 'Yes.'" in said


def test_a_stop_that_normalization_makes_is_left_out():
    small_tokenizer(normalized=True).save_pretrained("model")
    write_rows("rows.jsonl", some(3, lambda row: row | {"chosen": "fine <|IM_END|> more"}))
    found = uw.check(model="model", data="rows.jsonl")
    assert found.accounts["train"].dropped == {"stop_in_response": 3}


def test_a_stop_at_which_generation_goes_on_is_reported():
    byte_tokenizer(eos="<|endoftext|>").save_pretrained("model")
    generation_ends_at(0)
    said = findings(ROWS)["UW203"]
    assert "responses end in <|im_end|>, and the model's generation ends at <|endoftext|>" in said
    generation_ends_at(0, 2)
    assert findings(ROWS) == {}


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{bad", "model/generation_config.json cannot be read: Expecting property name"),
        ('{"eos_token_id": 99999}', "is 99999; allowed: the ids of the model's 260 tokens, from 0"),
        ('{"eos_token_id": [2, "x"]}', "is 'x'; allowed"),
        ('{"eos_token_id": -1}', "is -1; allowed"),
    ],
)
def test_a_generation_config_that_ends_nothing_is_an_error(written: str, said: str):
    Path("model/generation_config.json").write_text(written)
    with pytest.raises(ModelError) as caught:
        findings(ROWS)
    assert said in str(caught.value)


def test_a_template_that_closes_answers_with_what_is_no_token_is_reported():
    byte_tokenizer(CHATML.replace("<|im_end|>", "<|over|>")).save_pretrained("model")
    said = findings(ROWS)["UW203"]
    assert "ends a response in '<|over|>', which is no token" in said
    assert "<|im_end|> was appended in its place" in said


BOS = "{{ bos_token }}" + CHATML


def begun(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"prompt": f"<|endoftext|>{row['prompt']}"}


def test_rows_that_hold_a_beginning_of_text_are_found():
    small_tokenizer(BOS, bos="<|endoftext|>").save_pretrained("model")
    assert findings(ROWS) == {}
    said = refused("UW204", some(20, begun))
    assert "20 of 60 rows hold <|endoftext|> themselves" in said
    assert "Rows: rows.jsonl:1." in findings(some(1, begun))["UW204"]


def test_a_second_beginning_of_text_in_plain_text_is_found():
    small_tokenizer(bos="<|endoftext|>").save_pretrained("model")
    plain = {"data.template": "none"}
    assert findings(some(60, begun), **plain) == {}
    inside = [row | {"prompt": f"So: {row['prompt']}"} for row in some(60, begun)]
    assert "60 of 60 rows hold" in refused("UW204", inside, **plain)


def test_a_template_that_begins_each_turn_with_beginning_of_text_raises_nothing():
    small_tokenizer(bos="<|im_start|>").save_pretrained("model")
    assert findings(ROWS) == {}
    said = refused("UW204", some(30, lambda row: row | {"prompt": "<|im_start|>a"}))
    assert "30 of 60 rows hold <|im_start|>" in said


def test_nothing_is_said_of_a_template_that_takes_no_blank_conversation():
    picky = "{{ raise_exception('short') if messages[0]['content']|length < 3 }}"
    small_tokenizer(picky + CHATML, bos="<|im_start|>").save_pretrained("model")
    assert findings(ROWS) == {}


def test_repairs_are_exact_and_counted():
    tokenizer = small_tokenizer(merges=(("Ġ", "a"),))
    tokenizer.save_pretrained("model")
    rows = [
        row | {"prompt": f"{row['prompt']}: ", "chosen": f"a {row['chosen']}"} if i < 5 else row
        for i, row in enumerate(ROWS)
    ]
    rows[9] = rows[9] | {"prompt": "long " * 30 + "?"}
    write_rows("rows.jsonl", rows)
    limits = {"data.max_length": 120, "data.truncation": "prompt", "data.template": "none"}
    found = uw.check(**{"model": "model", "data": "rows.jsonl", **limits})
    account = found.accounts["train"]
    assert (account.boundary_repaired, account.appended_stop) == (5, 120)
    assert account.truncated == {"prompt": 1, "response": 0, "chosen": 0, "rejected": 0}
    for row, one in zip(rows, found.trees["train"], strict=True):
        for side, ids in zip(("chosen", "rejected"), one.responses, strict=True):
            whole = tuple(tokenizer(row["prompt"] + row[side])["input_ids"])
            assert ids[-1] == tokenizer.eos_token_id
            assert whole[-len(one.prompt + ids) + 1 :] == one.prompt + ids[:-1]
    assert len(found.trees["train"][9].prompt + found.trees["train"][9].responses[0]) <= 120


def test_many_rows_with_the_same_text_twice_are_reported():
    def same(row: dict[str, Any]) -> dict[str, Any]:
        return row | {"chosen": row["rejected"]}

    said = findings(some(6, same))["UW206"]
    assert "in 6 of 60 rows chosen and rejected are the same" in said
    assert "Rows: rows.jsonl:1, rows.jsonl:2" in said
    assert findings(some(2, same), **{"preflight.identical": 0.04}) == {}


def test_a_row_that_is_lost_on_its_way_to_tokens_stops_the_run(monkeypatch: pytest.MonkeyPatch):
    def losing(*args: Any) -> Any:
        rows = list(trees.trees(*args))
        return iter(rows[1:])

    monkeypatch.setattr(stream, "trees", losing)
    said = refused("UW208", ROWS)
    assert "60 rows were read, 59 became tokens and 0 were dropped" in said


BRIEF = {"role": "system", "content": "Be brief."}
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + CHATML
)


def with_system(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"prompt": [BRIEF, {"role": "user", "content": row["prompt"]}]}


def test_rows_that_the_template_refuses_end_the_run_where_they_are_many(
    capsys: pytest.CaptureFixture[str],
):
    byte_tokenizer(NO_SYSTEM).save_pretrained("model")
    said = refused("UW208", some(54, with_system))
    assert "train: 54 of 60 rows are not used (preflight.dropped is 20%): 54 x template" in said
    assert "rows.jsonl:1: the chat template says: 'System role not supported'" in said
    assert main(["check", "--model", "model", "--data", "rows.jsonl"]) == 2
    assert "UW208" not in findings(some(54, with_system), **{"preflight.dropped": 0.95})
    assert findings(some(12, with_system)) == {}


def test_reasons_of_which_no_single_one_is_much_are_counted_together():
    def broken(row: dict[str, Any]) -> dict[str, Any]:
        return row | {"chosen": "half \ud800"}

    def unasked(row: dict[str, Any]) -> dict[str, Any]:
        return row | {"prompt": " "}

    rows = [unasked(row) if i % 8 == 1 else broken(row) if i % 8 == 2 else row
            for i, row in enumerate(ROWS)]  # fmt: skip
    said = refused("UW208", rows)
    assert "16 of 60 rows are not used" in said and "8 x bad_unicode" in said
    assert "8 x empty_prompt" in said
    # What is reported under another code, or accepted by another key, is not counted again.
    stops = some(12, lambda row: row | {"chosen": "a <|im_end|>"})
    stops[20:26] = map(broken, stops[20:26])
    assert "18 of 60 rows" in refused("UW208", stops)
    assert "UW208" not in refused("UW203", stops, **{"preflight.spans": 0.1})
    assert findings(stops, **{"preflight.spans": 0.5}) == {}


def test_rows_that_prefer_none_of_their_responses_are_reported_where_they_are_most():
    def scored(row: dict[str, Any], scores: list[float | None]) -> dict[str, Any]:
        texts = [row["chosen"], row["rejected"]]
        return {"prompt": row["prompt"], "responses": texts, "scores": scores}

    def share(num: int, scores: list[float | None]) -> list[dict[str, Any]]:
        return [scored(row, scores if i < num else [2, 1]) for i, row in enumerate(ROWS)]

    assert findings(share(28, [1, 1])) == {}
    said = findings(share(40, [1, 1]))["UW208"]
    assert "40 of 60 rows are not used" in said and "40 x no_preference" in said
    # A score that is missing is no score that is equal.
    assert "15 x unlabelled" in refused("UW208", share(15, [1, None]))


def untold(row: dict[str, Any]) -> dict[str, Any]:
    return {key: f"The capital is {row[key]}" for key in ("chosen", "rejected")}


def test_prompts_made_of_what_both_texts_begin_with_are_counted_and_reported():
    said = findings([untold(row) for row in ROWS])["UW201"]
    assert "60 rows state no prompt: what chosen and rejected begin with alike" in said
    checked = uw.check(model="model", data="rows.jsonl", learning_rate=1e-3)
    assert checked.accounts["train"].to_json()["shared_prompts"] == 60
    assert "60 prompts taken from what both texts begin with" in repr(checked)
    # Text that goes on as text is what such rows are for.
    alone = {"data.template": "none"}
    assert "UW201" not in findings([untold(row) for row in ROWS], **alone)
    held = uw.check(model="model", data="rows.jsonl", **alone, **{"evaluation.fraction": 0.5})
    assert "UW201" not in {f.code for f in held.findings}


@pytest.mark.parametrize("template", ["chat", "none"])
def test_rows_without_the_prompt_that_others_of_their_file_have_are_reported(template: str):
    values = {"data.template": template}
    rows = some(3, lambda row: {"prompt": None, **untold(row)})
    said = findings(rows, **values)["UW201"]
    assert "3 rows have no prompt, where other rows of their file have one" in said
    assert "rows.jsonl:1, rows.jsonl:2, rows.jsonl:3" in said
    prompts = [{"prompt": row["prompt"]} for row in ROWS]
    write_rows("asked.jsonl", [*prompts, untold(ROWS[0]) | {"prompt": None}])
    account = stream.load_prompts(["asked.jsonl"])[1]
    assert account.unprompted == ["asked.jsonl:61"] == account.shared_prompts


def test_conversations_say_where_they_split_and_need_no_prompt():
    def whole(row: dict[str, Any]) -> dict[str, Any]:
        asked = {"role": "user", "content": row["prompt"]}
        answers = ({"role": "assistant", "content": row[k]} for k in ("chosen", "rejected"))
        chosen, rejected = ([asked, answer] for answer in answers)
        return {"prompt": None, "chosen": chosen, "rejected": rejected}

    assert findings(some(30, whole)) == {}


@pytest.mark.parametrize("name", ["template_options", "chat_template_kwargs"])
def test_a_variable_of_the_rows_own_that_the_template_never_reads_is_refused(name: str):
    def quiet(row: dict[str, Any]) -> dict[str, Any]:
        return row | {name: {"enable_thinking": False}}

    said = refused("UW109", some(7, quiet))
    assert "template_options.enable_thinking is set by rows of their own" in said
    assert "Rows: rows.jsonl:1, rows.jsonl:2" in said and "rows.jsonl:5 and 2 more." in said
    assert "text without a chat" in refused("UW109", some(7, quiet), **{"data.template": "none"})
    write_rows("asked.jsonl", [quiet({"prompt": "which?"})])
    asked = {"evaluation.prompt_files": ["asked.jsonl"]}
    assert "Rows: asked.jsonl:1." in refused("UW109", ROWS, **asked)
    with pytest.raises(Refusal, match="enable_thinking"):
        uw.sample("model", "asked.jsonl")
    byte_tokenizer("{% if enable_thinking %}t{% endif %}" + CHATML).save_pretrained("model")
    assert findings(some(7, quiet)) == {}


def test_prompts_of_an_evaluation_are_read_back_too():
    rendered = "<|im_start|>user\nwhich?<|im_end|>\n<|im_start|>assistant\n"
    write_rows("asked.jsonl", [{"prompt": f"{i} {rendered}"} for i in range(4)])
    asked = {"evaluation.prompt_files": ["asked.jsonl"]}
    assert "prompts: 4 of 4 rows hold <|im_start|>" in refused("UW204", ROWS, **asked)
    write_rows("asked.jsonl", [{"prompt": f"which {i}?"} for i in range(4)])
    assert findings(ROWS, **asked) == {}
    write_rows("asked.jsonl", [{"prompt": f"[INST] which {i}?"} for i in range(4)])
    assert "prompts: 4 of 4 rows hold what a chat" in findings(ROWS, **asked)["UW204"]


def test_many_rows_are_sampled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(spans, "NUM_AGAIN", 3)
    byte_tokenizer(WITHOUT_THOUGHTS).save_pretrained("model")
    assert "in about 6 of 60 rows" in findings(some(6, without_thoughts))["UW201"]
