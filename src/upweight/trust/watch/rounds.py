"""What the answers of a run of rounds say, beside those of its first round."""

from __future__ import annotations

import math

from upweight.trust.finding import Finding
from upweight.trust.watch.seen import Record, Seen


def rounds_change_in_length(seen: Seen, record: Record) -> Finding | None:
    """The answers that are learned from grow or shrink, by more than two rounds of few prompts may
    differ."""
    most = seen.limits.length
    longer = _of(record, "length_low") > most * _of(seen.first, "length_high")
    shorter = _of(record, "length_high") * most < _of(seen.first, "length_low")
    if seen.first is None or not (longer or shorter):
        return None
    said = (
        f"the answers of a round have {record['length']:.0f} tokens, those of the first had "
        f"{seen.first['length']:.0f} (watch.length is {most:g})"
    )
    return _changed(seen, record, said, "length")


def rounds_repeat_themselves(seen: Seen, record: Record) -> Finding | None:
    """The answers that are learned from repeat themselves more than the first did."""
    more = seen.limits.repetition
    if seen.first is None or not (
        _of(record, "repetition_low") > _of(seen.first, "repetition_high") + more
    ):
        return None
    said = (
        f"{record['repetition']:.0%} of four tokens in a row of a round's answers were in the "
        f"answer before, in the first round {seen.first['repetition']:.0%} (watch.repetition is "
        f"{more:.0%} more)"
    )
    return _changed(seen, record, said, "repetition")


def rounds_do_not_stop(seen: Seen, record: Record) -> Finding | None:
    """The answers that are learned from no longer end."""
    share = seen.limits.stopped
    if seen.first is None or not (
        _of(record, "stopped_high") < share * _of(seen.first, "stopped_low")
    ):
        return None
    said = (
        f"{record['stopped']:.0%} of a round's answers end by themselves within "
        f"rollout.max_tokens, and {seen.first['stopped']:.0%} of the first round's (watch.stopped "
        f"is {share:g} of that)"
    )
    return _changed(seen, record, said, "stopped")


def _of(record: Record | None, key: str) -> float:
    """A bound; rounds of a few prompts have none, nor have steps on given rows, and nothing is said
    of them."""
    return math.nan if record is None else record.get(key, math.nan)


def _changed(seen: Seen, record: Record, said: str, metric: str) -> Finding:
    said = f"step {record['step']:.0f}: {said}; {_cause(seen, record)}."
    return Finding("UW305", said, metric=metric)


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
