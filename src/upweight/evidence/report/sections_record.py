"""What was trained on, with what settings, where: rows, config, environment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import cast

from upweight.evidence.records import Records, SetAccount, Setting
from upweight.evidence.report.charts import anchor
from upweight.evidence.report.findings import subject
from upweight.evidence.report.markup import (
    count,
    details,
    duration,
    esc,
    number,
    percent,
    plural,
    reading,
    table,
)

_PERCENTILES = ("p50", "p90", "p99", "max")


def warnings(records: Records) -> str:
    """What was suspicious before step 1 and during training, with its code; '' for nothing."""
    if not records.warnings:
        return ""
    # A chart's mark leads to the first line of its code.
    marked = {f.code: f for f in reversed(records.warnings) if f.step is not None}
    lines = [
        (
            f'<code id="{anchor(found.code)}">{esc(found.code)}</code>'
            if found is marked.get(found.code)
            else f"<code>{esc(found.code)}</code>",
            "before step 1"
            if found.step is None
            else f"step {count(found.step)}" + (", and ended the run" if found.refused else ""),
            f"<bdi>{esc(found.said.removeprefix(f'step {found.step}: '))}</bdi>"
            + (f" Rows: <bdi>{esc(', '.join(found.rows))}</bdi>." if found.rows else ""),
        )
        for found in records.warnings
    ]
    return table(("Code", "When", "What was seen"), lines, "warnings") + reading(
        "Each may have a harmless reason; upweight explain CODE says what it means, how it is "
        "found and what to do. What was seen during training is marked on its curve."
    )


def rows(records: Records) -> str:
    """The account of every set's rows, and the lengths of what is left."""
    if not records.accounts:
        return '<p class="empty">account.json is not there: the rows are not accounted for.</p>'
    accounts = records.accounts
    head = ("Set", "Read", "Used", "Dropped", "Prompts cut", "Responses cut", "Stop added")
    head += ("Responses", "Left out", "Preferences")
    lines = [_account_line(name, account) for name, account in accounts.items()]
    # Prompts alone have no responses; what is imitated is not compared.
    gone = {"Preferences"} if subject(records) == "likelihood" else set[str]()
    gone |= {t for i, t in enumerate(head) if i > 6 and {line[i] for line in lines} == {count(0)}}
    kept = [i for i, title in enumerate(head) if title not in gone]
    head, lines = [head[i] for i in kept], [tuple(line[i] for i in kept) for line in lines]
    template = ""
    if records.template is not None:
        template = f'<p class="remark">Template: <code>{esc(records.template)}</code>.</p>'
    return (
        "".join(_bar(name, account) for name, account in accounts.items())
        + table(head, lines, "numbers")
        + reading(
            "Every row that was read was either used or dropped for a reason; cut counts "
            "responses that lost tokens to max_length, on the prompt's or the response's side; "
            "stop added counts responses that lacked their stop token."
            + (" Left out are responses of used rows." if "Left out" in head else "")
        )
        + template
        + "".join(_mismatch(name, account) for name, account in accounts.items())
        + _dropped(accounts.items())
        + _left_out(accounts)
        + _lengths(accounts.items())
    )


def _account_line(name: str, account: SetAccount) -> tuple[str, ...]:
    numbers = (
        account.read,
        account.used,
        sum(account.dropped.values()),
        account.truncated.get("prompt", 0),
        account.truncated.get("response", 0),
        account.appended_stop,
        account.responses,
        sum(account.left_out.values()),
        account.preferences,
    )
    return (f"<bdi>{esc(name)}</bdi>", *map(count, numbers))


def _bar(name: str, account: SetAccount) -> str:
    if not account.read:
        return ""
    used = account.used / account.read
    return (
        f'<p class="rowbar"><span><bdi>{esc(name)}</bdi>: {count(account.used)} of '
        f'{plural(account.read, "row")} used</span><i><b style="width:{100 * used:.2f}%"></b></i>'
        f"<span>{percent(used)}</span></p>"
    )


def _mismatch(name: str, account: SetAccount) -> str:
    dropped = sum(account.dropped.values())
    if account.read == account.used + dropped:
        return ""
    return (
        f'<p class="remark alarm">The rows of <bdi>{esc(name)}</bdi> do not add up: '
        f"{count(account.read)} read, {count(account.used)} used, {count(dropped)} dropped.</p>"
    )


def _dropped(accounts: Iterable[tuple[str, SetAccount]]) -> str:
    lines: list[tuple[str, ...]] = []
    for name, account in accounts:
        for reason, n in sorted(account.dropped.items(), key=lambda item: -item[1]):
            examples = "".join(
                f'<li dir="auto"><code><bdi>{esc(row)}</bdi></code> {esc(detail)}</li>'
                for row, detail in account.examples.get(reason, ())
            )
            shown = f'<ul class="examples">{examples}</ul>' if examples else "–"
            share = percent(n / account.read) if account.read else "–"
            lines.append((esc(reason), f"<bdi>{esc(name)}</bdi>", count(n), share, shown))
    if not lines:
        return '<p class="empty">No row was dropped.</p>'
    return (
        "<h3>Dropped rows</h3>"
        + table(("Reason", "Set", "Rows", "Share", "Examples"), lines, "dropped")
        + reading(
            "Why rows were not used, the most frequent reason first, with up to five of each."
        )
    )


def _left_out(accounts: Mapping[str, SetAccount]) -> str:
    said = [
        f"{name}: " + ", ".join(f"{count(n)} {reason}" for reason, n in account.left_out.items())
        for name, account in accounts.items()
        if account.left_out
    ]
    return f'<p class="remark">Responses left out, {esc("; ".join(said))}.</p>' if said else ""


def _lengths(accounts: Iterable[tuple[str, SetAccount]]) -> str:
    lines = [
        (
            f"<bdi>{esc(name)}</bdi>, {esc(part)}",
            *(_tokens(values[p]) if p in values else "–" for p in _PERCENTILES),
        )
        for name, account in accounts
        for part, values in account.lengths.items()
        if values
    ]
    if not lines:
        return ""
    return (
        "<h3>Lengths in tokens</h3>"
        + table(("Part", "Median", "90 %", "99 %", "Longest"), lines, "numbers")
        + reading(
            "Half of the texts are at most as long as the median, 90 % as the next, and so on."
        )
    )


def _tokens(value: float) -> str:
    return count(int(value)) if value.is_integer() else number(value, 4)


def config(records: Records) -> str:
    """run.yaml by origin: what was asked for first, then what was worked out, then defaults."""
    if not records.settings:
        return '<p class="empty">run.yaml is not there: the config is not known.</p>'
    asked = [s for s in records.settings if _origin(s) not in ("default", *WORKED_OUT)]
    resolved = [s for s in records.settings if _origin(s) in WORKED_OUT]
    defaults = [s for s in records.settings if _origin(s) == "default"]
    return (
        _settings("Asked for", asked, "asked")
        + _settings("Worked out by upweight", resolved, "")
        + reading(
            "Each value with where it came from: a file, a flag, an override, Python, worked out "
            "from the data and the machine (resolved), or the default. run.yaml repeats this run."
        )
        + (
            details(plural(len(defaults), "default"), _settings("", defaults, ""), "fold")
            if defaults
            else ""
        )
    )


WORKED_OUT = ("resolved", "inherited", "found")
"""The first words of origins that nobody typed: of the recipe, of the model, of a probe."""


def _origin(setting: Setting) -> str:
    return setting.origin.split(maxsplit=1)[0].rstrip(":,;") if setting.origin else ""


def _settings(title: str, settings: Sequence[Setting], kind: str) -> str:
    if not settings:
        return ""
    lines = [
        (
            f"<code>{esc(s.key)}</code>",
            _config_value(s.value),
            f'<span dir="auto">{esc(s.origin)}</span>',
        )
        for s in settings
    ]
    heading = f"<h3>{esc(title)}</h3>" if title else ""
    return heading + table(("Key", "Value", "Origin"), lines, f"settings {kind}")


def _config_value(value: str) -> str:
    if value in ("", "~", "null"):
        return '<span class="none">none</span>'
    return f'<code dir="auto">{esc(value)}</code>'


def environment(records: Records) -> str:
    """Versions, hardware and fingerprints."""
    if not records.environment:
        return '<p class="empty">environment.json is not there: versions are not known.</p>'
    entries = dict(records.environment)
    seconds = _seconds_between(entries.get("started"), entries.get("finished"))
    if seconds is not None:
        entries["duration"] = duration(seconds)
    lines = [
        (esc(key.replace("_", " ")), f'<code dir="auto">{esc(_shown(value))}</code>')
        for key, value in entries.items()
    ]
    return table(("What", "Value"), lines, "environment") + reading(
        "What to have alike to repeat the run; a fingerprint changes when any weight or row does."
    )


def _shown(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        entries = cast("Mapping[str, object]", value)
        return ", ".join(f"{name} {digest}" for name, digest in entries.items()) or "none"
    return str(value)


def _seconds_between(started: object, finished: object) -> float | None:
    try:
        begin, end = datetime.fromisoformat(str(started)), datetime.fromisoformat(str(finished))
        seconds = (end - begin).total_seconds()
    except (ValueError, TypeError):
        # Not a time, or one with a zone and one without.
        return None
    return seconds if seconds >= 0 else None
