"""Run directory -> report.html: one page that loads nothing."""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from upweight.errors import OutputError
from upweight.evidence.records import Records, read_records
from upweight.evidence.report.markup import esc
from upweight.evidence.report.sections_curves import curves
from upweight.evidence.report.sections_examples import labels, preferences, samples
from upweight.evidence.report.sections_frontier import reward_against_kl
from upweight.evidence.report.sections_numbers import comparison, key_numbers
from upweight.evidence.report.sections_record import config, environment, rows, warnings
from upweight.evidence.report.verdict import masthead

SECTIONS: tuple[tuple[str, Callable[[Records], str]], ...] = (
    ("Warnings", warnings),
    ("Before and after", comparison),
    ("Key numbers", key_numbers),
    ("Reward against KL", reward_against_kl),
    ("Curves", curves),
    ("Samples", samples),
    ("Preferences", preferences),
    ("Labels to review", labels),
    ("Rows", rows),
    ("Config", config),
    ("Environment", environment),
)
"""Title and function of the records, in page order. A section that gives '' is left out."""


def write_report(run_dir: Path) -> Path:
    """Build report.html of the run directory, finished or not, and return its path.

    The page is written whole or not at all. Raises DataError when a record is malformed and
    OutputError when the page cannot be written.
    """
    page = render(read_records(run_dir))
    target = run_dir / "report.html"
    temporary = run_dir / f".tmp-report.html.{secrets.token_hex(4)}"
    try:
        with temporary.open("wb") as file:
            file.write(page.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise OutputError(
            f"{target} cannot be written: {error.strerror}. Free some space, or give yourself "
            f"permission to write there, then run upweight report {run_dir}."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return target


def render(records: Records) -> str:
    """The whole page. A content security policy forbids every load and every script but ours."""
    style, script = _asset("style.css"), _asset("script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
        f"script-src 'sha256-{digest}'"
    )
    shown = [(title, body) for title, make in SECTIONS if (body := make(records))]
    links = "".join(f'<a href="#{_anchor(title)}">{esc(title)}</a>' for title, _ in shown)
    sections = "".join(
        f'<section id="{_anchor(title)}"><h2>{esc(title)}</h2>{body}</section>'
        for title, body in shown
    )
    version = str(records.environment.get("upweight") or "")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{esc(records.name)} · upweight report</title><style>{style}</style></head>"
        f'<body>{masthead(records)}<nav aria-label="Sections">{links}</nav>'
        f"<main>{sections}</main><footer>upweight {esc(version)}</footer>"
        f"<script>{script}</script></body></html>\n"
    )


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _asset(name: str) -> str:
    return files("upweight.evidence.report").joinpath(name).read_text(encoding="utf-8")
