"""What the forward pass keeps for the backward pass, in host memory until then."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from upweight.models.load import LanguageModel

SMALLEST = 1 << 16
"""Numbers from which on a tensor is moved: a transfer of fewer costs more than it saves."""


@contextlib.contextmanager
def offloaded(lm: LanguageModel) -> Generator[None]:
    """In the block, activations that autograd saves go to pinned host memory, where `lm.offload`
    says so, and come back when the backward pass asks for them. To the bit the same gradients.

    Weights stay where they are: autograd saves them too, and they are on the device anyway. So do
    their copies in the dtype of matrix products, told by their shape, which every bin would move
    again. What a recomputed layer begins with is moved like anything else.
    """
    if not lm.offload:
        yield
        return
    weights = {p.untyped_storage().data_ptr() for p in lm.model.parameters()}
    matrices = {tuple(p.shape) for p in lm.model.parameters() if p.dim() == 2}
    matrices |= {(columns, rows) for rows, columns in matrices}
    host: Any = torch.autograd.graph.save_on_cpu(pin_memory=lm.device.type == "cuda")

    def pack(tensor: Tensor) -> object:
        at = tensor.untyped_storage().data_ptr()
        if tensor.numel() < SMALLEST or at in weights or tuple(tensor.shape) in matrices:
            return tensor.detach()  # the tensor itself would hold its own graph
        return host.pack_hook(tensor)

    def unpack(kept: object) -> Tensor:
        return kept if isinstance(kept, Tensor) else host.unpack_hook(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
