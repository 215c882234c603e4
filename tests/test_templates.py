"""In the manner of each model family, with the stop as padding token and without one: what is
scored is the response and exactly one stop token, or the row is dropped by name."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from families import FAMILIES, ROW, UNSTABLE, Family, assistant, grown, pair_of, reason, texts, user
from upweight.config import Preflight
from upweight.data.account import REASONS, Account
from upweight.data.clock import on_day
from upweight.data.render import make_renderer
from upweight.data.stream import grow
from upweight.data.trees import prompt_ids, tree
from upweight.trust.spans import Texts, examine_texts
from upweight.types import Dropped, Example, Preference, RowId


def padded(tokenizer: Any, pad: str) -> Any:
    """A copy, whose padding token is its end-of-text, or which has none."""
    found = copy.deepcopy(tokenizer)
    found.pad_token = found.eos_token if pad == "stop" else None
    return found


@pytest.fixture(params=FAMILIES, ids=lambda name: name.replace(" ", "-"))
def bare(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(params=["stop", "none"], ids=lambda pad: f"pad-{pad}")
def family(bare: Family, request: pytest.FixtureRequest) -> Family:
    return replace(bare, tokenizer=padded(bare.tokenizer, request.param))


def served(family: Family) -> list[int]:
    serving = family.tokenizer if family.date is None else on_day(family.tokenizer, family.date)
    return serving.apply_chat_template(
        [user("Why?")], add_generation_prompt=True, return_dict=False, **family.options
    )


def test_the_scored_span_is_what_the_template_writes_up_to_one_stop(family: Family):
    found, notes = grown(pair_of(), family.tokenizer, **family.renderer_options)
    no = family.response.replace("Because", "No")
    assert texts(found, family.tokenizer) == [family.prompt, family.response, no]
    assert found.stopped == (True, True)
    assert found.preferences == (Preference(0, 1),)
    assert notes.num_appended == (2 if family.appended else 0)
    assert not notes.repaired and not notes.num_rewritten and not notes.left_out


def test_the_prompt_is_what_serving_renders(family: Family):
    found, _ = grown(pair_of(), family.tokenizer, **family.renderer_options)
    assert list(found.prompt) == served(family)


def test_a_prompt_alone_is_what_serving_renders(family: Family):
    renderer = make_renderer(family.tokenizer, **family.renderer_options)
    assert list(prompt_ids(Example("Why?", (), (), ROW), renderer)) == served(family)
    empty = prompt_ids(Example("", (), (), ROW), renderer)
    assert isinstance(empty, Dropped) and empty.reason == "empty_prompt"


def test_each_span_ends_in_its_only_stop_and_beginning_of_text_is_at_most_once(family: Family):
    tok = family.tokenizer
    renderer = make_renderer(tok, **family.renderer_options)
    found, _ = grown(pair_of(), tok, **family.renderer_options)
    for response in found.responses:
        assert [i for i in response if i in renderer.stop_ids] == [response[-1]] == [renderer.end]
        assert tok.bos_token_id not in response
    assert tok.bos_token_id not in found.prompt[1:]
    assert (tok.bos_token_id is None) or found.prompt[0] == tok.bos_token_id


def test_a_conversation_is_the_same_as_its_texts(family: Family):
    turns = pair_of([user("Why?")], [assistant("Because.")], assistant("No."))
    options = family.renderer_options
    assert grown(turns, family.tokenizer, **options) == grown(
        pair_of(), family.tokenizer, **options
    )


@pytest.mark.parametrize(
    "content", ["im", "assistant", "a", "\nx", "x\n", "think", "end", "s", "|>", "Heron."]
)
def test_no_content_is_mistaken_for_what_the_template_writes(family: Family, content: str):
    found, _ = grown(
        pair_of(chosen=content, rejected="zzz"), family.tokenizer, **family.renderer_options
    )
    written = content.strip() if family.trims else content
    assert texts(found, family.tokenizer)[1] == family.response.replace("Because.", written)


def test_a_response_that_holds_a_special_token_is_dropped(family: Family):
    for special in family.tokenizer.all_special_tokens:
        example = pair_of(chosen=f"a {special} b")
        assert reason(example, family.tokenizer, **family.renderer_options) == "stop_in_response"


def examined(tokenizer: Any, examples: list[Example], **options: Any) -> list[Any]:
    renderer = make_renderer(tokenizer, **options)
    account = Account(read=len(examples), used=len(examples))
    found = grow(examples, renderer, account)
    return examine_texts(
        Texts("train", examples, found, account, renderer, renderer.stop_ids, Preflight())
    )


@pytest.mark.parametrize("cut", ["drop", "prompt", "response"])
def test_reading_the_tokens_back_finds_nothing_wrong(family: Family, cut: str):
    rows = ["Because.", " So\n", "One.\n\nTwo <b>three</b>, é 字 🙂", "x = {'a': [1]}", "a\nb "]
    turns = pair_of(
        [user("a"), assistant("b"), user("c")], [assistant("Yes.")], [assistant("No, no.")]
    )
    examples = [pair_of(f"Why {i}?", text, "No.") for i, text in enumerate(rows)] + [turns]
    examples = [replace(e, row=RowId("t", i)) for i, e in enumerate(examples)]
    assert examined(family.tokenizer, examples, **family.renderer_options) == []
    limit = {"max_length": 60, "truncation": cut, **family.renderer_options}
    options = {k: v for k, v in limit.items() if cut != "drop" or k != "max_length"}
    assert examined(family.tokenizer, examples, **options) == []


@pytest.mark.parametrize("pad", ["stop", "none"])
@pytest.mark.parametrize("name", UNSTABLE, ids=lambda name: name.replace(" ", "-"))
def test_a_template_that_is_not_stable_drops_the_row_by_name(name: str, pad: str):
    assert reason(pair_of(), padded(UNSTABLE[name], pad)) == "boundary"


contents = st.lists(
    st.text(max_size=6) | st.sampled_from(["<|im_end|>", "<s>", "</s>", "\n", " ", "<", "|>", "é"]),
    max_size=6,
).map("".join)
RENDERERS = {
    name: make_renderer(family.tokenizer, **family.renderer_options)
    for name, family in FAMILIES.items()
}


@settings(max_examples=1500, deadline=None)
@given(st.sampled_from(sorted(FAMILIES)), contents, contents)
def test_any_text_is_scored_whole_with_one_stop_or_dropped_by_name(
    name: str, prompt: str, chosen: str
):
    family, renderer = FAMILIES[name], RENDERERS[name]
    found = tree(pair_of(prompt, chosen, "zzz"), renderer) if chosen.strip() != "zzz" else None
    if found is None or isinstance(found, Dropped):
        assert found is None or (found.reason in REASONS and found.detail)
        return
    (grown_tree, notes) = found
    if grown_tree.ids[0].index != 0:
        assert notes.left_out[0] in REASONS
        return
    ids = grown_tree.responses[0]
    assert [k for k, i in enumerate(ids) if i in renderer.stop_ids] == [len(ids) - 1]
    said = family.tokenizer.decode(list(ids))
    written = chosen.strip() if family.trims else chosen
    if notes.repaired:
        assert said.endswith(family.response[-4:]) and written.strip() in said
    else:
        assert said == family.response.replace("Because.", written)
