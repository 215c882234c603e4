"""What a run's main evaluation supports saying, by what the run is about."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from upweight.evidence.records import Measurement, Records
from upweight.evidence.report.findings import (
    HELD_OUT,
    Latest,
    Subject,
    accuracy,
    accuracy_before,
    gain,
    judge,
    latest,
    num_preferences,
    num_prompts,
    num_sampled,
    watch_limit,
)
from upweight.evidence.report.markup import (
    count,
    interval,
    number,
    percent,
    percent_interval,
    plural,
    signed,
)
from upweight.stats import FEWEST

CHANCE = 0.5


@dataclass(frozen=True, slots=True)
class Judgement:
    """`tone` is good, unclear, bad or unknown; `label` says it in a few words."""

    tone: str
    label: str
    headline: str
    facts: tuple[str, ...] = ()


def of_preferences(records: Records, set_name: str) -> Judgement | None:
    """Whether the policy prefers the chosen answers more often than chance would."""
    return _of_accuracy(records, set_name, "policy", "prefers the chosen answer on", "prefers")


def of_ranking(records: Records, set_name: str) -> Judgement | None:
    """Whether the reward model scores the chosen answers higher more often than chance would."""
    claim = "scores the chosen answer higher on"
    return _of_accuracy(records, set_name, "reward model", claim, "scores higher")


def _of_accuracy(
    records: Records, set_name: str, who: str, claim: str, does: str
) -> Judgement | None:
    found = accuracy(records, set_name)
    if found is None:
        return None
    shown = percent(found.value)
    if found.bounds:
        shown += f"\u00a0{percent_interval(*found.bounds)}"
    claim = f"{claim} {shown} of {_preferences(records, set_name)}"
    before = accuracy_before(records, set_name)
    then = f"before training {percent(before)}" if before is not None else ""
    aside = (f"{then[0].upper()}{then[1:]}.",) if then else ()
    if found.step == 0:
        headline = f"Only the evaluation before training is recorded: the {who} {claim}."
        return Judgement("unknown", "Not trained yet", headline)
    if found.low is None or found.high is None:
        headline = f"The {who} {claim}; no interval is recorded, so chance is not excluded."
        return Judgement("unclear", "No interval", headline, aside)
    if (num := num_prompts(records, set_name)) is not None and num < FEWEST:
        headline = (
            f"It is not shown that the {who} learned the preferences: it {claim}, of "
            f"{plural(num, 'prompt')}, and of fewer than {FEWEST} nothing is claimed."
        )
        return Judgement("unclear", "Too few to tell", headline, aside)
    if found.low > CHANCE:
        headline = f"The {who} {claim}{f'; {then}' if then else ''}."
        label, doubt = _no_better(records, set_name, who, found, before)
        if doubt:
            return Judgement("unclear", label, f"{doubt} The {who} {claim}.", aside)
        return Judgement("good", "Better than chance", headline)
    if found.high < CHANCE:
        headline = f"The {who} {does} the rejected answers: it {claim}."
        advice = (*aside, "Check that chosen and rejected are not swapped.")
        return Judgement("bad", "Worse than chance", headline, advice)
    headline = (
        f"It is not shown that the {who} learned the preferences: it {claim}, and that interval "
        f"includes chance ({percent(CHANCE)})."
    )
    return Judgement("unclear", "Not told apart from chance", headline, aside)


def _no_better(
    records: Records, set_name: str, who: str, found: Latest, before: float | None
) -> tuple[str, str]:
    """A label and why an accuracy above chance is nothing that was learned; '' where it may be."""
    rows = records.evals[set_name]
    if before is not None and found.low is not None and found.low <= before:
        return "No better than before", (
            f"It is not shown that training made the {who} right more often: before it, it was on "
            f"{percent(before)}."
        )
    if said := hardly_trained(records, rows, who):
        return "Hardly trained", said
    first, last = (rows[0].values.get("loss", math.nan), latest(rows, "loss"))
    if last is None or rows[0].step != 0 or not math.isfinite(first):
        return "", ""
    change = latest(rows, "loss_change")
    bounds = change.bounds if change is not None and change.step == last.step else None
    if (bounds[1] if bounds else last.value - first) >= 0:
        shown = f" (change {interval(*bounds)})" if bounds else ""
        return "Loss not below its start", (
            f"It is not shown that the {who} learned what it was trained for: the held-out loss "
            f"was {number(first)} before training and is {number(last.value)}{shown}."
        )
    return "", ""


def hardly_trained(records: Records, rows: Sequence[Measurement], who: str = "policy") -> str:
    """What is to be said of margins that are 0 but for rounding at the last of the rows, '' of
    others."""
    size = latest(rows, "rewards/spread")
    if size is None or size.step == 0 or not size.value < watch_limit(records, "flat"):
        return ""
    return (
        f"The {who} hardly differs from its start: margins are {number(size.value)} in size, "
        "and 0 there. Train for more steps or at a larger learning rate."
    )


def _preferences(records: Records, set_name: str) -> str:
    n = num_preferences(records, set_name)
    if set_name == HELD_OUT:
        return plural(n, "held-out preference") if n is not None else "the held-out preferences"
    many = plural(n, "preference") if n is not None else "the preferences"
    return f"{many} of the set “{set_name}”"


def of_likelihood(records: Records, set_name: str) -> Judgement | None:
    """Whether responses that were not trained on became likelier."""
    rows = records.evals[set_name]
    losses = [(row.step, row.values.get("loss", math.nan)) for row in rows]
    losses = [(step, loss) for step, loss in losses if math.isfinite(loss)]
    if not losses:
        return None
    (first_step, first), (last_step, last) = losses[0], losses[-1]
    lowest_step, lowest = min(losses, key=lambda found: found[1])
    where = _responses(rows, set_name)
    nats = "nats per token"
    if last_step == 0:
        headline = (
            f"Only the evaluation before training is recorded: the loss on {where} is "
            f"{number(last)} {nats}."
        )
        return Judgement("unknown", "Not trained yet", headline)
    if first_step != 0:
        headline = (
            f"The loss on {where} is {number(last)} {nats}; what it was before training is not "
            "recorded."
        )
        return Judgement("unclear", "Nothing to compare with", headline)
    found = latest(rows, "loss_change")
    bounds = found.bounds if found is not None and found.step == last_step else None
    facts = tuple(_of_losses(first, last, lowest, lowest_step, last_step, bounds))
    change = f"from {number(first)} to {number(last)} {nats}"
    if number(first) == number(last):
        headline = f"The loss on {where} is what it was before training, {number(last)} {nats}."
        return Judgement("unclear", "Held-out loss unchanged", headline, facts)
    if bounds is not None and bounds[0] <= 0 <= bounds[1]:
        headline = (
            f"It is not shown that training changed the loss on {where}: it went {change}, and the "
            "interval of that change includes 0."
        )
        return Judgement("unclear", "Held-out loss not shown to change", headline, facts)
    if last < first:
        return Judgement("good", "Held-out loss fell", f"The loss on {where} fell {change}.", facts)
    headline = f"The loss on {where} rose {change}: they became less likely."
    return Judgement("bad", "Held-out loss rose", headline, facts)


def _of_losses(
    first: float,
    last: float,
    lowest: float,
    lowest_step: int,
    last_step: int,
    bounds: tuple[float, float] | None,
) -> Iterator[str]:
    if bounds is not None:
        yield f"The change is {signed(last - first)}\u00a0{interval(*bounds)}."
    if max(first, last) < 20:
        yield f"Perplexity went from {number(math.exp(first))} to {number(math.exp(last))}."
    if lowest_step not in (0, last_step) and number(lowest) != number(last):
        yield (
            f"It was lowest at step {count(lowest_step)}, {number(lowest)}, and rose since, as it "
            "does when training responses are learned by heart: checkpoint.best=loss keeps such a "
            "checkpoint."
        )
    if bounds is None:
        yield "No interval is recorded: other responses may have changed by more or less."


def _responses(rows: Sequence[Measurement], set_name: str) -> str:
    n = latest(rows, "num_responses")
    if set_name == HELD_OUT:
        return "the held-out responses" if n is None else plural(int(n.value), "held-out response")
    many = "the responses" if n is None else plural(int(n.value), "response")
    return f"{many} of the set “{set_name}”"


def of_answers(records: Records, set_name: str) -> Judgement | None:
    """Whether the policy's answers earn more than the reference's, and at what distance."""
    rows = records.evals[set_name]
    ours, found = latest(rows, "reward"), gain(rows)
    if ours is None:
        return None
    theirs, kl = latest(rows, "reference_reward"), latest(rows, "kl")
    held_out = set_name == HELD_OUT
    n = num_sampled(records, set_name, ours.step)
    prompts = plural(n, "held-out prompt" if held_out else "prompt") if n else "held-out prompts"
    if not held_out:
        prompts = f"{plural(n, 'prompt') if n else 'prompts'} of the set “{set_name}”"
    earned = f"{number(ours.value)}{_bounds(ours)}"
    against = f", the reference's {number(theirs.value)}" if theirs is not None else ""
    distance = f", at a sampled KL of {number(kl.value)} nats{_bounds(kl)}" if kl else ""
    claim = f"answers to {prompts} earn {earned} on average{against}{distance}"
    facts = tuple(_of_rewards(records, found))
    if ours.step == 0:
        headline = f"Only the evaluation before training is recorded: {claim}."
        return Judgement("unknown", "Not trained yet", headline)
    if found is None or found.low is None or found.high is None:
        headline = f"The policy's {claim}; how sure that is, is not recorded."
        return Judgement("unclear", "No interval", headline, facts)
    if found.low > 0:
        return Judgement("good", "Above the reference", f"The policy's {claim}.", facts)
    if found.high < 0:
        headline = f"The policy earns less than its reference: {claim}."
        return Judgement("bad", "Below the reference", headline, facts)
    headline = f"It is not shown that the policy earns more than its reference: {claim}."
    return Judgement("unclear", "Not told apart from the reference", headline, facts)


def _bounds(found: Latest) -> str:
    return f"\u00a0{interval(*found.bounds)}" if found.bounds else ""


def _of_rewards(records: Records, found: Latest | None) -> Iterator[str]:
    if found is not None and found.low is not None:
        yield f"The difference is {signed(found.value)}{_bounds(found)}."
    name, trained = judge(records), records.setting("rollout.reward")
    if name and name == trained:
        yield f"The reward is {name}, the one that was trained for."
    elif name:
        yield f"The reward is {name}; trained for was {trained}."


JUDGEMENTS: dict[Subject, Callable[[Records, str], Judgement | None]] = {
    "preferences": of_preferences,
    "likelihood": of_likelihood,
    "ranking": of_ranking,
    "answers": of_answers,
}
"""None where the set has not been measured."""
