import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upweight.data.columns import COLUMNS, detect, shown
from upweight.data.formats import (
    FORMATS,
    answer_of,
    example_of,
    messages,
    pair,
    prompt_of,
    responses,
)
from upweight.data.preferences import left_out, preferences_from_scores, unusable
from upweight.errors import DataError
from upweight.types import Dropped, Example, Preference, RowId

ROW = RowId("train.jsonl", 7)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def read(row, layout=None, **options):
    """The example of a row that has one."""
    example = example_of(row, ROW, layout or detect(row, ROW), **options)
    assert isinstance(example, Example), example
    return example


def dropped(row, *, layout=None, require_preferences=True, **options):
    found = example_of(row, ROW, layout or detect(row, ROW), **options)
    if isinstance(found, Example):
        found = unusable(found, require_preferences=require_preferences)
    assert isinstance(found, Dropped) and found.row == ROW and found.detail
    return found.reason


def contents(example):
    return [r.content for r in example.responses]


def wins(example):
    return [(p.chosen, p.rejected) for p in example.preferences]


@pytest.mark.parametrize("indent", [None, 1])
def test_messages_in_json_are_messages_in_any_kind_of_file(indent: int | None):
    said = {"prompt": [user("a?")], "chosen": [assistant("yes")], "rejected": assistant("no")}
    texts = {name: json.dumps(value, indent=indent) for name, value in said.items()}
    assert read(texts) == read(said)
    one = {"prompt": texts["prompt"], "responses": [texts["chosen"], texts["rejected"]]}
    assert contents(read(one)) == contents(read(said))
    for text in ('[{"role"', '[{"role": "user"}]', '{"role": 1, "x": 2}', "[]", '["role"]'):
        assert read({"prompt": text, "chosen": "a", "rejected": "b"}).prompt == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[{"role": "user", "role": "user"}]', "7: prompt has the key 'role' twice in an object"),
        ("[{'role': 'user', 'content': 'a'}]", "7 has Python's notation in prompt"),
        ("{ 'role': 'user', 'content': 'a'}", "7 has Python's notation in prompt"),
    ],
)
def test_messages_that_are_hardly_json_are_an_error(text: str, says: str):
    with pytest.raises(DataError) as error:
        read({"prompt": text, "chosen": "a", "rejected": "b"})
    assert says in str(error.value)


def test_a_pair_of_texts_is_a_prompt_with_two_responses():
    example = read({"prompt": "Why?", "chosen": "Because.", "rejected": "No.", "weight": 0.5})
    assert example.prompt == "Why?"
    assert contents(example) == ["Because.", "No."]
    assert example.preferences == (Preference(0, 1, 0.5),)
    assert example.row == ROW


@pytest.mark.parametrize("answer", ["yes", [assistant("yes")], assistant("yes")])
@pytest.mark.parametrize("prompt", [[user("a?")], user("a?")])
def test_answers_to_a_conversation_may_be_text_messages_or_one_message(prompt, answer):
    example = read({"prompt": prompt, "chosen": answer, "rejected": "no"})
    assert example.prompt == (user("a?"),)
    assert contents(example) == [(assistant("yes"),), (assistant("no"),)]


def test_a_text_prompt_with_message_answers_becomes_a_user_turn():
    example = read({"prompt": "a?", "chosen": [assistant("yes")], "rejected": "no"})
    assert example.prompt == (user("a?"),)
    assert contents(example) == [(assistant("yes"),), (assistant("no"),)]


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
@pytest.mark.parametrize("as_text", [True, False])
def test_answers_that_repeat_the_prompts_messages_lose_them(system, as_text):
    turns = [*system, user("a?")]
    row = {
        "prompt": "a?" if as_text else turns,
        "chosen": [*turns, assistant("yes")],
        "rejected": [*turns, assistant("no")],
    }
    example = read(row)
    assert example.prompt == tuple(turns)
    assert contents(example) == [(assistant("yes"),), (assistant("no"),)]


def test_without_a_prompt_conversations_split_at_the_first_message_that_differs():
    turns = [user("a?"), assistant("which?"), user("b")]
    row = {
        "chosen": [*turns, assistant("yes")],
        "rejected": [*turns, assistant("no"), user("oh"), assistant("x")],
    }
    example = read(row)
    assert example.prompt == tuple(turns)
    assert contents(example)[0] == (assistant("yes"),)
    assert len(contents(example)[1]) == 3


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ([user("a"), assistant("x")], [user("b"), assistant("y")], "prompt_mismatch"),
        ([user("a"), assistant("x"), user("b")], [user("a"), assistant("y")], "not_assistant"),
        ([user("a"), assistant("x")], [user("a")], "empty_response"),
        ([user("a"), assistant("x")], [user("a"), assistant("x")], "identical_responses"),
        ([user("a"), assistant("x")], "y", "prompt_mismatch"),
        ([user("a"), assistant(" ")], [user("a"), assistant("y")], "empty_response"),
        ([user("a"), assistant(None)], [user("a"), assistant("y")], "empty_response"),
    ],
)  # fmt: skip
def test_conversations_without_a_usable_split_are_dropped(chosen, rejected, reason):
    assert dropped({"chosen": chosen, "rejected": rejected}) == reason


def test_answers_that_do_not_continue_the_prompt_are_dropped():
    row = {"prompt": "a?", "chosen": [user("b?"), assistant("x")], "rejected": "y"}
    assert dropped(row) == "prompt_mismatch"


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue", "The sky is green", "The sky is"),  # one space goes with the word
        ("Q: a\n\nyes", "Q: a\n\nno", "Q: a\n\n"),  # line breaks stay with the prompt
        ("the cat", "the catalog", "the"),  # never inside a word
        ("the cat", "the cat sat", "the"),  # both answers keep a word
        ("a b", "a\nb", "a"),
        ("one", "two", ""),
    ],
)
def test_without_a_prompt_texts_split_at_the_last_white_space_they_share(chosen, rejected, prompt):
    example = pair({"chosen": chosen, "rejected": rejected}, ROW)
    assert example.prompt == prompt
    assert contents(example) == [chosen[len(prompt) :], rejected[len(prompt) :]]


@given(st.text("ab \n", max_size=30), st.text("ab \n", max_size=30))
def test_an_implicit_split_loses_no_text_and_cuts_no_word(chosen, rejected):
    example = pair({"chosen": chosen, "rejected": rejected}, ROW)
    assert isinstance(example, Example)
    for text, end in zip((chosen, rejected), contents(example), strict=True):
        assert example.prompt + end == text
        if example.prompt:
            assert example.prompt[-1].isspace() or end[0].isspace()
            assert end.strip()


def test_a_transcript_splits_after_its_last_shared_assistant():
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: more\n\nAssistant:"
    example = read({"chosen": start + " Sure.", "rejected": start + " So what?"})
    assert example.prompt == start
    assert contents(example) == [" Sure.", " So what?"]


def test_transcripts_that_differ_before_the_last_answer_are_dropped():
    a = "\n\nHuman: hi\n\nAssistant: one\n\nHuman: x\n\nAssistant: y"
    assert dropped({"chosen": a, "rejected": a.replace("one", "two")}) == "prompt_mismatch"
    assert dropped({"chosen": a, "rejected": a.replace("hi", "ho")}) == "prompt_mismatch"


def test_scored_responses_make_preferences():
    row = {
        "prompt": "p",
        "responses": [
            {"text": "a", "score": 1},
            {"content": "b", "score": 3, "weight": 2},
            {"text": "c", "score": 1, "weight": 0.5},
        ],
    }
    example = read(row)
    assert example.preferences == (Preference(1, 0, 2.0, 2.0), Preference(1, 2, 1.0, 2.0))


def test_responses_may_be_strings_with_scores_beside_them():
    example = read({"prompt": "p", "responses": ["a", "b", "c"], "scores": [0.1, None, 0.2]})
    assert wins(example) == [(2, 0)]
    assert example.responses[1].score is None


def test_stated_preferences_come_before_scores():
    row = {
        "prompt": "p",
        "responses": [{"text": "a", "score": 9}, {"text": "b", "score": 1, "weight": 3}, "c"],
        "preferences": [[1, 0], [2, 0, 0.25]],
    }
    assert read(row).preferences == (Preference(1, 0, 3.0), Preference(2, 0, 0.25))


def test_responses_may_be_messages():
    row = {
        "prompt": "p",
        "responses": [
            {"messages": [assistant("a")], "score": 1},
            {"role": "assistant", "content": "b", "score": 0},
            {"text": "c", "score": 0.5},
        ],
    }
    example = read(row)
    assert example.prompt == (user("p"),)
    assert contents(example) == [(assistant("a"),), (assistant("b"),), (assistant("c"),)]


def test_messages_take_the_last_assistant_message_as_the_response():
    turns = [user("a"), assistant("b"), user("c"), assistant("d")]
    example = read({"messages": turns})
    assert example.prompt == tuple(turns[:3])
    assert contents(example) == [(assistant("d"),)]
    assert unusable(example, require_preferences=False) is None
    assert dropped({"messages": turns}) == "unlabelled"
    assert dropped({"messages": turns[:3]}) == "not_assistant"
    assert dropped({"messages": []}) == "not_assistant"


def test_an_empty_or_repeated_response_is_in_no_preference():
    row = {
        "prompt": "p",
        "responses": [
            {"text": "a", "score": 2},
            {"text": " \n", "score": 9},
            {"text": "b", "score": 1},
            {"text": "a", "score": 0},
        ],
    }
    example = read(row)
    assert wins(example) == [(0, 2)]
    assert left_out(example) == {1: "empty_response", 3: "identical_responses"}


def test_what_is_stated_of_a_copy_is_said_of_the_first_of_its_kind():
    row = {
        "prompt": "p",
        "responses": ["a", "b", "a", ""],
        "preferences": [[1, 2], [0, 2], [3, 1]],
    }
    assert wins(read(row)) == [(1, 0)]


@pytest.mark.parametrize(
    ("texts", "scores", "reason"),
    [
        (["a", "b"], [1, 1], "no_preference"),
        (["a", "b"], None, "unlabelled"),
        (["a", "b"], [1, None], "unlabelled"),
        (["a"], [1], "unlabelled"),
        (["a", ""], [1, 2], "empty_response"),
        (["a", None], [1, 2], "empty_response"),
        (["a", "a"], [1, 2], "identical_responses"),
        ([], None, "empty_response"),
    ],
)
def test_a_row_without_a_preference_is_dropped_with_its_reason(texts, scores, reason):
    assert dropped({"prompt": "p", "responses": texts, "scores": scores}) == reason


def test_an_empty_side_or_two_equal_ones_drop_a_pair():
    assert dropped({"prompt": "p", "chosen": "a", "rejected": ""}) == "empty_response"
    assert dropped({"prompt": "p", "chosen": None, "rejected": "a"}) == "empty_response"
    assert dropped({"prompt": "p", "chosen": "a", "rejected": "a"}) == "identical_responses"


def test_half_a_surrogate_pair_drops_the_row_wherever_it_is():
    for row in (
        {"prompt": "p\ud800", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": [assistant("\udfff")], "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": "b", "tools": [{"name": "\ud800"}]},
    ):
        assert dropped(row) == "bad_unicode"
    assert read({"prompt": "\0 \U0001f600", "chosen": "a", "rejected": "b"}).prompt[0] == "\0"


def test_tools_and_template_options_come_along():
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "tools": [tool]}
    assert read(row).tools == (tool,)
    for name in ("template_options", "chat_template_kwargs"):
        assert read(row | {name: {"thinking": True}}).template_options == {"thinking": True}
    assert read(row).template_options is None
    assert read(row | {"tools": '[{"name": "f"}]'}).tools == ({"name": "f"},)


def test_nulls_that_columnar_files_fill_in_are_gone():
    call = {"name": "f", "arguments": {"x": 1, "y": None}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call], "name": None}
    rejected = assistant("b") | {"tool_calls": None}
    row = {"prompt": [user("p")], "chosen": [turn], "rejected": [rejected]}
    example = read(row)
    assert contents(example)[0] == (
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]},
    )
    assert contents(example)[1] == (assistant("b"),)


def test_content_in_parts_of_text_is_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "image": None}]
    row = {"prompt": [{"role": "user", "content": parts}], "chosen": "x", "rejected": "y"}
    assert read(row).prompt == (user("ab"),)


def test_detection_prefers_columns_that_are_filled():
    assert detect({"prompt": "", "chosen": "a", "rejected": "b", "messages": []}, ROW) == "pair"
    assert detect({"chosen": None, "rejected": None, "messages": []}, ROW) == "messages"
    assert detect({"prompt": "p", "responses": []}, ROW) == "responses"
    assert detect({"prompt": "p", "chosen": None, "rejected": "b"}, ROW) == "pair"


def test_a_prompt_with_a_completion_is_one_response_without_a_preference():
    example = read({"prompt": "Why?", "completion": " Because."})
    assert (example.prompt, contents(example)) == ("Why?", [" Because."])
    assert example.preferences == ()
    talk = read({"prompt": [user("a?")], "completion": [assistant("yes")]})
    assert (talk.prompt, contents(talk)) == ((user("a?"),), [(assistant("yes"),)])
    assert dropped({"prompt": "p", "completion": ""}, require_preferences=False) == "empty_response"
    assert dropped({"prompt": [user("p")], "completion": [user("q")]}) == "prompt_mismatch"
    # Where there is more beside it, that is what is learned from.
    assert detect({"prompt": "p", "completion": "c", "chosen": "a", "rejected": "b"}, ROW) == "pair"
    row = {"prompt": "p", "completion": "c"}
    found = unusable(read(row), require_preferences=True)
    assert found is not None and found.reason == "unlabelled"
    assert found.detail.endswith("objective sft learns from such rows")


def test_a_conversation_that_is_labelled_good_or_bad_is_refused():
    row = {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]}
    assert not isinstance(messages(row | {"label": "history"}, ROW), Dropped)
    with pytest.raises(DataError, match='has a "label" beside the answer'):
        messages(row | {"label": False}, ROW)


@pytest.mark.parametrize("label", [True, False, 1, "good"])
def test_a_completion_with_a_label_is_answered_by_the_columns_that_are_read(label):
    row = {"prompt": "p", "completion": "c", "label": label}
    with pytest.raises(DataError, match='train.jsonl:7 has a "label" beside the answer') as caught:
        read(row)
    assert "prompt, chosen and rejected; for sft keep the good rows" in str(caught.value)
    assert isinstance(prompt_of(row, ROW), Example)


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "a"),
        ({"prompt": "p", "responses": [{"text": "c"}, "d"]}, "c"),
        ({"messages": [user("p"), assistant("e")]}, (assistant("e"),)),
        ({"prompt": "p", "completion": "f"}, "f"),
        ({"prompt": "p"}, None),
        ({"prompt": "p", "responses": []}, None),
        ({"prompt": "p", "completion": "f", "label": True}, None),
        ({"prompt": "p", "chosen": 5, "rejected": "b"}, None),
    ],
)
def test_the_answer_of_a_row_is_its_first_response_if_it_has_one(row, answer):
    assert answer_of(row, ROW) == answer


def test_every_layout_has_its_columns():
    assert FORMATS.keys() == COLUMNS.keys()


def pairs_row(**columns):
    return {"prompt": "p", "chosen": "a", "rejected": "b", **columns}


def many_row(**columns):
    return {"prompt": "p", "responses": ["a", "b"], **columns}


@pytest.mark.parametrize(
    ("row", "layout", "says"),
    [
        ({"prompt": "p", "choosen": "a", "rejected": "b"}, None,
         'train.jsonl:7 is of no known layout (it has: prompt, choosen, rejected). Allowed: pair '
         'needs chosen and rejected; responses needs prompt and responses; messages needs '
         'messages; completion needs prompt and completion. '
         'Is "choosen" meant to be "chosen"?'),
        ({}, None, "(it has: nothing)"),
        ({"a\ud800": 1}, None, "(it has: a\\ud800)"),
        ({"prompt": "p", "chosen": "a"}, "pair",
         'train.jsonl:7 has no "rejected" (it has: prompt, chosen). The pair layout needs chosen '
         'and rejected.'),
        ({"question": "q", "chosen_response": "a", "rejected_response": "b"}, None,
         'Is "question" meant to be "prompt", "chosen_response" "chosen" and "rejected_response" '
         '"rejected"?'),
        ({"prompt": "p", "response": ["a"]}, "responses", 'Is "response" meant to be "responses"?'),
        (pairs_row(chosen=42), None,
         "chosen is a number (42); allowed: text, a list of messages, or one message."),
        (pairs_row(chosen=["a"]), None, "chosen[0] is text (\"a\"); allowed: a message"),
        (pairs_row(chosen=[{"from": "gpt", "value": "a"}]), None,
         '[0] has no "role" (it has: from, value). A message is {"role": ..., "content": ...}.'),
        (pairs_row(chosen=[{"role": "assistant"}]), None, '[0] has no "content" (it has: role)'),
        (pairs_row(chosen=[{"role": 1, "content": "a"}]), None, "chosen[0].role is a number (1)"),
        (pairs_row(chosen=[{"role": "assistant", "content": 5}]), None,
         "chosen[0].content is a number (5); allowed: text."),
        (pairs_row(chosen=[{"role": "assistant", "content": [{"type": "image"}]}]), None,
         'only parts of text can be learned from'),
        (pairs_row(weight=-1), None, "weight is a number (-1); allowed: a number above 0."),
        (pairs_row(weight="much"), None, 'weight is text ("much"); allowed: a finite number.'),
        (pairs_row(tools="["), None, 'tools is text ("["); allowed: a list of tool definitions.'),
        (pairs_row(tools='[{"name": "a", "name": "b"}]'), None,
         """tools has the key 'name' twice in an object ({"name": "b"}). Keep one."""),
        (pairs_row(tools=[1]), None, "tools[0] is a number (1); allowed: an object."),
        (pairs_row(template_options=[]), None, "_options is a list ([]); allowed: an object."),
        (pairs_row(template_options={}, chat_template_kwargs={}), None, "two names of one thing"),
        (many_row(responses="a"), None, 'responses is text ("a"); allowed: a list of responses.'),
        (many_row(responses=[1]), None, "responses[0] is a number (1); allowed: text, or an"),
        (many_row(responses=[{"score": 1}]), None, "responses[0] has no text (it has: score)."),
        (many_row(responses=[{"text": "a", "content": "b"}]), None,
         "responses[0] has text and content"),
        (many_row(responses=[{"text": "a", "score": math.nan}]), None,
         "responses[0].score is a number (NaN); allowed: a finite number."),
        (many_row(responses=[{"text": "a", "score": 1}], scores=[2]), None, "Keep one."),
        (many_row(responses=[{"text": "a", "stopped": "no"}]), None,
         'responses[0].stopped is text ("no"); allowed: true, or false where'),
        (many_row(scores=[1]), None, "train.jsonl:7 has 1 scores for 2 responses."),
        (many_row(preferences=[[0]]), None, "[0] is a list ([0]); allowed: [chosen, rejected]"),
        (many_row(preferences=[[1, 1]]), None, "preferences[0] is a list ([1, 1])"),
        (many_row(preferences=[[0, 2]]), None, "the responses are numbered 0 to 1"),
        ({"messages": [1]}, None, "messages[0] is a number (1)"),
    ],
)  # fmt: skip
def test_a_row_that_is_not_its_layout_says_where_what_and_what_is_allowed(row, layout, says):
    with pytest.raises(DataError) as error:
        example_of(row, ROW, layout or detect(row, ROW))
    assert says in str(error.value) and "train.jsonl:7" in str(error.value)
    str(error.value).encode()


def test_a_prompt_is_read_from_any_layout():
    def prompt(row):
        found = prompt_of(row, ROW)
        assert isinstance(found, Example) and not found.responses
        return found.prompt

    assert prompt({"prompt": "p"}) == "p"
    assert prompt({"messages": [user("a"), assistant("b")]}) == (user("a"),)
    assert prompt({"messages": [user("a")]}) == (user("a"),)
    assert prompt({"chosen": "x a", "rejected": "x b"}) == "x"
    assert prompt_of({"prompt": "\ud800"}, ROW).reason == "bad_unicode"
    mismatch = {"chosen": [user("a"), assistant("x")], "rejected": [user("b"), assistant("y")]}
    assert prompt_of(mismatch, ROW).reason == "prompt_mismatch"
    with pytest.raises(DataError, match=r"train.jsonl:7 has no prompt \(it has: text\)"):
        prompt_of({"text": "p"}, ROW)


SCORES = [3.0, 1.0, 3.0, 2.0, None]


@pytest.mark.parametrize(
    ("pairing", "gap", "expected"),
    [
        ("all", 0.0, {(0, 1), (0, 3), (2, 1), (2, 3), (3, 1)}),
        ("all", 1.0, {(0, 1), (2, 1)}),
        ("adjacent", 0.0, {(0, 3), (2, 3), (3, 1)}),
        ("adjacent", 1.0, {(0, 1), (2, 1)}),
        ("extremes", 0.0, {(0, 1)}),
        ("extremes", 2.0, set()),
    ],
)
def test_pairings_of_scores(pairing, gap, expected):
    found = preferences_from_scores(SCORES, pairing, gap)
    assert {(p.chosen, p.rejected) for p in found} == expected
    assert len(found) == len(expected)


def test_a_gap_means_what_it_says_in_decimals():
    assert 0.8 - 0.6 > 0.2
    assert preferences_from_scores([0.8, 0.6], "all", 0.2) == ()
    (found,) = preferences_from_scores([0.81, 0.6], "all", 0.2)
    assert (found.chosen, found.rejected, found.margin) == (0, 1, pytest.approx(0.21))


def test_a_pairing_that_is_asked_for_is_one_of_the_scores_whatever_is_stated():
    items = [{"text": "a", "score": 1}, {"text": "b", "score": 3}, {"text": "c", "score": 2}]
    row = {"prompt": "p", "responses": items}

    def made(row, pairing):
        return [
            (p.chosen, p.rejected)
            for p in example_of(row, ROW, "responses", pairing=pairing).preferences
        ]

    for stated in ([[0, 1]], []):
        said = row | {"preferences": stated}
        assert made(said, "auto") == [tuple(p) for p in stated]
        assert made(said, "extremes") == [(1, 0)]
    assert sorted(made(row, "auto")) == sorted(made(row, "all")) == [(1, 0), (1, 2), (2, 0)]
    # Where there are no scores, what is stated is all there is.
    unscored = {"prompt": "p", "responses": ["a", "b"], "preferences": [[1, 0]]}
    assert made(unscored, "extremes") == [(1, 0)]


@pytest.mark.parametrize("pairing", ["all", "adjacent", "extremes"])
def test_the_gap_of_the_scores_is_the_margin(pairing):
    for p in preferences_from_scores(SCORES, pairing):
        assert p.margin == SCORES[p.chosen] - SCORES[p.rejected] > 0


def test_a_pair_may_say_how_much_better_its_chosen_response_is():
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    for said, margin in ((None, 0.0), ("", 0.0), (0, 0.0), (1.5, 1.5), ("2", 2.0)):
        assert pair(row | {"margin": said}, ROW).preferences == (Preference(0, 1, 1.0, margin),)
    for wrong in (-1, "much", float("inf"), 1e7):
        with pytest.raises(DataError, match="margin is .*; allowed: a"):
            pair(row | {"margin": wrong}, ROW)


def test_a_pair_may_say_how_sure_its_label_is():
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    for said, sure in ((None, 1.0), ("", 1.0), (1, 1.0), (0.5, 0.5), ("0.75", 0.75)):
        (found,) = pair(row | {"probability": said}, ROW).preferences
        assert found == Preference(0, 1, probability=sure)
    for wrong in (0.3, -1, 1.01, "sure", float("nan")):
        with pytest.raises(DataError, match="probability is .*; allowed: a"):
            pair(row | {"probability": wrong}, ROW)


@given(
    st.lists(st.one_of(st.none(), st.integers(-3, 3).map(float)), max_size=7),
    st.sampled_from(["all", "adjacent", "extremes"]),
    st.sampled_from([0.0, 1.0, 2.5]),
)
def test_every_preference_is_of_a_score_above_another_by_more_than_the_gap(scores, pairing, gap):
    found = preferences_from_scores(scores, pairing, gap)
    for p in found:
        assert scores[p.chosen] - scores[p.rejected] > gap
    every = preferences_from_scores(scores, "all", gap)
    assert set(found) <= set(every) and bool(found) == bool(every)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "text", "score", "tool_calls"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(sorted({name for c in COLUMNS.values() for name in c.all})), json_values
    )
)
def test_any_row_is_an_example_a_drop_or_a_data_error(row):
    try:
        found = example_of(row, ROW, detect(row, ROW))
    except DataError as error:
        assert str(error).startswith("train.jsonl:7")
        return
    assert isinstance(found, Dropped | Example)
    if isinstance(found, Example):
        unusable(found, require_preferences=True)


def test_a_layout_function_is_pure():
    row = {
        "prompt": [user("p")],
        "responses": [{"text": "a", "score": 1}, {"text": "b", "score": 0}],
    }
    before = repr(row)
    assert responses(row, ROW) == responses(row, ROW)
    assert repr(row) == before


def test_an_empty_list_of_preferences_says_that_there_are_none_whatever_the_scores():
    row = {"prompt": "p", "responses": [{"text": "a", "score": 1}, {"text": "b", "score": 0}]}
    row_id = RowId("rows.jsonl", 1)
    for said, num in ((None, 1), ([], 0), ([[1, 0]], 1)):
        example = example_of(row | {"preferences": said}, row_id, "responses")
        assert isinstance(example, Example)
        assert len(example.preferences) == num


def test_a_value_that_cannot_be_shown_is_named_all_the_same():
    deep: list[object] = []
    for _ in range(2000):
        deep = [deep]
    assert shown(deep) == "a list (nested very deeply)"
    assert shown(10**5000) == "a number (that cannot be written as JSON)"
    with pytest.raises(DataError, match=r"train.jsonl:7: prompt is a number \(that cannot be"):
        pair({"prompt": 10**5000, "chosen": "a", "rejected": "b"}, ROW)


@pytest.mark.parametrize("name", ["question", "instruction", "promt", "history", "dialogue"])
def test_texts_do_not_make_a_prompt_where_another_column_holds_it(name: str):
    row = {name: "Which is it?", "chosen": "Yes. The first.", "rejected": "Yes. None."}
    with pytest.raises(DataError, match=f'has no "prompt".*Is {name} meant to be prompt'):
        example_of(row, ROW, "pair")


def test_a_prompt_that_is_null_is_not_made_of_texts_where_another_column_holds_it():
    row = {"prompt": None, "chosen": "Yes. The first.", "rejected": "Yes. None."}
    turns = [{"role": "user", "content": "Which is it?"}]
    with pytest.raises(DataError, match='has an empty "prompt".*Is history meant to be prompt'):
        example_of({**row, "history": turns}, ROW, "pair")
    answers = {
        name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")
    }
    with pytest.raises(DataError, match="Is question meant to be prompt"):
        example_of({**answers, "question": "Which is it?"}, ROW, "pair")
    for beside in ({"history": ""}, {"question": None}, {"prompt_id": 7}):
        assert isinstance(example_of({**row, **beside}, ROW, "pair"), Example)


def test_texts_that_begin_with_their_prompt_need_no_other():
    row = {"chosen": "The sky is blue", "rejected": "The sky is green", "source": "field notes"}
    found = example_of(row, ROW, "pair")
    assert isinstance(found, Example) and found.prompt == "The sky is"
