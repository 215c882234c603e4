"""Whether the methods of a comparison start from one model, are asked the same and judged alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from upweight.config import Evaluation, Resolved, Run, leaf_values, write
from upweight.config.methods import BEST_OF_N, Comparison, Method
from upweight.errors import ConfigError
from upweight.recipes.beginnings import OF_THE_START, Beginnings
from upweight.recipes.chosen import as_chosen, choice_began, is_chosen, require_chosen_as_asked
from upweight.recipes.kinds import KINDS, PROMPTS
from upweight.recipes.look import named
from upweight.recipes.resume import (
    Beginning,
    as_begun,
    require_finished_as_asked,
    require_same_beginning,
    require_unchanged,
)
from upweight.recipes.stages import is_finished

JUDGE = "evaluation.true_reward"

OF_THE_END = (
    *(JUDGE, "evaluation.prompt_files", "evaluation.samples", "evaluation.max_new_tokens"),
)
"""Keys that decide what is asked at an evaluation, and what the answers are worth."""


def require_judged(runs: Mapping[str, Resolved]) -> str:
    """What judges every method. Raises ConfigError where their answers are not comparable."""
    asked = {name: r.run for name, r in runs.items() if KINDS[r.run.objective].answers}
    for name, run in asked.items():
        _require_answered(name, run.evaluation)
    (first, its), *others = asked.items()
    for name, run in others:
        _require_alike(first, its, name, run)
    for name, run in asked.items():
        if run.reference not in (None, run.model):
            raise ConfigError(
                f"method {name}: reference is {run.reference}, and a comparison measures how far "
                f"each method went from where all of them start, {run.model}. Leave it out."
            )
    assert its.evaluation.true_reward is not None
    return its.evaluation.true_reward


def _require_answered(name: str, asked: Evaluation) -> None:
    wrong = {
        "evaluation.true_reward (what judges every method)": asked.true_reward is None,
        "evaluation.prompt_files (whose answers are judged)": asked.prompt_files is None,
        "evaluation.samples of at least 1": asked.samples < 1,
        "evaluation.temperature 1 (the KL is that of the policy itself)": asked.temperature != 1,
    }
    if missing := [what for what, is_wrong in wrong.items() if is_wrong]:
        raise ConfigError(f"method {name}: a comparison needs {', '.join(missing)}.")


def _require_alike(first: str, its: Run, name: str, run: Run) -> None:
    held, found = leaf_values(its), leaf_values(run)
    for key in (*OF_THE_START, *OF_THE_END):
        if held.get(key) != found.get(key):
            raise ConfigError(
                f"{key} differs between methods, which could not be compared then: {first} has "
                f"{write(held.get(key))}, and {name} {write(found.get(key))}. Write it beside "
                "methods."
            )


def require_finished_unchanged(comparison: Comparison, runs: Mapping[str, Resolved]) -> None:
    """Raises ConfigError where a method has finished with other settings, rows, models or rewards
    than there are now: what it measured would stand beside what is measured otherwise."""
    finished = [m for m in comparison.methods if _is_done(m, runs[m.name].run)]
    for method in finished:
        run = runs[method.name].run
        with named("method", method.name):
            if method.objective == BEST_OF_N:
                require_chosen_as_asked(method, run)
            else:
                require_finished_as_asked(runs[method.name])
            judge = method.judge
            if judge is not None and comparison.method(judge) not in finished:
                raise ConfigError(
                    f"the run in {run.out} is finished, and its reward is the model of method "
                    f"{judge}, which is to be trained first. Put {runs[judge].run.out} back, "
                    f"remove {run.out} to have it {_done(method)} again, or choose another out."
                )
    models = Beginnings()
    for method in finished:
        with named("method", method.name):
            if method.objective == BEST_OF_N:
                run = as_chosen(runs[method.name].run)
                now = models.of_choice(run)
                require_same_beginning(run, choice_began(run), now, _done(method))
            else:
                run = as_begun(runs[method.name]).run
                require_unchanged(run, models.of(run))


def _is_done(method: Method, run: Run) -> bool:
    assert run.out is not None
    return is_chosen(run) if method.objective == BEST_OF_N else is_finished(Path(run.out))


def _done(method: Method) -> str:
    return "drawn" if method.objective == BEST_OF_N else "trained"


def require_same_start(first: str, its: Beginning, found: Beginning) -> None:
    """Raises ConfigError where a method that was trained, or chosen for, was not measured from
    where `first` was, or not as it was."""
    known = its.model_fingerprint
    pairs = (
        ("the model that it started from", known, found.model_fingerprint),
        ("what its KL is measured to", known, found.reference_fingerprint),
        (
            "the tokens of the prompts that it was asked",
            *_both(its.data_digests, found.data_digests, PROMPTS),
        ),
        ("what judged it", *_both(its.reward_digests, found.reward_digests, JUDGE)),
    )
    said = [f"{what} ({str(b)[:12]}, not {str(a)[:12]})" for what, a, b in pairs if a != b]
    if said:
        raise ConfigError(
            f"it does not compare with {first}, which was measured before it: not the same are "
            f"{' and '.join(said)}. Leave model, rows and rewards as they are until a comparison "
            "has ended, and run it again in another out."
        )


def _both(a: Mapping[str, str], b: Mapping[str, str], key: str) -> tuple[str | None, str | None]:
    return a.get(key), b.get(key)
