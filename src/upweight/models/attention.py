"""Attention over a forest: a token attends to itself and its ancestors.

Every path computes the same thing; `dense` is the oracle that the others are held against, in the
tests and once at the start of every run on the model at hand (proof.py).

dense    one boolean mask, filled row by row from the parent array
parts    CPU: each tree as dense causal blocks, merged by log-sum-exp; no mask, no copied keys
varlen   CUDA: one variable-length call over gathered keys

The models reach these functions through transformers' AttentionInterface: nothing is patched. The
layout of the forest travels as the keyword argument `forest_layout`, so that a layer that is
recomputed in the backward pass (checkpointing) sees the forest it saw in the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from upweight.types import Forest, Span

NAME = "upweight"
"""What `config._attn_implementation` says while forests are read."""


class CannotShare(Exception):
    """Why a model family cannot share a prompt among responses. Never leaves models/."""


@dataclass
class Layout:
    """Where the trees of a forest lie, and the masks made from that, shared by all layers.

    `windows` records the sliding window that each layer asked for, by layer index, so that a
    family which applies its window elsewhere than here is noticed (proof.py).
    """

    path: str
    spans: tuple[Span, ...]
    parent: Int[Tensor, " tokens"]
    position: Int[Tensor, " tokens"]
    windows: dict[int, int | None] = field(default_factory=dict[int, int | None])
    _masks: dict[object, Tensor] = field(default_factory=dict[object, Tensor])
    _varlen: VarlenPlan | None = None

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
    num = parent.shape[0]
    mask = torch.zeros(num, num, dtype=torch.bool)
    for i, above in enumerate(parent.tolist()):
        if above >= 0:
            mask[i] = mask[above]
        mask[i, i] = True
    return mask.to(parent.device)


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
    plain = softcap is None and s_aux is None and value.shape[-1] == query.shape[-1]
    if layout.path == "dense" or (layout.path == "varlen" and not plain):
        mask = layout.mask(_binding(layout, sliding_window))
        out = dense_attention(query, key, value, mask, scale, softcap, s_aux)
    elif layout.path == "varlen":
        out = varlen_attention(query, key, value, layout, scale, sliding_window)
    elif plain:
        out = parts_attention(query, key, value, layout, scale, sliding_window)
    else:
        out = _tree_by_tree(query, key, value, layout, scale, sliding_window, softcap, s_aux)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, forest_attention)


def _binding(layout: Layout, window: int | None) -> int | None:
    """The window, or None where no token is deep enough to feel it."""
    if window is None:
        return None
    deepest = max(span.prompt + max(span.responses, default=0) for span in layout.spans)
    return window if deepest > window else None


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


@dataclass(frozen=True, slots=True)
class Part:
    """One dense block of a forest's attention: queries [q0, q1) on keys [k0, k1)."""

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool
    windowed: Span | None = None
    """Set when a sliding window cuts into this tree: the block takes the tree's own mask."""


def parts_of(spans: tuple[Span, ...], window: int | None = None) -> list[list[Part]]:
    """Per group of queries, the blocks whose union is what those queries may attend to.

    A tree is causal over [prompt; first response]; each further response attends to the whole
    prompt and, causally, to itself.
    """
    groups: list[list[Part]] = []
    for span in spans:
        deepest = span.prompt + max(span.responses, default=0)
        if window is not None and deepest > window:
            groups.append([Part(span.start, span.stop, span.start, span.stop, False, span)])
            continue
        first = span.start + span.prompt + (span.responses[0] if span.responses else 0)
        groups.append([Part(span.start, first, span.start, first, True)])
        start, after_prompt = first, span.start + span.prompt
        for length in span.responses[1:]:
            own = Part(start, start + length, start, start + length, True)
            above = Part(start, start + length, span.start, after_prompt, False)
            groups.append([above, own])
            start += length
    return groups


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Parts(torch.autograd.Function):
    """Blocks of flash attention merged by log-sum-exp.

    With s_p the log-sum-exp of part p's scores and s = log sum_p exp(s_p), the merged output is
    sum_p exp(s_p - s) o_p. The softmax gradient of a score in part p is
    exp(score - s) (do.v - do.o) with the *merged* o and s, which is what a flash backward computes
    from the output and log-sum-exp that it is handed: so each part's own backward, given the
    merged ones, gives its exact share.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: Layout,
        scale: float,
        window: int | None,
    ) -> Tensor:
        out = torch.empty_like(query)
        lse = query.new_empty(query.shape[:3], dtype=_lse_dtype(query))
        for group in parts_of(layout.spans, window):
            rows = slice(group[0].q0, group[0].q1)
            pieces = [
                _forward_part(query, key, value, part, layout, scale, window) for part in group
            ]
            if len(pieces) == 1:
                out[:, :, rows], lse[:, :, rows] = pieces[0]
                continue
            merged = torch.logsumexp(torch.stack([s for _, s in pieces]), dim=0)
            blend = sum(torch.exp(s - merged)[..., None] * o.to(s.dtype) for o, s in pieces)
            out[:, :, rows], lse[:, :, rows] = blend, merged
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.scale, ctx.window = layout, scale, window
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        grad = grads[0].contiguous()
        dq, dk, dv = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for group in parts_of(ctx.layout.spans, ctx.window):
            for part in group:
                q, k = slice(part.q0, part.q1), slice(part.k0, part.k1)
                mask = _part_mask(part, ctx.layout, ctx.window, query.dtype)
                gq, gk, gv = _flash_backward(
                    grad[:, :, q],
                    query[:, :, q],
                    key[:, :, k],
                    value[:, :, k],
                    out[:, :, q],
                    lse[:, :, q],
                    0.0,
                    part.causal,
                    attn_mask=mask,
                    scale=ctx.scale,
                )
                dq[:, :, q] += gq
                dk[:, :, k] += gk
                dv[:, :, k] += gv
        return dq, dk, dv, None, None, None


def _lse_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _part_mask(part: Part, layout: Layout, window: int | None, dtype: torch.dtype) -> Tensor | None:
    if part.windowed is None:
        return None
    allowed = layout.tree_mask(part.windowed, window)
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, -torch.inf)[None, None]


def _forward_part(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    part: Part,
    layout: Layout,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp) of one block."""
    q, k = slice(part.q0, part.q1), slice(part.k0, part.k1)
    mask = _part_mask(part, layout, window, query.dtype)
    return _flash(
        query[:, :, q], key[:, :, k], value[:, :, k], 0.0, part.causal, attn_mask=mask, scale=scale
    )


def parts_attention(
    query: Float[Tensor, "1 heads tokens dim"],
    key: Float[Tensor, "1 kv_heads tokens dim"],
    value: Float[Tensor, "1 kv_heads tokens dim"],
    layout: Layout,
    scale: float,
    window: int | None = None,
) -> Float[Tensor, "1 heads tokens dim"]:
    """The CPU path: flash blocks merged by log-sum-exp, forward and backward."""
    heads = query.shape[1]
    key, value = _repeat_heads(key, heads), _repeat_heads(value, heads)
    return _Parts.apply(  # pyright: ignore[reportReturnType]
        query, key, value, layout, scale, _binding(layout, window)
    )


@dataclass(frozen=True)
class VarlenPlan:
    """Boundaries of the query runs and of their gathered keys, for one variable-length call.

    The runs [prompt; first response], second response, third response, ... lie end to end in the
    forest, so queries are taken as they are. Each run's keys end with the run itself, which is why
    the causal mask must be aligned to the bottom right.
    """

    keys: Int[Tensor, " gathered"]
    cu_q: Int[Tensor, " runs1"]
    cu_k: Int[Tensor, " runs1"]
    max_q: int
    max_k: int


def varlen_plan(spans: tuple[Span, ...], device: torch.device | str = "cpu") -> VarlenPlan:
    keys: list[int] = []
    lengths_q: list[int] = []
    lengths_k: list[int] = []
    for span in spans:
        prompt = range(span.start, span.start + span.prompt)
        start = span.start + span.prompt
        runs = span.responses or (0,)
        for index, length in enumerate(runs):
            keys += [*prompt, *range(start, start + length)]
            lengths_q.append(length + (span.prompt if index == 0 else 0))
            lengths_k.append(span.prompt + length)
            start += length

    def offsets(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)

    gathered = torch.tensor(keys, dtype=torch.long, device=device)
    return VarlenPlan(
        gathered, offsets(lengths_q), offsets(lengths_k), max(lengths_q), max(lengths_k)
    )


VarlenKernel = Callable[[Tensor, Tensor, Tensor, VarlenPlan, float, int | None], Tensor]


def torch_varlen(
    query: Float[Tensor, "tokens heads dim"],
    key: Float[Tensor, "gathered heads dim"],
    value: Float[Tensor, "gathered heads dim"],
    plan: VarlenPlan,
    scale: float,
    window: int | None,
) -> Float[Tensor, "tokens heads dim"]:
    """torch.nn.attention.varlen, causal to the bottom right, half precision on CUDA only."""
    from torch.nn.attention.varlen import varlen_attn

    left = -1 if window is None else window - 1
    out = varlen_attn(
        query,
        key,
        value,
        plan.cu_q,
        plan.cu_k,
        plan.max_q,
        plan.max_k,
        scale=scale,
        window_size=(left, 0),
    )
    assert isinstance(out, Tensor)
    return out


def varlen_attention(
    query: Float[Tensor, "1 heads tokens dim"],
    key: Float[Tensor, "1 kv_heads tokens dim"],
    value: Float[Tensor, "1 kv_heads tokens dim"],
    layout: Layout,
    scale: float,
    window: int | None = None,
    kernel: VarlenKernel = torch_varlen,
) -> Float[Tensor, "1 heads tokens dim"]:
    """The CUDA path: queries as they lie, each run's keys gathered by index."""
    plan = layout.varlen()
    heads = query.shape[1]
    q = query[0].transpose(0, 1)
    k = _repeat_heads(key, heads)[0].transpose(0, 1)[plan.keys]
    v = _repeat_heads(value, heads)[0].transpose(0, 1)[plan.keys]
    out = kernel(
        q.contiguous(), k.contiguous(), v.contiguous(), plan, scale, _binding(layout, window)
    )
    return out.transpose(0, 1)[None]


def implementation(model: PreTrainedModel) -> str:
    """The name of the attention function that the model calls."""
    return str(getattr(model.config, "_attn_implementation", "eager"))


@contextmanager
def native_attention(model: PreTrainedModel) -> Generator[None]:
    """The model as transformers runs it, for generation and for families that cannot share."""
    before = implementation(model)
    sdpa = getattr(model, "_supports_sdpa", False)
    model.set_attn_implementation("sdpa" if sdpa else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
