"""check(): what train would find out before step 1, and nothing written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from upweight.config import Resolved
from upweight.data.account import Account
from upweight.data.trees import Shown, show
from upweight.evidence.track import clients
from upweight.recipes.prepare import account_lines, account_record, describe, figure_lines
from upweight.recipes.reference import probe_reference
from upweight.recipes.screen import Screen, Silent
from upweight.recipes.start import Start, start, with_reference
from upweight.training import checkpoint
from upweight.training.rundir import require_run_dir
from upweight.trust.finding import Finding
from upweight.trust.preflight import Figures
from upweight.types import Tree


@dataclass(frozen=True)
class Checked:
    """What is known before step 1. Prints as what the terminal says of it."""

    begun: Start
    shown: tuple[Shown, ...]

    @property
    def trees(self) -> Mapping[str, list[Tree]]:
        return self.begun.prepared.trees

    @property
    def accounts(self) -> Mapping[str, Account]:
        return self.begun.prepared.accounts

    @property
    def findings(self) -> tuple[Finding, ...]:
        return self.begun.prepared.findings

    @property
    def figures(self) -> Mapping[str, Figures]:
        return self.begun.prepared.figures

    def __repr__(self) -> str:
        lines = account_lines(self.begun.prepared) + figure_lines(self.figures)
        return "\n".join([*lines, *map(str, self.findings), *map(str, self.shown)])

    def to_json(self) -> dict[str, Any]:
        """What figures.FIELDS describes."""
        lm, memory = self.begun.lm, self.begun.memory
        return {
            **account_record(self.begun.prepared),
            "model": {"name": lm.name, "description": describe(lm)},
            "plan": asdict(self.begun.plan),
            "memory": {**asdict(memory), "needed": memory.needed},
            "rows": [asdict(shown) for shown in self.shown],
        }


def check(resolved: Resolved, screen: Screen | None = None, num_shown: int = 3) -> Checked:
    """Everything that can be known before step 1: trackers, out, model, rows, adapter, room on the
    disk, and what the reference says of a few rows of each set.

    Raises what training would raise for it.
    """
    screen = screen or Silent()
    run, saved = resolved.run, None
    clients(run.track)
    if run.out is not None:
        out = Path(run.out)
        require_run_dir(out, run.resume)
        newest = checkpoint.latest(out / "checkpoints") if run.resume else None
        saved = checkpoint.load(newest, verified=True).position if newest is not None else None
    begun = start(resolved, screen, saved)
    screen.stage("reference")
    reference, own = probe_reference(begun.run, begun.lm, begun.prepared)
    begun = with_reference(begun, reference, own, screen, fresh=True)
    for line in figure_lines(begun.prepared.figures):
        screen.note(line)
    shown = tuple(show(t, begun.lm.tokenizer) for t in begun.prepared.trees["train"][:num_shown])
    for row in shown:
        screen.row(row)
    return Checked(begun, shown)
