"""What metrics.jsonl is written, sent to a dashboard too: TensorBoard, W&B, MLflow, trackio.

metrics.jsonl is the record and is whole without a tracker; a tracker gets its numbers, each as
train/KEY or eval/SET/KEY, and the resolved config. Every tracker is used through its own client,
with that client's own settings (WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID and so on), so
that where the numbers go is for the user to say.

Resuming: metrics.jsonl forgets what the earlier process logged after the checkpoint. TensorBoard
forgets it as well. W&B, MLflow and trackio go on with the same run and cannot forget: they show
two values at a step that was trained twice.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import posixpath
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upweight.errors import ConfigError

IDS = "trackers.json"
"""The file of a run directory that says which run of which tracker is its own."""

PROJECT = "upweight"
"""W&B's and trackio's project, MLflow's experiment, where the environment names no other."""

Scalars = dict[str, float]


@dataclass(frozen=True)
class Target:
    """The run that is tracked. `after`: the step of the checkpoint that it resumes from."""

    folder: Path
    config: Mapping[str, object]
    after: int | None = None

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def ids(self) -> dict[str, str]:
        """The run of each tracker that is to be gone on with."""
        path = self.folder / IDS
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def keep_ids(self, ids: Mapping[str, str]) -> None:
        part = self.folder / f".tmp-{IDS}"
        part.write_text(json.dumps({**self.ids, **ids}, indent=1), encoding="utf-8")
        os.replace(part, self.folder / IDS)


@dataclass(frozen=True)
class Tracker:
    """An open tracker. Either call may raise whatever its client raises."""

    log: Callable[[int, Scalars], None]
    """The numbers of one record, and its step."""
    close: Callable[[bool], None]
    """Sends what is left. True: the run came to its end; False: it was stopped or failed."""
    id: str | None = None
    """What a resumed run goes on with."""


@dataclass(frozen=True)
class Kind:
    """How a tracker is opened: the module of its client, and what is set before the import."""

    module: str
    open: Callable[[Any, Target], Tracker]
    environment: Mapping[str, str] = field(default_factory=dict[str, str])


def scalars(record: Mapping[str, object]) -> tuple[int, Scalars]:
    """A record's step and its numbers, by the names that dashboards know."""
    step = record["step"]
    assert isinstance(step, int)
    place = f"eval/{record['set']}" if record["kind"] == "eval" else "train"
    return step, {
        f"{place}/{key}": float(value)
        for key, value in record.items()
        if key != "step" and isinstance(value, int | float)
    }


def _tensorboard(client: Any, target: Target) -> Tracker:
    """Event files in OUT/tensorboard, values as float32, the config for the HPARAMS page.

    A resumed run begins with the step after its checkpoint: TensorBoard then hides what earlier
    files have from that step on.
    """
    writer: Any = None
    # Null and lists have no kind of their own there, and torch leaves out what is None.
    config = {k: v if type(v) in (int, float, str) else _text(v) for k, v in target.config.items()}
    start, values, end = importlib.import_module("torch.utils.tensorboard.summary").hparams(
        config, {"train/loss": 0.0}
    )

    def log(step: int, numbers: Scalars) -> None:
        nonlocal writer
        if writer is None:
            # At the first record and no sooner: a resume that is refused must hide nothing.
            first = None if target.after is None else target.after + 1
            writer = client.SummaryWriter(str(target.folder / "tensorboard"), purge_step=first)
            writer.file_writer.add_summary(start)
            writer.file_writer.add_summary(values)
        for key, number in numbers.items():
            writer.add_scalar(key, number, step)
        writer.flush()

    def close(finished: bool) -> None:
        if writer is None:
            return
        if finished:
            writer.file_writer.add_summary(end)
        writer.close()

    return Tracker(log, close)


def _wandb(client: Any, target: Target) -> Tracker:
    """A run of the project WANDB_PROJECT, or upweight.

    The client sends in the background, repeats by itself what fails, and at the end waits until all
    is sent. train/global_step is the x axis, since W&B's own step may never go back: at a step that
    a resumed run trains again, both values are kept. Offline, each process leaves a folder of its
    own with the same id, for `wandb sync`.
    """
    known = target.ids.get("wandb")
    run = client.init(
        project=os.environ.get("WANDB_PROJECT") or PROJECT,
        name=target.name,
        id=known,
        resume="allow" if known else None,
        config=None if known else _nested(target.config),
        # A run that the caller has open is left alone.
        reinit="create_new",
    )
    run.define_metric("train/global_step")
    run.define_metric("*", step_metric="train/global_step", step_sync=True)
    return Tracker(
        log=lambda step, numbers: run.log({**numbers, "train/global_step": step}),
        close=lambda finished: run.finish(exit_code=0 if finished else 1),
        id=run.id,
    )


def _mlflow(client: Any, target: Target) -> Tracker:
    """A run of the experiment MLFLOW_EXPERIMENT_NAME, or upweight, where MLFLOW_TRACKING_URI says.

    Each record is sent before the next step begins. MLflow never overwrites a value: at a step that
    a resumed run trains again, both are kept. Characters that its names cannot have become _, and
    it cuts a parameter's value at 6000 characters.
    """
    api, entities = client.MlflowClient(), client.entities
    run_id = target.ids.get("mlflow")
    if run_id is not None:
        api.update_run(run_id, status="RUNNING")
    else:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = os.environ.get("MLFLOW_EXPERIMENT_ID")
        if experiment is None:
            found = api.get_experiment_by_name(name)
            experiment = found.experiment_id if found else api.create_experiment(name)
        run_id = api.create_run(experiment, run_name=target.name).info.run_id
        parameters = [entities.Param(key, _text(value)) for key, value in target.config.items()]
        assert len(parameters) <= 100, "more than MLflow takes at once"
        api.log_batch(run_id, params=parameters)

    def log(step: int, numbers: Scalars) -> None:
        now = int(time.time() * 1000)
        metrics = [
            entities.Metric(posixpath.normpath(re.sub(r"[^/\w.\- :]", "_", key)), value, now, step)
            for key, value in numbers.items()
        ]
        api.log_batch(run_id, metrics=metrics, synchronous=True)

    def close(finished: bool) -> None:
        api.set_terminated(run_id, status="FINISHED" if finished else "KILLED")

    return Tracker(log, close, run_id)


def _trackio(client: Any, target: Target) -> Tracker:
    """A run of the project TRACKIO_PROJECT, or upweight: local unless TRACKIO_SPACE_ID is set.

    The client writes in the background, and warns by itself about what it could not write. It has
    one open run in a process. It goes on with a run by name: where a newer run of the project has
    the same name, opening fails. At a step that a resumed run trains again, both values are kept.
    """
    known = target.ids.get("trackio")
    project = os.environ.get("TRACKIO_PROJECT") or PROJECT
    # Its client tells on standard output what belongs on the screen.
    with contextlib.redirect_stdout(sys.stderr):
        run = client.init(
            project=project,
            name=target.name,
            config=dict(target.config),
            resume="must" if known else "never",
        )
    if known and run.id != known:
        with contextlib.redirect_stdout(sys.stderr):
            client.finish()
        raise ValueError(
            f'the newest run named "{target.name}" of its project {project} is another one'
        )

    def close(finished: bool) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            client.finish()

    return Tracker(lambda step, numbers: run.log(numbers, step=step), close, run.id)


TRACKERS: dict[str, Kind] = {
    "tensorboard": Kind("torch.utils.tensorboard", _tensorboard),
    "wandb": Kind("wandb", _wandb),
    "mlflow": Kind(
        "mlflow",
        _mlflow,
        # No word to its makers from a run that is tracked in a local file. And few attempts of its
        # own, for minutes each, while training waits: Tracking tries again later.
        {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"},
    ),
    "trackio": Kind("trackio", _trackio),
}


def clients(names: Iterable[str]) -> dict[str, Any]:
    """The module of each tracker's client. Raises ConfigError for one that is not installed."""
    found: dict[str, Any] = {}
    for name in names:
        kind = TRACKERS[name]
        for variable, value in kind.environment.items():
            os.environ.setdefault(variable, value)
        try:
            module = importlib.import_module(kind.module)
        except ImportError as error:
            raise _not_installed(name, str(error)) from error
        # A folder of that name, such as the one that W&B leaves behind, passes for a module.
        if module.__file__ is None:
            raise _not_installed(name, f"there is only a folder named {name}")
        found[name] = module
    return found


def _not_installed(name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"track: {name} needs the package {name}, which cannot be imported ({reason}). "
        f"Run: pip install {name}  or take {name} out of track."
    )


@dataclass
class _Line:
    """A tracker, what it has not taken yet, and how much of that there is at the next attempt."""

    tracker: Tracker
    waiting: deque[tuple[int, Scalars]] = field(default_factory=deque[tuple[int, Scalars]])
    patience: int = 1
    failed: bool = False


@dataclass
class Tracking:
    """The open trackers of one run. None of them can end it.

    What a tracker does not take waits, and is tried again together with later records, after twice
    as many each time: a dead server costs a long run a few attempts. `note` is told of the first
    failure of each tracker, and at the end how many records it never took.
    """

    note: Callable[[str], None]
    lines: dict[str, _Line] = field(default_factory=dict[str, _Line])

    def open(self, name: str, client: Any, target: Target) -> None:
        try:
            self.lines[name] = _Line(TRACKERS[name].open(client, target))
        # What a client may raise is nowhere listed, here and below.
        except Exception as error:
            begin = f", or remove {target.folder / IDS} to begin a run there"
            raise ConfigError(
                f"track: {name} cannot be opened: {_reason(error)}. Repair that, or take {name} "
                f"out of track{begin if name in target.ids else ''}."
            ) from error

    def log(self, record: Mapping[str, object]) -> None:
        """Sends one record of metrics.jsonl."""
        if not self.lines:
            return
        numbers = scalars(record)
        for name, line in self.lines.items():
            line.waiting.append(numbers)
            if len(line.waiting) >= line.patience:
                self._send(name, line)

    def _send(self, name: str, line: _Line) -> None:
        try:
            while line.waiting:
                line.tracker.log(*line.waiting[0])
                line.waiting.popleft()
            line.patience = 1
        except Exception as error:
            line.patience = 2 * len(line.waiting)
            if not line.failed:
                self.note(
                    f"warning: {name} did not take step {line.waiting[0][0]}: {_reason(error)}. "
                    "Training goes on, metrics.jsonl has every record, and later ones try again."
                )
            line.failed = True

    def close(self, finished: bool) -> None:
        """Sends what waits and closes every tracker. What is closed already stays as it is."""
        while self.lines:
            name, line = self.lines.popitem()
            self._send(name, line)
            if line.waiting:
                self.note(
                    f"warning: {name} never took {len(line.waiting)} records, from step "
                    f"{line.waiting[0][0]} on. metrics.jsonl has them."
                )
            elif line.failed:
                self.note(f"{name} has every record after all.")
            try:
                line.tracker.close(finished)
            except Exception as error:
                self.note(
                    f"warning: {name} was not closed: {_reason(error)}. It may lack the last "
                    "records; metrics.jsonl has them."
                )


@contextmanager
def tracking(
    clients: Mapping[str, Any], target: Target, note: Callable[[str], None]
) -> Generator[Tracking]:
    """Every tracker of `clients`, open; unless closed before, closed as not finished at the end.

    Raises ConfigError for one that cannot be opened: a login or an address that is wrong is told
    before the run has cost anything.
    """
    opened = Tracking(note)
    try:
        for name, client in clients.items():
            opened.open(name, client, target)
        # Only when all are open: a folder that holds an id is taken for a run.
        ids = {name: line.tracker.id for name, line in opened.lines.items()}
        if any(ids.values()):
            target.keep_ids({name: id for name, id in ids.items() if id is not None})
        yield opened
    finally:
        opened.close(finished=False)


def _reason(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _nested(config: Mapping[str, object]) -> dict[str, Any]:
    """Sections as mappings: W&B reads a dot in a key as the way into one."""
    nested: dict[str, Any] = {}
    for key, value in config.items():
        section, _, leaf = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[leaf] = value
    return nested
