import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask

from oracles import SHAPES, random_trees
from upweight.data.pack import collate
from upweight.models.attention import dense_attention, layout_of
from upweight.models.flex import FlexPlan, flex_attention_forest, flex_plan, torch_flex

WINDOWS = (None, 1, 3, 8, 1000)
CHANGES = (dict(), dict(softcap=0.7), dict(sinks=True), dict(softcap=0.7, sinks=True))
SINKS = (0.5, 1.0, -1.0, 2.0)

shapes = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 7), min_size=1, max_size=4)),
    min_size=1,
    max_size=5,
)
block_sizes = st.sampled_from([1, 2, 3, 5, 16])
windows = st.sampled_from([None, 1, 2, 4, 9])


def grown(drawn):
    return collate(random_trees([(p, *rs) for p, rs in drawn]))


def planned(forest, window=None, block_size=4, device="cpu"):
    return flex_plan(forest.spans, forest.position, window, device, block_size)


def tensors(num_tokens, kv_heads=2, dim=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(1, h, num_tokens, dim, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for h in (4, kv_heads, kv_heads)
    )


def listed(numbers, indices):
    """The blocks of a list as a table: table[i, j] says that rows i have keys j."""
    table = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for row, number in enumerate(numbers[0, 0].tolist()):
        table[row, indices[0, 0, row, :number].long()] = True
    return table


def tables(plan):
    """The blocks that are masked and those that are not."""
    blocks = plan.blocks
    masked = listed(blocks.kv_num_blocks, blocks.kv_indices)
    return masked, listed(blocks.full_kv_num_blocks, blocks.full_kv_indices)


def spread(table, plan):
    """A table of blocks as one of tokens, what pads the last block included."""
    size = plan.blocks.BLOCK_SIZE[0]
    return table.repeat_interleave(size, 0).repeat_interleave(size, 1)


def padded(mask, like):
    wide = torch.zeros_like(like)
    wide[: len(mask), : len(mask)] = mask
    return wide


def block_kernel(query, key, value, blocks, scale, score_mod, with_lse):
    """What the kernel on CUDA does: only listed blocks, and the mask only in those not full."""
    size, num_tokens = blocks.BLOCK_SIZE[0], query.shape[2]
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    masked, full = tables(FlexPlan(blocks))
    outs, lses = [], []
    for i in range(len(masked)):
        rows = torch.arange(i * size, min((i + 1) * size, num_tokens))
        scores, keys = [], []
        for j in (masked | full)[i].nonzero().flatten().tolist():
            there = torch.arange(j * size, min((j + 1) * size, num_tokens))
            score = query[:, :, rows] @ key[:, :, there].transpose(2, 3) * scale
            if score_mod is not None:
                score = score_mod(score, None, None, None, None)
            if masked[i, j]:
                seen = blocks.mask_mod(None, None, rows[:, None], there[None, :])
                score = score.masked_fill(~seen, -math.inf)
            scores.append(score)
            keys.append(there)
        joined = torch.cat(scores, -1)
        outs.append(joined.softmax(-1) @ value[:, :, torch.cat(keys)])
        lses.append(joined.logsumexp(-1))
    return torch.cat(outs, 2), torch.cat(lses, 2) if with_lse else None


def with_gradients(attend, inputs, sinks):
    inputs = (*inputs, sinks) if sinks is not None else inputs
    out = attend(sinks)
    ramp = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).reshape(out.shape)
    grads = torch.autograd.grad(out, inputs, ramp.to(out))
    return [x.detach() for x in (out, *grads)]


def sinks_like(x):
    return torch.tensor(SINKS, dtype=x.dtype, device=x.device, requires_grad=True)


def flexed(plan, inputs, kernel=block_kernel, softcap=None, sinks=False):
    return with_gradients(
        lambda s: flex_attention_forest(*inputs, plan, 0.3, softcap, s, kernel),
        inputs,
        sinks_like(inputs[0]) if sinks else None,
    )


def dense(forest, window, inputs, softcap=None, sinks=False):
    exact = [x.detach().double().requires_grad_() for x in inputs]
    mask = layout_of(forest, "dense").mask(window)
    return with_gradients(
        lambda s: dense_attention(*exact, mask, 0.3, softcap, s),
        exact,
        sinks_like(exact[0]) if sinks else None,
    )


def agree(got, wanted, tolerance):
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w.to(g), rtol=tolerance, atol=tolerance)


def distance(got, wanted):
    """The largest relative distance, in the Euclidean norm, of the output and the gradients."""
    pairs = zip(got, wanted, strict=True)
    return max(float((g.double().cpu() - w.cpu()).norm() / w.cpu().norm()) for g, w in pairs)


@given(shapes, windows, block_sizes)
def test_a_visible_pair_is_in_one_kept_block_and_full_blocks_hold_no_other(
    drawn, window, block_size
):
    forest = grown(drawn)
    plan = planned(forest, window, block_size)
    masked, full = tables(plan)
    kept, unmasked = spread(masked | full, plan), spread(full, plan)
    visible = padded(layout_of(forest, "dense").mask(window), kept)
    assert not (masked & full).any()
    assert not (visible & ~kept).any()
    assert not (unmasked & ~visible).any()


@given(shapes, block_sizes)
def test_without_a_window_no_block_is_kept_or_masked_in_vain(drawn, block_size):
    forest = grown(drawn)
    plan = planned(forest, None, block_size)
    masked, full = tables(plan)
    visible = padded(layout_of(forest, "dense").mask(None), spread(full, plan))
    num_blocks = len(full)
    within = visible.reshape(num_blocks, block_size, num_blocks, block_size)
    assert torch.equal(masked | full, within.any(3).any(1))
    below = torch.ones_like(full).tril(-1)
    assert torch.equal(full, within.all(3).all(1) & below)


@given(shapes, windows)
def test_the_mask_function_is_the_dense_mask(drawn, window):
    forest = grown(drawn)
    tokens = torch.arange(forest.num_tokens)
    visible = planned(forest, window).blocks.mask_mod
    got = visible(torch.tensor(0), torch.tensor(0), tokens[:, None], tokens[None, :])
    assert torch.equal(got, layout_of(forest, "dense").mask(window))


def test_far_behind_the_window_nothing_is_kept():
    masked, full = tables(planned(collate(random_trees([(58, 3)])), window=9, block_size=8))
    # A row sees 8 tokens behind it: its own block of 8 and the one before.
    assert torch.equal(masked, torch.ones(8, 8).tril().triu(-1).bool())
    assert not full.any()


def test_the_keys_blocks_are_known_to_the_backward_pass_too():
    blocks = planned(collate(random_trees(SHAPES))).blocks
    masked, full = tables(FlexPlan(blocks))
    assert torch.equal(listed(blocks.q_num_blocks, blocks.q_indices), masked.T)
    assert torch.equal(listed(blocks.full_q_num_blocks, blocks.full_q_indices), full.T)


@settings(max_examples=40, deadline=None)
@given(shapes, windows, block_sizes, st.sampled_from(CHANGES))
def test_by_blocks_it_is_dense_forward_and_backward(drawn, window, block_size, change):
    forest = grown(drawn)
    inputs = tensors(forest.num_tokens)
    plan = planned(forest, window, block_size)
    agree(flexed(plan, inputs, **change), dense(forest, window, inputs, **change), 1e-10)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("change", CHANGES)
def test_torchs_reference_gives_dense_too(window, change):
    forest = collate(random_trees(SHAPES))
    inputs = [x.detach() for x in tensors(forest.num_tokens)]
    sinks = sinks_like(inputs[0]).detach() if "sinks" in change else None
    got = flex_attention_forest(*inputs, planned(forest, window), 0.3, change.get("softcap"), sinks)
    wanted, *_ = dense(forest, window, inputs, **change)
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("change", CHANGES)
def test_torchs_reference_has_the_gradients_of_dense(monkeypatch, kv_heads, dtype, change):
    # torch refuses gradients on the CPU because its kernel for the CPU has none; its reference
    # computes them.
    guard = "torch.nn.attention.flex_attention._validate_device"
    monkeypatch.setattr(guard, lambda *tensors: None)
    forest = collate(random_trees(SHAPES))
    inputs = tensors(forest.num_tokens, kv_heads, dtype=dtype)
    got = flexed(planned(forest, 8), inputs, torch_flex, **change)
    assert all(g.dtype == dtype for g in got)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    agree(got, dense(forest, 8, inputs, **change), tolerance)


def test_a_sink_lowers_every_output_and_a_cap_moves_it():
    forest = collate(random_trees(SHAPES))
    inputs = tensors(forest.num_tokens)
    plain, capped, sunk, _ = (flexed(planned(forest), inputs, **c)[0] for c in CHANGES)
    assert (sunk.abs() < plain.abs()).all()
    assert (capped - plain).abs().max() > 1e-2


def merged(forest):
    """Siblings see each other: a tree's responses taken for one."""
    spans = [replace(s, responses=(sum(s.responses),)) for s in forest.spans]
    return flex_plan(spans, forest.position, 8, "cpu", 4)


def shifted(forest):
    """The first token of a tree's responses belongs to its prompt."""
    spans = [
        replace(s, prompt=s.prompt + 1, responses=(s.responses[0] - 1, *s.responses[1:]))
        for s in forest.spans
    ]
    return flex_plan(spans, forest.position, 8, "cpu", 4)


def one_deeper(forest):
    return flex_plan(forest.spans, forest.position, 9, "cpu", 4)


def relisted(plan, masked, full, mask_mod=None):
    def lists(table):
        numbers = table.sum(-1, dtype=torch.int32)
        order = (~table).int().argsort(dim=-1, stable=True).int()
        return numbers[None, None], order[None, None]

    old = plan.blocks
    return FlexPlan(
        BlockMask.from_kv_blocks(
            *lists(masked),
            *lists(full),
            BLOCK_SIZE=old.BLOCK_SIZE,
            mask_mod=mask_mod or old.mask_mod,
            seq_lengths=old.seq_lengths,
        )
    )


def full_by_mistake(forest):
    """The last block on the diagonal but one is computed without its mask."""
    plan = planned(forest, 8)
    masked, full = tables(plan)
    assert masked[-2, -2]
    masked[-2, -2], full[-2, -2] = False, True
    return relisted(plan, masked, full)


def one_block_lost(forest):
    plan = planned(forest, 8)
    masked, full = tables(plan)
    assert full[2, 1]
    full[2, 1] = False
    return relisted(plan, masked, full)


def one_block_twice_as_wide(forest):
    """The next key is seen as the one before it is."""
    plan = planned(forest, 8)
    right = plan.blocks.mask_mod
    return relisted(
        plan, *tables(plan), lambda b, h, row, key: right(b, h, row, (key - 1).clamp(min=0))
    )


@pytest.mark.parametrize(
    "plant",
    [
        merged,
        shifted,
        one_deeper,
        full_by_mistake,
        one_block_lost,
        one_block_twice_as_wide,
    ],
)
def test_a_planted_error_in_the_plan_shows(plant):
    forest = collate(random_trees(SHAPES))
    inputs = tensors(forest.num_tokens)
    wanted = dense(forest, 8, inputs, softcap=0.7)
    assert distance(flexed(planned(forest, 8), inputs, softcap=0.7), wanted) < 1e-12
    assert distance(flexed(plant(forest), inputs, softcap=0.7), wanted) > 1e-2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the compiled kernel needs CUDA")
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("change", CHANGES)
def test_the_compiled_kernel_gives_dense_at_any_length(window, change):
    for forest_shapes in ([(300, 90, 200), (60, 9)], [(700, 300, 1)], [(5, 3, 4)]):
        forest = collate(random_trees(forest_shapes))
        inputs = tensors(forest.num_tokens, dim=32, dtype=torch.float32)
        there = [x.detach().cuda().requires_grad_() for x in inputs]
        got = flexed(planned(forest, window, 128, "cuda"), there, torch_flex, **change)
        assert distance(got, dense(forest, window, inputs, **change)) < 1e-4
