"""One Run out of all that was said, with the origin of each of its values.

Settings are laid over each other in the order of their layers, what remains is checked as a
whole, and all problems are raised together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from upweight.config.keys import SWITCHED, candidates, keys, meant, unknown_key
from upweight.config.objectives import (
    CALLED_ELSEWHERE,
    COMPARING,
    OBJECTIVES,
    draws,
    unread,
)
from upweight.config.rounds import Rollout
from upweight.config.sections import SECTIONS, Run
from upweight.config.settings import (
    Layer,
    Problem,
    Problems,
    Setting,
    collect,
    read_file,
    read_override,
    show,
)
from upweight.config.written import write
from upweight.errors import nearest
from upweight.web import names_host

EITHER = {"steps": "epochs", "epochs": "steps"}
"""Two ways to say one thing: in one breath they contradict, otherwise the later one replaces."""

DEFAULT = "default"
RESOLVED = "resolved"
INHERITED = "inherited from the model"
PROBED = "found by a probe"
FILLED_IN = frozenset({RESOLVED, INHERITED, PROBED})
"""Origins of values that were left open, and became what they are when the run began."""


@dataclass(frozen=True)
class Resolved:
    """A complete Run, for each of its leaves (by full name) where the value came from, and for
    those that stand in a file the `places`, such as "run.yaml:3: "."""

    run: Run
    origins: Mapping[str, str]
    places: Mapping[str, str] = field(
        default_factory=dict[str, str], repr=False, compare=False, kw_only=True
    )

    def with_value(self, key: str, value: object, origin: str) -> Resolved:
        """A copy with one leaf set later, such as a learning rate that the recipe chose.

        Raises ConfigError where load_run would.
        """
        problems = Problems()
        before = [
            Setting(leaf, leaf, kept, Layer(0, self.origins[leaf]))
            for leaf, kept in leaf_values(self.run).items()
            if self.origins[leaf] != DEFAULT
        ]
        if self.run.lora is not None:
            before.append(Setting(SWITCHED, SWITCHED, True, Layer(0, DEFAULT)))
        after = collect({key: value}, Layer(1, origin), problems)
        return replace(resolve([*before, *after], problems), places=self.places)


def load_run(
    file: Path | str | None,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
    origin_of_values: str = "python",
    *,
    required: Sequence[str] = (),
) -> Resolved:
    """One Run from a YAML file, values (Python keywords, or flags), and key=value overrides.

    Later wins: default, file, values, overrides. Keys are full names or unique short names, and
    values may nest. `required` names keys that are optional in general and needed this time.

    Raises ConfigError with one line for each problem there is.
    """
    problems = Problems()
    settings = said(file, overrides, values, origin_of_values, problems)
    return resolve(settings, problems, required, f"{file}: " if file is not None else "")


def said(
    file: Path | str | None,
    overrides: Sequence[str],
    values: Mapping[str, Any] | None,
    origin_of_values: str,
    problems: Problems,
) -> list[Setting]:
    """All settings, in the order of their layers."""
    settings = read_file(Path(file), problems) if file is not None else []
    prefix = "--" if origin_of_values == "flag" else ""
    layer = Layer(1, origin_of_values, prefix=prefix, command=True)
    settings += collect(values or {}, layer, problems)
    for rank, override in enumerate(overrides, start=2):
        settings += read_override(override, rank, problems)
    return settings


def resolve(
    settings: Sequence[Setting], problems: Problems, required: Sequence[str] = (), where: str = ""
) -> Resolved:
    """What the settings come to; those of a higher layer stand behind those of a lower one.

    Raises ConfigError with all `problems`, those found before among them.
    """
    named = [setting for setting in settings if setting.leaf]
    held = _overlay(named, problems)
    objective = held["objective"].settled if "objective" in held else "dpo"
    for setting in settings:
        if not setting.leaf:
            problems.at(setting, _unnamed(setting, objective))
    _contradictions(held, problems)
    missing = {leaf for leaf in required if leaf not in held or held[leaf].settled is None}
    # What was given by another program's name is not missing as well.
    renamed = {meant(setting.typed) for setting in settings if not setting.leaf}
    run = None
    try:
        run = Run.model_validate(_nested(held))
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            leaf = ".".join(map(str, detail["loc"][: 2 if detail["loc"][0] in SECTIONS else 1]))
            if leaf in held:
                problems.at(held[leaf], _wrong(held[leaf]))
            elif detail["type"] == "missing":
                missing.add(leaf)
    for leaf in keys():
        if leaf in missing - renamed:
            said = f"{where}{leaf} is missing, and needed. {keys()[leaf].description}"
            problems.append(Problem(math.inf, 0, said))
    problems.raise_any()
    assert run is not None, missing
    origins = {
        leaf: held[leaf].layer.origin if leaf in held else DEFAULT for leaf in leaf_values(run)
    }
    places = {leaf: setting.place for leaf, setting in held.items() if setting.place}
    return Resolved(run, origins, places=places)


def _overlay(settings: Iterable[Setting], problems: Problems) -> dict[str, Setting]:
    """The setting that holds for each leaf."""
    held: dict[str, Setting] = {}
    for setting in settings:
        same = held.get(setting.leaf)
        if same is not None and same.layer.rank == setting.layer.rank:
            said = f"{setting.shown} sets {setting.leaf}, and so does {same.shown}{_in(same)}."
            problems.at(setting, f"{said} Keep one of them.")
        for other in _opposites(setting, held):
            if setting.layer.in_one_breath_with(other.layer):
                both = f"{_equals(setting)} and {_equals(other)}{_in(other)}"
                said = f"{both} contradict each other."
                problems.at(setting, f"{said} Keep one of them.")
            else:
                del held[other.leaf]
        held[setting.leaf] = setting
    return held


def _equals(setting: Setting) -> str:
    return f"{setting.shown}={show(setting.value)}"


def _in(setting: Setting) -> str:
    return f" in line {setting.line}" if setting.line else ""


def _opposites(setting: Setting, held: Mapping[str, Setting]) -> list[Setting]:
    def is_on(other: Setting | None) -> bool:
        return other is not None and other.settled is not None and other.settled is not False

    if setting.leaf in EITHER:
        other = held.get(EITHER[setting.leaf])
        return [other] if other is not None and is_on(setting) and is_on(other) else []
    if setting.leaf == SWITCHED:
        options = [other for leaf, other in held.items() if keys()[leaf].section == SWITCHED]
        return [] if is_on(setting) else [other for other in options if other.leaf != SWITCHED]
    if keys()[setting.leaf].section == SWITCHED:
        switch = held.get(SWITCHED)
        return [switch] if switch is not None and not is_on(switch) else []
    return []


def _unnamed(setting: Setting, objective: object) -> str:
    names = candidates(setting.typed)
    if names:
        return f"{setting.shown} may be {' or '.join(names)}: write one of these in full."
    said = str(objective)
    others = unread(said) if said in OBJECTIVES else ()
    wrong = setting.layer.prefix + unknown_key(setting.typed, said, others)
    if meant(setting.typed) == "objective":
        loss = str(setting.value).lower()
        wrong += f" {loss}:{CALLED_ELSEWHERE[loss]}" if loss in CALLED_ELSEWHERE else ""
    return wrong


SHARES = {
    "optimizer.warmup": " of the steps",
    "evaluation.fraction": " of the prompts",
    "lora.dropout": "",
}
"""Keys that are a percentage elsewhere, or may be taken for one, and what they are a share of."""


def _wrong(setting: Setting) -> str:
    key = keys()[setting.leaf]
    found = setting.settled
    guess = nearest(found, key.choices) if isinstance(found, str) else ""
    if setting.leaf == "objective":
        guess = CALLED_ELSEWHERE.get(str(found).lower(), guess)
    if setting.leaf in SHARES and isinstance(found, int | float) and 1 < found < 100:
        guess = f" It is a share{SHARES[setting.leaf]}: {found:g} % is {found / 100:g}."
    if "\\x00" in repr(found):
        guess = " Take the NUL character out."
    return f"{setting.shown} must be {key.kind}, found {show(setting.value)}.{guess}"


def _contradictions(held: Mapping[str, Setting], problems: Problems) -> None:
    def given(leaf: str) -> Any:
        return held[leaf].settled if leaf in held else None

    sets, fraction = given("evaluation.sets"), given("evaluation.fraction")
    taken = {
        "train": "is what the training rows are called",
        "prompts": "is what the rows of evaluation.prompt_files are called",
    }
    if fraction:
        taken["heldout"] = "is what evaluation.fraction makes"
    for name in taken.keys() & (sets if isinstance(sets, dict) else {}):
        setting = held["evaluation.sets"]
        said = f'{setting.shown} has a set "{name}", which {taken[name]}; give it another name.'
        problems.at(setting, said)
    evaluated = sets or fraction or given("evaluation.prompt_files")
    if given("checkpoint.best") is not None and not evaluated:
        setting = held["checkpoint.best"]
        problems.at(
            setting,
            f"{setting.shown} needs an evaluation: give evaluation.sets, evaluation.fraction or "
            "evaluation.prompt_files.",
        )
    objective = given("objective") or "dpo"
    if given("rollout.responses") == 1 and objective in COMPARING:
        setting = held["rollout.responses"]
        said = f"{setting.shown} is 1, and {objective} compares answers: give 2 or more."
        problems.at(setting, said)
    if given("loss.beta") == 0:
        setting = held["loss.beta"]
        if objective in ("dpo", "online_dpo"):
            said = f"{setting.shown} must be above 0 for {objective}: its rewards are beta times"
            problems.at(setting, f"{said} log-ratios, all of them 0 then.")
        elif given("policy.kl_target"):
            said = f"{setting.shown} is what policy.kl_target multiplies: it would stay 0."
            problems.at(setting, said)
    if given("lora.dropout") and objective in ("ppo", "grpo", "rloo"):
        setting = held["lora.dropout"]
        said = f"{setting.shown} has no place in {objective}: answers are drawn without dropout,"
        problems.at(setting, f"{said} and their ratio to what is trained would measure it.")
    asked = held.get("evaluation.temperature")
    written = asked is not None and asked.typed == "temperature" and asked.value != 1
    if asked is not None and written and draws(str(objective)):
        said = f"{asked.shown} would be that of evaluations: {objective} learns from answers that "
        said += "the policy itself draws, at temperature 1. Write evaluation.temperature for those."
        problems.at(asked, said)
    parts, prompts = given("rollout.minibatches"), given("rollout.prompts_per_round")
    prompts = Rollout().prompts_per_round if prompts is None else prompts
    if isinstance(parts, int) and isinstance(prompts, int) and parts > prompts:
        setting = held["rollout.minibatches"]
        said = f"{setting.shown} is {parts}, and rollout.prompts_per_round is {prompts}: a step "
        problems.at(setting, said + "needs a prompt. Make them equal, or have fewer minibatches.")
    if (server := given("rollout.server")) is not None:
        setting = held["rollout.server"]
        if isinstance(server, str) and server.rstrip("/").endswith("/v1"):
            problems.at(setting, f"{setting.shown} is written without /v1, as http://host:port.")
        elif isinstance(server, str) and not names_host(server):
            said = (
                f"{setting.shown} is {show(server)}, which names no host; write http://host:port."
            )
            problems.at(setting, said)
        options = any(keys()[leaf].section == SWITCHED for leaf in held)
        if not (given(SWITCHED) if SWITCHED in held else options):
            said = f"{setting.shown} needs lora: the server is given the adapter of each round."
            problems.at(setting, said)
        if given("lora.quantize") is not None:
            said = f"{setting.shown} has no place beside lora.quantize: the model of the server is "
            problems.at(setting, said + "not rounded as that is. Leave one of them out.")
    attention = given("compute.attention")
    if given("compute.sharing") is False and attention not in (None, "auto"):
        setting = held["compute.attention"]
        said = f"{setting.shown} has no effect with compute.sharing false; keep one of them."
        problems.at(setting, said)
    for leaf in ("data.template_options", "data.date"):
        if given("data.template") == "none" and given(leaf):
            setting = held[leaf]
            said = f"{setting.shown} has no effect with data.template none; keep one of them."
            problems.at(setting, said)


def _nested(held: Mapping[str, Setting]) -> dict[str, Any]:
    """What is held as Run reads it: a mapping for each section that has keys."""
    nested: dict[str, Any] = {"data": {}}
    for leaf, setting in held.items():
        section, _, name = leaf.rpartition(".")
        if leaf == SWITCHED:
            if setting.settled:
                nested.setdefault(SWITCHED, {})
        elif section:
            nested.setdefault(section, {})[name] = setting.settled
        else:
            nested[name] = setting.settled
    return nested


def leaf_values(run: Run) -> dict[str, Any]:
    """Every leaf of a run by its full name; "lora" alone where LoRA is off."""
    values: dict[str, Any] = {}
    for name in keys():
        section, _, leaf = name.rpartition(".")
        part = getattr(run, section) if section else run
        if name == SWITCHED:
            if run.lora is None:
                values[name] = None
        elif part is not None:
            values[name] = getattr(part, leaf)
    return values


def dump(resolved: Resolved, found: Mapping[str, str] | None = None) -> str:
    """The text of a run.yaml that loads back to the same Run, each value with its origin.

    `found` is what is said beside a key, where a value such as auto stands for another one here;
    under other names, at the end, what no key stands for.
    """
    found = dict(found or {})
    lines = ["# Every value of this run, and where it came from."]
    section = ""
    for name, value in leaf_values(resolved.run).items():
        key = keys()[name]
        origin = resolved.origins[name] + (f"{BESIDE}{found.pop(name)}" if name in found else "")
        if key.section != section:
            section = key.section
            title = f"# {section}: {(SECTIONS[section].__doc__ or '').strip()}"
            lines += ["", title] + ([] if name == SWITCHED else [f"{section}:"])
        if name == "epochs" and resolved.run.steps is not None:
            # Both would contradict each other when the text is read back.
            lines.append("# epochs has no say: steps does")
            continue
        indent = "  " if key.full != key.name else ""
        lines.append(f"{indent}{key.name}: {write(value)}  # {_printable(origin)}")
    lines += [""] * bool(found) + [f"# {name}: {_printable(said)}" for name, said in found.items()]
    return "\n".join(lines) + "\n"


BESIDE = "; "


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
