import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles import SHAPES, random_trees
from upweight.data.pack import collate
from upweight.models import tiles
from upweight.models.attention import ancestors, dense_attention, layout_of
from upweight.models.tiles import Heads, cut, tiled_attention, tiles_of

HEADS = Heads(4, 2)
shapes = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 7), min_size=1, max_size=4)),
    min_size=1,
    max_size=5,
)


def grown(drawn):
    return collate(random_trees([(p, *rs) for p, rs in drawn]))


def tensors(num_tokens, dtype=torch.float64, size=1.0):
    generator = torch.Generator().manual_seed(0)
    return tuple(
        (torch.randn(1, h, num_tokens, 16, generator=generator, dtype=torch.float64) * size)
        .to(dtype)
        .requires_grad_()
        for h in (HEADS.query, HEADS.key, HEADS.key)
    )


def value_and_gradients(attend, inputs):
    out = attend(*inputs)
    ramp = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).reshape(out.shape)
    return (out, *torch.autograd.grad(out, inputs, ramp.to(out.dtype)))


def dense(forest, inputs, scale=0.3):
    mask = ancestors(forest.parent)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    return value_and_gradients(lambda q, k, v: dense_attention(q, k, v, mask, scale), exact)


def tiled(forest, inputs, scale=0.3, change=lambda some: some):
    made = tiles_of(forest.spans, forest.position, None, HEADS, inputs[0].dtype)
    made = [change(some) for some in made]
    return value_and_gradients(lambda q, k, v: tiled_attention(q, k, v, made, scale), inputs)


def distances(got, wanted):
    """Relative, in the Euclidean norm: of the output and of the three gradients."""
    pairs = zip(got, wanted, strict=True)
    return [float((g.double() - w).detach().norm() / w.detach().norm()) for g, w in pairs]


@given(shapes, st.integers(1, 8), st.none() | st.integers(1, 12))
def test_each_row_is_in_one_tile_with_all_that_it_attends_to(drawn, most_rows, window):
    forest = grown(drawn)
    mask = layout_of(forest, "dense").mask(window)
    found = []
    for tile in cut(forest.spans, most_rows, window):
        assert 1 <= tile.stop - tile.start <= most_rows
        there = [key for part in tile.keys for key in part]
        assert len(set(there)) == len(there) == tile.num_keys
        for row in range(tile.start, tile.stop):
            assert set(mask[row].nonzero().flatten().tolist()) <= set(there)
            found.append(row)
    assert sorted(found) == list(range(forest.num_tokens))


def test_a_long_prompt_is_cut_below_the_diagonal():
    (span,) = collate(random_trees([(8, 2, 2)])).spans
    keys = [(tile.start, tile.stop, tile.num_keys) for tile in cut((span,), 4)]
    assert keys == [(0, 4, 4), (4, 8, 8), (8, 12, 12)]
    # A tile that begins in the second response does not read the first.
    keys = [(tile.start, tile.stop, tile.num_keys) for tile in cut((span,), 2)]
    assert keys[-2:] == [(8, 10, 10), (10, 12, 10)]


def test_a_tile_holds_no_key_that_a_window_hides_from_all_of_its_rows():
    # Rows of one sequence, and of a response that is longer than the window: its own prompt is out
    # of reach then.
    for shape in ((8000,), (300, 900, 2)):
        forest = collate(random_trees([shape]))
        mask = layout_of(forest, "dense").mask(512)
        tiles = cut(forest.spans, 192, 512)
        for tile in tiles:
            if tile.stop <= forest.spans[0].start + sum(shape[:2]):
                seen = mask[tile.start : tile.stop].any(0).nonzero()[:, 0].tolist()
                assert [key for part in tile.keys for key in part] == seen
    most = max(t.num_keys for t in cut(collate(random_trees([(8000,)])).spans, 192, 512))
    assert most == 511 + 191  # of 8000


@settings(max_examples=30, deadline=None)
@given(shapes, st.integers(1, 6), st.sampled_from([16, 256, 1 << 20]))
def test_however_it_is_cut_it_is_the_softmax_over_ancestors(drawn, most_rows, most_scores):
    forest = grown(drawn)
    inputs = tensors(forest.num_tokens)
    wanted = dense(forest, inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "ROWS", most_rows)
        patch.setattr(tiles, "SCORES", most_scores)
        got = tiled(forest, inputs)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [0.1, 1.0, 4.0])
def test_in_bf16_it_is_as_near_as_bf16_is(size):
    # Rounded once are q, k, v, the weights and the result, each by up to 2^-9 = 2e-3, and the
    # gradients go through six such roundings; scores of 4 * 4 * sqrt(16) * 0.3 = 19, rounded
    # themselves, would be off by 0.06 and all of this by some 5e-2.
    forest = collate(random_trees([(40, 30, 9), (200, 60, 70), (3, 2)]))
    inputs = tensors(forest.num_tokens, torch.bfloat16, size)
    off = distances(tiled(forest, inputs), dense(forest, inputs))
    assert off[0] < 4e-3
    assert max(off[1:]) < 1.5e-2


def next_key(some):
    return replace(some, keys=(some.keys + HEADS.key).clamp(max=int(some.keys.max())))


def all_keys_of_the_tile(some):
    return replace(some, bias=torch.zeros_like(some.bias))


def siblings(some):
    """Causal in the order of the row alone."""
    rows, keys = some.bias.shape[-2], some.tokens.shape[0] // some.bias.shape[0]
    bias = torch.full((rows, keys), -math.inf, dtype=some.bias.dtype).triu(1)
    return replace(some, bias=bias[None, None, None].expand(some.bias.shape[0], 1, 1, -1, -1))


def rows_of_others(some):
    return replace(some, rows=some.rows.roll(1))


def keys_gradients_of_others(some):
    return replace(some, tokens=some.tokens.roll(1))


@pytest.mark.parametrize(
    "change",
    [next_key, all_keys_of_the_tile, siblings, rows_of_others, keys_gradients_of_others],
)
def test_a_planted_error_in_the_tiles_shows(change):
    forest = collate(random_trees(SHAPES))
    inputs = tensors(forest.num_tokens)
    wanted = dense(forest, inputs)
    assert max(distances(tiled(forest, inputs), wanted)) < 1e-12
    assert max(distances(tiled(forest, inputs, change=change), wanted)) > 1e-2


def test_a_forest_without_gradient_needs_none():
    forest = collate(random_trees(SHAPES))
    with torch.no_grad():
        out, *_ = tensors(forest.num_tokens)
        made = tiles_of(forest.spans, forest.position, None, HEADS, out.dtype)
        assert not tiled_attention(*tensors(forest.num_tokens), made, 0.3).requires_grad
