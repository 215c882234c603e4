"""The output head on scored positions only: log-probs of given tokens, never a whole logits tensor.

A plain linear head takes one pass over its logits for value and gradients. With z the logits at a
position, y its token, e = exp(z - z_y) without the token itself (e[y] = 0) and R = sum e:

    log p = -log(1 + R)        dz = (R onehot(y) - e) / (1 + R)

so a chunk costs three products: z = h W^T, e W for the hidden states' gradient, e^T h for the
weight's. e is kept from the forward pass to the backward, whatever loss comes between. Under LoRA
the head is frozen and (R W[y] - e W) / (1 + R) is all that is kept: two products.

What families do to their logits goes along. A factor is one of the hidden states; a bias is added
to z, its gradient a sum over rows of dz; a cap c tanh(x / c) on the product x multiplies dz by its
slope 1 - tanh^2(x / c), and e times that is what is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from upweight.models.load import LanguageModel
from upweight.types import WAITING_DEVICES

CHUNK_ELEMENTS = 1 << 26
"""Logits that are worked on at once: 128 MiB in bf16."""

MOST_CHUNK_ELEMENTS = 1 << 28
"""On a GPU with the memory for it: 1 GiB in fp32. Rows beyond make its products no faster."""

KEPT_ELEMENTS = 1 << 29
"""Exponentials kept from forward to backward: 1 GiB in bf16. Beyond that they are made again."""

CHUNK_SHARE, KEPT_SHARE = 64, 16
"""A GPU's memory over what a chunk takes of it in fp32, and what is kept in bf16: 80 GiB have room
for whole chunks, and for 5 GiB that need not be made again."""

FP32_DEVICES = {"cuda"}
"""Where torch.mm and addmm may write the product of half-precision matrices in fp32 (torch 2.8 and
later, each in its own)."""


@cache
def elements(device: torch.device) -> tuple[int, int]:
    """Logits worked on at once, and exponentials kept."""
    if device.type != "cuda":
        return CHUNK_ELEMENTS, KEPT_ELEMENTS
    memory = torch.cuda.get_device_properties(device).total_memory
    chunk = min(memory // CHUNK_SHARE // 4, MOST_CHUNK_ELEMENTS)
    return max(CHUNK_ELEMENTS, chunk), max(KEPT_ELEMENTS, memory // KEPT_SHARE // 2)


def head_logps(
    lm: LanguageModel,
    hidden: Float[Tensor, "scored width"],
    targets: Int[Tensor, " scored"],
    chunk_elements: int | None = None,
    kept_elements: int | None = None,
) -> Float[Tensor, " scored"]:
    """Log-softmax of the head at each hidden state, read at its target: at least fp32, in nats.

    Without `chunk_elements` and `kept_elements` they are the device's own (`elements`).
    """
    head = lm.causal.get_output_embeddings()
    assert head is not None
    config = lm.causal.config
    chunk, most = elements(hidden.device)
    rows = max(1, (chunk if chunk_elements is None else chunk_elements) // lm.vocab_size)
    if not in_one_pass(lm):
        return _adjusted_logps(head, config, hidden, targets, rows)
    weight = head.weight
    assert isinstance(weight, Tensor)
    bias: Tensor | None = dict(head.named_parameters()).get("bias")
    keep = (most if kept_elements is None else kept_elements) // lm.vocab_size
    dtype = _product_dtype(lm, weight)
    return linear_logps(hidden, weight, bias, targets, config=config, dtype=dtype, cut=(rows, keep))


def linear_logps(
    hidden: Float[Tensor, "scored width"],
    weight: Float[Tensor, "vocab width"],
    bias: Float[Tensor, " vocab"] | None,
    targets: Int[Tensor, " scored"],
    *,
    config: object,
    dtype: torch.dtype,
    cut: tuple[int, int],
) -> Float[Tensor, " scored"]:
    """The one pass: products in `dtype`, `cut` into chunks of so many rows, of which so many are
    kept. `config` says what the family does to its logits."""
    rows, keep = cut
    cap, factor = _cap(config), _factor(config)
    if factor != 1.0:
        hidden = at_least_fp32(hidden) * factor
        bias = None if bias is None else at_least_fp32(bias) * factor
    if cap is not None or bias is not None:
        rows = max(1, rows // 4)  # whose logits stand there in fp32, once more or twice
    return _LinearHead.apply(  # pyright: ignore[reportReturnType]
        hidden, weight, bias, targets, dtype, cap, rows, keep, torch.is_grad_enabled()
    )


def in_one_pass(lm: LanguageModel) -> bool:
    """Whether the head is a matrix whose logits the one pass knows, and was not found wrong."""
    head = lm.causal.get_output_embeddings()
    assert head is not None
    return lm.plan.one_pass and _is_plain(head, lm.causal.config)


def kept_bytes(lm: LanguageModel, kept_elements: int | None = None) -> tuple[int, int | None]:
    """What head_logps keeps for the backward pass beside saved tensors: bytes for each scored
    token, and the most it keeps of all; None where nothing ends it."""
    head = lm.causal.get_output_embeddings()
    assert head is not None
    if not in_one_pass(lm):
        return 0, None
    if kept_elements is None:
        kept_elements = elements(lm.device)[1]
    weight = next(head.parameters())
    width = _product_dtype(lm, weight).itemsize
    if not any(p.requires_grad for p in head.parameters()):
        # the hidden state's gradient, whose sums are fp32
        return max(4, width) * weight.shape[1], None
    return width * lm.vocab_size, width * kept_elements


def _product_dtype(lm: LanguageModel, weight: Tensor) -> torch.dtype:
    return lm.compute_dtype if weight.dtype == torch.float32 else weight.dtype


def _is_plain(head: nn.Module, config: object) -> bool:
    """A matrix, with what the one pass knows of what families do to its logits. What they do beside
    that is found by the proof at start."""
    return type(head) is nn.Linear and (_cap(config) is None or _factor(config) == 1.0)


def _cap(config: object) -> float | None:
    """Gemma 2's."""
    return getattr(config, "final_logit_softcapping", None)


def _factor(config: object) -> float:
    """Cohere's factor, Granite's divisor."""
    scale, divisor = (getattr(config, key, None) for key in ("logit_scale", "logits_scaling"))
    return (1.0 if scale is None else scale) / (1.0 if divisor is None else divisor)


class _LinearHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "scored width"],
        weight: Float[Tensor, "vocab width"],
        bias: Float[Tensor, " vocab"] | None,
        targets: Int[Tensor, " scored"],
        dtype: torch.dtype,
        cap: float | None,
        rows: int,
        keep: int,
        learn: bool,
    ) -> Float[Tensor, " scored"]:
        h, w = hidden.to(dtype), weight.to(dtype)
        frozen = not any(ctx.needs_input_grad[1:3])
        done: list[tuple[Tensor, Tensor, Tensor]] = []
        kept: list[Tensor | None] = []
        for first in range(0, len(h), rows):
            y = targets[first : first + rows]
            e, total, pull, logps = _exponentials(h[first : first + rows], w, y, bias, cap)
            done.append((total, pull, logps))
            if learn and frozen:
                kept.append((pull[:, None] * w[y] - _product(e, w)) / total[:, None])
            else:
                kept.append(e if learn and first + len(y) <= keep else None)
        if not done:
            return hidden.new_zeros(0, dtype=torch.float32)
        total, pull, logps = (torch.cat(pieces) for pieces in zip(*done, strict=True))
        ctx.save_for_backward(h, w, bias, targets, total, pull)
        ctx.cap, ctx.rows, ctx.frozen, ctx.kept = cap, rows, frozen, kept
        ctx.given = hidden.dtype, weight.dtype
        return logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h, w, bias, targets, total, pull = ctx.saved_tensors
        kept: list[Tensor | None] = ctx.kept
        slope = grads[0]
        dh = torch.empty(h.shape, dtype=ctx.given[0], device=h.device)
        if ctx.frozen:
            for n, piece in enumerate(kept):
                at = slice(n * ctx.rows, n * ctx.rows + ctx.rows)
                assert piece is not None, "the graph of a frozen head is gone back through once"
                kept[n] = None
                dh[at] = slope[at, None] * piece
            return dh, *[None] * 8
        dw = torch.zeros_like(w, dtype=ctx.given[1])
        db = None if bias is None else torch.zeros_like(bias, dtype=total.dtype)
        share = (slope / total)[:, None]
        own = share * pull[:, None]
        for n, e in enumerate(kept):
            at = slice(n * ctx.rows, n * ctx.rows + ctx.rows)
            y, states = targets[at], h[at]
            kept[n] = None
            if e is None:
                e = _exponentials(states, w, y, bias, ctx.cap)[0]
            dh[at] = own[at] * w[y] - share[at] * _product(e, w)
            _subtract_product(dw, e.T, (share[at] * states).to(h.dtype))
            dw.index_add_(0, y, (own[at] * states).to(dw.dtype))
            if db is not None:
                db -= _product(share[at].T.to(h.dtype), e)[0]
                db.index_add_(0, y, own[at, 0])
        return dh, dw, db if db is None or bias is None else db.to(bias.dtype), *[None] * 6


def _exponentials(
    h: Float[Tensor, "rows width"],
    w: Float[Tensor, "vocab width"],
    y: Int[Tensor, " rows"],
    bias: Float[Tensor, " vocab"] | None,
    cap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(e, S, R, log p) of rows, all but log p scaled by one factor a row; e in `h`'s dtype, the
    rest in at least fp32. S is R and the target's exponential: 1 + R but for rounding and the
    factor. With a cap, e and R (but not the one in S) are multiplied by the cap's slopes.

    Where a product's output is rounded to `h`'s dtype, a bf16 logit of 20 would be 0.06 nats off.
    So the target's own logit is taken in fp32 and subtracted inside the product, before rounding:
    what is rounded is z - z_y, and log p is accurate relative to itself, near 0 too.
    """
    exact = torch.float64 if h.dtype == torch.float64 else torch.float32
    at_target = (h.to(exact) * w[y].to(exact)).sum(-1)
    if _writes_fp32(h.device.type, h.dtype):
        taken = at_target
        z = _product(h, w.T).sub_(taken[:, None])
    else:
        rounded = at_target.to(h.dtype)
        taken = rounded.to(exact)
        z = torch.addmm(-rounded[:, None], h, w.T)
    left, slopes, own_slope = at_target - taken, None, None
    if bias is not None or cap is not None:
        z = z.to(exact).add_(taken[:, None])
        z, slopes, own_slope = _changed(z, at_target, y, bias, cap)
        left = torch.zeros_like(at_target)
    top = z.amax(-1)
    # exp overflows at 88.
    if z.device.type in WAITING_DEVICES or bool((top > 60).any()):
        top = top.clamp(min=0)
        z -= top[:, None]
        shift = top.to(exact)
    else:
        shift = torch.zeros_like(at_target)
    e = z.exp_()
    assert z.device.type in WAITING_DEVICES or bool((y >= 0).all()), "a target is no token"
    # scatter_ takes a half-precision matrix to fp32 and back on a CPU, all of it.
    e.view(-1).index_fill_(0, torch.arange(len(y), device=y.device) * e.shape[1] + y, 0.0)
    rest = _row_sums(e)
    left = left - shift
    own = left.exp()
    total = own + rest
    logps = torch.where(shift > 0, left - total.log(), -torch.log1p(rest / own))
    if slopes is not None and own_slope is not None:
        e, rest = e.mul_(slopes), rest * own_slope
    return e.to(h.dtype), total, rest, logps


def _changed(
    z: Float[Tensor, "rows vocab"],
    at_target: Float[Tensor, " rows"],
    y: Int[Tensor, " rows"],
    bias: Float[Tensor, " vocab"] | None,
    cap: float | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """z - z_y with a bias and a cap, written into the products `z`, which are `at_target` at the
    targets; and the cap's slopes, all of them and the targets'."""
    if bias is not None:
        z += bias
        at_target = at_target + bias[y]
    if cap is None:
        return z.sub_(at_target[:, None]), None, None
    own = torch.tanh(at_target / cap)
    slopes = z.div_(cap).tanh_().square().neg_().add_(1)
    return z.sub_(own[:, None]).mul_(cap), slopes, 1 - own.square()


def _product(
    a: Float[Tensor, "rows inner"], b: Float[Tensor, "inner columns"]
) -> Float[Tensor, "rows columns"]:
    """a b, in fp32 where the device writes that, and otherwise rounded to their dtype."""
    if _writes_fp32(a.device.type, a.dtype):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


def _subtract_product(
    total: Float[Tensor, "rows columns"],
    a: Float[Tensor, "rows inner"],
    b: Float[Tensor, "inner columns"],
) -> None:
    """total -= a b, inside the product where the device does that in fp32. Elsewhere the product
    stands in its own dtype for a while, and its rounding is that of one chunk."""
    if total.dtype == torch.float32 and _adds_fp32(a.device.type, a.dtype):
        torch.addmm(total, a, b, out_dtype=torch.float32, alpha=-1, out=total)
    else:
        total -= a @ b


@cache
def _writes_fp32(device: str, dtype: torch.dtype) -> bool:
    """Whether torch.mm gives half-precision products in fp32."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        return torch.mm(a, b, out_dtype=torch.float32)

    return _in_fp32(product, device, dtype)


@cache
def _adds_fp32(device: str, dtype: torch.dtype) -> bool:
    """Whether torch.addmm adds half-precision products to an fp32 matrix where that lies."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        total = torch.zeros(len(a), b.shape[1], device=a.device)
        for alpha in (2, -1):
            torch.addmm(total, a, b, out_dtype=torch.float32, alpha=alpha, out=total)
        return total

    return _in_fp32(product, device, dtype)


def _in_fp32(product: Callable[[Tensor, Tensor], Tensor], device: str, dtype: torch.dtype) -> bool:
    """Tried once on a sum that the dtype itself cannot hold."""
    if device not in FP32_DEVICES or dtype not in (torch.bfloat16, torch.float16):
        return False
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    small = ones.clone()
    small[:, 0] = 2**-12
    try:
        found = product(ones, small.T)
    except (RuntimeError, TypeError):
        return False
    return found.dtype == torch.float32 and bool((found == 15 + 2**-12).all())


def _row_sums(e: Float[Tensor, "rows vocab"], block: int = 512) -> Float[Tensor, " rows"]:
    """In at least fp32. A half-precision row is summed in blocks by the kernel that accumulates in
    fp32 and rounds once a block: thirty times faster than converting, and the roundings of a
    hundred blocks cancel to some 1e-4."""
    if e.dtype in (torch.float32, torch.float64):
        return e.sum(-1)
    whole = e.shape[1] // block * block
    blocks = e[:, :whole].unflatten(1, (-1, block)).sum(-1)
    return blocks.float().sum(-1) + e[:, whole:].float().sum(-1)


def _adjusted_logps(
    head: nn.Module,
    config: object,
    hidden: Float[Tensor, "scored width"],
    targets: Int[Tensor, " scored"],
    rows: int,
) -> Float[Tensor, " scored"]:
    """Any head, chunk by chunk, its logits dropped at once and recomputed in the backward pass."""

    def chunk_logps(states: Tensor, wanted: Tensor) -> Tensor:
        return read(logits(head, config, states), wanted)

    pieces = [
        checkpoint(chunk_logps, states, wanted, use_reentrant=False)
        if torch.is_grad_enabled()
        else chunk_logps(states, wanted)
        for states, wanted in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return torch.cat(pieces) if pieces else hidden.new_zeros(0, dtype=torch.float32)


def read(
    scores: Float[Tensor, "rows vocab"], targets: Int[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    """The log-softmax of each row at its target, in the scores' dtype.

    Not by cross_entropy: torch's fp32 kernel on the CPU sums a row of 49,152 in an order that puts
    each token 1e-5 nats too high, always to the same side.
    """
    return scores.gather(1, targets[:, None])[:, 0] - scores.logsumexp(-1)


def at_least_fp32(scores: Tensor) -> Tensor:
    return scores if scores.dtype == torch.float64 else scores.float()


def logits(head: nn.Module, config: object, states: Float[Tensor, "n width"]) -> Tensor:
    """The head's logits in at least fp32, with the adjustments that families make to them."""
    with torch.autocast(states.device.type, enabled=False):
        weight = next(head.parameters())
        out = head(states.to(weight.dtype))
    return adjusted(at_least_fp32(out), None, config)


def adjusted(
    product: Float[Tensor, "n vocab"], bias: Float[Tensor, " vocab"] | None, config: object
) -> Float[Tensor, "n vocab"]:
    """What a family makes of a product of hidden states and matrix."""
    out = product if bias is None else product + bias
    if (cap := _cap(config)) is not None:
        out = cap * torch.tanh(out / cap)
    return out * factor if (factor := _factor(config)) != 1.0 else out
