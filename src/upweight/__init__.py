"""upweight: align language models with preferences by Direct Preference Optimization.

`uw.train`, `uw.check`, `uw.score` and `uw.sample` live in api.py, which is imported at their first
use: `upweight --help` has no time for torch.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upweight.api import check, sample, score, train

__version__ = version("upweight")
__all__ = ["check", "sample", "score", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("upweight.api"), name)
    raise AttributeError(f"module 'upweight' has no attribute {name!r}")
