"""The report: pure functions of a run directory's records, put together into one page."""

from __future__ import annotations

from upweight.evidence.report.page import SECTIONS, render, write_report

__all__ = ["SECTIONS", "render", "write_report"]
