"""What the run says and thinks, in its own words: sampled answers, single preferences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from upweight.evidence.records import LedgerRow, Records, Sample, Suspected
from upweight.evidence.report.findings import length_rule, main_set, subject
from upweight.evidence.report.histogram import histogram
from upweight.evidence.report.markup import (
    count,
    details,
    esc,
    number,
    passage,
    percent,
    percent_interval,
    plural,
    points,
    reading,
    signed,
)

_PROMPTS_AT_ONCE = 3
_PROMPTS_AT_MOST = 24
_EARLIER_STEPS = 6
_PAIRS_AT_ONCE = 2
_PAIRS_PER_GROUP = 6
_SUSPECTS_AT_MOST = 12


def samples(records: Records) -> str:
    """The last answers of reference and policy side by side, the earlier ones folded below."""
    if not records.samples and subject(records) == "ranking":
        return ""
    if not records.samples:
        return '<p class="empty">No sampled answers are recorded.</p>'
    histories: dict[tuple[str, str], list[Sample]] = {}
    for sample in records.samples:
        histories.setdefault((sample.set, sample.prompt), []).append(sample)
    ordered = sorted(histories.values(), key=lambda history: -max(s.step for s in history))
    cards = [_sample_card(sorted(h, key=lambda s: s.step)) for h in ordered[:_PROMPTS_AT_MOST]]
    rest = len(ordered) - len(cards)
    more = cards[_PROMPTS_AT_ONCE:]
    return (
        reading(
            "One draw of each model per prompt, the policy's from the step that is named. Read "
            "several: a single draw says little. The log-ratio is how many nats likelier the "
            "policy finds its own answer than the reference does."
        )
        + "".join(cards[:_PROMPTS_AT_ONCE])
        + (details(f"{plural(len(more), 'more prompt')}", "".join(more), "fold") if more else "")
        + (f'<p class="cut">{plural(rest, "prompt")} more in samples.jsonl.</p>' if rest else "")
    )


def _sample_card(history: Sequence[Sample]) -> str:
    last, earlier = history[-1], history[:-1]
    stride = math.ceil(len(earlier) / _EARLIER_STEPS) if earlier else 1
    shown = earlier[::stride]
    steps = "".join(
        f"<div><h4>Policy at step {count(s.step)} <small>{_tokens(s.policy_tokens)}</small></h4>"
        f"{passage(s.policy)}</div>"
        for s in shown
    )
    folded = (
        details(
            f"earlier answers: {len(shown)} of {len(earlier)}", f'<div class="steps">{steps}</div>'
        )
        if earlier
        else ""
    )
    return (
        f'<article class="card"><div class="prompt"><h4>Prompt <small>'
        f"<bdi>{esc(last.set)}</bdi></small></h4>{passage(last.prompt)}</div>"
        f'<div class="sides"><div class="side t-reference"><h4>Reference <small>'
        f"{_tokens(last.reference_tokens)}</small></h4>{passage(last.reference)}</div>"
        f'<div class="side t-policy"><h4>Policy at step {count(last.step)} <small>'
        f"{_tokens(last.policy_tokens)}{_log_ratio(last)}</small></h4>{passage(last.policy)}</div>"
        f"</div>{folded}</article>"
    )


def _tokens(num_tokens: int | None) -> str:
    return "" if num_tokens is None else plural(num_tokens, "token")


def _log_ratio(sample: Sample) -> str:
    if sample.policy_logp is None or sample.policy_reference_logp is None:
        return ""
    return f", log-ratio {number(sample.policy_logp - sample.policy_reference_logp)}"


def preferences(records: Records) -> str:
    """The histogram of margins and the preferences at its ends and in its middle; '' where none
    are judged."""
    set_name = main_set(records)
    sets = list(dict.fromkeys(row.set for row in records.ledger))
    if not sets and subject(records) != "preferences":
        return ""
    if not sets:
        return '<p class="empty">No preferences of an evaluation are recorded.</p>'
    # The headline's set comes first.
    sets.sort(key=lambda name: name != set_name)
    return "".join(_set_of_preferences(records, name, first=i == 0) for i, name in enumerate(sets))


def _set_of_preferences(records: Records, set_name: str, *, first: bool) -> str:
    rows = [r for r in records.ledger if r.set == set_name]
    finite = sorted((r for r in rows if math.isfinite(r.margin)), key=lambda r: r.margin)
    lost = len(rows) - len(finite)
    body = (
        (f'<p class="remark">Not finite margins: {count(lost)}.</p>' if lost else "")
        + _margins(set_name, rows, finite)
        + _groups(finite)
    )
    title = f"Set <bdi>{esc(set_name)}</bdi>, step {count(rows[0].step)}"
    if first:
        return f"<h3>{title}</h3>{body}"
    return details(f"{title}: {plural(len(rows), 'preference')}", body, "fold")


def _margins(set_name: str, rows: Sequence[LedgerRow], finite: Sequence[LedgerRow]) -> str:
    wrong = sum(r.margin < 0 for r in finite)
    ties = sum(r.margin == 0 for r in finite)
    chart = histogram(
        f"Margins on {set_name}",
        f"{plural(len(rows), 'preference')}, beta × nats",
        [r.margin for r in finite],
        f"Each preference once: right of 0 the policy agrees with the label, left of 0 "
        f"({count(wrong)}) it does not{f', at 0 ({count(ties)}) it is undecided' if ties else ''}.",
    )
    return f'<div class="wide">{chart}</div>{_length_sentence(finite)}'


def _length_sentence(rows: Sequence[LedgerRow]) -> str:
    rule = length_rule(rows)
    if rule is None:
        return ""
    which = "longer" if rule.longer else "shorter"
    return (
        f'<p class="remark">For comparison: always taking the {which} answer would be right on '
        f"{percent(rule.accuracy.value)} "
        f"{percent_interval(rule.accuracy.low, rule.accuracy.high)}. The policy's accuracy differs "
        f"from that by {points(rule.lead)}; it is right more often than the rule on "
        f"{plural(rule.num_more, 'prompt')} and less often on {count(rule.num_fewer)} (exact sign "
        f"test p = {number(rule.p, 2)}).</p>"
    )


def _groups(finite: Sequence[LedgerRow]) -> str:
    """Preferences by ascending margin: its upper end, its middle around 0, its lower end."""
    told = [r for r in finite if r.chosen_text is not None and r.rejected_text is not None]
    if not told:
        return '<p class="empty">The texts of the preferences are not recorded.</p>'
    surest = [r for r in reversed(told) if r.margin > 0][:_PAIRS_PER_GROUP]
    against = [r for r in told if r.margin < 0][:_PAIRS_PER_GROUP]
    taken = {id(r) for r in (*surest, *against)}
    unsure = [r for r in sorted(told, key=lambda r: abs(r.margin)) if id(r) not in taken]
    return (
        _group(
            "Most sure, and the label agrees",
            "The labels that the policy agrees with most strongly: what it learned best.",
            surest,
        )
        + _group(
            "Most sure, and the label disagrees",
            "Read these first: either the policy is wrong, or the two answers are swapped here.",
            against,
        )
        + _group(
            "Least sure",
            "The margin is closest to 0: the two answers weigh about the same to the policy.",
            unsure[:_PAIRS_PER_GROUP],
        )
    )


def _group(title: str, how_to_read: str, rows: Sequence[LedgerRow]) -> str:
    if not rows:
        return ""
    cards = [_pair_card(row) for row in rows]
    shown, more = "".join(cards[:_PAIRS_AT_ONCE]), cards[_PAIRS_AT_ONCE:]
    folded = details(f"{count(len(more))} more", "".join(more), "fold") if more else ""
    return f'<h3 class="group">{esc(title)}</h3>{reading(how_to_read)}{shown}{folded}'


def _pair_card(row: LedgerRow) -> str:
    kind = "agrees" if row.margin > 0 else "disagrees" if row.margin < 0 else ""
    prompt = (
        "" if row.prompt_text is None else f'<div class="prompt">{passage(row.prompt_text)}</div>'
    )
    return (
        f'<article class="card pair"><p class="margin {kind}"><b>margin {signed(row.margin)}</b> '
        f"<code><bdi>{esc(row.row)}</bdi></code> responses {row.chosen} over {row.rejected}</p>"
        f'{prompt}<div class="sides">'
        + _side("Chosen", "t-chosen", row.chosen_text, row.reward_chosen, row.tokens_chosen)
        + _side(
            "Rejected", "t-rejected", row.rejected_text, row.reward_rejected, row.tokens_rejected
        )
        + "</div></article>"
    )


def _side(name: str, tone: str, text: str | None, reward: float, tokens: int) -> str:
    return (
        f'<div class="side {tone}"><h4>{name} <small>reward {signed(reward)}, '
        f"{plural(tokens, 'token')}</small></h4>{passage(text or '')}</div>"
    )


def labels(records: Records) -> str:
    """The preferences whose labels policy and words contradict, the surest first; '' for none."""
    found = records.suspects
    if not found:
        return ""
    cards = [_suspect_card(one) for one in found[:_SUSPECTS_AT_MOST]]
    shown, more = "".join(cards[:_PAIRS_AT_ONCE]), cards[_PAIRS_AT_ONCE:]
    rest = len(found) - len(cards)
    return (
        f'<p class="remark">{plural(len(found), "preference")} to read, of which some labels are '
        "likely wrong; all of them are in <code>suspects.jsonl</code>.</p>"
        + reading(
            "The policy and a rule that knows only length and words both hold the rejected answer "
            "better. Held-out preferences were judged after training, those of the training set "
            "when the policy first met them: trained on a wrong label it would agree with it, and "
            "early in training it knows little, so that fewer are found there. Agreement of the "
            "two is a reason to look, not a proof: both can share a bias."
        )
        + shown
        + (details(f"{count(len(more))} more", "".join(more), "fold") if more else "")
        + (f'<p class="cut">{count(rest)} more in suspects.jsonl.</p>' if rest else "")
    )


def _suspect_card(found: Suspected) -> str:
    return (
        f'<article class="card pair"><p class="margin disagrees"><b>margin '
        f"{signed(found.margin)}</b> <code><bdi>{esc(found.row)}</bdi></code> "
        f"<bdi>{esc(found.set)}</bdi></p>"
        f'<p class="reading" dir="auto">{esc(found.why)}</p>'
        f'<div class="prompt">{passage(found.prompt)}</div><div class="sides">'
        f'<div class="side t-chosen"><h4>Labelled chosen</h4>{passage(found.chosen)}</div>'
        f'<div class="side t-rejected"><h4>Labelled rejected</h4>{passage(found.rejected)}</div>'
        "</div></article>"
    )
