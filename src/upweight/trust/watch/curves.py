"""What the curves of training and evaluation say: too far, too easy, or not at all."""

from __future__ import annotations

import math

from upweight.stats import FEWEST
from upweight.trust.finding import Finding
from upweight.trust.watch.seen import Record, Seen

SIDES = ("chosen", "rejected")

ALIKE = 0.8
"""Shared tokens, as a share, from which chosen and rejected count as nearly the same text."""

FEWEST_STEPS = 30
"""In fewer, margins are close to 0 at first in a run with nothing wrong: the largest counts."""

USUAL_BETA = 0.1
"""Margins that are flat at the run's beta and not at this one are flat because of beta."""


def displaced(seen: Seen, record: Record) -> Finding | None:
    """The chosen responses lose probability, of training or held out, whatever the rejected ones
    do: mostly they lose more, which is all that the loss asks."""
    held_out = "rewards/accuracies_low" in record
    if held_out and record.get("num_pairs", 0) < FEWEST:
        return None
    chosen, rejected = (_lost(seen, record if held_out else None, side) for side in SIDES)
    if not chosen > seen.limits.displaced:
        return None
    alike = seen.told.alike
    if alike >= ALIKE:
        cause = (
            f"chosen and rejected share {alike:.0%} of their tokens, and what pushes one down "
            "pushes the other. Leave such pairs out (data.min_score_gap, data.pairing=extremes)"
        )
    else:
        cause = (
            "the learning rate likely goes too far: lower optimizer.learning_rate, raise "
            "loss.beta, or stop earlier"
        )
    return Finding(
        "UW304",
        f"step {record['step']:.0f}: {'held-out ' if held_out else ''}chosen responses have lost "
        f"{chosen:.2f} nats a token against the reference (watch.displaced is "
        f"{seen.limits.displaced:g}), rejected ones have {'lost' if rejected > 0 else 'gained'} "
        f"{abs(rejected):.2f}: probability goes to what is neither; {cause}.",
        metric="logratios/chosen",
    )


def _lost(seen: Seen, held_out: Record | None, side: str) -> float:
    """Nats a token that the responses of a side have lost on average."""
    ratio, tokens = (
        seen.mean(key) if held_out is None else held_out.get(key, math.nan)
        for key in (f"logratios/{side}", f"tokens/{side}")
    )
    return -ratio / tokens


def too_easy(seen: Seen, record: Record) -> Finding | None:
    """Training pairs are all right with next to no loss: nothing is left to learn from them."""
    accuracy, loss = seen.mean("rewards/accuracies"), seen.mean("loss")
    margin, enough = seen.mean("rewards/margins"), seen.limits.learned
    # The loss of such a margin; where labels are smoothed it stays higher, whatever the margin.
    least = math.log1p(math.exp(-enough))
    if not (accuracy >= seen.limits.solved and (loss <= least or margin >= enough)):
        return None
    again = record.get("epoch", 0.0) > 1
    cause = (
        "they are known by heart: fewer epochs, or a smaller optimizer.learning_rate"
        if again
        else "they are told apart when first met: use harder pairs, and look for what gives them "
        "away"
    )
    return Finding(
        "UW306",
        f"step {record['step']:.0f}: {accuracy:.1%} of the training pairs are told apart at a mean "
        f"loss of {loss:.4f} and a margin of {margin:.1f}: nothing is left to learn from them, and "
        f"{cause}.",
        metric="rewards/accuracies",
    )


def not_better_than_chance(seen: Seen, record: Record) -> Finding | None:
    """The training pairs are learned and the held-out ones are not."""
    trained = seen.mean("rewards/accuracies")
    low, high = (record.get(f"rewards/accuracies_{end}", math.nan) for end in ("low", "high"))
    # Two intervals of few pairs say nothing: what is known of the training pairs must be excluded
    # for the others.
    if record["step"] == 0 or not (trained >= seen.limits.known and low <= 0.5 and high < trained):
        return None
    return Finding(
        "UW306",
        f"step {record['step']:.0f}: {trained:.0%} of the training pairs are told apart, and "
        f"{record['rewards/accuracies']:.0%} [{low:.0%}, {high:.0%}] of the held-out ones, which "
        "is not shown to be better than chance: the rows are learned by heart. Use more prompts, "
        "and fewer epochs.",
        metric="rewards/accuracies",
    )


def held_out_is_solved(seen: Seen, record: Record) -> Finding | None:
    """The held-out pairs are so easy that they tell no two models apart."""
    low = record.get("rewards/accuracies_low", math.nan)
    if record["step"] == 0 or not low > seen.limits.easy:
        return None
    return Finding(
        "UW306",
        f"step {record['step']:.0f}: {record['rewards/accuracies']:.1%} of the held-out pairs are "
        f"told apart [from {low:.1%}] (watch.easy is {seen.limits.easy:.0%}): no improvement can "
        "show. The pairs are too easy, a shortcut solves them, or their prompts are "
        "trained on in other words: evaluate on harder ones.",
        metric="rewards/accuracies",
    )


def saturated(seen: Seen, record: Record) -> Finding | None:
    """Pairs that were not trained on before have margins in the flat parts of the sigmoid."""
    held_out = "rewards/accuracies_low" in record
    if not held_out and record.get("epoch", 0.0) > 1:
        return None
    size = record.get("rewards/spread", math.nan) if held_out else seen.mean("rewards/spread")
    if not size > seen.limits.spread:
        return None
    beta = seen.told.beta
    # A margin of log-ratios that a run with the usual beta has too: then beta is what is large.
    if size / beta <= seen.limits.kl:
        cause = (
            f"loss.beta is {beta:g}, which fits log-probs that are averaged over tokens; these are "
            "summed over a response. Set loss.beta=0.1"
        )
    else:
        cause = (
            f"the log-ratios themselves are {size / beta:.0f} nats apart: lower "
            "optimizer.learning_rate"
        )
    return Finding(
        "UW307",
        f"step {record['step']:.0f}: pairs that were not trained on yet have margins of "
        f"{size:.1f} in size (watch.spread is {seen.limits.spread:g}), where the loss is flat for "
        f"pairs that are right and steep as can be for the others; {cause}.",
        metric="rewards/margins",
    )


def flat(seen: Seen, record: Record) -> Finding | None:
    """At the end margins are as close to 0 as at the start."""
    if "reference/renewed" in record:
        return None  # margins are small again after each time
    if record["step"] != seen.told.total_steps:
        return None
    size = seen.mean("rewards/spread")
    if record["step"] < FEWEST_STEPS:
        # Those of the first step are from before any update.
        later = [r.get("rewards/spread", math.nan) for r in seen.recent if r["step"] > 1]
        size = max(later, default=math.nan)
    if not size < seen.limits.flat:
        return None
    beta = seen.told.beta
    distance = size / beta
    if distance == 0:
        cause = (
            "the policy's log-probs are the reference's: updates of a learning rate of "
            f"{record['learning_rate']:.3g} are too small for the forward pass to show"
        )
    elif distance * USUAL_BETA >= seen.limits.flat:
        cause = f"log-ratios are {distance:.1f} nats apart, and loss.beta is {beta:g}: raise it"
    else:
        cause = (
            f"log-ratios of whole responses are {distance:.2g} nats apart: the peak learning rate "
            "is too small for so few steps, optimizer.epsilon is too large, or log-probs are "
            "averaged over tokens where beta expects sums"
        )
    return Finding(
        "UW307",
        f"step {record['step']:.0f}: the last one, and margins are {size:.2g} in size (watch.flat "
        f"is {seen.limits.flat:g}), as at the start; {cause}.",
        metric="rewards/margins",
    )
