"""Read a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from upweight.errors import DataError
from upweight.evidence.records.ledger import read_ledger
from upweight.evidence.records.nouns import (
    Comparison,
    ComparisonRow,
    Measurement,
    Records,
    Sample,
    SetAccount,
    Suspected,
    Warned,
)
from upweight.evidence.records.objects import JsonObject, json_file, json_lines
from upweight.evidence.records.settings import read_settings

_WITHOUT = {
    "run.yaml": "the config is not shown",
    "account.json": "it is not known how many rows were read, used and dropped",
    "environment.json": "versions and hardware are not shown",
    "metrics.jsonl": "there are no curves yet",
    "ledger.parquet": "single preferences are not shown",
    "samples.jsonl": "there are no sampled answers",
}


_WRITTEN_FOR = {
    "ledger.parquet": ("dpo",),
    "samples.jsonl": ("dpo", "sft", "online_dpo", "ppo", "grpo", "rloo"),
}
"""The objectives that write a record which not all of them do."""


def read_records(run_dir: Path) -> Records:
    """Read a run directory, finished or not.

    Raises DataError when the folder does not exist or holds no record at all, and when a record
    is malformed: it names the file and, where there is one, the line.
    """
    if not run_dir.is_dir():
        raise DataError(f"{run_dir} is not a folder. Give the folder that a run wrote (its `out`).")
    missing = [name for name in _WITHOUT if not (run_dir / name).is_file()]
    if len(missing) == len(_WITHOUT):
        raise DataError(
            f"{run_dir} holds no run: it has none of {', '.join(_WITHOUT)}. "
            "Give the folder that a run wrote (its `out`)."
        )
    settings = read_settings(run_dir / "run.yaml")
    objective = next((s.value for s in settings if s.key == "objective"), "dpo")
    expected = [name for name in missing if objective in _WRITTEN_FOR.get(name, (objective,))]
    notes = [f"{name} is missing: {_WITHOUT[name]}." for name in expected]
    train, evals, during = _measurements(run_dir / "metrics.jsonl", notes)
    accounts, template, before = _accounts(run_dir / "account.json")
    environment = json_file(run_dir / "environment.json")
    return Records(
        name=run_dir.resolve().name,
        train=train,
        evals=evals,
        ledger=read_ledger(run_dir / "ledger.parquet"),
        samples=tuple(map(_sample, json_lines(run_dir / "samples.jsonl", notes))),
        suspects=tuple(map(_suspected, json_lines(run_dir / "suspects.jsonl", notes))),
        accounts=accounts,
        template=template,
        warnings=(*before, *during),
        settings=settings,
        environment=environment.fields if environment else {},
        comparison=_comparison(run_dir / "evaluation.json"),
        notes=tuple(notes),
    )


def _measurements(
    path: Path, notes: list[str]
) -> tuple[tuple[Measurement, ...], dict[str, tuple[Measurement, ...]], list[Warned]]:
    train: list[Measurement] = []
    evals: dict[str, list[Measurement]] = {}
    warned: dict[tuple[object, ...], Warned] = {}
    num_replaced, unknown = 0, dict[str, int]()
    for line in json_lines(path, notes):
        kind = line.text("kind")
        if kind == "warning":
            found = _warned(line, line.whole("step"))
            # A run that was resumed looks anew.
            said = (found.code, found.metric, found.set, line.fields.get("observer"))
            warned.setdefault(said, found)
            continue
        if kind not in ("train", "eval"):
            unknown[kind] = unknown.get(kind, 0) + 1
            continue
        measured = _measurement(line, line.text("set") if kind == "eval" else None)
        if measured.set is None:
            # A run that was resumed from a checkpoint repeats the steps since then.
            if train and measured.step <= train[-1].step:
                for rows in (train, *evals.values()):
                    num_replaced += _rewind(rows, measured.step)
            train.append(measured)
        else:
            rows = evals.setdefault(measured.set, [])
            num_replaced += _rewind(rows, measured.step)
            rows.append(measured)
    if num_replaced:
        notes.append(
            f"The run was resumed: lines of {path.name} that were written again later "
            f"({num_replaced}) are shown as they were written last."
        )
    for kind, count in unknown.items():
        notes.append(f'{path.name}: lines of kind "{kind}" are not shown ({count}).')
    shown = {name: tuple(rows) for name, rows in evals.items() if rows}
    return tuple(train), shown, list(warned.values())


def _warned(line: JsonObject, step: int | None = None) -> Warned:
    rows = line.fields.get("rows", [])
    if not isinstance(rows, list) or not all(isinstance(row, str) for row in rows):
        raise line.wrong("rows", "a list of rows")
    return Warned(
        line.text("code"),
        line.text("said"),
        tuple(cast("list[str]", rows)),
        step,
        line.text("metric") if "metric" in line.fields else "",
        line.text("set") if "set" in line.fields else None,
        line.fields.get("refused") is True,
    )


def _measurement(line: JsonObject, set_name: str | None) -> Measurement:
    rest = {k: v for k, v in line.fields.items() if k not in ("step", "epoch", "kind", "set")}
    return Measurement(
        step=line.whole("step"),
        epoch=line.number("epoch"),
        set=set_name,
        values=JsonObject(rest, line.where).numbers(),
    )


def _rewind(rows: list[Measurement], step: int) -> int:
    before = len(rows)
    while rows and rows[-1].step >= step:
        rows.pop()
    return before - len(rows)


def _sample(line: JsonObject) -> Sample:
    def optional_whole(key: str) -> int | None:
        return None if line.fields.get(key) is None else line.whole(key)

    def optional_number(key: str) -> float | None:
        return None if line.fields.get(key) is None else line.number(key)

    return Sample(
        step=line.whole("step"),
        set=line.text("set"),
        prompt=line.text("prompt"),
        policy=line.text("policy"),
        reference=line.text("reference"),
        policy_tokens=optional_whole("policy_tokens"),
        reference_tokens=optional_whole("reference_tokens"),
        policy_logp=optional_number("policy_logp"),
        policy_reference_logp=optional_number("policy_reference_logp"),
    )


def _suspected(line: JsonObject) -> Suspected:
    return Suspected(
        set=line.text("set"),
        row=line.text("row"),
        prompt=line.text("prompt"),
        chosen=line.text("chosen"),
        rejected=line.text("rejected"),
        margin=line.number("margin"),
        odds_model=line.number("odds_model"),
        odds_words=line.number("odds_words"),
        why=line.text("why"),
    )


def _accounts(path: Path) -> tuple[dict[str, SetAccount], str | None, list[Warned]]:
    whole = json_file(path)
    if whole is None:
        return {}, None, []
    sets = whole.object("sets")
    template = whole.text("template") if whole.fields.get("template") is not None else None
    findings = whole.objects("findings") if "findings" in whole.fields else ()
    accounts = {name: _account(sets.object(name)) for name in sets.fields}
    return accounts, template, [_warned(finding) for finding in findings]


def _account(entry: JsonObject) -> SetAccount:
    examples = entry.object("examples")
    lengths = entry.object("lengths")
    return SetAccount(
        read=entry.whole("read"),
        used=entry.whole("used"),
        dropped=entry.object("dropped").wholes(),
        examples={reason: _example_rows(examples, reason) for reason in examples.fields},
        truncated=entry.object("truncated").wholes(),
        appended_stop=entry.whole("appended_stop"),
        preferences=entry.whole("preferences"),
        responses=entry.whole("responses"),
        lengths={part: lengths.object(part).numbers() for part in lengths.fields},
        left_out=entry.object("left_out").wholes() if "left_out" in entry.fields else {},
    )


def _example_rows(examples: JsonObject, reason: str) -> tuple[tuple[str, str], ...]:
    rows = examples.fields[reason]
    found: list[tuple[str, str]] = []
    for pair in cast("list[object]", rows) if isinstance(rows, list) else [rows]:
        match pair:
            case [str(row), str(detail)]:
                found.append((row, detail))
            case _:
                raise examples.wrong(reason, "a list of [row, detail]")
    return tuple(found)


def _comparison(path: Path) -> Comparison | None:
    whole = json_file(path)
    if whole is None:
        return None
    rows = tuple(
        ComparisonRow(r.text("name"), r.text("reference"), r.text("policy"), r.text("note"))
        for r in whole.objects("rows")
    )
    return Comparison(whole.text("title"), rows)
