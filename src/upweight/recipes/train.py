"""dpo(): from a config to an aligned model and a report that says whether it worked."""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import json
import platform
import signal
import sys
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pyarrow.parquet as pq
import torch
import transformers

from upweight.config import Resolved, Run, dump, leaf_values
from upweight.data.pack import bins, collate, merge_same_prompts
from upweight.data.stream import batch_for_step, num_steps, plan_epoch
from upweight.errors import ConfigError, OutputError
from upweight.evidence import evaluate
from upweight.evidence.report import write_report
from upweight.evidence.track import Target, Tracking, clients, tracking
from upweight.losses import PAIR_LOSSES
from upweight.models.load import LanguageModel, add_lora, checkpoint_layers, export
from upweight.models.reference import Reference
from upweight.models.sample import Sample
from upweight.recipes.prepare import (
    Prepared,
    account_lines,
    account_record,
    describe,
    fill_reference,
    load_policy,
    prepare,
    reference_model,
    with_rates,
)
from upweight.recipes.screen import Screen, Silent
from upweight.training import checkpoint
from upweight.training.loop import Hooks, Plan, Progress, Record, fit
from upweight.training.objectives import pair
from upweight.training.optimizer import make_optimizer
from upweight.training.rundir import (
    RunDir,
    append_jsonl,
    open_run_dir,
    require_space,
    truncate_jsonl_after,
    truncate_ledger_after,
    write_atomic,
    write_ledger,
)
from upweight.types import Forest, Tree

FREE_TO_CHANGE = {"resume", "out", "log_every", "track", "compute.threads", "checkpoint.keep"}
"""Keys that a resumed run may have otherwise than the run it goes on with."""


@dataclass(frozen=True)
class Result:
    """Where a run's results are. `finished` is False when it was asked to stop."""

    out: Path
    model: Path | None
    report: Path | None
    finished: bool
    steps: int


@dataclass
class _State:
    """What the hooks of one run share."""

    run: Run
    lm: LanguageModel
    rundir: RunDir
    prepared: Prepared
    reference: Reference
    plan: Plan
    screen: Screen
    optimizer: torch.optim.Optimizer
    digest: str
    trackers: Tracking
    best: float | None = None
    best_step: int | None = None
    reference_answers: dict[str, list[Sample]] = field(default_factory=dict[str, list[Sample]])


def dpo(resolved: Resolved, screen: Screen | None = None) -> Result:
    """Train `resolved.run.model` on preferences into `resolved.run.out`.

    Raises UpweightError children for everything that is the data's, the config's, the model's or
    the disk's. Ctrl-C and SIGTERM save a checkpoint and return an unfinished Result.
    """
    screen = screen or Silent()
    resolved = with_rates(resolved)
    run = resolved.run
    assert run.out is not None
    to_open = clients(run.track)
    with (
        open_run_dir(Path(run.out), run.resume) as rundir,
        _stop_on_signals(screen) as stop,
        contextlib.ExitStack() as stack,
    ):
        screen.stage("model")
        newest = checkpoint.recover(rundir.file("checkpoints")) if run.resume else None
        lm = load_policy(run)
        # What the probe found is the run's from here on, also where it is resumed.
        dtype = str(lm.compute_dtype).removeprefix("torch.")
        if run.compute.dtype == "auto":
            resolved = resolved.with_value("compute.dtype", dtype, "resolved")
            run = resolved.run
        screen.stage("rows")
        prepared = prepare(run, lm)
        for line in account_lines(prepared):
            screen.note(line)
        # Before the first file of the run, so that a login that is wrong leaves an empty folder.
        target = Target(rundir.path, leaf_values(run), _step_of(newest))
        trackers = stack.enter_context(tracking(to_open, target, screen.note))
        write_atomic(rundir.file("account.json"), json.dumps(account_record(prepared), indent=1))
        screen.stage("reference")
        everything = [tree for trees in prepared.trees.values() for tree in trees]
        reference = fill_reference(run, lm, everything, screen)
        if run.lora is not None:
            lora = run.lora
            lm = add_lora(
                lm,
                rank=lora.rank,
                alpha=lora.alpha,
                dropout=lora.dropout,
                targets=lora.targets,
                seed=run.seed,
            )
        if run.compute.checkpointing:
            checkpoint_layers(lm)
        screen.note(f"model: {lm.name}, {describe(lm)}")
        state, progress = _begin(
            resolved, lm, rundir, prepared, reference, screen, newest, trackers
        )
        screen.stage("training")
        if progress.step == 0:
            _evaluate(state, progress)
        finished = _train(state, progress, stop)
        if not finished:
            screen.note(f"stopped after step {progress.step}; checkpoint saved.")
            screen.note(f"Go on with:  {resume_command(rundir.path)}")
            return Result(rundir.path, None, None, False, progress.step)
        return _finish(state, progress)


def _step_of(newest: Path | None) -> int | None:
    return int(newest.name.removeprefix(checkpoint.CHECKPOINT)) if newest is not None else None


def resume_command(out: Path) -> str:
    return f"upweight train {out / 'run.yaml'} resume=true"


def _begin(
    resolved: Resolved,
    lm: LanguageModel,
    rundir: RunDir,
    prepared: Prepared,
    reference: Reference,
    screen: Screen,
    newest: Path | None,
    trackers: Tracking,
) -> tuple[_State, Progress]:
    """The plan, the optimizer, and with `newest` the state of the run that is gone on with."""
    run = resolved.run
    trees = prepared.trees["train"]
    rate = run.optimizer.learning_rate
    assert rate is not None
    size = run.batch.pairs_per_step
    total = run.steps or num_steps(trees, size, run.seed, run.epochs)
    every = run.evaluation.every or max(1, total // 10)
    plan = Plan(
        total_steps=total,
        steps_per_epoch=len(plan_epoch(trees, size, run.seed, 0)),
        learning_rate=rate,
        warmup=run.optimizer.warmup,
        schedule=run.optimizer.schedule,
        max_grad_norm=run.optimizer.max_grad_norm,
        log_every=run.log_every,
        evaluate_every=every if len(prepared.trees) > 1 else None,
        checkpoint_every=run.checkpoint.every or max(1, total // 10),
    )
    options = run.optimizer
    optimizer = make_optimizer(
        lm.model,
        learning_rate=rate,
        weight_decay=options.weight_decay,
        beta1=options.beta1,
        beta2=options.beta2,
        epsilon=options.epsilon,
    )
    digest = _digest(run)
    state = _State(run, lm, rundir, prepared, reference, plan, screen, optimizer, digest, trackers)
    progress = Progress()
    if newest is not None:
        saved = checkpoint.load(newest, verified=True)
        _require_same_run(state, saved.position)
        checkpoint.restore(lm.model, optimizer, saved)
        where = saved.position
        progress = Progress(where.step, where.num_tokens, where.seconds)
        state.best, state.best_step = where.best, where.best_step
        truncate_jsonl_after(rundir.file("metrics.jsonl"), where.step)
        truncate_jsonl_after(rundir.file("samples.jsonl"), where.step)
        truncate_ledger_after(rundir.file("ledger.parquet"), where.step)
        screen.note(f"resumed after step {where.step} of {total}")
    write_atomic(rundir.file("run.yaml"), dump(resolved.with_value("resume", False, "default")))
    _write_environment(state, finished=False)
    weights = sum(p.numel() * p.element_size() for p in lm.model.parameters())
    trained = sum(p.numel() * p.element_size() for p in lm.model.parameters() if p.requires_grad)
    require_space(rundir.path, weights + 3 * trained * (run.checkpoint.keep + 1))
    return state, progress


def _digest(run: Run) -> str:
    """sha256 of every key that decides what a step computes."""
    kept = {key: value for key, value in leaf_values(run).items() if key not in FREE_TO_CHANGE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def _require_same_run(state: _State, saved: checkpoint.Position) -> None:
    if saved.reference_fingerprint != state.reference.fingerprint:
        raise ConfigError(
            f"resume: {state.rundir.path} was trained against another reference "
            f"({saved.reference_fingerprint[:12]} then, {state.reference.fingerprint[:12]} with "
            "this model, dtype and machine). Start a new run with another out."
        )
    if saved.config_digest != state.digest:
        raise ConfigError(
            f"resume: the run in {state.rundir.path} was started with other settings. Go on with "
            f"its own:  {resume_command(state.rundir.path)}  (free to change: "
            f"{', '.join(sorted(FREE_TO_CHANGE - {'resume', 'out'}))})."
        )


def _train(state: _State, progress: Progress, stop: threading.Event) -> bool:
    run, trees = state.run, state.prepared.trees["train"]
    capacity = run.batch.tokens_per_bin

    def forests(step: int) -> Sequence[Forest]:
        batch = batch_for_step(trees, run.batch.pairs_per_step, run.seed, step)
        return [collate(group) for group in bins(merge_same_prompts(batch, capacity), capacity)]

    loss = functools.partial(
        PAIR_LOSSES[run.objective], beta=run.loss.beta, label_smoothing=run.loss.label_smoothing
    )
    hooks = Hooks(
        on_record=functools.partial(_log, state),
        evaluate=functools.partial(_evaluate, state),
        save=functools.partial(_save, state),
        should_stop=stop.is_set,
    )
    objective = pair(state.reference, loss, run.loss.beta)
    return fit(state.lm, state.optimizer, objective, forests, state.plan, hooks, progress)


def _log(state: _State, record: Record) -> None:
    append_jsonl(state.rundir.file("metrics.jsonl"), record)
    state.trackers.log(record)
    state.screen.record(record, state.plan.total_steps)


def _save(state: _State, progress: Progress) -> None:
    folder = state.rundir.file("checkpoints")
    position = checkpoint.Position(
        step=progress.step,
        epoch=progress.step / state.plan.steps_per_epoch,
        num_tokens=progress.num_tokens,
        order_seed=state.run.seed,
        reference_fingerprint=state.reference.fingerprint,
        config_digest=state.digest,
        best=state.best,
        best_step=state.best_step,
        seconds=progress.seconds,
    )
    checkpoint.save(folder, checkpoint.capture(state.lm.model, state.optimizer, position))
    best = None
    if state.best_step is not None:
        best = folder / f"step-{state.best_step:08d}"
    checkpoint.prune(folder, state.run.checkpoint.keep, best)


def _evaluate(state: _State, progress: Progress) -> None:
    """Scores every named set, samples a few answers, and writes what it found."""
    run, last = state.run, progress.step == state.plan.total_steps
    rows: list[evaluate.Row] = []
    for name, trees in state.prepared.trees.items():
        if name == "train":
            continue
        scored = evaluate.score_trees(
            state.lm, trees, state.reference, run.loss.beta, run.batch.tokens_per_bin
        )
        record: Record = {
            "step": progress.step,
            "epoch": progress.step / state.plan.steps_per_epoch,
            "kind": "eval",
            "set": name,
            **evaluate.summary(
                scored,
                [t.prompt for t in trees for _ in t.preferences],
                run.loss.beta,
                run.loss.label_smoothing,
            ),
        }
        if run.evaluation.samples:
            record |= _sample(state, progress, name, trees)
        _log(state, record)
        _note_best(state, progress, name, record)
        rows += [{"step": progress.step, "set": name, **row} for row in scored]
        if last:
            _add_texts(state, trees, rows[-len(scored) :])
    if rows:
        _append_ledger(state, rows)


def _note_best(state: _State, progress: Progress, name: str, record: Record) -> None:
    """Remember where `checkpoint.best` (SET/METRIC, or METRIC of the first set) is best."""
    wanted = state.run.checkpoint.best
    if wanted is None:
        return
    first = next(n for n in state.prepared.trees if n != "train")
    metric = wanted.removeprefix(f"{name}/")
    if metric == wanted and name != first:
        return
    value = record.get(metric)
    if not isinstance(value, float):
        if name == first or metric != wanted:
            known = ", ".join(sorted(k for k, v in record.items() if isinstance(v, float)))
            raise ConfigError(
                f"checkpoint.best is {wanted}, which is no metric. There are: {known}."
            )
        return
    better = -value if metric == "loss" or metric.startswith("kl") else value
    if state.best is None or better > state.best:
        state.best, state.best_step = better, progress.step


def _sample(
    state: _State, progress: Progress, name: str, trees: Sequence[Tree]
) -> dict[str, object]:
    """Answers of policy and reference to the set's first prompts, side by side; sampled KL."""
    run = state.run.evaluation
    prompts = list(dict.fromkeys(tree.prompt for tree in trees))[: run.samples]
    options = (run.max_new_tokens, run.temperature, state.run.seed)
    policy = evaluate.draw(state.lm, prompts, *options)
    policy_logps = evaluate.sample_logps(state.lm, prompts, policy)
    with reference_model(state.run, state.lm) as reference:
        if name not in state.reference_answers:
            state.reference_answers[name] = evaluate.draw(reference, prompts, *options)
        reference_logps = evaluate.sample_logps(reference, prompts, policy)
    answers = state.reference_answers[name]
    for line in evaluate.sample_records(
        state.lm, prompts, policy, answers, policy_logps, reference_logps
    ):
        record = {"step": progress.step, "set": name, **line}
        append_jsonl(state.rundir.file("samples.jsonl"), record)
    return {
        **evaluate.kl_record(policy_logps, reference_logps),
        "length": sum(len(s.tokens) for s in policy) / len(policy),
        "reference_length": sum(len(s.tokens) for s in answers) / len(answers),
    }


def _add_texts(state: _State, trees: Sequence[Tree], rows: Sequence[evaluate.Row]) -> None:
    remaining = iter(rows)
    for tree in trees:
        texts = evaluate.texts(tree, state.lm.tokenizer)
        prompt = state.lm.tokenizer.decode(list(tree.prompt), skip_special_tokens=False)
        for _ in tree.preferences:
            row = next(remaining)
            row["prompt_text"] = prompt
            row["chosen_text"], row["rejected_text"] = texts[row["chosen"]], texts[row["rejected"]]


def _append_ledger(state: _State, rows: Sequence[evaluate.Row]) -> None:
    path = state.rundir.file("ledger.parquet")
    table = evaluate.ledger_table(rows)
    if path.exists():
        import pyarrow as pa

        table = pa.concat_tables([pq.read_table(path, schema=evaluate.LEDGER), table])
    write_ledger(path, table)


def _finish(state: _State, progress: Progress) -> Result:
    state.screen.stage("export")
    weights = sum(p.numel() * p.element_size() for p in state.lm.model.parameters())
    require_space(state.rundir.path, weights)
    written = export(state.lm, state.rundir.file("model"), merge=state.run.export.merge)
    _write_environment(state, finished=True)
    report = write_report(state.rundir.path)
    state.screen.note(f"model:  {written[0]}")
    state.screen.note(f"report: {report}")
    state.trackers.close(finished=True)
    return Result(state.rundir.path, written[0], report, True, progress.step)


def _write_environment(state: _State, finished: bool) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    path = state.rundir.file("environment.json")
    started = now
    if path.exists():
        with contextlib.suppress(ValueError, KeyError):
            started = json.loads(path.read_text())["started"]
    lm, digest = state.lm, hashlib.sha256()
    for file in [*state.run.data.path, *(f for s in state.run.evaluation.sets.values() for f in s)]:
        with contextlib.suppress(OSError), open(file, "rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    record: dict[str, Any] = {
        "upweight": importlib.metadata.version("upweight"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "platform": platform.platform(),
        "cpu": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if lm.device.type == "cuda" else None,
        "model": lm.name,
        # Without a named reference the model at its start is the reference.
        "model_fingerprint": state.reference.fingerprint if state.run.reference is None else None,
        "reference_fingerprint": state.reference.fingerprint,
        "data_fingerprint": digest.hexdigest(),
        "dtype": str(lm.compute_dtype).removeprefix("torch."),
        "attention": lm.plan.attention,
        "sharing": lm.plan.describe(),
        "started": started,
        "finished": now if finished else None,
        "command": " ".join(sys.argv),
    }
    write_atomic(path, json.dumps(record, indent=1))


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
    if not (folder / "run.yaml").is_file():
        raise OutputError(f"{folder} is not a run directory: it has no run.yaml.")
    return write_report(folder)
