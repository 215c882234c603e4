"""compare(): several methods from one start, on one set of data, judged by one reward."""

from __future__ import annotations

import gc
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from upweight.config.methods import BEST_OF_N, Comparison, Method
from upweight.errors import ConfigError, OutputError, UpweightError
from upweight.evidence import comparison as scored
from upweight.evidence.report.markup import duration
from upweight.recipes.alike import require_finished_unchanged, require_judged, require_same_start
from upweight.recipes.chosen import best_of
from upweight.recipes.look import named
from upweight.recipes.measured import Measured, measured, told
from upweight.recipes.resume import Beginning
from upweight.recipes.rewarding import require_rewards
from upweight.recipes.screen import Screen, Silent, counted
from upweight.recipes.stages import is_finished
from upweight.recipes.train import train_model
from upweight.training.records import finite
from upweight.training.rundir import write_atomic

BUDGET = (
    "every method starts from the same model and is asked the same prompts at the end; data, steps "
    "and computing are not made equal between methods, and stand above as numbers"
)


class _Stopped(Exception):
    """The person asked to stop: what has finished stays, and the same command goes on."""


@dataclass(frozen=True)
class Compared:
    """The page, None where the person asked to stop, and the methods that failed."""

    page: Path | None
    failed: tuple[str, ...] = ()


def compare(comparison: Comparison, out: str, screen: Screen | None = None) -> Compared:
    """Runs every method that has not finished in `out` yet, and writes comparison.html there.

    A method that fails is named with its reason, and the others go on. Raises ConfigError, before
    the first method begins, where the settings of any are wrong, or other than those that it has
    finished with; OutputError where none could be evaluated.
    """
    screen, folder = screen or Silent(), Path(out)
    began = time.monotonic()
    runs = {m.name: comparison.run_of(m, folder) for m in comparison.methods}
    judge = require_judged(runs)
    for method in comparison.methods:
        with named("method", method.name):
            method.require_read(runs[method.name])
            require_rewards(runs[method.name].run, later=method.judge is not None)
    require_finished_unchanged(comparison, runs)
    folder.mkdir(parents=True, exist_ok=True)
    methods: list[scored.Method] = []
    start: scored.Start | None = None
    first: tuple[str, Beginning] | None = None
    spent = 0.0  # a reward model's training once, though each method that uses it is charged for it
    for method in comparison.methods:
        screen.note(f"\n== {method.name}: {method.note}".removesuffix(": "))
        gc.collect()  # the models of one method are gone before those of the next are there
        try:
            found = _found(comparison, method, folder, screen)
        except _Stopped:
            screen.note("stopped; the same command goes on here")
            return Compared(None)
        if found.began is not None:
            found, first = _beside(first, found)
        if found.shown.failed is not None:
            screen.note(f"{method.name} failed: {found.shown.failed}")
        start = start or found.start
        spent += found.shown.seconds
        methods.append(_with_judge(found.shown, method, methods))
    if start is None:
        raise OutputError(
            f"no method of the comparison in {folder} was evaluated at its start; the first "
            f"failure: {next((m.failed for m in methods if m.failed), 'none')}"
        )
    claim = scored.claim(methods, start)
    study = scored.Study(
        title=comparison.title,
        reward=judge,
        start=start,
        methods=tuple(methods),
        budget=f"{BUDGET}; all that read it were told "
        + ", ".join(f"{s.leaf}: {s.value}" for s in comparison.shared),
        machine=f"{platform.machine()}, {os.cpu_count()} cores",
        seconds=spent,
        claim=claim,
    )
    write_atomic(
        folder / "comparison.json", json.dumps(finite(asdict(study)), indent=1, allow_nan=False)
    )
    page = scored.write_comparison(folder)
    screen.note("")
    screen.table(*scored.in_short(study))
    screen.note("")
    screen.note(claim.said)
    for line in filter(None, (claim.sure, *claim.lines, *study.noticed)):
        screen.note(f"  {line}")
    took = duration(time.monotonic() - began)
    screen.note(f"{counted(len(methods), 'method')} in {took}")
    screen.note(f"comparison: {page}")
    return Compared(page, tuple(m.name for m in methods if m.failed is not None))


def _found(comparison: Comparison, method: Method, folder: Path, screen: Screen) -> Measured:
    """What a method measured. Of one that fails on its way, what it had measured until then."""
    out, before = folder / method.folder, _written(folder / method.folder)
    run = comparison.run_of(method, folder).run
    try:
        if method.objective == BEST_OF_N:
            return best_of(method, run)
        return _trained(comparison, method, folder, screen)
    except UpweightError as error:
        why = str(error)
    if _written(out) not in (None, before):
        return measured(method, run, out, why)
    return Measured(scored.Method(method.name, method.objective, told(method), 0.0, 0, (), why))


def _written(out: Path) -> int | None:
    """When a run wrote what it began with, which it does once it is known to be as asked: what
    stands in its folder from before may be of other settings."""
    try:
        return (out / "environment.json").stat().st_mtime_ns
    except OSError:
        return None


def _beside(
    first: tuple[str, Beginning] | None, found: Measured
) -> tuple[Measured, tuple[str, Beginning]]:
    """A method beside the one that was measured first: it has failed, and only its cost counts,
    where the two did not start alike."""
    shown, began = found.shown, found.began
    assert began is not None
    if first is None:
        return found, (shown.name, began)
    try:
        require_same_start(*first, began)
    except ConfigError as error:
        return Measured(replace(shown, points=(), failed=shown.failed or str(error))), first
    return found, first


def _with_judge(
    found: scored.Method, method: Method, before: Sequence[scored.Method]
) -> scored.Method:
    """With the cost of the reward model that it was trained against, or that chose for it."""
    judge = next((m for m in before if m.name == method.judge), None)
    if judge is None:
        return found
    return replace(found, seconds=found.seconds + judge.seconds, tokens=found.tokens + judge.tokens)


def _trained(comparison: Comparison, method: Method, folder: Path, screen: Screen) -> Measured:
    """What a method's run measured; a run that has finished is read, one that stopped goes on."""
    out = folder / method.folder
    if not is_finished(out):
        resume = any((out / "checkpoints").glob("step-*"))
        result = train_model(comparison.run_of(method, folder, resume=resume), screen)
        if result.stopping:
            raise _Stopped
    return measured(method, comparison.run_of(method, folder).run, out)
