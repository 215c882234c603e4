"""The trained model as a folder that plain transformers and peft read back as the same model."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from upweight.errors import ModelError, OutputError, Refusal
from upweight.models import attention
from upweight.models.adapter import widened
from upweight.models.load import LanguageModel, evaluation_mode
from upweight.models.proof import TOLERANCE_NATS, one_at_a_time, probe_forest
from upweight.models.weights import load_weights, quiet_peft
from upweight.types import Forest


def export(lm: LanguageModel, folder: Path, *, merge: bool = False) -> list[Path]:
    """Write the model as a Hugging Face folder; returns the folders written, the model's first.

    Full fine-tuning: weights, config, tokenizer, template. LoRA: the adapter, and with `merge` the
    merged model in `folder` and the adapter beside it in `adapter/`. An adapter needs its base: a
    start that no other program finds by name (an adapter that was merged, a converted GGUF file)
    is written beside it in `base/`.

    Each folder appears whole or not at all, and only if it is the trained model when it is read
    back. Raises Refusal UW401 otherwise, and OutputError when it cannot be written. The caller has
    made room.
    """
    probe = probe_forest(lm)
    with evaluation_mode(lm), widened(lm):
        trained = one_at_a_time(lm, probe)

    def same(written: Path) -> None:
        rescore(lm, written, probe, trained)

    if not lm.has_adapter:
        return [_write(folder, lm, lm.model, same)]
    base = _findable_base(lm)
    beside: list[Path] = []
    if base is None:
        start = load_weights(lm.name, lm.folder, lm.trust_remote_code)
        beside.append(_write(folder.parent / "base", lm, start))
        base = str(beside[0].resolve())
    lm.model.peft_config["default"].base_model_name_or_path = base  # pyright: ignore
    if not merge:
        return [_write(folder, lm, lm.model, same), *beside]
    adapter = _write(folder.parent / "adapter", lm, lm.model, same)
    merged = load_weights(str(adapter), str(adapter), lm.trust_remote_code)
    merged.generation_config = lm.causal.generation_config
    return [_write(folder, lm, merged, same), adapter, *beside]


def _findable_base(lm: LanguageModel) -> str | None:
    """What an adapter may call its base wherever it is read from: a hub id or a whole path."""
    folder = Path(lm.folder)
    if Path(lm.name).suffix == ".gguf" or (folder / "adapter_config.json").is_file():
        return None
    return str(folder.resolve()) if folder.is_dir() else lm.folder


def _write(
    target: Path,
    lm: LanguageModel,
    model: Any,
    check: Callable[[Path], None] = lambda written: None,
) -> Path:
    scratch = None
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        with attention.native_attention(lm.causal), quiet_peft():
            model.save_pretrained(scratch)
        lm.tokenizer.save_pretrained(scratch)
        scratch.chmod(0o755)
        check(scratch)
        if target.exists():
            shutil.rmtree(target)
        scratch.rename(target)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"the model could not be written to {target}: {error}. Free some space there (the "
            "run's last checkpoint has the weights; resume=true exports them)."
        ) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def rescore(
    lm: LanguageModel, written: Path, probe: Forest, trained: Float[Tensor, " scored"]
) -> None:
    """Read `written` back and score the probe, one sequence at a time by transformers' forward.

    Raises Refusal UW401 when it cannot be read, or is further than rounding from `trained`.
    """
    kept = "Nothing was exported; the run's last checkpoint has the trained weights."
    try:
        model = load_weights(str(written), str(written), lm.trust_remote_code)
    except ModelError as error:
        raise Refusal("UW401", f"the export cannot be read back: {error} {kept}") from error
    # On the CPU, where a second copy of the model has room.
    again = replace(lm, model=model.eval(), device=torch.device("cpu"))
    worst = (one_at_a_time(again, probe) - trained.cpu()).abs().max().item()
    tolerance = TOLERANCE_NATS[torch.float32]
    if not worst <= tolerance:
        raise Refusal(
            "UW401",
            f"the export is not the trained model: read back, it gives a token's log-prob "
            f"{worst:.3g} nats off (rounding: {tolerance}). {kept}",
        )
