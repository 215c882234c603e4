"""Every GPU path against the oracle, then its speed on random weights: one command, no downloads.

    python benchmarks/gpu.py

checks token log-probs and gradients of each way through the engine against float64, one sequence at
a time, and times training steps of three models, built on the device, beside a plain trainer on the
same rows. Written to results/gpu.md and gpu.json. Status 1 where a difference is larger than
allowed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import math
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from environment import FOLDER as TRL_FOLDER
from floor import ModelShape, operations
from protocol import LORA, Spec, WorkerError, named, run
from results import markdown_table, save
from upweight.config.sections import Compute
from upweight.data.pack import bins, collate
from upweight.errors import UpweightError
from upweight.losses import PAIR_LOSSES, PairLogps
from upweight.models import attention, proof
from upweight.models.adapter import add_lora
from upweight.models.head import at_least_fp32, head_logps
from upweight.models.load import ForwardPlan, LanguageModel, checkpoint_layers
from upweight.models.logprobs import response_logps, token_logps
from upweight.models.reference import Reference
from upweight.training.loop import Hooks, Plan, Progress, fit
from upweight.training.memory import free_cached, is_out_of_memory, plan_memory
from upweight.training.objectives import pair
from upweight.training.optimizer import clip, make_optimizer
from upweight.types import Forest, Preference, ResponseId, RowId, Tree

BETA, LEARNING_RATE = 0.1, 1e-6
OURS, PLAIN, TRL = "upweight", "plain", "TRL"
MOST_STEPS = 8
"""Timed steps at most: what a fast cell does not need, the slow ones get."""

NO_TIME, FULL = "not reached in the time given", "out of memory"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

ALLOWED = {"fp32": (1e-4, 1e-3), "bf16": (0.15, 0.15)}
"""Largest difference of a token's log-prob in nats, and of a parameter's gradient over its norm.

bf16 keeps 8 bits: some twenty rounded products move these models' log-probs by hundredths, their
gradients by a few hundredths of themselves, as the rows for transformers alone show. A token that
reads a sibling moves by nats: the planted error has to exceed what is allowed.
"""

ALLOWED_LARGE = 0.02
"""At full size, of a response's log-prob, in nats per token: upweight against the plain trainer.
Rounding is a twentieth of it; a rejected response that reads the chosen one is four times as far.
"""

DATA_SHEET = {"H100 80GB HBM3": 989.4, "H100 PCIe": 756, "H200": 989.4}
DATA_SHEET |= {"H100 NVL": 835, "A100": 312, "L40S": 362, "B200": 2250}
"""Dense bf16 TFLOP/s that the vendor gives, by a part of the device's name."""


@dataclass(frozen=True)
class Size:
    """A model to be timed: Llama's layers, with these widths."""

    name: str
    config: Mapping[str, Any]
    lora: bool = False


def _llama(width: int, inner: int, layers: int, heads: tuple[int, int], vocab: int) -> dict:
    return dict(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        max_position_embeddings=4096,
    )


SIZES = (
    Size("0.5B, full", {**_llama(896, 4864, 24, (14, 2), 151_936), "tie_word_embeddings": True}),
    Size("1.5B, full", {**_llama(1536, 8960, 28, (12, 2), 151_936), "tie_word_embeddings": True}),
    Size("8B, LoRA", _llama(4096, 14336, 32, (32, 8), 128_256), lora=True),
)
Shapes = Mapping[tuple[int, int, int], int]
SHAPES: Shapes = {(150, 50, 50): 64, (1000, 300, 300): 16, (200, 400, 400): 32}
"""Tokens of prompt, chosen and rejected, and how many such pairs make a step."""

TOY_SIZES = (
    Size("toy, full", {**_llama(64, 128, 2, (4, 2), 1000), "tie_word_embeddings": True}),
    Size("toy, LoRA", _llama(64, 128, 2, (4, 2), 1000), lora=True),
)
TOY_SHAPES: Shapes = {(15, 5, 5): 8, (100, 30, 30): 4, (20, 40, 40): 4}

_SMALL = {**_llama(128, 256, 2, (4, 2), 1000), "head_dim": 32}
FAMILIES = {
    "llama": _SMALL,
    "mistral": {**_SMALL, "sliding_window": 8, "tie_word_embeddings": True},
    "gemma2": {
        **_SMALL,
        "sliding_window": 8,
        "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": 2.0,
    },
}
"""What is checked: a plain model, windows on a tied head, capped scores and logits."""

CHECKED_SHAPES = ((14, 7, 1, 11), (1, 4, 6), (70, 33), (9, 2, 12, 5, 1))


def build(
    family: str, config: Mapping[str, Any], weights: torch.dtype, compute: torch.dtype, device: str
) -> LanguageModel:
    """A model of random weights, made where it is used, and what a run would know of it."""
    torch.manual_seed(0)
    with torch.device(device):
        made = AutoConfig.for_model(family, **config)
        model = AutoModelForCausalLM.from_config(made, dtype=weights).eval()
    name = f"random {family}"
    tokenizer = words(config["vocab_size"])
    return LanguageModel(model, tokenizer, name, "", torch.device(device), compute, ForwardPlan())


@functools.lru_cache(1)
def words(vocab: int) -> PreTrainedTokenizerFast:
    """A word for every id, the last of which ends a response."""
    ids = {f"w{i}": i for i in range(vocab - 1)} | {"</s>": vocab - 1}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="w0")


def random_trees(shapes: Sequence[Sequence[int]], vocab: int) -> list[Tree]:
    """A tree for each (prompt length, response lengths ...); its first response is preferred."""
    draw = random.Random(0)

    def ids(num: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocab - 1) for _ in range(num))

    return [
        Tree(
            prompt=ids(prompt),
            responses=tuple((*ids(n - 1), vocab - 1) for n in responses),
            preferences=tuple(Preference(0, k) for k in range(1, len(responses))),
            ids=tuple(ResponseId(RowId("random", line), k) for k in range(len(responses))),
            stopped=(True,) * len(responses),
        )
        for line, (prompt, *responses) in enumerate(shapes, 1)
    ]


# -- correctness -----------------------------------------------------------------------------------


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


def small(family: str, precision: str, device: str, weights: torch.dtype) -> LanguageModel:
    """Weights larger than a fresh model's, so that log-probs differ by nats."""
    lm = build(family, FAMILIES[family], torch.float32, PRECISIONS[precision], device)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.1)
    lm.model.to(weights)
    return lm


ERRORS = (RuntimeError, TypeError, AttributeError, ImportError, UpweightError)
"""What a kernel that is not there, or not for this device, ends in."""


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
                got = values(lm, token_logps(lm, collate(self.trees), **options))
            except ERRORS as error:
                return broken(self.model, self.precision, f"{way}, {lm.plan.attention}", error)
        # A path that cannot do what a family asks for hands over to another.
        fell_back = dense.called and lm.plan.attention != "dense"
        way += f" ({'dense, for ' * fell_back}{lm.plan.attention})" * lm.plan.shared
        found = difference(got, truth)
        return Check(self.model, self.precision, way, found, ALLOWED[self.precision])


def check_ways(family: str, precision: str, device: str) -> Iterator[Check]:
    """Each attention path, rows unshared, and by transformers alone, which shows the rounding."""
    lm = small(family, precision, device, torch.float32)
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
    whole = planned(small("llama", precision, device, torch.float32), attention=best)
    trees = tuple(random_trees(CHECKED_SHAPES, whole.vocab_size))
    check = Subject("llama", precision, trees).check
    chunks = dict(chunk_elements=10_000, kept_elements=25_000)
    frozen, recomputed = deepcopy(whole), deepcopy(whole)
    frozen.causal.get_output_embeddings().weight.requires_grad_(False)
    yield check("head in chunks", whole, oracle(whole, trees), **chunks)
    yield check("frozen head in chunks", frozen, oracle(frozen, trees), **chunks)
    checkpoint_layers(recomputed)
    yield check("checkpointing", recomputed, oracle(whole, trees))
    adapters = {"LoRA": whole}
    if precision == "bf16":
        half = small("llama", precision, device, torch.bfloat16)
        adapters["LoRA, bf16 weights"] = planned(half, attention=best)
    for way, lm in adapters.items():
        lm = adapted(lm)
        yield check(way, lm, oracle(lm, trees))


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
    config = _llama(width, 64, 1, (2, 2), vocab)
    lm = build("llama", config, torch.float32, PRECISIONS[precision], device)
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
            except ERRORS as error:
                yield broken(model, precision, "the rest", error)


# -- speed -----------------------------------------------------------------------------------------


@dataclass
class Budget:
    """The time that is left, shared evenly among the parts that are left."""

    ends: float
    parts: int

    def take(self) -> float | None:
        """When the next part has to end; None where nothing is left for it."""
        left = self.ends - time.monotonic()
        share, self.parts = left / max(1, self.parts), self.parts - 1
        return time.monotonic() + share if left > 0 else None


@dataclass(frozen=True)
class Case:
    """One model on a step's rows of one shape, and the operations that the step needs."""

    size: Size
    lengths: str
    trees: tuple[Tree, ...]
    work: float

    @property
    def row(self) -> int:
        """Tokens of a pair that is padded, prompts and all."""
        return 2 * max(len(t.prompt) + max(map(len, t.responses)) for t in self.trees)


@dataclass
class Cell:
    """What one side came to on a case: seconds of its steps, the first of which is a warm-up.

    `at_once` is the tokens of a forward pass, padding and repeated prompts among them.
    """

    model: str
    lengths: str
    side: str
    pairs: int
    tokens: int
    work: float
    attention: str
    at_once: int = 0
    seconds: list[float] = field(default_factory=list[float])
    peak_bytes: int | None = None
    note: str = ""
    failed: bool = False

    @property
    def step(self) -> float | None:
        return statistics.median(self.seconds[1:]) if len(self.seconds) > 1 else None


def blank(case: Case, side: str, attention_path: str) -> Cell:
    tokens = sum(tree.num_tokens for tree in case.trees)
    pairs = len(case.trees)
    return Cell(case.size.name, case.lengths, side, pairs, tokens, case.work, attention_path)


def shape_of(model: torch.nn.Module) -> ModelShape:
    config = model.config
    matrices = [m.weight for m in model.base_model.modules() if isinstance(m, torch.nn.Linear)]
    trunk: dict[tuple[int, int], int] = {}
    for out, width in (m.shape for m in matrices):
        trunk[out, width] = trunk.get((out, width), 0) + 1
    head_width = getattr(config, "head_dim", None)
    head_width = head_width or config.hidden_size // config.num_attention_heads
    channels = config.num_hidden_layers * config.num_attention_heads * head_width
    return ModelShape(trunk, tuple(model.get_output_embeddings().weight.shape), channels)


class Steps:
    """When steps end, and whether another fits: at least one beside the warm-up is tried."""

    def __init__(self, until: float) -> None:
        self.until = until
        self.last = time.monotonic()
        self.seconds: list[float] = []

    def ended(self, *_: Any) -> None:
        now = time.monotonic()
        self.seconds.append(now - self.last)
        self.last = now

    def enough(self) -> bool:
        if len(self.seconds) > MOST_STEPS:
            return True
        return bool(self.seconds) and self.last + self.seconds[-1] > self.until


def optimizer_of(lm: LanguageModel) -> torch.optim.AdamW:
    """The engine's, for both sides."""
    return make_optimizer(
        lm.model,
        learning_rate=LEARNING_RATE,
        weight_decay=0.0,
        beta1=0.9,
        beta2=0.999,
        epsilon=1e-8,
    )


def our_steps(lm: LanguageModel, trees: Sequence[Tree], capacity: int, until: float) -> Steps:
    """The engine's own loop, with a reference that is known."""
    reference = Reference("the model as it starts", Path())
    with torch.no_grad():
        for group in bins(trees, capacity):
            reference.take(forest := collate(group), token_logps(lm, forest))

    def forests(_: int) -> list[Forest]:
        return [collate(group) for group in bins(trees, capacity)]

    loss = functools.partial(PAIR_LOSSES["dpo"], beta=BETA)
    plan = Plan(10**9, 10**9, LEARNING_RATE, 0.0, "constant", 1.0)
    steps = Steps(until)
    hooks = Hooks(steps.ended, lambda progress: False, lambda progress: None, steps.enough)
    fit(lm, optimizer_of(lm), pair(reference, loss, BETA), forests, plan, hooks, Progress())
    return steps


def padded_logps(lm: LanguageModel, trees: Sequence[Tree]) -> Tensor:
    """What usual trainers do: padded rows [chosen; rejected], logits, log_softmax, sums."""
    rows = [(t.prompt, t.responses[k]) for k in (0, 1) for t in trees]

    def padded(parts: list[list[int]]) -> Tensor:
        return pad_sequence([torch.tensor(p) for p in parts], batch_first=True).to(lm.device)

    ids = padded([[*prompt, *response] for prompt, response in rows])
    there = padded([[1] * (len(prompt) + len(response)) for prompt, response in rows])
    scored = padded([[0] * len(prompt) + [1] * len(response) for prompt, response in rows])
    with torch.autocast(lm.device.type, torch.bfloat16):
        logits = lm.model(input_ids=ids, attention_mask=there, use_cache=False).logits
    # accelerate hands a trainer its logits in fp32.
    table = logits[:, :-1].float().log_softmax(-1)
    return (table.gather(-1, ids[:, 1:, None])[..., 0] * scored[:, 1:]).sum(-1)


def plain_steps(lm: LanguageModel, trees: Sequence[Tree], at_once: int, until: float) -> Steps:
    """`at_once` pairs in a forward pass, their reference known, accumulated over the step."""
    batches = [trees[i : i + at_once] for i in range(0, len(trees), at_once)]
    counts = [torch.tensor([[len(t.responses[k]) for t in b] for k in (0, 1)]) for b in batches]
    with torch.no_grad():
        known = [padded_logps(lm, batch).chunk(2) for batch in batches]
    optimizer, steps = optimizer_of(lm), Steps(until)
    while not steps.enough():
        total = torch.zeros((), device=lm.device)
        for batch, reference, count in zip(batches, known, counts, strict=True):
            policy = padded_logps(lm, batch).chunk(2)
            tokens = count.to(lm.device)
            loss = PAIR_LOSSES["dpo"](PairLogps(*policy, *reference, *tokens), beta=BETA)
            (loss.sum() / len(trees)).backward()
            total += loss.detach().sum()
        clip(lm.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert math.isfinite(total.item())
        steps.ended()
    return steps


Attempt = Callable[[LanguageModel, Sequence[Tree], int, float], Steps]


def measure(
    cell: Cell, lm: LanguageModel, case: Case, attempt: Attempt, sizes: Sequence[int], until: float
) -> int:
    """`attempt` at the largest of `sizes` that memory allows, which is returned."""
    cuda = lm.device.type == "cuda"
    for size in sizes:
        free_cached(lm.device)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        try:
            cell.seconds = attempt(lm, case.trees, size, until).seconds
        except (RuntimeError, MemoryError, UpweightError) as error:
            blame(cell, error, f"at {size}")
        else:
            cell.peak_bytes = torch.cuda.max_memory_allocated() if cuda else None
            cell.note = "" if len(cell.seconds) > 1 else "no time for a step after the warm-up"
        lm.model.zero_grad(set_to_none=True)
        if not cell.note.startswith(FULL):
            return size
    return sizes[-1]


def blame(cell: Cell, error: Exception, where: str) -> None:
    """The cell says why it is empty. Too little memory is a result, anything else a failure."""
    if is_out_of_memory(error):
        cell.note = f"{FULL} {where}"
        return
    traceback.print_exc()
    first = (str(error).splitlines() or [""])[0]
    cell.note, cell.failed = f"{type(error).__name__}: {first[:100]}", True


def halves(most: int, least: int) -> list[int]:
    found = [most]
    while found[-1] > least:
        found.append(max(least, found[-1] // 2))
    return found


def time_case(lm: LanguageModel, case: Case, budget: Budget) -> Iterator[Cell | Check]:
    """upweight and the plain trainer in turn, and whether they agree on the rows."""
    ours = blank(case, OURS, lm.plan.attention if lm.plan.shared else "unshared")
    plain = blank(case, PLAIN, "sdpa")
    free_cached(lm.device)
    steps = [range(len(case.trees))]
    capacity = min(plan_memory(lm, case.trees, steps).tokens_per_bin, ours.tokens)
    if (until := budget.take()) is None:
        ours.note = NO_TIME
    else:
        sizes = halves(capacity, max(tree.num_tokens for tree in case.trees))
        used = measure(ours, lm, case, our_steps, sizes, until)
        ours.at_once = max(collate(group).num_tokens for group in bins(case.trees, used))
    yield ours
    if (until := budget.take()) is None:
        plain.note = NO_TIME
    else:
        # Powers of two, so that they divide a step's pairs evenly.
        most = 1 << min(len(case.trees), max(1, 2 * capacity // case.row)).bit_length() - 1
        with attention.native_attention(lm.causal):
            plain.at_once = measure(plain, lm, case, plain_steps, halves(most, 1), until) * case.row
    yield plain
    if ours.seconds and plain.seconds:
        yield agreement(lm, case)


def agreement(lm: LanguageModel, case: Case) -> Check:
    """One pair's log-probs by either side, with the weights as they are."""
    forest = collate(case.trees[:1])
    with torch.no_grad():
        ours = response_logps(token_logps(lm, forest), forest)
        with attention.native_attention(lm.causal):
            plain = padded_logps(lm, case.trees[:1])
    each = (ours - plain).abs() / forest.tokens_per_response.to(lm.device)
    way = f"upweight against plain, {case.lengths}"
    return Check(case.size.name, "bf16", way, (float(each.max()), None), (ALLOWED_LARGE, None))


def trl_python() -> Path | None:
    """An interpreter that has TRL: its own environment's, or this one. None is installed here."""
    own = TRL_FOLDER / "bin/python"
    if own.exists():
        return own
    return Path(sys.executable) if importlib.util.find_spec("trl") is not None else None


def time_trl(case: Case, folder: Path, at_once: int, device: str, budget: Budget) -> Cell:
    """TRL on the same rows in a process of its own: three steps, which nothing cuts short."""
    cell = blank(case, TRL, "sdpa")
    python, until = trl_python(), budget.take()
    if python is None or until is None:
        cell.note = "TRL is not installed" if python is None else NO_TIME
        return cell
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in as_text(case)))
    spec = Spec(
        task="train",
        model=str(folder),
        rows=str(rows),
        steps=3,
        pairs_per_step=len(case.trees),
        precision="bfloat16",
        lora=case.size.lora,
        beta=BETA,
        learning_rate=LEARNING_RATE,
    )
    plain = {"gradient_checkpointing": False, "precompute_ref_log_probs": True}
    for size in halves(max(1, at_once), 1):
        own = {**plain, "use_cpu": device == "cpu", "per_device_train_batch_size": size}
        cell.at_once = size * case.row
        try:
            events = run(python, "trl_worker.py", replace(spec, settings=own))
        except WorkerError as error:
            cell.note = f"{FULL} at {size}" if FULL in error.said.lower() else str(error)[:100]
            if cell.note.startswith(FULL):
                continue
            print(error.said, file=sys.stderr)
            cell.failed = True
        else:
            cell.seconds = [step["seconds"] for step in named(events, "step")]
            cell.note = ""
        break
    return cell


def as_text(case: Case) -> Iterator[dict[str, str]]:
    """The trees as TRL reads rows: words that the saved tokenizer makes the same ids of."""
    name = words(case.size.config["vocab_size"]).convert_ids_to_tokens
    for tree in case.trees:
        prompt, chosen, rejected = (" ".join(name(list(x))) for x in (tree.prompt, *tree.responses))
        yield {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}


def time_model(
    size: Size, shapes: Shapes, device: str, budget: Budget, trl: bool
) -> Iterator[Cell | Check]:
    """Every shape on one model; then TRL's turn, when this program's memory is free again."""
    weights = torch.bfloat16 if size.lora else torch.float32
    lm = build("llama", size.config, weights, torch.bfloat16, device)
    shape = shape_of(lm.model)
    cases = [
        Case(size, "/".join(map(str, lengths)), trees, operations(shape, trees, lora=size.lora))
        for lengths, pairs in shapes.items()
        for trees in [tuple(random_trees([lengths] * pairs, lm.vocab_size))]
    ]
    lm.plan = proof.find_plan(lm)
    if lm.plan.shared:
        lm.causal.set_attn_implementation(attention.NAME)
    with tempfile.TemporaryDirectory(prefix="upweight-gpu-") as folder:
        if trl and trl_python() is not None:
            lm.causal.save_pretrained(folder)
            words(lm.vocab_size).save_pretrained(folder)
        if size.lora:
            lm = add_lora(lm, **LORA, seed=0)
        at_once: list[int] = []
        for case in cases:
            for result in time_case(lm, case, budget):
                if isinstance(result, Cell) and result.side == PLAIN:
                    at_once.append(result.at_once // case.row)
                yield result
        del lm
        free_cached(torch.device(device))
        for case, pairs in zip(cases, at_once, strict=True) if trl else ():
            yield time_trl(case, Path(folder), pairs, device, budget)


# -- report ----------------------------------------------------------------------------------------


def matmul_peak(device: str, size: int) -> float:
    """Operations per second of a square bf16 product of random numbers, the best of ten."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = math.inf
    for _ in range(10):
        start = time.perf_counter()
        _ = a @ b, a @ b, a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / 3)
    return 2 * size**3 / best


def speed_table(cells: Sequence[Cell], peak: float, sheet: float | None) -> str:
    head = ["model", "P/C/R", "pairs", "side", "pairs/s", "x plain", "unique tokens/s", "MFU"]
    head += ["MFU, data sheet", "peak GiB", "tokens at once", "attention", "steps", "note"]
    plain = {(c.model, c.lengths): c.step for c in cells if c.side == PLAIN}
    rows: list[list[str]] = []
    for cell in cells:
        step, other = cell.step, plain.get((cell.model, cell.lengths))
        rates = ["-"] * 5
        if step is not None:
            rates = [
                f"{cell.pairs / step:.2f}",
                f"{other / step:.2f}" if other else "-",
                f"{cell.tokens / step:,.0f}",
                f"{cell.work / step / peak:.1%}",
                f"{cell.work / step / sheet:.1%}" if sheet else "-",
            ]
        memory = "-" if cell.peak_bytes is None else f"{cell.peak_bytes / 2**30:.1f}"
        used = f"{cell.at_once:,}" if cell.at_once else "-"
        done = str(max(0, len(cell.seconds) - 1))
        about = [cell.model, cell.lengths, str(cell.pairs), cell.side]
        rows.append([*about, *rates, memory, used, cell.attention, done, cell.note])
    return markdown_table(head, rows)


def hardware(device: str, tiny: bool) -> dict[str, Any]:
    """Device, versions, and how fast it multiplies matrices."""
    names = ("torch", "transformers", "peft", "upweight")
    found: dict[str, Any] = {name: version(name) for name in names}
    found |= {"device": "cpu", "matmul_peak": matmul_peak(device, 256 if tiny else 8192)}
    if device == "cuda":
        about = torch.cuda.get_device_properties(0)
        found |= {"device": about.name, "memory_bytes": about.total_memory}
        found["cuda"] = torch.version.cuda
    sheet = [v for name, v in DATA_SHEET.items() if name in found["device"]]
    return found | {"data_sheet_peak": sheet[0] * 1e12 if sheet else None}


def describe(about: Mapping[str, Any]) -> str:
    sheet, memory = about["data_sheet_peak"], about.get("memory_bytes")
    parts = [about["device"]] + ([f"{memory / 2**30:.0f} GiB"] if memory else [])
    parts.append(f"bf16 products at {about['matmul_peak'] / 1e12:.3g} TFLOP/s")
    parts += [f"data sheet {sheet / 1e12:.0f}"] if sheet else []
    names = ("upweight", "torch", "cuda", "transformers", "peft")
    versions = [f"{name} {about[name]}" for name in names if name in about]
    return f"{', '.join(parts)}\n\n{', '.join(versions)}"


@dataclass
class Report:
    """What is known so far, kept on disk as it grows."""

    name: str
    about: Mapping[str, Any]
    checks: list[Check] = field(default_factory=list[Check])
    cells: list[Cell] = field(default_factory=list[Cell])

    @property
    def holds(self) -> bool:
        failed = any(cell.failed for cell in self.cells)
        return all(check.holds for check in self.checks) and not failed

    def text(self) -> str:
        failed = sum(not check.holds for check in self.checks)
        verdict = f"{failed} of {len(self.checks)} NOT within what is allowed" if failed else "hold"
        peak, sheet = self.about["matmul_peak"], self.about["data_sheet_peak"]
        parts = ["# upweight on a GPU", describe(self.about), f"## Checks: {verdict}"]
        parts += [checks_table(self.checks), "## Speed", speed_table(self.cells, peak, sheet)]
        return "\n\n".join(parts)

    def add(self, result: Check | Cell) -> None:
        if isinstance(result, Check):
            self.checks.append(result)
            print(" | ".join(result.cells()), flush=True)
        else:
            self.cells.append(result)
            rate = f"{result.pairs / result.step:.2f} pairs/s" if result.step else result.note
            print(f"{result.model} | {result.lengths} | {result.side}: {rate}", flush=True)

    def save(self) -> Path:
        record = {
            "about": self.about,
            "checks": [{**asdict(check), "holds": check.holds} for check in self.checks],
            "cells": [asdict(cell) for cell in self.cells],
        }
        return save(self.name, self.text(), record)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (default 8)")
    parser.add_argument("--tiny", action="store_true", help="toy sizes on the CPU: a rehearsal")
    parser.add_argument("--trl", action="store_true", help="TRL too, where it is installed")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; --tiny rehearses the program on the CPU")
    return args


def main() -> int:
    # A step that has begun is finished, and the files are written, in the last twentieth.
    began, args = time.monotonic(), arguments()
    transformers.utils.logging.set_verbosity_error()
    device = "cpu" if args.tiny else "cuda"
    sizes, shapes = (TOY_SIZES, TOY_SHAPES) if args.tiny else (SIZES, SHAPES)
    report = Report("gpu-tiny" if args.tiny else "gpu", hardware(device, args.tiny))
    print(describe(report.about), flush=True)
    for check in correctness(device, args.tiny):
        report.add(check)
    report.save()
    sides = 3 if args.trl else 2
    for done, size in enumerate(sizes):
        left = (len(sizes) - done) * len(shapes) * sides
        budget = Budget(began + 57 * args.minutes, left)
        try:
            for result in time_model(size, shapes, device, budget, args.trl):
                report.add(result)
                report.save()
        except (RuntimeError, MemoryError, UpweightError) as error:
            # The model itself did not fit, or the device is gone. The others have their turn.
            cell = Cell(size.name, "-", OURS, 0, 0, 0.0, "-")
            blame(cell, error, "before the first step")
            report.add(cell)
        free_cached(torch.device(device))
    path = report.save()
    print(f"\n{path.read_text()}\n{path}, {time.monotonic() - began:.0f} s")
    return 0 if report.holds else 1


if __name__ == "__main__":
    sys.exit(main())
