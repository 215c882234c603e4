"""The variables that a chat template reads: a value for another one would change nothing."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import meta

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
else:
    PreTrainedTokenizerBase = Any

# transformers' own tag, which marks what the assistant says: it reads nothing.
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


def template_variables(tokenizer: PreTrainedTokenizerBase) -> frozenset[str] | None:
    """The names that the tokenizer's chat templates look up, or None where they cannot be known."""
    written = tokenizer.chat_template
    templates = list(written.values()) if isinstance(written, dict) else [written or ""]
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do"])
    try:
        parsed = [environment.parse(_GENERATION.sub("", str(t))) for t in templates]
    except jinja2.TemplateSyntaxError:
        return None
    return frozenset(name for tree in parsed for name in meta.find_undeclared_variables(tree))
