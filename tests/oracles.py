"""Slow and obvious ways to compute what the package computes fast, and trees to do it on."""

from __future__ import annotations

import tempfile
from copy import deepcopy
from functools import lru_cache

import torch

from tiny import save_tiny, tiny_model
from upweight.models.attention import NAME
from upweight.models.load import ForwardPlan, LanguageModel, load
from upweight.types import Preference, ResponseId, RowId, Tree

torch.set_num_threads(1)


def tree_of(prompt, responses, preferences=None, line=1) -> Tree:
    """A tree of token ids; its first response is preferred to each other unless told otherwise."""
    row = RowId("rows.jsonl", line)
    if preferences is None:
        preferences = [Preference(0, k) for k in range(1, len(responses))]
    return Tree(
        prompt=tuple(prompt),
        responses=tuple(map(tuple, responses)),
        preferences=tuple(preferences),
        ids=tuple(ResponseId(row, k) for k in range(len(responses))),
        stopped=(True,) * len(responses),
    )


def random_trees(shapes, seed=0, vocab=256) -> list[Tree]:
    """A tree of random tokens for each shape (prompt length, response length, ...)."""
    generator = torch.Generator().manual_seed(seed)

    def ids(num):
        return torch.randint(0, vocab, (num,), generator=generator).tolist()

    return [
        tree_of(ids(prompt), [ids(n) for n in responses], line=line)
        for line, (prompt, *responses) in enumerate(shapes, 1)
    ]


SHAPES = ((14, 7, 1, 11), (1, 4, 6), (5, 3), (9, 2, 12, 5, 1))
"""Longer than the tiny models' windows of 8 and shorter, one token and many, two to four ways."""


@lru_cache
def _loaded(family: str, sharing: bool, path: str) -> LanguageModel:
    with tempfile.TemporaryDirectory() as folder:
        return load(
            save_tiny(folder, family), device="cpu", dtype="float32", sharing=sharing, path=path
        )


def loaded(family="llama", dtype=torch.float32, sharing=True, path="auto") -> LanguageModel:
    """The tiny model of a family as upweight loads it; a copy of its own for every caller."""
    lm = deepcopy(_loaded(family, sharing, path))
    lm.model.to(dtype)
    return lm


def with_plan(lm: LanguageModel, **plan) -> LanguageModel:
    """The same weights, run another way."""
    lm = deepcopy(lm)
    lm.plan = ForwardPlan(**plan)
    lm.causal.set_attn_implementation(NAME if lm.plan.shared else "eager")
    return lm


def plain_model(family="llama", dtype=torch.float32):
    """The same weights as `loaded` gives, by transformers alone."""
    return tiny_model(family).to(dtype)


def alone(model, trees) -> torch.Tensor:
    """log p of each response token, one whole sequence at a time, in response order."""
    pieces = []
    for tree in trees:
        for response in tree.responses:
            ids = torch.tensor([[*tree.prompt, *response]])
            table = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            for place, token in enumerate(response, len(tree.prompt) - 1):
                pieces.append(table[place, token])
    return torch.stack(pieces)


def as_peft_has_it(lm):
    """With adapted layers as peft wrote them, in place of ours."""
    from peft.tuners.lora import Linear

    from upweight.models.lowrank import FusedLinear

    for module in lm.model.modules():
        if isinstance(module, FusedLinear):
            module.__class__ = Linear
    return lm


def gradients(model, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """d value / d each parameter, zeros where it has none; the parameters are left clean."""
    model.zero_grad(set_to_none=True)
    value.backward()
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }
    model.zero_grad(set_to_none=True)
    return found


def relative(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The joint norm of the difference over the joint norm of `wanted`."""
    assert found.keys() == wanted.keys()
    off = sum((found[n] - wanted[n]).double().square().sum() for n in wanted)
    size = sum(w.double().square().sum() for w in wanted.values())
    return float((off / size).sqrt())


def weigh(logps: torch.Tensor) -> torch.Tensor:
    """A scalar in which every token counts differently, so that swapped tokens show."""
    return (logps * torch.linspace(0.5, 1.5, len(logps), dtype=logps.dtype)).sum()
