"""Run directory -> report.html: one page that loads nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from upweight.evidence.records import Records, read_records
from upweight.evidence.report.document import document, write_page
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
    return write_page(run_dir / "report.html", page, f"run upweight report {run_dir}")


def render(records: Records) -> str:
    """The whole page."""
    made = [(title, make(records)) for title, make in SECTIONS]
    version = str(records.environment.get("upweight") or "")
    return document(f"{records.name} · upweight report", masthead(records), made, version)
