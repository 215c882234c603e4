"""Methods held against each other: comparison.json -> comparison.html, and what it supports."""

from __future__ import annotations

from upweight.evidence.comparison.claim import claim
from upweight.evidence.comparison.nouns import Claim, Method, Pair, Point, Start, Study
from upweight.evidence.comparison.page import render, write_comparison
from upweight.evidence.comparison.read import read_study

__all__ = [
    "Claim",
    "Method",
    "Pair",
    "Point",
    "Start",
    "Study",
    "claim",
    "read_study",
    "render",
    "write_comparison",
]
