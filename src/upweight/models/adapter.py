"""LoRA: an adapter on a model, and the model without it as its own reference."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import replace

import torch
from torch import nn

from upweight.errors import ModelError
from upweight.models.load import LanguageModel
from upweight.models.weights import first_lines, quiet_peft, require_untied, tied_modules


def add_lora(
    lm: LanguageModel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: str | list[str],
    seed: int,
) -> LanguageModel:
    """`lm` with a fresh LoRA adapter (Hu et al. 2021, arXiv:2106.09685), the base frozen.

    B starts at zero, so the policy starts as its reference. Raises ModelError when `targets` match
    no layer, when they name a matrix that is embedding and head at once, and when peft refuses.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in lm.causal.modules()),
    )
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in lm.causal.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    tied = tied_modules(lm.causal)
    torch.manual_seed(seed)
    try:
        with quiet_peft():
            wrapped = get_peft_model(lm.causal, config)
    except (ValueError, TypeError) as error:
        unmatched = "not found in the base model" in str(error)
        raise ModelError(
            f"lora.targets {targets!r} {'match no layer of' if unmatched else 'cannot be used on'} "
            f"{lm.name}; its linear layers are called: "
            f"{', '.join(sorted(names))}. Use lora.targets=all-linear for all of them. peft says: "
            f"{first_lines(error)}"
        ) from error
    require_untied(f"lora.targets {targets!r}", tied, wrapped.targeted_module_names)
    wrapped.eval()
    if dropout:
        for name, module in wrapped.named_modules():
            if name.endswith("lora_dropout"):
                module.train()
    return replace(lm, model=wrapped)


@contextlib.contextmanager
def adapter_off(lm: LanguageModel) -> Generator[LanguageModel]:
    """`lm` as its own reference: the same weights with the adapter switched off."""
    assert lm.has_adapter
    with lm.model.disable_adapter(), torch.no_grad():  # pyright: ignore
        yield lm
