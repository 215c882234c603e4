"""compare.yaml: several methods from one start, each a run of its own.

    title: Sentiment
    model: base
    data: pairs.jsonl
    evaluation: {true_reward: vader, prompt_files: prompts.jsonl, samples: 48}
    methods:
      dpo: {objective: dpo}
      judge: {objective: reward}
      ppo: {objective: ppo, reward: "method:judge"}
      best of 8: {objective: best_of_n, reward: "method:judge", num: 8}

A method is the file's other keys with its own laid over them, where its objective reads them.
`reward: method:NAME` is the reward model that the method NAME trains; best_of_n trains nothing and
lets `reward` choose among `num` answers. `note` is what the page says of a method. Each method
writes to a folder in `out`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upweight.config.commands import require_read, require_read_to_choose
from upweight.config.keys import METHODS, keys
from upweight.config.objectives import CHOOSING, OBJECTIVES, unread
from upweight.config.resolve import Resolved, resolve
from upweight.config.settings import Layer, Problem, Problems, Setting, collect, show
from upweight.config.written import parse, settle
from upweight.errors import ConfigError, nearest

BEST_OF_N = "best_of_n"
STARTLESS = (BEST_OF_N, "reward")
"""Methods that do not measure what all of them start from."""
TRAINED = "method:"
"""What stands before the name of a method whose reward model is meant."""

ABOUT_ALL = ("title", METHODS)
ABOUT_ONE = ("note", "num")

NOT_OF_ONE = {
    "out": "stands beside the methods: each writes to a folder in it",
    "resume": "is not read by compare, which goes on with what has not finished when it is run "
    "again. Leave it out",
}
"""Keys that no method has for itself, and why."""


@dataclass(frozen=True)
class Method:
    """One way to train, or to choose: its name, what its run says itself, and what is said of it.

    `reward` is the rollout.reward that holds for it, "" without one.
    """

    name: str
    objective: str
    own: tuple[Setting, ...]
    note: str
    num: int
    reward: str

    @property
    def trains_by(self) -> str:
        """The objective whose keys it reads: what chooses among answers draws them as GRPO does."""
        return "grpo" if self.objective == BEST_OF_N else self.objective

    @property
    def folder(self) -> str:
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-.")

    @property
    def judge(self) -> str | None:
        """The method whose reward model it uses."""
        return self.reward.removeprefix(TRAINED) if self.reward.startswith(TRAINED) else None

    def reads(self, leaf: str) -> bool:
        if self.objective == BEST_OF_N:
            return leaf in CHOOSING
        return leaf not in unread(self.objective)

    def require_read(self, resolved: Resolved) -> None:
        """Raises Refusal UW109 for what its run, or what it says itself, has and nobody reads."""
        if self.objective == BEST_OF_N:
            require_read_to_choose(self.own)
        else:
            require_read("train", resolved.run, resolved.places)


@dataclass(frozen=True)
class Comparison:
    """A compare.yaml: what all methods share, the methods in their order, and the folder that it
    names, None where it names none."""

    title: str
    shared: tuple[Setting, ...]
    methods: tuple[Method, ...]
    out: str | None = None

    def method(self, name: str) -> Method:
        return next(method for method in self.methods if method.name == name)

    def run_of(self, method: Method, out: Path, *, resume: bool = False) -> Resolved:
        """The run of a method, in its folder in `out`. Raises ConfigError for what is wrong in
        its keys, each with its line."""
        problems = Problems()
        itself = Layer(3, "compare")
        values: dict[str, Any] = {
            "objective": method.trains_by,
            "out": str(out / method.folder),
            "resume": resume,
        }
        if method.judge is not None:
            values["rollout.reward"] = str(out / self.method(method.judge).folder / "model")
        # What is shared is read by those methods that read it; what a method says itself must be.
        # A run has rows, also where nothing is learned from them.
        kept = [s for s in self.shared if method.reads(s.leaf) or s.leaf == "data.path"]
        laid = [s for s in (*kept, *method.own) if s.leaf not in values]
        laid = sorted([*laid, *collect(values, itself, problems)], key=lambda s: s.layer.rank)
        return resolve(laid, problems, ("out",), f"method {method.name}: ")


def load_comparison(file: Path, given: Mapping[str, Any]) -> Comparison:
    """The comparison in a file; `given` is laid over what its methods share.

    Raises ConfigError with all that is wrong in the file: no methods, none that measures what all
    start from, a method without a reward that it needs or with the name of another one, a key that
    none of the methods reads. The values of keys are looked at by `run_of`.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text (byte {error.start + 1}).") from None
    parsed = parse(text, str(file))
    problems = Problems(
        Problem(0, line, f"{file}:{line}: {said}") for line, said in parsed.problems
    )
    problems.raise_any()
    document: dict[str, Any] = parsed.value if isinstance(parsed.value, dict) else {}
    listed = document.get(METHODS)
    if document and METHODS not in document:
        raise ConfigError(
            f"{file} has no methods, so it is no comparison but a run: upweight train "
            f"{shlex.quote(str(file))}. A comparison needs methods: {{NAME: {{objective: ...}}}}."
        )
    if not isinstance(listed, dict) or not listed:
        raise ConfigError(f"{file} has no methods. It needs methods: {{NAME: {{objective: ...}}}}.")
    layer = Layer(0, f"file {file}", file=str(file), lines=parsed.lines)
    shared = list(collect(_without(document, ABOUT_ALL), layer, problems))
    shared += collect(given, Layer(1, "given"), problems)
    out = _out(shared, problems)
    shared = [setting for setting in shared if setting.leaf != "out"]
    methods = tuple(
        _method(str(name), keys, shared, layer, problems) for name, keys in listed.items()
    )
    for i, method in enumerate(methods):
        _require_told_apart(method, methods[:i], layer, problems)
    starts = any(m.objective not in STARTLESS for m in methods)
    if not starts:
        line = parsed.lines.get((METHODS,), 0)
        said = (
            f"{file}:{line}: a comparison needs a method that is trained and answers prompts: what "
            f"all start from is measured before its first step. {BEST_OF_N} trains nothing, and "
            "reward answers nothing."
        )
        problems.append(Problem(layer.rank, line, said))
    for setting in shared:
        if setting.leaf == "resume":
            problems.at(setting, f"{setting.shown} {NOT_OF_ONE['resume']}.")
        elif starts and setting.leaf and not any(m.reads(setting.leaf) for m in methods):
            objectives = ", ".join(dict.fromkeys(m.objective for m in methods))
            problems.at(
                setting,
                f"{setting.shown} is read by none of the methods ({objectives}). Leave it out.",
            )
    problems.raise_any()
    return Comparison(str(document.get("title", file.stem)), tuple(shared), methods, out)


def _out(shared: Sequence[Setting], problems: Problems) -> str | None:
    """The folder that is named beside the methods; the last word holds."""
    out: str | None = None
    for setting in shared:
        if setting.leaf != "out":
            continue
        found = setting.settled
        if found is None or isinstance(found, str):
            out = found
        else:
            kind = keys()["out"].kind
            problems.at(setting, f"{setting.shown} must be {kind}, found {show(setting.value)}.")
    return out


def _without(keys: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if key not in names}


def _method(
    name: str, keys: Any, shared: Sequence[Setting], layer: Layer, problems: Problems
) -> Method:
    here = Layer(
        2,
        f"{layer.origin}, method {name}",
        file=layer.file,
        lines={path[2:]: n for path, n in layer.lines.items() if path[:2] == (METHODS, name)},
        prefix=f"method {name}: ",
    )

    def wrong(said: str) -> None:
        line = here.lines.get((), layer.lines.get((METHODS, name), 0))
        problems.append(Problem(here.rank, line, f"{layer.file}:{line}: method {name}{said}"))

    if not isinstance(keys, dict):
        wrong(f" is {show(keys)}; allowed: the keys of a run.")
        return Method(name, "dpo", (), "", 1, "")
    said: dict[str, Any] = keys
    own = tuple(collect(_without(said, ABOUT_ONE), here, problems))
    held = {setting.leaf: setting.value for setting in (*shared, *own)}
    for setting in own:
        if setting.leaf in NOT_OF_ONE:
            problems.at(setting, f"{setting.shown} {NOT_OF_ONE[setting.leaf]}.")
    objective = str(settle(held.get("objective", "dpo"), True))
    if objective not in (*OBJECTIVES, BEST_OF_N):
        allowed = (*OBJECTIVES, BEST_OF_N)
        guess = nearest(objective, allowed)
        wrong(f": objective is {objective}; allowed: {', '.join(allowed)}.{guess}")
        objective = "dpo"
    reward = held.get("rollout.reward")
    best = objective == BEST_OF_N
    num = settle(said.get("num", 8), False)
    if type(num) is not int or num < 1:
        wrong(f": num is {show(said['num'])}; allowed: a whole number of answers, from 1 on.")
        num = 1
    if "num" in said and not best:
        wrong(f": num is read by {BEST_OF_N} alone. Leave it out.")
    if best and reward is None:
        wrong(f" needs reward, which chooses among the {num} answers.")
    note = str(settle(said.get("note", ""), True))
    return Method(name, objective, own, note, num, str(reward or ""))


def _require_told_apart(
    method: Method, before: Sequence[Method], layer: Layer, problems: Problems
) -> None:
    """A method has a folder of its own, and its reward is trained before it."""
    line = layer.lines.get((METHODS, method.name), 0)

    def wrong(said: str) -> None:
        problems.append(Problem(2, line, f"{layer.file}:{line}: method {method.name} {said}"))

    if not method.folder:
        wrong("needs a letter or a digit in its name.")
    if same := [other.name for other in before if other.folder == method.folder]:
        wrong(f"and method {same[0]} would both be written to {method.folder}. Rename one.")
    trained = [other.name for other in before if other.objective == "reward"]
    if method.judge is not None and method.judge not in trained:
        wrong(
            f"takes its reward from {method.reward}, and no reward model before it is called so "
            f"(before it: {', '.join(trained) or 'none'}).{nearest(method.judge, trained)}"
        )
