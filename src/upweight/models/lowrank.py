"""An adapted layer as one function: its product, with the adapter's added to it in place.

peft computes the base's output, the adapter's, scales that, and adds the two: four passes over an
output that is as wide as the layer, and as many over its gradient. Here the adapter's product is
accumulated onto the base's, scaled on the way, in both directions. Where the layer is not of the
plain kind, peft's own forward is called.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn


def fuse_adapters(wrapped: nn.Module) -> None:
    """Every adapted linear layer of `wrapped` through `adapted_product` where it can be."""
    for module in wrapped.modules():
        if type(module) is Linear:
            module.__class__ = FusedLinear


class FusedLinear(Linear):
    """peft's layer with a forward of ours. A class and no function in its place: the compiler
    takes functions that stand in modules for different programs, one for each layer."""

    def forward(self, x: Tensor, *rest: Any, **more: Any) -> Tensor:
        layer = cast("Any", self)
        (name, *others) = layer.active_adapters or [""]
        base = layer.get_base_layer()
        off = layer.disable_adapters or layer.merged or others or layer.lora_variant
        other = off or rest or more or type(base) is not nn.Linear or base.weight.requires_grad
        if other or name not in layer.lora_A or not _is_plain(layer, name):
            return super().forward(x, *rest, **more)
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        # Autocast's, which a function of our own takes no part in.
        kind, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        elif not dtype == base.weight.dtype == a.dtype == b.dtype:
            return super().forward(x)
        bias = None if base.bias is None else base.bias.to(dtype)
        x, weight, a, b = (tensor.to(dtype) for tensor in (x, base.weight, a, b))
        return adapted_product(x, weight, bias, a, b, float(layer.scaling[name]))


def _is_plain(layer: Any, name: str) -> bool:
    """Two matrices, and nothing between or behind them."""
    biased = layer.lora_A[name].bias is not None or layer.lora_B[name].bias is not None
    return isinstance(layer.lora_dropout[name], nn.Identity) and not biased


def adapted_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> Tensor:
    """x W^T + bias + scaling (x A^T) B^T. All in one dtype; gradients reach x, A and B alone.

    Of x [..., width], W [out, width], bias [out], A [rank, width] and B [out, rank]: [..., out].
    The types say no shapes because the compiler reads through this, with sizes that are symbols.

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
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        low = rows @ a.T
        out = nn.functional.linear(rows, weight, bias)
        out.addmm_(low, b.T, alpha=scaling)
        ctx.save_for_backward(rows, low, weight, a, b)
        ctx.scaling = scaling
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = grads
        rows, low, weight, a, b = ctx.saved_tensors
        of_out = slope.reshape(len(rows), slope.shape[-1])
        of_low = of_out @ b
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = of_out @ weight
            of_x.addmm_(of_low, a, alpha=ctx.scaling)
            of_x = of_x.view(*slope.shape[:-1], of_x.shape[-1])
        of_a = (of_low.T @ rows).mul_(ctx.scaling)
        of_b = (of_out.T @ low).mul_(ctx.scaling)
        return of_x, None, None, of_a, of_b, None
