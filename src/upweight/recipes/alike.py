"""Whether the methods of a comparison start from one model, are asked the same and judged alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from upweight.config import Evaluation, Resolved, Run, leaf_values, write
from upweight.config.methods import BEST_OF_N, Comparison
from upweight.errors import ConfigError
from upweight.models.load import LanguageModel, fingerprint
from upweight.recipes.kinds import KINDS, PROMPTS
from upweight.recipes.prepare import ended_answers, load_policy, prepare
from upweight.recipes.resume import (
    Beginning,
    as_begun,
    data_digests,
    require_finished_as_asked,
    require_unchanged,
    reward_digests,
)
from upweight.recipes.stages import is_finished, named
from upweight.recipes.start import trained

JUDGE = "evaluation.true_reward"

OF_THE_START = (
    *("model", "compute.dtype", "lora.quantize"),
    *("data.template", "data.template_options", "data.max_length"),
)
"""Keys that decide which model is started from, and with which tokens it is asked."""

OF_THE_END = (
    *(JUDGE, "evaluation.prompt_files", "evaluation.samples", "evaluation.max_new_tokens"),
)
"""Keys that decide what is asked at an evaluation, and what the answers are worth."""


def require_judged(runs: Mapping[str, Resolved]) -> str:
    """What judges every method. Raises ConfigError where their answers are not comparable."""
    asked = {name: r.run for name, r in runs.items() if KINDS[r.run.objective].answers}
    if not asked:
        raise ConfigError("a comparison needs a method that answers prompts; reward does not.")
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
    finished = [
        m for m in comparison.methods if m.objective != BEST_OF_N and _is_done(runs[m.name])
    ]
    for method in finished:
        with named("method", method.name):
            require_finished_as_asked(runs[method.name])
            judge = method.judge
            if judge is not None and not _is_done(runs[judge]):
                raise ConfigError(
                    f"the run in {runs[method.name].run.out} is finished, and its reward is the "
                    f"model of method {judge}, which is to be trained first. Put "
                    f"{runs[judge].run.out} back, remove {runs[method.name].run.out} to have it "
                    "trained again, or choose another out."
                )
    models = _Models()
    for method in finished:
        with named("method", method.name):
            run = as_begun(runs[method.name]).run
            require_unchanged(run, models.beginning(run))


def _is_done(resolved: Resolved) -> bool:
    assert resolved.run.out is not None
    return is_finished(Path(resolved.run.out))


class _Models:
    """The start that was read last: it is that of most methods."""

    def __init__(self) -> None:
        self._key: object = None
        self._start: tuple[LanguageModel, str] | None = None

    def beginning(self, run: Run) -> Beginning:
        """What the run would begin with, was it to begin now."""
        if KINDS[run.objective].answers:
            lm, model = self._policy(run)
            prepared = prepare(run, lm)
        else:
            # Its head takes the place of the policy's, which others start with.
            lm = load_policy(run)
            prepared = ended_answers(prepare(run, lm), lm)
            as_it_is = run.compute.model_copy(update={"compile": False, "checkpointing": False})
            plain = run.model_copy(update={"compute": as_it_is})
            model = fingerprint(trained(plain, lm, prepared.renderer.stop_ids))
        # require_judged has seen to it that the reference is the start.
        return Beginning(model, model, data_digests(prepared), reward_digests(run, prepared))

    def _policy(self, run: Run) -> tuple[LanguageModel, str]:
        key = [leaf_values(run).get(key) for key in OF_THE_START]
        if self._start is None or key != self._key:
            self._start = None  # before the next is there
            lm = load_policy(run)
            self._key, self._start = key, (lm, fingerprint(lm))
        return self._start


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
