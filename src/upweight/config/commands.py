"""Who reads a key: a command, an objective, or nobody while another key is as it is.

A value that nobody reads is refused: it would change nothing (UW109).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from upweight.config.keys import keys
from upweight.config.objectives import (
    CHOOSING,
    default_passes,
    draws,
    objectives_reading,
    of_section,
    unread,
)
from upweight.config.resolve import leaf_values
from upweight.config.sections import Data, Run
from upweight.config.settings import Setting, show
from upweight.config.written import write
from upweight.errors import Refusal

_MODEL = ("model", "out", "batch.tokens_per_bin") + tuple(
    f"compute.{name}"
    for name in ("dtype", "device", "attention", "sharing", "threads", "trust_remote_code")
)
_TEXT = of_section("data", "path", "limit", "template", "template_options", "date")
_ROWS = tuple(
    f"data.{name}" for name in ("format", "max_length", "truncation", "pairing", "min_score_gap")
)

READS: dict[str, frozenset[str]] = {
    "train": frozenset(keys()),
    "check": frozenset(keys()),
    "score": frozenset((*_MODEL, *_TEXT, *_ROWS, "reference", "loss.beta")),
    "sample": frozenset(
        (*_MODEL, *_TEXT, "seed", "evaluation.max_new_tokens", "evaluation.temperature")
    ),
}
"""The full names of the keys that each command reads."""


class Need(NamedTuple):
    """Keys that have a say in `commands` only where a run is so, and what to say where not."""

    commands: tuple[str, ...]
    keys: tuple[str, ...]
    met: Callable[[Run], bool]
    said: str


def _is_evaluated(run: Run) -> bool:
    options = run.evaluation
    return bool(options.sets or options.prompt_files) or options.fraction > 0


def _asks_for_no_samples_or_is_evaluated(run: Run) -> bool:
    return run.evaluation.samples == 0 or _is_evaluated(run)


def _is_sampled(run: Run) -> bool:
    return run.evaluation.samples > 0 or not _is_evaluated(run)


def _asks_its_reference(run: Run) -> bool:
    return run.objective != "sft" or (run.evaluation.samples > 0 and _is_evaluated(run))


def _is_watched(run: Run) -> bool:
    return draws(run.objective) or _is_evaluated(run)


def _has_answers_to_watch(run: Run) -> bool:
    return draws(run.objective) or _is_sampled(run)


def _draws_or_samples_are_the_policys(run: Run) -> bool:
    return draws(run.objective) or run.evaluation.temperature == 1


def _has_adapter(run: Run) -> bool:
    return run.lora is not None


def _has_a_trunk_in_common(run: Run) -> bool:
    return run.policy.value == "shared"


def _has_a_kl_term(run: Run) -> bool:
    return run.loss.beta > 0


def _logs_every_step(run: Run) -> bool:
    return run.log_every == 1


def _moves_within_a_round(run: Run) -> bool:
    return (run.rollout.passes or default_passes(run.objective)) * run.rollout.minibatches > 1


def _has_reference(run: Run) -> bool:
    return run.reference is not None


_WITHOUT = (
    "has no effect without an evaluation: give evaluation.sets, evaluation.fraction or "
    "evaluation.prompt_files"
)
_UNSAMPLED = "has no effect while evaluation.samples is 0"
_UNASKED = "has no effect: sft asks it for answers alone, and no evaluation samples any"
_UNLIKE = "has no effect while evaluation.temperature is not 1: samples are then not the policy's"
_WHOLE = "has no effect without lora: all weights are trained, and there is no adapter to merge"
_APART = "has no effect while policy.value is own: the two losses then move different weights"
_UNWEIGHED = "has no effect while loss.beta is 0: no KL is taken from the reward or the loss"
_UNLOGGED = "ends a round only after a step that is logged: leave log_every at 1"
_ONE_STEP = (
    "has no effect while a round is one step: the policy is then still the one that drew it. Raise "
    "rollout.passes or rollout.minibatches"
)
_ALONE = "has no effect: score reads it only with a reference"
_TRAINING = ("train", "check")
_SAMPLED = of_section("evaluation", "max_new_tokens", "temperature", "true_reward")
_CLIPS = of_section("policy", "clip_low", "clip_high", "value_clip", "kl_stop")
_REFERRED = ("policy.kl_estimator", "rollout.renew_reference")
_WATCHED = of_section("watch", "length", "repetition", "stopped", "kl", "below")

NEEDS: tuple[Need, ...] = (
    Need(
        _TRAINING,
        ("evaluation.every", "watch.known", "watch.easy", *_SAMPLED),
        _is_evaluated,
        _WITHOUT,
    ),
    Need(_TRAINING, ("evaluation.samples",), _asks_for_no_samples_or_is_evaluated, _WITHOUT),
    Need(_TRAINING, (*_SAMPLED, "evaluation.prompt_files"), _is_sampled, _UNSAMPLED),
    Need(_TRAINING, ("reference",), _asks_its_reference, _UNASKED),
    Need(_TRAINING, _WATCHED, _is_watched, _WITHOUT),
    Need(_TRAINING, _WATCHED, _has_answers_to_watch, _UNSAMPLED),
    Need(_TRAINING, ("watch.kl", "watch.below"), _draws_or_samples_are_the_policys, _UNLIKE),
    Need(_TRAINING, ("export.merge",), _has_adapter, _WHOLE),
    Need(_TRAINING, ("policy.value_coefficient",), _has_a_trunk_in_common, _APART),
    Need(_TRAINING, ("policy.kl_stop",), _logs_every_step, _UNLOGGED),
    Need(_TRAINING, _REFERRED, _has_a_kl_term, _UNWEIGHED),
    Need(_TRAINING, _CLIPS, _moves_within_a_round, _ONE_STEP),
    Need(("score",), ("loss.beta",), _has_reference, _ALONE),
)

ALIKE = {
    "rollout.max_tokens": "evaluation.max_new_tokens",
    "evaluation.max_new_tokens": "rollout.max_tokens",
    "rollout.prompts_per_round": "batch.pairs_per_step",
    "batch.pairs_per_step": "rollout.prompts_per_round",
    "rollout.reward": "evaluation.true_reward",
}
"""Keys for the same thing in different places: the longest answer, how much is learned from at
once, and what scores answers, in training and in evaluations."""


def require_read(command: str, run: Run, places: Mapping[str, str] | None = None) -> None:
    """Raises Refusal UW109 with a line for each value that is not the default and that nobody
    reads: not `command`, not the run's objective, or not while another key is as it is. A line
    begins with the place in `places` where the value was written, if it is there."""
    defaults = leaf_values(Run(model=run.model, data=Data(path=run.data.path)))
    # Any key of the section switches LoRA on, and none of them has a say without it.
    values = leaf_values(run.model_copy(update={"lora": None}))
    values["lora"] = None if run.lora is None else True
    lines = [
        f"{(places or {}).get(key, '')}{key} is {write(value)}, and {why}."
        f"{_instead(command, run, key)}"
        for key, value in values.items()
        if value != defaults[key] and (why := _unread(command, run, key))
    ]
    if lines:
        raise Refusal("UW109", "\n".join([*lines, "Leave out what is not read."]))


def require_read_to_choose(said: Sequence[Setting]) -> None:
    """Raises Refusal UW109 with a line for each key that a method says itself, and best_of_n does
    not read. `lora` alone rounds nothing, and with lora.quantize it says no more."""
    read = CHOOSING | ({"lora"} if any(s.leaf == "lora.quantize" for s in said) else set[str]())
    lines = [
        f"{setting.place}{setting.leaf} is {show(setting.value)}, and best_of_n does not read it: "
        f"{_do(objectives_reading(setting.leaf))}."
        for setting in said
        if setting.leaf and setting.leaf not in read
    ]
    if lines:
        raise Refusal("UW109", "\n".join([*lines, "Leave out what is not read."]))


def _unread(command: str, run: Run, key: str) -> str | None:
    if key not in READS[command]:
        readers = [name for name, read in READS.items() if key in read]
        return f"{command} does not read it: {_do(readers)}"
    if command in _TRAINING and key in unread(run.objective):
        return f"objective {run.objective} does not read it: {_do(objectives_reading(key))}"
    for need in NEEDS:
        if command in need.commands and key in need.keys and not need.met(run):
            return f"it {need.said}"
    return None


def _instead(command: str, run: Run, key: str) -> str:
    """A trailing ' Here that is X: ...' where another key is for the same thing and is read."""
    other = ALIKE.get(key)
    if not other or _unread(command, run, other):
        return ""
    return f" Here that is {other}: {keys()[other].description}"


def _do(readers: Iterable[str]) -> str:
    *others, last = readers
    return f"{', '.join(others)} and {last} do" if others else f"{last} does"
