"""Chat templates that write the day's date: the same prompt is then another one tomorrow.

Such a template asks strftime_now, which transformers takes from the clock. A run asks once, and
holds on to the day: what it renders, resumes and exports is of one day.
"""

from __future__ import annotations

import copy
import json
from datetime import date
from typing import TYPE_CHECKING, Any, TypeVar

from upweight.data.variables import template_variables

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
else:
    PreTrainedTokenizerBase = Any

ASKED = "strftime_now"
"""What transformers calls the function that tells a template the time."""

_DIRECTIVES = "aAwdbBmyYHIpMSfjUWGuVcxXDFTRe"
_UNPADDED = "dmyHIMSjUW"

Tokenizer = TypeVar("Tokenizer", bound=PreTrainedTokenizerBase)


def today() -> str:
    """The day on this machine, as 2026-11-29."""
    return date.today().isoformat()


def reads_clock(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's chat template may write what day it is."""
    read = template_variables(tokenizer)
    return ASKED in (str(tokenizer.chat_template) if read is None else read)


def on_day(tokenizer: Tokenizer, day: str) -> Tokenizer:
    """A copy of the tokenizer, for whose chat template it is the first minute of that day.

    A template is given no functions, but a macro of its own comes before a function by that name.
    """
    written = tokenizer.chat_template
    # One line and its end, which the environment takes away: the template begins where it began.
    before = _macro(date.fromisoformat(day)) + "\n"
    same_day = copy.copy(tokenizer)
    same_day.chat_template = (
        {name: before + text for name, text in written.items()}
        if isinstance(written, dict)
        else before + str(written)
    )
    return same_day


def _macro(day: date) -> str:
    """strftime of that day, in the template's own language."""
    # "%%d" is a percent sign and a d: such pairs are set aside first.
    said = [["%%", "\0"]]
    said += [[f"%-{c}", str(day.strftime(f"%{c}")).lstrip("0") or "0"] for c in _UNPADDED]
    said += [[f"%{c}", day.strftime(f"%{c}")] for c in _DIRECTIVES]
    pairs = json.dumps([*said, ["\0", "%"]])
    return (
        f"{{% macro {ASKED}(format) -%}}{{%- set now = namespace(said=format) -%}}"
        f"{{%- for directive, text in {pairs} -%}}"
        "{%- set now.said = now.said.replace(directive, text) -%}{%- endfor -%}"
        "{{- now.said -}}{%- endmacro %}"
    )
