"""What a step cannot cost less than, and how fast this machine multiplies matrices.

The share of the peak that compare.py prints is (operations of the unique tokens / seconds) /
(operations per second of plain matrix products at the model's own shapes).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from upweight.types import Tree


@dataclass(frozen=True)
class ModelShape:
    """The trunk's matrices (out, in) with how often each occurs, the head's, and the attention's.

    `attention` is layers times query heads times head width.
    """

    trunk: dict[tuple[int, int], int]
    head: tuple[int, int]
    attention: int

    @property
    def trunk_size(self) -> int:
        return sum(out * width * times for (out, width), times in self.trunk.items())

    @property
    def head_size(self) -> int:
        return self.head[0] * self.head[1]


def model_shape(folder: str) -> ModelShape:
    """The shape of the model in `folder`, without its weights."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    matrices = [m.weight for m in model.base_model.modules() if isinstance(m, nn.Linear)]
    vocab, width = model.get_output_embeddings().weight.shape
    head_width = getattr(config, "head_dim", None) or width // config.num_attention_heads
    return ModelShape(
        trunk=dict(Counter((m.shape[0], m.shape[1]) for m in matrices)),
        head=(vocab, width),
        attention=config.num_hidden_layers * config.num_attention_heads * head_width,
    )


def operations(shape: ModelShape, trees: Sequence[Tree], *, lora: bool) -> float:
    """Additions and multiplications of one step's forward and backward pass over unique tokens.

    6 per trunk weight and token of [prompt; responses], 6 per head weight and scored token, and 12
    per attention channel for each (token, ancestor or itself). With frozen weights (LoRA) 4 take
    the place of the matrices' 6: they need no gradient of their own. The adapters' own products
    are left out, and so is everything that is not a matrix product.
    """
    tokens = sum(tree.num_tokens for tree in trees)
    scored = sum(len(response) for tree in trees for response in tree.responses)
    attended = 0
    for tree in trees:
        prompt = len(tree.prompt)
        attended += prompt * (prompt + 1) // 2
        attended += sum(prompt * len(r) + len(r) * (len(r) + 1) // 2 for r in tree.responses)
    per_weight = 4 if lora else 6
    matrices = per_weight * (shape.trunk_size * tokens + shape.head_size * scored)
    return matrices + 12 * shape.attention * attended


def matrix_products_per_second(
    shape: ModelShape, dtype: torch.dtype, rows: int = 2048, head_rows: int = 512
) -> float:
    """Operations per second of the three products that training makes of every matrix.

    x W^T, g W and g^T x for each distinct matrix of the trunk at `rows` tokens, and for the head
    at `head_rows`, best of three, weighted by how often the model has it.
    """
    done, seconds = 0.0, 0.0
    measured = [(*size, rows, times) for size, times in shape.trunk.items()]
    for out, width, num, times in [*measured, (*shape.head, head_rows, 1)]:
        x = torch.randn(num, width, dtype=dtype)
        w = torch.randn(out, width, dtype=dtype)
        g = torch.randn(num, out, dtype=dtype)
        best = float("inf")
        for _ in range(4):
            start = time.perf_counter()
            _ = x @ w.T, g @ w, g.T @ x
            best = min(best, time.perf_counter() - start)
        done += times * 6.0 * num * width * out
        seconds += times * best
    return done / seconds
