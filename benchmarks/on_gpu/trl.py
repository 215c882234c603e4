"""TRL itself on the same rows, in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from environment import FOLDER as TRL_FOLDER
from on_gpu.cells import FULL, NO_TIME, TRL, Budget, Case, Cell, blank, halves
from on_gpu.models import words
from on_gpu.sides import BETA, LEARNING_RATE
from protocol import Spec, WorkerError, named, run


def trl_python() -> Path | None:
    """An interpreter that has TRL: its own environment's, or this one. None is installed here."""
    own = TRL_FOLDER / "bin/python"
    if own.exists():
        return own
    return Path(sys.executable) if importlib.util.find_spec("trl") is not None else None


def time_trl(case: Case, folder: Path, at_once: int, device: str, budget: Budget) -> Cell:
    """TRL on the same rows in a process of its own: three steps, which nothing cuts short."""
    cell = blank(case, TRL, "sdpa")
    python, until = trl_python(), budget.take()
    if python is None or until is None:
        cell.note = "TRL is not installed" if python is None else NO_TIME
        return cell
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in as_text(case)))
    spec = Spec(
        task="train",
        model=str(folder),
        rows=str(rows),
        steps=3,
        pairs_per_step=len(case.trees),
        precision="bfloat16",
        lora=case.size.lora,
        beta=BETA,
        learning_rate=LEARNING_RATE,
    )
    plain = {"gradient_checkpointing": False, "precompute_ref_log_probs": True}
    for size in halves(max(1, at_once), 1):
        own = {**plain, "use_cpu": device == "cpu", "per_device_train_batch_size": size}
        cell.at_once = size * case.row
        try:
            events = run(python, "trl_worker.py", replace(spec, settings=own))
        except WorkerError as error:
            cell.note = f"{FULL} at {size}" if FULL in error.said.lower() else str(error)[:100]
            if cell.note.startswith(FULL):
                continue
            print(error.said, file=sys.stderr)
            cell.failed = True
        else:
            cell.seconds = [step["seconds"] for step in named(events, "step")]
            cell.note = ""
        break
    return cell


def as_text(case: Case) -> Iterator[dict[str, str]]:
    """The trees as TRL reads rows: words that the saved tokenizer makes the same ids of."""
    name = words(case.size.config["vocab_size"]).convert_ids_to_tokens
    for tree in case.trees:
        prompt, chosen, rejected = (" ".join(name(list(x))) for x in (tree.prompt, *tree.responses))
        yield {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}
