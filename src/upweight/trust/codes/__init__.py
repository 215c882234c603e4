"""The diagnosis codes: what each means, how it is found, what to do. Imports no torch.

One file per family. A code's page stands beside the function that detects it, and the page names
that function in `detectors`, as it does where the check lies in another wing.
"""

from __future__ import annotations

import os.path
import re

from upweight.errors import UpweightError
from upweight.trust.codes import uw1xx, uw2xx, uw2xx_rows, uw3xx, uw4xx
from upweight.trust.codes.page import (
    Family,
    Page,
    as_markdown,
    as_text,
    effect,
    list_as_markdown,
    list_as_text,
)

__all__ = [
    "CODES",
    "FAMILIES",
    "Family",
    "Page",
    "as_markdown",
    "as_text",
    "effect",
    "list_as_markdown",
    "list_as_text",
    "page",
]

FAMILIES: tuple[Family, ...] = (
    Family("UW1", "Reference and numerics", uw1xx.PAGES),
    Family("UW2", "Rows and tokens", (*uw2xx.PAGES, *uw2xx_rows.PAGES)),
    Family("UW3", "Training", uw3xx.PAGES),
    Family("UW4", "Export", uw4xx.PAGES),
)
"""In the order of a run."""

CODES: dict[str, Page] = {found.code: found for family in FAMILIES for found in family.pages}


def page(code: str) -> Page:
    """The page of a code, in capitals or not, or of its number alone. Raises UpweightError for an
    unknown one."""
    found = CODES.get("UW" + code.strip().upper().removeprefix("UW"))
    if found is None:
        raise UpweightError(
            f"{code} is not a diagnosis code.{_guess(code)} The codes are: {', '.join(CODES)}."
        )
    return found


def _guess(typed: str) -> str:
    """' Did you mean X?' for the code that shares most leading digits, then the nearest number."""
    digits = re.sub(r"\D", "", typed)[:3]
    if not digits:
        return ""

    def distance(code: str) -> tuple[int, int]:
        shared = len(os.path.commonprefix([digits, code[2:]]))
        return -shared, abs(int(digits) - int(code[2:]))

    return f" Did you mean {min(CODES, key=distance)}?"
