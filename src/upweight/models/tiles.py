"""Attention over a forest by plain matrix products, in tiles: what the CPU runs.

A tile is a run of a tree's rows with the keys that any of them may attend to: the prompt up to
there, and what the rows' own responses hold. Tiles of like size are padded to one shape and
computed together, so that a bin of forty short trees is a few large products and not hundreds of
small ones; a long tree is cut, so that nothing above the diagonal is computed and a tile's scores
stay in the cache. Scores are made again in the backward pass from the kept log-sum-exp
(FlashAttention, Dao et al. 2022, arXiv:2205.14135).

A product of bf16 matrices is rounded to bf16 on its way out, and a score of 20 would be 0.06 off.
So what a row subtracts from its scores is added inside the product, before rounding: its largest
score in the forward pass (taken from a first product, where rounding does no harm), its
log-sum-exp in the backward pass, and likewise the softmax's own term in the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from upweight.types import Span

ROWS = 192
"""Rows of a tile at most: enough for an efficient product, little above the diagonal."""

SCORES = 1 << 20
"""Scores computed together, over all heads: 2 MiB in bf16, which stay in the cache."""

PADDING = 1.25
"""Tiles go together while their padded area is at most this many times their own."""


@dataclass(frozen=True)
class Tile:
    """Rows [start, stop) of a forest, and the ranges of tokens that they may attend to."""

    start: int
    stop: int
    keys: tuple[range, ...]

    @property
    def num_keys(self) -> int:
        return sum(map(len, self.keys))


@dataclass(frozen=True)
class Tiles:
    """Tiles of one shape. Padding is token 0 again, as rows and as keys.

    `bias` is 0 where a row sees a key and -inf elsewhere; a padded row sees the first key, so that
    its softmax is over something. `real` says which rows are no padding.
    """

    rows: Int[Tensor, "tiles rows"]
    keys: Int[Tensor, "tiles keys"]
    bias: Float[Tensor, "tiles 1 1 rows keys"]
    real: Bool[Tensor, "tiles rows"]


def cut(spans: Sequence[Span], most_rows: int = ROWS) -> list[Tile]:
    """The trees' rows in tiles of about equal size, at most `most_rows` each."""
    tiles: list[Tile] = []
    for span in spans:
        length = span.stop - span.start
        rows = -(-length // -(-length // most_rows)) if length else 1
        prompt = range(span.start, span.start + span.prompt)
        begins = [prompt.stop]
        for response in span.responses:
            begins.append(begins[-1] + response)
        for start in range(span.start, span.stop, rows):
            stop = min(start + rows, span.stop)
            # From the response that the first row lies in to the last row.
            own = max((b for b in begins if b <= start), default=prompt.stop)
            tiles.append(
                Tile(start, stop, (range(prompt.start, min(prompt.stop, stop)), range(own, max(own, stop))))
            )
    return tiles


def tiles_of(
    spans: Sequence[Span],
    position: Int[Tensor, " tokens"],
    window: int | None,
    heads: int,
    dtype: torch.dtype,
) -> list[Tiles]:
    """Every row of the forest once, in tiles that are put together by size."""
    segment, depth = _segments(spans, position.shape[0]), position.cpu()
    return [
        _together(group, segment, depth, window, dtype, position.device)
        for group in _groups(cut(spans), SCORES // heads)
    ]


def _groups(tiles: Sequence[Tile], most_scores: int) -> list[list[Tile]]:
    groups: list[list[Tile]] = []
    own, rows, keys = 0, 0, 0
    for tile in sorted(tiles, key=lambda t: (t.num_keys, t.stop - t.start), reverse=True):
        num_rows, area = tile.stop - tile.start, (tile.stop - tile.start) * tile.num_keys
        padded = max(rows, num_rows) * keys * (len(groups[-1]) + 1) if groups else 0
        if not groups or padded > most_scores or padded > PADDING * (own + area):
            groups.append([])
            own, rows, keys = 0, 0, tile.num_keys
        groups[-1].append(tile)
        own, rows = own + area, max(rows, num_rows)
    return groups


def _segments(spans: Sequence[Span], num_tokens: int) -> Int[Tensor, " tokens"]:
    """0 for a prompt's tokens, and a number of its own for each response."""
    segment = torch.zeros(num_tokens, dtype=torch.long)
    number = 0
    for span in spans:
        start = span.start + span.prompt
        for length in span.responses:
            number += 1
            segment[start : start + length] = number
            start += length
    return segment


def _together(
    group: Sequence[Tile],
    segment: Int[Tensor, " tokens"],
    position: Int[Tensor, " tokens"],
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tiles:
    num_rows = max(tile.stop - tile.start for tile in group)
    num_keys = max(tile.num_keys for tile in group)
    rows = torch.zeros(len(group), num_rows, dtype=torch.long)
    keys = torch.zeros(len(group), num_keys, dtype=torch.long)
    real = torch.zeros(len(group), num_rows, dtype=torch.bool)
    there = torch.zeros(len(group), num_keys, dtype=torch.bool)
    for n, tile in enumerate(group):
        length = tile.stop - tile.start
        rows[n, :length] = torch.arange(tile.start, tile.stop)
        keys[n, : tile.num_keys] = torch.cat([torch.arange(r.start, r.stop) for r in tile.keys])
        real[n, :length] = True
        there[n, : tile.num_keys] = True
    above, below = keys[:, None, :], rows[:, :, None]
    sees = (above <= below) & there[:, None, :] & real[:, :, None]
    sees &= (segment[above] == 0) | (segment[above] == segment[below])
    if window is not None:
        sees &= position[below] - position[above] < window
    sees[:, :, 0] |= ~real
    bias = torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, -math.inf)
    return Tiles(rows.to(device), keys.to(device), bias[:, None, None].to(device), real.to(device))


def tiled_attention(
    query: Float[Tensor, "1 heads tokens dim"],
    key: Float[Tensor, "1 kv_heads tokens dim"],
    value: Float[Tensor, "1 kv_heads tokens value_dim"],
    tiles: Sequence[Tiles],
    scale: float,
) -> Float[Tensor, "1 heads tokens value_dim"]:
    """Each row's softmax over the keys that it sees, times their values."""
    return _Tiled.apply(query, key, value, tiles, scale)  # pyright: ignore[reportReturnType]


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tiles: Sequence[Tiles],
        scale: float,
    ) -> Tensor:
        exact = torch.float64 if query.dtype == torch.float64 else torch.float32
        out = query.new_empty(*query.shape[:3], value.shape[-1])
        lse = query.new_empty(*query.shape[:3], 1, dtype=exact)
        kv_heads = key.shape[1]
        for some in tiles:
            q, k, v = _rows(query, kv_heads, some), _keys(key, some), _keys(value, some)
            scores = _apart(torch.bmm(q, k.transpose(1, 2)), kv_heads, some).add_(some.bias)
            top = scores.amax(-1, keepdim=True).mul_(scale)
            weights = _weights(some.bias - top, q, k, scale)
            total = weights.sum(-1, keepdim=True, dtype=exact)
            blend = torch.bmm(weights, v).to(exact).div_(total)
            _put(out, _apart(blend, kv_heads, some), some)
            _put(lse, _apart(total.log_(), kv_heads, some).add_(top), some)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.tiles, ctx.scale = tiles, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        kv_heads = key.shape[1]
        dq = torch.empty_like(query)
        dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (key, value))
        # exp(score - lse) is exp(score - offset) rest, the offset being what the dtype can hold;
        # the rest goes with the row into its gradient.
        offset = lse.to(query.dtype)
        rest = (offset - lse).exp_()
        own = ((grads[0] * out.to(lse.dtype)).sum(-1, keepdim=True) * rest).to(query.dtype)
        grad = (grads[0] * rest).to(query.dtype)
        for some in ctx.tiles:
            q, g = _rows(query, kv_heads, some), _rows(grad, kv_heads, some)
            k, v = _keys(key, some), _keys(value, some)
            less = _apart(_rows(offset, kv_heads, some), kv_heads, some)
            less = less.masked_fill(~some.real[:, None, None, :, None], math.inf)
            weights = _weights(some.bias - less, q, k, ctx.scale)
            _add(dv, torch.bmm(weights.transpose(1, 2), g), some)
            slope = torch.baddbmm(-_rows(own, kv_heads, some), g, v.transpose(1, 2)).mul_(weights)
            _add(dk, torch.bmm(slope.transpose(1, 2), q), some, ctx.scale)
            _put(dq, _apart(torch.bmm(slope, k).mul_(ctx.scale), kv_heads, some), some)
        return dq, dk.to(key.dtype), dv.to(value.dtype), None, None


def _weights(bias: Tensor, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """exp(bias + scale q k^T), the sum rounded once. Overwrites `bias`."""
    scores = bias.view(q.shape[0], q.shape[1], k.shape[1])
    return scores.baddbmm_(q, k.transpose(1, 2), alpha=scale).exp_()


def _rows(
    x: Float[Tensor, "1 heads tokens dim"], kv_heads: int, some: Tiles
) -> Float[Tensor, "tiles_kv_heads group_rows dim"]:
    """The tiles' rows, those of the query heads that share a key head under one another."""
    rows = x[0].unflatten(0, (kv_heads, -1))[:, :, some.rows]
    return rows.permute(2, 0, 1, 3, 4).flatten(0, 1).flatten(1, 2)


def _apart(
    x: Float[Tensor, "tiles_kv_heads group_rows dim"], kv_heads: int, some: Tiles
) -> Float[Tensor, "tiles kv_heads group rows dim"]:
    return x.view(-1, kv_heads, x.shape[1] // some.rows.shape[1], some.rows.shape[1], x.shape[-1])


def _keys(
    x: Float[Tensor, "1 kv_heads tokens dim"], some: Tiles
) -> Float[Tensor, "tiles_kv_heads keys dim"]:
    return x[0][:, some.keys].transpose(0, 1).flatten(0, 1)


def _put(
    into: Float[Tensor, "1 heads tokens dim"],
    x: Float[Tensor, "tiles kv_heads group rows dim"],
    some: Tiles,
) -> None:
    """The tiles' rows back where they came from."""
    by_head = x.permute(1, 2, 0, 3, 4).flatten(0, 1)
    into[0][:, some.rows[some.real]] = by_head[:, some.real].to(into.dtype)


def _add(
    into: Float[Tensor, "1 kv_heads tokens dim"],
    x: Float[Tensor, "tiles_kv_heads keys dim"],
    some: Tiles,
    scale: float = 1.0,
) -> None:
    """What each tile has for its keys, summed where tiles share a key."""
    by_head = x.unflatten(0, (-1, into.shape[1])).transpose(0, 1).flatten(1, 2)
    into[0].index_add_(1, some.keys.flatten(), by_head.to(into.dtype), alpha=scale)
