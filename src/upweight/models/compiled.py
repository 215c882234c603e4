"""Decoder layers through torch.compile: what lies between the matrix products in a few kernels.

Norms, rotary embeddings, activations and casts are most of a step where matrix products are fast,
and each is a pass over memory of its own. Attention, which knows the forest, is left as it is.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import warnings
from collections.abc import Generator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from upweight.errors import ModelError
from upweight.models.adapter import Converted
from upweight.models.attention import NAME, forest_attention
from upweight.models.load import LanguageModel
from upweight.models.logprobs import scored_hidden
from upweight.models.named import first_lines
from upweight.models.proof import TOLERANCE_SLOPE, leaves, probe_forest
from upweight.types import Forest

OPERATIONS = 3e14
"""Multiplications and additions of a run from which on compiling pays: a quarter of an hour on two
cores, of which it saves a seventh to a third, and it takes some ten to forty seconds."""

COMPILED = "_compiled_call_impl"
"""Where torch keeps what a module is called by instead, once it is compiled."""

FAILURES = (RuntimeError, OSError, ImportError, AttributeError, TypeError, NotImplementedError)
"""What a compiler raises where it cannot go on; torch's own are RuntimeErrors."""


def pays_back(lm: LanguageModel, num_tokens: float) -> bool:
    """Whether a run over so many tokens is long enough to compile for: a rule of its size alone, so
    that the same run on another day, or resumed, is the same."""
    weights = sum(p.numel() for p in lm.causal.base_model.parameters())
    return lm.device.type == "cpu" and lm.plan.shared and 6 * weights * num_tokens >= OPERATIONS


def can_compile() -> bool:
    """Whether this machine has the C++ compiler that TorchInductor would call."""
    return any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++")))


def compile_layers(lm: LanguageModel) -> None:
    """Compiles every decoder layer, for forests of any size, and holds what comes out against the
    layers as they were. They are left as they were where that fails.

    Raises ModelError where the family runs unshared, where nothing can be compiled (on a CPU that
    takes a C++ compiler), or where the compiled layers give something else.
    """
    layers = [m for m in lm.causal.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not lm.plan.shared or not layers:
        why = lm.plan.reason or "it has no layers of transformers' usual kind"
        raise ModelError(
            f"{lm.name} has nothing that is compiled: {why}. Leave compute.compile out."
        )
    probe = probe_forest(lm).to(lm.device)
    before = _read(lm, probe)
    AttentionInterface.register(NAME, torch.compiler.disable(forest_attention))
    # The compiler looks at its inputs at each new kind of forest, and torch warns of that.
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", UserWarning)
    # It makes one of each autograd function that it reads through.
    warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
    try:
        with warnings.catch_warnings():
            # The compiler's own modules, imported at its first use, use what torch deprecates.
            warnings.filterwarnings("ignore", ".*torch.jit.*", DeprecationWarning)
            for layer in layers:
                layer.compile(dynamic=True)
            fault = _fault(before, _read(lm, probe), lm.compute_dtype)
            # As training on a CPU has them (recipes.state.computing): for the compiler, new layers.
            with Converted(lm).in_place():
                fault = fault or _fault(before, _read(lm, probe), lm.compute_dtype)
    except FAILURES as error:
        fault = f"{type(error).__name__}: {first_lines(error, 1)}"
    if fault is not None:
        for layer in layers:
            vars(layer).pop(COMPILED, None)
        AttentionInterface.register(NAME, forest_attention)
        raise ModelError(
            f"the layers of {lm.name} cannot be compiled here ({fault}). On a CPU that takes a C++ "
            "compiler. Use compute.compile=false."
        )


def is_compiled(lm: LanguageModel) -> bool:
    return any(vars(m).get(COMPILED) is not None for m in lm.causal.modules())


@contextlib.contextmanager
def as_written() -> Generator[None]:
    """In the block compiled layers run as they were written: answers are drawn a token at a time
    from a cache that grows, and would be compiled anew and anew."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _read(lm: LanguageModel, probe: Forest) -> tuple[Tensor, Float[Tensor, "tokens width"]]:
    """The hidden states that are scored, and the gradient of a sum of them at the embedding, as in
    training: trained weights are trained."""
    with leaves(lm) as given:
        hidden = scored_hidden(lm, probe)
        weights: Any = torch.linspace(0.5, 1.5, hidden.numel(), device=hidden.device)
        ((slope,),) = torch.autograd.grad((hidden.float() * weights.view_as(hidden)).sum(), given)
    return hidden.detach().float(), slope


def _fault(
    before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], dtype: torch.dtype
) -> str | None:
    """What is further off than roundings in another order explain, relative to a token's size."""
    for what, one, other in zip(("output", "gradient"), before, after, strict=True):
        size = one.norm(dim=-1)
        off = (other - one).norm(dim=-1) / torch.maximum(size, size.mean())
        if not (worst := off.max().item()) <= TOLERANCE_SLOPE[dtype]:
            return f"a token's {what} is {worst:.3g} of its size off"
    return None
