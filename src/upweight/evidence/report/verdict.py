"""The top of the page: whether the run reached what its objective is about, in words.

The words never say more than the interval: one that includes chance shows nothing, and a run
that holds nothing out does not know.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from upweight.evidence.records import Measurement, Records
from upweight.evidence.report.doubts import doubted
from upweight.evidence.report.findings import (
    ACCURACY,
    Latest,
    Subject,
    accuracy,
    elsewhere,
    is_unfinished,
    judge,
    last_step,
    latest,
    ledger_of,
    length_rule,
    main_set,
    rows_with,
    subject,
)
from upweight.evidence.report.judgements import CHANCE, JUDGEMENTS
from upweight.evidence.report.markup import (
    count,
    esc,
    interval,
    number,
    percent,
    plural,
    points,
)

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
    judged = JUDGEMENTS[subject(records)](records, set_name) if set_name is not None else None
    judged = doubted(records, set_name, judged)
    cautions = tuple(_cautions(records, set_name))
    if judged is None:
        return _unmeasured(records, cautions)
    facts = (*judged.facts, *(_facts(records, set_name) if set_name is not None else ()))
    return Verdict(judged.tone, judged.label, judged.headline, facts, cautions)


@dataclass(frozen=True, slots=True)
class Unmeasured:
    """What is not known without an evaluation, and what the training steps say: `key` at the first
    and the last of them, or the mean of the last ones where it is a share."""

    question: str
    key: str
    said: str


_UNMEASURED: dict[Subject, Unmeasured] = {
    "preferences": Unmeasured(
        "Whether the policy learned the preferences is not known",
        ACCURACY,
        "On the training pairs of the last {steps} the policy was right on {share}, which "
        "memorising reaches too.",
    ),
    "ranking": Unmeasured(
        "Whether the reward model learned the preferences is not known",
        ACCURACY,
        "On the training pairs of the last {steps} the reward model was right on {share}, which "
        "memorising reaches too.",
    ),
    "likelihood": Unmeasured(
        "Whether the policy learned more than its training responses is not known",
        "loss",
        "Over the last {steps} the loss on the training responses was {mean} nats per token, after "
        "{first} at the first; memorising lowers it too.",
    ),
    "answers": Unmeasured(
        "Whether the policy earns more than its reference is not known",
        "reward",
        "Over the last {steps} its answers to the training prompts earned {mean}, after {first} at "
        "the first.",
    ),
}


def _unmeasured(records: Records, cautions: tuple[str, ...]) -> Verdict:
    about, missing = subject(records), _UNMEASURED[subject(records)]
    facts: list[str] = []
    values = [r.values.get(missing.key, math.nan) for r in records.train]
    values = [value for value in values if math.isfinite(value)]
    recent = values[-_LAST_TRAINING_LINES:]
    if recent:
        mean = math.fsum(recent) / len(recent)
        steps = plural(len(recent), "logged step")
        facts.append(
            missing.said.format(
                steps=steps, share=percent(mean), mean=number(mean), first=number(values[0])
            )
        )
    if not _holds_out(records):
        facts.append("Set evaluation.fraction (such as 0.1) or evaluation.sets to find out.")
        why = "no prompts were held out" if about == "answers" else "none were held out"
    elif about == "answers" and records.evals:
        facts.append("Set evaluation.samples to find out.")
        why = "no answers to held-out prompts were rewarded"
    else:
        # With sets held out, the training steps would stand in for what is still to come.
        facts, why = [], "no evaluation is recorded"
    return Verdict("unknown", "Not measured", f"{missing.question}: {why}.", tuple(facts), cautions)


def _holds_out(records: Records) -> bool:
    fraction, sets = records.setting("evaluation.fraction"), records.setting("evaluation.sets")
    named = any(s.key.startswith("evaluation.sets.") for s in records.settings)
    return (fraction or "0").strip("0.") != "" or (sets or "{}") != "{}" or named


def _facts(records: Records, set_name: str) -> Iterator[str]:
    rows, about = records.evals[set_name], subject(records)
    if about == "ranking":
        chosen, rejected = latest(rows, "rewards/chosen"), latest(rows, "rewards/rejected")
        if chosen is not None and rejected is not None:
            yield f"Mean score: chosen {number(chosen.value)}, rejected {number(rejected.value)}."
        return
    sampled = rows_with(records, "kl")
    kl, where = latest(sampled, "kl"), elsewhere(records, sampled)
    if kl is None:
        yield "The distance from the reference (sampled KL) was not measured."
    elif about != "answers" or latest(rows, "reward") is None:
        bounds = f" {interval(*kl.bounds)}" if kl.bounds else ""
        yield f"KL {number(kl.value)} nats{bounds} from the reference, per sampled answer{where}."
    if kl is not None and (said := below_zero(kl)):
        yield said
    if about != "answers":
        yield from _true_reward(records, rows_with(records, "reward"))
    rows = rows_with(records, "length")
    length, reference = latest(rows, "length"), latest(rows, "reference_length")
    if length is not None:
        before = f" (reference {number(reference.value)})" if reference is not None else ""
        where = elsewhere(records, rows)
        yield f"Mean answer length {number(length.value)} tokens{before}{where}."


def below_zero(kl: Latest) -> str:
    """What an estimate of the KL below 0 means; '' for one that is not."""
    if kl.high is not None and kl.high < 0:
        return (
            "The whole interval of the KL lies below 0, where no KL is: its answers were not drawn "
            "from the policy as it is read (another temperature, top-k or precision), or it is "
            "chance, as in one of 40 intervals and more often of few prompts. Take it as not known."
        )
    if kl.value < 0:
        return (
            "The KL itself is never negative: an estimate from samples that falls below 0 says "
            "that the distance is small beside its noise."
        )
    return ""


def _true_reward(records: Records, rows: Sequence[Measurement]) -> Iterator[str]:
    found, reference = latest(rows, "reward"), latest(rows, "reference_reward")
    if found is None:
        return
    named = f" by {judge(records)}" if judge(records) else ""
    bounds = f" {interval(*found.bounds)}" if found.bounds else ""
    before = f" (reference {number(reference.value)})" if reference is not None else ""
    where = elsewhere(records, rows)
    yield f"Mean reward of sampled answers{named} {number(found.value)}{bounds}{before}{where}."


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
        yield f"{share} of the training rows were not used: the report says why under Rows."
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
    rows = rows_with(records, "length")
    length, reference = latest(rows, "length"), latest(rows, "reference_length")
    by_prompt = latest(rows, "length_ratio")
    if length is not None and reference is not None and reference.value > 0:
        ratio, where = length.value / reference.value, elsewhere(records, rows)
        # Of few prompts there is no interval, and nothing to claim.
        low, high = (by_prompt.bounds if by_prompt is not None else None) or (1.0, 1.0)
        if ratio > _NOTEWORTHY_LENGTH and low > 1:
            yield f"Sampled answers are {percent(ratio - 1)} longer than the reference's{where}."
        elif ratio < 1 / _NOTEWORTHY_LENGTH and high < 1:
            yield f"Sampled answers are {percent(1 - ratio)} shorter than the reference's{where}."
    rule, found = length_rule(ledger_of(records, set_name)), accuracy(records, set_name)
    if rule is None or found is None or found.step == 0:
        return
    # The rule is only a rival where it is itself better than chance.
    if rule.accuracy.low > CHANCE and rule.lead.low <= 0:
        which = "longer" if rule.longer else "shorter"
        yield (
            f"The policy is not shown to know more than length: always taking the {which} answer "
            f"is right on {percent(rule.accuracy.value)} of these preferences, and the difference "
            f"between the two is {points(rule.lead)}."
        )


_SIGNS = {"good": "▲", "unclear": "◆", "bad": "▼", "unknown": "○"}


def _short(model: str) -> str:
    """A hub's name as it is, of a path on this machine the end: Config has all of it."""
    path = Path(model)
    return "/".join(path.parts[-2:]) if path.is_absolute() else model


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
        _short(str(records.environment.get("model") or records.setting("model") or "")),
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
