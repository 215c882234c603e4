"""Trees to forests: bins of about equal size, and a bin as tensors with a parent array.

Input: the trees of one optimizer step. Does: puts trees of one prompt together, shares them out
over bins, lays each bin's trees end to end. Output: a Forest for each bin. How trees are packed
changes no number but by rounding.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain

import torch
from jaxtyping import Int
from torch import Tensor

from upweight.types import Forest, Span, Tree


def merge_same_prompts(trees: Iterable[Tree], max_tokens: int | None = None) -> list[Tree]:
    """Trees of the same prompt ids as one tree, at the place of the first.

    A tree that would grow past `max_tokens` is left and another begun: a thousand answers to one
    prompt still have to fit into bins.
    """
    groups: list[list[Tree]] = []
    sizes: list[int] = []
    latest: dict[tuple[int, ...], int] = {}
    for tree in trees:
        added = tree.num_tokens - len(tree.prompt)
        g = latest.get(tree.prompt)
        if g is None or (max_tokens is not None and sizes[g] + added > max_tokens):
            latest[tree.prompt] = len(groups)
            groups.append([tree])
            sizes.append(tree.num_tokens)
        else:
            groups[g].append(tree)
            sizes[g] += added
    return [_merged(group) for group in groups]


def _merged(group: list[Tree]) -> Tree:
    if len(group) == 1:
        return group[0]
    preferences = [
        replace(p, chosen=p.chosen + offset, rejected=p.rejected + offset)
        for tree, offset in zip(group, _offsets(group), strict=True)
        for p in tree.preferences
    ]
    return Tree(
        prompt=group[0].prompt,
        responses=tuple(chain.from_iterable(t.responses for t in group)),
        preferences=tuple(preferences),
        ids=tuple(chain.from_iterable(t.ids for t in group)),
        stopped=tuple(chain.from_iterable(t.stopped for t in group)),
    )


def _offsets(trees: Sequence[Tree]) -> list[int]:
    """The number of each tree's first response among the responses of all."""
    found = [0]
    for tree in trees:
        found.append(found[-1] + len(tree.responses))
    return found[:-1]


def split(tree: Tree, max_tokens: int) -> list[Tree]:
    """The tree as several of at most `max_tokens`, as far as its preferences allow: responses that
    are compared, be it by way of others, stay together, so that no loss is another. The prompt is
    in each."""
    pieces: list[list[int]] = []
    size = 0
    for joined in _compared(tree) if tree.num_tokens > max_tokens else [range(len(tree.responses))]:
        added = sum(len(tree.responses[k]) for k in joined)
        if not pieces or len(tree.prompt) + size + added > max_tokens:
            pieces.append([])
            size = 0
        pieces[-1] += joined
        size += added
    return [tree] if len(pieces) < 2 else [_piece(tree, sorted(piece)) for piece in pieces]


def divisible(tree: Tree) -> bool:
    """Whether `split` can make it smaller."""
    return len(_compared(tree)) > 1


def _compared(tree: Tree) -> list[list[int]]:
    """Its responses, those together that a preference compares."""
    group = list(range(len(tree.responses)))
    for p in tree.preferences:
        kept, gone = group[p.chosen], group[p.rejected]
        group = [kept if g == gone else g for g in group]
    return [[k for k, g in enumerate(group) if g == first] for first in dict.fromkeys(group)]


def _piece(tree: Tree, responses: list[int]) -> Tree:
    number = {k: i for i, k in enumerate(responses)}
    return Tree(
        prompt=tree.prompt,
        responses=tuple(tree.responses[k] for k in responses),
        preferences=tuple(
            replace(p, chosen=number[p.chosen], rejected=number[p.rejected])
            for p in tree.preferences
            if p.chosen in number
        ),
        ids=tuple(tree.ids[k] for k in responses),
        stopped=tuple(tree.stopped[k] for k in responses),
    )


def bins(trees: Sequence[Tree], tokens_per_bin: int) -> list[list[Tree]]:
    """The trees in as few bins as hold them, about equally full, each within tokens_per_bin.

    The longest tree goes first, into the emptiest bin (Graham 1969); where that overflows, there
    is one bin more (of thousands some more, so that a whole data set is packed in a second). A
    tree longer than a bin is alone in one. Trees keep their order in a bin.
    """
    sizes = [tree.num_tokens for tree in trees]
    large = [i for i, size in enumerate(sizes) if size > tokens_per_bin]
    small = [i for i, size in enumerate(sizes) if size <= tokens_per_bin]
    small.sort(key=lambda i: (-sizes[i], i))
    # Two trees of more than half a bin never share one.
    num_bins = max(
        -(-sum(sizes[i] for i in small) // tokens_per_bin),
        sum(2 * sizes[i] > tokens_per_bin for i in small),
    )
    while (shared := _share_out(small, sizes, num_bins, tokens_per_bin)) is None:
        num_bins += 1 + num_bins // 256
    found = sorted([[i] for i in large] + [sorted(group) for group in shared])
    return [[trees[i] for i in group] for group in found]


def bins_of_step(
    trees: Iterable[Tree], tokens_per_bin: int, *, splitting: bool = False
) -> list[list[Tree]]:
    """A step's micro-batches, the largest first: what runs out of memory does so at once. With
    `splitting` a tree that is too large is several, as far as its preferences allow."""
    merged = merge_same_prompts(trees, tokens_per_bin)
    if splitting:
        merged = [piece for tree in merged for piece in split(tree, tokens_per_bin)]
    return sorted(bins(merged, tokens_per_bin), key=num_tokens, reverse=True)


def num_tokens(trees: Iterable[Tree]) -> int:
    return sum(tree.num_tokens for tree in trees)


def _share_out(
    order: list[int], sizes: list[int], num_bins: int, capacity: int
) -> list[list[int]] | None:
    """Each tree into the emptiest bin, or None where one does not fit."""
    groups: list[list[int]] = [[] for _ in range(num_bins)]
    emptiest = [(0, b) for b in range(num_bins)]
    for i in order:
        filled, b = emptiest[0]
        if filled + sizes[i] > capacity:
            return None
        groups[b].append(i)
        heapq.heapreplace(emptiest, (filled + sizes[i], b))
    return groups


def collate(trees: Sequence[Tree]) -> Forest:
    """The trees laid end to end: each prompt, then its responses, without gaps or padding."""
    # A first token behind nothing would be predicted at the last token of the tree before.
    assert all(t.prompt or not t.responses for t in trees), "a prompt has at least one token"
    segments = list(chain.from_iterable((t.prompt, *t.responses) for t in trees))
    lengths = torch.tensor([len(s) for s in segments], dtype=torch.long)
    prompts = torch.tensor([len(t.prompt) for t in trees], dtype=torch.long)
    counts = torch.tensor([len(t.responses) for t in trees], dtype=torch.long)
    starts = lengths.cumsum(0) - lengths
    # The segment of each tree's prompt; all others are responses.
    roots = (counts + 1).cumsum(0) - counts - 1
    is_response = torch.ones(len(segments), dtype=torch.bool)
    is_response[roots] = False
    depth = prompts.repeat_interleave(counts + 1) * is_response

    index = torch.arange(int(lengths.sum()))
    parent = index - 1
    # A response continues its prompt's last token, not the token before it in the row.
    parent[starts] = torch.where(
        is_response, (starts[roots] + prompts).repeat_interleave(counts + 1) - 1, -1
    )
    scored = is_response.repeat_interleave(lengths).nonzero().squeeze(1)
    pairs = [
        (p.chosen + offset, p.rejected + offset, p.weight, p.margin, 1 - p.probability)
        for tree, offset in zip(trees, _offsets(trees), strict=True)
        for p in tree.preferences
    ]
    columns = zip(*pairs, strict=True) if pairs else ((),) * 5
    chosen, rejected, weight, margin, flipped = columns
    return Forest(
        token_ids=torch.tensor(list(chain.from_iterable(segments)), dtype=torch.long),
        parent=parent,
        position=index - (starts - depth).repeat_interleave(lengths),
        scored=scored,
        response_of=_number_each(lengths[is_response]),
        tokens_per_response=lengths[is_response],
        chosen=torch.tensor(chosen, dtype=torch.long),
        rejected=torch.tensor(rejected, dtype=torch.long),
        weight=torch.tensor(weight, dtype=torch.float32),
        margin=torch.tensor(margin, dtype=torch.float32),
        flipped=torch.tensor(flipped, dtype=torch.float32),
        spans=_spans(trees),
        trees=tuple(trees),
    )


def _number_each(lengths: Int[Tensor, " responses"]) -> Int[Tensor, " scored"]:
    return torch.arange(lengths.shape[0]).repeat_interleave(lengths)


def _spans(trees: Sequence[Tree]) -> tuple[Span, ...]:
    spans: list[Span] = []
    for tree in trees:
        start = spans[-1].stop if spans else 0
        spans.append(Span(start, len(tree.prompt), tuple(map(len, tree.responses))))
    return tuple(spans)


def unshared(forest: Forest) -> Forest:
    """The same forest with one row for each response, its prompt repeated: for models whose layers
    cannot read siblings apart.

    Responses keep their numbers and preferences their order, so whatever is made of the scored
    tokens goes on as before. Its trees are single responses without preferences.
    """
    alone = [
        Tree(tree.prompt, (ids,), (), (tree.ids[k],), (tree.stopped[k],))
        for tree in forest.trees
        for k, ids in enumerate(tree.responses)
    ]
    return replace(
        collate(alone),
        chosen=forest.chosen,
        rejected=forest.rejected,
        weight=forest.weight,
        margin=forest.margin,
        flipped=forest.flipped,
    )
