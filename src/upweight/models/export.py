"""The trained model as a folder that plain transformers and peft read back as the same model."""

from __future__ import annotations

import contextlib
import filecmp
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from upweight.data.pack import collate
from upweight.data.render import Renderer
from upweight.errors import ModelError, OutputError, Refusal
from upweight.models import attention, nf4, probes
from upweight.models.adapter import widened
from upweight.models.load import LanguageModel, evaluation_mode
from upweight.models.proof import TOLERANCE_NATS, one_at_a_time, probe_forest
from upweight.models.reading import free_cached, is_out_of_memory
from upweight.models.scalar import (
    in_one_batch,
    one_response_at_a_time,
    padding_tokenizer,
    tree_scores,
)
from upweight.models.weights import (
    BASE,
    load_as_served,
    load_tokenizer,
    load_weights,
    quiet_peft,
)
from upweight.types import Example, Forest, Tree

KEPT = "Nothing was exported; the run's last checkpoint has the trained weights."


def probed(lm: LanguageModel, renderer: Renderer) -> probes.Probes:
    """The probes, with the log-probs that `lm` gives them as it stands."""
    sent = probes.make_probes(renderer)
    if not sent.probes:
        return sent
    with evaluation_mode(lm), widened(lm):
        return probes.with_logps(sent, one_at_a_time(lm, collate(probes.probe_trees(sent))))


def export(
    lm: LanguageModel,
    folder: Path,
    *,
    merge: bool = False,
    renderer: Renderer | None = None,
    rows: Sequence[Example] = (),
    start: probes.Probes | None = None,
) -> list[Path]:
    """Write the model as a Hugging Face folder; returns the folders written, the model's first.

    Full fine-tuning: weights, config, tokenizer, template. LoRA: the adapter, and with `merge` the
    merged model in `folder` and the adapter beside it in `adapter/`. An adapter needs its base: a
    start that no other program finds by name (an adapter that was merged, a converted GGUF file)
    is written beside it in `base/`, whose weights the runs of a folder share. Of a base in four
    bits the adapter says so (nf4.FILE), and is merged into the rounded weights, in fp32: with
    others it would be another model.

    Each folder appears whole or not at all, and only if it is the trained model when it is read
    back, and with `renderer` writes `rows` and the probes as training did. The probes travel with
    it in probes.json, with what they were at the `start` of training. Raises Refusal UW401 or UW402
    otherwise, and OutputError when it cannot be written. The caller has made room.
    """
    sent = probes.make_probes(renderer) if renderer else None
    probe = collate([*probe_forest(lm).trees, *(probes.probe_trees(sent) if sent else ())])
    with evaluation_mode(lm), widened(lm):
        trained = one_at_a_time(lm, probe)
    if sent:
        num = sum(len(p.response_ids) for p in sent.probes)
        sent = probes.with_logps(sent, trained[len(trained) - num :])
        if start:
            sent = probes.with_start(sent, start, TOLERANCE_NATS[torch.float32])

    def same(written: Path) -> None:
        rescore(lm, written, probe, trained)
        if renderer and sent:
            tokenizer = load_tokenizer(str(written), str(written), lm.trust_remote_code)
            asked = [*rows, *probes.examples(renderer.template)]
            probes.require_same_rendering("the export", tokenizer, renderer, asked)
            probes.write_probes(written, sent, tokenizer)

    if not lm.has_adapter:
        return [_write(folder, lm, lm.model, same)]
    base = findable_base(lm)
    beside: list[Path] = []
    if base is None:
        whole = load_weights(lm.name, lm.folder, lm.trust_remote_code)
        beside.append(_write(folder.parent / BASE, lm, whole))
        _share(beside[0])
        base = str(beside[0].resolve())
    lm.model.peft_config["default"].base_model_name_or_path = base  # pyright: ignore
    if not merge:
        return [_write(folder, lm, lm.model, same), *beside]
    adapter = _write(folder.parent / "adapter", lm, lm.model, same)
    merged = load_weights(str(adapter), str(adapter), lm.trust_remote_code)
    merged.generation_config = lm.causal.generation_config
    return [_write(folder, lm, merged, same), adapter, *beside]


def export_reward_model(
    lm: LanguageModel, folder: Path, trees: Sequence[Tree], renderer: Renderer | None = None
) -> Path:
    """Write a reward model as a sequence-classification folder, its adapter merged if it has one.

    As `export`: it appears whole, and only if plain transformers reads the same scores from it. It
    has no log-probs to probe; probes.json says the day that its prompts were of, if `renderer`
    writes one.
    """
    with evaluation_mode(lm):
        trained = [score for scores in tree_scores(lm, trees) for score in scores]
    # Frozen matrices may be kept in half precision, where a product of LoRA factors would be lost,
    # or in four bits.
    model = lm.causal.float()
    if nf4.quantized_layers(model):
        # Eight times as large, which the device may have no room for.
        nf4.in_full(model)
        model.to("cpu")  # pyright: ignore[reportArgumentType]
    merge_adapters(model)

    def same(written: Path) -> None:
        _require_same_scores(lm, written, trees, trained)
        if renderer and renderer.date is not None:
            dated = replace(probes.make_probes(renderer), probes=())
            probes.write_probes(written, dated, lm.tokenizer)

    return _write(folder, lm, model, same, padding_tokenizer(lm))


def _require_same_scores(
    lm: LanguageModel, written: Path, trees: Sequence[Tree], trained: Sequence[float]
) -> None:
    again = load_weights(str(written), str(written), lm.trust_remote_code, scalar=True).eval()
    tokenizer = load_tokenizer(str(written), str(written), lm.trust_remote_code)
    read = {"": [s for tree in trees for s in one_response_at_a_time(again, tree)]}
    if tokenizer.pad_token_id is not None:
        # Users score batches, which transformers reads at the last token that is not padding.
        batched = [s for tree in trees for s in in_one_batch(again, tokenizer, tree)]
        read[" in padded batches"] = batched
    # A score is one product of the width more: it is off by as much as a log-prob is.
    tolerance = TOLERANCE_NATS[lm.compute_dtype]
    for where, scores in read.items():
        worst = max(abs(a - b) for a, b in zip(scores, trained, strict=True))
        if not worst <= tolerance:
            raise Refusal(
                "UW401",
                f"the export is not the trained reward model: read back{where}, it gives a "
                f"response a score {worst:.3g} off (rounding: {tolerance}). {KEPT}",
            )


def merge_adapters(model: nn.Module) -> None:
    """Folds every LoRA layer into the layer that it adapts, in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [(name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, layer in adapted:
        layer.merge()
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer.get_base_layer())


def findable_base(lm: LanguageModel) -> str | None:
    """What an adapter may call its base wherever it is read from: a hub id or a whole path."""
    folder = Path(lm.folder)
    if Path(lm.name).suffix == ".gguf" or (folder / "adapter_config.json").is_file():
        return None
    return str(folder.resolve()) if folder.is_dir() else lm.folder


def _share(base: Path) -> None:
    """Weights that another run beside this one has in its base too are one file on the disk, where
    the disk can."""
    base = base.resolve()
    for file in base.glob("*.safetensors"):
        for other in base.parent.parent.glob(f"*/{base.name}/{file.name}"):
            if not (other.parent.parent / "run.yaml").is_file():
                continue  # Somebody's own, and theirs to write into.
            with contextlib.suppress(OSError):
                if not other.samefile(file) and filecmp.cmp(other, file, shallow=False):
                    linked = file.with_name(f".{file.name}")
                    linked.unlink(missing_ok=True)
                    os.link(other, linked)
                    linked.replace(file)
                    break


def _write(
    target: Path,
    lm: LanguageModel,
    model: Any,
    check: Callable[[Path], None] = lambda written: None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    scratch = None
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        with attention.native_attention(lm.causal), quiet_peft():
            model.save_pretrained(scratch)
        if lm.has_adapter and model is lm.model and nf4.quantized_layers(model):
            nf4.write_quantization(scratch)
        (tokenizer or lm.tokenizer).save_pretrained(scratch)
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
    try:
        model = _read_back(lm, written)
    except ModelError as error:
        raise Refusal("UW401", f"the export cannot be read back: {error} {KEPT}") from error
    # On the CPU, where a second copy of the model has room.
    again = replace(lm, model=model.eval(), device=torch.device("cpu"))
    worst = (one_at_a_time(again, probe) - trained.cpu()).abs().max().item()
    tolerance = TOLERANCE_NATS[torch.float32]
    if not worst <= tolerance:
        raise Refusal(
            "UW401",
            f"the export is not the trained model: read back, it gives a token's log-prob "
            f"{worst:.3g} nats off (rounding: {tolerance}). {KEPT}",
        )


def _read_back(lm: LanguageModel, written: Path) -> nn.Module:
    if not nf4.is_for_quantized(written):
        return load_weights(str(written), str(written), lm.trust_remote_code)

    try:
        return load_as_served(written, lm.device, lm.trust_remote_code)
    except ModelError as error:
        if error.__cause__ is None or not is_out_of_memory(error.__cause__):
            raise
    free_cached()
    # Beside the run's own model the device had no room; kernels differ in the last bit, no more.
    return load_as_served(written, torch.device("cpu"), lm.trust_remote_code)
