"""What keeps a good number from being a good run: it was ended, its answers degenerate, or it went
far from where it began. The watch reports these while a run trains; here is what stayed so."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from upweight.evidence.records import Measurement, Records
from upweight.evidence.report.findings import (
    Latest,
    elsewhere,
    is_unfinished,
    latest,
    rows_with,
    subject,
    watch_limit,
)
from upweight.evidence.report.judgements import Judgement, hardly_trained
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
    if said := _still(records, set_name):
        if judged is None:
            return Judgement("unclear", "Hardly trained", said)
        if judged.label != "Hardly trained":
            return replace(_before(judged, "Hardly trained", said), tone="unclear")
    if judged is None or judged.tone != "good":
        return judged
    besides = tuple(_besides(records, set_name))
    if not besides:
        return judged
    (label, _), *_ = besides
    said = " ".join(sentence for _, sentence in besides)
    return replace(judged, tone="unclear", label=label, headline=f"{judged.headline} {said}")


def _still(records: Records, set_name: str | None) -> str:
    """What is to be said of a finished run whose margins are still 0 but for rounding."""
    if subject(records) != "preferences" or is_unfinished(records):
        return ""
    # The margins of the first step are from before any update.
    trained = [row for row in records.train if row.step > 1]
    return hardly_trained(records, records.evals.get(set_name or "", ()) or trained)


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
    """A measure of sampled answers, from where to where it is known to lie, what it is held
    against, and the words that name the set where it is not the headline's."""

    now: float
    low: float
    high: float
    then: float
    limit: float
    whose: str
    where: str


def _degenerate(records: Records) -> Iterator[str]:
    """What the watch saw of answers, as far as the last evaluation, or the last round where none
    measures it, still has it."""
    seen = [f for f in records.warnings if f.code == DEGENERATE and f.step is not None]
    for metric in dict.fromkeys(f.metric for f in seen):
        said_of = {f.set for f in seen if f.metric == metric}
        for found in _measured(records, metric, said_of) if metric in _DEGENERATE else ():
            if said := _DEGENERATE[metric](found):
                yield said + found.where


def _length(found: _Measured) -> str:
    if not found.then:
        return ""
    ratio = found.now / found.then
    if found.low > found.limit * found.then:
        return f"they are {number(ratio, 2)} times as long as {found.whose}"
    if found.high * found.limit < found.then:
        return f"they have {percent(ratio)} of the length of {found.whose}"
    return ""


def _repetition(found: _Measured) -> str:
    if not found.low > found.then + found.limit:
        return ""
    return (
        f"{percent(found.now)} of four tokens in a row were in the answer before "
        f"({found.whose} {percent(found.then)})"
    )


def _stopped(found: _Measured) -> str:
    if not found.high < found.limit * found.then:
        return ""
    return f"{percent(found.now)} of them end by themselves ({found.whose} {percent(found.then)})"


_DEGENERATE: dict[str, Callable[[_Measured], str]] = {
    "length": _length,
    "repetition": _repetition,
    "stopped": _stopped,
}
"""What to say of a measure that is still beyond its limit, by the metric; '' of one that is not."""


def _measured(
    records: Records, metric: str, said_of: Collection[str | None]
) -> Iterator[_Measured]:
    """The measure in every set that has it, those that the watch spoke of first; in the rounds
    where no set has it.

    Of the sets that the watch did not speak of, what counts is the whole interval, as it would for
    the watch.
    """
    limit, any_set = watch_limit(records, metric), False
    main = next((row.set for row in rows_with(records, metric)), None)
    named = {main if name is None else name for name in said_of}
    for name in sorted(records.evals, key=lambda name: (name not in named, name != main)):
        rows = records.evals[name]
        if metric == "length" and _as_imitated(records, rows, limit):
            continue
        now, then = _beside_the_reference(rows, metric)
        if now is None or then is None:
            continue
        any_set = True
        low, high = (now.value, now.value) if name in named else now.bounds or (math.nan, math.nan)
        where = elsewhere(records, rows)
        yield _Measured(now.value, low, high, then, limit, "the reference's", where)
    first = next((r.values[metric] for r in records.train if metric in r.values), None)
    now = latest(records.train, metric)
    if not any_set and first is not None and now is not None:
        value = now.value
        yield _Measured(value, value, value, first, limit, "the first round's", "")


def _as_imitated(records: Records, rows: Sequence[Measurement], limit: float) -> bool:
    """Whether answers are about as long as the responses that are imitated, if any are: what the
    reference's were is no measure then."""
    imitated = [r.values["tokens/response"] for r in records.train if "tokens/response" in r.values]
    now = latest(rows, "length")
    if not imitated or now is None:
        return False
    mean = math.fsum(imitated) / len(imitated)
    return mean / limit <= now.value <= mean * limit


def _beside_the_reference(
    rows: Sequence[Measurement], metric: str
) -> tuple[Latest | None, float | None]:
    """The measure at the last evaluation, and the reference's."""
    if metric == "kl":
        return latest(rows, metric), 0.0
    ratio = latest(rows, "length_ratio") if metric == "length" else None
    if ratio is not None:
        return ratio, 1.0
    then = latest(rows, f"reference_{metric}")
    return latest(rows, metric), None if then is None else then.value


def _besides(records: Records, set_name: str | None) -> Iterator[tuple[str, str]]:
    seen = [found for found in records.warnings if found.step is not None]
    codes = {found.code for found in seen}
    # Not what was said of an estimate below 0.
    said_of = {f.set for f in seen if f.code == FAR and f.metric != "kl_high"}
    # Supervised fine-tuning is meant to leave its start.
    asked = said_of and subject(records) != "likelihood"
    distances = _measured(records, "kl", said_of) if asked else ()
    if far := next((found for found in distances if found.low > found.limit), None):
        yield (
            "Far from the reference",
            f"But its answers are {number(far.now)} nats from the reference{far.where} ({FAR}).",
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
