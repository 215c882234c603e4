"""Straight lines that wire the wings: one function per thing a user asks for.

Each lives in a file that is imported at its first use: what can be refused without a model has no
time for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upweight.recipes.score import sample_file, score_file
    from upweight.recipes.stages import check_stages, train_stages
    from upweight.recipes.train import Result, train_model

__all__ = [
    "Result",
    "check_stages",
    "sample_file",
    "score_file",
    "train_model",
    "train_stages",
]

_FILES = {
    "Result": "train",
    "check_stages": "stages",
    "sample_file": "score",
    "score_file": "score",
    "train_model": "train",
    "train_stages": "stages",
}


def __getattr__(name: str) -> Any:
    if name in _FILES:
        return getattr(importlib.import_module(f"upweight.recipes.{_FILES[name]}"), name)
    raise AttributeError(f"module 'upweight.recipes' has no attribute {name!r}")
