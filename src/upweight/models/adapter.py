"""LoRA: an adapter on a model, and the model without it as its own reference."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from upweight.errors import ModelError
from upweight.models import bnb
from upweight.models.load import LanguageModel
from upweight.models.logprobs import scored_hidden, token_logps
from upweight.models.named import first_lines
from upweight.models.nf4 import Nf4Linear
from upweight.models.proof import probe_forest
from upweight.models.weights import quiet_peft, require_untied, tied_modules


def most_change(lm: LanguageModel) -> float:
    """How far an element of a weight moves at most per unit that every element of a LoRA's second
    factor moves, which starts at 0: the scaling times the largest sum over the ranks of the first
    factor's sizes."""
    layers = [module for module in lm.model.modules() if hasattr(module, "lora_A")]
    return max(
        float(layer.scaling[name]) * float(a.weight.detach().abs().sum(0).max())
        for layer in cast("list[Any]", layers)
        for name, a in layer.lora_A.items()
    )


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
    with bnb.quiet():
        from peft import LoraConfig, get_peft_model

        from upweight.models.lowrank import fuse_adapters
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
    except (RuntimeError, MemoryError) as error:  # out of memory, by the allocator or Python
        raise ModelError(
            f"lora.rank {rank:,} cannot be put on {lm.name}: {first_lines(error)}. Use a smaller "
            "rank; 8 to 64 are common."
        ) from error
    require_untied(f"lora.targets {targets!r}", tied, wrapped.targeted_module_names)
    wrapped.eval()
    if dropout:
        for name, module in wrapped.named_modules():
            if name.endswith("lora_dropout"):
                module.train()
    _convert_inputs_once(wrapped)
    fuse_adapters(wrapped)
    return replace(lm, model=wrapped)


def _convert_inputs_once(wrapped: nn.Module) -> None:
    """Under autocast an adapted layer's input is converted once, for the base's product and the
    adapter's. peft would convert it to the adapter's fp32, and autocast that back again, and each
    copy would be kept for the backward pass."""
    from peft.tuners.lora import LoraLayer

    for module in wrapped.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False
            assert isinstance(module, nn.Module)
            module.register_forward_pre_hook(_in_compute_dtype)


def _in_compute_dtype(_module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    x, *others = given
    if torch.is_autocast_enabled(x.device.type) and x.is_floating_point():
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return (x, *others)


def keep_frozen_in_compute_dtype(lm: LanguageModel) -> None:
    """The frozen matrices of the layers, kept as autocast would convert them for every product.

    That takes half the memory, and a conversion less each time. Only those that lose nothing by it:
    weights that were trained and saved in bf16, as most are. Left alone where the log-probs of a
    probe are then not the same to the bit.
    """
    if lm.compute_dtype == torch.float32 or lm.dtype != torch.float32:
        return
    before = _probe_logps(lm)
    kept = [m for m in _frozen_matrices(lm) if _fits(m.weight, lm.compute_dtype)]
    _convert(kept, lm.compute_dtype)
    try:
        same = torch.equal(_probe_logps(lm), before)
    except RuntimeError:  # a layer of the family's own, which takes no part in autocast
        same = False
    if not same:
        _convert(kept, torch.float32)


def _frozen_matrices(lm: LanguageModel) -> list[Any]:
    """Without embedding and head, whose numbers are read outside of autocast too, and without what
    is in four bits, which is read in the dtype that is asked for."""
    from transformers.pytorch_utils import Conv1D

    ends = (lm.causal.get_input_embeddings(), lm.causal.get_output_embeddings())
    apart = {id(p) for end in ends if end is not None for p in end.parameters()}
    return [
        module
        for module in lm.causal.modules()
        if isinstance(module, nn.Linear | Conv1D)
        and not isinstance(module, Nf4Linear)
        and not module.weight.requires_grad
        and id(module.weight) not in apart
    ]


class Converted:
    """Plain frozen matrices in the dtype that autocast would convert them to, the same numbers,
    for each product anew. Kept beside the matrices themselves, which stand in their places except
    in the block of `in_place`."""

    def __init__(self, lm: LanguageModel) -> None:
        from transformers.pytorch_utils import Conv1D

        mixed = lm.dtype == torch.float32 and lm.compute_dtype != torch.float32
        # Those that want a gradient autocast keeps, for as long as it is on.
        wide = [m for m in _frozen_matrices(lm) if m.weight.dtype == torch.float32 and mixed]
        self.modules = [m for m in wide if type(m) in (nn.Linear, Conv1D)]
        self.narrow = [m.weight.data.to(lm.compute_dtype) for m in self.modules]

    @contextlib.contextmanager
    def in_place(self) -> Generator[None]:
        wide = [m.weight.data for m in self.modules]
        try:
            _put(self.modules, self.narrow)
            yield
        finally:
            _put(self.modules, wide)

    def gives_the_same(self, lm: LanguageModel) -> bool:
        """Whether a probe's hidden states are the same to the bit in place: a layer of the family's
        own may take no part in autocast, or read its weights with all their digits."""
        if not self.modules:
            return True
        probe = probe_forest(lm).to(lm.device)
        with torch.no_grad():
            before = scored_hidden(lm, probe)
            try:
                with self.in_place():
                    return torch.equal(scored_hidden(lm, probe), before)
            except RuntimeError:
                return False


def _put(modules: Sequence[Any], weights: Sequence[Tensor]) -> None:
    for module, weight in zip(modules, weights, strict=True):
        module.weight.data = weight


def _fits(weight: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(weight.to(dtype).to(weight.dtype), weight)


def _convert(modules: Sequence[Any], dtype: torch.dtype) -> None:
    for module in modules:
        module.weight.data = module.weight.data.to(dtype)


def _probe_logps(lm: LanguageModel) -> Tensor:
    with torch.no_grad():
        return token_logps(lm, probe_forest(lm))


@contextlib.contextmanager
def widened(lm: LanguageModel) -> Generator[None]:
    """Frozen matrices in fp32 for as long as each is used, for a forward pass without autocast."""
    narrow = [m for m in _frozen_matrices(lm) if m.weight.dtype != lm.dtype]
    dtypes = {module: module.weight.dtype for module in narrow}

    def widen(module: nn.Module, _given: object) -> None:
        _convert([module], lm.dtype)

    def restore(module: nn.Module, _given: object, _out: object) -> None:
        _convert([module], dtypes[module])

    handles = [module.register_forward_pre_hook(widen) for module in narrow]
    handles += [module.register_forward_hook(restore) for module in narrow]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def adapter_off(lm: LanguageModel) -> Generator[LanguageModel]:
    """`lm` as its own reference: the same weights with the adapter switched off."""
    assert lm.has_adapter
    with lm.model.disable_adapter(), torch.no_grad():  # pyright: ignore
        yield lm
