"""compare(): several methods from one start, on one set of data, judged by one reward."""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from upweight.config import Evaluation, Resolved, Run, require_read
from upweight.config.methods import BEST_OF_N, Comparison, Method
from upweight.errors import ConfigError, OutputError, UpweightError
from upweight.evidence import comparison as scored
from upweight.evidence.report.markup import duration
from upweight.models.sample import sample
from upweight.recipes.beside import has_own_critic
from upweight.recipes.kinds import KINDS, PROMPTS
from upweight.recipes.prepare import load_policy, prepare
from upweight.recipes.reference import sampled_trees
from upweight.recipes.resume import require_finished_as_asked
from upweight.recipes.rewarding import is_judge, make_scorer, require_rewards
from upweight.recipes.screen import Screen, Silent, counted
from upweight.recipes.stages import is_finished
from upweight.recipes.train import train_model
from upweight.stats import mean_interval
from upweight.training.records import finite
from upweight.training.rollout import as_tree
from upweight.training.rundir import write_atomic

POINT = ("length", "kl", "kl_low", "kl_high", "reward", "reward_low", "reward_high")
"""What is kept of an evaluation."""

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
    judge = _require_judged(runs)
    for method in comparison.methods:
        resolved = runs[method.name]
        if method.objective != BEST_OF_N:
            require_read("train", resolved.run)
        try:
            require_rewards(resolved.run, later=method.judge is not None)
        except UpweightError as error:
            error.args = (f"method {method.name}: {error}",)
            raise
        assert resolved.run.out is not None
        if is_finished(Path(resolved.run.out)):
            require_finished_as_asked(resolved)
    folder.mkdir(parents=True, exist_ok=True)
    methods: list[scored.Method] = []
    start: scored.Start | None = None
    spent = 0.0  # a reward model's training once, though each method that uses it is charged for it
    for method in comparison.methods:
        screen.note(f"\n== {method.name}: {method.note}".removesuffix(": "))
        gc.collect()  # the models of one method are gone before those of the next are there
        try:
            found, its_start = _measured(comparison, method, folder, screen)
        except _Stopped:
            screen.note("stopped; the same command goes on with this method")
            return Compared(None)
        except UpweightError as error:
            screen.note(f"{method.name} failed: {error}")
            found, its_start = _failed(method, str(error)), None
        start = start or its_start
        spent += found.seconds
        methods.append(_with_judge(found, method, methods))
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
    screen.note(claim.said)
    for line in filter(None, (claim.sure, *claim.lines)):
        screen.note(f"  {line}")
    took = duration(time.monotonic() - began)
    screen.note(f"{counted(len(methods), 'method')} in {took}")
    screen.note(f"comparison: {page}")
    return Compared(page, tuple(m.name for m in methods if m.failed is not None))


def _told(method: Method) -> str:
    """What is said of a method, and what it was told for itself."""
    own = [f"{s.leaf}: {s.value}" for s in method.own if s.leaf != "objective"]
    return "; ".join(filter(None, (method.note, ", ".join(own))))


def _measured(
    comparison: Comparison, method: Method, folder: Path, screen: Screen
) -> tuple[scored.Method, scored.Start | None]:
    if method.objective == BEST_OF_N:
        return _best_of(comparison, method, folder), None
    return _trained(comparison, method, folder, screen)


def _failed(method: Method, why: str) -> scored.Method:
    return scored.Method(method.name, method.objective, _told(method), 0.0, 0, (), why)


def _with_judge(
    found: scored.Method, method: Method, before: Sequence[scored.Method]
) -> scored.Method:
    """With the cost of the reward model that it was trained against, or that chose for it."""
    judge = next((m for m in before if m.name == method.judge), None)
    if judge is None:
        return found
    return replace(found, seconds=found.seconds + judge.seconds, tokens=found.tokens + judge.tokens)


def _require_judged(runs: Mapping[str, Resolved]) -> str:
    """What judges every method. Raises ConfigError where their answers are not comparable."""
    asked = {
        name: resolved.run.evaluation
        for name, resolved in runs.items()
        if KINDS[resolved.run.objective].answers
    }
    if not asked:
        raise ConfigError("a comparison needs a method that answers prompts; reward does not.")
    for name, evaluation in asked.items():
        _require_answered(name, evaluation)
    first, *others = asked.values()
    for key in ("true_reward", "prompt_files", "samples", "max_new_tokens"):
        if any(getattr(other, key) != getattr(first, key) for other in others):
            raise ConfigError(
                f"evaluation.{key} differs between methods, which could not be compared then. "
                "Write it beside methods."
            )
    assert first.true_reward is not None
    return first.true_reward


def _require_answered(name: str, asked: Evaluation) -> None:
    wrong = {
        "evaluation.true_reward (what judges every method)": asked.true_reward is None,
        "evaluation.prompt_files (whose answers are judged)": asked.prompt_files is None,
        "evaluation.samples of at least 1": asked.samples < 1,
        "evaluation.temperature 1 (the KL is that of the policy itself)": asked.temperature != 1,
    }
    if missing := [what for what, is_wrong in wrong.items() if is_wrong]:
        raise ConfigError(f"method {name}: a comparison needs {', '.join(missing)}.")


def _trained(
    comparison: Comparison, method: Method, folder: Path, screen: Screen
) -> tuple[scored.Method, scored.Start | None]:
    """What a method's run measured; a run that has finished is read, one that stopped goes on."""
    out = folder / method.folder
    if not is_finished(out):
        resume = any((out / "checkpoints").glob("step-*"))
        result = train_model(comparison.run_of(method, folder, resume=resume), screen)
        if not result.finished:
            raise _Stopped
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    points = [
        scored.Point(r["step"], **{key: math.nan if r[key] is None else r[key] for key in POINT})
        for r in records
        if r["kind"] == "eval" and r["set"] == PROMPTS and "reward" in r and "kl" in r
    ]
    last = [r for r in records if r["kind"] == "train"][-1]
    first = points.pop(0) if points and points[0].step == 0 else None
    start = first and scored.Start(first.reward, first.reward_low, first.reward_high)
    found = scored.Method(
        method.name,
        method.objective,
        _told(method),
        last["seconds"],
        last["num_tokens"] + _computed_besides(comparison.run_of(method, folder).run, out, last),
        tuple(points),
        taught=_taught(method, out, [r for r in records if r["kind"] == "train"]),
    )
    return found, start


def _taught(method: Method, out: Path, steps: Sequence[Mapping[str, Any]]) -> scored.Taught:
    """What a finished run learned from, as its account, metrics and rounds say."""
    kind, last = KINDS[method.trains_by], steps[-1]
    account = json.loads((out / "account.json").read_text(encoding="utf-8"))["sets"]["train"]
    if kind.draws:
        files = (out / "rollouts").glob("round-*.parquet")
        drawn = [pq.read_table(file, columns=["tree"])["tree"].to_pylist() for file in files]
        asked, answers = sum(len(set(trees)) for trees in drawn), sum(map(len, drawn))
        return scored.Taught(
            "prompts", account["used"], asked, last["step"], answers, method.reward
        )
    if kind.rows == "preferences":
        there, seen = account["preferences"], sum(r["num_pairs"] for r in steps)
    else:
        there = account["responses"] - account["left_out"].get("not_chosen", 0)
        seen = round(last["epoch"] * there)
    return scored.Taught(kind.rows, there, seen, last["step"], 0, scored.ROWS)


def _computed_besides(run: Run, out: Path, last: Mapping[str, Any]) -> int:
    """Tokens that were computed beside the policy's own steps: the reference's pass over the rows
    of an epoch; what drawing and scoring the rounds took, and the steps of a value model with a
    trunk of its own."""
    if KINDS[run.objective].by_reference:
        return round(last["num_tokens"] / last["epoch"])
    files = (out / "rollouts").glob("round-*.parquet")
    drawn = sum(pq.read_table(file, columns=["computed"])[0][0].as_py() for file in files)
    return drawn + (last["num_tokens"] if has_own_critic(run) else 0)


def _best_of(comparison: Comparison, method: Method, folder: Path) -> scored.Method:
    """The answer of `num` that the method's reward likes best, for every prompt.

    Its KL to the start is at most log n - (n - 1)/n nats (Beirami et al. 2024, arXiv:2401.01879),
    and close to that where no two answers score the same.
    """
    run = comparison.run_of(method, folder).run
    lm = load_policy(run)
    prepared = prepare(run, lm)
    asked = sampled_trees(run, prepared.trees[PROMPTS])
    assert run.rollout.reward is not None and run.evaluation.true_reward is not None
    end = prepared.renderer.end
    choose = make_scorer(run.rollout.reward, run, lm, end)
    judge = make_scorer(run.evaluation.true_reward, run, lm, end)
    began = time.monotonic()
    drawn = sample(
        lm,
        [tree.prompt for tree in asked],
        num=method.num,
        max_new_tokens=run.evaluation.max_new_tokens,
        seed=run.seed + 1,
        stop_token_ids=prepared.renderer.stop_ids,
    )
    trees = [as_tree(tree, answers) for tree, answers in zip(asked, drawn, strict=True)]
    scores = choose(trees)
    seconds = time.monotonic() - began
    best = [
        as_tree(tree, [answers[max(range(len(each)), key=each.__getitem__)]])
        for tree, answers, each in zip(asked, drawn, scores, strict=True)
    ]
    rewards = [score for (score,) in judge(best)]
    found, kl = mean_interval(rewards), math.log(method.num) - (method.num - 1) / method.num
    times_read = 1 + is_judge(run.rollout.reward)
    tokens = times_read * sum(tree.num_tokens for tree in trees)
    length = sum(len(tree.responses[0]) for tree in best) / len(best)
    point = scored.Point(method.num, kl, kl, kl, found.value, found.low, found.high, length)
    num, drew = len(trees), sum(len(tree.responses) for tree in trees)
    return scored.Method(
        method.name,
        BEST_OF_N,
        _told(method),
        seconds,
        tokens,
        (point,),
        taught=scored.Taught("prompts", num, num, 0, drew, method.reward),
    )
