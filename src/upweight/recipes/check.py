"""check(): what train would find out before step 1, and nothing written."""

from __future__ import annotations

from pathlib import Path

from upweight.config import Resolved
from upweight.data.trees import show
from upweight.evidence.track import clients
from upweight.recipes.prepare import Prepared
from upweight.recipes.screen import Screen, Silent
from upweight.recipes.start import start
from upweight.training import checkpoint
from upweight.training.rundir import require_run_dir


def check(resolved: Resolved, screen: Screen | None = None, num_shown: int = 3) -> Prepared:
    """Everything that can be known before step 1 without the reference's weights: trackers, out,
    model, the reference's tokenizer, rows, adapter, room on the disk, and what is scored.

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
    for tree in begun.prepared.trees["train"][:num_shown]:
        screen.note(show(tree, begun.lm.tokenizer))
    return begun.prepared
