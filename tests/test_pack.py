import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oracles import random_trees
from upweight.data.pack import bins, collate, divisible, merge_same_prompts, split, unshared
from upweight.types import Preference, ResponseId, RowId, Span, Tree


def tree_of(prompt, responses, preferences=(), line=1):
    row = RowId("f", line)
    return Tree(
        prompt=tuple(prompt),
        responses=tuple(map(tuple, responses)),
        preferences=tuple(preferences),
        ids=tuple(ResponseId(row, k) for k in range(len(responses))),
        stopped=(True,) * len(responses),
    )


ids = st.lists(st.integers(0, 9), min_size=1, max_size=4)
pairs = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from([0.5, 1.0])), max_size=4
)
drawn = st.lists(
    st.tuples(ids, st.lists(ids, min_size=1, max_size=4), pairs), min_size=1, max_size=6
)


def planted(drawn):
    """The trees of what was drawn, without the pairs that name no two of their responses."""
    return [
        tree_of(
            prompt,
            responses,
            [Preference(*p) for p in pairs if p[0] != p[1] and max(p[:2]) < len(responses)],
            line,
        )
        for line, (prompt, responses, pairs) in enumerate(drawn, start=1)
    ]


def ancestors(forest, i):
    """The indices on the way from token i to its root, the root first, i last."""
    path = [i]
    while forest.parent[path[0]] >= 0:
        path.insert(0, int(forest.parent[path[0]]))
    return path


def test_two_trees_laid_end_to_end():
    first = tree_of([10, 11], [[12], [13, 14]], [Preference(1, 0, 0.5, 2.0, 0.75)])
    second = tree_of([20], [[21, 22], [23]], [Preference(0, 1)])
    forest = collate([first, second])
    assert forest.token_ids.tolist() == [10, 11, 12, 13, 14, 20, 21, 22, 23]
    assert forest.parent.tolist() == [-1, 0, 1, 1, 3, -1, 5, 6, 5]
    assert forest.position.tolist() == [0, 1, 2, 2, 3, 0, 1, 2, 1]
    assert forest.scored.tolist() == [2, 3, 4, 6, 7, 8]
    assert forest.predicted_at.tolist() == [1, 1, 3, 5, 6, 5]
    assert forest.response_of.tolist() == [0, 1, 1, 2, 2, 3]
    assert forest.tokens_per_response.tolist() == [1, 2, 2, 1]
    assert forest.chosen.tolist() == [1, 2] and forest.rejected.tolist() == [0, 3]
    assert forest.weight.tolist() == [0.5, 1.0]
    assert forest.margin.tolist() == [2.0, 0.0]
    assert forest.flipped.tolist() == unshared(forest).flipped.tolist() == [0.25, 0.0]
    assert forest.spans == (Span(0, 2, (1, 2)), Span(5, 1, (2, 1)))
    assert forest.trees == (first, second)


@given(drawn)
def test_a_scored_tokens_ancestors_are_its_prompt_and_its_own_response(drawn):
    trees = planted(drawn)
    forest = collate(trees)
    written = [
        (tree.prompt, response[: n + 1], response_id)
        for tree in trees
        for response, response_id in zip(tree.responses, tree.ids, strict=True)
        for n in range(len(response))
    ]
    owners = [response_id for tree in trees for response_id in tree.ids]
    assert forest.scored.tolist() == sorted(forest.scored.tolist())
    for i, of, expected in zip(forest.scored, forest.response_of, written, strict=True):
        prompt, response, response_id = expected
        assert forest.token_ids[ancestors(forest, int(i))].tolist() == [*prompt, *response]
        assert owners[of] == response_id


@given(drawn)
def test_position_is_depth_and_only_prompts_are_not_scored(drawn):
    trees = planted(drawn)
    forest = collate(trees)
    depths = [len(ancestors(forest, i)) - 1 for i in range(forest.num_tokens)]
    assert forest.position.tolist() == depths
    prompts = set(range(forest.num_tokens)) - set(forest.scored.tolist())
    inside = {i for s in forest.spans for i in range(s.start, s.start + s.prompt)}
    assert prompts == inside
    assert forest.num_tokens == sum(t.num_tokens for t in trees) == forest.spans[-1].stop


@given(drawn)
def test_preferences_point_at_their_responses(drawn):
    trees = planted(drawn)
    forest = collate(trees)
    responses = [ids for tree in trees for ids in tree.responses]
    stated = [
        (t.responses[p.chosen], t.responses[p.rejected], p.weight)
        for t in trees
        for p in t.preferences
    ]
    found = zip(forest.chosen, forest.rejected, forest.weight, strict=True)
    assert [(responses[c], responses[r], w) for c, r, w in found] == stated


@given(drawn)
def test_unshared_scores_the_same_tokens_in_the_same_order(drawn):
    trees = planted(drawn)
    forest = collate(trees)
    alone = unshared(forest)
    assert alone.num_responses == len(alone.spans) == forest.num_responses
    assert torch.equal(alone.response_of, forest.response_of)
    assert torch.equal(alone.tokens_per_response, forest.tokens_per_response)
    for name in ("chosen", "rejected", "weight"):
        assert torch.equal(getattr(alone, name), getattr(forest, name))
    for i, j in zip(forest.scored, alone.scored, strict=True):
        path = forest.token_ids[ancestors(forest, int(i))]
        assert torch.equal(path, alone.token_ids[ancestors(alone, int(j))])
    assert all(len(span.responses) == 1 for span in alone.spans)
    assert [t.ids for t in alone.trees] == [(i,) for t in trees for i in t.ids]


def test_a_forest_without_preferences_has_empty_pairs():
    forest = collate([tree_of([1], [[2]])])
    assert forest.num_pairs == 0 and forest.chosen.dtype == torch.long
    assert forest.weight.dtype == torch.float32


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def trees_of(lengths):
    return [tree_of([1] * n, [[2]], line=i) for i, n in enumerate(lengths)]


@given(sizes, st.integers(1, 60))
def test_every_tree_is_in_one_bin_and_no_bin_overflows(lengths, capacity):
    trees = trees_of(lengths)
    found = bins(trees, capacity)
    assert sorted(t.ids[0].row.line for b in found for t in b) == list(range(len(trees)))
    for group in found:
        assert group
        assert len(group) == 1 or sum(t.num_tokens for t in group) <= capacity
    assert found == bins(trees, capacity)


@given(sizes, st.integers(80, 200))
def test_bins_are_as_many_as_needed_and_differ_by_a_tree_at_most(lengths, capacity):
    trees = trees_of(lengths)
    loads = [sum(t.num_tokens for t in group) for group in bins(trees, capacity)]
    # With trees of at most half a bin, two bins that are half full never both remain.
    assert len(loads) <= -(-2 * sum(loads) // capacity)
    assert max(loads) - min(loads) <= max(t.num_tokens for t in trees)


def test_one_bin_more_is_used_where_the_longest_first_overflows():
    # 6+6+6 tokens fill two bins of 9, but whole trees do not.
    assert [len(b) for b in bins(trees_of([5, 5, 5]), 9)] == [1, 1, 1]
    # 3+3, then 2+2, then 2: the third 2 makes one bin 7 where the capacity is 6 (3+3 and 2+2+2).
    assert sum(map(len, bins(trees_of([2, 2, 1, 1, 1]), 6))) == 5


def test_a_tree_longer_than_a_bin_is_alone():
    found = bins(trees_of([1, 50, 1]), 10)
    assert [[t.ids[0].row.line for t in b] for b in found] == [[0, 2], [1]]


def test_trees_of_one_prompt_become_one():
    a = tree_of([1, 2], [[3], [4]], [Preference(0, 1)], line=1)
    b = tree_of([9], [[3], [4]], [Preference(1, 0)], line=2)
    c = tree_of([1, 2], [[3], [5]], [Preference(0, 1, 0.5, 3.0)], line=3)
    merged, other = merge_same_prompts([a, b, c])
    assert other is b
    assert merged.prompt == (1, 2)
    assert merged.responses == ((3,), (4,), (3,), (5,))
    assert merged.preferences == (Preference(0, 1), Preference(2, 3, 0.5, 3.0))
    assert [str(i.row) for i in merged.ids] == ["f:1", "f:1", "f:3", "f:3"]
    assert len(merged.stopped) == 4


def test_a_merged_tree_stays_within_its_limit():
    trees = [tree_of([1, 2], [[3], [4]], [Preference(0, 1)], line=n) for n in range(5)]
    assert [t.num_tokens for t in merge_same_prompts(trees, 6)] == [6, 6, 4]
    assert [t.num_tokens for t in merge_same_prompts(trees, 1)] == [4] * 5


@given(drawn)
def test_merging_keeps_every_response_and_preference(drawn):
    trees = planted(drawn)

    def stated(some):
        return sorted(
            (t.ids[p.chosen].row.line, t.responses[p.chosen], t.responses[p.rejected], p.weight)
            for t in some
            for p in t.preferences
        )

    merged = merge_same_prompts(trees)
    assert stated(merged) == stated(trees)
    assert sum(len(t.responses) for t in merged) == sum(len(t.responses) for t in trees)
    assert len({t.prompt for t in merged}) == len(merged)


@given(drawn, st.integers(1, 20))
def test_a_tree_is_split_between_responses_that_nothing_compares(drawn, max_tokens):
    for tree in planted(drawn):
        pieces = split(tree, max_tokens)
        found = [(i, ids) for p in pieces for i, ids in zip(p.ids, p.responses, strict=True)]
        wanted = list(zip(tree.ids, tree.responses, strict=True))
        assert sorted(found, key=lambda pair: pair[0].index) == wanted
        assert all(piece.prompt == tree.prompt for piece in pieces)
        compared = [
            (piece.ids[p.chosen].index, piece.ids[p.rejected].index, p.weight)
            for piece in pieces
            for p in piece.preferences
        ]
        assert sorted(compared) == sorted(
            (p.chosen, p.rejected, p.weight) for p in tree.preferences
        )
        # What is still too long is of responses that belong together, and no two would fit as one.
        assert all(p.num_tokens <= max_tokens or not divisible(p) for p in pieces)
        assert divisible(tree) or pieces == [tree]
        if tree.num_tokens <= max_tokens:
            assert pieces == [tree]


def test_responses_that_are_compared_by_way_of_another_stay_together():
    chain = [Preference(0, 3), Preference(3, 2), Preference(1, 4)]
    tree = tree_of([1, 2], [[5]] * 5, chain)
    one, other = split(tree, 5)
    assert [i.index for i in one.ids] == [0, 2, 3] and one.preferences == (
        Preference(0, 2),
        Preference(2, 1),
    )
    assert [i.index for i in other.ids] == [1, 4] and other.preferences == (Preference(0, 1),)
    assert split(one, 1) == [one] and not divisible(one)


def test_a_response_behind_no_prompt_is_a_bug_of_ours():
    # Its first token would be predicted at another tree's last.
    with pytest.raises(AssertionError, match="a prompt has at least one token"):
        collate(random_trees([(3, 2), (0, 2)]))
