"""How a run's rows become the model's tokens: its settings, held against the model's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from upweight.config import Run, write
from upweight.data.clock import reads_clock
from upweight.data.columns import printable
from upweight.data.render import Renderer, make_renderer
from upweight.data.variables import template_variables
from upweight.errors import ConfigError, Refusal, nearest, some_of
from upweight.models.load import LanguageModel
from upweight.recipes.exported import day_of_export
from upweight.types import Example


def renderer_for(run: Run, lm: LanguageModel) -> Renderer:
    """A template that writes the date writes data.date, or the day that the model was trained on
    before, or today's.

    Raises ConfigError for more tokens than the model has positions, Refusal UW109 for template
    options or a date that nothing reads.
    """
    asked = run.data.max_length
    if asked is not None and lm.max_length is not None and asked > lm.max_length:
        raise ConfigError(
            f"data.max_length is {asked:,}, and {lm.name} was made for {lm.max_length:,} positions "
            f"at most. Use data.max_length={lm.max_length}, or leave it out."
        )
    day = run.data.date
    if day is None and run.data.template != "none" and reads_clock(lm.tokenizer):
        day = day_of_export(run.model)
    renderer = make_renderer(
        lm.tokenizer,
        template=run.data.template,
        stop_token_ids=lm.stop_token_ids,
        max_length=lm.max_length if asked is None else asked,
        truncation=run.data.truncation,
        template_options=run.data.template_options,
        date=day,
    )
    _require_template_reads(run.data.template_options, renderer)
    if run.data.date is not None and renderer.date is None:
        chat = renderer.template == "chat"
        who = "the model's chat template writes no date" if chat else "no chat template is used"
        raise Refusal("UW109", f"data.date is {write(run.data.date)}, and {who}. Leave it out.")
    return renderer


def _require_template_reads(options: Mapping[str, Any], renderer: Renderer) -> None:
    chat = renderer.template == "chat"
    read = template_variables(renderer.tokenizer) if chat else frozenset[str]()
    for name in () if read is None else options.keys() - read:
        who = "the model's chat template does" if chat else "text without a chat template can"
        raise Refusal(
            "UW109",
            f"data.template_options.{name} is {write(options[name])}, and {who} not read it."
            f"{nearest(name, read or ())} Leave it out.",
        )


def require_rows_read(examples: Sequence[Example], renderer: Renderer) -> None:
    """Raises Refusal UW109 for a variable of the rows' own that the chat template never looks up,
    with the rows that set it."""
    chat = renderer.template == "chat"
    read = template_variables(renderer.tokenizer) if chat else frozenset[str]()
    if read is None:
        return
    by_name: dict[str, list[str]] = {}
    for example in examples:
        for name in (example.template_options or {}).keys() - read:
            by_name.setdefault(name, []).append(str(example.row))
    for name, rows in by_name.items():
        who = "the model's chat template does" if chat else "text without a chat template can"
        raise Refusal(
            "UW109",
            f"template_options.{printable(name)} is set by rows of their own, and {who} not read "
            f"it.{nearest(printable(name), read)} Leave it out. Rows: {some_of(rows, 5)}.",
        )
