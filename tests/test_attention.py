import random
from dataclasses import dataclass, field
from inspect import signature
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.varlen import varlen_attn

from oracles import SHAPES, loaded, random_trees
from upweight.data.pack import collate
from upweight.models import attention
from upweight.models.attention import (
    CannotShare,
    VarlenPlan,
    ancestors,
    dense_attention,
    forest_attention,
    layout_of,
    native_attention,
    varlen_attention,
    varlen_plan,
)
from upweight.models.tiles import Heads, tiled_attention
from upweight.models.varlen import gathered

WINDOWS = (None, 1, 3, 8, 1000)


def tensors(num_tokens, heads=4, kv_heads=4, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(1, h, num_tokens, dim, generator=generator, dtype=torch.float64)
        for h in (heads, kv_heads, kv_heads)
    )


def truth_of(forest, window, query, key, value, scale=0.3):
    """One softmax for each token over the tokens on its way to the root, in a loop."""
    groups = query.shape[1] // key.shape[1]
    rows = []
    for i in range(forest.num_tokens):
        path, j = [], i
        while j >= 0:
            if window is None or forest.position[i] - forest.position[j] < window:
                path.append(j)
            j = int(forest.parent[j])
        heads = [
            (scale * key[0, h // groups, path] @ query[0, h, i]).softmax(0)
            @ value[0, h // groups, path]
            for h in range(query.shape[1])
        ]
        rows.append(torch.stack(heads))
    return torch.stack(rows, dim=1)[None]


def plain_kernel(query, key, value, plan, scale, window):
    """What a variable-length kernel does: each run alone, causal to the bottom right, key heads
    shared by neighbours."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    outs = []
    for q0, q1, k0, k1 in zip(
        plan.cu_q[:-1], plan.cu_q[1:], plan.cu_k[:-1], plan.cu_k[1:], strict=True
    ):
        scores = torch.einsum("qhd,khd->hqk", query[q0:q1], key[k0:k1]) * scale
        last = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
        behind = last - torch.arange(k1 - k0)[None]
        allowed = (behind >= 0) & (behind < (window or 10**9))
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, value[k0:k1]))
    return torch.cat(outs)


def run(path, forest, window, q, k, v, scale=0.3):
    layout = layout_of(forest, path)
    if path == "dense":
        return dense_attention(q, k, v, layout.mask(window), scale)
    if path == "varlen":
        return varlen_attention(q, k, v, layout, scale, window, kernel=plain_kernel)
    tiles = layout.tiles(window, Heads(q.shape[1], k.shape[1]), q.dtype)
    return tiled_attention(q, k, v, tiles, scale)


shapes = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=4)),
    min_size=1,
    max_size=4,
)


@given(shapes)
def test_a_token_attends_to_itself_and_what_it_continues(drawn):
    forest = collate(random_trees([(p, *rs) for p, rs in drawn]))
    mask = ancestors(forest.parent)
    for i in range(forest.num_tokens):
        path, j = set(), i
        while j >= 0:
            path.add(j)
            j = int(forest.parent[j])
        assert set(mask[i].nonzero().flatten().tolist()) == path


def test_ancestors_are_known_of_any_parents_in_few_operations():
    draw = random.Random(0)
    parent = [-1, *(draw.randrange(max(-1, i - 3), i) for i in range(1, 600))]
    wanted = torch.zeros(600, 600, dtype=torch.bool)
    for i, above in enumerate(parent):
        wanted[i] = wanted[above] if above >= 0 else False
        wanted[i, i] = True
    with torch.profiler.profile() as profiled:
        got = ancestors(torch.tensor(parent))
    assert torch.equal(got, wanted)
    # Seven or so a round, and a round for each doubling up to the deepest; a row each were 1,200.
    assert sum(event.count for event in profiled.key_averages()) < 400


@given(shapes)
def test_a_trees_own_mask_is_its_block_of_the_whole(drawn):
    forest = collate(random_trees([(p, *rs) for p, rs in drawn]))
    layout = layout_of(forest, "tiles")
    for span in forest.spans:
        inside = slice(span.start, span.stop)
        for window in (None, 2):
            whole = layout.mask(window)[inside, inside]
            assert torch.equal(layout.tree_mask(span, window), whole)


@pytest.mark.parametrize("path", ["dense", "tiles", "varlen"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_every_path_is_a_softmax_over_ancestors_forward_and_backward(path, window, kv_heads):
    forest = collate(random_trees(SHAPES))
    inputs = tensors(forest.num_tokens, kv_heads=kv_heads)
    for x in inputs:
        x.requires_grad_()
    truth = truth_of(forest, window, *inputs)
    ramp = torch.linspace(-1, 2, truth.numel(), dtype=torch.float64).reshape(truth.shape)
    wanted = torch.autograd.grad((truth * ramp).sum(), inputs)
    got = run(path, forest, window, *inputs)
    torch.testing.assert_close(got, truth, rtol=1e-11, atol=1e-11)
    grads = torch.autograd.grad((got * ramp).sum(), inputs)
    for g, w in zip(grads, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(shapes, st.sampled_from([None, 2, 4]))
def test_tiles_and_varlen_are_dense_on_any_forest(drawn, window):
    forest = collate(random_trees([(p, *rs) for p, rs in drawn]))
    inputs = tensors(forest.num_tokens, kv_heads=2)
    dense = run("dense", forest, window, *inputs)
    for path in ("tiles", "varlen"):
        torch.testing.assert_close(run(path, forest, window, *inputs), dense)


def test_queries_lie_as_they_are_and_keys_are_gathered_behind_their_prompt():
    forest = collate(random_trees([(2, 1, 3), (1, 2)]))
    plan = varlen_plan(forest.spans)
    assert plan.keys.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 7, 8]
    assert plan.cu_q.tolist() == [0, 3, 6, 9]
    assert plan.cu_k.tolist() == [0, 3, 8, 11]
    assert (plan.max_q, plan.max_k) == (3, 5)
    assert [some.tolist() for some in plan.places] == [[0, 1, 2, 5, 6, 7, 8, 9, 10], [3, 4]]


@given(st.lists(st.tuples(st.integers(1, 6), st.lists(st.integers(1, 5), max_size=4)), min_size=1))
def test_the_plan_of_a_forest_is_its_runs_one_by_one(drawn):
    spans = collate(random_trees([(p, *rs) for p, rs in drawn])).spans
    keys, num_q, num_k = [], [], []
    for span in spans:
        start = span.start + span.prompt
        for number, length in enumerate(span.responses or (0,)):
            keys += [*range(span.start, span.start + span.prompt), *range(start, start + length)]
            num_q.append(length + (0 if number else span.prompt))
            num_k.append(span.prompt + length)
            start += length
    plan = varlen_plan(spans)
    assert plan.keys.tolist() == keys
    assert plan.cu_q.tolist() == [0, *accumulate(num_q)] and plan.max_q == max(num_q)
    assert plan.cu_k.tolist() == [0, *accumulate(num_k)] and plan.max_k == max(num_k)
    assert plan.cu_q.dtype == plan.cu_k.dtype == torch.int32
    assert plan.keys[plan.places[0]].tolist() == list(range(spans[-1].stop))
    assert sorted(torch.cat(plan.places).tolist()) == list(range(len(keys)))


def test_a_prompts_gradient_is_summed_over_its_responses_in_fp32():
    # In bf16 256 + 1 is 256.
    forest = collate(random_trees([(2, *[1] * 300)]))
    plan = varlen_plan(forest.spans)
    key = torch.zeros(forest.num_tokens, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    got = gathered(key, plan)
    assert torch.equal(got, key[plan.keys]) and got.is_contiguous()
    (slope,) = torch.autograd.grad(got.sum(), key)
    assert slope.flatten().tolist() == [300.0] * 2 + [1.0] * 300


@pytest.mark.parametrize("path", ["dense", "tiles"])
def test_a_window_binds_on_a_tree_that_is_one_token_deeper(path):
    forest = collate(random_trees([(4, 3, 2), (2, 1)]))
    inputs = tensors(forest.num_tokens)
    for window in (6, 7, 8):
        got, _ = call(forest, path, inputs, sliding_window=window)
        wanted = truth_of(forest, window, *inputs).transpose(1, 2)
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
    whole = truth_of(forest, None, *inputs)
    assert not torch.allclose(truth_of(forest, 6, *inputs), whole)


@dataclass
class Operator:
    """torch.nn.attention.varlen.varlen_attn by slow means, as a version of torch has it."""

    grouped: bool
    heads: list[tuple[int, int]] = field(default_factory=list)

    def called(self):
        def without(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
            assert q.shape[1] == k.shape[1] == v.shape[1], "heads differ"
            return compute(q, k, v, cu_q, cu_k, max_q, max_k, scale, window_size)

        def grouped(
            q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size=(-1, -1), enable_gqa=False
        ):
            assert enable_gqa or q.shape[1] == k.shape[1], "heads differ"
            return compute(q, k, v, cu_q, cu_k, max_q, max_k, scale, window_size)

        def compute(q, k, v, cu_q, cu_k, max_q, max_k, scale, window_size):
            assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
            assert cu_q.dtype == cu_k.dtype == torch.int32
            left, right = window_size
            assert right == 0
            self.heads.append((q.shape[1], k.shape[1]))
            plan = VarlenPlan(torch.empty(0, dtype=torch.long), cu_q, cu_k, max_q, max_k)
            return plain_kernel(q, k, v, plan, scale, None if left < 0 else left + 1)

        return grouped if self.grouped else without


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("grouped", [True, False])
def test_key_heads_stay_grouped_where_torch_takes_them_so(monkeypatch, kv_heads, window, grouped):
    operator = Operator(grouped)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", operator.called())
    forest = collate(random_trees(SHAPES))
    inputs = tensors(forest.num_tokens, kv_heads=kv_heads)
    for x in inputs:
        x.requires_grad_()
    layout = layout_of(forest, "varlen")
    got = varlen_attention(*inputs, layout, 0.3, window)
    wanted = run("dense", forest, window, *inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
    ramp = torch.linspace(-1, 2, got.numel(), dtype=torch.float64).reshape(got.shape)
    ours = torch.autograd.grad((got * ramp).sum(), inputs)
    theirs = torch.autograd.grad((wanted * ramp).sum(), inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert operator.heads == [(4, kv_heads if grouped else 4)]


def test_torchs_own_operator_is_called_as_it_wants_to_be():
    parameters = signature(varlen_attn).parameters
    assert list(parameters)[:7] == [
        *("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")
    ]
    assert {"scale", "window_size"} <= set(parameters)


def test_the_plan_of_a_forest_is_made_once_for_all_layers(monkeypatch):
    forest = collate(random_trees(SHAPES))
    layout = layout_of(forest, "varlen")
    made = []
    monkeypatch.setattr(attention, "varlen_plan", lambda *a: made.append(a) or varlen_plan(*a))
    for _ in range(3):
        varlen_attention(*tensors(forest.num_tokens), layout, 0.3, kernel=plain_kernel)
    assert len(made) == 1


class Layer(torch.nn.Module):
    layer_idx = 1


def call(forest, path, inputs, **options):
    layout = layout_of(forest, path)
    out, weights = forest_attention(
        Layer(), *inputs, None, scaling=0.3, forest_layout=layout, **options
    )
    assert weights is None
    return out, layout


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("options", [dict(softcap=0.7), dict(s_aux=torch.tensor([0.5, 1, -1, 2]))])
def test_a_score_cap_and_sinks_are_the_same_tree_by_tree(window, options):
    forest = collate(random_trees(SHAPES))
    inputs = tensors(forest.num_tokens, kv_heads=2)
    dense, _ = call(forest, "dense", inputs, sliding_window=window, **options)
    tiled, _ = call(forest, "tiles", inputs, sliding_window=window, **options)
    varlen, _ = call(forest, "varlen", inputs, sliding_window=window, **options)
    torch.testing.assert_close(tiled, dense)
    torch.testing.assert_close(varlen, dense)
    flex, _ = call(forest, "flex", inputs, sliding_window=window, **options)
    torch.testing.assert_close(flex, dense)
    plain, _ = call(forest, "dense", inputs, sliding_window=window)
    assert (dense - plain).abs().max() > 1e-2


def test_a_score_cap_is_a_tanh_before_the_softmax():
    forest = collate(random_trees([(4,) + (1,)]))
    q, k, v = tensors(5)
    got, _ = call(forest, "dense", (q, k, v), softcap=0.7)
    scores = 0.7 * torch.tanh((q @ k.transpose(2, 3)) * 0.3 / 0.7)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    wanted = scores.masked_fill(~causal, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(got, wanted.transpose(1, 2))


def test_a_sink_takes_probability_and_gives_no_value():
    forest = collate(random_trees([(1, 1)]))
    q, k, v = tensors(2)
    sink = torch.tensor([0.5, 1.0, -1.0, 2.0], dtype=torch.float64)
    got, _ = call(forest, "dense", (q, k, v), s_aux=sink)
    own = (q[0, :, 0] * k[0, :, 0]).sum(-1) * 0.3
    share = own.exp() / (own.exp() + sink.exp())
    torch.testing.assert_close(got[0, 0], share[:, None] * v[0, :, 0])


def test_the_window_that_a_layer_asks_for_is_recorded():
    forest = collate(random_trees([(4, 2)]))
    _, layout = call(forest, "tiles", tensors(6), sliding_window=3)
    assert layout.windows == {1: 3}


def test_a_family_that_drops_the_layout_or_makes_a_mask_cannot_share():
    forest = collate(random_trees([(4, 2)]))
    inputs = tensors(6)
    with pytest.raises(CannotShare, match="does not hand keyword arguments on"):
        forest_attention(Layer(), *inputs, None)
    with pytest.raises(CannotShare, match="attention masks of its own"):
        forest_attention(
            Layer(), *inputs, torch.ones(1, 1, 6, 6), forest_layout=layout_of(forest, "tiles")
        )


def test_dropout_in_attention_is_a_bug_of_ours():
    forest = collate(random_trees([(4, 2)]))
    with pytest.raises(AssertionError, match="dropout"):
        call(forest, "tiles", tensors(6), dropout=0.1)


def test_native_attention_is_for_the_time_being():
    lm = loaded()
    assert lm.causal.config._attn_implementation == attention.NAME
    with native_attention(lm.causal):
        assert lm.causal.config._attn_implementation == "sdpa"
    assert lm.causal.config._attn_implementation == attention.NAME
