"""Frozen linear layers in four bits, read in full where they are used (lora.quantize: nf4).

Dettmers et al. 2023 (arXiv:2305.14314): of each block of 64 weights the largest, and for each
weight one of 16 multiples of it, those of a normal distribution's quantiles. The blocks' largest
are kept in 8 bits, around their mean.

bitsandbytes quantizes and reads back; the product is torch's. Its own layer is not used: on a
processor with AVX512-BF16, a pass that needs no gradient packs its weight anew and in place, rounds
to bf16 from then on and has no backward pass any more, so that policy and reference would be two
models.
"""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from upweight.errors import ModelError
from upweight.models.bnb import package

BLOCK, RANGE_BLOCK = 64, 256
"""Weights that share a scale, and scales that share a range."""

FILE = "quantization.json"
"""In an adapter's folder: the base that it was trained on, as BitsAndBytesConfig's arguments."""

AS_CONFIG = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}

HALF_GAP, SCALE_GAP = 0.157, 0.0075
"""What rounding explains of a weight's error. The multiples -1 and -0.696 are the furthest apart,
and half of that is 0.152 of the block's largest; bf16 rounds what is read back (twice 2^-9). A
scale is off by half the widest gap of the 8-bit code, 0.0071 of the furthest from their mean."""


def require_quantizer(quantize: str | None) -> None:
    """Raises ModelError where weights in four bits are asked for and bitsandbytes is missing."""
    if quantize is not None:
        _functional()


def _functional() -> Any:
    return package("functional", "lora.quantize=nf4", "nf4")


class Nf4Linear(nn.Linear):
    """`source` with its weight in four bits, on `device`; it learns nothing. `transposed` says that
    the source keeps its weight as Conv1D does."""

    def __init__(self, source: nn.Linear | Conv1D, device: torch.device) -> None:
        super(nn.Linear, self).__init__()
        self.transposed = isinstance(source, Conv1D)
        given = source.weight.detach().to(device)
        weight = (given.T if self.transposed else given).contiguous()
        self.out_features, self.in_features = weight.shape
        packed, state = _functional().quantize_4bit(
            weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        # Parameters, so that all that counts, hashes or moves weights finds them.
        self.weight = _frozen(packed)
        self.scales = _frozen(state.absmax)
        self.ranges = _frozen(state.state2.absmax)
        self.code = _frozen(state.state2.code)
        self.mean = _frozen(state.offset)
        bias = _bias_of(source)
        self.register_parameter("bias", None if bias is None else _frozen(bias.detach().to(device)))
        for dtype in (torch.float32, torch.bfloat16):
            _require_rounded(weight, self.dequantized(dtype))

    @torch.no_grad()
    def dequantized(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The weight that the four bits stand for."""
        found = _functional()
        ranges = found.QuantState(
            absmax=self.ranges.data, code=self.code.data, blocksize=RANGE_BLOCK, dtype=torch.float32
        )
        state = found.QuantState(
            absmax=self.scales.data,
            shape=torch.Size((self.out_features, self.in_features)),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32,
            offset=self.mean.data,
            state2=ranges,
        )
        return _read(self.weight.data, state).to(dtype)

    def forward(self, input: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        kind = input.device.type
        dtype = input.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        return _Product.apply(input.to(dtype), self)  # pyright: ignore[reportReturnType]

    def plain(self) -> nn.Linear | Conv1D:
        """The layer that it was made from, with the rounded weight in fp32, learning nothing."""
        weight = self.dequantized(torch.float32)
        if not self.transposed:
            return _linear(weight, _bias_of(self))
        with torch.device("meta"):
            made = Conv1D(self.out_features, self.in_features)
        made.weight, made.bias = _frozen(weight.T.contiguous()), self.bias
        return made


def _read(packed: Tensor, state: Any) -> Float[Tensor, "out in"]:
    """What bitsandbytes reads back, in the dtype of its state.

    Where a block spans two rows, its kernel for processors with AVX512 takes another block's scale
    (0.50.2): such a matrix is given as one row.
    """
    whole = state.shape
    if whole[-1] % BLOCK:
        state = copy.copy(state)
        state.shape = torch.Size((1, whole.numel()))
    return _functional().dequantize_4bit(packed, state).view(whole)


def _linear(weight: Float[Tensor, "out in"], bias: nn.Parameter | None) -> nn.Linear:
    with torch.device("meta"):
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    made.weight = _frozen(weight)
    if bias is not None:
        made.bias = bias
    return made


def _bias_of(layer: nn.Module) -> nn.Parameter | None:
    return layer.bias if isinstance(layer.bias, nn.Parameter) else None


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class _Product(torch.autograd.Function):
    """x W^T + b. The backward pass reads W anew: kept in full until then it would take the memory
    that four bits save."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Nf4Linear) -> Tensor:
        ctx.layer = layer
        bias = _bias_of(layer)
        bias = None if bias is None else bias.to(x.dtype)
        return F.linear(x, layer.dequantized(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (slope,) = grads
        return slope @ ctx.layer.dequantized(slope.dtype), None


def _require_rounded(weight: Float[Tensor, "out in"], read: Float[Tensor, "out in"]) -> None:
    """Raises ModelError where a weight is read back further off than rounding to nf4 explains:
    kernels differ by device and version, and a wrong one would be trained on silently."""
    top = _blocks(weight).abs().amax(1)
    spread = (top - top.mean()).abs().max()
    off = _blocks(weight - read.float()).abs().amax(1)
    if not bool((off <= HALF_GAP * top + SCALE_GAP * spread).all()):
        raise ModelError(
            f"lora.quantize=nf4: bitsandbytes reads a {weight.shape[0]:,} x {weight.shape[1]:,} "
            f"matrix back on {weight.device} with errors up to {off.max().item():.3g} where its "
            f"largest weight is {top.max().item():.3g}, more than rounding. Install another "
            "version of bitsandbytes, or leave lora.quantize out."
        )


def _blocks(weight: Float[Tensor, "out in"]) -> Float[Tensor, "blocks size"]:
    flat = weight.reshape(-1)
    return F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)


def quantize_layers(model: nn.Module, device: torch.device) -> None:
    """Puts the linear layers between embedding and output head into four bits on `device`, one at a
    time, in place: those that transformers quantizes with BitsAndBytesConfig.

    Raises ModelError where there is none, and where what is read back is not the weight rounded.
    """
    chosen = set(_plain_layers(model))
    if not chosen:
        raise ModelError(
            "lora.quantize=nf4: the model has no linear layer of torch's own kind between "
            "embedding and output head, and others are not quantized. Leave lora.quantize out."
        )
    made: dict[nn.Module, Nf4Linear] = {}
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if layer not in chosen:
                continue
            assert isinstance(layer, nn.Linear | Conv1D)
            if layer not in made:
                made[layer] = Nf4Linear(layer, device)
                del layer.weight  # or both would be there until the last is done
            setattr(parent, name, made[layer])


def round_layers(model: nn.Module, device: torch.device) -> None:
    """The same weights rounded to what four bits stand for, in the layers and dtype that they are
    in; `device` computes them."""
    for layer in _plain_layers(model):
        rounded = Nf4Linear(layer, device).dequantized(torch.float32)
        with torch.no_grad():
            layer.weight.copy_(rounded.T if isinstance(layer, Conv1D) else rounded)


def in_full(model: nn.Module) -> None:
    """Puts plain layers on the CPU, with the rounded weights in fp32, in the place of those in four
    bits: ours, and bitsandbytes' own."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Nf4Linear):
                setattr(parent, name, layer.plain().to("cpu"))
                if layer.transposed and hasattr(parent, "fan_in_fan_out"):
                    # An adapter that will be merged into it.
                    setattr(parent, "fan_in_fan_out", True)  # noqa: B010
                continue
            theirs: Any = getattr(layer, "weight", None)
            if (state := getattr(theirs, "quant_state", None)) is not None:
                weight = _read(theirs.data, state).float()
                setattr(parent, name, _linear(weight, _bias_of(layer)).to("cpu"))


def _plain_layers(model: nn.Module) -> list[nn.Linear | Conv1D]:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())  # pyright: ignore
    return [
        module
        for module in model.modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D))
        and all(module is not end for end in ends)
    ]


def quantized_layers(model: nn.Module) -> list[Nf4Linear]:
    return [module for module in model.modules() if isinstance(module, Nf4Linear)]


def num_weights(model: nn.Module) -> int:
    """The numbers that a model is made of, however many bits each takes."""
    layers = quantized_layers(model)
    packed = {id(p) for layer in layers for p in layer.parameters() if p is not layer.bias}
    others = sum(p.numel() for p in model.parameters() if id(p) not in packed)
    return others + sum(layer.in_features * layer.out_features for layer in layers)


def write_quantization(folder: Path) -> None:
    (folder / FILE).write_text(json.dumps(AS_CONFIG, indent=1) + "\n", encoding="utf-8")


def is_for_quantized(folder: str | Path) -> bool:
    """Whether the adapter in a folder is for a base in four bits. Raises ModelError for a
    quantization that is not known here."""
    file = Path(folder) / FILE
    if not file.is_file():
        return False
    found: object = None
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(file.read_text(encoding="utf-8"))
    if found != AS_CONFIG:
        raise ModelError(
            f"{file} does not say nf4 as upweight writes it ({json.dumps(AS_CONFIG)}): which "
            "weights its adapter was trained on is not known. Put the file back as it was."
        )
    return True


def computing_device() -> torch.device:
    """Where weights are rounded that are not of a run: kernels of a kind round alike."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
