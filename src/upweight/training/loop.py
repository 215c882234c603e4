"""fit(): the one training loop. It is handed all that it calls; it knows no file and no screen."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from upweight.errors import ModelError
from upweight.models.load import LanguageModel
from upweight.models.named import first_lines
from upweight.models.offload import offloaded
from upweight.models.reading import attempt, is_out_of_memory
from upweight.training.guard import Guard, Made
from upweight.training.objectives import Objective
from upweight.training.optimizer import clip, room_for_moments
from upweight.training.schedules import learning_rate_factor
from upweight.types import Forest

Record = dict[str, object]

POLICY = "policy"
"""The part of the parameters whose gradient's norm is called grad_norm."""


@dataclass(frozen=True)
class Plan:
    """What fit() does and when. `every` is in optimizer steps; None: only at the end."""

    total_steps: int
    steps_per_epoch: int
    learning_rate: float
    warmup: float
    schedule: str
    max_grad_norm: float | None
    log_every: int = 1
    evaluate_every: int | None = None
    checkpoint_every: int | None = None

    def epoch(self, step: int) -> float:
        """Passes over the rows after so many steps, where an epoch's number of steps is known."""
        return step / self.steps_per_epoch


@dataclass
class Window:
    """Sums since the last logged record. Kept as tensors: reading one waits for the device."""

    sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict[str, tuple[torch.Tensor, torch.Tensor]]
    )
    num_tokens: int = 0
    num_items: int = 0
    seconds: float = 0.0

    def merge(self, other: Window) -> None:
        self.add(other.sums)
        self.num_tokens += other.num_tokens
        self.num_items += other.num_items
        self.seconds += other.seconds

    def add(self, metrics: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        for name, (total, count) in metrics.items():
            before = self.sums.get(name)
            self.sums[name] = (
                (total, count) if before is None else (before[0] + total, before[1] + count)
            )

    def means(self) -> dict[str, float]:
        return {name: (total / count).item() for name, (total, count) in self.sums.items()}

    def to_plain(self) -> dict[str, Any]:
        """The window as JSON has it; `from_plain` gives it back to the last bit."""
        sums = {name: [total.item(), count.item()] for name, (total, count) in self.sums.items()}
        return {**vars(self), "sums": sums}

    @staticmethod
    def from_plain(plain: Mapping[str, Any]) -> Window:
        # The sums are fp32 numbers, and fp32 sums are what they are added to.
        sums = {
            name: (torch.tensor(total), torch.tensor(count))
            for name, (total, count) in plain["sums"].items()
        }
        return Window(sums, plain["num_tokens"], plain["num_items"], plain["seconds"])


@dataclass
class Progress:
    """How far training is: completed steps, tokens and seconds seen, over all resumptions, and
    what was summed since the last record."""

    step: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    window: Window = field(default_factory=Window)


@dataclass(frozen=True)
class Hooks:
    """What fit() calls. `evaluate` and `save` are given the progress so far; `evaluate` says
    whether the weights as they are should be saved, whatever the plan says. `on_out_of_memory` is
    given the micro-batch that did not fit, and says whether the step is worth another try.
    `is_done` says whether a run has come to its end after so many steps, though the plan has more,
    and `epoch` how often its rows have been gone through by then. `computing` is around each
    step's passes, forward and backward."""

    on_record: Callable[[Record], None]
    evaluate: Callable[[Progress], bool]
    save: Callable[[Progress], None]
    should_stop: Callable[[], bool] = lambda: False
    on_out_of_memory: Callable[[Progress, Forest], bool] = lambda progress, forest: False
    is_done: Callable[[int], bool] = lambda step: False
    epoch: Callable[[int], float] | None = None
    computing: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext


@dataclass(frozen=True)
class Full:
    """A micro-batch that ran out of memory, and the error of the allocation that failed."""

    forest: Forest
    error: Exception


def fit(
    lm: LanguageModel,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    forests: Callable[[int], Sequence[Forest]],
    plan: Plan,
    hooks: Hooks,
    progress: Progress,
) -> bool:
    """Train from `progress` to plan.total_steps, or until hooks.is_done; False when it was asked to
    stop before the end.

    `forests(step)` gives the micro-batches of a step, a function of the step alone, so that a
    resumed run reads what an uninterrupted one reads. Every item of a step weighs 1/(the step's
    total count), however the step is cut into micro-batches. A loss or gradient that is not
    finite raises Refusal UW303 before the optimizer sees it; where asking would wait for a GPU, it
    is raised at the next step that is shown or kept, and no step is taken until then (guard.py). A
    step that runs out of memory is taken again, from `forests`, if hooks.on_out_of_memory has made
    it smaller.
    """
    parts = _parts(optimizer)
    guard = Guard(lm, objective, optimizer)

    def is_last() -> bool:
        return progress.step >= plan.total_steps or hooks.is_done(progress.step)

    while not is_last():
        if hooks.should_stop():
            guard.ask()
            hooks.save(progress)
            return False
        began, window = time.monotonic(), progress.window
        batch = forests(progress.step)
        with hooks.computing():
            done = _accumulate_with_room(lm, optimizer, objective, batch)
        if isinstance(done, Full):
            optimizer.zero_grad(set_to_none=True)
            guard.ask()
            if not hooks.on_out_of_memory(progress, done.forest):
                raise too_large(f"step {progress.step + 1}", done)
            continue
        loss, count, sums = done
        window.merge(sums)
        norms = {part: clip(parameters, plan.max_grad_norm) for part, parameters in parts.items()}
        made = Made(loss, count, _total(objective, batch), list(norms.values()))
        guard.look(progress.step, batch, made, ask=_looked_at(plan, progress.step + 1))
        norm = norms.pop(POLICY)
        window.add({f"grad_norm/{part}": _once(value) for part, value in norms.items()})
        rate = plan.learning_rate * learning_rate_factor(
            progress.step, plan.total_steps, plan.warmup, plan.schedule
        )
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("rate_factor", 1.0)
        if isinstance(failed := attempt(guard.take), Exception):
            raise _no_moments(failed)
        optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.num_tokens += sum(forest.num_tokens for forest in batch)
        window.add({"loss": (loss, count), "grad_norm": _once(norm)})
        seconds = time.monotonic() - began
        window.seconds += seconds
        progress.seconds += seconds
        if _due(progress.step, plan.log_every) or is_last():
            guard.ask()  # a round that ended early was not looked at above
            epoch = hooks.epoch or plan.epoch
            hooks.on_record(_record(progress, epoch(progress.step), rate, objective.items))
            progress.window = Window()
        last = is_last()  # what the record says may have ended the run
        to_keep = (_due(progress.step, plan.evaluate_every) or last) and hooks.evaluate(progress)
        if to_keep or _due(progress.step, plan.checkpoint_every) or last:
            hooks.save(progress)
    return True


def _parts(optimizer: torch.optim.Optimizer) -> dict[str, list[torch.Tensor]]:
    """Parameters by the part of the model that they are: each part's gradient has its own norm, so
    that a value model far off does not clip the policy's update away."""
    parts: dict[str, list[torch.Tensor]] = {}
    for group in optimizer.param_groups:
        parts.setdefault(group.get("part", POLICY), []).extend(group["params"])
    return parts


def _once(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return value.detach(), torch.ones_like(value)


def rehearse(
    lm: LanguageModel, optimizer: torch.optim.Optimizer, objective: Objective, forest: Forest
) -> Full | None:
    """Forward and backward pass of one bin beside room for the optimizer's state, which the first
    step makes: what of it did not fit, or None. Leaves everything as it was.
    """
    with torch.random.fork_rng([lm.device] if lm.device.type == "cuda" else []):
        done = _accumulate_with_room(lm, optimizer, objective, [forest])
    optimizer.zero_grad(set_to_none=True)
    return done if isinstance(done, Full) else None


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _looked_at(plan: Plan, step: int) -> bool:
    """Whether something of the step is shown or kept: whoever does so waits for it anyway."""
    every = (plan.log_every, plan.evaluate_every, plan.checkpoint_every)
    return step == plan.total_steps or any(_due(step, times) for times in every)


def _accumulate_with_room(
    lm: LanguageModel,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    batch: Sequence[Forest],
) -> tuple[torch.Tensor, torch.Tensor, Window] | Full:
    """`_accumulate`, beside room for the state that the optimizer's first step makes: bins that
    leave none for it are too large."""
    room = attempt(lambda: [] if optimizer.state else room_for_moments(optimizer))
    if isinstance(room, Exception):
        raise _no_moments(room)
    done = _accumulate(lm, objective, batch)
    del room
    return done


def _accumulate(
    lm: LanguageModel, objective: Objective, batch: Sequence[Forest]
) -> tuple[torch.Tensor, torch.Tensor, Window] | Full:
    """Forward and backward over the micro-batches of one step: (loss sum, count, metrics) of the
    whole, or the one that did not fit.

    The error is handed back and not raised: whoever caught it would still hold, in its frames, the
    tensors that have to go before the step is tried again.
    """
    # The count of the whole step comes first: each micro-batch is divided by it, and a mean of
    # micro-batch means would weigh the pairs of a small one more.
    total = _total(objective, batch)
    losses: list[torch.Tensor] = []
    counts: list[torch.Tensor] = []
    window = Window()
    for forest in batch:
        try:
            with offloaded(lm):
                step = objective.step(lm, forest.to(lm.device))
            (step.loss_sum / total).backward()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return Full(forest, error.with_traceback(None))
        losses.append(step.loss_sum.detach())
        counts.append(step.count.detach())
        window.add(step.metrics)
        window.num_tokens += forest.num_tokens
        window.num_items += objective.num_items(forest)
        # With its graph, beside which the next forward pass would have less room.
        del step
    return torch.stack(losses).sum(), torch.stack(counts).sum(), window


def _total(objective: Objective, batch: Sequence[Forest]) -> float:
    return sum(objective.count(forest) for forest in batch)


def too_large(what: str, full: Full) -> ModelError:
    forest = full.forest
    failure = ModelError(
        f"{what} ran out of memory with {forest.num_tokens:,} tokens at once "
        f"({forest.trees[0].ids[0].row}), and no smaller pass is left to try "
        f"({first_lines(full.error, 1)}). Needs less: lora=true, a smaller data.max_length with "
        "data.truncation=prompt, a smaller model."
    )
    failure.__cause__ = full.error
    return failure


def _no_moments(error: Exception) -> ModelError:
    failure = ModelError(
        "there is no memory for the two moments that AdamW keeps of every trained weight "
        f"({first_lines(error, 1)}). Needs less: lora=true, optimizer.moments=8bit, a smaller "
        "model."
    )
    failure.__cause__ = error
    return failure


def _record(progress: Progress, epoch: float, rate: float, items: str) -> Record:
    window = progress.window
    means = window.means()
    assert math.isfinite(means["loss"])
    return {
        "step": progress.step,
        "epoch": epoch,
        "kind": "train",
        **means,
        "learning_rate": rate,
        "num_tokens": progress.num_tokens,
        f"num_{items}": window.num_items,
        "tokens_per_second": window.num_tokens / max(window.seconds, 1e-9),
        "seconds": progress.seconds,
    }
