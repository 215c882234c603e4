"""Methods held against each other: comparison.json -> comparison.html, and what it supports."""

from __future__ import annotations

from upweight.evidence.comparison.claim import claim
from upweight.evidence.comparison.nouns import (
    ROWS,
    Claim,
    Method,
    Noticed,
    Pair,
    Point,
    Start,
    Study,
    Taught,
)
from upweight.evidence.comparison.page import render, write_comparison
from upweight.evidence.comparison.read import read_method, read_study
from upweight.evidence.comparison.said import in_short

__all__ = [
    "ROWS",
    "Claim",
    "Method",
    "Noticed",
    "Pair",
    "Point",
    "Start",
    "Study",
    "Taught",
    "claim",
    "in_short",
    "read_method",
    "read_study",
    "render",
    "write_comparison",
]
