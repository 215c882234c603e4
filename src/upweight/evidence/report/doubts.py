"""What keeps a good number from being a good run: it was ended, its answers degenerate, or it went
far from where it began. The watch reports these while a run trains; here is what stayed so."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from upweight.config import Watch
from upweight.evidence.records import Measurement, Records
from upweight.evidence.report.findings import latest, rows_with, subject
from upweight.evidence.report.judgements import Judgement
from upweight.evidence.report.markup import count, number, percent

DISPLACED, DEGENERATE, FAR = "UW304", "UW305", "UW308"
"""What the watch reports that a headline has to say."""

_SLIGHT_FALL_NATS = 0.5


def doubted(records: Records, set_name: str | None, judged: Judgement | None) -> Judgement | None:
    """The judgement with what speaks against it, which comes first where it is the worse."""
    if ended := _ended(records):
        return _before(judged, "Refused", ended)
    if said := tuple(_degenerate(records)):
        return _before(
            judged,
            "Answers degenerate",
            f"The policy's answers degenerate: {', and '.join(said)}.",
        )
    if judged is None or judged.tone != "good":
        return judged
    besides = tuple(_besides(records, set_name))
    if not besides:
        return judged
    (label, _), *_ = besides
    said = " ".join(sentence for _, sentence in besides)
    return replace(judged, tone="unclear", label=label, headline=f"{judged.headline} {said}")


def _before(judged: Judgement | None, label: str, headline: str) -> Judgement:
    facts = () if judged is None else (judged.headline, *judged.facts)
    return Judgement("bad", label, headline, facts)


def _ended(records: Records) -> str:
    for found in records.warnings:
        if found.refused and found.step is not None:
            return (
                f"The run did not finish: {found.code} ended it at step {count(found.step)}, see "
                "Warnings."
            )
    return ""


@dataclass(frozen=True, slots=True)
class _Measured:
    """A measure of sampled answers, and the same of what it is held against."""

    now: float
    then: float
    limit: float
    whose: str


def _degenerate(records: Records) -> Iterator[str]:
    """What the watch saw of answers, as far as the last evaluation, or the last round where none
    measures it, still has it."""
    metrics = [f.metric for f in records.warnings if f.code == DEGENERATE and f.step is not None]
    for metric in dict.fromkeys(metrics):
        found = _measured(records, metric)
        if found is None:
            continue
        if metric == "length":
            yield from _length(found)
        elif metric == "repetition" and found.now > found.then + found.limit:
            yield (
                f"{percent(found.now)} of four tokens in a row were in the answer before "
                f"({found.whose} {percent(found.then)})"
            )
        elif metric == "stopped" and found.now < found.limit * found.then:
            yield (
                f"{percent(found.now)} of them end by themselves "
                f"({found.whose} {percent(found.then)})"
            )


def _length(found: _Measured) -> Iterator[str]:
    ratio = found.now / found.then if found.then else math.nan
    if ratio > found.limit:
        yield f"they are {number(ratio, 2)} times as long as {found.whose}"
    elif ratio < 1 / found.limit:
        yield f"they have {percent(ratio)} of the length of {found.whose}"


def _measured(records: Records, metric: str) -> _Measured | None:
    limit = _limit(records, metric)
    rows = rows_with(records, metric)
    ratio = latest(rows, "length_ratio") if metric == "length" else None
    if ratio is not None:
        return _Measured(ratio.value, 1.0, limit, "the reference's")
    now, then = latest(rows, metric), latest(rows, f"reference_{metric}")
    if now is not None and then is not None:
        return _Measured(now.value, then.value, limit, "the reference's")
    first = next((r for r in records.train if metric in r.values), None)
    now = latest(records.train, metric)
    if first is None or now is None:
        return None
    return _Measured(now.value, first.values[metric], limit, "the first round's")


def _limit(records: Records, metric: str) -> float:
    """The run's own limit, as run.yaml has it."""
    try:
        return float(records.setting(f"watch.{metric}") or "")
    except ValueError:
        return float(getattr(Watch(), metric))


def _besides(records: Records, set_name: str | None) -> Iterator[tuple[str, str]]:
    codes = {found.code for found in records.warnings if found.step is not None}
    kl = latest(rows_with(records, "kl") or records.train, "kl")
    if FAR in codes and kl is not None and kl.value > _limit(records, "kl"):
        yield (
            "Far from the reference",
            f"But its answers are {number(kl.value)} nats from the reference ({FAR}).",
        )
    rows: Sequence[Measurement] = records.evals.get(set_name or "", ()) or records.train
    chosen = latest(rows, "logratios/chosen")
    fell = chosen is not None and chosen.value < -_SLIGHT_FALL_NATS
    if DISPLACED in codes and fell and subject(records) != "ranking":
        assert chosen is not None
        yield (
            "Chosen answers less likely",
            f"But the chosen answers lost {number(-chosen.value)} nats against the reference "
            f"({DISPLACED}).",
        )
