"""What a resumed run must have in common with the run that it goes on with."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from upweight.config import (
    FILLED_IN,
    Preflight,
    Resolved,
    Run,
    Watch,
    leaf_values,
    load_run,
)
from upweight.errors import ConfigError, DataError
from upweight.evidence.records.settings import read_settings
from upweight.recipes.prepare import Prepared
from upweight.recipes.reference import Against
from upweight.training.checkpoint import Position
from upweight.types import Tree

FREE_TO_CHANGE = {
    *("resume", "out", "log_every", "track", "compute.threads", "checkpoint.keep"),
    *(f"preflight.{name}" for name in Preflight.model_fields),
    *(f"watch.{name}" for name in Watch.model_fields),
}
"""Keys that a resumed run may have otherwise than the run it goes on with."""


def resume_command(out: Path) -> str:
    return f"upweight train {shlex.quote(str(out / 'run.yaml'))} resume=true"


def as_begun(resolved: Resolved) -> Resolved:
    """The settings of a resumption, with what the run itself filled in where they leave it open.

    A value that has not changed keeps the origin that it had when the run began.
    """
    assert resolved.run.out is not None
    file = Path(resolved.run.out) / "run.yaml"
    if not file.is_file():
        return resolved
    then = leaf_values(load_run(file).run)
    # What is said beside an origin is found anew.
    origins = {s.key: s.origin.partition("; ")[0] for s in read_settings(file)}
    for key, value in then.items():
        if resolved.origins.get(key) == "default" and origins.get(key) in FILLED_IN:
            resolved = resolved.with_value(key, value, origins[key])
    kept = {
        key: origins[key]
        for key, value in leaf_values(resolved.run).items()
        if key in origins and then.get(key) == value
    }
    return replace(resolved, origins={**resolved.origins, **kept})


def settings_digest(run: Run) -> str:
    """sha256 of every key that decides what a step computes."""
    kept = {key: value for key, value in leaf_values(run).items() if key not in FREE_TO_CHANGE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def data_digests(prepared: Prepared) -> dict[str, str]:
    """For each set the sha256 of what is learned from or scored: token ids and preferences."""
    return {name: _digest(trees) for name, trees in prepared.trees.items()}


def _digest(trees: Sequence[Tree]) -> str:
    digest = hashlib.sha256()
    for tree in trees:
        preferences = [(p.chosen, p.rejected, p.weight, p.margin) for p in tree.preferences]
        digest.update(json.dumps([tree.prompt, tree.responses, preferences]).encode())
    return digest.hexdigest()


def require_same_settings(saved: Position, run: Run, prepared: Prepared) -> None:
    """Raises ConfigError for other settings, DataError for other rows than the run began with."""
    assert run.out is not None
    if saved.config_digest != settings_digest(run):
        raise ConfigError(
            f"resume: the run in {run.out} was started with other settings"
            f"{_changed(run, Path(run.out))}. Go on with its own:  "
            f"{resume_command(Path(run.out))}  (free to change: "
            f"{', '.join(sorted(FREE_TO_CHANGE - {'resume', 'out'}))})."
        )
    for name, digest in data_digests(prepared).items():
        if saved.data_digests[name] != digest:
            files = run.evaluation.sets.get(name, run.data.path)
            raise DataError(
                f"resume: the rows of the set {name} are not those that the run in {run.out} began "
                f"with: their tokens or preferences differ. Put {', '.join(files)} back as it was, "
                "or start a new run with another out."
            )


def _changed(run: Run, out: Path) -> str:
    """The keys that differ from the run's own run.yaml, with both values."""
    then, now = leaf_values(load_run(out / "run.yaml").run), leaf_values(run)
    keys = [k for k in now if k not in FREE_TO_CHANGE and then.get(k) != now[k]]
    said = [f"{key} is {now[key]} here and was {then.get(key)}" for key in keys]
    return f" ({'; '.join(said)})" if said else ""


def require_finished_as_asked(resolved: Resolved) -> None:
    """Raises ConfigError where a run that is finished was trained with other settings."""
    run = as_begun(resolved).run
    assert run.out is not None
    if changed := _changed(run, Path(run.out)):
        raise ConfigError(
            f"the run in {run.out} is finished, with other settings{changed}. Put them "
            "back, or choose another out."
        )


def require_same_models(saved: Position, run: Run, against: Against) -> None:
    """Raises ConfigError for another reference, or another start of the policy."""
    for what, then, now in (
        (
            "trained against another reference",
            saved.reference_fingerprint,
            against.logps.fingerprint,
        ),
        ("started from another model", saved.model_fingerprint, against.model_fingerprint),
    ):
        if then != now:
            raise ConfigError(
                f"resume: the run in {run.out} was {what} ({then[:12]} then, {now[:12]} with this "
                "model, dtype and machine). Start a new run with another out."
            )
