"""What the watch cannot see in a run as it is set up, and what to set so that it can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from upweight.config import Run
from upweight.models.sample import Sample
from upweight.recipes.best import samples_are_the_policys
from upweight.recipes.kinds import KINDS, PROMPTS
from upweight.recipes.prepare import Prepared
from upweight.recipes.reference import answered_sets, sampled_trees
from upweight.recipes.screen import Screen
from upweight.stats import FEWEST, wilson_interval
from upweight.trust.watch.answers import sees_lost_ends

ANSWERS = "answers that grow, repeat themselves or no longer end (UW305)"
DISTANCE = "the distance from the reference (UW308)"
GROWTH = "answers that grow or no longer end (UW305)"
HELD_OUT = "what is learned of pairs that are not trained on (UW306)"
SET_APART = "Set evaluation.fraction (such as 0.1) or evaluation.sets."


def before_step_1(run: Run, prepared: Prepared) -> list[str]:
    """What is known from the settings and the number of prompts."""
    kind, options = KINDS[run.objective], run.evaluation
    answered = answered_sets(run, prepared)
    if kind.draws:  # Each round's own answers are watched.
        return _of_rounds(run)
    of_answers = _of_answers(run)
    if len(prepared.trees) == 1:
        unseen = of_answers if kind.answers else []
        unseen += [HELD_OUT] if kind.rows == "preferences" else []
        return [f"nothing is held out, and nobody looks at {_listed(unseen)}. {SET_APART}"]
    said: list[str] = []
    # Prompts are answered, and say nothing of pairs.
    if kind.rows == "preferences" and not prepared.trees.keys() - {"train", PROMPTS}:
        said.append(f"no pairs are held out, and nobody looks at {HELD_OUT}. {SET_APART}")
    if not kind.answers:
        return said
    if not answered:
        return [
            *said,
            f"evaluation.samples is 0, and nobody looks at {_listed(of_answers)}. Set "
            f"evaluation.samples, to {FEWEST} or more.",
        ]
    said += [
        f"{num} prompts of {name} are answered at an evaluation, and of fewer than {FEWEST} there "
        f"is no interval: nobody can say of {_listed(of_answers)} that it is no chance. "
        f"{_more_prompts(run)}"
        for name, trees in answered.items()
        if (num := len(sampled_trees(run, trees))) < FEWEST
    ]
    if DISTANCE in of_answers and not samples_are_the_policys(run):
        said.append(
            f"evaluation.temperature is {options.temperature:g}, at which answers are not the "
            f"policy's own, and nobody looks at {DISTANCE}. Leave evaluation.temperature at 1."
        )
    return said


def _of_answers(run: Run) -> list[str]:
    """What is looked at in answers. Supervised fine-tuning is meant to leave its start."""
    return [ANSWERS] if run.objective == "sft" else [ANSWERS, DISTANCE]


def _of_rounds(run: Run) -> list[str]:
    num = run.rollout.prompts_per_round
    if num >= FEWEST:
        return []
    return [
        f"rollout.prompts_per_round is {num}, and of fewer than {FEWEST} prompts there is no "
        f"interval: nobody can say of {_listed([ANSWERS, DISTANCE])} that it is no chance. Raise "
        "rollout.prompts_per_round."
    ]


def _more_prompts(run: Run) -> str:
    if run.evaluation.samples < FEWEST:
        return f"Set evaluation.samples, to {FEWEST} or more."
    return "Hold out more prompts."


def _listed(things: Sequence[str]) -> str:
    *most, last = things
    return f"{', '.join(most)} and {last}" if most else last


def by_reference_answers(
    run: Run, prepared: Prepared, answers: Mapping[str, Sequence[Sample]]
) -> list[str]:
    """What is known once the reference has answered the prompts of the sets, or some of them: where
    its own answers are cut, those of a policy that never stops look the same."""
    longest = run.evaluation.max_new_tokens
    apart = DISTANCE in _of_answers(run)
    distance = f", and {DISTANCE} is that of their beginnings" if apart else ""
    said: list[str] = []
    for name, trees in answered_sets(run, prepared).items():
        drawn, num = answers.get(name, ()), len(sampled_trees(run, trees))
        if not drawn:
            continue
        ended = sum(answer.stopped for answer in drawn) / len(drawn)
        if num < FEWEST or not _are_cut(run, ended, num):
            continue
        said.append(
            f"{ended:.0%} of the reference's answers to {name} end by themselves within "
            f"evaluation.max_new_tokens, which is {longest}: nobody can see {GROWTH}{distance}. "
            f"Raise evaluation.max_new_tokens, to {4 * longest} for a start."
        )
    return said


def by_first_round(run: Run, stopped: float, num_prompts: int) -> list[str]:
    """What is known once a run of rounds has drawn its first: where most of its answers are cut,
    later ones that never stop look the same. `stopped` is the share of those that are not."""
    # Later rounds are held against the low end of what the first one says, by the prompt.
    ended, at_best = (wilson_interval(share, num_prompts).low for share in (stopped, 1.0))
    if not _are_cut(run, ended, num_prompts, at_best):
        return []
    longest = run.rollout.max_tokens
    return [
        f"{stopped:.0%} of the first round's answers end by themselves within "
        f"rollout.max_tokens, which is {longest}: nobody can see {GROWTH}, and what is scored is "
        f"their beginnings. Raise rollout.max_tokens, to {4 * longest} for a start."
    ]


def _are_cut(run: Run, ended: float, num: int, at_best: float = 1.0) -> bool:
    """Whether lost ends would show if only more of the reference's answers had theirs."""
    return sees_lost_ends(run.watch, at_best, num) and not sees_lost_ends(run.watch, ended, num)


def told(prepared: Prepared, said: Sequence[str], screen: Screen) -> Prepared:
    """With what is not watched, as the screen says it too."""
    for line in said:
        screen.warn(f"not watched: {line}")
    return replace(prepared, unwatched=(*prepared.unwatched, *said))
