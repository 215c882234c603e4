"""Which keys a command reads. A key that it does not read is refused: it would change nothing."""

from __future__ import annotations

from upweight.config.keys import keys
from upweight.config.resolve import leaf_values
from upweight.config.sections import Data, Run
from upweight.config.written import write
from upweight.errors import ConfigError

_MODEL = ("model", "out", "batch.tokens_per_bin") + tuple(
    f"compute.{name}"
    for name in ("dtype", "device", "attention", "sharing", "threads", "trust_remote_code")
)
_TEXT = ("data.path", "data.limit", "data.template", "data.template_options")
_ROWS = tuple(
    f"data.{name}" for name in ("format", "max_length", "truncation", "pairing", "min_score_gap")
)

READS: dict[str, frozenset[str]] = {
    "train": frozenset(keys()),
    "check": frozenset(keys()),
    "score": frozenset((*_MODEL, *_TEXT, *_ROWS, "reference", "loss.beta")),
    "sample": frozenset(
        (*_MODEL, *_TEXT, "seed", "evaluation.max_new_tokens", "evaluation.temperature")
    ),
}
"""The full names of the keys that each command reads."""


def require_read(command: str, run: Run) -> None:
    """Raises ConfigError with a line for each value that `command` does not read, if it is not
    the default."""
    defaults = leaf_values(Run(model=run.model, data=Data(path=run.data.path)))
    # Any key of the section switches LoRA on, and none of them has a say without it.
    values = leaf_values(run.model_copy(update={"lora": None}))
    values["lora"] = None if run.lora is None else True
    lines: list[str] = []
    for key, value in values.items():
        if key in READS[command] or value == defaults[key]:
            continue
        *others, last = (name for name, read in READS.items() if key in read)
        readers = f"{', '.join(others)} and {last}"
        lines.append(f"{key} is {write(value)}, and {command} does not read it: {readers} do.")
    if command == "score" and run.reference is None and run.loss.beta != defaults["loss.beta"]:
        lines.append(
            f"loss.beta is {write(run.loss.beta)}, and score reads it only with a reference."
        )
    if lines:
        raise ConfigError("\n".join([*lines, "Leave out what is not read."]))
