"""The README.md of an exported model: what it is, how it was made, and how it is loaded."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from upweight import __version__
from upweight.config import Run
from upweight.models.probes import FILE as PROBES_FILE
from upweight.recipes.kinds import KINDS
from upweight.training.rundir import write_atomic

CARD = "README.md"

ADAPTER = "adapter_config.json"


def write_card(folder: Path, run: Run, steps: int, day: str | None) -> None:
    """Takes the place of the blank form that peft leaves beside an adapter."""
    write_atomic(folder / CARD, card(folder.resolve(), run, steps, day))


def card(folder: Path, run: Run, steps: int, day: str | None = None) -> str:
    """In Markdown, with the fields that a hub reads. A model that lies on this machine is called by
    the end of its path: the rest means nothing elsewhere. `day` is the one that the chat template
    wrote in training."""
    is_adapter = (folder / ADAPTER).is_file()
    model = run.model if _is_hub_id(run.model) else _end(Path(run.model))
    fields = [
        f"library_name: {'peft' if is_adapter else 'transformers'}",
        *([f"base_model: {run.model}"] if _is_hub_id(run.model) else []),
        f"tags: [upweight, {run.objective}{', lora' if is_adapter else ''}]",
    ]
    answers = KINDS[run.objective].answers
    kind = "AutoModelForCausalLM" if answers else "AutoModelForSequenceClassification"
    facts = {
        "objective": run.objective,
        "data": ", ".join(Path(name).name for name in run.data.path),
        "steps": f"{steps:,}",
        "date in the prompts": day,
        "learning rate": f"{run.optimizer.learning_rate:g}",
        "beta": f"{run.loss.beta:g}" if answers and run.objective != "sft" else None,
        "reward": _shown(run.rollout.reward),
    }
    check = f"`upweight check --model FOLDER` says whether a copy is still this ({PROBES_FILE})."
    today = datetime.datetime.now(datetime.UTC).date()
    what = "An adapter (LoRA) of" if is_adapter else "Trained from"
    return "\n".join(
        [
            *("---", *fields, "---", ""),
            *(f"# {folder.parent.name}", ""),
            *(f"{what} `{model}`, made by upweight {__version__} on {today}.", ""),
            *_table({name: fact for name, fact in facts.items() if fact is not None}),
            "",
            "All settings are in the run's run.yaml, what came of it in its report.html.",
            *("", "```python", f"from transformers import {kind}", ""),
            *(f'model = {kind}.from_pretrained("FOLDER")', "```"),
            *(["", check] if answers else []),
            "",
        ]
    )


def _shown(reward: str | None) -> str | None:
    return None if reward is None else Path(reward).name if Path(reward).exists() else reward


def _end(path: Path) -> str:
    """The folder's name; of an exported model's, which are all called alike, its run's too."""
    return "/".join(path.absolute().parts[-2:]) if path.name == "model" else path.name


def _is_hub_id(name: str) -> bool:
    return not Path(name).expanduser().exists() and name.count("/") <= 1


def _table(facts: dict[str, str]) -> Sequence[str]:
    escaped = {name: fact.replace("|", "\\|") for name, fact in facts.items()}
    return ["| | |", "|---|---|", *(f"| {name} | {fact} |" for name, fact in escaped.items())]
