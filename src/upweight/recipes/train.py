"""train_model(): from a config to an aligned model and a report that says whether it worked."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from upweight.config import Resolved, dump, leaf_values
from upweight.data.pack import bins_of_step, collate, num_tokens
from upweight.data.stream import plan_epoch, planned
from upweight.errors import OutputError, Refusal
from upweight.evidence.records import read_records
from upweight.evidence.report import write_report
from upweight.evidence.report.verdict import verdict
from upweight.evidence.track import Target, Tracking, clients, tracking
from upweight.models.export import export, export_reward_model, probed
from upweight.models.nf4 import FILE as QUANTIZATION
from upweight.models.probes import served_otherwise
from upweight.recipes.beside import written_bytes
from upweight.recipes.card import write_card
from upweight.recipes.environment import write_environment
from upweight.recipes.evaluation import evaluate_sets
from upweight.recipes.kinds import KINDS
from upweight.recipes.losses import pair_loss, score_loss
from upweight.recipes.online import online, values_of
from upweight.recipes.reference import Against, ask_reference
from upweight.recipes.resume import (
    require_same_models,
    require_same_rewards,
    resume_command,
    reward_digests,
)
from upweight.recipes.rewarding import Scorer, ask_rewards, make_scorer, require_rewards
from upweight.recipes.screen import Screen, Silent
from upweight.recipes.start import Start, found_beside, start, with_answers, with_reference
from upweight.recipes.state import (
    State,
    Values,
    Work,
    computing,
    go_back,
    log,
    make_room,
    note,
    save,
    trained_models,
    trained_modules,
    write_account,
)
from upweight.recipes.suspects import write_suspects
from upweight.training import checkpoint, objectives
from upweight.training.loop import Hooks, Progress, fit, rehearse, too_large
from upweight.training.moment import TrainState
from upweight.training.objectives import Objective
from upweight.training.optimizer import make_optimizer
from upweight.training.records import append_jsonl
from upweight.training.rundir import (
    RunDir,
    open_run_dir,
    require_space,
    write_atomic,
)
from upweight.trust.finding import Finding
from upweight.trust.watch import Told, Watch
from upweight.types import Forest, Tree

WORTH_A_TRY = 50
"""Bins of an epoch from which on its largest is tried before the first step."""

VALUE_RATE = 10.0
"""A value model starts from nothing, and learns at so many times the policy's rate."""

OF_THE_NEXT_STEP = ("UW105", "UW302", "UW303")
"""Refusals of a step that is not taken then. What is not the last step's is not on record as such:
a run that resumes from there must lose the line."""

PROBES = 4
"""Prompts that a reward model is asked about again when its export is read back."""


@dataclass(frozen=True)
class Result:
    """Where a run's results are. `finished` is False when it was asked to stop before its last step
    was done, and `stopping` is True when it was asked to stop at all: nothing begins after it."""

    out: Path
    model: Path | None
    report: Path | None
    finished: bool
    steps: int
    stopping: bool = False


def train_model(resolved: Resolved, screen: Screen | None = None) -> Result:
    """Train `resolved.run.model` by its objective into `resolved.run.out`.

    Raises UpweightError children for everything that is the data's, the config's, the model's or
    the disk's; a run that fails before its first file leaves no folder that was not there. From its
    first step on Ctrl-C and SIGTERM save a checkpoint and return an unfinished Result.
    """
    screen = screen or Silent()
    run = resolved.run
    assert run.out is not None
    to_open = clients(run.track)
    require_rewards(run)
    with open_run_dir(Path(run.out), run.resume) as rundir, contextlib.ExitStack() as stack:
        saved = _newest(rundir)
        begun = start(resolved, screen, saved.position if saved else None)
        if saved is None:
            ask_rewards(begun.run, begun.prepared, screen)
        if KINDS[begun.run.objective].answers:
            screen.stage("reference")
        against = ask_reference(begun.run, begun.lm, begun.prepared, screen)
        if saved is not None:
            require_same_models(saved.position, begun.run, against)
        begun = with_reference(
            begun, against.logps, against.own, screen, fresh=saved is None, probes=against.probes
        )
        begun = with_answers(begun, against.answers, screen)
        # Before the first file of the run, so that a login that is wrong leaves none.
        target = Target(rundir.path, leaf_values(begun.run), saved.position.step if saved else None)
        trackers = stack.enter_context(tracking(to_open, target, screen.note))
        stop = stack.enter_context(_stop_on_signals(screen))
        state = _state(begun, against, rundir, screen, trackers)
        if saved is not None:
            require_same_rewards(saved.position, begun.run, state.reward_digests)
        # Before weights are restored: some of it is of the policy at its start.
        work = WORK[begun.run.objective](state)
        state.rounds = work.rounds
        progress = go_back(state, saved) if saved is not None else Progress()
        _begin_anew(rundir, screen)
        _write_records(state)
        screen.stage("training")
        with _refusals_on_record(state, progress):
            # A run that stopped at step 0 was evaluated before it was saved.
            if saved is None and evaluate_sets(state, progress):
                save(state, progress)
            finished = _train(state, work, progress, stop)
        if not finished:
            screen.note(f"stopped after step {progress.step}; checkpoint saved.")
            screen.note(f"Go on with:  {resume_command(rundir.path)}")
            return Result(rundir.path, None, None, False, progress.step, stopping=True)
        if progress.step < begun.plan.total_steps:
            screen.note(
                f"every prompt was asked as often as epochs say after step {progress.step} of "
                f"{begun.plan.total_steps}: rounds ended early"
            )
        result = _finish(state, progress)
        return replace(result, stopping=stop.is_set())


@contextlib.contextmanager
def _refusals_on_record(state: State, progress: Progress) -> Generator[None]:
    """A refusal of the block stands in metrics.jsonl and in the report before it ends the run."""
    try:
        yield
    except Refusal as refusal:
        step = refusal.found.get("step", progress.step + (refusal.code in OF_THE_NEXT_STEP))
        finding = asdict(Finding(str(refusal.code), refusal.said, metric="loss"))
        line = {"step": step, "kind": "warning", "refused": True, **finding}
        append_jsonl(state.rundir.file("metrics.jsonl"), line)
        state.screen.note(f"report: {write_report(state.rundir.path)}")
        raise


def _newest(rundir: RunDir) -> TrainState | None:
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
    values = values_of(begun.run, begun.lm, sorted(begun.prepared.renderer.stop_ids))
    optimizer = _optimizer(begun, values)
    plan, trees = begun.plan, begun.prepared.trees["train"]
    answers = KINDS[begun.run.objective].answers
    objective = begun.run.objective
    told = Told(begun.run.loss.beta, plan.total_steps, trees, plan.log_every, objective)
    watch = Watch(begun.lm, begun.run.watch, told, trained_modules(begun.lm, _heard(begun, values)))
    return State(
        begun, against, rundir, optimizer, screen, trackers, capacity, watch,
        values=values, judge=_judge(begun), recomputing=recomputing,
        reward_digests=reward_digests(begun.run, begun.prepared),
        start=probed(begun.lm, begun.prepared.renderer) if answers else None,
    )  # fmt: skip


def _heard(begun: Start, values: Values | None) -> Values | None:
    """The value model, unless its loss is asked to weigh nothing."""
    policy = begun.run.policy
    return None if policy.value == "shared" and not policy.value_coefficient else values


def _judge(begun: Start) -> Scorer | None:
    """What scores the answers of an evaluation."""
    run = begun.run
    spec = run.evaluation.true_reward or run.rollout.reward
    return None if spec is None else make_scorer(spec, run, begun.lm, begun.prepared.renderer.end)


def _optimizer(begun: Start, values: Values | None) -> torch.optim.Optimizer:
    options, own_rate = begun.run.optimizer, begun.run.policy.value_learning_rate
    factor = VALUE_RATE if own_rate is None else own_rate / begun.plan.learning_rate
    return make_optimizer(
        trained_modules(begun.lm, values),
        value_prefix=None if values is None else "value.",
        value_rate_factor=factor,
        learning_rate=begun.plan.learning_rate,
        weight_decay=options.weight_decay,
        beta1=options.beta1,
        beta2=options.beta2,
        epsilon=options.epsilon,
        moments=options.moments,
    )


def _begin_anew(rundir: RunDir, screen: Screen) -> None:
    if rundir.left:
        rundir.remove_left()
        screen.note(
            f"{rundir.path} held a run that stopped before its first checkpoint. It is begun anew; "
            f"removed: {', '.join(rundir.left)}"
        )


def _write_records(state: State) -> None:
    """What is known of a run when it begins."""
    resolved = state.begun.resolved.with_value("resume", False, "default")
    settings = dump(resolved, found_beside(state.begun))
    write_account(state)
    write_atomic(state.rundir.file("run.yaml"), settings)
    write_environment(state, finished=False)


def _train(state: State, work: Work, progress: Progress, stop: threading.Event) -> bool:
    def forests(step: int) -> Sequence[Forest]:
        batch = work.trees(step)
        forests = [collate(group) for group in _packed(state, batch)]
        plan = None if work.plan is None else work.plan(step)
        state.watch.packed(step, plan, batch, forests)
        state.noting = step if plan is not None and plan.epoch == 0 else None
        state.noted.pop(step, None)
        return forests

    def on_out_of_memory(progress: Progress, forest: Forest) -> bool:
        return make_room(state, f"step {progress.step + 1}", forest)

    hooks = Hooks(
        on_record=functools.partial(log, state),
        evaluate=functools.partial(evaluate_sets, state),
        save=functools.partial(save, state),
        should_stop=stop.is_set,
        on_out_of_memory=on_out_of_memory,
        is_done=state.is_done,
        epoch=state.epoch,
        computing=computing(trained_models(state.lm, state.values), lambda: state.recomputing),
    )
    plan = state.begun.plan
    if work.plan is not None:
        with hooks.computing():
            _try_largest(state, work, progress.step)
    return fit(state.lm, state.optimizer, work.objective, forests, plan, hooks, progress)


def _from_rows(state: State, objective: Objective) -> Work:
    """Steps made of the rows, in another order each epoch."""
    trees, run = state.begun.prepared.trees["train"], state.run
    plan = planned(trees, run.batch.pairs_per_step, run.seed)
    return Work(objective, lambda step: [trees[i] for i in plan(step).trees], plan)


def dpo(state: State) -> Work:
    run = state.run
    noting = functools.partial(note, state)
    reference = state.against.logps.logps
    return _from_rows(state, objectives.pair(reference, pair_loss(run), run.loss.beta, noting))


def sft(state: State) -> Work:
    return _from_rows(state, objectives.sft())


def reward(state: State) -> Work:
    loss = score_loss(state.run)
    return _from_rows(state, objectives.reward(loss, state.run.loss.margin))


WORK: dict[str, Callable[[State], Work]] = {
    "dpo": dpo,
    "sft": sft,
    "reward": reward,
    "ppo": online,
    "grpo": online,
    "rloo": online,
    "online_dpo": online,
}
"""What each objective has the one loop do."""


def _packed(state: State, trees: Sequence[Tree]) -> list[list[Tree]]:
    return bins_of_step(trees, state.tokens_per_bin, splitting=state.splitting)


def _try_largest(state: State, work: Work, step: int) -> None:
    """The largest bin of an epoch, before the first step: a run that does not fit into memory
    finds out in its first minute. Not where it would be more than a fiftieth of the work."""
    run, trees = state.run, state.begun.prepared.trees["train"]
    numbers_by_step = plan_epoch(trees, run.batch.pairs_per_step, run.seed, 0)
    while True:
        packed = [_packed(state, [trees[i] for i in numbers]) for numbers in numbers_by_step]
        largest = max((groups[0] for groups in packed), key=num_tokens)
        first = _packed(state, work.trees(step))[0]
        if num_tokens(first) >= num_tokens(largest) or sum(map(len, packed)) < WORTH_A_TRY:
            return
        forest = collate(largest)
        failed = rehearse(state.lm, state.optimizer, work.objective, forest)
        if failed is None:
            return
        if not make_room(state, "the largest bin of the run", forest):
            raise too_large("the largest bin of the run", failed)


def _finish(state: State, progress: Progress) -> Result:
    state.screen.stage("export")
    require_space(state.rundir.path, written_bytes(state.lm))
    prepared = state.begun.prepared
    if KINDS[state.run.objective].answers:
        # A server stops by the generation config: at every token that a trained response ends with.
        stop_ids = sorted(prepared.renderer.stop_ids)
        state.lm.causal.generation_config.eos_token_id = stop_ids  # pyright: ignore
        written = export(
            state.lm,
            state.rundir.file("model"),
            merge=state.run.export.merge,
            renderer=prepared.renderer,
            rows=prepared.rows,
            start=state.start,
        )
    else:
        trees, folder = prepared.trees["train"][:PROBES], state.rundir.file("model")
        written = [export_reward_model(state.lm, folder, trees, prepared.renderer)]
    write_card(written[0], state.run, progress.step, prepared.renderer.date)
    write_environment(state, finished=True)
    if KINDS[state.run.objective].by_reference:
        write_suspects(state)
    report = write_report(state.rundir.path)
    said = verdict(read_records(state.rundir.path))
    for line in (said.headline, *said.cautions):
        state.screen.note(" ".join(line.split()))
    state.screen.note(f"model:  {written[0]}")
    if (written[0] / QUANTIZATION).is_file():
        state.screen.note(
            f"to load it: its base in nf4, by BitsAndBytesConfig with what {QUANTIZATION} says"
        )
    if advice := served_otherwise(prepared.renderer, prepared.rows):
        state.screen.note(f"to serve it: {advice}")
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
    written = ("account.json", "environment.json", "metrics.jsonl")
    if not any(os.path.isfile(folder / name) for name in written):
        raise OutputError(
            f"{folder} has a run.yaml and none of {', '.join(written)}: no run was made there. "
            "Name the folder of one, its out."
        )
    return write_report(folder)
