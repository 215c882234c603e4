"""A value other than the default for every key, and runs and errors made of a few words."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from upweight.config import Run, load_run
from upweight.config.objectives import objectives_reading
from upweight.errors import ConfigError

NEEDED = {"model": "tiny", "data": "a.jsonl"}

# A value other than the default for every key there is, and what else it needs to make sense.
OTHER: dict[str, Any] = {
    "model": "other",
    "reference": "sft",
    "out": "runs/a",
    "objective": "sft",
    "epochs": 2.5,
    "steps": 7,
    "seed": 3,
    "resume": True,
    "track": ["wandb"],
    "log_every": 10,
    "data.path": ["b.jsonl", "c.jsonl"],
    "data.format": "pair",
    "data.template": "none",
    "data.template_options": {"enable_thinking": False},
    "data.date": "2024-07-05",
    "data.max_length": 512,
    "data.truncation": "prompt",
    "data.pairing": "extremes",
    "data.min_score_gap": 0.5,
    "data.limit": 100,
    "data.learn": "all",
    "data.turns": "all",
    "loss.beta": 0.05,
    "loss.label_smoothing": 0.1,
    "loss.margin": 0.5,
    "loss.centering": 0.01,
    "batch.pairs_per_step": 8,
    "batch.tokens_per_bin": 1024,
    "optimizer.learning_rate": 3e-5,
    "optimizer.weight_decay": 0.01,
    "optimizer.beta1": 0.8,
    "optimizer.beta2": 0.95,
    "optimizer.epsilon": 1e-6,
    "optimizer.moments": "8bit",
    "optimizer.max_grad_norm": None,
    "optimizer.warmup": 0.0,
    "optimizer.schedule": "cosine",
    "lora": True,
    "lora.rank": 8,
    "lora.alpha": 8.0,
    "lora.dropout": 0.1,
    "lora.targets": ["q_proj"],
    "lora.quantize": "nf4",
    "compute.dtype": "float32",
    "compute.device": "cpu",
    "compute.attention": "dense",
    "compute.sharing": False,
    "compute.threads": 2,
    "compute.checkpointing": True,
    "compute.compile": True,
    "compute.offload": True,
    "compute.trust_remote_code": True,
    "rollout.reward": "vader",
    "rollout.prompts_per_round": 4,
    "rollout.responses": 3,
    "rollout.max_tokens": 32,
    "rollout.stop_penalty": 1.0,
    "rollout.passes": 2,
    "rollout.minibatches": 2,
    "rollout.renew_reference": 5,
    "rollout.server": "http://localhost:8000",
    "policy.clip_low": 0.1,
    "policy.clip_high": 0.28,
    "policy.kl_estimator": "k3",
    "policy.advantages": "dr_grpo",
    "policy.aggregation": "constant",
    "policy.value": "shared",
    "policy.value_coefficient": 0.5,
    "policy.value_clip": None,
    "policy.value_learning_rate": 1e-5,
    "policy.discount": 0.99,
    "policy.trace": 1.0,
    "policy.whiten": False,
    "policy.kl_target": 6.0,
    "policy.kl_stop": 0.02,
    "evaluation.sets": {"easy": ["easy.jsonl"]},
    "evaluation.fraction": 0.1,
    "evaluation.every": 5,
    "evaluation.samples": 0,
    "evaluation.max_new_tokens": 16,
    "evaluation.temperature": 0.7,
    "evaluation.prompt_files": ["p.jsonl"],
    "evaluation.true_reward": "number",
    "checkpoint.every": 20,
    "checkpoint.keep": 5,
    "checkpoint.best": "rewards/accuracies",
    "export.merge": True,
    "preflight.cut": 0.5,
    "preflight.swapped": 0.1,
    "preflight.contradictory": 0.1,
    "preflight.repeated": 0.2,
    "preflight.spans": 0.3,
    "preflight.markers": 0.1,
    "preflight.empty": 0.1,
    "preflight.identical": 0.2,
    "preflight.dropped": 0.3,
    "preflight.similar": 0.2,
    "preflight.edits": 0.1,
    "preflight.improbable": 5.0,
    "preflight.reach": 1e-5,
    "preflight.shortcut": 0.9,
    "watch.moved": 0.4,
    "watch.patience": 32,
    "watch.displaced": 2.0,
    "watch.length": 2.0,
    "watch.repetition": 0.3,
    "watch.stopped": 0.4,
    "watch.solved": 0.9,
    "watch.learned": 3.0,
    "watch.known": 0.8,
    "watch.easy": 0.9,
    "watch.spread": 5.0,
    "watch.flat": 0.02,
    "watch.suspect": 0.9,
    "watch.kl": 20.0,
    "watch.below": 0.2,
}
EVALUATED = {"evaluation.fraction": 0.2}
CONTEXT: dict[str, dict[str, Any]] = {
    "checkpoint.best": EVALUATED,
    "rollout.server": {"lora": True},
    "evaluation.every": EVALUATED,
    "evaluation.samples": EVALUATED,
    "evaluation.max_new_tokens": EVALUATED,
    "evaluation.temperature": EVALUATED,
    "evaluation.true_reward": EVALUATED,
    "watch.length": EVALUATED,
    "watch.repetition": EVALUATED,
    "watch.stopped": EVALUATED,
    "watch.known": EVALUATED,
    "watch.easy": EVALUATED,
    "watch.kl": EVALUATED,
    "watch.below": EVALUATED,
    "export.merge": {"lora": True},
    "policy.value_coefficient": {"policy.value": "shared"},
}


def context_of(key: str) -> dict[str, Any]:
    """What a run says beside a key for the key to have a say."""
    reading = objectives_reading(key)
    return CONTEXT.get(key, {}) | ({} if "dpo" in reading else {"objective": reading[0]})


def needed_beside(*given: str) -> dict[str, Any]:
    """What a run cannot do without and `given` does not hold."""
    known = {"data" if key == "data.path" else key for key in given}
    return {key: value for key, value in NEEDED.items() if key not in known}


def run_of(*overrides: str, **values: Any) -> Run:
    return load_run(None, overrides, needed_beside(*values) | values).run


def error_of(*overrides: str, **values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run(None, overrides, needed_beside(*values) | values)
    return str(caught.value)


def written(folder: Path, text: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def error_in(folder: Path, text: str, needed: str = "model: tiny\ndata: a.jsonl\n") -> str:
    """The error of a file that begins with two good lines, with its folder cut off."""
    with pytest.raises(ConfigError) as caught:
        load_run(written(folder, needed + text))
    return str(caught.value).replace(f"{folder}{os.sep}", "")


def reloaded(text: str, folder: Path) -> Run:
    return load_run(written(folder, text)).run
