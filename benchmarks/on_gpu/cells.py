"""What is timed, for how long, and what came of it."""

from __future__ import annotations

import statistics
import time
import traceback
from dataclasses import dataclass, field
from typing import Any

import torch

from floor import ModelShape
from on_gpu.models import Size
from upweight.models.reading import is_out_of_memory
from upweight.types import Tree

OURS, PLAIN, TRL = "upweight", "plain", "TRL"
MOST_STEPS = 8
"""Timed steps at most: what a fast cell does not need, the slow ones get."""

NO_TIME, FULL = "not reached in the time given", "out of memory"


@dataclass
class Budget:
    """The time that is left, shared evenly among the parts that are left."""

    ends: float
    parts: int

    def take(self) -> float | None:
        """When the next part has to end; None where nothing is left for it."""
        left = self.ends - time.monotonic()
        share, self.parts = left / max(1, self.parts), self.parts - 1
        return time.monotonic() + share if left > 0 else None


@dataclass(frozen=True)
class Case:
    """One model on a step's rows of one shape, and the operations that the step needs."""

    size: Size
    lengths: str
    trees: tuple[Tree, ...]
    work: float

    @property
    def row(self) -> int:
        """Tokens of a pair that is padded, prompts and all."""
        return 2 * max(len(t.prompt) + max(map(len, t.responses)) for t in self.trees)


@dataclass
class Cell:
    """What one side came to on a case: seconds of its steps, the first of which is a warm-up.

    `at_once` is the tokens of a forward pass, padding and repeated prompts among them.
    """

    model: str
    lengths: str
    side: str
    pairs: int
    tokens: int
    work: float
    attention: str
    at_once: int = 0
    seconds: list[float] = field(default_factory=list[float])
    peak_bytes: int | None = None
    note: str = ""
    failed: bool = False

    @property
    def step(self) -> float | None:
        return statistics.median(self.seconds[1:]) if len(self.seconds) > 1 else None


def blank(case: Case, side: str, attention_path: str) -> Cell:
    tokens = sum(tree.num_tokens for tree in case.trees)
    pairs = len(case.trees)
    return Cell(case.size.name, case.lengths, side, pairs, tokens, case.work, attention_path)


def shape_of(model: torch.nn.Module) -> ModelShape:
    config = model.config
    matrices = [m.weight for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)]
    trunk: dict[tuple[int, int], int] = {}
    for out, width in (m.shape for m in matrices):
        trunk[out, width] = trunk.get((out, width), 0) + 1
    head_width = getattr(config, "head_dim", None)
    head_width = head_width or config.hidden_size // config.num_attention_heads
    channels = config.num_hidden_layers * config.num_attention_heads * head_width
    return ModelShape(trunk, tuple(model.get_output_embeddings().weight.shape), channels)


class Steps:
    """When steps end, and whether another fits: at least one beside the warm-up is tried."""

    def __init__(self, until: float) -> None:
        self.until = until
        self.last = time.monotonic()
        self.seconds: list[float] = []

    def ended(self, *_: Any) -> None:
        now = time.monotonic()
        self.seconds.append(now - self.last)
        self.last = now

    def enough(self) -> bool:
        if len(self.seconds) > MOST_STEPS:
            return True
        return bool(self.seconds) and self.last + self.seconds[-1] > self.until


def blame(cell: Cell, error: Exception, where: str) -> None:
    """The cell says why it is empty. Too little memory is a result, anything else a failure."""
    # The engine says in its own words what to do about it.
    if any(is_out_of_memory(e) for e in (error, error.__cause__) if e is not None):
        cell.note = f"{FULL} {where}"
        return
    traceback.print_exc()
    first = (str(error).splitlines() or [""])[0]
    cell.note, cell.failed = f"{type(error).__name__}: {first[:100]}", True


def halves(most: int, least: int) -> list[int]:
    found = [most]
    while found[-1] > least:
        found.append(max(least, found[-1] // 2))
    return found
