import pytest
import torch
from transformers import GenerationConfig

from oracles import alone, loaded, plain_model
from tiny import FALLBACK_FAMILIES, FAMILIES, byte_tokenizer
from upweight.data.render import make_renderer
from upweight.errors import ConfigError, ModelError
from upweight.evidence.evaluate import draw
from upweight.models import sample as sampling
from upweight.models.adapter import add_lora
from upweight.models.load import checkpoint_layers
from upweight.models.sample import _Draw, sample, sample_trees, tree_logps
from upweight.trust.likely import OWN_TOKENS, own_nats
from upweight.types import Tree

PROMPTS = [(5, 6, 7), (9,), (200, 100, 50, 25, 12)]


def test_the_same_seed_gives_the_same_and_another_gives_another():
    lm = loaded()
    first = sample(lm, PROMPTS, num=2, max_new_tokens=8, seed=1)
    assert sample(lm, PROMPTS, num=2, max_new_tokens=8, seed=1) == first
    assert sample(lm, PROMPTS, num=2, max_new_tokens=8, seed=2) != first
    assert [len(drawn) for drawn in first] == [2, 2, 2]


def test_the_callers_random_state_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    sample(loaded(), PROMPTS, max_new_tokens=4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("family", [*FAMILIES, *FALLBACK_FAMILIES])
def test_greedy_is_the_argmax_one_prompt_at_a_time(family: str):
    lm, plain = loaded(family), plain_model(family)
    drawn = sample(lm, PROMPTS, num=2, max_new_tokens=12, temperature=0.0)
    for prompt, answers in zip(PROMPTS, drawn, strict=True):
        assert answers[0] == answers[1]
        ids = list(prompt)
        for token in answers[0].tokens:
            with torch.no_grad():
                wanted = plain(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
            assert token == wanted
            ids.append(token)
        assert len(answers[0].tokens) == 12 or answers[0].stopped


def require_same(got, wanted):
    """The same tokens, of log-probs that fp32 sums of another order move by 1e-5 at most."""
    assert len(got) == len(wanted)
    for ours, theirs in zip(sum(got, []), sum(wanted, []), strict=True):
        assert (ours.tokens, ours.stopped) == (theirs.tokens, theirs.stopped)
        assert ours.logps == pytest.approx(theirs.logps, abs=1e-5)


@pytest.mark.parametrize("sharing", [True, False])
def test_a_response_does_not_depend_on_what_is_in_its_batch(sharing: bool):
    lm = loaded(sharing=sharing)
    lm.causal.generation_config.eos_token_id = list(range(40))  # some rows end early and leave
    together = sample(lm, PROMPTS, num=3, max_new_tokens=12)
    assert len({len(s.tokens) for drawn in together for s in drawn}) > 3
    require_same(sample(lm, PROMPTS, num=3, max_new_tokens=12, rows_per_batch=3), together)
    require_same(sample(lm, PROMPTS[:1], num=3, max_new_tokens=12), together[:1])


def test_tokens_are_drawn_in_proportion_to_their_probability():
    # u on an even grid of n points: a token of probability p is hit n p times, give or take one.
    scores, n = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)) * 2, 4000
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8)):
        draw = _Draw(1, temperature, top_p, frozenset())
        got = torch.bincount(torch.tensor(draw.pick(scores.expand(n, -1), grid)[0]), minlength=50)
        p = (scores[0].double() / temperature).softmax(-1)
        if top_p < 1:
            ranked, token = p.sort(descending=True)
            kept = token[: int((ranked.cumsum(0) < top_p).sum()) + 1]
            p = torch.zeros_like(p).index_put((kept,), p[kept] / p[kept].sum())
        assert (got - n * p).abs().max() < 1.01


def test_a_response_ends_with_its_stop_token_and_keeps_it():
    lm = loaded()
    free = sample(lm, PROMPTS[:1], max_new_tokens=5, temperature=0.0)[0][0].tokens
    lm.causal.generation_config.eos_token_id = [2, free[1]]
    assert set(lm.stop_token_ids) == {2, free[1]}
    (answer,) = sample(lm, PROMPTS[:1], max_new_tokens=5, temperature=0.0)[0]
    assert answer.stopped and answer.tokens == free[: free.index(free[1]) + 1]


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_the_stop_tokens_that_are_given_end_a_response(family: str):
    lm = loaded(family)
    options = dict(max_new_tokens=5, temperature=0.0)
    free = sample(lm, PROMPTS[:1], **options, stop_token_ids=())[0][0]
    assert len(free.tokens) == 5 and not free.stopped
    wanted = free.tokens[: free.tokens.index(free.tokens[1]) + 1]
    (answer,) = sample(lm, PROMPTS[:1], **options, stop_token_ids=[free.tokens[1]])[0]
    assert answer.stopped and answer.tokens == wanted
    (drawn,) = draw(lm, PROMPTS[:1], 5, 0.0, 0, stop_token_ids=[free.tokens[1]])
    assert drawn == answer


def test_what_training_teaches_to_stop_at_stops_a_sample():
    # A ChatML template on a tokenizer whose end of text is another token than <|im_end|>.
    lm = loaded()
    lm.tokenizer = byte_tokenizer(eos="<|endoftext|>")
    lm.causal.generation_config.eos_token_id = None
    taught = make_renderer(lm.tokenizer, stop_token_ids=lm.stop_token_ids).stop_ids
    assert set(lm.stop_token_ids) == {0} and taught == {0, 2}
    with torch.no_grad():
        lm.causal.get_output_embeddings().weight[2] += 10 * last_hidden(lm, PROMPTS[0])
    options = dict(max_new_tokens=3, temperature=0.0)
    assert sample(lm, PROMPTS[:1], **options)[0][0].tokens[:2] == (2, 2)
    (stopped,) = sample(lm, PROMPTS[:1], **options, stop_token_ids=taught)[0]
    assert stopped.tokens == (2,) and stopped.stopped


def last_hidden(lm, prompt):
    out = plain_model().model(input_ids=torch.tensor([prompt])).last_hidden_state[0, -1]
    return out / out.norm()


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_response_ends_where_it_fills_the_length_that_is_given(family: str):
    lm = loaded(family)
    options = dict(max_new_tokens=12, stop_token_ids=(), seed=4)
    drawn, free = sample(lm, PROMPTS, max_length=9, **options), sample(lm, PROMPTS, **options)
    assert [len(s.tokens) for (s,) in drawn] == [6, 8, 4]
    cut = zip(free, (6, 8, 4), strict=True)
    assert [s.tokens for (s,) in drawn] == [s.tokens[:n] for (s,), n in cut]


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_the_log_probs_that_tokens_were_drawn_with_are_the_models(family: str):
    lm = loaded(family)
    drawn = sample(lm, PROMPTS, num=2, max_new_tokens=9, stop_token_ids=range(60))
    assert len({len(s.tokens) for answers in drawn for s in answers}) > 2
    sums = tree_logps(lm, sample_trees(PROMPTS, drawn))
    for answers, wanted in zip(drawn, sums, strict=True):
        assert all(len(s.logps) == len(s.tokens) for s in answers)
        assert [sum(s.logps) for s in answers] == pytest.approx(wanted, abs=1e-4)


def test_how_likely_a_model_finds_its_own_answers_is_known_once_they_are_drawn(
    monkeypatch: pytest.MonkeyPatch,
):
    lm = loaded()
    trees = [Tree(prompt, (), (), (), ()) for prompt in PROMPTS]
    drawn = sample(lm, PROMPTS, max_new_tokens=OWN_TOKENS, seed=3, stop_token_ids=range(60))
    sums = tree_logps(lm, sample_trees(PROMPTS, drawn))
    means = [sum_ / len(s.tokens) for (s,), (sum_,) in zip(drawn, sums, strict=True)]
    # Asked once more, it would have to be read by the trainer's pass.
    monkeypatch.delattr(sampling, "token_logps")
    own = own_nats(lm, trees, range(60), seed=3)
    assert own.value == pytest.approx(sum(means) / len(means), abs=1e-5)


NEAR_THE_END = [tuple(range(10, 130)) * 4, tuple(range(20, 131)) * 4, (9,)]  # 480, 444, 1 tokens


@pytest.mark.parametrize("sharing", [True, False])
def test_a_response_ends_where_the_models_positions_end(sharing: bool):
    lm, plain = loaded("gpt2", sharing=sharing), plain_model("gpt2")  # 512 learned positions
    options = dict(max_new_tokens=64, temperature=0.0, stop_token_ids=())
    drawn = sample(lm, NEAR_THE_END, **options)
    assert [len(s.tokens) for (s,) in drawn] == [32, 64, 64]
    assert not any(s.stopped for (s,) in drawn)
    assert drawn[1:] == sample(lm, NEAR_THE_END[1:], **options)
    ids = torch.tensor([[*NEAR_THE_END[0], *drawn[0][0].tokens]])
    with torch.no_grad():
        wanted = plain(input_ids=ids).logits[0, 479:-1].argmax(-1).tolist()
    assert list(drawn[0][0].tokens) == wanted
    sums = tree_logps(lm, sample_trees(NEAR_THE_END, drawn))
    assert all(torch.tensor(row).isfinite().all() for row in sums)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ((7,) * 512, "prompt 2 of 2 has 512 tokens, and the model reads at most 512, response "
         "included. Leave it out, or shorten it."),
        ((), "prompt 2 of 2 has no tokens. Leave it out."),
        ((9, 260), "prompt 2 of 2 holds the token '<new>' (id 260), and the model has embeddings "
         "for the ids 0 to 259. Use the model's own tokenizer, or leave the prompt out."),
    ],
)  # fmt: skip
def test_a_prompt_that_the_model_cannot_take_says_why(prompt, says: str):
    with pytest.raises(ModelError) as error:
        lm = loaded("gpt2")
        lm.tokenizer.add_tokens(["<spare>", "<new>"])
        sample(lm, [(5, 6), prompt])
    assert says in str(error.value)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_padding_needs_no_token_of_its_own(family: str):
    lm = loaded(family)
    wanted = sample(lm, PROMPTS, num=2, max_new_tokens=6)
    lm.tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    lm.tokenizer.add_tokens([f"<{i}>" for i in range(9)])
    lm.tokenizer.pad_token = "<8>"
    assert lm.tokenizer.pad_token_id >= lm.vocab_size
    assert sample(lm, PROMPTS, num=2, max_new_tokens=6) == wanted


NAN = float("nan")


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        *[("num", n, "1 or more") for n in (0, -1)],
        *[("max_new_tokens", n, "1 or more") for n in (0, -5)],
        *[("top_p", p, "above 0, to 1") for p in (0, -3.0, 1.5, NAN)],
        *[
            ("temperature", t, "0 (greedy), or a number above")
            for t in (-1, -1e-50, NAN, float("inf"))
        ],
    ],
)
def test_an_option_out_of_its_range_is_refused(option: str, value: float, allowed: str):
    with pytest.raises(ConfigError) as error:
        sample(loaded(), PROMPTS, **{option: value})
    assert str(error.value) == f"sample: {option} is {value}; allowed: {allowed}."


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_the_ends_of_the_ranges_are_the_argmax(family: str):
    lm = loaded(family)
    greedy = sample(lm, PROMPTS, max_new_tokens=6, temperature=0)
    for temperature in (1e-6, 1e-50):
        assert sample(lm, PROMPTS, max_new_tokens=6, temperature=temperature) == greedy
    assert sample(lm, PROMPTS, max_new_tokens=6, top_p=1e-50) == greedy
    assert sample(lm, PROMPTS, max_new_tokens=6, temperature=2, top_p=1) != greedy


def test_the_models_own_generation_config_bends_nothing():
    lm = loaded()
    before = sample(lm, PROMPTS, num=3, max_new_tokens=8)
    own = GenerationConfig(
        do_sample=True, top_k=1, repetition_penalty=5.0, temperature=0.01, min_new_tokens=7,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    lm.causal.generation_config = own
    assert sample(lm, PROMPTS, num=3, max_new_tokens=8) == before
    assert lm.causal.generation_config is own


def test_samples_are_scored_as_trees():
    lm = loaded()
    drawn = sample(lm, PROMPTS, num=2, max_new_tokens=4)
    trees = sample_trees(PROMPTS, drawn)
    got = tree_logps(lm, trees, tokens_per_bin=20)
    for tree, sums in zip(trees, got, strict=True):
        with torch.no_grad():
            pieces = alone(plain_model(), [tree]).split([len(r) for r in tree.responses])
        wanted = torch.stack([piece.sum() for piece in pieces])
        torch.testing.assert_close(torch.tensor(sums), wanted, rtol=1e-5, atol=1e-5)


def test_neither_dropout_nor_recomputation_reaches_what_is_measured():
    lm, still = (
        add_lora(loaded(), rank=4, alpha=8.0, dropout=rate, targets="all-linear", seed=0)
        for rate in (0.5, 0.0)
    )
    for one in (lm, still):
        with torch.no_grad():
            for name, parameter in one.model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.05)
    checkpoint_layers(lm)
    noisy = [module for module in lm.model.modules() if module.training]
    drawn = sample(lm, PROMPTS, num=2, max_new_tokens=8)
    assert drawn == sample(still, PROMPTS, num=2, max_new_tokens=8)
    trees = sample_trees(PROMPTS, drawn)
    assert tree_logps(lm, trees) == tree_logps(still, trees)
    assert noisy and all(module.training for module in noisy)


def with_room_for(monkeypatch, rows):
    """A device on which so many rows fit at once."""
    made = sampling._next_logits

    def limited(lm, ids, *rest):
        if len(ids) > rows:
            raise torch.OutOfMemoryError("out of room")
        return made(lm, ids, *rest)

    monkeypatch.setattr(sampling, "_next_logits", limited)


def test_prompts_that_do_not_fit_together_are_answered_in_halves(monkeypatch):
    lm = loaded()
    wanted = sample(lm, PROMPTS, num=2, max_new_tokens=6)
    with_room_for(monkeypatch, 2)
    require_same(sample(lm, PROMPTS, num=2, max_new_tokens=6), wanted)
    with_room_for(monkeypatch, 1)
    with pytest.raises(ModelError, match=r"prompt 2 ran out of memory alone \(out of room\).*-n"):
        sample(lm, PROMPTS, num=2, max_new_tokens=6)
