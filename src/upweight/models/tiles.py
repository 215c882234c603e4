"""Attention over a forest by plain matrix products, in tiles: what the CPU runs.

A tile is a run of a tree's rows with the keys that any of them may attend to: the prompt up to
there, and what the rows' own responses hold. Tiles of like size are padded to one shape and
computed together, so that a bin of forty short trees is a few large products and not hundreds of
small ones; a long tree is cut, so that nothing above the diagonal is computed and a tile's scores
stay in the cache. Scores are made again in the backward pass from the kept log-sum-exp
(FlashAttention, Dao et al. 2022, arXiv:2205.14135).

A product of bf16 matrices is rounded to bf16 on its way out, and a score of 20 would be 0.06 off.
So what a row subtracts from its scores is subtracted inside the product, before rounding, by two
more columns: its largest score in the forward pass (taken from a first product, where rounding does
no harm), its log-sum-exp in the backward pass, and the softmax's own term in the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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
    """Tiles of one shape, as indices into [tokens x heads] and [tokens] laid flat.

    `bias` is for the last keys, those before being seen by every row: 0 where a row sees a key and
    -inf elsewhere. A padded row lies behind the last row, and sees every key. A padded key is
    token 0 again, and no other row sees it.
    """

    rows: Int[Tensor, " tiles_heads_rows"]
    keys: Int[Tensor, " tiles_kv_heads_keys"]
    tokens: Int[Tensor, " tiles_keys"]
    bias: Float[Tensor, "tiles 1 1 rows last"]

    def shape(self, heads: Heads) -> tuple[int, int, int, int, int]:
        """Of all scores: tiles, key heads, query heads for each, rows, keys."""
        tiles, _, _, rows, _ = self.bias.shape
        keys = self.tokens.shape[0] // tiles
        return tiles, heads.key, heads.query // heads.key, rows, keys


@dataclass(frozen=True)
class Heads:
    """Query heads, and the key heads that they share among them."""

    query: int
    key: int


def cut(spans: Sequence[Span], most_rows: int, window: int | None = None) -> list[Tile]:
    """The trees' rows in tiles of about equal size, at most `most_rows` each. A token attends to no
    more than the last `window` on its way, itself among them."""
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
            first = prompt.start
            if window is not None:
                # The least deep row is the first, or that of a response which begins in the tile.
                inside = 0 if any(start < b < stop for b in begins) else start - own
                depth = min(start - span.start, span.prompt + inside)
                first = min(prompt.stop, prompt.start + max(0, depth + 1 - window))
                own = max(own, start + 1 - window)
            tiles.append(
                Tile(
                    start,
                    stop,
                    (range(first, min(prompt.stop, stop)), range(own, max(own, stop))),
                )
            )
    return tiles


def tiles_of(
    spans: Sequence[Span],
    position: Int[Tensor, " tokens"],
    window: int | None,
    heads: Heads,
    dtype: torch.dtype,
) -> list[Tiles]:
    """Every row of the forest once, in tiles that are put together by size."""
    num_tokens = position.shape[0]
    segment, depth = _segments(spans, num_tokens), position.cpu()
    found: list[Tiles] = []
    for group in _groups(cut(spans, ROWS, window), SCORES // heads.query):
        rows, keys = (_padded(part) for part in zip(*map(_tokens, group), strict=True))
        sees = _sees(rows, keys, segment, depth, window)
        sees |= rows[:, :, None] < 0
        # Of a long prompt all but the last keys are seen by all rows.
        hidden = ~sees[:, :, int(sees.all(1).all(0).cumprod(0).sum()) :]
        bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -math.inf)
        rows_by_head = _by_head(rows, heads.query)
        tiles = Tiles(
            rows=rows_by_head.masked_fill(rows[:, None] < 0, num_tokens * heads.query).flatten(),
            keys=_by_head(keys.clamp(min=0), heads.key).flatten(),
            tokens=keys.clamp(min=0).flatten(),
            bias=bias[:, None, None],
        )
        found.append(Tiles(*(getattr(tiles, f.name).to(position.device) for f in fields(tiles))))
    return found


def _tokens(tile: Tile) -> tuple[Tensor, Tensor]:
    keys = [torch.arange(part.start, part.stop) for part in tile.keys]
    return torch.arange(tile.start, tile.stop), torch.cat(keys)


def _padded(parts: Sequence[Tensor]) -> Int[Tensor, "tiles length"]:
    return pad_sequence(list(parts), batch_first=True, padding_value=-1)


def _by_head(tokens: Int[Tensor, "tiles length"], heads: int) -> Int[Tensor, "tiles heads length"]:
    """Where each token's vector lies for each head in [tokens x heads]."""
    return tokens[:, None, :] * heads + torch.arange(heads)[:, None]


def _sees(
    rows: Int[Tensor, "tiles rows"],
    keys: Int[Tensor, "tiles keys"],
    segment: Int[Tensor, " tokens"],
    position: Int[Tensor, " tokens"],
    window: int | None,
) -> Bool[Tensor, "tiles rows keys"]:
    below, above = rows[:, :, None], keys[:, None, :]
    sees = (above <= below) & (above >= 0)
    sees &= (segment[above] == 0) | (segment[above] == segment[below])
    if window is not None:
        sees &= position[below] - position[above] < window
    return sees


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
        heads = Heads(query.shape[1], key.shape[1])
        flat_q, flat_k, flat_v = _behind(_flat(query)), _less(_flat(key)), _flat(value)
        out = flat_v.new_empty(len(flat_q), flat_v.shape[1])
        lse = flat_q.new_empty(len(flat_q), dtype=exact)
        for some in tiles:
            q, k = _rows(flat_q, some, heads), _keys(flat_k, some, heads)
            scores = torch.bmm(q, k[..., : q.shape[-1]].transpose(1, 2))
            top = _hide(scores, some, heads).amax(-1, keepdim=True).to(exact)
            weights = _weights(_minus(q, top), k, some, heads, scale)
            total = weights.sum(-1, keepdim=True, dtype=exact)
            blend = torch.bmm(weights, _keys(flat_v, some, heads)).to(exact).div_(total)
            out[some.rows] = blend.flatten(0, 1).to(out.dtype)
            lse[some.rows] = total.log_().add_(top, alpha=scale).flatten()
        out, lse = out[:-1], lse[:-1]
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.tiles, ctx.scale, ctx.heads = tiles, scale, heads
        return _unflat(out, heads.query)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        heads, scale, width = ctx.heads, ctx.scale, query.shape[-1]
        grad = _flat(grads[0])
        own = (grad * out.to(lse.dtype)).sum(-1, keepdim=True)
        flat_q = _behind(_minus(_flat(query), lse[:, None] / scale))
        # A padded row's gradient is 0, and with it all that the row would add to another.
        flat_g = _behind(_minus(grad.to(query.dtype), own))
        flat_k, flat_v = _less(_flat(key)), _less(_flat(value))
        dq = flat_q.new_empty(len(flat_q), width)
        dk, dv = (_flat(torch.zeros_like(x, dtype=lse.dtype)) for x in (key, value))
        for some in ctx.tiles:
            q, g = _rows(flat_q, some, heads), _rows(flat_g, some, heads)
            k, v = _keys(flat_k, some, heads), _keys(flat_v, some, heads)
            weights = _weights(q, k, some, heads, scale)
            _add(dv, torch.bmm(weights.transpose(1, 2), g[..., : value.shape[-1]]), some, heads)
            slope = torch.bmm(g, v.transpose(1, 2)).mul_(weights)
            _add(dk, torch.bmm(slope.transpose(1, 2), q[..., :width]), some, heads, scale)
            dq[some.rows] = torch.bmm(slope, k[..., :width]).mul_(scale).flatten(0, 1)
        return (
            _unflat(dq[:-1], heads.query),
            _unflat(dk.to(key.dtype), heads.key),
            _unflat(dv.to(value.dtype), heads.key),
            None,
            None,
        )


def _minus(
    x: Float[Tensor, "*rows dim"], y: Float[Tensor, "*rows 1"]
) -> Float[Tensor, "*rows dim_2"]:
    """Rows whose product with a key of `_less` is x k - y: y as the sum of two of x's dtype."""
    high = y.to(x.dtype)
    return torch.cat([x, high, (y - high).to(x.dtype)], dim=-1)


def _less(keys: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim_2"]:
    return torch.cat([keys, keys.new_full((len(keys), 2), -1.0)], dim=-1)


def _behind(x: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows_1 dim"]:
    """One row more, of zeros: where padding reads and is written."""
    return torch.cat([x, x.new_zeros(1, x.shape[1])])


def _flat(x: Float[Tensor, "1 heads tokens dim"]) -> Float[Tensor, "tokens_heads dim"]:
    """Token by token, as the projections have written it: no copy then."""
    return x[0].transpose(0, 1).flatten(0, 1)


def _unflat(
    x: Float[Tensor, "tokens_heads dim"], heads: int
) -> Float[Tensor, "1 heads tokens dim"]:
    return x.unflatten(0, (-1, heads)).transpose(0, 1)[None]


def _rows(
    x: Float[Tensor, "tokens_heads dim"], some: Tiles, heads: Heads
) -> Float[Tensor, "tiles_kv_heads group_rows dim"]:
    """The tiles' rows, those of the query heads that share a key head under one another."""
    tiles, kv_heads, group, rows, _ = some.shape(heads)
    return x.index_select(0, some.rows).view(tiles * kv_heads, group * rows, x.shape[1])


def _keys(
    x: Float[Tensor, "tokens_kv_heads dim"], some: Tiles, heads: Heads
) -> Float[Tensor, "tiles_kv_heads keys dim"]:
    tiles, kv_heads, _, _, keys = some.shape(heads)
    return x.index_select(0, some.keys).view(tiles * kv_heads, keys, x.shape[1])


def _weights(q: Tensor, k: Tensor, some: Tiles, heads: Heads, scale: float) -> Tensor:
    """exp(scale q k^T) where a row sees a key, the exponent rounded once; 0 elsewhere."""
    scores = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=scale)
    return _hide(scores, some, heads).exp_()


def _hide(
    scores: Float[Tensor, "tiles_kv_heads group_rows keys"], some: Tiles, heads: Heads
) -> Float[Tensor, "tiles_kv_heads group_rows keys"]:
    """-inf, in place, where a row does not see a key."""
    last = some.bias.shape[-1]
    scores.view(some.shape(heads))[..., scores.shape[-1] - last :].add_(some.bias)
    return scores


def _add(
    into: Float[Tensor, "tokens_kv_heads dim"],
    x: Float[Tensor, "tiles_kv_heads keys dim"],
    some: Tiles,
    heads: Heads,
    scale: float = 1.0,
) -> None:
    """What each tile has for its keys, summed where tiles share a key."""
    by_token = x.unflatten(0, (-1, heads.key)).transpose(1, 2).flatten(2).flatten(0, 1)
    into.view(-1, by_token.shape[1]).index_add_(
        0, some.tokens, by_token.to(into.dtype), alpha=scale
    )
