"""run.yaml, flags and key=value overrides -> one frozen Run, each value with its origin.

sections.py holds the keys, keys.py their names and flags, written.py YAML in and out, settings.py
what was said and where, resolve.py what follows from it, stages.py runs one after the other,
objectives.py and commands.py who reads which key. Nothing here imports torch.
"""

from __future__ import annotations

from upweight.config.base import Section
from upweight.config.commands import READS, require_read
from upweight.config.keys import Flag, called_elsewhere, flags, values_from_flags
from upweight.config.limits import Preflight, Watch
from upweight.config.objectives import OBJECTIVES, default_passes, unread
from upweight.config.resolve import (
    FILLED_IN,
    INHERITED,
    PROBED,
    RESOLVED,
    Resolved,
    dump,
    leaf_values,
    load_run,
)
from upweight.config.rounds import Policy, Rollout
from upweight.config.sections import (
    Batch,
    Checkpoint,
    Compute,
    Data,
    Evaluation,
    Export,
    Lora,
    Loss,
    Optimizer,
    Run,
)
from upweight.config.stages import load_stages
from upweight.config.written import write

__all__ = [
    "Batch",
    "Checkpoint",
    "Compute",
    "Data",
    "Evaluation",
    "Export",
    "Flag",
    "Lora",
    "Loss",
    "FILLED_IN",
    "INHERITED",
    "OBJECTIVES",
    "Optimizer",
    "Policy",
    "Rollout",
    "PROBED",
    "Preflight",
    "READS",
    "RESOLVED",
    "Resolved",
    "Run",
    "Section",
    "Watch",
    "called_elsewhere",
    "default_passes",
    "dump",
    "flags",
    "leaf_values",
    "load_run",
    "load_stages",
    "require_read",
    "unread",
    "values_from_flags",
    "write",
]
