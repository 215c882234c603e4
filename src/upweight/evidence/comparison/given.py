"""What each method was given: data, whose word on them, steps and computing, as numbers."""

from __future__ import annotations

from collections.abc import Sequence

from upweight.evidence.comparison.nouns import ROWS, Method, Study
from upweight.evidence.report.markup import count, duration, esc, plural, reading, table

_CALLED = {
    "dpo": "DPO",
    "sft": "SFT",
    "online_dpo": "online DPO",
    "ppo": "PPO",
    "grpo": "GRPO",
    "rloo": "RLOO",
    "best_of_n": "best of n",
}
_ITS_MODEL = "method:"
"""What stands before the name of the method whose reward model a method is told by."""


def given(study: Study) -> str:
    """The table, what it holds, and the sentence on who was told by whom."""
    head = (
        "Method",
        "Learns from",
        "Seen",
        "Steps",
        "Answers drawn",
        "Told good from bad by",
        "Tokens computed",
        "Training",
    )
    told = "".join(f'<p class="remark">{esc(text)}</p>' for text in (unequal(study),) if text)
    return (
        "<h3>Data and budget</h3>"
        + told
        + table(head, map(_line, study.methods), "numbers methods given")
        + reading(
            "Seen counts an item each time that it came. Tokens are those that a model computed, "
            "once for each time that one did: in training, to draw answers and to score them, in "
            "the reference's pass over the rows, and in training the reward model that a method "
            "uses. Seconds are those of the same, without the reference's pass, which is kept from "
            "one run to the next, and without evaluations. Best of n draws its answers to the "
            "prompts of the evaluation: that is its whole cost."
        )
    )


def _line(method: Method) -> Sequence[str]:
    name = f"<bdi>{esc(method.name)}</bdi>"
    cost = (count(method.tokens), esc(duration(method.seconds)))
    told = method.taught
    if told is None:
        return (name, "–", "–", "–", "–", "–", *cost)
    return (
        name,
        esc(plural(told.there, told.kind.removesuffix("s"))),
        count(told.seen),
        count(told.steps) if told.steps else "–",
        count(told.answers) if told.answers else "–",
        f"<bdi>{esc(told.by.removeprefix(_ITS_MODEL))}</bdi>",
        *cost,
    )


def unequal(study: Study) -> str:
    """Who learned from labels, who from a model of them and who from the judge itself; '' where
    all were told by the same."""
    taught = [(m, m.taught) for m in study.methods if m.taught is not None and m.objective != "sft"]
    models = {f"{_ITS_MODEL}{m.name}": told for m, told in taught if m.objective == "reward"}
    labelled = [m for m, told in taught if told.by == ROWS and m.objective != "reward"]
    modelled = [m for m, told in taught if told.by in models]
    itself = [m for m, told in taught if told.by == study.reward]
    if sum(map(bool, (labelled, modelled, itself))) < 2:
        return ""
    said = ["Not all were told by the same."]
    if labelled:
        there = sorted({told.there for m, told in taught if m in labelled})
        said.append(
            f"{_names(labelled)}: by the labels that stand in the rows ({_or(there)} preferences)."
        )
    if modelled:
        used = {told.by for m, told in taught if m in modelled}
        there = sorted({told.there for name, told in models.items() if name in used})
        said.append(
            f"{_names(modelled)}: by the scores of a reward model, which has learned such labels "
            f"({_or(there)} preferences) and errs."
        )
    if itself:
        said.append(f"{_names(itself)}: by {study.reward} itself, which judges here.")
    if labelled and modelled:
        said.append(
            f"If the labels were made by {study.reward}, {_names(labelled)} heard the judge and "
            f"{_names(modelled)} a model of it: methods are compared as they are used, and not at "
            "equal information."
        )
    return " ".join(said)


def _names(methods: Sequence[Method]) -> str:
    names = list(dict.fromkeys(_CALLED.get(m.objective, m.objective) for m in methods))
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _or(numbers: Sequence[int]) -> str:
    return " or ".join(map(count, numbers))
