"""What a run that has begun carries from step to step."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from upweight.config import Run
from upweight.data.pack import divisible
from upweight.data.stream import StepPlan
from upweight.evidence.track import Tracking
from upweight.models.adapter import Converted
from upweight.models.compiled import as_written
from upweight.models.load import LanguageModel, checkpoint_layers
from upweight.models.probes import Probes
from upweight.models.reading import attempt, free_cached
from upweight.recipes.prepare import account_record, note_smaller
from upweight.recipes.reference import Against
from upweight.recipes.resume import data_digests, settings_digest
from upweight.recipes.screen import Screen
from upweight.recipes.start import Start
from upweight.training import checkpoint
from upweight.training.loop import Progress, Record, Window
from upweight.training.moment import Position, TrainState
from upweight.training.objectives import Objective
from upweight.training.records import (
    append_jsonl,
    truncate_jsonl_after,
    truncate_ledger_after,
)
from upweight.training.rundir import RunDir, write_atomic
from upweight.trust.watch import Watch
from upweight.types import Forest, Tree


@dataclass(frozen=True)
class Values:
    """The value model of a PPO run: a model of its own, or None where `module` is a head on the
    policy's trunk."""

    critic: LanguageModel | None
    module: nn.Module


@dataclass(frozen=True)
class Work:
    """What an objective has fit() do: the loss, the trees of each step, and what it keeps between
    steps besides weights. `plan` says which rows make a step, where steps are made of rows."""

    objective: Objective
    trees: Callable[[int], list[Tree]]
    plan: Callable[[int], StepPlan] | None = None
    rounds: Rounds | None = None


@runtime_checkable
class Rounds(Protocol):
    """What learns from answers that it has drawn."""

    def after(self, record: Record) -> None: ...

    def epoch(self, step: int) -> float: ...

    def is_done(self, step: int) -> bool: ...

    def position(self) -> dict[str, Any]: ...

    def go_back(self, where: Mapping[str, Any]) -> None: ...

    def tidy(self, kept: Sequence[Mapping[str, Any]]) -> None: ...


@dataclass
class State:
    """What the hooks of one run share. `best` is the best value of the metric that a checkpoint is
    kept by, at `best_step`; `tokens_per_bin` is what has fitted into memory so far, and `splitting`
    says that a prompt with more is read a few responses at a time. `noted` are
    the margins of steps (from 0) of the first epoch that are not written yet, and `noting` is the
    step that is being taken, if it is one of them. `judged` are the rewards of the reference's
    answers, by set, and `first_losses` what was measured before step 1; `start` is what the policy
    said of the export's probes then."""

    begun: Start
    against: Against
    rundir: RunDir
    optimizer: torch.optim.Optimizer
    screen: Screen
    trackers: Tracking
    tokens_per_bin: int
    watch: Watch
    values: Values | None = None
    judge: Callable[[Sequence[Tree]], list[list[float]]] | None = None
    reward_digests: Mapping[str, str] = field(default_factory=dict[str, str])
    start: Probes | None = None
    rounds: Rounds | None = None
    best: float | None = None
    best_step: int | None = None
    recomputing: bool = False
    judged: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    first_losses: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    splitting: bool = False
    noting: int | None = None
    noted: dict[int, list[tuple[Forest, Tensor]]] = field(
        default_factory=dict[int, list[tuple[Forest, Tensor]]]
    )

    @property
    def run(self) -> Run:
        return self.begun.run

    @property
    def lm(self) -> LanguageModel:
        return self.begun.lm

    def epoch(self, step: int) -> float:
        """How often the rows have been gone through after so many steps."""
        return (self.begun.plan if self.rounds is None else self.rounds).epoch(step)

    def is_done(self, step: int) -> bool:
        """Whether all epochs are gone through, though the plan has more steps."""
        return self.rounds is not None and self.rounds.is_done(step)

    def is_last(self, step: int) -> bool:
        return step == self.begun.plan.total_steps or self.is_done(step)

    @property
    def trained(self) -> nn.Module:
        """Everything that the optimizer moves and a checkpoint keeps."""
        return trained_modules(self.lm, self.values)


def trained_modules(lm: LanguageModel, values: Values | None) -> nn.Module:
    if values is None:
        return lm.model
    return nn.ModuleDict({"policy": lm.model, "value": values.module})


def trained_models(lm: LanguageModel, values: Values | None) -> list[LanguageModel]:
    """The policy, and a value model that has a trunk of its own."""
    return [lm] if values is None or values.critic is None else [lm, values.critic]


def computing(
    models: Sequence[LanguageModel], is_recomputing: Callable[[], bool]
) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Frozen matrices converted once for all steps: a graph holds as much in conversions of its
    own. Not where layers are recomputed, whose graphs do not, and not on a GPU, where a conversion
    takes no time."""
    converted: list[Converted] = []
    if models[0].device.type == "cpu" and not is_recomputing():
        made = attempt(lambda: [Converted(lm) for lm in models])
        with as_written():  # A probe without gradients would be compiled for by itself.
            if not isinstance(made, Exception) and all(map(Converted.gives_the_same, made, models)):
                converted += made

    @contextlib.contextmanager
    def in_place() -> Generator[None]:
        if is_recomputing():
            converted.clear()
        with contextlib.ExitStack() as stack:
            for kept in converted:
                stack.enter_context(kept.in_place())
            yield

    return in_place


def note(state: State, forest: Forest, margins: Tensor) -> None:
    """Margins of pairs that are met for the first time: they have not been trained on."""
    if state.noting is not None:
        state.noted.setdefault(state.noting, []).append((forest, margins))


def _write_noted(state: State) -> None:
    """margins.jsonl: one line a step of the first epoch, [row, chosen, rejected, margin] each."""
    for step, noted in state.noted.items():
        margins = [
            [str(ids[chosen].row), ids[chosen].index, ids[rejected].index, margin]
            for forest, values in noted
            for ids in [[i for tree in forest.trees for i in tree.ids]]
            for chosen, rejected, margin in zip(
                forest.chosen.tolist(), forest.rejected.tolist(), values.tolist(), strict=True
            )
        ]
        append_jsonl(state.rundir.file("margins.jsonl"), {"step": step + 1, "margins": margins})
    state.noted.clear()


def write_account(state: State) -> None:
    account = json.dumps(account_record(state.begun.prepared), indent=1)
    write_atomic(state.rundir.file("account.json"), account)


def log(state: State, record: Record) -> None:
    append_jsonl(state.rundir.file("metrics.jsonl"), record)
    _write_noted(state)
    state.trackers.log(record)
    state.screen.record(record, state.begun.plan.total_steps)
    if state.rounds is not None and record["kind"] == "train":
        state.rounds.after(record)
    for finding in state.watch.after(record):
        seen_in = {"set": record["set"]} if "set" in record else {}
        warning = {"step": record["step"], "kind": "warning", **seen_in, **asdict(finding)}
        append_jsonl(state.rundir.file("metrics.jsonl"), warning)
        state.screen.note(str(finding))


def save(state: State, progress: Progress) -> None:
    """A checkpoint of now; the newest ones and the best are kept."""
    _write_noted(state)
    folder = state.rundir.file("checkpoints")
    position = Position(
        step=progress.step,
        epoch=state.epoch(progress.step),
        num_tokens=progress.num_tokens,
        order_seed=state.run.seed,
        reference_fingerprint=state.against.logps.fingerprint,
        config_digest=settings_digest(state.run),
        best=state.best,
        best_step=state.best_step,
        seconds=progress.seconds,
        model_fingerprint=state.against.model_fingerprint,
        data_digests=data_digests(state.begun.prepared),
        reward_digests=state.reward_digests,
        window=progress.window.to_plain(),
        tokens_per_bin=state.tokens_per_bin,
        rollout=None if state.rounds is None else state.rounds.position(),
        first_losses=state.first_losses,
    )
    checkpoint.save(folder, checkpoint.capture(state.trained, state.optimizer, position))
    best = None
    if state.best_step is not None:
        best = folder / f"{checkpoint.CHECKPOINT}{state.best_step:08d}"
    checkpoint.prune(folder, state.run.checkpoint.keep, best)
    if state.rounds is not None:
        positions = checkpoint.positions(folder)
        state.rounds.tidy([p.rollout for p in positions if p.rollout is not None])


def go_back(state: State, saved: TrainState) -> Progress:
    """Weights, optimizer, generators and records as they were when `saved` was saved."""
    checkpoint.restore(state.trained, state.optimizer, saved)
    where = saved.position
    state.best, state.best_step = where.best, where.best_step
    state.first_losses = {name: list(sums) for name, sums in where.first_losses.items()}
    truncate_jsonl_after(state.rundir.file("metrics.jsonl"), where.step)
    truncate_jsonl_after(state.rundir.file("samples.jsonl"), where.step)
    truncate_jsonl_after(state.rundir.file("margins.jsonl"), where.step)
    state.watch.resumed(written_so_far(state.rundir))
    truncate_ledger_after(state.rundir.file("ledger.parquet"), where.step)
    if where.tokens_per_bin is not None and where.tokens_per_bin < state.tokens_per_bin:
        state.tokens_per_bin = where.tokens_per_bin
        state.screen.note(f"bins of {where.tokens_per_bin:,} tokens, which fitted into memory")
    if state.rounds is not None and where.rollout is not None:
        state.rounds.go_back(where.rollout)
    assert where.window is not None
    window = Window.from_plain(where.window)
    state.screen.note(f"resumed after step {where.step} of {state.begun.plan.total_steps}")
    return Progress(where.step, where.num_tokens, where.seconds, window)


def written_so_far(rundir: RunDir) -> list[Record]:
    """The records of metrics.jsonl."""
    path = rundir.file("metrics.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def smaller_bins(state: State, what: str, tokens_per_bin: int) -> None:
    """What did not fit in one pass is not tried in another, nor by a resumed run."""
    state.tokens_per_bin = tokens_per_bin
    note_smaller(state.screen, what, tokens_per_bin)


def make_room(state: State, what: str, forest: Forest) -> bool:
    """For `what` ran out of memory with `forest`: smaller bins where several rows are in it, else
    a prompt's responses in several passes where none of them are compared, else recomputed layers;
    False where nothing of it is left."""
    free_cached()
    happened = f"{what} with {forest.num_tokens:,} tokens"
    tree, *others = forest.trees
    if others or len({i.row for i in tree.ids}) > 1:
        smaller_bins(state, happened, forest.num_tokens // 2)
        return True
    happened += ", one prompt's,"
    if divisible(tree):
        state.splitting = True
        state.tokens_per_bin = min(state.tokens_per_bin, forest.num_tokens // 2)
        state.screen.note(
            f"{happened} ran out of memory: its responses are read in passes of "
            f"{state.tokens_per_bin:,} tokens, as far as they are not compared"
        )
        return True
    if not state.recomputing:
        for lm in trained_models(state.lm, state.values):
            checkpoint_layers(lm)
        state.recomputing = True
        state.screen.note(f"{happened} ran out of memory: layers are recomputed from here on")
        return True
    return False
