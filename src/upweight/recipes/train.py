"""dpo(): from a config to an aligned model and a report that says whether it worked."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from upweight.config import Resolved, dump, leaf_values
from upweight.data.pack import bins, collate, merge_same_prompts
from upweight.data.stream import batch_for_step, plan_epoch
from upweight.errors import OutputError
from upweight.evidence.report import write_report
from upweight.evidence.track import Target, Tracking, clients, tracking
from upweight.losses import PAIR_LOSSES
from upweight.models.export import export
from upweight.recipes.environment import write_environment
from upweight.recipes.evaluation import evaluate_sets
from upweight.recipes.prepare import account_record
from upweight.recipes.reference import Against, ask_reference
from upweight.recipes.resume import require_same_models, resume_command
from upweight.recipes.screen import Screen, Silent
from upweight.recipes.start import Start, examined_sets, start
from upweight.recipes.state import State, go_back, log, make_room, save
from upweight.training import checkpoint
from upweight.training.loop import Hooks, Progress, fit, rehearse, too_large
from upweight.training.objectives import Objective, pair
from upweight.training.optimizer import make_optimizer
from upweight.training.rundir import RunDir, open_run_dir, require_space, write_atomic
from upweight.trust.identity import require_quiet, starts_elsewhere
from upweight.trust.preflight import swapped
from upweight.trust.watch import Watch
from upweight.types import Forest, Tree

WORTH_A_TRY = 50
"""Bins of an epoch from which on its largest is tried before the first step."""


@dataclass(frozen=True)
class Result:
    """Where a run's results are. `finished` is False when it was asked to stop."""

    out: Path
    model: Path | None
    report: Path | None
    finished: bool
    steps: int


def dpo(resolved: Resolved, screen: Screen | None = None) -> Result:
    """Train `resolved.run.model` on preferences into `resolved.run.out`.

    Raises UpweightError children for everything that is the data's, the config's, the model's or
    the disk's; a run that fails before its first step leaves an empty folder. From there on Ctrl-C
    and SIGTERM save a checkpoint and return an unfinished Result.
    """
    screen = screen or Silent()
    run = resolved.run
    assert run.out is not None
    to_open = clients(run.track)
    with open_run_dir(Path(run.out), run.resume) as rundir, contextlib.ExitStack() as stack:
        saved = _newest(rundir)
        begun = start(resolved, screen, saved.position if saved else None)
        screen.stage("reference")
        against = ask_reference(begun.run, begun.lm, begun.prepared, screen)
        if saved is not None:
            require_same_models(saved.position, begun.run, against)
        begun = _with_reference(begun, against, screen, fresh=saved is None)
        # Before the first file of the run, so that a login that is wrong leaves an empty folder.
        target = Target(rundir.path, leaf_values(begun.run), saved.position.step if saved else None)
        trackers = stack.enter_context(tracking(to_open, target, screen.note))
        stop = stack.enter_context(_stop_on_signals(screen))
        state = _state(begun, against, rundir, screen, trackers)
        progress = go_back(state, saved) if saved is not None else Progress()
        _write_records(state)
        screen.stage("training")
        # A run that stopped at step 0 was evaluated before it was saved.
        if saved is None and evaluate_sets(state, progress):
            save(state, progress)
        if not _train(state, progress, stop):
            screen.note(f"stopped after step {progress.step}; checkpoint saved.")
            screen.note(f"Go on with:  {resume_command(rundir.path)}")
            return Result(rundir.path, None, None, False, progress.step)
        return _finish(state, progress)


def _newest(rundir: RunDir) -> checkpoint.TrainState | None:
    """The checkpoint that is gone on with, or None for a run that begins."""
    if not rundir.resumed:
        return None
    newest = checkpoint.recover(rundir.file("checkpoints"))
    if newest is None:
        raise OutputError(
            f"{rundir.path} has no whole checkpoint to resume: those in checkpoints are damaged. "
            "Start a new run with another out."
        )
    return checkpoint.load(newest, verified=True)


def _state(
    begun: Start, against: Against, rundir: RunDir, screen: Screen, trackers: Tracking
) -> State:
    capacity, recomputing = begun.run.batch.tokens_per_bin, begun.run.compute.checkpointing
    assert capacity is not None
    optimizer = _optimizer(begun)
    watch = Watch(begun.lm, begun.run.watch)
    return State(
        begun, against, rundir, optimizer, screen, trackers, capacity, watch,
        recomputing=recomputing,
    )  # fmt: skip


def _optimizer(begun: Start) -> torch.optim.Optimizer:
    options = begun.run.optimizer
    return make_optimizer(
        begun.lm.model,
        learning_rate=begun.plan.learning_rate,
        weight_decay=options.weight_decay,
        beta1=options.beta1,
        beta2=options.beta2,
        epsilon=options.epsilon,
        moments=options.moments,
    )


def _with_reference(begun: Start, against: Against, screen: Screen, *, fresh: bool) -> Start:
    """With what the reference's log-probs say against the labels and, where the policy is still at
    its start, against it."""
    run, trees = begun.run, begun.prepared.trees["train"]
    asked = [swapped(examined, against.logps) for examined in examined_sets(run, begun.prepared)]
    if run.lora is None or not run.lora.dropout:
        require_quiet(begun.lm, trees)
    if fresh:
        named = run.reference is not None
        asked.append(starts_elsewhere(begun.lm, against.logps, trees, named=named))
    found = tuple(finding for finding in asked if finding is not None)
    for finding in found:
        screen.note(str(finding))
    findings = (*begun.prepared.findings, *found)
    return replace(begun, prepared=replace(begun.prepared, findings=findings))


def _write_records(state: State) -> None:
    """What is known of a run when it begins."""
    account = json.dumps(account_record(state.begun.prepared), indent=1)
    settings = dump(state.begun.resolved.with_value("resume", False, "default"))
    write_atomic(state.rundir.file("account.json"), account)
    write_atomic(state.rundir.file("run.yaml"), settings)
    write_environment(state, finished=False)


def _train(state: State, progress: Progress, stop: threading.Event) -> bool:
    run, trees = state.run, state.begun.prepared.trees["train"]

    def forests(step: int) -> Sequence[Forest]:
        batch = batch_for_step(trees, run.batch.pairs_per_step, run.seed, step)
        return [collate(group) for group in _packed(state, batch)]

    def on_out_of_memory(progress: Progress, batch: Sequence[Forest]) -> bool:
        return make_room(state, f"step {progress.step + 1}", batch)

    loss = functools.partial(
        PAIR_LOSSES[run.objective], beta=run.loss.beta, label_smoothing=run.loss.label_smoothing
    )
    hooks = Hooks(
        on_record=functools.partial(log, state),
        evaluate=functools.partial(evaluate_sets, state),
        save=functools.partial(save, state),
        should_stop=stop.is_set,
        on_out_of_memory=on_out_of_memory,
    )
    objective = pair(state.against.logps, loss, run.loss.beta)
    _try_largest(state, objective, progress.step)
    return fit(state.lm, state.optimizer, objective, forests, state.begun.plan, hooks, progress)


def _packed(state: State, trees: Sequence[Tree]) -> list[list[Tree]]:
    """Bins of a step's trees, the largest first: what runs out of memory does so at once."""
    capacity = state.tokens_per_bin
    return sorted(bins(merge_same_prompts(trees, capacity), capacity), key=_num_tokens)


def _num_tokens(group: Sequence[Tree]) -> int:
    return -sum(tree.num_tokens for tree in group)


def _try_largest(state: State, objective: Objective, step: int) -> None:
    """The largest bin of an epoch, before the first step: a run that does not fit into memory
    finds out in its first minute. Not where it would be more than a fiftieth of the work."""
    run, trees = state.run, state.begun.prepared.trees["train"]
    steps = plan_epoch(trees, run.batch.pairs_per_step, run.seed, 0)
    while True:
        packed = [_packed(state, [trees[i] for i in numbers]) for numbers in steps]
        largest = min((groups[0] for groups in packed), key=_num_tokens)
        first = _packed(state, batch_for_step(trees, run.batch.pairs_per_step, run.seed, step))[0]
        if _num_tokens(first) <= _num_tokens(largest) or sum(map(len, packed)) < WORTH_A_TRY:
            return
        forest = collate(largest)
        failed = rehearse(state.lm, state.optimizer, objective, forest)
        if failed is None:
            return
        if not make_room(state, "the largest bin of the run", [forest]):
            raise too_large("the largest bin of the run", [forest], failed)


def _finish(state: State, progress: Progress) -> Result:
    state.screen.stage("export")
    weights = sum(p.numel() * p.element_size() for p in state.lm.model.parameters())
    require_space(state.rundir.path, weights)
    # A server stops by the generation config: at every token that a trained response ends with.
    stop_ids = sorted(state.begun.prepared.renderer.stop_ids)
    state.lm.causal.generation_config.eos_token_id = stop_ids  # pyright: ignore
    written = export(state.lm, state.rundir.file("model"), merge=state.run.export.merge)
    write_environment(state, finished=True)
    report = write_report(state.rundir.path)
    state.screen.note(f"model:  {written[0]}")
    state.screen.note(f"report: {report}")
    state.trackers.close(finished=True)
    return Result(state.rundir.path, written[0], report, True, progress.step)


@contextlib.contextmanager
def _stop_on_signals(screen: Screen) -> Generator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set; a second one of them ends the process as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: object) -> None:
        stop.set()
        for s, handler in before.items():
            signal.signal(s, handler)
        screen.note("stopping: this step is finished and saved first (again to stop at once)")

    for s in before:
        signal.signal(s, handle)
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def rebuild_report(folder: Path) -> Path:
    """report.html again, from the run directory's records. Raises OutputError for other folders."""
    if not os.path.isfile(folder / "run.yaml"):
        raise OutputError(f"{folder} is not a run directory: it has no run.yaml.")
    return write_report(folder)
