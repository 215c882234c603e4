"""comparison.json -> comparison.html: one page that loads nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from upweight.evidence.comparison.claim import MARGIN, knots
from upweight.evidence.comparison.given import given
from upweight.evidence.comparison.nouns import Claim, Method, Point, Study
from upweight.evidence.comparison.read import read_study
from upweight.evidence.comparison.said import at_most, measured_points, shown_kl, when
from upweight.evidence.report.document import document, write_page
from upweight.evidence.report.frontier import (
    MARKERS,
    READING,
    TONES,
    Spot,
    Trail,
    frontier,
    shown,
)
from upweight.evidence.report.markup import (
    count,
    duration,
    esc,
    number,
    percent,
    plural,
    reading,
    table,
)
from upweight.stats import Interval

_ABOUT = {
    "sft": "raises the log-prob of the chosen answers; the rejected ones are not looked at.",
    "dpo": "learns from given pairs, by the policy's own log-probs against the reference's: no "
    "reward model, and nothing is sampled.",
    "online_dpo": "DPO on pairs of the policy's own answers, ranked by the reward as it trains.",
    "ppo": "samples answers and makes tokens likelier that earned more than a value model foresaw, "
    "less a penalty for KL, in small clipped steps.",
    "grpo": "as PPO, but an answer is held against the others to the same prompt, not against a "
    "value model.",
    "rloo": "as GRPO, each answer held against the mean of the others, without dividing by their "
    "spread.",
    "reward": "a model of the preferences, which others are trained against.",
    "best": "no training: of n answers of the start the one that a reward ranks first; its KL is "
    "log n - (n - 1) / n at most, and far less where many answers earn the same.",
}


def write_comparison(folder: Path) -> Path:
    """Build comparison.html from `folder`/comparison.json, and return its path.

    The page is written whole or not at all. Raises DataError when the record is missing or
    malformed and OutputError when the page cannot be written.
    """
    page = render(read_study(folder))
    return write_page(folder / "comparison.html", page, "build the page again")


def render(study: Study) -> str:
    """The whole page."""
    sections = (
        ("DPO against PPO", _pairs(study)),
        ("Reward against KL", _frontier(study)),
        ("Methods", _methods(study) + given(study)),
        ("Reported while training", _noticed(study)),
        ("What each method is", _about(study)),
        ("How it was measured", _measured(study)),
        ("Every evaluation", _evaluations(study)),
    )
    return document(f"{study.title} · upweight comparison", _masthead(study), sections)


_CHIPS = {
    True: ("good", "▲", "The claim holds"),
    False: ("bad", "▼", "The claim does not hold"),
    None: ("unclear", "◆", "Not shown either way"),
}


def _chip(claim: Claim) -> tuple[str, str, str]:
    if claim.holds is None and any(pair.holds or pair.in_part for pair in claim.pairs):
        return ("unclear", "◆", "Shown in part")
    return _CHIPS[claim.holds]


def _masthead(study: Study) -> str:
    tone, sign, label = _chip(study.claim)
    besides = "".join(filter(None, (_failures(study), _reports(study))))
    besides = f'<aside class="cautions">{besides}</aside>' if besides else ""
    facts = " · ".join(filter(None, (study.machine, f"{duration(study.seconds)} of training")))
    return (
        f'<header class="masthead"><div><p class="run"><b dir="auto">{esc(study.title)}</b> '
        f"<span>{esc(facts)}</span></p>"
        f'<p class="chip {tone}"><span aria-hidden="true">{sign}</span> {label}</p>'
        f'<h1 class="verdict" dir="auto">{esc(study.claim.said)}</h1>'
        f'<p class="facts">{esc(_facts(study))}</p></div>{besides}</header>'
    )


def _failures(study: Study) -> str:
    failed = [m for m in study.methods if m.failed is not None]
    items = [f"<bdi>{esc(m.name)}</bdi>: {esc(m.failed or '')}" for m in failed]
    return _caution(f"{plural(len(failed), 'method')} failed", items)


def _reports(study: Study) -> str:
    """Which methods something was reported of: what a reward does not see may have been lost."""
    reported = [m for m in study.methods if m.noticed]
    items = [
        f"<bdi>{esc(m.name)}</bdi>: {esc(', '.join(dict.fromkeys(n.code for n in m.noticed)))}"
        for m in reported
    ]
    return _caution(f"Reported of {plural(len(reported), 'method')} while training", items)


def _caution(title: str, items: Sequence[str]) -> str:
    if not items:
        return ""
    return f"<h2>{title}</h2><ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def _noticed(study: Study) -> str:
    """Everything that was reported; '' where nothing was."""
    lines = [
        (
            f"<bdi>{esc(method.name)}</bdi>",
            count(noticed.step),
            f"<code>{esc(noticed.code)}</code>",
            f'<span dir="auto">{esc(noticed.said)}</span>',
        )
        for method in study.methods
        for noticed in method.noticed
    ]
    if not lines:
        return ""
    return table(("Method", "Step", "Code", "What was seen"), lines, "warnings") + reading(
        "A reward that rises says nothing of what it does not score: length, repetition, lost stop "
        "tokens and distance from the start are watched apart from it. upweight explain CODE says "
        "what to do."
    )


def _facts(study: Study) -> str:
    """What the verdict is of, how sure it is, and what no interval knows."""
    said = (
        f"{plural(len(study.methods), 'method')} from one start, by {study.reward}, at equal "
        "distance from the reference.",
        study.claim.sure,
        "Each was trained once, with one seed: what another seed would have made is in no "
        "interval.",
    )
    return " ".join(filter(None, said))


def _pairs(study: Study) -> str:
    """What each pair of runs shows; '' where the headline says it of the only one."""
    if not study.claim.lines:
        return ""
    lines = [
        (
            f"<bdi>{esc(pair.dpo)}</bdi> against <bdi>{esc(pair.ppo)}</bdi>",
            f'<span class="chip {tone}"><span aria-hidden="true">{sign}</span> {label}</span>',
            esc(said[:1].upper() + said[1:]),
        )
        for pair in study.claim.pairs
        for tone, sign in [_PAIR[pair.way] if pair.compared else _NOT_COMPARED]
        for label in [pair.way if pair.compared else "not compared"]
        for _, _, said in [pair.said.partition(": ")]
    ]
    return table(("Runs", "DPO's frontier is", "What was seen"), lines, "pairs")


_PAIR = {
    "not below": ("good", "▲"),
    "below": ("bad", "▼"),
    "above at some KL": ("unclear", "△"),
    "without a gain": ("unclear", "◆"),
    "not shown to differ": ("unclear", "◆"),
}
_NOT_COMPARED = ("unknown", "○")


def _frontier(study: Study) -> str:
    drawn = [method for method in study.methods if measured_points(method)]
    trails = [_trail(method, study, i) for i, method in enumerate(drawn)]
    if not drawn:
        return '<p class="empty">No method was evaluated.</p>'
    origin = Trail("Start", "t-reference", [_origin(study)], ["start"], "star")
    return frontier(
        "Reward against KL",
        [*trails, origin],
        f"mean {study.reward}",
        f"{READING} A line goes from the start through the evaluations of one policy by their KL, "
        "as frontiers are compared; one whose KL is estimated at 0 or below is on no line. The "
        "last evaluation has a larger mark and is named. Answers chosen best of n are points, at "
        "the most that their KL can be: the bar goes from 0 to there. Point at one to read it.",
        (study.start.reward, ""),
    )


def _origin(study: Study) -> Spot:
    start = Interval(study.start.reward, study.start.low, study.start.high)
    return Spot(_exact(0.0), start, "KL 0")


def _trail(method: Method, study: Study, index: int) -> Trail:
    points = [p for p in method.points if p.step > 0 or not method.is_path]
    path = method.is_path
    spots = [Spot(_kl(method, p), p.reward_interval, when(method, p), not path) for p in points]
    texts = ["" for _ in points[:-1]] + [method.name] if path else [f"{p.step}" for p in points]
    return Trail(
        method.name,
        TONES[index % len(TONES)],
        spots,
        texts if points else texts[:1],
        MARKERS[index % len(MARKERS)],
        joined=path,
        dashed=index % (2 * len(TONES)) >= len(TONES),
        line=[Spot(_exact(k.kl), k.reward, "") for k in knots(method, study.start)],
    )


def _kl(method: Method, point: Point) -> Interval:
    """With its interval; that of answers chosen best of n is a bound, above anything from 0."""
    return point.kl_interval if method.is_path else Interval(point.kl, 0.0, point.kl)


def _exact(value: float) -> Interval:
    return Interval(value, math.nan, math.nan)


def _methods(study: Study) -> str:
    level = common_kl(study.methods)
    head = ["Method", f"Final {esc(study.reward)}", "KL, nats"]
    if level is not None:
        head.append(f"Best at KL ≤ {esc(number(level))}")
    head.append("Length, tokens")
    start = Interval(study.start.reward, study.start.low, study.start.high)
    blank = ["–"] if level is not None else []
    lines: list[Sequence[str]] = [("Start", esc(shown(start)), "0", *blank, "–")]
    lines += [_line(method, level) for method in study.methods]
    return table(head, lines, "numbers methods") + reading(
        "The last evaluation of each method, with 95 % intervals"
        + (
            ""
            if level is None
            else "; in between the best of its evaluations within a KL that all of those compared "
            "reached, which flatters by what luck is in a best"
        )
        + "."
    )


def _line(method: Method, level: float | None) -> Sequence[str]:
    note = f"<small>failed: {esc(method.failed)}</small>" if method.failed is not None else ""
    name = f"<bdi>{esc(method.name)}</bdi>{note}"
    points = measured_points(method)
    if not points:
        return (name, "–", "–", *(["–"] if level is not None else []), "–")
    last = points[-1]
    below = [p for p in points if level is not None and p.kl <= level]
    best = max(below, key=lambda p: p.reward, default=None)
    cells = [esc(shown(last.reward_interval)), esc(shown_kl(method, last))]
    if level is not None:
        said = "–" if best is None else f"{esc(shown(best.reward_interval))}"
        at = (
            ""
            if best is None
            else f"<small>{when(method, best)}, KL {at_most(method, best)}</small>"
        )
        cells.append(said + at)
    return (name, *cells, esc(number(last.length)))


def common_kl(methods: Sequence[Method]) -> float | None:
    """The largest KL that all compared methods reached: DPO and PPO, or all where one is missing;
    None where nothing is above 0."""
    reached = {
        (m.objective, m.name): max(p.kl for p in measured_points(m))
        for m in methods
        if m.is_path and m.failed is None and measured_points(m)
    }
    compared = {key: kl for key, kl in reached.items() if key[0] in ("dpo", "ppo")}
    if {objective for objective, _ in compared} != {"dpo", "ppo"}:
        compared = reached
    level = min(compared.values(), default=0.0)
    return level if level > 0 else None


def _about(study: Study) -> str:
    lines = [
        (
            f"<bdi>{esc(m.name)}</bdi>",
            esc(_sentence(m)),
            f'<span dir="auto">{esc(m.note)}</span>',
        )
        for m in study.methods
    ]
    return table(("Method", "What it does", "In this comparison"), lines, "about")


def _sentence(method: Method) -> str:
    key = method.objective if method.is_path else "best"
    said = _ABOUT.get(key, f"objective {method.objective}.")
    return said[0].upper() + said[1:]


def _measured(study: Study) -> str:
    points = (
        f"Every method starts from the same policy, which earns {_start(study)} and is the "
        "reference at KL 0.",
        f"Reward is the mean of {study.reward} over sampled answers to held-out prompts.",
        "The KL of a trained policy is sampled too: the mean of log policy - log reference over "
        "its answers, in nats per answer. As an estimate it can fall below 0, which the KL itself "
        "never does.",
        "The frontiers of DPO and PPO are compared where either has an evaluation, along lines "
        "between neighbours that are straight in the square root of KL, as rewards nearly are "
        "(Gao, Schulman and Hilton 2022, arXiv:2210.10760). Where a frontier bends in that too, a "
        "method with few evaluations is still understated a little.",
        "The interval of a difference is that of two independent estimates. All methods answer the "
        "same prompts, and what is hard for one is often hard for the other, but differences are "
        "not taken prompt by prompt, which would tell more: these intervals are likely wider than "
        "they need to be.",
        "What is uncertain of a KL is in the interval of a difference too: the slope of its "
        "frontier, over all its evaluations by the root of KL, turns it into reward.",
        "That DPO is not below PPO is said where the whole interval of the difference lies, at "
        f"every place, above minus {percent(MARGIN)} of what the better of both gains where "
        "they are compared: rewards have no unit in common, and who has nine tenths of the gain at "
        "the same KL has not chosen wrongly. Where neither gains it is not said. That it is below "
        "is said where the whole interval lies below 0, at one place or more.",
        "Every place that was looked at is a chance to be wrong, and the spread of few prompts is "
        "itself uncertain, so the intervals of differences are widened (Bonferroni, by Student's "
        "distribution; Hesterberg 2015, arXiv:1411.5279) until all of them hold together with 95 % "
        "confidence. Intervals in the plot and the tables are the bootstrap's, each for itself; "
        "those of fewer than some 40 prompts are narrower than 95 % asks for.",
        *_below_zero(study),
        f"Budget: {study.budget}. Machine: {study.machine}. Training, in all: "
        f"{duration(study.seconds)}.",
    )
    items = "".join(f"<li>{esc(text)}</li>" for text in points)
    return f'<ul class="said">{items}</ul>'


def _below_zero(study: Study) -> list[str]:
    found = [f"{m.name}, {when(m, p)}" for m in study.methods for p in m.points if p.kl_high < 0]
    if not found:
        return []
    return [
        f"The whole interval of the KL lies below 0 here: {'; '.join(found)}. Either the answers "
        "were not drawn from the policy as it is read (another temperature, top-k or precision), "
        "or it is chance, as in one of 40 intervals and more often of few prompts."
    ]


def _start(study: Study) -> str:
    return shown(Interval(study.start.reward, study.start.low, study.start.high))


def _evaluations(study: Study) -> str:
    lines = [
        (
            f"<bdi>{esc(method.name)}</bdi>",
            esc(when(method, p)),
            esc(shown_kl(method, p)),
            esc(shown(p.reward_interval)),
            esc(number(p.length)),
        )
        for method in study.methods
        for p in method.points
    ]
    if not lines:
        return ""
    head = ("Method", "After", "KL, nats", esc(study.reward), "Length, tokens")
    return table(head, lines, "numbers")
