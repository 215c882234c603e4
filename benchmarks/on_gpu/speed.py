"""The speed of every side on every shape, as far as memory and time go."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from floor import operations
from on_gpu.cells import (
    FULL,
    NO_TIME,
    OURS,
    PLAIN,
    Budget,
    Case,
    Cell,
    Steps,
    blame,
    blank,
    halves,
    shape_of,
)
from on_gpu.checks import Check
from on_gpu.models import Shapes, Size, as_saved_in_bf16, build, random_trees, words
from on_gpu.sides import our_steps, padded_logps, plain_steps
from on_gpu.trl import time_trl, trl_python
from protocol import LORA
from upweight.data.pack import bins, collate
from upweight.models import attention, proof
from upweight.models.adapter import add_lora, keep_frozen_in_compute_dtype
from upweight.models.load import LanguageModel
from upweight.models.logprobs import response_logps, token_logps
from upweight.models.reading import free_cached
from upweight.training.memory import plan_memory
from upweight.types import Tree

ALLOWED_LARGE = 0.02
"""At full size, of a response's log-prob, in nats per token: upweight against the plain trainer.
Rounding is a twentieth of it; a rejected response that reads the chosen one is four times as far.
"""


Attempt = Callable[[LanguageModel, Sequence[Tree], int, float], Steps]


def measure(
    cell: Cell, lm: LanguageModel, case: Case, attempt: Attempt, sizes: Sequence[int], until: float
) -> int:
    """`attempt` at the largest of `sizes` that memory allows, which is returned."""
    cuda = lm.device.type == "cuda"
    for size in sizes:
        free_cached()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        try:
            cell.seconds = attempt(lm, case.trees, size, until).seconds
        except Exception as error:  # whatever it is, the other cells have their turn
            blame(cell, error, f"at {size}")
        else:
            cell.peak_bytes = torch.cuda.max_memory_allocated() if cuda else None
            cell.note = "" if len(cell.seconds) > 1 else "no time for a step after the warm-up"
        lm.model.zero_grad(set_to_none=True)
        if not cell.note.startswith(FULL):
            return size
    return sizes[-1]


def time_case(lm: LanguageModel, case: Case, budget: Budget) -> Iterator[Cell | Check]:
    """upweight and the plain trainer in turn, and whether they agree on the rows."""
    ours = blank(case, OURS, lm.plan.attention if lm.plan.shared else "unshared")
    plain = blank(case, PLAIN, "sdpa")
    free_cached()
    steps = [range(len(case.trees))]
    capacity = min(plan_memory(lm, case.trees, steps).tokens_per_bin, ours.tokens)
    if (until := budget.take()) is None:
        ours.note = NO_TIME
    else:
        sizes = halves(capacity, max(tree.num_tokens for tree in case.trees))
        used = measure(ours, lm, case, our_steps, sizes, until)
        ours.at_once = max(collate(group).num_tokens for group in bins(case.trees, used))
    yield ours
    if (until := budget.take()) is None:
        plain.note = NO_TIME
    else:
        # Powers of two, so that they divide a step's pairs evenly.
        most = 1 << min(len(case.trees), max(1, 2 * capacity // case.row)).bit_length() - 1
        with attention.native_attention(lm.causal):
            plain.at_once = measure(plain, lm, case, plain_steps, halves(most, 1), until) * case.row
    yield plain
    if ours.seconds and plain.seconds:
        yield agreement(lm, case)


def agreement(lm: LanguageModel, case: Case) -> Check:
    """One pair's log-probs by either side, with the weights as they are."""
    forest = collate(case.trees[:1])
    with torch.no_grad():
        ours = response_logps(token_logps(lm, forest), forest)
        with attention.native_attention(lm.causal):
            plain = padded_logps(lm, case.trees[:1])
    each = (ours - plain).abs() / forest.tokens_per_response.to(lm.device)
    way = f"upweight against plain, {case.lengths}"
    return Check(case.size.name, "bf16", way, (float(each.max()), None), (ALLOWED_LARGE, None))


def adapted(lm: LanguageModel) -> LanguageModel:
    """As a run trains it: both sides by autocast, the frozen matrices kept in bf16."""
    lm = add_lora(lm, **LORA, seed=0)
    keep_frozen_in_compute_dtype(lm)
    return lm


def time_model(
    size: Size, shapes: Shapes, device: str, budget: Budget, trl: bool
) -> Iterator[Cell | Check]:
    """Every shape on one model; then TRL's turn, when this program's memory is free again."""
    lm = as_saved_in_bf16(build("llama", size.config, torch.bfloat16, device))
    shape = shape_of(lm.model)
    cases = [
        Case(size, "/".join(map(str, lengths)), trees, operations(shape, trees, lora=size.lora))
        for lengths, pairs in shapes.items()
        for trees in [tuple(random_trees([lengths] * pairs, lm.vocab_size))]
    ]
    lm.plan = proof.find_plan(lm)
    if lm.plan.shared:
        lm.causal.set_attn_implementation(attention.NAME)
    with tempfile.TemporaryDirectory(prefix="upweight-gpu-") as folder:
        if trl and trl_python() is not None:
            lm.causal.save_pretrained(folder)
            words(lm.vocab_size).save_pretrained(folder)
        if size.lora:
            lm = adapted(lm)
        at_once: list[int] = []
        for case in cases:
            for result in time_case(lm, case, budget):
                if isinstance(result, Cell) and result.side == PLAIN:
                    at_once.append(result.at_once // case.row)
                yield result
        del lm
        free_cached()
        for case, pairs in zip(cases, at_once, strict=True) if trl else ():
            yield time_trl(case, Path(folder), pairs, device, budget)
