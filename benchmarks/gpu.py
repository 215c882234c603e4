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
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

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
from upweight.data.pack import bins, collate
from upweight.errors import UpweightError
from upweight.losses import PAIR_LOSSES, PairLogps
from upweight.models import attention, proof
from upweight.models.adapter import add_lora
from upweight.models.head import head_logps
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

NO_TIME = "not reached in the time given"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

ALLOWED = {"fp32": (1e-4, 1e-3), "bf16": (0.15, 0.15)}
"""Largest difference of a token's log-prob in nats, and of a parameter's gradient over its norm.

bf16 keeps 8 bits: some twenty rounded products move these models' log-probs by hundredths, their
gradients by a few hundredths of themselves, as the rows for transformers alone show. A token that
reads a sibling moves by nats: the planted error has to exceed what is allowed.
"""

ALLOWED_LARGE = 0.02
"""At full size, of a response's log-prob, in nats per token: upweight against the plain trainer."""

DATA_SHEET = {"H100 80GB HBM3": 989.4, "H100 PCIe": 756, "H200": 989.4, "GH200": 989.4}
DATA_SHEET |= {"A100": 312, "L40S": 362, "B200": 2250}
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
    Size("0.5B", {**_llama(896, 4864, 24, (14, 2), 151_936), "tie_word_embeddings": True}),
    Size("1.5B", {**_llama(1536, 8960, 28, (12, 2), 151_936), "tie_word_embeddings": True}),
    Size("8B", _llama(4096, 14336, 32, (32, 8), 128_256), lora=True),
)
SHAPES = {(150, 50, 50): 64, (1000, 300, 300): 16, (200, 400, 400): 32}
"""Tokens of prompt, chosen and rejected, and how many such pairs make a step."""

TOY_SIZES = (
    Size("toy", {**_llama(64, 128, 2, (4, 2), 1000), "tie_word_embeddings": True}),
    Size("toy, LoRA", _llama(64, 128, 2, (4, 2), 1000), lora=True),
)
TOY_SHAPES = {(15, 5, 5): 8, (100, 30, 30): 4, (20, 40, 40): 4}

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
    return LanguageModel(
        model, tokenizer, name, "", torch.device(device), compute, ForwardPlan()
    )


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
    """What was found off and what is allowed: (log-probs, gradients), None where nothing is held
    to it. A planted error has to be found."""

    model: str
    precision: str
    way: str
    found: tuple[float, float | None]
    allowed: tuple[float, float | None] | None
    planted: bool = False

    @property
    def holds(self) -> bool:
        if self.allowed is None:
            return True
        pairs = zip(self.found, self.allowed, strict=True)
        inside = all(f <= a for f, a in pairs if f is not None and a is not None)
        return inside != self.planted

    def cells(self) -> list[str]:
        allowed = self.allowed or (None, None)
        shown = ["-" if x is None else f"{x:.2g}" for x in chain(*zip(self.found, allowed))]  # noqa: B905
        verdict = "-" if self.allowed is None else "yes" if self.holds else "NO"
        return [self.model, self.precision, self.way, *shown, verdict]


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
            table = proof.at_least_fp32(out).log_softmax(-1)
            pieces.append(table[torch.arange(len(response)), ids[0, len(tree.prompt) :]])
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
    grads = [float((got[1][n] - w).norm() / max(float(w.norm()), least)) for n, w in wanted[1].items()]
    return (math.inf if math.isnan(logps) else logps), max(
        (math.inf if math.isnan(g) else g for g in grads), default=None
    )


def paths(device: str) -> list[str]:
    """The attention paths that a device has; FlexAttention where the engine knows it."""
    found = ["varlen", "dense"] if device == "cuda" else ["tiles", "dense"]
    return found + ["flex"] * (importlib.util.find_spec("upweight.models.flex") is not None)


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


def check_ways(family: str, precision: str, device: str) -> Iterator[Check]:
    """Each attention path, rows unshared, and by transformers alone, which shows the rounding."""
    lm = small(family, precision, device, torch.float32)
    trees = random_trees(CHECKED_SHAPES, lm.vocab_size)
    forest, truth = collate(trees), oracle(lm, trees)
    row = functools.partial(Check, family, precision)
    with attention.native_attention(lm.causal), lm.compute():
        alone = one_at_a_time(lm, trees)
    yield row("transformers alone", difference(values(lm, alone), truth), None)
    ways: dict[str, LanguageModel] = {}
    for path in paths(device):
        # The variable-length kernel knows half precision only.
        if not (path == "varlen" and precision == "fp32"):
            ways[f"{path} attention"] = planned(lm, attention=path)
    ways["unshared"] = planned(lm, shared=False, reason="a check")
    for way, ready in ways.items():
        found = difference(values(ready, token_logps(ready, forest)), truth)
        yield row(way, found, ALLOWED[precision])
    chained = [replace(t, responses=(tuple(chain(*t.responses)),)) for t in trees]
    leak = token_logps(next(iter(ways.values())), collate(chained)).detach().cpu().double()
    off = float((leak - truth[0]).abs().max())
    yield row("planted: reads its siblings", (off, None), (ALLOWED[precision][0], None), True)


def check_tuning(precision: str, device: str) -> Iterator[Check]:
    """Frozen head, chunks of the head that are kept and made again, recomputed layers, LoRA."""
    best = "dense" if device == "cuda" and precision == "fp32" else paths(device)[0]
    whole = planned(small("llama", precision, device, torch.float32), attention=best)
    trees = random_trees(CHECKED_SHAPES, whole.vocab_size)
    row = functools.partial(Check, "llama", precision)
    head_in_chunks = dict(chunk_elements=10_000, kept_elements=25_000)

    def check(way: str, lm: LanguageModel, **options: int) -> Check:
        found = values(lm, token_logps(lm, collate(trees), **options))
        return row(f"{way} ({best})", difference(found, oracle(lm, trees)), ALLOWED[precision])

    yield check("head in chunks", whole, **head_in_chunks)
    frozen = deepcopy(whole)
    frozen.causal.get_output_embeddings().weight.requires_grad_(False)
    yield check("frozen head in chunks", frozen, **head_in_chunks)
    recomputed = deepcopy(whole)
    checkpoint_layers(recomputed)
    yield check("checkpointing", recomputed)
    yield check("LoRA", adapted(whole))
    if precision == "bf16":
        half = planned(small("llama", precision, device, torch.bfloat16), attention=best)
        yield check("LoRA, bf16 weights", adapted(half))


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
        wanted = (h @ w.T).log_softmax(-1)[torch.arange(50), targets]
        unit = 2**-8 * (wanted.abs() + math.log(vocab) + 1) if precision == "bf16" else 1.0
        off = float(((got - wanted).abs() / unit).max())
        leaves = (hidden,) if frozen else (hidden, weight)
        ours = torch.autograd.grad(weigh(got), leaves)
        theirs = torch.autograd.grad(weigh(wanted), (h, w)[: len(leaves)])
        slope = max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))
        way = f"head alone, {'frozen' if frozen else 'trained'}, logits to {3 * scale:.0f}"
        allowed = (1.0, 0.02 if scale == 1.0 else None) if precision == "bf16" else (1e-4, 1e-4)
        yield Check(f"V {vocab:,}", precision, way, (off, slope), allowed)


def correctness(device: str, tiny: bool) -> Iterator[Check]:
    """All checks. A way that raises is a check that does not hold."""
    for precision in PRECISIONS:
        parts = [(family, check_ways(family, precision, device)) for family in FAMILIES]
        parts.append(("llama", check_tuning(precision, device)))
        vocab, width = (2000, 64) if tiny else (151_936, 896)
        parts.append((f"V {vocab:,}", check_head(precision, device, vocab, width)))
        for model, part in parts:
            try:
                yield from part
            except (RuntimeError, NotImplementedError, TypeError, AttributeError, ImportError) as e:
                print(f"{type(e).__name__}: {e}", file=sys.stderr)
                why = f"raised {type(e).__name__}: {(str(e).splitlines() or [''])[0][:80]}"
                yield Check(model, precision, why, (math.inf, None), (0.0, None))


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
    """One model on one shape of rows. `folder` holds it for a program of its own, if asked for."""

    size: Size
    lengths: tuple[int, int, int]
    trees: tuple[Tree, ...]
    shape: ModelShape


@dataclass
class Cell:
    """What one side came to on a case: seconds of its steps, the first of which is a warm-up."""

    model: str
    lengths: tuple[int, int, int]
    side: str
    seconds: list[float] = field(default_factory=list[float])
    peak_bytes: int | None = None
    at_once: int | None = None
    attention: str = "-"
    note: str = ""

    @property
    def step(self) -> float | None:
        return statistics.median(self.seconds[1:]) if len(self.seconds) > 1 else None


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


def measure(cell: Cell, lm: LanguageModel, trees: Sequence[Tree], attempt: Attempt, least: int, until: float) -> None:
    """`attempt`, computing half as much at once each time that memory runs out."""
    cuda = lm.device.type == "cuda"
    assert cell.at_once is not None
    while True:
        free_cached(lm.device)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        try:
            cell.seconds = attempt(lm, trees, cell.at_once, until).seconds
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        except UpweightError as error:
            cell.note = str(error).splitlines()[0]
            break
        else:
            cell.peak_bytes = torch.cuda.max_memory_allocated() if cuda else None
            cell.note = "" if len(cell.seconds) > 1 else "no time for more than the warm-up step"
            break
        lm.model.zero_grad(set_to_none=True)
        if cell.at_once <= least:
            cell.note = "out of memory"
            break
        cell.at_once = max(least, cell.at_once // 2)
    lm.model.zero_grad(set_to_none=True)


def largest_row(trees: Sequence[Tree]) -> int:
    return max(len(t.prompt) + max(map(len, t.responses)) for t in trees)


def time_case(lm: LanguageModel, case: Case, budget: Budget) -> Iterator[Cell | Check]:
    """upweight and the plain trainer in turn, and whether they agree on the rows."""
    ours, plain = (Cell(case.size.name, case.lengths, side) for side in (OURS, PLAIN))
    ours.attention, plain.attention = lm.plan.attention if lm.plan.shared else "unshared", "sdpa"
    trees = case.trees
    ours.at_once = plan_memory(lm, trees).tokens_per_bin
    if (until := budget.take()) is None:
        ours.note = NO_TIME
    else:
        measure(ours, lm, trees, our_steps, max(t.num_tokens for t in trees), until)
    yield ours
    row = 2 * largest_row(trees)
    plain.at_once = min(len(trees), max(1, ours.at_once // row))
    with attention.native_attention(lm.causal):
        if (until := budget.take()) is None:
            plain.note = NO_TIME
        else:
            measure(plain, lm, trees, plain_steps, 1, until)
    plain.at_once *= row
    yield plain
    if ours.seconds and plain.seconds:
        yield agreement(lm, case)


def agreement(lm: LanguageModel, case: Case) -> Check:
    trees = case.trees[:1]
    forest = collate(trees)
    with torch.no_grad():
        ours = response_logps(token_logps(lm, forest), forest)
        with attention.native_attention(lm.causal):
            plain = padded_logps(lm, trees)
    each = (ours - plain).abs() / forest.tokens_per_response.to(lm.device)
    way = f"{lengths_of(case)} against plain, per token"
    return Check(case.size.name, "bf16", way, (float(each.max()), None), (ALLOWED_LARGE, None))


def lengths_of(case: Case | Cell) -> str:
    return "/".join(map(str, case.lengths))


def trl_python() -> Path | None:
    """An interpreter that has TRL: its own environment's, or this one. None is installed here."""
    own = TRL_FOLDER / "bin/python"
    if own.exists():
        return own
    return Path(sys.executable) if importlib.util.find_spec("trl") is not None else None


def time_trl(case: Case, folder: Path, at_once: int, device: str, budget: Budget) -> Cell:
    """TRL on the same rows in a process of its own, three steps, which nothing cuts short."""
    cell = Cell(case.size.name, case.lengths, TRL, attention="sdpa")
    python, until = trl_python(), budget.take()
    if python is None or until is None:
        cell.note = "TRL is not installed" if python is None else NO_TIME
        return cell
    spec = Spec(
        task="train",
        model=str(folder),
        rows=str(folder / "rows.jsonl"),
        steps=3,
        pairs_per_step=len(case.trees),
        precision="bfloat16",
        lora=case.size.lora,
        beta=BETA,
        learning_rate=LEARNING_RATE,
    )
    Path(spec.rows).write_text("".join(json.dumps(row) + "\n" for row in as_text(case)))
    settings = {
        "use_cpu": device == "cpu",
        "gradient_checkpointing": False,
        "precompute_ref_log_probs": True,
    }
    while True:
        own = {**settings, "per_device_train_batch_size": at_once}
        cell.at_once = at_once * 2 * largest_row(case.trees)
        try:
            events = run(python, "trl_worker.py", replace(spec, settings=own))
        except WorkerError as error:
            full = "out of memory" in error.said.lower()
            if full and at_once > 1:
                at_once //= 2
                continue
            print(error.said, file=sys.stderr)
            cell.note = "out of memory" if full else str(error)[:100]
        else:
            cell.seconds = [step["seconds"] for step in named(events, "step")]
        return cell


def as_text(case: Case) -> Iterator[dict[str, str]]:
    """The trees as TRL reads rows: words that its tokenizer makes the same ids of."""
    name = words(case.shape.head[0]).convert_ids_to_tokens
    for tree in case.trees:
        prompt, chosen, rejected = (" ".join(name(list(x))) for x in (tree.prompt, *tree.responses))
        yield {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}


def time_model(
    size: Size, shapes: Mapping[tuple[int, int, int], int], device: str, budget: Budget, trl: bool
) -> Iterator[Cell | Check]:
    """Every shape on one model; then TRL's turn, when this program's memory is free again."""
    weights = torch.bfloat16 if size.lora else torch.float32
    lm = build("llama", size.config, weights, torch.bfloat16, device)
    shape, vocab = shape_of(lm.model), lm.vocab_size
    lm.plan = proof.find_plan(lm)
    if lm.plan.shared:
        lm.causal.set_attn_implementation(attention.NAME)
    with tempfile.TemporaryDirectory(prefix="upweight-gpu-") as folder:
        if trl and trl_python() is not None:
            lm.causal.save_pretrained(folder)
            words(vocab).save_pretrained(folder)
        if size.lora:
            lm = add_lora(lm, **LORA, seed=0)
        cases = [
            Case(size, lengths, tuple(random_trees([lengths] * pairs, vocab)), shape)
            for lengths, pairs in shapes.items()
        ]
        at_once: dict[Case, int] = {}
        for case in cases:
            for result in time_case(lm, case, budget):
                if isinstance(result, Cell) and result.side == PLAIN:
                    at_once[case] = (result.at_once or 1) // (2 * largest_row(case.trees))
                yield result
        del lm
        free_cached(torch.device(device))
        for case in cases if trl else ():
            yield time_trl(case, Path(folder), at_once[case], device, budget)


def row_of(cell: Cell, cells: Sequence[Cell], about: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the table, as numbers."""
    tokens, work = about["tokens"][cell.model, cell.lengths]
    pairs = about["pairs"][cell.lengths]
