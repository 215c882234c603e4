"""What a variable-length kernel is called with: the runs of a forest, and each run's keys gathered.

It is the path on CUDA (attention.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from upweight.types import Span, sent


@dataclass(frozen=True)
class VarlenPlan:
    """Boundaries of the query runs and of their gathered keys, for one variable-length call.

    The runs [prompt; first response], second response, third response, ... lie end to end in the
    forest, so queries are taken as they are. Each run's keys end with the run itself, which is why
    the causal mask must be aligned to the bottom right.

    `places` are where in `keys` a forest's tokens are: the first has every token once, in their
    order, the others again the prompts of the second, third ... responses.
    """

    keys: Int[Tensor, " gathered"]
    cu_q: Int[Tensor, " runs1"]
    cu_k: Int[Tensor, " runs1"]
    max_q: int
    max_k: int
    places: tuple[Int[Tensor, " _"], ...] = ()


def varlen_plan(spans: tuple[Span, ...], device: torch.device | str = "cpu") -> VarlenPlan:
    # One row for each run: where its prompt lies, how long that is, how long its response, and the
    # number of that in its tree.
    runs = torch.tensor(
        [
            (span.start, span.prompt, length, index)
            for span in spans
            for index, length in enumerate(span.responses or (0,))
        ]
    )
    prompt_at, prompt, response, index = runs.unbind(1)
    num_q, num_k = response + prompt * (index == 0), prompt + response
    end_q, end_k = num_q.cumsum(0), num_k.cumsum(0)
    # A run's keys count up from the start of its prompt, and go on at that of its response.
    inside = torch.arange(int(end_k[-1])) - (end_k - num_k).repeat_interleave(num_k)
    skipped = (end_q - response - prompt_at - prompt).repeat_interleave(num_k)
    behind = inside >= prompt.repeat_interleave(num_k)
    keys = prompt_at.repeat_interleave(num_k) + inside + skipped * behind
    again = index.repeat_interleave(num_k).masked_fill_(behind, 0)
    places = [(again == n).nonzero()[:, 0] for n in range(int(index.max()) + 1)]

    def offsets(ends: Tensor) -> Tensor:
        return sent(F.pad(ends.int(), (1, 0)), device)

    return VarlenPlan(
        keys=sent(keys, device),
        cu_q=offsets(end_q),
        cu_k=offsets(end_k),
        max_q=int(num_q.max()),
        max_k=int(num_k.max()),
        places=tuple(sent(some, device) for some in places),
    )


class _Gathered(torch.autograd.Function):
    """x[plan.keys]. Indexing's own gradient would sort the keys in every layer, and index_select's
    add bf16 to bf16, in any order; here each of a prompt's copies is added in fp32, in turn."""

    @staticmethod
    def forward(
        ctx: Any, x: Float[Tensor, "tokens heads dim"], plan: VarlenPlan
    ) -> Float[Tensor, "gathered heads dim"]:
        ctx.plan = plan
        return x.index_select(0, plan.keys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        first, *others = ctx.plan.places
        total = grads[0].index_select(0, first)
        if others:
            total = total.to(torch.float64 if total.dtype == torch.float64 else torch.float32)
        for some in others:
            again = grads[0].index_select(0, some).to(total.dtype)
            total.index_add_(0, ctx.plan.keys[some], again)
        return total.to(grads[0].dtype), None


def gathered(
    x: Float[Tensor, "tokens heads dim"], plan: VarlenPlan
) -> Float[Tensor, "gathered heads dim"]:
    """Keys or values in the order of the runs, contiguous."""
    return _Gathered.apply(x, plan)  # pyright: ignore[reportReturnType]


VarlenKernel = Callable[[Tensor, Tensor, Tensor, VarlenPlan, float, int | None], Tensor]


def torch_varlen(
    query: Float[Tensor, "tokens heads dim"],
    key: Float[Tensor, "gathered kv_heads dim"],
    value: Float[Tensor, "gathered kv_heads dim"],
    plan: VarlenPlan,
    scale: float,
    window: int | None,
) -> Float[Tensor, "tokens heads dim"]:
    """torch.nn.attention.varlen, causal to the bottom right, half precision on CUDA only.

    Fewer key heads than query heads go in as they are where it says that it takes them (torch
    2.12 does); elsewhere they are repeated.
    """
    from torch.nn.attention.varlen import varlen_attn

    left = -1 if window is None else window - 1
    grouped: dict[str, Any] = {}
    if (times := query.shape[1] // key.shape[1]) > 1:
        if _takes_groups(varlen_attn):
            grouped["enable_gqa"] = True
        else:
            key, value = (x.repeat_interleave(times, dim=1) for x in (key, value))
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
        **grouped,
    )
    assert isinstance(out, Tensor)
    return out


@cache
def _takes_groups(operator: Callable[..., Any]) -> bool:
    return "enable_gqa" in signature(operator).parameters
