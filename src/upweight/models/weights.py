"""From a folder to transformers' model and tokenizer; an adapter is merged into its base.

What an adapter's file lacks is an error here: peft would leave it out without a word.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from upweight.errors import ModelError
from upweight.models import bnb, nf4
from upweight.models.named import (
    UNREADABLE,
    complete_model,
    first_lines,
    model_errors,
    require_same_keys,
    resolve,
)

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

BASE = "base"
"""The folder beside an adapter's that its base is exported to, where that has no other name."""

SCORING = "ForSequenceClassification"
"""How the architecture of a reward model is called."""

WHERE_REWARDS_GO = (
    "A reward model goes to rollout.reward, to evaluation.true_reward, or to upweight score"
)


def load_weights(
    name: str,
    folder: str,
    trust_remote_code: bool = False,
    *,
    loading: tuple[str, ...] = (),
    scalar: bool = False,
) -> PreTrainedModel:
    """The model in `folder` (or of that hub id) in fp32, on the CPU, without dropout; an adapter
    is merged into its base.

    Raises ModelError when it cannot be read, and when config and weights do not hold the same
    tensors. `loading` are the adapters that led to this folder; `scalar` asks for the head of a
    reward model.
    """
    if (Path(folder) / "adapter_config.json").is_file():
        return _load_merged(name, folder, trust_remote_code, loading)
    with model_errors(name):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(
                f"model: {name} is an encoder-decoder ({config.model_type}); upweight aligns "
                "causal language models."
            )
        if not scalar:
            _require_writes(name, config)
        _without_dropout(config)
        return complete_model(
            name,
            folder,
            AutoModelForSequenceClassification if scalar else AutoModelForCausalLM,
            config=config,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )


def _require_writes(name: str, config: PreTrainedConfig) -> None:
    """Raises ModelError for a reward model where a model that writes is wanted."""
    (architecture, *_) = config.architectures or [""]
    if architecture.endswith(SCORING) and config.num_labels == 1:
        raise ModelError(
            f"model: {name} is a reward model (its config.json names {architecture} with one "
            "label): it scores answers and writes none, so that it can be neither a policy nor its "
            f"reference. Give the model that it was trained from. {WHERE_REWARDS_GO}."
        )


def _without_dropout(config: PreTrainedConfig) -> None:
    """Evaluation mode is not enough: a layer that is recomputed in the backward pass carries the
    training flag, and some families (OPT, Falcon) read their dropout from the config there."""
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            _without_dropout(value)
        elif isinstance(value, float) and "drop" in key:
            setattr(config, key, 0.0)


def _load_merged(
    name: str, folder: str, trust_remote_code: bool, loading: tuple[str, ...]
) -> PreTrainedModel:
    with bnb.quiet():
        from peft import PeftModel

    here = str(Path(folder).resolve())
    if here in loading:
        raise ModelError(
            f"model: {name} is an adapter whose base is itself: base_model_name_or_path in its "
            "adapter_config.json leads back to it. Write the name of the model it was made for."
        )
    with model_errors(name):
        settings = json.loads((Path(folder) / "adapter_config.json").read_text())
        base_name = settings.get("base_model_name_or_path")
    if not base_name:
        raise ModelError(
            f"model: {name} is an adapter that does not say which model it is for. Write its name "
            "as base_model_name_or_path into adapter_config.json."
        )
    base_name, moved = _found_again(base_name, Path(folder))
    try:
        base = load_weights(
            base_name, resolve(base_name), trust_remote_code, loading=(*loading, here)
        )
    except ModelError as error:
        raise ModelError(f"{error} It is the base of the adapter {name}{moved}.") from error
    if nf4.is_for_quantized(folder):
        # Merged into weights that are not rounded it would be another model.
        nf4.round_layers(base, nf4.computing_device())
    with model_errors(name), quiet_peft():
        tied = tied_modules(base)
        wrapped = PeftModel.from_pretrained(base, folder)
        require_untied(f"model: the adapter {name}", tied, wrapped.targeted_module_names)
        # from_pretrained keeps to itself what it had no place for, so the weights are read again.
        found = wrapped.load_adapter(
            folder, "default", key_mapping=getattr(base, "_checkpoint_conversion_mapping", {})
        )
        require_same_keys(
            f"model: the weights of the adapter {name} are not those of its adapter_config.json "
            f"on {base_name}",
            "the adapter would be applied in part. Use it with the base and the config that it was "
            "saved with.",
            set(found.missing_keys),
            set(found.unexpected_keys),
        )
        merged = wrapped.merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    # peft froze the base, and leaves it so: merged, it may be trained as any other model.
    merged.requires_grad_(True)  # pyright: ignore[reportUnknownMemberType]
    return merged


def _found_again(base: str, adapter: Path) -> tuple[str, str]:
    """Where the base of an adapter is, and what is to be said of one that is gone: an adapter names
    its base by its whole path, and one that was exported beside it stands there still when both
    were moved."""
    whole = Path(base)
    if whole.name != BASE or not whole.is_absolute() or whole.exists():
        return base, ""
    beside = adapter.resolve().parent / BASE
    if beside.is_dir():
        return str(beside), ""
    return base, (
        f", and there is no {beside} either: put it there, or write where it is as "
        "base_model_name_or_path into adapter_config.json"
    )


def load_as_served(folder: Path, device: torch.device, trust_remote_code: bool) -> nn.Module:
    """An adapter for a base in four bits as any program reads it, by transformers and peft alone:
    the base quantized on `device` by transformers, then in full on the CPU.

    What bitsandbytes multiplies with is left out: on some processors its products round to bf16.
    Raises ModelError when it cannot be read.
    """
    with bnb.quiet():
        from peft import PeftModel

    with model_errors(str(folder)), quiet_peft():
        settings = json.loads((folder / nf4.FILE).read_text(encoding="utf-8"))
        adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base: Any = AutoModelForCausalLM.from_pretrained(
            adapter["base_model_name_or_path"],
            dtype=torch.float32,
            quantization_config=BitsAndBytesConfig(**settings),
            device_map={"": str(device)},
            trust_remote_code=trust_remote_code,
        )
        nf4.in_full(base)
        # transformers' own to() refuses models that were quantized once.
        nn.Module.to(base, torch.device("cpu"))
        return PeftModel.from_pretrained(base, str(folder))


def tied_modules(model: PreTrainedModel) -> set[str]:
    """The names of embedding and head where they are one matrix, else none."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or getattr(embedding, "weight", None) is not getattr(head, "weight", None):
        return set()
    return {name for name, module in model.named_modules() if module in (embedding, head)}


def require_untied(what: str, tied: set[str], adapted: list[str]) -> None:
    """Merging an adapter on the head into a matrix that is the embedding too changes both."""
    if both := tied & set(adapted):
        raise ModelError(
            f"{what}: {' and '.join(sorted(both))} is one matrix with the model's "
            "other end (tie_word_embeddings), and an adapter on one of the two cannot be merged "
            "without changing the other. Adapt other layers; lora.targets=all-linear leaves both "
            "as they are."
        )


@contextlib.contextmanager
def quiet_peft() -> Generator[None]:
    """Without warnings about what is checked here, or what peft does as it should."""
    with warnings.catch_warnings():
        # peft reads an attribute that transformers 5.23 is about to drop, and says so.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`", UserWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
        yield


def load_tokenizer(
    name: str, folder: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of the model called `name`. Raises ModelError when the folder has none."""
    folder = folder or resolve(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except UNREADABLE as error:
        raise ModelError(
            f"model: {name} has no tokenizer that transformers can load "
            f"({first_lines(error, 1)}). Copy tokenizer.json and tokenizer_config.json of the "
            "model it was made from into the folder."
        ) from error
    if len(tokenizer) == 0 or not tokenizer.encode("a", add_special_tokens=False):
        raise ModelError(
            f"model: the tokenizer of {name} is empty: it turns text into no tokens. Copy "
            "tokenizer.json and tokenizer_config.json of its origin into the folder."
        )
    return tokenizer
