"""Attention over a forest: a token attends to itself and its ancestors.

Every path computes the same thing; `dense` is the oracle that the others are held against, in the
tests and once at the start of every run on the model at hand (proof.py).

dense    one boolean mask, made from the parent array alone
tiles    CPU: rows in tiles of like size, computed together by plain products (tiles.py)
varlen   CUDA: one variable-length call over gathered keys (varlen.py); flex where scores are
         changed
flex     CUDA: FlexAttention over the blocks that a forest needs (flex.py)

The models reach these functions through transformers' AttentionInterface: nothing is patched. The
layout of the forest travels as the keyword argument `forest_layout`, so that a layer that is
recomputed in the backward pass (checkpointing) sees the forest it saw in the forward pass.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from upweight.models.flex import FlexPlan, flex_attention_forest, flex_plan
from upweight.models.tiles import Heads, Tiles, tiled_attention, tiles_of
from upweight.models.varlen import VarlenKernel, VarlenPlan, gathered, torch_varlen, varlen_plan
from upweight.types import Forest, Span

NAME = "upweight"
"""What `config._attn_implementation` says while forests are read."""


class CannotShare(Exception):
    """Why a model family cannot share a prompt among responses. Never leaves models/."""


@dataclass(frozen=True)
class Asked:
    """What a layer asks of its attention, but for the numbers; `sinks` is the dtype of its own."""

    heads: Heads
    dim: int
    value_dim: int
    dtype: torch.dtype
    scale: float
    window: int | None
    softcap: float | None
    sinks: torch.dtype | None


@dataclass
class Layout:
    """Where the trees of a forest lie, and the masks made from that, shared by all layers.

    `windows` records the sliding window that each layer asked for, by layer index, so that a
    family which applies its window elsewhere than here is noticed (proof.py); `asked` all that any
    layer asked for, so that it can be asked again of longer trees (blocks.py).
    """

    path: str
    spans: tuple[Span, ...]
    parent: Int[Tensor, " tokens"]
    position: Int[Tensor, " tokens"]
    windows: dict[int, int | None] = field(default_factory=dict[int, int | None])
    asked: set[Asked] = field(default_factory=set[Asked])
    _masks: dict[object, Tensor] = field(default_factory=dict[object, Tensor])
    _varlen: VarlenPlan | None = None
    _flex: dict[int | None, FlexPlan] = field(default_factory=dict[int | None, FlexPlan])
    _tiles: dict[object, list[Tiles]] = field(default_factory=dict[object, list[Tiles]])

    def mask(self, window: int | None) -> Bool[Tensor, "tokens tokens"]:
        """mask[i, j]: token i may attend to token j."""
        if window not in self._masks:
            mask = ancestors(self.parent)
            if window is not None:
                mask &= self.position[:, None] - self.position[None, :] < window
            self._masks[window] = mask
        return self._masks[window]

    def varlen(self) -> VarlenPlan:
        """What one variable-length call needs, made at the first layer."""
        if self._varlen is None:
            self._varlen = varlen_plan(self.spans, self.parent.device)
        return self._varlen

    def flex(self, window: int | None) -> FlexPlan:
        """The blocks of scores that a window leaves, made at the first layer that has it."""
        if window not in self._flex:
            device = self.parent.device
            self._flex[window] = flex_plan(self.spans, self.position, window, device)
        return self._flex[window]

    def tiles(self, window: int | None, heads: Heads, dtype: torch.dtype) -> list[Tiles]:
        """The rows in tiles, made at the first layer."""
        key = (window, heads, dtype)
        if key not in self._tiles:
            self._tiles[key] = tiles_of(self.spans, self.position, window, heads, dtype)
        return self._tiles[key]

    def tree_mask(self, span: Span, window: int | None) -> Bool[Tensor, "tree tree"]:
        """The mask of one tree alone."""
        key = (span.start, window)
        if key not in self._masks:
            inside = slice(span.start, span.stop)
            parent = self.parent[inside]
            mask = ancestors(torch.where(parent < 0, parent, parent - span.start))
            if window is not None:
                position = self.position[inside]
                mask &= position[:, None] - position[None, :] < window
            self._masks[key] = mask
        return self._masks[key]


def layout_of(forest: Forest, path: str) -> Layout:
    return Layout(path=path, spans=forest.spans, parent=forest.parent, position=forest.position)


def ancestors(parent: Int[Tensor, " tokens"]) -> Bool[Tensor, "tokens tokens"]:
    """Row i holds i and everything it continues: its parent's row, and itself."""
    mask = torch.eye(parent.shape[0], dtype=torch.bool, device=parent.device)
    above = parent
    # After n rounds each row has its token's nearest 2^n, and `above` is the one beyond them, whose
    # row has as many again. Row by row, a large bin's mask takes seconds and is made elsewhere.
    while bool((there := above >= 0).any()):
        index = above.clamp(min=0)
        mask |= mask[index] & there[:, None]
        above = torch.where(there, above[index], -1)
    return mask


def forest_attention(
    module: nn.Module,
    query: Float[Tensor, "1 heads tokens dim"],
    key: Float[Tensor, "1 kv_heads tokens dim"],
    value: Float[Tensor, "1 kv_heads tokens value_dim"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    forest_layout: Layout | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "1 tokens heads value_dim"], None]:
    """transformers' attention function for a forest in a batch of one.

    `sliding_window`, `softcap` (Gemma 2's tanh cap on the scores) and `s_aux` (attention sinks)
    are what model families hand over by these names. Keyword arguments that no path knows are
    left to the proof at start: a family whose log-probs then differ runs unshared.
    """
    if forest_layout is None:
        raise CannotShare("it does not hand keyword arguments on to its attention")
    if attention_mask is not None:
        raise CannotShare("it makes attention masks of its own")
    assert dropout == 0.0, "attention dropout is noise on a log-ratio; dropout is off in upweight"
    layout = forest_layout
    layout.windows[getattr(module, "layer_idx", None) or 0] = sliding_window
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embeddings return the residual stream's fp32; the products belong in the compute
        # dtype, as autocast has them in scaled_dot_product_attention.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    heads, dims = Heads(query.shape[1], key.shape[1]), (query.shape[-1], value.shape[-1])
    sinks = None if s_aux is None else s_aux.dtype
    layout.asked.add(Asked(heads, *dims, query.dtype, scale, sliding_window, softcap, sinks))
    window = _binding(layout, sliding_window)
    plain = softcap is None and s_aux is None
    varlen = layout.path == "varlen" and plain and value.shape[-1] == query.shape[-1]
    if varlen:
        out = varlen_attention(query, key, value, layout, scale, sliding_window)
    elif layout.path == "flex" or (layout.path == "varlen" and query.is_cuda):
        plan = layout.flex(window)
        out = flex_attention_forest(query, key, value, plan, scale, softcap, s_aux)
    elif layout.path != "tiles":
        mask = layout.mask(window)
        out = dense_attention(query, key, value, mask, scale, softcap, s_aux)
    elif plain:
        tiles = layout.tiles(window, heads, query.dtype)
        out = tiled_attention(query, key, value, tiles, scale)
    else:
        out = _tree_by_tree(query, key, value, layout, scale, sliding_window, softcap, s_aux)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, forest_attention)


def _binding(layout: Layout, window: int | None) -> int | None:
    """The window, or None where no token is deep enough to feel it."""
    if window is None:
        return None
    return window if max(span.depth for span in layout.spans) > window else None


def _repeat_heads(x: Float[Tensor, "1 kv tokens dim"], heads: int) -> Tensor:
    groups = heads // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def dense_attention(
    query: Float[Tensor, "1 heads tokens dim"],
    key: Float[Tensor, "1 kv_heads tokens dim"],
    value: Float[Tensor, "1 kv_heads tokens value_dim"],
    mask: Bool[Tensor, "tokens tokens"],
    scale: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Float[Tensor, "1 heads tokens value_dim"]:
    """softmax(scale q k^T + mask) v, with the score cap and sinks where a family has them."""
    key, value = _repeat_heads(key, query.shape[1]), _repeat_heads(value, query.shape[1])
    if softcap is None and s_aux is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    scores = (query @ key.transpose(2, 3)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.float() if scores.dtype != torch.float64 else scores
    scores = scores.masked_fill(~mask, -torch.inf)
    if s_aux is not None:
        # A sink is one more column that takes probability and gives no value.
        sink = s_aux.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return weights.to(value.dtype) @ value


def _tree_by_tree(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scale: float,
    window: int | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Float[Tensor, "1 heads tokens value_dim"]:
    """Dense attention inside each tree: for families that change the scores. No T x T mask."""
    window = _binding(layout, window)
    outs: list[Tensor] = []
    for span in layout.spans:
        inside = slice(span.start, span.stop)
        mask = layout.tree_mask(span, window)
        q, k, v = query[:, :, inside], key[:, :, inside], value[:, :, inside]
        outs.append(dense_attention(q, k, v, mask, scale, softcap, s_aux))
    return torch.cat(outs, dim=2)


def varlen_attention(
    query: Float[Tensor, "1 heads tokens dim"],
    key: Float[Tensor, "1 kv_heads tokens dim"],
    value: Float[Tensor, "1 kv_heads tokens dim"],
    layout: Layout,
    scale: float,
    window: int | None = None,
    kernel: VarlenKernel = torch_varlen,
) -> Float[Tensor, "1 heads tokens dim"]:
    """The CUDA path: queries as they lie, each run's keys gathered by index.

    A prompt P with K responses is gathered K times: 2 (K - 1) P kv_heads dim numbers more than
    there are (keys and values, for one layer at a time), which are kept for the backward pass, and
    their gradients summed. No score is computed twice for it. Read once, the prompt would be a part
    of its own, merged by log-sum-exp; but torch's operator drops the gradient of the one it gives.
    """
    plan = layout.varlen()
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    window = _binding(layout, window)
    k, v = (gathered(x, plan) for x in (k, v))
    out = kernel(q.contiguous(), k, v, plan, scale, window)
    return out.transpose(0, 1)[None]


def implementation(model: PreTrainedModel) -> str:
    """The name of the attention function that the model calls."""
    return str(getattr(model.config, "_attn_implementation", "eager"))


@contextmanager
def native_attention(model: PreTrainedModel) -> Generator[None]:
    """The model as transformers runs it, for generation and for families that cannot share."""
    before = implementation(model)
    # Some versions of transformers let a family that caps its scores run without the cap.
    capped = getattr(model.config, "attn_logit_softcapping", None) is not None
    sdpa = getattr(model, "_supports_sdpa", False) and not capped
    model.set_attn_implementation("sdpa" if sdpa else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
