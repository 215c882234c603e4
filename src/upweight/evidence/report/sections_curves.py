"""The curves of a run, drawn from the table of charts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from upweight.evidence.records import Measurement, Records
from upweight.evidence.report.charts import Chart, Event, Guide, Mark, Series, line_chart
from upweight.evidence.report.curve_table import CURVES, Curve, Line
from upweight.evidence.report.findings import last_step, main_set, subject
from upweight.evidence.report.markup import esc, number, reading
from upweight.evidence.report.scales import running_mean, smoothing_window

_MOST_SETS_IN_ONE = 3


def curves(records: Records) -> str:
    """Every curve that has a value, in a grid; those that the run's kind usually has are named."""
    if not records.train and not records.evals:
        return '<p class="empty">No step and no evaluation is recorded yet.</p>'
    charts: list[str] = []
    missing: list[str] = []
    for curve in CURVES:
        if curve.about and subject(records) not in curve.about:
            continue
        drawn = [c for c in map(line_chart, _charts(curve, records)) if c]
        charts += drawn
        if not drawn and not curve.optional:
            missing.append(curve.title.lower())
        if curve.title == "Accuracy":
            charts += filter(None, map(line_chart, _log_ratio_charts(records)))
    absent = f"Not recorded in this run: {', '.join(missing)}." if missing else ""
    return (
        reading(
            "Every chart runs over optimizer steps. Point at one to read its values; press a "
            "name in a legend to hide its line."
        )
        + f'<div class="grid">{"".join(charts)}</div>'
        + (f'<p class="empty">{esc(absent)}</p>' if absent else "")
    )


def _charts(curve: Curve, records: Records) -> Iterator[Chart]:
    """One chart with all sets, or one per set where their lines would hide each other."""
    trained = tuple(_series(line, records.train) for line in curve.train)
    if curve.steered and not any(map(_moves, trained)):
        return
    ends = {f"{curve.bounds}_{end}" for end in ("low", "high")}  # a bound may be what was wrong
    sets = list(records.evals)
    crowded = len(sets) > (_MOST_SETS_IN_ONE if len(curve.evals) == 1 else 1) and curve.evals
    for group in [[name] for name in sets] if crowded else [sets]:
        evaluated = tuple(
            _series(line, records.evals[name], name, curve.bounds, sets.index(name))
            for name in group
            for line in curve.evals
        )
        title = f"{curve.title}: {group[0]}" if crowded else curve.title
        yield Chart(
            title=title,
            unit=curve.unit,
            reading=curve.reading,
            series=(*trained, *evaluated),
            guides=curve.guides,
            events=epochs(records.train),
            marks=_marks(
                records,
                ends.union(x.key for x in curve.train),
                ends.union(x.key for x in curve.evals),
                group,
            ),
            percent=curve.percent,
            log=curve.log,
            include=(*curve.include, *(guide.value for guide in curve.guides)),
            domain=_domain(records),
        )


def _domain(records: Records) -> tuple[float, float]:
    """All charts span the same steps, so that they can be compared by eye."""
    starts = [rows[0].step for rows in (records.train, *records.evals.values()) if rows]
    return float(min(starts)), float(last_step(records) or 0)


def _moves(series: Series) -> bool:
    """Whether there is more to see than one value, repeated."""
    return len({y for _, y in series.points}) > 1


def _series(
    line: Line, rows: Sequence[Measurement], set_name: str = "", bounds: str = "", index: int = 0
) -> Series:
    points = [(float(r.step), r.values[line.key]) for r in rows if line.key in r.values]
    low, high = f"{bounds}_low", f"{bounds}_high"
    band = [
        (float(r.step), r.values[low], r.values[high])
        for r in rows
        if bounds == line.key and low in r.values and high in r.values
    ]
    return Series(
        name=line.name or set_name,
        points=points,
        tone=line.tone or f"t-{index % 5 + 1}",
        band=band,
        dashed=line.dashed,
        marked=bool(set_name),
        smooth=line.smooth and not set_name,
    )


def _log_ratio_charts(records: Records) -> Iterator[Chart]:
    """Change of the chosen and rejected log-prob: on the training steps and on each set."""
    sources = [("train", records.train)] + list(records.evals.items())
    keys = (
        Line("logratios/chosen", "chosen", "t-chosen"),
        Line("logratios/rejected", "rejected", "t-rejected", dashed=True),
    )
    shown, seen = main_set(records), {line.key for line in keys}
    for name, rows in sources:
        is_train = name == "train" and rows is records.train
        yield Chart(
            title=f"Change of log-prob: {name}",
            unit="nats per answer",
            reading="Log-prob under the policy minus under the reference: preferences are learned "
            "by the gap, and healthily when chosen stays near or above 0.",
            series=tuple(_series(key, rows, "" if is_train else name) for key in keys),
            guides=(Guide(0.0, "as the reference"),),
            events=epochs(records.train),
            marks=_marks(records, seen if is_train else set(), seen, [] if is_train else [name]),
            include=(0.0,),
            domain=_domain(records),
            note=displacement_note(rows) if name == shown or (is_train and shown is None) else "",
        )


def _marks(
    records: Records, trained: set[str], evaluated: set[str], sets: Sequence[str]
) -> tuple[Mark, ...]:
    """The warnings that were raised by a line of this chart: of training, or of one of its sets."""
    last = last_step(records) or 0
    return tuple(
        # A step that was refused is not on the curve: the mark stands at its end.
        Mark(float(min(found.step, last)), found.code, found.said)
        for found in records.warnings
        if found.step is not None
        and (found.metric in trained if found.set is None else
             found.metric in evaluated and found.set in sets)
    )  # fmt: skip


def displacement_note(rows: Sequence[Measurement]) -> str:
    """What it means that the chosen answers fell, by the line's end; '' when they did not."""
    points = [(float(r.step), r.values.get("logratios/chosen", math.nan)) for r in rows]
    means = running_mean(points, smoothing_window(len(points)))
    ends = [mean for _, mean in means if math.isfinite(mean)]
    if not ends or ends[-1] >= 0:
        return ""
    return (
        f"Chosen ended {number(-ends[-1])} nats below the reference. The loss only sees the "
        "gap, so it can widen while both fall; what both lose goes to answers that are in no pair "
        "(likelihood displacement)."
    )


def epochs(rows: Sequence[Measurement]) -> tuple[Event, ...]:
    """Where a new pass over the data begins; none when there is one pass or more than ten."""
    starts = [
        Event(float(now.step), f"epoch {math.floor(now.epoch) + 1}")
        for before, now in zip(rows, rows[1:], strict=False)
        if math.floor(now.epoch) > math.floor(before.epoch) and now is not rows[-1]
    ]
    return tuple(starts) if len(starts) <= 9 else ()
