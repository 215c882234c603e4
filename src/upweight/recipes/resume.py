"""What a run that is resumed, or taken as finished, must have in common with its beginning."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
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
from upweight.data.read import read_rows
from upweight.errors import ConfigError, DataError
from upweight.evidence.records.settings import read_settings
from upweight.recipes.kinds import KINDS, PROMPTS
from upweight.recipes.prepare import Prepared
from upweight.recipes.reference import Against, answered_sets
from upweight.training import checkpoint
from upweight.training.moment import Position
from upweight.training.rewards import COLUMNS, REWARDS, in_folder
from upweight.types import RowId, Tree

FREE_TO_CHANGE = {
    *("resume", "out", "log_every", "track", "compute.threads", "checkpoint.keep"),
    "rollout.server",
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
    return {name: digest_of(trees) for name, trees in prepared.trees.items()}


def digest_of(trees: Sequence[Tree]) -> str:
    digest = hashlib.sha256()
    for tree in trees:
        preferences = [
            (p.chosen, p.rejected, p.weight, p.margin, p.probability) for p in tree.preferences
        ]
        digest.update(json.dumps([tree.prompt, tree.responses, preferences]).encode())
    return digest.hexdigest()


def require_same_settings(saved: Position, run: Run, prepared: Prepared) -> None:
    """Raises ConfigError for other settings, DataError for other rows than the run began with."""
    assert run.out is not None
    if saved.config_digest != settings_digest(run):
        raise ConfigError(
            f"resume: the run in {run.out} was started with other settings"
            f"{_changed(run, Path(run.out))}. Go on with its own:  "
            f"{resume_command(Path(run.out))}  (free to change: {_free_to_change()})."
        )
    for name, digest in data_digests(prepared).items():
        if saved.data_digests[name] != digest:
            raise DataError(
                f"resume: the rows of the set {name} are not those that the run in {run.out} began "
                f"with: their tokens or preferences differ. Put {', '.join(_files_of(run, name))} "
                "back as it was, or start a new run with another out."
            )


def _free_to_change() -> str:
    """Of the two sections that are free as a whole their names."""
    alone = [key for key in FREE_TO_CHANGE if not key.startswith(("preflight.", "watch."))]
    return f"{', '.join(sorted({*alone} - {'resume', 'out'}))}, and all of preflight and watch"


def _files_of(run: Run, name: str) -> Sequence[str]:
    """The files that a set's rows stand in."""
    if name == PROMPTS:
        return run.evaluation.prompt_files or ()
    return run.evaluation.sets.get(name, run.data.path)


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
            f"back, remove {run.out} to have it trained again, or choose another out."
        )


@dataclass(frozen=True)
class Beginning:
    """What a run began with: its own weights, its reference, the trees of every set by name, and
    what is behind its rewards by key, each as its sha256."""

    model_fingerprint: str
    reference_fingerprint: str
    data_digests: Mapping[str, str]
    reward_digests: Mapping[str, str]


def beginning_of(out: Path) -> Beginning | None:
    """What the run in a folder began with, by its environment.json, or else by a checkpoint; None
    where neither says."""
    names = [field.name for field in fields(Beginning)]
    file = out / "environment.json"
    said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if any(name not in said for name in names):
        said = next((asdict(p) for p in checkpoint.positions(out / "checkpoints")), {})
    return Beginning(**{name: said[name] for name in names}) if said else None


def require_unchanged(run: Run, now: Beginning) -> None:
    """Raises ConfigError where a run that is finished began with something else than there is."""
    assert run.out is not None
    then = beginning_of(Path(run.out))
    if then is None:
        raise ConfigError(
            f"the run in {run.out} is finished, and nothing says what it began with: its "
            "environment.json does not, and it has no checkpoint. Put them back, remove "
            f"{run.out} to have it trained again, or choose another out."
        )
    require_same_beginning(run, then, now)


def require_same_beginning(
    run: Run, then: Beginning, now: Beginning, again: str = "trained"
) -> None:
    """Raises ConfigError where what has finished in the run's folder began with something else than
    there is; `again` is what would be done to it."""
    if said := _differing(then, now, run):
        raise ConfigError(
            f"the run in {run.out} is finished, and what it was made of has changed since: "
            f"{'; '.join(said)}. What it made and measured is not of what there is now. Put it "
            f"back as it was, remove {run.out} to have it {again} again, or choose another out."
        )


def _differing(then: Beginning, now: Beginning, run: Run) -> list[str]:
    """What a finished run began with and is otherwise now, in words."""
    said: list[str] = []
    models = (
        (f"model {run.model}", then.model_fingerprint, now.model_fingerprint),
        (f"reference {run.reference}", then.reference_fingerprint, now.reference_fingerprint),
    )
    for name, before, after in models[: 1 + (run.reference is not None)]:
        if before != after:
            said.append(
                f"{name} ({before[:12]} then, {after[:12]} with this model, dtype and machine)"
            )
    for name, digest in now.data_digests.items():
        if then.data_digests.get(name) != digest:
            said.append(f"the rows of the set {name} in {', '.join(_files_of(run, name))}")
    for key, digest in now.reward_digests.items():
        if then.reward_digests.get(key) == digest:
            continue
        if key == "rows":
            sets = dict.fromkeys(f for name in now.data_digests for f in _files_of(run, name))
            said.append(f"a column that its rewards may read, in {', '.join(sets)}")
        else:
            said.append(f"the content of {key}, {leaf_values(run)[key]}")
    return said


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


def reward_digests(run: Run, prepared: Prepared) -> dict[str, str]:
    """`digests_behind` the rewards of this run."""
    kind = KINDS[run.objective]
    read = answered_sets(run, prepared) if run.evaluation.samples else {}
    specs = {"evaluation.true_reward": run.evaluation.true_reward if kind.answers else None}
    if kind.draws:
        specs["rollout.reward"] = run.rollout.reward
        read = {**read, "train": prepared.trees["train"]}
    return digests_behind(specs, [tree for trees in read.values() for tree in trees])


def digests_behind(specs: Mapping[str, str | None], read: Sequence[Tree]) -> dict[str, str]:
    """sha256 of what is behind rewards, as far as it is in files: by its key each function's file
    or model's folder, and under "rows" the columns that functions may read of the rows that answers
    to `read` are scored with."""
    found = dict[str, str]()
    columns: set[str] | None = set()
    for key, spec in specs.items():
        if spec is None:
            continue
        if (digest := content_digest(spec)) is not None:
            found[key] = digest
        if in_folder(spec):
            continue
        columns = None if columns is None or spec not in COLUMNS else {*columns, *COLUMNS[spec]}
    if columns is None or columns:
        wanted = {replace(tree.ids[0].row, turn=None) for tree in read}
        found["rows"] = _rows_digest(wanted, columns)
    return found


def content_digest(spec: str) -> str | None:
    """sha256 of a reward's file, or of its model's folder; None where it is in neither."""
    if in_folder(spec):
        inside = (f for f in Path(spec).iterdir() if f.suffix in (".json", ".safetensors"))
        return _files_digest(sorted(inside))
    file = Path(spec.rpartition(":")[0])
    return _files_digest([file]) if spec not in REWARDS and file.is_file() else None


def _files_digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _rows_digest(wanted: Collection[RowId], columns: Collection[str] | None) -> str:
    """Of the rows' columns; None: of all that they have."""
    digest = hashlib.sha256()
    for row_id, row in read_rows(sorted({row_id.source for row_id in wanted}), columns):
        if row_id in wanted:
            kept = {k: v for k, v in row.items() if columns is None or k in columns}
            text = json.dumps([str(row_id), kept], sort_keys=True, default=str)
            digest.update(text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def require_same_rewards(saved: Position, run: Run, digests: Mapping[str, str]) -> None:
    """Raises ConfigError for a reward that scores otherwise than when the run began, DataError for
    rows of which it reads another content."""
    again = "back as it was, or start a new run with another out."
    for key, digest in digests.items():
        if saved.reward_digests.get(key) == digest:
            continue
        if key == "rows":
            raise DataError(
                f"resume: the rows that the rewards of the run in {run.out} are given differ in a "
                f"column that they may read. Put {', '.join(run.data.path)} {again}"
            )
        spec = leaf_values(run)[key]
        raise ConfigError(
            f"resume: {key} is {spec}, whose content is not what the run in {run.out} began with: "
            f"rewards before and after would not compare. Put it {again}"
        )
