"""No prompt is trained on and evaluated on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from upweight.data.stream import overlap
from upweight.errors import Refusal
from upweight.recipes.screen import counted
from upweight.rows import Example
from upweight.trust.finding import Finding
from upweight.trust.near import shared_prompts


def require_apart(name: str, train: Sequence[Example], rows: Sequence[Example]) -> None:
    if both := overlap(train, rows):
        mine, theirs = both[0]
        raise Refusal(
            "UW209",
            f"the evaluation set {name} has {counted(len(both), 'row')} with a prompt that is "
            f"trained on too, such as {theirs} and {mine}. Remove them from one side, or use "
            "evaluation.fraction to split by prompt.",
        )


def nearly_apart(
    train: Sequence[Example], sets: Mapping[str, Sequence[Example]]
) -> Iterator[Finding]:
    """What is said of sets that ask in other letters what is trained on."""
    for name, rows in sets.items():
        both = shared_prompts(train, rows)
        if both:
            said = (
                f"the evaluation set {name} has {counted(len(both), 'row')} with a prompt that is "
                "trained on too, but for case, white space, the punctuation around it or a system "
                "message. Remove them from one side."
            )
            pairs = [f"{theirs} (as {mine})" for mine, theirs in both[:5]]
            yield Finding("UW209", said, tuple(pairs))
