"""What can be refused before there is a model, or torch: it takes seconds to come. Whatever is not
seen here, or only in the first rows, is found where it is used."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from pathlib import Path

from upweight.config import Resolved, Run, require_read
from upweight.data.account import require_used
from upweight.data.stream import load_prompts
from upweight.errors import UpweightError
from upweight.evidence.track import clients
from upweight.models.place import placed
from upweight.recipes.sets import read_rows_of
from upweight.training.rundir import HoldsRun, require_free, require_run_dir

FIRST = 100
"""Rows of each file that are read ahead: most of what is wrong with a file is wrong from its first
row on."""


def look(command: str, stages: Sequence[Resolved]) -> None:
    """Keys that nobody reads, trackers that are not installed, an out that cannot be used, models
    that are not there, and the first rows of each file. Raises what `command`, train or check,
    would raise for it."""
    made: list[Path] = []
    for stage in stages:
        with named("stage", name_of(stage)) if len(stages) > 1 else contextlib.nullcontext():
            require_read(command, stage.run, stage.places)
            clients(stage.run.track)
            if stage.run.out is not None and not stage.run.resume:
                _require_out(command, Path(stage.run.out))
            for name in (stage.run.model, stage.run.reference):
                if name is not None and not any(_lies_in(name, out) for out in made):
                    placed(name)
            _require_first_rows(stage.run)
        if stage.run.out is not None:
            made.append(Path(stage.run.out))


def _lies_in(name: str, folder: Path) -> bool:
    """Whether a model's name may be that of what a run leaves in its folder."""
    try:
        return Path(name).expanduser().resolve().is_relative_to(folder.expanduser().resolve())
    except (OSError, RuntimeError):
        return False


def _require_out(command: str, out: Path) -> None:
    if command == "train":
        require_free(out)
    try:
        require_run_dir(out, False)
    except HoldsRun:
        if command == "train":
            raise


def _require_first_rows(run: Run) -> None:
    sets = [(f"the evaluation set {name}", paths) for name, paths in run.evaluation.sets.items()]
    limit = run.data.limit
    for what, paths in [(f"data {', '.join(run.data.path)}", run.data.path), *sets]:
        if not all(map(_is_twice, paths)):
            continue
        # Behind a limit no row is read, and no file.
        each = [[path] for path in paths] if limit is None else [paths]
        accounts = [read_rows_of(run, files, min(FIRST, limit or FIRST))[1] for files in each]
        # With fewer rows than were asked for, a file was read to its end.
        if len(accounts) == 1 and accounts[0].read < FIRST:
            require_used(accounts[0], what)
        limit = None
    for path in run.evaluation.prompt_files or []:
        if _is_twice(path):
            load_prompts([path], FIRST)


def _is_twice(path: str) -> bool:
    """Whether what is read ahead can be read again: a pipe cannot."""
    try:
        return Path(path).is_file() or not Path(path).exists()
    except OSError:
        return True


@contextlib.contextmanager
def named(what: str, name: str) -> Generator[None]:
    """Errors inside of the block say which stage, or method, they are of."""
    try:
        yield
    except UpweightError as error:
        error.args = (f"{what} {name}: {error}",)
        raise


def name_of(stage: Resolved) -> str:
    """A stage by its folder."""
    return stage.run.objective if stage.run.out is None else Path(stage.run.out).name
