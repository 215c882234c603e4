"""From a name to a model that reads forests, with what is proved about it."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import platform
import time
import warnings
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from upweight.errors import ModelError
from upweight.models import attention, nf4
from upweight.models.named import first_lines, resolve
from upweight.models.reading import attempt
from upweight.models.weights import load_tokenizer, load_weights


@dataclass(frozen=True)
class ForwardPlan:
    """How this model runs a forest, as proved at start.

    `attention` is a path of attention.py; `shared` says whether a prompt is computed once for all
    its responses, and `reason` why it is not; `native_head` that the logits come from the model's
    own forward; `one_pass` that the head gives log-probs and gradients at once where it can. Beyond
    `exact_depth` tokens a sequence changes the position encoding of everything in its batch
    (dynamic and LongRoPE scaling), so it is computed alone.
    """

    attention: str = "dense"
    shared: bool = True
    native_head: bool = False
    reason: str | None = None
    exact_depth: int | None = None
    one_pass: bool = True

    def describe(self) -> str:
        head = "the model's own logits" if self.native_head else "scored positions only"
        if not self.one_pass:
            head += " in fp32"
        if self.shared:
            return f"prompts computed once per forest ({self.attention} attention), head on {head}"
        return f"one row per response, because {self.reason}; head on {head}"


@dataclass
class LanguageModel:
    """A causal language model, its tokenizer, and how forests run through it. `offload` says that
    what a step keeps for its backward pass waits in host memory."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    name: str
    folder: str
    device: torch.device
    compute_dtype: torch.dtype
    plan: ForwardPlan
    trust_remote_code: bool = False
    offload: bool = False

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
        if self.compute_dtype == torch.float32 or self.dtype != torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The weights': the embedding's, since frozen matrices may be kept in less."""
        return next(self.causal.get_input_embeddings().parameters()).dtype

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
        # A reward model answers nothing, and has no generation config.
        settings = getattr(self.causal, "generation_config", None)
        generation = getattr(settings, "eos_token_id", None)
        ids = generation if isinstance(generation, list) else [generation]
        return tuple({i for i in (*ids, self.tokenizer.eos_token_id) if isinstance(i, int)})


def load(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    path: str = "auto",
    sharing: bool = True,
    trust_remote_code: bool = False,
    plan: ForwardPlan | None = None,
    weights: PreTrainedModel | None = None,
    quantize: str | None = None,
) -> LanguageModel:
    """The model called `name` (hub id, folder, adapter folder or .gguf file), ready for forests.

    Weights are kept in fp32; `dtype` is what matrix products run in, where "auto" is bfloat16 if
    a probe finds it fast on this device and float32 otherwise. An adapter folder is loaded with
    its base and merged: what it stands for is the start and the reference. Dropout is off. A
    `plan` that was proved on these weights before is not proved again; `weights` that were read
    before are not read again. With `quantize` the layers between embedding and head are put into
    four bits (nf4.py), before anything is proved or hashed: that is the model then.
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
    if chosen.type == "cpu":
        keep_freed_memory()
    folder = resolve(name)
    if quantize is not None and nf4.is_for_quantized(folder):
        raise ModelError(
            f"{name} is an adapter that was trained on a base in four bits. Merged, and put into "
            "four bits once more, most of what it learned would be rounded away. Leave out "
            "lora.quantize to train on from it, or start from its base."
        )
    model = weights or load_weights(name, folder, trust_remote_code)
    tokenizer = load_tokenizer(name, folder, trust_remote_code)
    # Evaluation mode for good: dropout is noise on a log-ratio, and a policy that is noisy where
    # its reference is not starts away from ln 2.
    _move(model, name, chosen, quantize)
    model.eval()
    compute_dtype = (
        (torch.bfloat16 if bfloat16_is_fast(chosen) else torch.float32)
        if dtype == "auto"
        else {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    )
    lm = LanguageModel(
        model, tokenizer, name, folder, chosen, compute_dtype, ForwardPlan(), trust_remote_code
    )
    _require_stops(lm)
    lm.plan = plan or proof.find_plan(lm, path=path, sharing=sharing)
    if lm.plan.shared:
        lm.causal.set_attn_implementation(attention.NAME)
    return lm


def _move(
    model: PreTrainedModel, name: str, device: torch.device, quantize: str | None = None
) -> None:
    def move() -> None:
        if quantize is not None:
            nf4.quantize_layers(model, device)
        model.to(device)  # pyright: ignore[reportArgumentType]

    moved = attempt(move)
    if isinstance(moved, Exception):
        needed = sum(p.numel() * p.element_size() for p in model.parameters())
        raise ModelError(
            f"{name} does not fit into the memory of {device}: its weights alone take "
            f"{needed / 2**30:.3g} GiB ({first_lines(moved, 1)}). Needs less: a smaller model, or "
            "nothing else on the device; compute.device=cpu has the machine's own memory."
        ) from moved


def keep_freed_memory() -> None:
    """Tells glibc to keep what this process frees for what it allocates next.

    By default blocks of megabytes go back to the kernel at once, and every activation is then
    taken page by page again: a fifth of a step's time. No effect under other C libraries.
    """
    libc = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
    if libc is not None:
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        libc.mallopt(mmap_threshold, 1 << 25)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether bf16 products are to be used: the processor has them, and a probe finds them faster.

    The probe times a training step's three layouts (x W^T, g W, g^T x) at one fixed shape, where
    bf16 takes about half of fp32's time, or tens of times as much where it is emulated: far enough
    apart that a busy machine decides as an idle one does. The model plays no part.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine().lower() in ("x86_64", "amd64") and not (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # pyright: ignore
    ):
        return False
    size = 512

    def seconds(dtype: torch.dtype) -> float:
        x, w, g = (torch.ones(size, size, dtype=dtype) for _ in range(3))
        start = time.perf_counter()
        _ = x @ w.T, g @ w, g.T @ x
        return time.perf_counter() - start

    # Taken in turn, and the best of many: what else runs on the machine slows single ones.
    timed = [(seconds(torch.bfloat16), seconds(torch.float32)) for _ in range(20)]
    half, single = (min(times) for times in zip(*timed, strict=True))
    return half < single


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
    for name, tensor in _own_weights(lm):
        if tensor.dtype in (torch.bfloat16, torch.float16):
            tensor = tensor.float()  # the same numbers, however they are kept
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def bit_sums(lm: LanguageModel) -> dict[str, int]:
    """What a change of the weights in memory changes: the sum of each tensor's bits, read as whole
    numbers, on its device and some ten times as fast as its fingerprint. No proof against intent.
    """
    found: dict[str, int] = {}
    for name, tensor in _own_weights(lm):
        octets = tensor.detach().reshape(-1).view(torch.uint8)
        if octets.storage_offset() % 8:
            octets = octets.clone()
        whole = octets.shape[0] // 8 * 8
        # By eights: a sum of smaller numbers is converted first, which takes as long as hashing.
        found[name] = int(octets[:whole].view(torch.int64).sum()) + int(octets[whole:].sum())
    return found


def _own_weights(lm: LanguageModel) -> Generator[tuple[str, torch.Tensor]]:
    """Each tensor of the model once, without its adapter's, as it is called without an adapter."""
    seen: set[int] = set()
    for name, tensor in sorted(lm.causal.state_dict().items()):
        if "lora_" not in name and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            yield name.replace(".base_layer", ""), tensor


def _require_stops(lm: LanguageModel) -> None:
    """Raises ModelError for a generation config that is not JSON, of which transformers passes over
    all in silence, and for an end of generation that no token is."""
    file = Path(lm.folder) / "generation_config.json"
    try:
        json.loads(file.read_text(encoding="utf-8") if file.is_file() else "{}")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{file} cannot be read: {first_lines(error, 1)} Correct it, or remove it: the "
            "tokenizer's eos_token alone then ends generation."
        ) from error
    # A reward model answers nothing, and has no generation config.
    settings = getattr(lm.causal, "generation_config", None)
    said = getattr(settings, "eos_token_id", None)
    for stop in cast("list[object]", said if isinstance(said, list) else [said]):
        whole = isinstance(stop, int) and not isinstance(stop, bool)
        if stop is not None and not (whole and 0 <= cast(int, stop) < lm.vocab_size):
            raise ModelError(
                f"{lm.name}: eos_token_id in generation_config.json is {stop!r}; allowed: the ids "
                f"of the model's {lm.vocab_size:,} tokens, from 0. Generation would not stop there."
            )


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
