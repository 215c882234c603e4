"""compare(): several methods from one start, on one set of data, judged by one reward.

compare.yaml is a run.yaml with `methods`: a name for each, and the keys in which it differs. The
other keys are those of every run. `reward: method:NAME` is the reward model that the method NAME
trained; `objective: best_of_n` trains nothing and lets `reward` choose among `num` answers.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from upweight.config import Resolved, Run, flattened, load_run
from upweight.config.objectives import unread
from upweight.config.written import parse
from upweight.errors import ConfigError, OutputError, UpweightError
from upweight.evidence import comparison as scored
from upweight.models.sample import sample
from upweight.recipes.kinds import PROMPTS
from upweight.recipes.prepare import load_policy, prepare
from upweight.recipes.reference import sampled_trees
from upweight.recipes.resume import require_finished_as_asked
from upweight.recipes.rewarding import make_scorer
from upweight.recipes.screen import Screen, Silent
from upweight.recipes.stages import is_finished
from upweight.recipes.train import train_model
from upweight.stats import mean_interval
from upweight.training.rollout import as_tree
from upweight.training.rundir import write_atomic

BEST_OF_N = "best_of_n"
OWN_KEYS = ("title", "methods", "note", "num")
"""What a compare.yaml and its methods say beside the keys of a run."""

POINT = ("step", "length", "kl", "kl_low", "kl_high", "reward", "reward_low", "reward_high")
"""What is kept of an evaluation."""

BUDGET = (
    "every method starts from the same model and sees the same training prompts; those that learn "
    "from preferences see the same preferences, those that learn from rewards the reward model "
    "that was trained on these; seconds and tokens are what each took"
)

Json = dict[str, Any]


class _Stopped(Exception):
    """The person asked to stop: what has finished stays, and the same command goes on."""


@dataclass(frozen=True)
class Method:
    """One way to train, or to choose: its name, the keys of its run, and what is said of it."""

    name: str
    values: Mapping[str, Any]
    note: str
    num: int

    @property
    def objective(self) -> str:
        return str(self.values.get("objective", "dpo"))

    @property
    def trains_by(self) -> str:
        """The objective whose keys it reads: what chooses among answers draws them as GRPO does."""
        return "grpo" if self.objective == BEST_OF_N else self.objective

    @property
    def folder(self) -> str:
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True)
class Comparison:
    """A compare.yaml: what all methods share, and the methods in their order."""

    title: str
    shared: Mapping[str, Any]
    methods: Sequence[Method]


def read_comparison(file: Path, given: Mapping[str, Any]) -> Comparison:
    """Raises ConfigError where the file is no comparison; the keys of runs are checked by them."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}.") from None
    parsed = parse(text, str(file))
    if parsed.problems:
        line, said = parsed.problems[0]
        raise ConfigError(f"{file}:{line}: {said}")
    document = parsed.value if isinstance(parsed.value, dict) else {}
    methods = document.get("methods")
    if not isinstance(methods, dict) or not methods:
        raise ConfigError(f"{file} has no methods. It needs methods: {{NAME: {{objective: ...}}}}.")
    found = [_method(f"{file}: method {name}", str(name), keys) for name, keys in methods.items()]
    shared = flattened({k: v for k, v in document.items() if k not in OWN_KEYS})
    shared |= flattened(given)
    comparison = Comparison(str(document.get("title", file.stem)), shared, found)
    _require_told_apart(file, comparison)
    return comparison


def _method(where: str, name: str, keys: object) -> Method:
    if not isinstance(keys, dict):
        raise ConfigError(f"{where} is {keys}; allowed: the keys of a run.")
    said: Json = {str(key): value for key, value in keys.items()}
    num = said.get("num", 8)
    best = said.get("objective") == BEST_OF_N
    if type(num) is not int or num < 1:
        raise ConfigError(f"{where}: num is {num}; allowed: a whole number of answers from 1 on.")
    if "num" in said and not best:
        raise ConfigError(f"{where}: num is read by {BEST_OF_N} alone. Leave it out.")
    if best and "reward" not in said and "rollout.reward" not in said:
        raise ConfigError(f"{where} needs reward, which chooses among the {num} answers.")
    own = flattened({k: v for k, v in said.items() if k not in OWN_KEYS})
    return Method(name, own, str(said.get("note", "")), num)


def _require_told_apart(file: Path, comparison: Comparison) -> None:
    """Every method has a folder of its own, and what is shared is read by at least one."""
    named: dict[str, str] = {}
    for method in comparison.methods:
        if not method.folder:
            raise ConfigError(
                f"{file}: method {method.name!r} needs a letter or digit in its name."
            )
        other = named.setdefault(method.folder, method.name)
        if other != method.name:
            raise ConfigError(
                f"{file}: methods {other!r} and {method.name!r} would both be written to the "
                f"folder {method.folder}. Rename one."
            )
    unheard = [
        key
        for key in comparison.shared
        if all(key in unread(method.trains_by) for method in comparison.methods)
    ]
    if unheard:
        objectives = ", ".join(dict.fromkeys(m.objective for m in comparison.methods))
        raise ConfigError(
            f"{file}: {', '.join(unheard)} is read by none of the methods ({objectives}). Leave it "
            "out, or write it to the method that it is meant for."
        )


def compare(comparison: Comparison, out: str, screen: Screen | None = None) -> Path | None:
    """Runs every method that has not finished in `out` yet, and writes comparison.html there.

    A method that fails is named with its reason, and the others go on; None when it was asked to
    stop. Raises ConfigError, before the first method begins, where the settings of any are wrong,
    or other than those that it has finished with; OutputError where none could be evaluated.
    """
    screen, folder = screen or Silent(), Path(out)
    began = time.monotonic()
    _require_methods(comparison)
    judge = _shared_run(comparison, folder).evaluation.true_reward
    if judge is None:
        raise ConfigError("a comparison needs evaluation.true_reward: what judges every method.")
    for method in comparison.methods:
        resolved = _resolved(comparison, method, folder, resume=False)
        if is_finished(folder / method.folder):
            require_finished_as_asked(resolved)
    folder.mkdir(parents=True, exist_ok=True)
    methods: list[scored.Method] = []
    start: scored.Start | None = None
    for method in comparison.methods:
        screen.note(f"\n== {method.name}: {method.note}".removesuffix(": "))
        gc.collect()  # the models of one method are gone before those of the next are there
        try:
            found, its_start = _measured(comparison, method, folder, screen)
        except _Stopped:
            screen.note("stopped; the same command goes on with this method")
            return None
        except UpweightError as error:
            screen.note(f"{method.name} failed: {error}")
            found, its_start = _failed(method, str(error)), None
        start = start or its_start
        methods.append(found)
    if start is None:
        raise OutputError(
            f"no method of the comparison in {folder} was evaluated at its start; the first "
            f"failure: {next((m.failed for m in methods if m.failed), 'none')}"
        )
    holds, said = scored.claim(methods, start)
    study = scored.Study(
        title=comparison.title,
        reward=judge,
        start=start,
        methods=tuple(methods),
        budget=BUDGET,
        machine=f"{platform.machine()}, {os.cpu_count()} cores",
        seconds=sum(method.seconds for method in methods),
        claim=scored.Claim(holds, said),
    )
    write_atomic(folder / "comparison.json", json.dumps(asdict(study), indent=1))
    page = scored.write_comparison(folder)
    screen.note("")
    screen.note(said)
    screen.note(f"{len(methods)} methods in {(time.monotonic() - began) / 60:.0f} minutes")
    screen.note(f"comparison: {page}")
    return page


def _measured(
    comparison: Comparison, method: Method, folder: Path, screen: Screen
) -> tuple[scored.Method, scored.Start | None]:
    if method.objective == BEST_OF_N:
        return _best_of(comparison, method, folder), None
    return _trained(comparison, method, folder, screen)


def _failed(method: Method, why: str) -> scored.Method:
    return scored.Method(method.name, method.objective, method.note, 0.0, 0, (), why)


def _require_methods(comparison: Comparison) -> None:
    names = [method.name for method in comparison.methods]
    for method in comparison.methods:
        wanted = str(method.values.get("rollout.reward", ""))
        earlier = names[: names.index(method.name)]
        if wanted.startswith("method:") and wanted.removeprefix("method:") not in earlier:
            raise ConfigError(
                f"method {method.name} takes its reward from {wanted}, and no method before it is "
                f"called so (before it: {', '.join(earlier) or 'none'})."
            )


def _shared_run(comparison: Comparison, folder: Path) -> Run:
    return load_run(None, values={**comparison.shared, "out": str(folder)}).run


def _resolved(comparison: Comparison, method: Method, folder: Path, *, resume: bool) -> Resolved:
    values: Json = {**comparison.shared, **method.values, "out": str(folder / method.folder)}
    values["objective"] = method.trains_by
    if (wanted := str(values.get("rollout.reward", ""))).startswith("method:"):
        judge = _folder_of(comparison, wanted.removeprefix("method:"))
        values["rollout.reward"] = str(folder / judge / "model")
    # What is shared is read by those methods that read it; what a method says itself must be.
    others = set(unread(method.trains_by)) - method.values.keys()
    values = {key: value for key, value in values.items() if key not in others}
    if resume:
        values["resume"] = True
    return load_run(None, values=values, origin_of_values="compare", required=("out",))


def _folder_of(comparison: Comparison, name: str) -> str:
    return next(method.folder for method in comparison.methods if method.name == name)


def _trained(
    comparison: Comparison, method: Method, folder: Path, screen: Screen
) -> tuple[scored.Method, scored.Start | None]:
    """What a method's run measured; a run that has finished is read, one that stopped goes on."""
    out = folder / method.folder
    if not is_finished(out):
        resume = any((out / "checkpoints").glob("step-*"))
        result = train_model(_resolved(comparison, method, folder, resume=resume), screen)
        if not result.finished:
            raise _Stopped
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    points = [
        scored.Point(**{key: r[key] for key in POINT})
        for r in records
        if r["kind"] == "eval" and r["set"] == PROMPTS and "reward" in r and "kl" in r
    ]
    last = [r for r in records if r["kind"] == "train"][-1]
    first = points.pop(0) if points and points[0].step == 0 else None
    start = first and scored.Start(first.reward, first.reward_low, first.reward_high)
    found = scored.Method(
        method.name,
        method.objective,
        method.note,
        last["seconds"],
        last["num_tokens"],
        tuple(points),
    )
    return found, start


def _best_of(comparison: Comparison, method: Method, folder: Path) -> scored.Method:
    """The answer of `num` that the method's reward likes best, for every prompt.

    Its KL to the start is at most log n - (n - 1)/n nats (Beirami et al. 2024, arXiv:2401.01879),
    and close to that where no two answers score the same.
    """
    began = time.monotonic()
    run = _resolved(comparison, method, folder, resume=False).run
    lm = load_policy(run)
    prepared = prepare(run, lm)
    asked = sampled_trees(run, prepared.trees[PROMPTS])
    assert run.rollout.reward is not None and run.evaluation.true_reward is not None
    choose = make_scorer(run.rollout.reward, run, lm)
    judge = make_scorer(run.evaluation.true_reward, run, lm)
    drawn = sample(
        lm,
        [tree.prompt for tree in asked],
        num=method.num,
        max_new_tokens=run.evaluation.max_new_tokens,
        seed=run.seed + 1,
        stop_token_ids=prepared.renderer.stop_ids,
    )
    scores = choose([as_tree(tree, answers) for tree, answers in zip(asked, drawn, strict=True)])
    best = [
        as_tree(tree, [answers[max(range(len(each)), key=each.__getitem__)]])
        for tree, answers, each in zip(asked, drawn, scores, strict=True)
    ]
    rewards = [score for (score,) in judge(best)]
    found, kl = mean_interval(rewards), math.log(method.num) - (method.num - 1) / method.num
    tokens = sum(len(s.tokens) for answers in drawn for s in answers)
    length = sum(len(tree.responses[0]) for tree in best) / len(best)
    point = scored.Point(method.num, kl, kl, kl, found.value, found.low, found.high, length)
    seconds = time.monotonic() - began
    return scored.Method(method.name, BEST_OF_N, method.note, seconds, tokens, (point,))
