"""An adapted layer as one function: its product, with the adapter's added to it in place.

peft computes the base's output, the adapter's, scales that, and adds the two: four passes over an
output that is as wide as the layer, and as many over its gradient. Here the adapter's product is
accumulated onto the base's, scaled on the way, in both directions. Where the layer is not of the
plain kind, peft's own forward is called.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn


def fuse_adapters(wrapped: nn.Module) -> None:
    """Every adapted linear layer of `wrapped`, without dropout, through `adapted_product`."""
    from peft.tuners.lora import Linear

    for module in wrapped.modules():
        if isinstance(module, Linear) and type(module.get_base_layer()) is nn.Linear:
            plain = cast(Callable[..., Tensor], module.forward)  # pyright: ignore
            vars(module)["forward"] = partial(_forward, module, plain)


def _forward(
    layer: Any, plain: Callable[..., Tensor], x: Tensor, *rest: Any, **more: Any
) -> Tensor:
    (name, *others) = layer.active_adapters or [None]
    off = layer.disable_adapters or layer.merged or others or layer.lora_variant or rest or more
    if off or not isinstance(layer.lora_dropout[name], nn.Identity):
        return plain(x, *rest, **more)
    base, a, b = layer.get_base_layer(), layer.lora_A[name].weight, layer.lora_B[name].weight
    dtype = _compute_dtype(x)
    given = [x, base.weight, *([] if base.bias is None else [base.bias]), a, b]
    if dtype is None and len({tensor.dtype for tensor in given}) > 1:
        return plain(x)
    x, weight, bias, a, b = (
        None if tensor is None else tensor.to(dtype or x.dtype)
        for tensor in (x, base.weight, base.bias, a, b)
    )
    return adapted_product(x, weight, bias, a, b, float(layer.scaling[name]))


def _compute_dtype(x: Tensor) -> torch.dtype | None:
    """That of autocast, which a function of our own takes no part in."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def adapted_product(
    x: Float[Tensor, "*batch width"],
    weight: Float[Tensor, "out width"],
    bias: Float[Tensor, " out"] | None,
    a: Float[Tensor, "rank width"],
    b: Float[Tensor, "out rank"],
    scaling: float,
) -> Float[Tensor, "*batch out"]:
    """x W^T + bias + scaling (x A^T) B^T. All in one dtype; gradients reach x, A and B alone.

    Hu et al. 2021, arXiv:2106.09685, equation 3.
    """
    product: Tensor = _Adapted.apply(x, weight, bias, a, b, scaling)  # pyright: ignore
    return product


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ a.T
        out = nn.functional.linear(rows, weight, bias)
        out.addmm_(low, b.T, alpha=scaling)
        ctx.save_for_backward(rows, low, weight, a, b)
        ctx.scaling = scaling
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = grads
        rows, low, weight, a, b = ctx.saved_tensors
        of_out = slope.reshape(-1, slope.shape[-1])
        of_low = of_out @ b
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = of_out @ weight
            of_x.addmm_(of_low, a, alpha=ctx.scaling)
            of_x = of_x.view(*slope.shape[:-1], -1)
        of_a = (of_low.T @ rows).mul_(ctx.scaling)
        of_b = (of_out.T @ low).mul_(ctx.scaling)
        return of_x, None, None, of_a, of_b, None
