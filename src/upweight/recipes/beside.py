"""What a run holds in memory and on the disk beside the policy: other models, and copies."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from upweight.config import Run
from upweight.models.load import LanguageModel
from upweight.models.nf4 import num_weights
from upweight.recipes.kinds import KINDS
from upweight.recipes.rewarding import is_judge
from upweight.training.optimizer import MOMENT_BYTES
from upweight.training.rundir import require_space


def has_own_critic(run: Run) -> bool:
    """Whether a value model with a trunk of its own is trained beside the policy."""
    return run.objective == "ppo" and run.policy.value == "own"


def held_beside(run: Run, lm: LanguageModel) -> dict[str, int]:
    """Bytes of what is in memory beside the policy `lm` as it is trained, by what it is.

    A value model of its own is as large as the policy, and trained alike.
    """
    weights, trained = (_bytes(p) for p in (lm.model.parameters(), _trained(lm.model)))
    held: dict[str, int] = {}
    if has_own_critic(run):
        moments = (
            2 * MOMENT_BYTES[run.optimizer.moments] * sum(p.numel() for p in _trained(lm.model))
        )
        held["value model"] = weights + trained + moments
    if KINDS[run.objective].draws and run.reference is None:
        held["reference's copy"] = trained
    specs = {run.rollout.reward, run.evaluation.true_reward}
    if judges := [spec for spec in specs if spec is not None and is_judge(spec)]:
        held["reward model" if len(judges) == 1 else "reward models"] = sum(map(_in_fp32, judges))
    return held


def require_room(run: Run, lm: LanguageModel, out: Path) -> None:
    """Raises OutputError where the disk has no room for the result and the checkpoints: the trained
    weights and AdamW's two moments, in each that is kept and the one that is being written."""
    trained = _bytes(_trained(lm.model))
    models = 2 if has_own_critic(run) else 1
    require_space(out, written_bytes(lm) + 3 * models * trained * (run.checkpoint.keep + 1))


def written_bytes(lm: LanguageModel) -> int:
    """What a model takes on the disk, where it is written whole: in fp32, however it is kept."""
    return 4 * num_weights(lm.model)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _bytes(parameters: Iterable[torch.Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _in_fp32(folder: str) -> int:
    """A model's weights as they are held, whatever dtype they are stored in."""
    stored = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), torch.float32)
    return stored * 4 // (dtype.itemsize if isinstance(dtype, torch.dtype) else 4)
