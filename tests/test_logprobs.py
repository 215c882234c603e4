import functools
import json
from dataclasses import replace

import pytest
import torch

from oracles import (
    SHAPES,
    alone,
    gradients,
    loaded,
    plain_model,
    random_trees,
    relative,
    tree_of,
    weigh,
    with_plan,
)
from test_attention import plain_kernel
from tiny import FALLBACK_FAMILIES, FAMILIES, save_tiny
from upweight.data.pack import collate, unshared
from upweight.errors import ModelError, Refusal
from upweight.models import attention
from upweight.models.attention import layout_of, native_attention
from upweight.models.head import head_logps
from upweight.models.load import checkpoint_layers, load
from upweight.models.logprobs import pair_logps, response_logps, scored_hidden, token_logps
from upweight.models.proof import find_plan

WAYS = {
    "tiles": dict(attention="tiles"),
    "dense": dict(attention="dense"),
    "unshared": dict(shared=False, reason="a test"),
}

LAYER_NORM = {"gpt2", "gpt_neox", "opt"}
"""The other families have RMSNorms, which transformers computes in fp32 in a float64 model too:
there the gradient of a shared prompt is rounded once per prompt and not once per response."""


@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_gives_what_transformers_gives_one_sequence_at_a_time(family):
    trees = random_trees(SHAPES)
    plain = plain_model(family, torch.float64)
    truth = alone(plain, trees)
    wanted = gradients(plain, weigh(truth))
    tolerance = 1e-10 if family in LAYER_NORM else 1e-6
    # Gemma 2's score cap goes with transformers' eager attention, whose softmax is fp32.
    exact = 1e-6 if family == "gemma2" else 1e-10
    for way in WAYS.values():
        lm = with_plan(loaded(family, torch.float64), **way)
        got = token_logps(lm, collate(trees))
        torch.testing.assert_close(got, truth, rtol=exact, atol=exact)
        assert relative(gradients(lm.model, weigh(got)), wanted) < tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_a_family_starts_with_is_exact_to_rounding_in_fp32(family):
    trees = random_trees(SHAPES, seed=1)
    plain, lm = plain_model(family), loaded(family)
    assert lm.plan.shared and lm.plan.attention == "tiles" and not lm.plan.native_head
    assert "tiles" in lm.plan.describe()
    truth, got = alone(plain, trees), token_logps(lm, collate(trees))
    torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-5)
    wanted = gradients(plain, weigh(truth))
    assert relative(gradients(lm.model, weigh(got)), wanted) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_own_head_gives_the_same(family):
    trees = random_trees(SHAPES[:2])
    lm = with_plan(loaded(family), shared=False, native_head=True, reason="a test")
    got = token_logps(lm, collate(trees))
    torch.testing.assert_close(got, alone(plain_model(family), trees), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "family, reason",
    [
        ("mamba", "keeps a recurrent state"),
        ("bloom", "does not use transformers' Attention"),
        ("falcon", "does not use transformers' Attention"),
    ],
)
def test_a_family_that_cannot_share_runs_one_row_per_response_and_says_why(family, reason):
    assert set(FALLBACK_FAMILIES) == {"mamba", "bloom", "falcon"}
    lm = loaded(family)
    assert not lm.plan.shared
    assert family in lm.plan.describe() and reason in lm.plan.describe()
    trees = random_trees(SHAPES)
    plain = plain_model(family)
    truth, got = alone(plain, trees), token_logps(lm, collate(trees))
    torch.testing.assert_close(got, truth, rtol=1e-5, atol=2e-5)
    assert relative(gradients(lm.model, weigh(got)), gradients(plain, weigh(truth))) < 1e-4


def test_sharing_can_be_switched_off():
    lm = loaded(sharing=False)
    assert not lm.plan.shared and "compute.sharing is off" in lm.plan.describe()


@pytest.mark.parametrize("native_head", [True, False])
def test_rows_that_are_not_shared_are_read_where_the_model_is(native_head):
    # `meta` is the device other than the CPU that every machine has; attention asks its tensors for
    # values there.
    lm = with_plan(loaded("mamba"), shared=False, native_head=native_head, reason="a test")
    lm.model.to("meta")
    lm.device = torch.device("meta")
    given = []

    def look(module, args, options):
        given.extend(x for x in (*args, *options.values()) if isinstance(x, torch.Tensor))

    lm.causal.base_model.register_forward_pre_hook(look, with_kwargs=True)
    forest = collate(random_trees(SHAPES))
    out = token_logps(lm, forest) if native_head else scored_hidden(lm, forest)
    assert out.is_meta and len(out) == len(forest.scored)
    assert given and all(x.is_meta for x in given)


def test_an_attention_asked_for_by_name_that_cannot_run_is_refused(tmp_path):
    with pytest.raises(ModelError, match="compute.attention=varlen does not give"):
        load(save_tiny(str(tmp_path)), device="cpu", dtype="float32", path="varlen")


def test_an_attention_asked_for_by_name_is_used():
    assert loaded(path="dense").plan.attention == "dense"


def test_a_depth_that_changes_position_scaling_is_read_one_row_at_a_time():
    lm = loaded()
    trees = random_trees(SHAPES)
    truth = token_logps(lm, collate(trees))
    deep = with_plan(lm, attention="tiles", exact_depth=10)
    torch.testing.assert_close(token_logps(deep, collate(trees)), truth, rtol=1e-5, atol=1e-5)


def stretched(tmp_path, **options):
    """A model whose position scaling changes beyond 32 tokens, in the lengths that it was given."""
    folder = save_tiny(str(tmp_path / "stretched"))
    config = tmp_path / "stretched" / "config.json"
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 4.0, 8.0],
    }
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_parameters": rope}))
    return load(folder, device="cpu", dtype="float32", **options)


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_deep_row_is_exact_forward_and_backward(tmp_path, sharing, recompute):
    trees = random_trees([(40, 3, 5), (5, 2, 4)])
    lm = stretched(tmp_path, sharing=sharing)
    assert lm.plan.exact_depth == 32 and lm.plan.shared == sharing
    with native_attention(lm.causal):
        truth = alone(lm.model, trees)
        wanted = gradients(lm.model, weigh(truth))
    if recompute:
        checkpoint_layers(lm)
    got = token_logps(lm, collate(trees))
    torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-5)
    assert relative(gradients(lm.model, weigh(got)), wanted) < 1e-4


@pytest.mark.parametrize("sharing", [True, False])
def test_a_row_that_is_one_token_too_deep_is_read_alone(tmp_path, sharing):
    # The lengths that change the encoding begin at 33; unshared, two rows of 33 and 32 would share
    # a batch of 75 tokens.
    trees = random_trees([(30, 3, 2), (5, 2, 4), (28, 1, 2)])
    lm = stretched(tmp_path, sharing=sharing)
    with native_attention(lm.causal):
        truth = alone(lm.model, trees)
    got = token_logps(lm, collate(trees))
    torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-5)
    lm.plan = replace(lm.plan, exact_depth=33)
    assert (token_logps(lm, collate(trees)) - truth).abs().max() > 1e-4


def half_only(query, key, value, plan, scale, window):
    """A variable-length kernel as CUDA has it: in half precision, or not at all."""
    if query.dtype not in (torch.bfloat16, torch.float16):
        raise RuntimeError(f"the kernel does not take {query.dtype}")
    return plain_kernel(query, key, value, plan, scale, window)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_variable_length_kernel_is_proved_in_the_dtype_that_it_runs_in(
    tmp_path, monkeypatch, family
):
    kernel = functools.partial(attention.varlen_attention, kernel=half_only)
    monkeypatch.setattr(attention, "varlen_attention", kernel)
    folder = save_tiny(str(tmp_path), family)
    lm = load(folder, device="cpu", dtype="bfloat16", path="varlen")
    assert lm.plan.shared and lm.plan.attention == "varlen"
    with pytest.raises(ModelError, match="the kernel does not take torch.float32"):
        load(folder, device="cpu", dtype="float32", path="varlen")


def test_a_variable_length_kernel_that_is_wrong_is_not_taken(tmp_path, monkeypatch):
    def blind(query, key, value, plan, scale, window):
        """Each run sees itself alone, and not the prompt that it continues."""
        return plain_kernel(query, key, value, plan, scale, 1)

    kernel = functools.partial(attention.varlen_attention, kernel=blind)
    monkeypatch.setattr(attention, "varlen_attention", kernel)
    with pytest.raises(ModelError, match=r"a token's log-prob is \S+ nats off"):
        load(save_tiny(str(tmp_path)), device="cpu", dtype="bfloat16", path="varlen")


def without_gradient(plant, compute):
    """Attention whose forward pass is right and whose backward pass leaves something out."""

    def planted(query, key, value, *rest, **options):
        if plant == "keys":
            key = key.detach()
        elif plant == "values":
            value = value.detach()
        elif plant == "last query":
            query = torch.cat([query[:, :, :-2], query[:, :, -2:].detach()], dim=2)
        else:  # the last tree's second response hears nothing, its sibling does
            told = key[:, :, 31:].detach()
            key = torch.cat([key[:, :, :31], told], dim=2)
        return compute(query, key, value, *rest, **options)

    return planted


FULL = ("tiles", "tiled_attention", "float32")
SLOW = ("dense", "dense_attention", "float32")
HALF = ("varlen", "varlen_attention", "bfloat16")


@pytest.mark.parametrize(
    ("path", "name", "dtype", "plant"),
    [
        *[(*FULL, plant) for plant in ("keys", "values", "last query", "siblings")],
        *[(*SLOW, plant) for plant in ("keys", "values", "last query", "siblings")],
        # One query of one token is less than what bf16 rounds away elsewhere.
        *[(*HALF, plant) for plant in ("keys", "values", "siblings")],
    ],
)
def test_a_path_with_a_wrong_gradient_is_not_taken(tmp_path, monkeypatch, path, name, dtype, plant):
    folder = save_tiny(str(tmp_path))
    compute = getattr(attention, name)
    if path == "varlen":
        compute = functools.partial(compute, kernel=half_only)
    monkeypatch.setattr(attention, name, compute)
    assert load(folder, device="cpu", dtype=dtype, path=path).plan.attention == path
    monkeypatch.setattr(attention, name, without_gradient(plant, compute))
    with pytest.raises(ModelError, match=r"the gradient at a token is \S+ of its size off"):
        load(folder, device="cpu", dtype=dtype, path=path)


def test_a_family_without_a_gradient_at_its_embedding_runs_unshared_and_says_so(monkeypatch):
    lm = loaded()
    inside = lm.causal.base_model
    monkeypatch.setattr(inside, "forward", torch.no_grad()(inside.forward))
    plan = find_plan(lm)
    assert not plan.shared and "no gradient at its embedding can be had" in plan.describe()
    assert all(p.requires_grad for p in lm.model.parameters())


def test_where_a_gradient_is_wrong_the_next_path_is_taken(tmp_path, monkeypatch):
    planted = without_gradient("keys", attention.tiled_attention)
    monkeypatch.setattr(attention, "tiled_attention", planted)
    lm = load(save_tiny(str(tmp_path)), device="cpu", dtype="float32")
    assert lm.plan.shared and lm.plan.attention == "dense"
    assert all(p.requires_grad and p.grad is None for p in lm.model.parameters())


@pytest.mark.parametrize("sharing", [True, False])
def test_an_id_without_an_embedding_is_refused_with_its_row(sharing):
    lm = loaded(sharing=sharing)
    lm.tokenizer.add_tokens(["<tool>", "<more>"])
    tree = tree_of([1, 2], [[3], [260, 4]], line=7)
    with pytest.raises(ModelError, match=r"rows.jsonl:7 has token id 260 \(<more>\).* 0 to 259"):
        token_logps(lm, collate([tree]))


def test_a_padding_token_without_an_embedding_is_not_needed():
    lm = loaded(sharing=False)
    forest = collate(random_trees(SHAPES))
    wanted = token_logps(lm, forest)
    lm.tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<a>"]})
    lm.tokenizer.pad_token = "<a>"
    assert lm.tokenizer.pad_token_id >= lm.vocab_size
    assert torch.equal(token_logps(lm, forest), wanted)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_heads_chunk_size_changes_nothing(family):
    lm = loaded(family, torch.float64)
    forest = collate(random_trees(SHAPES))
    whole = token_logps(lm, forest)
    wanted = gradients(lm.model, weigh(whole))
    for elements in (1, 1000, 3 * 260):
        chunked = token_logps(lm, forest, chunk_elements=elements)
        torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-12)
        assert relative(gradients(lm.model, weigh(chunked)), wanted) < 1e-12


def test_a_head_without_tokens_gives_none():
    lm = loaded()
    nothing = head_logps(lm, torch.zeros(0, 32), torch.zeros(0, dtype=torch.long))
    assert nothing.shape == (0,)


@pytest.mark.parametrize(
    "key, value",
    [("final_logit_softcapping", 2.0), ("logit_scale", 0.25), ("logits_scaling", 4.0)],
)
def test_what_families_do_to_their_logits_is_done_in_the_fused_head(key, value):
    lm = loaded(dtype=torch.float64)
    setattr(lm.causal.config, key, value)
    hidden = torch.randn(5, 32, dtype=torch.float64)
    raw = lm.causal.get_output_embeddings()(hidden)
    wanted = {
        "final_logit_softcapping": value * torch.tanh(raw / value),
        "logit_scale": raw * value,
        "logits_scaling": raw / value,
    }[key]
    targets = torch.tensor([0, 5, 7, 9, 259])
    got = head_logps(lm, hidden, targets)
    torch.testing.assert_close(got, wanted.log_softmax(-1)[torch.arange(5), targets])


def test_sums_are_taken_per_response_and_paired_by_preference():
    forest = collate(random_trees([(3, 2, 3), (2, 1, 4, 2)]))
    tokens = torch.arange(12, dtype=torch.float64)
    sums = response_logps(tokens, forest)
    assert sums.tolist() == [0 + 1, 2 + 3 + 4, 5, 6 + 7 + 8 + 9, 10 + 11]
    pairs = pair_logps(tokens, torch.zeros(12, dtype=torch.float64), forest)
    assert pairs.policy_chosen.tolist() == [1, 5, 5]
    assert pairs.policy_rejected.tolist() == [9, 30, 21]
    assert pairs.tokens_chosen.tolist() == [2, 1, 1]
    assert pairs.tokens_rejected.tolist() == [3, 4, 2]
    assert pairs.margin.tolist() == [-8, -25, -16]


def test_half_precision_log_probs_are_never_summed():
    forest = collate(random_trees([(3, 2, 3)]))
    with pytest.raises(Refusal, match=r"of 5 tokens are in bfloat16.*UW105"):
        response_logps(torch.zeros(5, dtype=torch.bfloat16), forest)


def test_log_probs_are_fp32_when_products_are_bf16():
    lm = loaded()
    forest = collate(random_trees(SHAPES))
    exact = token_logps(lm, forest)
    lm.compute_dtype = torch.bfloat16
    rounded = token_logps(lm, forest)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.3


def test_reading_siblings_as_one_row_would_change_the_log_probs():
    trees = random_trees([(6, 4, 4)])
    lm = loaded(dtype=torch.float64)
    forest = collate(trees)
    truth = token_logps(lm, forest)
    ids = forest.token_ids[None]
    flat = plain_model(dtype=torch.float64)(input_ids=ids).logits[0].log_softmax(-1)
    naive = flat[forest.scored - 1, forest.token_ids[forest.scored]]
    torch.testing.assert_close(naive[:4], truth[:4])
    assert (naive[4:] - truth[4:]).abs().min() > 1e-3


def test_the_layout_is_the_forests_own():
    forest = collate(random_trees(SHAPES))
    layout = layout_of(unshared(forest), "tiles")
    assert len(layout.spans) == forest.num_responses
