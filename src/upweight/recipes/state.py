"""What a run that has begun carries from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from upweight.config import Run
from upweight.evidence.track import Tracking
from upweight.models.load import LanguageModel, checkpoint_layers
from upweight.models.reading import free_cached
from upweight.recipes.prepare import note_smaller
from upweight.recipes.reference import Against
from upweight.recipes.resume import data_digests, settings_digest
from upweight.recipes.screen import Screen
from upweight.recipes.start import Start
from upweight.training import checkpoint
from upweight.training.loop import Progress, Record, Window
from upweight.training.rundir import (
    RunDir,
    append_jsonl,
    truncate_jsonl_after,
    truncate_ledger_after,
)
from upweight.trust.watch import Watch
from upweight.types import Forest


@dataclass
class State:
    """What the hooks of one run share. `best` is the best value of the metric that a checkpoint is
    kept by, at `best_step`; `tokens_per_bin` is what has fitted into memory so far."""

    begun: Start
    against: Against
    rundir: RunDir
    optimizer: torch.optim.Optimizer
    screen: Screen
    trackers: Tracking
    tokens_per_bin: int
    watch: Watch
    best: float | None = None
    best_step: int | None = None
    recomputing: bool = False

    @property
    def run(self) -> Run:
        return self.begun.run

    @property
    def lm(self) -> LanguageModel:
        return self.begun.lm


def log(state: State, record: Record) -> None:
    append_jsonl(state.rundir.file("metrics.jsonl"), record)
    state.trackers.log(record)
    state.screen.record(record, state.begun.plan.total_steps)
    for finding in state.watch.after(record):
        warning = {"step": record["step"], "kind": "warning", **asdict(finding)}
        append_jsonl(state.rundir.file("metrics.jsonl"), warning)
        state.screen.note(str(finding))


def save(state: State, progress: Progress) -> None:
    """A checkpoint of now; the newest ones and the best are kept."""
    folder = state.rundir.file("checkpoints")
    position = checkpoint.Position(
        step=progress.step,
        epoch=progress.step / state.begun.plan.steps_per_epoch,
        num_tokens=progress.num_tokens,
        order_seed=state.run.seed,
        reference_fingerprint=state.against.logps.fingerprint,
        config_digest=settings_digest(state.run),
        best=state.best,
        best_step=state.best_step,
        seconds=progress.seconds,
        model_fingerprint=state.against.model_fingerprint,
        data_digests=data_digests(state.begun.prepared),
        window=progress.window.to_plain(),
        tokens_per_bin=state.tokens_per_bin,
    )
    checkpoint.save(folder, checkpoint.capture(state.lm.model, state.optimizer, position))
    best = None
    if state.best_step is not None:
        best = folder / f"{checkpoint.CHECKPOINT}{state.best_step:08d}"
    checkpoint.prune(folder, state.run.checkpoint.keep, best)


def go_back(state: State, saved: checkpoint.TrainState) -> Progress:
    """Weights, optimizer, generators and records as they were when `saved` was saved."""
    checkpoint.restore(state.lm.model, state.optimizer, saved)
    where = saved.position
    state.best, state.best_step = where.best, where.best_step
    truncate_jsonl_after(state.rundir.file("metrics.jsonl"), where.step)
    truncate_jsonl_after(state.rundir.file("samples.jsonl"), where.step)
    truncate_ledger_after(state.rundir.file("ledger.parquet"), where.step)
    if where.tokens_per_bin is not None and where.tokens_per_bin < state.tokens_per_bin:
        state.tokens_per_bin = where.tokens_per_bin
        state.screen.note(f"bins of {where.tokens_per_bin:,} tokens, which fitted into memory")
    assert where.window is not None
    window = Window.from_plain(where.window)
    state.screen.note(f"resumed after step {where.step} of {state.begun.plan.total_steps}")
    return Progress(where.step, where.num_tokens, where.seconds, window)


def smaller_bins(state: State, what: str, tokens_per_bin: int) -> None:
    """What did not fit in one pass is not tried in another, nor by a resumed run."""
    state.tokens_per_bin = tokens_per_bin
    note_smaller(state.screen, what, tokens_per_bin)


def make_room(state: State, what: str, batch: Sequence[Forest]) -> bool:
    """Smaller bins for `what` ran out of memory, or recomputed layers where a bin is one tree
    already; False where neither is left."""
    free_cached()
    largest = max(batch, key=lambda forest: forest.num_tokens)
    happened = f"{what} with {largest.num_tokens:,} tokens"
    if len(largest.trees) > 1:
        smaller_bins(state, happened, largest.num_tokens // 2)
        return True
    if not state.recomputing:
        checkpoint_layers(state.lm)
        state.recomputing = True
        state.screen.note(
            f"{happened}, one prompt's, ran out of memory: layers are recomputed from here on"
        )
        return True
    return False
