"""Training steps by the engine, and by what usual trainers do, on the same model and rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from on_gpu.cells import Steps
from upweight.data.pack import bins, collate
from upweight.losses import PAIR_LOSSES, PairLogps
from upweight.models.load import LanguageModel
from upweight.models.logprobs import token_logps
from upweight.models.reference import Reference
from upweight.training.loop import Hooks, Plan, Progress, fit
from upweight.training.objectives import pair
from upweight.training.optimizer import clip, make_optimizer
from upweight.types import Forest, Tree

BETA, LEARNING_RATE = 0.1, 1e-6


def optimizer_of(lm: LanguageModel) -> torch.optim.AdamW:
    """The engine's, for both sides."""
    return make_optimizer(
        lm.model,
        learning_rate=LEARNING_RATE,
        weight_decay=0.0,
        beta1=0.9,
        beta2=0.999,
        epsilon=1e-8,
    )


def our_steps(lm: LanguageModel, trees: Sequence[Tree], capacity: int, until: float) -> Steps:
    """The engine's own loop, with a reference that is known."""
    reference = Reference("the model as it starts", Path())
    with torch.no_grad():
        for group in bins(trees, capacity):
            reference.take(forest := collate(group), token_logps(lm, forest))

    def forests(_: int) -> list[Forest]:
        return [collate(group) for group in bins(trees, capacity)]

    loss = functools.partial(PAIR_LOSSES["dpo"], beta=BETA)
    objective = pair(reference.logps, loss, BETA)
    plan = Plan(10**9, 10**9, LEARNING_RATE, 0.0, "constant", 1.0)
    steps = Steps(until)
    hooks = Hooks(steps.ended, lambda progress: False, lambda progress: None, steps.enough)
    fit(lm, optimizer_of(lm), objective, forests, plan, hooks, Progress())
    return steps


def padded_logps(lm: LanguageModel, trees: Sequence[Tree]) -> Tensor:
    """What usual trainers do: padded rows [chosen; rejected], logits, log_softmax, sums."""
    rows = [(t.prompt, t.responses[k]) for k in (0, 1) for t in trees]

    def padded(parts: list[list[int]]) -> Tensor:
        return pad_sequence([torch.tensor(p) for p in parts], batch_first=True).to(lm.device)

    ids = padded([[*prompt, *response] for prompt, response in rows])
    there = padded([[1] * (len(prompt) + len(response)) for prompt, response in rows])
    scored = padded([[0] * len(prompt) + [1] * len(response) for prompt, response in rows])
    with torch.autocast(lm.device.type, torch.bfloat16):
        logits = lm.model(input_ids=ids, attention_mask=there, use_cache=False).logits
    # accelerate hands a trainer its logits in fp32.
    table = logits[:, :-1].float().log_softmax(-1)
    return (table.gather(-1, ids[:, 1:, None])[..., 0] * scored[:, 1:]).sum(-1)


def plain_steps(lm: LanguageModel, trees: Sequence[Tree], at_once: int, until: float) -> Steps:
    """`at_once` pairs in a forward pass, their reference known, accumulated over the step."""
    batches = [trees[i : i + at_once] for i in range(0, len(trees), at_once)]
    counts = [torch.tensor([[len(t.responses[k]) for t in b] for k in (0, 1)]) for b in batches]
    with torch.no_grad():
        known = [padded_logps(lm, batch).chunk(2) for batch in batches]
    optimizer, steps = optimizer_of(lm), Steps(until)
    while not steps.enough():
        total = torch.zeros((), device=lm.device)
        for batch, reference, count in zip(batches, known, counts, strict=True):
            policy = padded_logps(lm, batch).chunk(2)
            tokens = count.to(lm.device)
            loss = PAIR_LOSSES["dpo"](PairLogps(*policy, *reference, *tokens), beta=BETA)
            (loss.sum() / len(trees)).backward()
            total += loss.detach().sum()
        clip(lm.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert math.isfinite(total.item())
        steps.ended()
    return steps
