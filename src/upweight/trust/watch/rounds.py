"""What the answers of a run of rounds say, beside those of its first round."""

from __future__ import annotations

import math

from upweight.trust.finding import Finding
from upweight.trust.watch.seen import Record, Seen


def answers_change(seen: Seen, record: Record) -> Finding | None:
    """The answers that are learned from grow or shrink, repeat themselves, or no longer end, by
    more than two rounds of few prompts may differ."""
    first = seen.first
    if first is None or "reward" not in record:
        return None
    for measure in (_length, _repetition, _stopped):
        if said := measure(seen, record, first):
            return Finding(
                "UW305",
                f"step {record['step']:.0f}: {said}; {_cause(seen, record)}.",
                metric=measure.__name__.removeprefix("_"),
            )
    return None


def _length(seen: Seen, record: Record, first: Record) -> str | None:
    most = seen.limits.length
    longer = _of(record, "length_low") > most * _of(first, "length_high")
    shorter = _of(record, "length_high") * most < _of(first, "length_low")
    if not (longer or shorter):
        return None
    return (
        f"the answers of a round have {record['length']:.0f} tokens, those of the first had "
        f"{first['length']:.0f} (watch.length is {most:g})"
    )


def _repetition(seen: Seen, record: Record, first: Record) -> str | None:
    more = seen.limits.repetition
    if not _of(record, "repetition_low") > _of(first, "repetition_high") + more:
        return None
    return (
        f"{record['repetition']:.0%} of four tokens in a row of a round's answers were in the "
        f"answer before, in the first round {first['repetition']:.0%} (watch.repetition is "
        f"{more:.0%} more)"
    )


def _stopped(seen: Seen, record: Record, first: Record) -> str | None:
    share = seen.limits.stopped
    if not _of(record, "stopped_high") < share * _of(first, "stopped_low"):
        return None
    return (
        f"{record['stopped']:.0%} of a round's answers end by themselves within "
        f"rollout.max_tokens, and {first['stopped']:.0%} of the first round's (watch.stopped is "
        f"{share:g} of that)"
    )


def _of(record: Record, key: str) -> float:
    """A bound; rounds of a few prompts have none, and nothing is said of them."""
    return record.get(key, math.nan)


def _cause(seen: Seen, record: Record) -> str:
    if record["kl"] > seen.limits.kl / 2:
        return (
            f"the policy is {record['kl']:.0f} nats an answer from the reference: raise loss.beta "
            "or lower optimizer.learning_rate"
        )
    return (
        "the reward pays for it: read what it scores highest in rollouts, and take another one, "
        "raise loss.beta or set rollout.stop_penalty"
    )
