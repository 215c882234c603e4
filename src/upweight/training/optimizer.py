"""AdamW with decay on matrices only, and gradient clipping by a norm that is summed in fp32."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from upweight.errors import ModelError
from upweight.models.bnb import package

FUSED_DEVICES = frozenset({"cpu", "cuda", "mps", "xpu"})
"""Where AdamW has a fused kernel: one pass over memory in place of about ten."""


MOMENT_BYTES = {"float32": 4, "8bit": 1}


def require_moments(moments: str) -> None:
    """Raises ModelError where 8-bit moments are asked for and bitsandbytes is not there."""
    if moments == "8bit":
        _eight_bit()


def _eight_bit() -> Any:
    return package("optim", "optimizer.moments=8bit", "eightbit").AdamW8bit


def make_optimizer(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    moments: str = "float32",
    value_prefix: str | None = None,
    value_rate_factor: float = 1.0,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) over the model's trainable parameters.

    Parameters whose name begins with `value_prefix` are a part of their own, whose rate is the
    others' times a factor (fit() reads both from the groups). Two groups for each part, each with
    its parameters' names: matrices (two dimensions or more, embeddings and LoRA factors among them)
    decay, gains and biases do not. A tied parameter is in it once.
    With "8bit" moments, those of 4,096 numbers and more are kept in blocks of 8-bit numbers
    (Dettmers et al. 2022, arXiv:2110.02861). Raises ModelError when the model has no trainable
    parameter, or bitsandbytes is missing.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ModelError(
            "the model has no trainable parameter: every one is frozen. Train it whole, or with "
            "lora: true."
        )
    groups: list[dict[str, Any]] = []
    for part, factor in (("policy", 1.0), ("value", value_rate_factor)):
        is_value = part == "value"
        own = [
            (name, p)
            for name, p in trainable
            if (value_prefix is not None and name.startswith(value_prefix)) == is_value
        ]
        matrices = [(name, p) for name, p in own if p.ndim >= 2]
        others = [(name, p) for name, p in own if p.ndim < 2]
        groups += [
            {"params": named, "weight_decay": decay, "part": part, "rate_factor": factor}
            for named, decay in ((matrices, weight_decay), (others, 0.0))
            if named
        ]
    if moments == "8bit":
        made = _eight_bit()(groups, lr=learning_rate, betas=(beta1, beta2), eps=epsilon)
        assert isinstance(made, torch.optim.Optimizer)
        return made
    return torch.optim.AdamW(
        groups,
        lr=learning_rate,
        betas=(beta1, beta2),
        eps=epsilon,
        fused=all(p.device.type in FUSED_DEVICES for _, p in trainable),
    )


def room_for_moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """As much memory as the optimizer's state will take, until it is let go."""
    dtype = torch.float32 if isinstance(optimizer, torch.optim.AdamW) else torch.uint8
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [torch.empty_like(p, dtype=dtype) for p in parameters for _ in range(2)]


@torch.no_grad()
def clip(parameters: Iterable[Tensor], max_norm: float | None) -> Float[Tensor, ""]:
    """Scales the gradients so that their joint Euclidean norm is at most `max_norm`.

    Returns the norm before scaling, as an fp32 scalar on the gradients' device, whatever their
    dtype; None only measures, no gradients give 0. A norm that is not finite is returned as it
    is and then the gradients are worthless too: look at it before the optimizer's step.
    """
    with_gradient = [p for p in parameters if p.grad is not None]
    if not with_gradient:
        return torch.zeros((), dtype=torch.float32)
    norms = [_norm(p.grad) for p in with_gradient if p.grad is not None]
    total = _norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(with_gradient, max_norm, total)
    return total


def _norm(values: Tensor) -> Float[Tensor, ""]:
    # Rows first: one fp32 sum over an embedding's 3e7 squares is 1e-3 too small on CPU.
    rows = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)
    return torch.linalg.vector_norm(rows)
