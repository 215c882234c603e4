"""Several runs in one run.yaml, each from the model that the one before it made.

    model: base
    out: runs/a
    stages:
      - {objective: sft, data: answers.jsonl}
      - {objective: dpo, data: pairs.jsonl, beta: 0.2}

A stage is the file's other keys with its own laid over them, and flags and overrides over both.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from upweight.config.commands import objectives_reading
from upweight.config.keys import METHODS, STAGES, keys
from upweight.config.resolve import Resolved, resolve, said
from upweight.config.settings import Layer, Problem, Problems, Setting, collect, show
from upweight.errors import ConfigError

OF_ALL = {
    "out": "the stages write to folders in it",
    "resume": "it goes on with the first stage that is not finished",
}
"""Keys that no stage has for itself, and why."""


@dataclass(frozen=True)
class Stage:
    """What one entry of `stages` says; `name` is also that of its folder, such as 2-dpo."""

    name: str
    objective: str
    own: tuple[Setting, ...]

    def says(self, leaf: str) -> bool:
        return any(setting.leaf == leaf for setting in self.own)


def load_stages(
    file: Path | str | None,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
    origin_of_values: str = "python",
    *,
    required: Sequence[str] = (),
) -> list[Resolved]:
    """The runs of a file's `stages`, in their order; without any the one that load_run gives.

    Stage 2 writes to out/2-dpo and starts from the model of the stage before it that answers
    prompts, which is also its reference, unless it names others. What a reward stage made is the
    rollout.reward of later stages that leave it open. What stands beside the stages, or on the
    command line, holds for those stages whose objective reads it.

    Raises ConfigError with one line for each problem of any stage, which it names.
    """
    problems = Problems()
    settings = said(file, overrides, values, origin_of_values, problems)
    for setting in settings:
        if setting.typed == METHODS and setting.layer.file:
            raise ConfigError(
                f"{setting.place}methods make this a comparison of several runs. Run: upweight "
                f"compare {shlex.quote(str(file))}"
            )
    where = f"{file}: " if file is not None else ""
    listed = [setting for setting in settings if setting.typed == STAGES]
    if not listed or listed[-1].layer.prefix or listed[-1].layer.rank > 1:
        return [resolve(settings, problems, required, where)]
    shared = [setting for setting in settings if setting.typed != STAGES]
    stages = _read(listed[-1], problems)
    out = _require_shared(shared, required, where, problems)
    problems.raise_any()
    lines: list[str] = []
    runs: list[Resolved] = []
    for i, stage in enumerate(stages):
        before = _from_before(stages[:i], stage, shared, out)
        kept = [s for s in shared if _is_for(s.leaf, stage, stages) and s.leaf not in before]
        layer = Layer(math.inf, "the stages before it")
        laid = sorted([*kept, *stage.own], key=lambda setting: setting.layer.rank)
        made = Problems()
        laid += collect({k: v for k, v in before.items() if not stage.says(k)}, layer, made)
        try:
            runs.append(resolve(laid, made, (), f"{where}stage {stage.name}: "))
        except ConfigError as error:
            lines += str(error).splitlines()
    lines += _rounded_twice(runs, where)
    if lines:
        raise ConfigError("\n".join(dict.fromkeys(lines)))
    return runs


def _rounded_twice(runs: Sequence[Resolved], where: str) -> list[str]:
    """Stages that put into four bits what a stage before them learned in four bits: merged and
    rounded again, most of it would be gone."""
    in_four = {
        str(Path(made.run.out) / "model"): made.run
        for made in runs
        if made.run.out is not None and made.run.lora is not None and made.run.lora.quantize
    }
    return [
        f"{where}lora.quantize is {run.lora.quantize} in the stage that writes to {run.out} and in "
        f"the one that it starts from, {run.model}: its adapter would be merged and rounded away. "
        "Leave lora.quantize out of the later stage."
        for made in runs
        if (run := made.run).model in in_four and run.lora is not None and run.lora.quantize
    ]


def _read(listed: Setting, problems: Problems) -> list[Stage]:
    entries = listed.value
    if not isinstance(entries, list) or not entries:
        problems.at(listed, f"stages must be a list of runs, found {show(entries)}.")
        return []
    stages: list[Stage] = []
    for i, entry in enumerate(cast("list[Any]", entries)):
        if isinstance(entry, Mapping):
            stages.append(_stage(i, cast("Mapping[str, Any]", entry), listed, problems))
        else:
            text = f"stage {i + 1} must hold keys and values, found {show(entry)}."
            problems.at(listed, text)
    return stages


def _stage(i: int, entry: Mapping[str, Any], listed: Setting, problems: Problems) -> Stage:
    at, layer = (STAGES, str(i)), listed.layer
    objective = str(entry.get("objective", ""))
    name = f"{i + 1}-{objective}".rstrip("-")
    here = Layer(
        layer.rank + 0.5,
        f"{layer.origin}, stage {name}",
        file=layer.file,
        lines={path[2:]: line for path, line in layer.lines.items() if path[:2] == at},
        prefix=f"stage {name}: ",
    )
    own = list(collect(entry, here, problems))
    if not objective:
        allowed = ", ".join(keys()["objective"].choices)
        problems.at(listed, f"stage {i + 1} has no objective. It is one of: {allowed}.")
    for setting in own:
        if setting.typed == STAGES:
            problems.at(setting, f"{setting.shown} cannot stand inside of a stage.")
        elif setting.leaf in OF_ALL:
            text = f"{setting.shown} stands beside the stages: {OF_ALL[setting.leaf]}."
            problems.at(setting, text)
    return Stage(name, objective, tuple(own))


def _require_shared(
    shared: Sequence[Setting], required: Collection[str], where: str, problems: Problems
) -> str | None:
    """The folder of all stages, if there is one."""
    out: str | None = None
    for setting in shared:
        if setting.leaf == "objective":
            text = f"{setting.shown} has no effect beside stages: each of them has its own."
            problems.at(setting, text)
        elif setting.leaf == "out":
            # One that is no text is refused with the rest of the run.
            out = setting.settled if isinstance(setting.settled, str) else None
    if "out" in required and not any(setting.leaf == "out" for setting in shared):
        about = f"{where}out is missing, and needed. {keys()['out'].description}"
        problems.append(Problem(math.inf, 0, about))
    return out


def _from_before(
    earlier: Sequence[Stage], stage: Stage, shared: Sequence[Setting], out: str | None
) -> dict[str, str]:
    """Where the stage writes, and what it takes from the stages before it where it says nothing
    else. A model that is given for all stages is that of the first."""
    if out is None:
        return {}
    found = {"out": str(Path(out) / stage.name)}
    for other in earlier:
        key = "rollout.reward" if other.objective == "reward" else "model"
        if stage.objective in objectives_reading(key):
            found[key] = str(Path(out) / other.name / "model")
    if any(setting.leaf == "rollout.reward" for setting in shared):
        found.pop("rollout.reward", None)
    return found


def _is_for(leaf: str, stage: Stage, stages: Sequence[Stage]) -> bool:
    """Whether a shared key holds for the stage: not where only others read it."""
    readers = objectives_reading(leaf) if leaf else [stage.objective]
    return stage.objective in readers or not any(other.objective in readers for other in stages)
