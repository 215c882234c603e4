"""Attention over a forest by torch's FlexAttention: for CUDA families whose scores are changed.

Blocks of scores that hold no visible pair are skipped, blocks that hold nothing else are computed
without a mask, and the rest ask a mask function that reads three numbers per token. Which block is
which follows from where the trees lie, so no mask of tokens x tokens is ever made.

Attention sinks need no kernel of their own: a sink is one more part in a log-sum-exp, so the output
without it is scaled by sigmoid(lse - sink).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    FlexKernelOptions,
    flex_attention,
)

from upweight.types import Span

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

FlexKernel = Callable[
    [Tensor, Tensor, Tensor, BlockMask, float, ScoreMod | None, bool],
    tuple[Tensor, Tensor | None],
]
"""(query, key, value, blocks, scale, score_mod, with_lse) -> (output, its log-sum-exp if asked)."""

OPTIONS: FlexKernelOptions = {"BACKEND": "TRITON"}
"""One kernel for all lengths. Left to itself, torch takes another one for less than 128 tokens, and
the proof on a short probe forest would say nothing about the kernel that trains."""

COMPILED_VARIANTS = 64
"""Compiled at most: by dtype, with and without gradient and sinks, one block or many, per model.
torch's own limit of 8 is meant for accidents; past it, this would be an error in mid-run."""


@dataclass(frozen=True)
class FlexPlan:
    """Which blocks of scores a forest needs under one window, made once for all layers."""

    blocks: BlockMask


def flex_plan(
    spans: Sequence[Span],
    position: Int[Tensor, " tokens"],
    window: int | None,
    device: torch.device | str,
    block_size: int = 128,
) -> FlexPlan:
    """The blocks of scores between tokens that may attend to each other.

    Token j is visible to token i when j <= i < until[j] and, in a window, depth[j] > least[i].
    Trees lie in one piece, so below the diagonal a block of keys reaches a block of rows exactly if
    some `until` lies behind the rows' first. With a window a few blocks too many may be kept, where
    rows of different depths share a block: the mask function leaves nothing of them.
    """
    num_tokens = position.shape[0]
    until = _until(spans, num_tokens).to(device)
    depth = position.to(device, torch.int32)
    least = torch.full_like(depth, -1) if window is None else depth - window

    first = torch.arange(0, num_tokens, block_size, device=device)
    rows, keys = first[:, None], first[None, :]
    # What pads the last block keeps none. Nor is a block of its rows full, which the kernel would
    # not mask behind the last token: no `until` lies there.
    ends = _by_block(until, block_size, 0)
    floors = _by_block(least, block_size, num_tokens)
    depths = _by_block(depth, block_size, -1)
    kept = (keys <= rows) & (ends.amax(1) > rows)
    kept &= depths.amax(1) > floors.amin(1)[:, None]
    full = (keys < rows) & (ends.amin(1) >= rows + block_size)
    full &= depths.amin(1) > floors.amax(1)[:, None]

    blocks = BlockMask.from_kv_blocks(
        *_listed(kept & ~full),
        *_listed(full),
        BLOCK_SIZE=block_size,
        # A lambda, so that under the tests' type checks torch traces it and not the checks.
        mask_mod=lambda batch, head, row, key: (
            (key <= row) & (row < until[key]) & (depth[key] > least[row])
        ),
        seq_lengths=(num_tokens, num_tokens),
    )
    return FlexPlan(blocks)


def _until(spans: Sequence[Span], num_tokens: int) -> Int[Tensor, " tokens"]:
    """One past the last token that may attend to each: its tree's, or its own response's."""
    until = torch.zeros(num_tokens, dtype=torch.int32)
    for span in spans:
        start = span.start + span.prompt
        until[span.start : start] = span.stop
        for length in span.responses:
            until[start : start + length] = start + length
            start += length
    return until


def _by_block(
    x: Int[Tensor, " tokens"], block_size: int, padding: int
) -> Int[Tensor, "blocks block_size"]:
    return F.pad(x, (0, -len(x) % block_size), value=padding).view(-1, block_size)


def _listed(
    blocks: Bool[Tensor, "rows keys"],
) -> tuple[Int[Tensor, "1 1 rows"], Int[Tensor, "1 1 rows keys"]]:
    """How many blocks each row of blocks has, and which: theirs first, in order."""
    order = torch.argsort(blocks.to(torch.int8), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]


@cache
def _capped(softcap: float) -> ScoreMod:
    """Gemma 2's cap on the scores (arXiv:2408.00118, section 2)."""
    return lambda score, batch, head, row, key: softcap * torch.tanh(score / softcap)


@cache
def _compiled() -> Callable[..., Any]:
    # A full graph or an error: left to fall back, torch would make all tokens x tokens scores.
    return torch.compile(flex_attention, fullgraph=True)


# Untyped: by keyword arguments from a dict, a type checker finds its deprecated overload.
_uncompiled: Callable[..., Any] = flex_attention


def torch_flex(
    query: Float[Tensor, "1 heads tokens dim"],
    key: Float[Tensor, "1 kv_heads tokens dim"],
    value: Float[Tensor, "1 kv_heads tokens value_dim"],
    blocks: BlockMask,
    scale: float,
    score_mod: ScoreMod | None,
    with_lse: bool,
) -> tuple[Float[Tensor, "1 heads tokens value_dim"], Float[Tensor, "1 heads tokens"] | None]:
    """torch.nn.attention.flex_attention: compiled on CUDA; elsewhere torch's own slow reference,
    which makes all scores, asks the mask function alone and has no gradient on the CPU."""
    options: dict[str, Any] = dict(
        score_mod=score_mod,
        block_mask=blocks,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=OPTIONS,
        return_aux=AuxRequest(lse=True) if with_lse else None,
    )
    if query.device.type == "cuda":
        # A scale or cap that differs between two models is a constant of each one's kernel.
        with torch._dynamo.config.patch(  # pyright: ignore[reportPrivateUsage]
            recompile_limit=COMPILED_VARIANTS, specialize_float=True
        ):
            found = _compiled()(query, key, value, **options)
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            found = _uncompiled(query, key, value, **options)
    return (found[0], found[1].lse) if with_lse else (found, None)


def flex_attention_forest(
    query: Float[Tensor, "1 heads tokens dim"],
    key: Float[Tensor, "1 kv_heads tokens dim"],
    value: Float[Tensor, "1 kv_heads tokens value_dim"],
    plan: FlexPlan,
    scale: float,
    softcap: float | None = None,
    s_aux: Float[Tensor, " heads"] | None = None,
    kernel: FlexKernel = torch_flex,
) -> Float[Tensor, "1 heads tokens value_dim"]:
    """What attention.dense_attention gives, without a mask or scores of tokens x tokens.

    `softcap` caps the scores by softcap * tanh(score / softcap); `s_aux` holds a sink per head.
    """
    score_mod = None if softcap is None else _capped(softcap)
    out, lse = kernel(query, key, value, plan.blocks, scale, score_mod, s_aux is not None)
    if s_aux is None:
        return out
    assert lse is not None
    share = torch.sigmoid(lse - s_aux.to(lse.dtype)[:, None])
    return (out * share[..., None]).to(out.dtype)
