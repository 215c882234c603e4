"""Each way through the engine against float64 on the CPU, one sequence at a time."""

from __future__ import annotations

import importlib.util
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, get_args
from unittest.mock import patch

import torch
from torch import Tensor

from on_gpu.models import (
    CHECKED_SHAPES,
    FAMILIES,
    PRECISIONS,
    as_saved_in_bf16,
    build,
    llama,
    random_trees,
)
from results import markdown_table
from upweight.config.sections import Compute
from upweight.data.pack import collate
from upweight.models import attention, nf4, proof
from upweight.models.adapter import add_lora, keep_frozen_in_compute_dtype
from upweight.models.head import at_least_fp32, head_logps
from upweight.models.load import ForwardPlan, LanguageModel, checkpoint_layers
from upweight.models.logprobs import token_logps
from upweight.models.offload import offloaded
from upweight.types import Tree

ALLOWED = {"fp32": (1e-4, 1e-3), "bf16": (0.15, 0.15)}
"""Largest difference of a token's log-prob in nats, and of a parameter's gradient over its norm.

bf16 keeps 8 bits: some twenty rounded products move these models' log-probs by hundredths, their
gradients by a few hundredths of themselves, as the rows for transformers alone show. A token that
reads a sibling moves by nats: the planted error has to exceed what is allowed.
"""


@dataclass(frozen=True)
class Check:
    """What was found off and what is allowed: (log-probs, gradients), None where nothing is
    allowed for. A planted error has to be found."""

    model: str
    precision: str
    way: str
    found: tuple[float, float | None]
    allowed: tuple[float, float | None]
    planted: bool = False

    @property
    def holds(self) -> bool:
        pairs = zip(self.found, self.allowed, strict=True)
        inside = all(f <= a for f, a in pairs if f is not None and a is not None)
        return inside != self.planted

    def cells(self) -> list[str]:
        numbers = chain(*zip(self.found, self.allowed, strict=True))
        shown = ["-" if x is None else f"{x:.2g}" for x in numbers]
        return [self.model, self.precision, self.way, *shown, "yes" if self.holds else "NO"]


def checks_table(checks: Sequence[Check]) -> str:
    head = ["model", "precision", "way", "log-prob off, nats", "allowed"]
    return markdown_table([*head, "gradient off", "allowed", "holds"], [c.cells() for c in checks])


def weigh(logps: Tensor) -> Tensor:
    """A scalar in which every token counts differently, so that swapped tokens show."""
    slope = torch.linspace(0.5, 1.5, len(logps), dtype=logps.dtype, device=logps.device)
    return (logps * slope).mean()


Values = tuple[Tensor, dict[str, Tensor]]


def values(lm: LanguageModel, logps: Tensor) -> Values:
    """Log-probs, and the gradient of a scalar of them for each trained parameter, in float64."""
    weigh(logps).backward()
    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in lm.model.named_parameters()
        if p.requires_grad
    }
    lm.model.zero_grad(set_to_none=True)
    return logps.detach().cpu().double(), {n: g.cpu().double() for n, g in grads.items()}


def one_at_a_time(lm: LanguageModel, trees: Sequence[Tree]) -> Tensor:
    """transformers alone, a whole sequence for each response, logits and all."""
    pieces: list[Tensor] = []
    for tree in trees:
        for response in tree.responses:
            ids = torch.tensor([[*tree.prompt, *response]], device=lm.device)
            out = lm.model(input_ids=ids, use_cache=False).logits[0, len(tree.prompt) - 1 : -1]
            table = at_least_fp32(out).log_softmax(-1)
            pieces.append(table.gather(1, ids[0, len(tree.prompt) :, None])[:, 0])
    return torch.cat(pieces)


def oracle(lm: LanguageModel, trees: Sequence[Tree]) -> Values:
    """The same weights in float64 on the CPU, by transformers' eager attention."""
    exact = deepcopy(lm)
    exact.model.to("cpu", torch.float64)
    exact.device = torch.device("cpu")
    exact.causal.set_attn_implementation("eager")
    return values(exact, one_at_a_time(exact, trees))


def difference(got: Values, wanted: Values) -> tuple[float, float | None]:
    """(largest of a log-prob, largest of a parameter's gradient relative to its norm).

    A parameter with next to no gradient is held to a hundredth of all parameters' norm.
    """
    logps = float((got[0] - wanted[0]).abs().max())
    least = 0.01 * math.sqrt(sum(float(w.square().sum()) for w in wanted[1].values()))
    grads = [
        float((got[1][n] - w).norm() / max(float(w.norm()), least)) for n, w in wanted[1].items()
    ]
    return (math.inf if math.isnan(logps) else logps), max(
        (math.inf if math.isnan(g) else g for g in grads), default=None
    )


def paths(device: str) -> list[str]:
    """The attention paths that a device has, of those that run.yaml can ask for."""
    known = get_args(Compute.model_fields["attention"].annotation)
    wanted = ("varlen", "flex", "dense") if device == "cuda" else ("tiles", "dense")
    return [path for path in wanted if path in known]


def planned(lm: LanguageModel, **plan: Any) -> LanguageModel:
    """A copy, run in a way of its own."""
    lm = deepcopy(lm)
    lm.plan = ForwardPlan(**plan)
    if lm.plan.shared:
        lm.causal.set_attn_implementation(attention.NAME)
    return lm


def small(family: str, precision: str, device: str) -> LanguageModel:
    """Weights larger than a fresh model's, so that log-probs differ by nats."""
    lm = build(family, FAMILIES[family], PRECISIONS[precision], device)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.1)
    return lm


def broken(model: str, precision: str, way: str, error: Exception) -> Check:
    traceback.print_exc()
    return Check(model, precision, f"{way}: {type(error).__name__}", (math.inf, None), (0.0, None))


@dataclass(frozen=True)
class Subject:
    """What checks are made of: rows, and the names that stand beside each."""

    model: str
    precision: str
    trees: tuple[Tree, ...]

    def check(self, way: str, lm: LanguageModel, truth: Values, **options: int) -> Check:
        """One way through the engine. One that raises does not hold, and the next is tried."""
        with patch.object(attention, "dense_attention", wraps=attention.dense_attention) as dense:
            try:
                with offloaded(lm):
                    logps = token_logps(lm, collate(self.trees), **options)
                got = values(lm, logps)
            except Exception as error:
                return broken(self.model, self.precision, f"{way}, {lm.plan.attention}", error)
        # A path that cannot do what a family asks for hands over to another.
        fell_back = dense.called and lm.plan.attention != "dense"
        way += f" ({'dense, for ' * fell_back}{lm.plan.attention})" * lm.plan.shared
        found = difference(got, truth)
        return Check(self.model, self.precision, way, found, ALLOWED[self.precision])


def check_ways(family: str, precision: str, device: str) -> Iterator[Check]:
    """Each attention path, rows unshared, and by transformers alone, which shows the rounding."""
    lm = small(family, precision, device)
    subject = Subject(family, precision, tuple(random_trees(CHECKED_SHAPES, lm.vocab_size)))
    truth = oracle(lm, subject.trees)
    with attention.native_attention(lm.causal), lm.compute():
        alone = values(lm, one_at_a_time(lm, subject.trees))
    allowed = ALLOWED[precision]
    # What the proof at start takes for the truth.
    yield Check(family, precision, "transformers alone", difference(alone, truth), allowed)
    chosen = proof.find_plan(lm)
    auto = f"auto takes {chosen.attention if chosen.shared else chosen.describe()}"
    yield Check(family, precision, auto, (0.0 if chosen.shared else math.inf, None), (0.0, None))
    for path in paths(device):
        # The variable-length kernel knows half precision only.
        if not (path == "varlen" and precision == "fp32"):
            yield subject.check("attention", planned(lm, attention=path), truth)
    yield subject.check("unshared", planned(lm, shared=False, reason="a check"), truth)
    chained = [replace(t, responses=(tuple(chain(*t.responses)),)) for t in subject.trees]
    leak = token_logps(planned(lm, attention="dense"), collate(chained)).detach().cpu().double()
    off = float((leak - truth[0]).abs().max())
    planted = "planted: reads siblings"
    yield Check(family, precision, planted, (off, None), (allowed[0], None), True)


def check_tuning(precision: str, device: str) -> Iterator[Check]:
    """Frozen head, chunks of the head that are kept and made again, recomputed layers, LoRA."""
    best = "dense" if device == "cuda" and precision == "fp32" else paths(device)[0]
    whole = planned(small("llama", precision, device), attention=best)
    trees = tuple(random_trees(CHECKED_SHAPES, whole.vocab_size))
    check = Subject("llama", precision, trees).check
    chunks = dict(chunk_elements=10_000, kept_elements=25_000)
    frozen, recomputed = deepcopy(whole), deepcopy(whole)
    frozen.causal.get_output_embeddings().weight.requires_grad_(False)
    yield check("head in chunks", whole, oracle(whole, trees), **chunks)
    yield check("frozen head in chunks", frozen, oracle(frozen, trees), **chunks)
    checkpoint_layers(recomputed)
    yield check("checkpointing", recomputed, oracle(whole, trees))
    for way, kept in (("offload", whole), ("offload, checkpointing", recomputed)):
        yield check(way, replace(kept, offload=True), oracle(whole, trees))
    lm = adapted(whole)
    yield check("LoRA", lm, oracle(lm, trees))
    if precision == "bf16":
        lm = adapted(as_saved_in_bf16(whole))
        truth = oracle(lm, trees)
        keep_frozen_in_compute_dtype(lm)
        narrow = sum(p.dtype == lm.compute_dtype for p in lm.model.parameters())
        yield check(f"LoRA, {narrow} frozen matrices in bf16", lm, truth)
    yield from check_nf4(whole, check)


def check_nf4(whole: LanguageModel, check: Callable[..., Check]) -> Iterator[Check]:
    """LoRA on layers in four bits, against plain layers that hold what the bits stand for."""
    precision = "bf16" if whole.compute_dtype == torch.bfloat16 else "fp32"
    if importlib.util.find_spec("bitsandbytes") is None:
        way = "LoRA on nf4: not checked, bitsandbytes is not installed"
        yield Check("llama", precision, way, (0.0, None), (None, None))
        return
    lm = deepcopy(whole)
    nf4.quantize_layers(lm.causal, lm.device)
    lm = adapted(lm)
    plain = deepcopy(lm)
    nf4.in_full(plain.model)
    trees = tuple(random_trees(CHECKED_SHAPES, lm.vocab_size))
    truth = oracle(plain, trees)
    num = len(nf4.quantized_layers(lm.model))
    yield check(f"LoRA on {num} matrices in nf4", lm, truth)
    for layer in nf4.quantized_layers(lm.model):
        layer.scales.data = layer.scales.data.roll(1)
    found = check("planted: nf4 with the next block's scales", lm, truth)
    yield replace(found, planted=math.isfinite(found.found[0]))


def adapted(lm: LanguageModel) -> LanguageModel:
    """With an adapter whose B is not zero: there A would have no gradient."""
    lm = add_lora(deepcopy(lm), rank=4, alpha=8.0, dropout=0.0, targets="all-linear", seed=0)
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    return lm


def check_head(precision: str, device: str, vocab: int, width: int) -> Iterator[Check]:
    """The head alone at a real vocabulary, on given hidden states, at plain and at large logits.

    In bf16 a log-prob is off by its own rounding, 2^-8 of |log p| + ln V + 1, so what is shown is
    in units of that.
    """
    config = llama(width, 64, 1, (2, 2), vocab)
    lm = build("llama", config, PRECISIONS[precision], device)
    weight = lm.causal.get_output_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(50, width, generator=generator).to(device)
    targets = torch.randint(0, vocab, (50,), generator=generator).to(device)
    for scale, frozen in ((1.0, False), (1.0, True), (20.0, False)):
        with torch.no_grad():
            weight.normal_(0.0, scale * width**-0.5)
        weight.requires_grad_(not frozen)
        hidden = states.clone().requires_grad_()
        got = head_logps(lm, hidden, targets, 20 * vocab, 30 * vocab)
        exact = [x.detach().to(PRECISIONS[precision]).double() for x in (hidden, weight)]
        h, w = (x.requires_grad_() for x in exact)
        wanted = (h @ w.T).log_softmax(-1)[torch.arange(50, device=device), targets]
        unit = 2**-8 * (wanted.abs() + math.log(vocab) + 1) if precision == "bf16" else 1.0
        off = float(((got - wanted).abs() / unit).max().detach())
        leaves = (hidden,) if frozen else (hidden, weight)
        ours = torch.autograd.grad(weigh(got), leaves)
        theirs = torch.autograd.grad(weigh(wanted), (h, w)[: len(leaves)])
        slope = max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))
        way = f"head alone, {'frozen' if frozen else 'trained'}, logits to {3 * scale:.0f}"
        allowed = (1.0, 0.02 if scale == 1.0 else None) if precision == "bf16" else (1e-4, 1e-4)
        yield Check(f"V {vocab:,}", precision, way, (off, slope), allowed)


def correctness(device: str, tiny: bool) -> Iterator[Check]:
    """All checks. What cannot even begin is a check that does not hold."""
    vocab, width = (2000, 64) if tiny else (151_936, 896)
    for precision in PRECISIONS:
        parts = [(family, check_ways(family, precision, device)) for family in FAMILIES]
        parts.append(("llama", check_tuning(precision, device)))
        parts.append((f"V {vocab:,}", check_head(precision, device, vocab, width)))
        for model, part in parts:
            try:
                yield from part
            except Exception as error:
                yield broken(model, precision, "the rest", error)
