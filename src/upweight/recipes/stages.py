"""The stages of a run.yaml, one after the other: each goes on with the model of the one before."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from upweight.config import Resolved
from upweight.errors import OutputError
from upweight.recipes.beginnings import Beginnings
from upweight.recipes.check import Checked, check
from upweight.recipes.look import name_of, named
from upweight.recipes.resume import as_begun, require_finished_as_asked, require_unchanged
from upweight.recipes.screen import Screen, Silent
from upweight.recipes.train import Result, train_model


def train_stages(stages: Sequence[Resolved], screen: Screen | None = None) -> Result:
    """Train each stage as train_model does; the result of the last, or of one that was stopped.

    With `resume` the stages that are finished are left as they are, if settings, models, rows and
    rewards are still what they were made of, and the first that is not goes on, or begins. `look`
    says what is wrong with any of them before the first begins. Raises UpweightError children,
    whose messages name the stage.
    """
    if len(stages) == 1:
        return train_model(stages[0], screen)
    screen = screen or Silent()
    result: Result | None = None
    for number, stage in enumerate(stages, 1):
        said = f"stage {number} of {len(stages)}, {name_of(stage)}"
        with named("stage", name_of(stage)):
            if stage.run.resume and is_finished(_folder(stage)):
                _require_unchanged(stage)
                screen.note(f"{said}: finished before")
                if number == len(stages):
                    result = _finished(_folder(stage))
                    screen.note(f"model:  {result.model}")
                    screen.note(f"report: {result.report}")
                continue
            screen.note(said)
            result = train_model(_going_on(stage, number == 1), screen)
        if result.stopping:
            if number < len(stages):
                alone = "" if result.finished else "That is this stage alone. It and the"
                screen.note(
                    f"{alone or 'The'} stages after it:  the command that began them, with "
                    "resume=true"
                )
                return replace(result, finished=False)
            break
        gc.collect()  # the model of one stage is gone before that of the next is there
    assert result is not None
    return result


def check_stages(stages: Sequence[Resolved], screen: Screen | None = None) -> Checked:
    """check() of the first stage, and of each later one what can be known without the model that
    it starts from: where that is not trained yet, the first stage's stands in its place, and is
    not asked about the rows."""
    first, *rest = stages
    if not rest:
        return check(first, screen)
    screen = screen or Silent()
    found: list[Checked] = []
    for number, stage in enumerate(stages, 1):
        screen.note(f"stage {number} of {len(stages)}, {name_of(stage)}")
        ask = number == 1 or Path(stage.run.model).is_dir()
        if not ask:
            stage = stage.with_value("model", first.run.model, "the first stage's")
        with named("stage", name_of(stage)):
            found.append(check(_going_on(stage, number == 1), screen, ask=ask))
        gc.collect()
    return replace(found[0], later=tuple(found[1:]))


def is_finished(folder: Path) -> bool:
    """Whether a run in this folder came to its end."""
    try:
        record = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(record.get("finished")) and (folder / "model").is_dir()


def _finished(out: Path) -> Result:
    """What the run in this folder returned when it came to its end."""
    file = out / "metrics.jsonl"
    try:
        records = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise OutputError(
            f"{file} cannot be read: {error.strerror}. Put it back, or give the stages another out."
        ) from error
    steps = [r["step"] for r in map(json.loads, records) if r["kind"] == "train"]
    return Result(out, out / "model", out / "report.html", True, steps[-1])


def _require_unchanged(stage: Resolved) -> None:
    """Raises ConfigError where a finished stage is not what it would be if it was trained now."""
    require_finished_as_asked(stage)
    run = as_begun(stage).run
    require_unchanged(run, Beginnings().of(run))
    gc.collect()  # what was read for it


def _going_on(stage: Resolved, first: bool) -> Resolved:
    """A stage that has not begun yet begins, unless it is the first: then there is nothing to go
    on with, which open_run_dir says."""
    if first or not stage.run.resume or (_folder(stage) / "checkpoints").is_dir():
        return stage
    return stage.with_value("resume", False, stage.origins["resume"])


def _folder(stage: Resolved) -> Path:
    assert stage.run.out is not None
    return Path(stage.run.out)
