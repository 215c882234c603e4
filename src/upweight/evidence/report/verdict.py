"""The top of the page: whether the policy learned the preferences, in words.

The words never say more than the interval: one that includes chance shows nothing, and a run
without held-out preferences does not know.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from upweight.evidence.records import Records
from upweight.evidence.report.findings import (
    ACCURACY,
    HELD_OUT,
    Latest,
    accuracy,
    accuracy_before,
    is_unfinished,
    last_step,
    latest,
    ledger_of,
    length_rule,
    main_set,
    num_preferences,
)
from upweight.evidence.report.markup import (
    count,
    esc,
    interval,
    number,
    percent,
    percent_interval,
    plural,
    points,
)

CHANCE = 0.5
_NOTEWORTHY_FALL_NATS = 0.5
_NOTEWORTHY_LENGTH = 1.25
_NOTEWORTHY_DROPS = 0.05
_LAST_TRAINING_LINES = 50


@dataclass(frozen=True, slots=True)
class Verdict:
    """`tone` is good, unclear, bad or unknown; `label` says it in a few words."""

    tone: str
    label: str
    headline: str
    facts: tuple[str, ...]
    cautions: tuple[str, ...]


def verdict(records: Records) -> Verdict:
    """What the records support saying about the run."""
    set_name = main_set(records)
    found = accuracy(records, set_name) if set_name is not None else None
    cautions = tuple(_cautions(records, set_name))
    if set_name is None or found is None:
        return _unmeasured(records, cautions)
    tone, label, headline, advice = _judge(records, set_name, found)
    facts = (*advice, *_facts(records, set_name))
    return Verdict(tone, label, headline, facts, cautions)


def _judge(records: Records, set_name: str, found: Latest) -> tuple[str, str, str, tuple[str, ...]]:
    """Tone, label, headline and what else to say, from where the interval lies."""
    shown = percent(found.value)
    if found.low is not None and found.high is not None:
        shown += f"\u00a0{percent_interval(found.low, found.high)}"
    claim = f"prefers the chosen answer on {shown} of {_preferences(records, set_name)}"
    before = accuracy_before(records, set_name)
    then = f"before training {percent(before)}" if before is not None else ""
    aside = (f"{then[0].upper()}{then[1:]}.",) if then else ()
    if found.step == 0:
        headline = f"Only the evaluation before training is recorded: the policy {claim}."
        return "unknown", "Not trained yet", headline, ()
    if found.low is None or found.high is None:
        headline = f"The policy {claim}; no interval is recorded, so chance is not excluded."
        return "unclear", "No interval", headline, aside
    if found.low > CHANCE:
        headline = f"The policy {claim}{f'; {then}' if then else ''}."
        return "good", "Better than chance", headline, ()
    if found.high < CHANCE:
        headline = f"The policy prefers the rejected answers: it {claim}."
        advice = (*aside, "Check that chosen and rejected are not swapped.")
        return "bad", "Worse than chance", headline, advice
    headline = (
        f"It is not shown that the policy learned the preferences: it {claim}, and that interval "
        f"includes chance ({percent(CHANCE)})."
    )
    return "unclear", "Not told apart from chance", headline, aside


def _preferences(records: Records, set_name: str) -> str:
    n = num_preferences(records, set_name)
    if set_name == HELD_OUT:
        return plural(n, "held-out preference") if n is not None else "the held-out preferences"
    many = plural(n, "preference") if n is not None else "the preferences"
    return f"{many} of the set “{set_name}”"


def _unmeasured(records: Records, cautions: tuple[str, ...]) -> Verdict:
    label, unknown = "Not measured", "Whether the policy learned the preferences is not known"
    if _holds_out(records):
        headline = f"{unknown}: no evaluation is recorded."
        return Verdict("unknown", label, headline, (), cautions)
    facts: list[str] = []
    recent = [r.values.get(ACCURACY, math.nan) for r in records.train[-_LAST_TRAINING_LINES:]]
    recent = [value for value in recent if math.isfinite(value)]
    if recent:
        facts.append(
            f"On the training pairs of the last {plural(len(recent), 'logged step')} the policy "
            f"was right on {percent(sum(recent) / len(recent))}, which memorising reaches too."
        )
    facts.append("Set evaluation.fraction (such as 0.1) or evaluation.sets to find out.")
    headline = f"{unknown}: none were held out."
    return Verdict("unknown", label, headline, tuple(facts), cautions)


def _holds_out(records: Records) -> bool:
    fraction, sets = records.setting("evaluation.fraction"), records.setting("evaluation.sets")
    named = any(s.key.startswith("evaluation.sets.") for s in records.settings)
    return (fraction or "0").strip("0.") != "" or (sets or "{}") != "{}" or named


def _facts(records: Records, set_name: str) -> Iterator[str]:
    rows = records.evals[set_name]
    kl = latest(rows, "kl")
    if kl is None:
        yield "The distance from the reference (sampled KL) was not measured."
    else:
        bounds = (
            f" {interval(kl.low, kl.high)}" if kl.low is not None and kl.high is not None else ""
        )
        yield f"KL {number(kl.value)} nats{bounds} from the reference, per sampled answer."
    length, reference = latest(rows, "length"), latest(rows, "reference_length")
    if length is not None:
        before = f" (reference {number(reference.value)})" if reference is not None else ""
        yield f"Mean answer length {number(length.value)} tokens{before}."


def _cautions(records: Records, set_name: str | None) -> Iterator[str]:
    step = last_step(records)
    if is_unfinished(records):
        until = (
            f"the last recorded step is {count(step)}"
            if step is not None
            else "no step is recorded"
        )
        yield f"The run had not finished when this page was written: {until}."
    gone = sum(not math.isfinite(row.values.get("loss", 0.0)) for row in records.train)
    if gone:
        yield f"The loss was not a finite number at {plural(gone, 'logged step')}."
    if set_name is not None:
        yield from _displacement(records, set_name)
        yield from _lengths(records, set_name)
    train = records.accounts.get("train")
    if train and train.read and train.read - train.used > _NOTEWORTHY_DROPS * train.read:
        share = percent((train.read - train.used) / train.read)
        yield f"{share} of the training rows were not used: see Rows."
    yield from records.notes


def _displacement(records: Records, set_name: str) -> Iterator[str]:
    chosen = latest(records.evals[set_name], "logratios/chosen")
    rejected = latest(records.evals[set_name], "logratios/rejected")
    if chosen is None or chosen.value > -_NOTEWORTHY_FALL_NATS:
        return
    compared = f", the rejected ones by {number(-rejected.value)}" if rejected is not None else ""
    if rejected is not None and rejected.value >= 0:
        compared = f", while the rejected ones rose by {number(rejected.value)}"
    yield (
        f"The chosen answers became less likely than under the reference, by "
        f"{number(-chosen.value)} nats on average{compared}: probability moved to answers that "
        "nobody preferred (likelihood displacement). A smaller learning rate, a larger beta or "
        "fewer near-identical pairs usually help."
    )


def _lengths(records: Records, set_name: str) -> Iterator[str]:
    rows = records.evals[set_name]
    length, reference = latest(rows, "length"), latest(rows, "reference_length")
    if length is not None and reference is not None and reference.value > 0:
        ratio = length.value / reference.value
        if ratio > _NOTEWORTHY_LENGTH:
            yield f"Sampled answers are {percent(ratio - 1)} longer than the reference's."
        elif ratio < 1 / _NOTEWORTHY_LENGTH:
            yield f"Sampled answers are {percent(1 - ratio)} shorter than the reference's."
    rule, found = length_rule(ledger_of(records, set_name)), accuracy(records, set_name)
    if rule is None or found is None or found.step == 0:
        return
    # The rule is only a rival where it is itself better than chance.
    if rule.accuracy.low > CHANCE and not rule.lead.low > 0:
        which = "longer" if rule.longer else "shorter"
        yield (
            f"The policy is not shown to know more than length: always taking the {which} answer "
            f"is right on {percent(rule.accuracy.value)} of these preferences, and the difference "
            f"between the two is {points(rule.lead)}."
        )


_SIGNS = {"good": "▲", "unclear": "◆", "bad": "▼", "unknown": "○"}


def masthead(records: Records) -> str:
    """The page's header: the run's name, the verdict, and what to know besides."""
    said = verdict(records)
    facts = " ".join(said.facts)
    cautions = "".join(f"<li>{esc(text)}</li>" for text in said.cautions)
    besides = (
        f'<aside class="cautions"><h2>Worth knowing</h2><ul>{cautions}</ul></aside>'
        if cautions
        else ""
    )
    step = last_step(records)
    parts = (
        str(records.environment.get("model") or records.setting("model") or ""),
        records.setting("objective") or "",
        f"step {count(step)}" if step is not None else "",
        str(records.environment.get("finished") or "")[:16].replace("T", " "),
    )
    subject = " · ".join(filter(None, parts))
    return (
        f'<header class="masthead"><div><p class="run"><b dir="auto">{esc(records.name)}</b> '
        f"<span>{esc(subject)}</span></p>"
        f'<p class="chip {said.tone}"><span aria-hidden="true">{_SIGNS[said.tone]}</span> '
        f"{esc(said.label)}</p>"
        f'<h1 class="verdict" dir="auto">{esc(said.headline)}</h1>'
        f'<p class="facts">{esc(facts)}</p></div>{besides}</header>'
    )
