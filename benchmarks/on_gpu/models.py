"""Models of random weights, made where they are used, and rows for them."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from upweight.models.load import ForwardPlan, LanguageModel
from upweight.types import Preference, ResponseId, RowId, Tree

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Size:
    """A model to be timed: Llama's layers, with these widths."""

    name: str
    config: Mapping[str, Any]
    lora: bool = False


def llama(width: int, inner: int, layers: int, heads: tuple[int, int], vocab: int) -> dict:
    return dict(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        max_position_embeddings=4096,
    )


SIZES = (
    Size("0.5B, full", {**llama(896, 4864, 24, (14, 2), 151_936), "tie_word_embeddings": True}),
    Size("1.5B, full", {**llama(1536, 8960, 28, (12, 2), 151_936), "tie_word_embeddings": True}),
    Size("8B, LoRA", llama(4096, 14336, 32, (32, 8), 128_256), lora=True),
)
Shapes = Mapping[tuple[int, int, int], int]
SHAPES: Shapes = {(150, 50, 50): 64, (1000, 300, 300): 16, (200, 400, 400): 32}
"""Tokens of prompt, chosen and rejected, and how many such pairs make a step."""

TOY_SIZES = (
    Size("toy, full", {**llama(64, 128, 2, (4, 2), 1000), "tie_word_embeddings": True}),
    Size("toy, LoRA", llama(64, 128, 2, (4, 2), 1000), lora=True),
)
TOY_SHAPES: Shapes = {(15, 5, 5): 8, (100, 30, 30): 4, (20, 40, 40): 4}

_SMALL = {**llama(128, 256, 2, (4, 2), 1000), "head_dim": 32}
FAMILIES = {
    "llama": _SMALL,
    "mistral": {**_SMALL, "sliding_window": 8, "tie_word_embeddings": True},
    "gemma2": {
        **_SMALL,
        "sliding_window": 8,
        "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": 2.0,
    },
}
"""What is checked: a plain model, windows on a tied head, capped scores and logits."""

CHECKED_SHAPES = ((14, 7, 1, 11), (1, 4, 6), (70, 33), (9, 2, 12, 5, 1))


def build(
    family: str, config: Mapping[str, Any], compute: torch.dtype, device: str
) -> LanguageModel:
    """A model of random fp32 weights, made where it is used, and what a run would know of it."""
    torch.manual_seed(0)
    with torch.device(device):
        made = AutoConfig.for_model(family, **config)
        model = AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
    name = f"random {family}"
    tokenizer = words(config["vocab_size"])
    return LanguageModel(model, tokenizer, name, "", torch.device(device), compute, ForwardPlan())


@torch.no_grad()
def as_saved_in_bf16(lm: LanguageModel) -> LanguageModel:
    """`lm` with weights that lose nothing in bf16, as those of most models."""
    for parameter in lm.model.parameters():
        parameter.copy_(parameter.bfloat16())
    return lm


@functools.lru_cache(1)
def words(vocab: int) -> PreTrainedTokenizerFast:
    """A word for every id, the last of which ends a response."""
    ids = {f"w{i}": i for i in range(vocab - 1)} | {"</s>": vocab - 1}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="w0")


def random_trees(shapes: Sequence[Sequence[int]], vocab: int) -> list[Tree]:
    """A tree for each (prompt length, response lengths ...); its first response is preferred."""
    draw = random.Random(0)

    def ids(num: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocab - 1) for _ in range(num))

    return [
        Tree(
            prompt=ids(prompt),
            responses=tuple((*ids(n - 1), vocab - 1) for n in responses),
            preferences=tuple(Preference(0, k) for k in range(1, len(responses))),
            ids=tuple(ResponseId(RowId("random", line), k) for k in range(len(responses))),
            stopped=(True,) * len(responses),
        )
        for line, (prompt, *responses) in enumerate(shapes, 1)
    ]
