"""check(): what train would find out before step 1, and nothing written; and whether a model is
still the one that was exported."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from upweight.config import Resolved, Run
from upweight.data.pack import collate
from upweight.data.trees import show
from upweight.errors import ModelError, Refusal
from upweight.evidence.track import clients
from upweight.models.load import LanguageModel
from upweight.models.probes import FILE, Probes, probe_trees, read_probes, require_same_probes
from upweight.models.proof import TOLERANCE_NATS, one_at_a_time
from upweight.recipes.prepare import Prepared, load_policy
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


def check_model(run: Run, screen: Screen | None = None) -> float:
    """`run.model` against the probes that travelled with it; the largest difference of a token's
    log-prob, in nats.

    Raises ModelError where there are none, Refusal UW402 where its tokenizer and template write
    other tokens, UW401 where it gives other log-probs.
    """
    screen = screen or Silent()
    path = Path(run.model).expanduser()
    file = (path.parent if path.is_file() else path) / FILE
    if not file.is_file():
        raise ModelError(
            f"{file} does not exist: without data, check compares a model with the {FILE} that it "
            "was exported with. Copy it from the run's model folder, or name data to check a run."
        )
    probes = read_probes(file)
    screen.stage("model")
    lm = load_policy(run)
    require_same_probes(run.model, lm.tokenizer, probes)
    worst, allowed = _largest_difference(lm, probes), _rounding(Path(lm.folder))
    if not worst <= allowed:
        raise Refusal(
            "UW401",
            f"{run.model} is not the model that was exported: a token's log-prob is {worst:.3g} "
            f"nats off (rounding of its weights: {allowed}).",
        )
    screen.note(
        f"{run.model}: {len(probes.probes)} probes have the same tokens, and log-probs that differ "
        f"by {worst:.2g} nats a token at most (rounding of its weights: {allowed})"
    )
    return worst


def _largest_difference(lm: LanguageModel, probes: Probes) -> float:
    if not probes.probes:
        return 0.0
    known = torch.tensor([x for probe in probes.probes for x in probe.logps])
    found = one_at_a_time(lm, collate(probe_trees(probes))).cpu()
    return (found - known).abs().max().item()


def _rounding(folder: Path) -> float:
    """What the dtype that the weights are stored in explains. An adapter's base is read in fp32."""
    config = folder / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    stored = settings.get("dtype") or settings.get("torch_dtype") or "float32"
    return TOLERANCE_NATS.get(getattr(torch, str(stored), torch.float32), 0.0)
