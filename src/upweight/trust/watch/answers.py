"""What the policy's own answers say, beside the reference's to the same prompts."""

from __future__ import annotations

import math

from upweight.config import Watch as Limits
from upweight.stats import wilson_interval
from upweight.trust.finding import Finding
from upweight.trust.watch.seen import Record, Seen

CUT = 0.1
"""The share of responses without their end that is a likely cause."""

LONGER = 1.2
"""How many times the rejected responses' length makes the chosen ones' a likely cause."""


def length_runs_away(seen: Seen, record: Record) -> Finding | None:
    """Sampled answers are several times as long as the reference's, or as short; where responses
    are imitated, several times as long or as short as these too."""
    low, high = (record.get(f"length_ratio_{end}", math.nan) for end in ("low", "high"))
    most, told = seen.limits.length, seen.told
    # Lengths of a few answers differ by a lot: the whole interval has to be beyond the limit.
    if not (low > most or high < 1 / most):
        return None
    ratio, length = record["length_ratio"], record["length"]
    beyond = length > most * told.length if ratio > 1 else length * most < told.length
    if told.imitates and not beyond:
        return None
    imitated = f", and its training responses {told.length:.0f}" if told.imitates else ""
    return Finding(
        "UW305",
        f"step {record['step']:.0f}: sampled answers have {length:.0f} tokens, the "
        f"reference's {record['reference_length']:.0f}, prompt by prompt {_times(ratio)} "
        f"[{_times(low)}, {_times(high)}] times as many{imitated} (watch.length is {most:g}); "
        f"{_cause(seen, record, ratio)}.",
        metric="length",
    )


def _times(ratio: float) -> str:
    return f"{ratio:.2g}" if ratio < 10 else f"{ratio:.0f}"


def repeats_itself(seen: Seen, record: Record) -> Finding | None:
    """Sampled answers say the same words over and over, and the reference's do not."""
    low, before = (record.get(key, math.nan) for key in ("repetition_low", "reference_repetition"))
    if not low > before + seen.limits.repetition:
        return None
    return Finding(
        "UW305",
        f"step {record['step']:.0f}: {record['repetition']:.0%} [from {low:.0%}] of four tokens in "
        f"a row of sampled answers were in the answer before, in the reference's {before:.0%} "
        f"(watch.repetition is {seen.limits.repetition:.0%} more); {_cause(seen, record)}.",
        metric="repetition",
    )


def does_not_stop(seen: Seen, record: Record) -> Finding | None:
    """Sampled answers run into their limit where the reference's end by themselves."""
    high, before = record.get("stopped_high", math.nan), record.get("reference_stopped", math.nan)
    if not high < seen.limits.stopped * before:
        return None
    return Finding(
        "UW305",
        f"step {record['step']:.0f}: {record['stopped']:.0%} [to {high:.0%}] of the sampled "
        f"answers end by themselves within evaluation.max_new_tokens, and {before:.0%} of the "
        f"reference's (watch.stopped is {seen.limits.stopped:g} of that); "
        f"{_cause(seen, record, 2.0)}.",
        metric="stopped",
    )


def sees_lost_ends(limits: Limits, before: float, num: int) -> bool:
    """Whether any number of `num` answers that no longer end would be reported, where the share
    `before` of the reference's does."""
    return wilson_interval(0.0, num).high < limits.stopped * before


def _cause(seen: Seen, record: Record, ratio: float = 1.0) -> str:
    """The likeliest of the causes that the page names, and what to do about it."""
    chosen, rejected = seen.told.lengths
    longer = chosen > LONGER * rejected if ratio > 1 else rejected > LONGER * chosen
    unstopped = seen.told.unstopped
    if ratio > 1 and unstopped > CUT:
        whose = "training" if seen.told.imitates else "chosen"
        return f"{unstopped:.0%} of the {whose} responses lack their end: train on whole ones"
    if ratio != 1 and rejected and longer:
        return (
            f"the data prefer {'longer' if ratio > 1 else 'shorter'} responses, "
            f"{chosen / rejected:.1f} times the length of the rejected ones on average: balance "
            "their lengths"
        )
    if record.get("kl", 0.0) > seen.limits.kl / 2 and not seen.told.imitates:
        return (
            f"the policy is {record['kl']:.0f} nats an answer from the reference: lower "
            "optimizer.learning_rate or raise loss.beta"
        )
    return "read samples.jsonl, and train for fewer steps or with a smaller learning rate"


def kl_below_zero(seen: Seen, record: Record) -> Finding | None:
    """The sampled KL is negative beyond what chance explains, and a KL is not."""
    # A policy that is still its reference has a KL of rounding, in bf16 some 0.0005 nats a token;
    # and where all gaps are that small, one interval in forty lies below 0 by chance, in a run of a
    # hundred rounds two or three.
    if not record.get("kl_high", math.nan) < -seen.limits.below:
        return None
    return Finding(
        "UW308",
        f"step {record['step']:.0f}: the sampled KL to the reference is {record['kl']:.2g} nats an "
        f"answer [to {record['kl_high']:.2g}], which no KL can be: what was drawn is likelier "
        "under the reference than under the policy. Either these prompts are too few to have met "
        "the rare answers that carry it, or what drew them is not the policy: ask more prompts, "
        "and do not steer by this kl.",
        metric="kl_high",
    )


def far_from_the_reference(seen: Seen, record: Record) -> Finding | None:
    """The policy's own answers are improbable under the reference, and no responses that are
    imitated ask for that."""
    if seen.told.imitates or not record.get("kl_low", math.nan) > seen.limits.kl:
        return None
    beta, kl = record.get("beta", seen.told.beta), record["kl"]
    told = f"loss.beta is {beta:g}"
    if beta != seen.told.beta:
        told = f"loss.beta has come to {beta:g} (policy.kl_target)"
    # Below one nat of reward the objective hardly feels the distance.
    cause = (
        f"{told}, at which that distance costs {beta * kl:.2g} of reward: raise it"
        if beta * kl < 1
        else f"{told}, which would hold it, so the steps are too large: lower "
        "optimizer.learning_rate"
    )
    return Finding(
        "UW308",
        f"step {record['step']:.0f}: the policy is {kl:.0f} nats an answer away from the "
        f"reference [from {record['kl_low']:.0f}] (watch.kl is {seen.limits.kl:g}); {cause}.",
        metric="kl",
    )
