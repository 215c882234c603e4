"""What the records say about the run, as numbers: the questions that several sections ask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from upweight.config import Watch
from upweight.evidence.records import LedgerRow, Measurement, Records
from upweight.stats import Interval, accuracy_interval, mean_interval, sign_test

ACCURACY = "rewards/accuracies"
HELD_OUT = "heldout"

Subject = Literal["preferences", "likelihood", "ranking", "answers"]

SUBJECTS: dict[str, Subject] = {
    "dpo": "preferences",
    "sft": "likelihood",
    "reward": "ranking",
    "online_dpo": "answers",
    "ppo": "answers",
    "grpo": "answers",
    "rloo": "answers",
}
"""What a run is about: its policy's preferences, how likely it makes given responses, how a reward
model ranks, or what its answers earn."""


def subject(records: Records) -> Subject:
    """What the run is about, by its objective; preferences where none is known."""
    return SUBJECTS.get(records.setting("objective") or "dpo", "preferences")


@dataclass(frozen=True, slots=True)
class Latest:
    """The last finite value of a metric, its interval where one is recorded, and its step."""

    value: float
    low: float | None
    high: float | None
    step: int

    @property
    def bounds(self) -> tuple[float, float] | None:
        return None if self.low is None or self.high is None else (self.low, self.high)


@dataclass(frozen=True, slots=True)
class LengthRule:
    """How well the rule "the longer (or shorter) answer is the better one" does on a set.

    `lead` is the policy's accuracy minus the rule's on the same preferences. The policy is right
    more often than the rule on `num_more` prompts and less often on `num_fewer`; `p` is the exact
    sign test's for that split.
    """

    longer: bool
    accuracy: Interval
    lead: Interval
    num_more: int
    num_fewer: int
    p: float


def main_set(records: Records) -> str | None:
    """The set that the headline speaks about: the held-out one, else the first that there is; of a
    run that is about its answers, one whose answers were rewarded before any other."""
    names = sorted(records.evals, key=lambda name: name != HELD_OUT)
    if subject(records) == "answers":
        names.sort(key=lambda name: latest(records.evals[name], "reward") is None)
    return next(iter(names), None)


def rows_with(records: Records, key: str) -> Sequence[Measurement]:
    """The evaluations of the main set, or where they lack `key` those of the first set that has it:
    answers may be sampled to other prompts than preferences are held out for."""
    main = main_set(records)
    names = sorted(records.evals, key=lambda name: name != main)
    return next((records.evals[n] for n in names if latest(records.evals[n], key)), ())


def elsewhere(records: Records, rows: Sequence[Measurement]) -> str:
    """The words that name the set of these evaluations; "" where it is the headline's own."""
    name = rows[-1].set if rows else None
    return "" if name in (None, main_set(records)) else f", on the set “{name}”"


def watch_limit(records: Records, key: str) -> float:
    """The run's own limit, as run.yaml has it."""
    try:
        return float(records.setting(f"watch.{key}") or "")
    except ValueError:
        return float(getattr(Watch(), key))


def latest(rows: Sequence[Measurement], key: str, bounds: str | None = None) -> Latest | None:
    """The last finite value of `key`; its interval is read from the keys `bounds`_low and _high."""
    for row in reversed(rows):
        value = row.values.get(key, math.nan)
        if math.isfinite(value):
            low = row.values.get(f"{bounds or key}_low", math.nan)
            high = row.values.get(f"{bounds or key}_high", math.nan)
            known = math.isfinite(low) and math.isfinite(high)
            return Latest(value, low if known else None, high if known else None, row.step)
    return None


def ledger_of(records: Records, set_name: str) -> list[LedgerRow]:
    """The set's rows of its last evaluation whose margin is a number."""
    return [r for r in records.ledger if r.set == set_name and math.isfinite(r.margin)]


def accuracy(records: Records, set_name: str) -> Latest | None:
    """The set's last accuracy; its interval comes from the ledger where none was logged."""
    found = latest(records.evals.get(set_name, ()), ACCURACY)
    rows = ledger_of(records, set_name)
    if found is None or found.low is not None or not rows or rows[0].step != found.step:
        return found
    interval = accuracy_interval([r.margin for r in rows], [prompt_of(r) for r in rows])
    return Latest(found.value, interval.low, interval.high, found.step)


def accuracy_before(records: Records, set_name: str) -> float | None:
    """The accuracy at step 0, if an evaluation was made there."""
    rows = records.evals.get(set_name, ())
    return rows[0].values.get(ACCURACY) if rows and rows[0].step == 0 else None


def gain(rows: Sequence[Measurement]) -> Latest | None:
    """By how much the policy's answers out-earn the reference's at the last evaluation.

    Where the difference prompt by prompt was not recorded, its interval is that of the policy's
    mean alone, as if the reference's were exact.
    """
    found = latest(rows, "reward_gain")
    if found is not None:
        return found
    ours, theirs = latest(rows, "reward"), latest(rows, "reference_reward")
    if ours is None or theirs is None or ours.step != theirs.step:
        return None
    low, high = (bound - theirs.value for bound in ours.bounds) if ours.bounds else (None, None)
    return Latest(ours.value - theirs.value, low, high, ours.step)


def judge(records: Records) -> str:
    """What the rewards of an evaluation come from; '' where that is not known."""
    for key in ("evaluation.true_reward", "rollout.reward"):
        named = records.setting(key)
        if named not in (None, "", "~", "null"):
            return str(named)
    return ""


def num_sampled(records: Records, set_name: str, step: int) -> int:
    """How many answers the set's evaluation at a step sampled."""
    return sum(s.set == set_name and s.step == step for s in records.samples)


def num_preferences(records: Records, set_name: str) -> int | None:
    """How many preferences the set's last evaluation was made on."""
    rows = [r for r in records.ledger if r.set == set_name]
    if rows:
        return len(rows)
    account = records.accounts.get(set_name)
    return account.preferences if account else None


def prompt_of(row: LedgerRow) -> str:
    """What makes two ledger rows rows of one prompt: its text where recorded, else the row."""
    return row.row if row.prompt_text is None else row.prompt_text


def num_prompts(records: Records, set_name: str) -> int | None:
    """How many prompts those preferences have; None where no row of them is recorded."""
    return len({prompt_of(r) for r in records.ledger if r.set == set_name}) or None


def length_rule(rows: Sequence[LedgerRow]) -> LengthRule | None:
    """The better of the two length rules on these preferences; None without preferences."""
    if not rows:
        return None
    gaps = [float(r.tokens_chosen - r.tokens_rejected) for r in rows]
    longer = sum(gap > 0 for gap in gaps) >= sum(gap < 0 for gap in gaps)
    gaps = gaps if longer else [-gap for gap in gaps]
    prompts = [prompt_of(r) for r in rows]
    # A tie is half right: the difference of two signs is twice the difference in rightness.
    leads = [(_sign(row.margin) - _sign(gap)) / 2 for row, gap in zip(rows, gaps, strict=True)]
    by_prompt: dict[str, float] = {}
    for prompt, lead in zip(prompts, leads, strict=True):
        by_prompt[prompt] = by_prompt.get(prompt, 0.0) + lead
    num_more = sum(value > 0 for value in by_prompt.values())
    num_fewer = sum(value < 0 for value in by_prompt.values())
    return LengthRule(
        longer=longer,
        accuracy=accuracy_interval(gaps, prompts),
        lead=mean_interval(leads, prompts),
        num_more=num_more,
        num_fewer=num_fewer,
        p=sign_test(num_more, num_fewer),
    )


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def last_step(records: Records) -> int | None:
    """The largest step that anything is recorded for."""
    rows = [rows[-1] for rows in (records.train, *records.evals.values()) if rows]
    return max((row.step for row in rows), default=None)


def is_unfinished(records: Records) -> bool:
    """Whether the environment, which a run completes when it ends, lacks its end."""
    return bool(records.environment) and not records.environment.get("finished")
