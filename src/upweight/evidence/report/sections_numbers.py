"""The measured numbers: comparison with the reference, key numbers, evaluation sets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from upweight.evidence.records import Measurement, Records
from upweight.evidence.report.findings import (
    ACCURACY,
    Subject,
    accuracy,
    accuracy_before,
    elsewhere,
    judge,
    latest,
    main_set,
    num_preferences,
    rows_with,
    subject,
)
from upweight.evidence.report.markup import (
    count,
    duration,
    esc,
    interval,
    number,
    percent,
    percent_interval,
    plural,
    reading,
    signed,
    table,
)

_MEASURES: dict[Subject, tuple[tuple[str, str, str], ...]] = {
    "preferences": (("Reward margin", "rewards/margins", "beta × nats"), ("Loss", "loss", "")),
    "ranking": (("Score margin", "rewards/margins", "nats"), ("Loss", "loss", "")),
    "likelihood": (
        ("Loss", "loss", "nats per token"),
        ("Response log-prob", "logps/response", "nats"),
    ),
    "answers": (),
}
"""The tiles of an evaluation: title, metric, unit."""

_TRAINED: dict[Subject, tuple[tuple[str, str, str], ...]] = {
    **_MEASURES,
    "answers": (("Rollout reward", "reward", ""), ("KL of rollouts", "kl", "nats")),
}
"""Those of the training steps, where nothing was evaluated."""


def comparison(records: Records) -> str:
    """evaluation.json as a table; '' where a run has none."""
    found = records.comparison
    if found is None:
        return ""
    rows = [
        (f"{esc(r.name)}<small>{esc(r.note)}</small>", esc(r.reference), esc(r.policy))
        for r in found.rows
    ]
    return (
        f"<h3>{esc(found.title)}</h3>"
        + table(("Quantity", "Reference", "Policy"), rows, "comparison")
        + reading(
            "One line per quantity, measured on the reference (the model before training) and on "
            "the policy (after it); brackets are intervals."
        )
    )


def key_numbers(records: Records) -> str:
    """The run in a handful of tiles, and every evaluation set in a table if there are several."""
    tiles = "".join(_tiles(records))
    if not tiles:
        return '<p class="empty">No step and no evaluation is recorded yet.</p>'
    return (
        f'<div class="tiles">{tiles}</div>'
        + reading(
            "The last recorded values. Brackets are 95 % intervals; a log-prob is the sum over an "
            "answer's scored tokens, in nats."
            if subject(records) != "ranking"
            else "The last recorded values. Brackets are 95 % intervals; a score is the model's "
            "output for an answer, and only differences of scores were learned."
        )
        + (_every_set(records) if len(records.evals) > 1 else "")
    )


def _tile(name: str, value: str, unit: str, below: str, graphic: str = "") -> str:
    return (
        f'<div class="tile"><h3>{esc(name)}</h3><p class="value">{esc(value)} '
        f"<small>{esc(unit)}</small></p>{graphic}"
        f'<p class="below" dir="auto">{esc(below)}</p></div>'
    )


def _tiles(records: Records) -> Iterator[str]:
    set_name = main_set(records)
    if set_name is not None:
        yield from _evaluation_tiles(records, set_name)
    yield from _training_tiles(records)
    train = records.accounts.get("train")
    if train is not None:
        below = f"{count(train.read - train.used)} dropped"
        if train.preferences and subject(records) != "likelihood":
            below += f", {plural(train.preferences, 'preference')}"
        yield _tile("Training rows", count(train.used), f"of {count(train.read)} used", below)


def _evaluation_tiles(records: Records, set_name: str) -> Iterator[str]:
    rows = records.evals[set_name]
    if subject(records) == "answers":
        yield from _reward_tile(records, rows)
    found = accuracy(records, set_name)
    if found is not None:
        before = accuracy_before(records, set_name)
        below = f"set {set_name}" + (f", before {percent(before)}" if before is not None else "")
        graphic = ""
        if found.bounds:
            below = f"{percent_interval(*found.bounds)}, {below}"
            graphic = _interval_bar(found.value, *found.bounds)
        yield _tile("Accuracy", percent(found.value), "chosen preferred", below, graphic)
    for name, key, unit in _MEASURES[subject(records)]:
        last = latest(rows, key)
        if last is not None:
            first = rows[0].values.get(key, math.nan)
            before = f", before {number(first)}" if rows[0].step == 0 else ""
            yield _tile(name, number(last.value), unit, f"set {set_name}{before}")
    if subject(records) != "answers":
        yield from _reward_tile(records, rows_with(records, "reward"))
    sampled = rows_with(records, "kl")
    kl = latest(sampled, "kl")
    if kl is not None:
        bounds = f"{interval(*kl.bounds)}, " if kl.bounds else ""
        below = "; below 0: see the top" if kl.high is not None and kl.high < 0 else ""
        where = elsewhere(records, sampled)
        yield _tile("Sampled KL", number(kl.value), "nats", f"{bounds}per answer{where}{below}")
    sampled = rows_with(records, "length")
    length, reference = latest(sampled, "length"), latest(sampled, "reference_length")
    if length is not None:
        below = f"reference {number(reference.value)}" if reference is not None else "sampled"
        where = elsewhere(records, sampled)
        yield _tile("Answer length", number(length.value), "tokens", below + where)
    chosen, rejected = latest(rows, "logratios/chosen"), latest(rows, "logratios/rejected")
    if chosen is not None and rejected is not None:
        below = f"rejected {signed(rejected.value)}, against the reference"
        yield _tile("Chosen log-prob", signed(chosen.value), "nats", below)


def _reward_tile(records: Records, rows: Sequence[Measurement]) -> Iterator[str]:
    found, reference = latest(rows, "reward"), latest(rows, "reference_reward")
    if found is None:
        return
    below = [
        interval(*found.bounds) if found.bounds else "",
        f"reference {number(reference.value)}" if reference is not None else "",
        f"set {rows[-1].set}",
    ]
    yield _tile("Reward", number(found.value), judge(records), ", ".join(filter(None, below)))


def _training_tiles(records: Records) -> Iterator[str]:
    if not records.train:
        return
    if not records.evals:
        for name, key, unit in _TRAINED[subject(records)]:
            last = latest(records.train, key)
            if last is not None:
                yield _tile(name, number(last.value), unit, f"training step {count(last.step)}")
    seconds = latest(records.train, "seconds")
    tokens, speed = latest(records.train, "num_tokens"), latest(records.train, "tokens_per_second")
    step, epoch = records.train[-1].step, records.train[-1].epoch
    below = [
        plural(step, "step") if seconds is not None else "",
        _epochs(epoch),
        f"{_compact(tokens.value)} tokens" if tokens is not None else "",
        f"{number(speed.value)} tokens/s" if speed is not None else "",
    ]
    value = duration(seconds.value) if seconds is not None else plural(step, "step")
    yield _tile("Training", value, "", ", ".join(filter(None, below)))


def _epochs(epoch: float) -> str:
    """0.28 epochs, 1 epoch, 400 epochs."""
    shown = count(round(epoch)) if epoch >= 10 else f"{epoch:.2f}".rstrip("0").rstrip(".")
    shown = number(epoch, 2) if shown == "0" else shown
    return f"{shown} {'epoch' if shown == '1' else 'epochs'}"


def _compact(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{number(value / size)} {letter}"
    return number(value)


def _interval_bar(value: float, low: float, high: float) -> str:
    """The interval on a line from 0 to 1 with chance marked."""
    return (
        f'<div class="interval" role="img" aria-label="{percent(value)}, interval '
        f'{percent_interval(low, high)}; chance is at 50 %">'
        f'<i class="span" style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></i>'
        f'<i class="chance"></i><i class="point" style="left:{100 * value:.1f}%"></i></div>'
    )


def _every_set(records: Records) -> str:
    """The last evaluation of each set; a column that no set has is left out."""
    columns: list[tuple[str, list[str]]] = [
        (title, [_cell(records, name, key) for name in records.evals])
        for title, key in (
            ("Preferences", ""),
            ("Accuracy", ACCURACY),
            ("Margin", "rewards/margins"),
            ("Loss", "loss"),
            ("Reward", "reward"),
            ("KL, nats", "kl"),
            ("Length, tokens", "length"),
        )
    ]
    columns = [(title, cells) for title, cells in columns if set(cells) != {_ABSENT}]
    names = [f"<bdi>{esc(name)}</bdi>" for name in records.evals]
    lines = [(name, *(cells[i] for _, cells in columns)) for i, name in enumerate(names)]
    chance = ""
    if any(title == "Accuracy" for title, _ in columns):
        chance = " An accuracy whose interval includes 50 % is not told apart from chance."
    return (
        "<h3>Every evaluation set</h3>"
        + table(("Set", *(title for title, _ in columns)), lines, "numbers")
        + reading(f"Each set's last evaluation; a dash was not measured.{chance}")
    )


_ABSENT = "–"


def _cell(records: Records, set_name: str, key: str) -> str:
    if not key:
        n = num_preferences(records, set_name)
        return count(n) if n else _ABSENT
    if key == ACCURACY:
        right = accuracy(records, set_name)
        if right is None:
            return _ABSENT
        bounds = f" {percent_interval(*right.bounds)}" if right.bounds else ""
        return percent(right.value) + bounds
    found = latest(records.evals[set_name], key)
    if found is None:
        return _ABSENT
    return esc(number(found.value) + (f" {interval(*found.bounds)}" if found.bounds else ""))
