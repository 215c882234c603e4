"""environment.json: on what, with what and from what a run was made."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import platform
import sys
from typing import Any

import torch
import transformers

from upweight.config import Run
from upweight.models.compiled import is_compiled
from upweight.recipes.resume import data_digests
from upweight.recipes.state import State
from upweight.training.rundir import write_atomic


def write_environment(state: State, *, finished: bool) -> None:
    """A run that is resumed keeps the time at which it was started first."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    path = state.rundir.file("environment.json")
    started = now
    if path.exists():
        with contextlib.suppress(ValueError, KeyError):
            started = json.loads(path.read_text())["started"]
    lm, against = state.lm, state.against
    record: dict[str, Any] = {
        "upweight": importlib.metadata.version("upweight"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": importlib.metadata.version("peft"),
        "platform": platform.platform(),
        "cpu": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if lm.device.type == "cuda" else None,
        "model": lm.name,
        "model_fingerprint": against.model_fingerprint,
        "reference_fingerprint": against.logps.fingerprint,
        "data_fingerprint": _data_fingerprint(state.run),
        "data_digests": data_digests(state.begun.prepared),
        "reward_digests": state.reward_digests,
        "dtype": str(lm.compute_dtype).removeprefix("torch."),
        "attention": lm.plan.attention,
        "compiled": is_compiled(lm),
        "sharing": lm.plan.describe(),
        "started": started,
        "finished": now if finished else None,
        "command": " ".join(sys.argv),
    }
    write_atomic(path, json.dumps(record, indent=1))


def _data_fingerprint(run: Run) -> str:
    """sha256 of the bytes of all data files, one after the other."""
    digest = hashlib.sha256()
    sets = (file for files in run.evaluation.sets.values() for file in files)
    for file in [*run.data.path, *sets, *(run.evaluation.prompt_files or [])]:
        with contextlib.suppress(OSError), open(file, "rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
