"""Before anything is trusted: each way of running a forest is held against one sequence at a time.

The first way that gives the model's own log-probs is used. A family that none of the shared ways
fits runs unshared, one whose head none fits runs through its own logits; none is refused. The trees
of the probe are small; that attention holds on long ones too is asked of it alone (blocks.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from upweight.data.pack import collate
from upweight.errors import ModelError
from upweight.models import attention, logprobs
from upweight.models.blocks import fault_beyond_a_block
from upweight.models.head import at_least_fp32, read
from upweight.models.headproof import head_is_right
from upweight.models.load import ForwardPlan, LanguageModel
from upweight.models.named import first_lines
from upweight.types import Forest, Preference, ResponseId, RowId, Tree

TOLERANCE_NATS = {torch.float64: 1e-8, torch.float32: 2e-3, torch.bfloat16: 0.3, torch.float16: 0.1}
"""Largest difference of one token's log-prob that rounding explains.

fp32: sums over a 4096-wide model in another order move a logit by some 1e-4; a token that reads a
wrong ancestor moves by tenths. bf16 weights (8 bits of mantissa) move logits near 10 by 0.04 each.
"""

TOLERANCE_SLOPE = {
    torch.float64: 1e-7,
    torch.float32: 1e-3,
    torch.bfloat16: 0.5,
    torch.float16: 0.1,
}
"""Largest difference of the gradient at one token's embedding that rounding explains, relative to
the gradient's norm there (at least the mean of those that have one).

Through 30 layers fp32 is 5e-6 off, bf16 0.07 to 0.18 at the worst of 40 tokens. A token from which
a backward pass leaves something out is off by about its size.
"""

PROVEN_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Reading:
    """A forest's log-probs, and the gradient of a weighted sum of them at each token's embedding:
    no weight needs one for it, and every layer lies in between."""

    logps: Float[Tensor, " scored"]
    slopes: Float[Tensor, "tokens width"] | None


def find_plan(lm: LanguageModel, *, path: str = "auto", sharing: bool = True) -> ForwardPlan:
    """The first plan that reproduces the model's own log-probs on a probe forest.

    `path` other than "auto" is asked for by name: then a failure is a ModelError, since the user
    would otherwise get something else than what they asked for.
    """
    plan = _forward_plan(lm, path, sharing)
    return plan if plan.native_head else replace(plan, one_pass=head_is_right(lm))


def _forward_plan(lm: LanguageModel, path: str, sharing: bool) -> ForwardPlan:
    probe = probe_forest(lm)
    depth = _exact_depth(lm)
    reason = "compute.sharing is off" if not sharing else _known_reason(lm)
    if sharing and reason is not None and path != "auto":
        raise ModelError(
            f"compute.attention={path} computes a prompt once for all its responses, and that is "
            f"not exact for {lm.name}: {reason}. Use compute.attention=auto."
        )
    truth, reason = _oracle(lm, probe, reason)
    if reason is None:
        candidates = _candidates(lm) if path == "auto" else [path]
        found: list[str] = []
        for candidate in candidates:
            plan = ForwardPlan(attention=candidate, exact_depth=depth)
            failure = _failure(lm, plan, probe, truth)
            if failure is None:
                return plan
            found.append(f"{candidate}: {failure}")
        reason = "; ".join(found)
        if path != "auto":
            raise ModelError(
                f"compute.attention={path} does not give {lm.name}'s own log-probs ({reason}). "
                "Use compute.attention=auto."
            )
    plan = ForwardPlan(shared=False, reason=reason, exact_depth=depth)
    failure = _failure(lm, plan, probe, truth)
    if failure is None:
        return plan
    plan = ForwardPlan(shared=False, native_head=True, reason=reason, exact_depth=depth)
    failure = _failure(lm, plan, probe, truth)
    if failure is not None:
        raise ModelError(
            f"{lm.name} gives other log-probs in a batch than alone ({failure}). upweight cannot "
            "train it without being wrong."
        )
    return plan


def _candidates(lm: LanguageModel) -> list[str]:
    return ["varlen", "flex", "dense"] if lm.device.type == "cuda" else ["tiles", "dense"]


def _known_reason(lm: LanguageModel) -> str | None:
    """Why this family cannot share a prompt, where its class or config already says so.

    What only shows beyond the probe's length has to be known here: a chunk boundary or a window
    lies thousands of tokens away.
    """
    model, config = lm.causal, lm.causal.config
    family = config.model_type
    if getattr(model, "_is_stateful", False):
        return f"{family} keeps a recurrent state"
    layer_types = set(getattr(config, "layer_types", None) or ())
    if unknown := layer_types - PROVEN_LAYERS:
        return f"{family} has layers of type {', '.join(sorted(unknown))}"
    if not getattr(model, "_supports_attention_backend", False):
        return f"{family} does not use transformers' AttentionInterface"
    return None


def _exact_depth(lm: LanguageModel) -> int | None:
    """The length from which on position encodings depend on the longest sequence of the batch."""
    config = lm.causal.config
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    per_layer = (
        rope.values() if rope and all(isinstance(v, dict) for v in rope.values()) else [rope]
    )
    for parameters in per_layer:
        kind = parameters.get("rope_type", parameters.get("type"))
        if kind in ("dynamic", "longrope"):
            original = parameters.get("original_max_position_embeddings")
            return int(
                original
                or getattr(config, "original_max_position_embeddings", None)
                or config.max_position_embeddings
            )
    return None


def probe_forest(lm: LanguageModel) -> Forest:
    """Two trees of random tokens: three responses and two, of unequal lengths, one of them single.

    Short, since a whole model reads them several times (blocks.py has long ones for attention
    alone), but long enough to cross a small sliding window; a large one is checked by what the
    layers ask for.
    """
    generator = torch.Generator().manual_seed(0)
    vocab = lm.vocab_size
    limit = min(vocab, len(lm.tokenizer))
    window = getattr(lm.causal.config, "sliding_window", None) or 0
    prompt = 11 + (window if window <= 256 else 0)

    def tokens(num: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, limit, (num,), generator=generator).tolist())

    def tree(prompt: int, *responses: int) -> Tree:
        row = RowId("probe", prompt)
        return Tree(
            prompt=tokens(prompt),
            responses=tuple(tokens(n) for n in responses),
            preferences=(Preference(0, 1),),
            ids=tuple(ResponseId(row, i) for i in range(len(responses))),
            stopped=(True,) * len(responses),
        )

    return collate([tree(prompt, 7, 5, 1), tree(3, 4, 9)])


def one_at_a_time(lm: LanguageModel, forest: Forest) -> Float[Tensor, " scored"]:
    """The oracle: transformers' own forward on each [prompt; response] alone, fp32 log-softmax."""
    with attention.native_attention(lm.causal), torch.no_grad():
        return torch.cat([_alone(lm, t.prompt, r) for t in forest.trees for r in t.responses])


def _alone(
    lm: LanguageModel, prompt: tuple[int, ...], response: tuple[int, ...]
) -> Float[Tensor, " response"]:
    ids = torch.tensor([*prompt, *response], device=lm.device)[None]
    out = lm.model(input_ids=ids, use_cache=False).logits[0]
    return read(at_least_fp32(out[len(prompt) - 1 : -1]), ids[0, len(prompt) :])


def _oracle(lm: LanguageModel, forest: Forest, reason: str | None) -> tuple[Reading, str | None]:
    """The truth about a forest, and why prompts are not shared: rows of their own have the model's
    own backward pass, and need no slopes."""
    if reason is None:
        try:
            return _truth(lm, forest), None
        except (attention.CannotShare, RuntimeError) as error:
            reason = f"no gradient at its embedding can be had: {first_lines(error, 1)}"
    return Reading(one_at_a_time(lm, forest), None), reason


def _truth(lm: LanguageModel, forest: Forest) -> Reading:
    """The oracle's log-probs and slopes: a prompt's tokens get what each of its responses asks."""
    *others, last = forest.trees
    lengths = [len(response) for response in last.responses]
    weights = _weights(forest, lm.device)[-sum(lengths) :].split(lengths)
    asked: list[Tensor] = []
    with attention.native_attention(lm.causal), _frozen(lm):
        with torch.no_grad():
            pieces = [_alone(lm, tree.prompt, r) for tree in others for r in tree.responses]
        for response, weight in zip(last.responses, weights, strict=True):
            with leaves(lm) as given:
                logps = _alone(lm, last.prompt, response)
            asked.append(_slope(logps, weight, given))
            pieces.append(logps.detach())
    end = len(last.prompt)
    own = torch.cat([torch.stack([a[:end] for a in asked]).sum(0), *(a[end:] for a in asked)])
    silent = own.new_zeros(forest.num_tokens - len(own), own.shape[1])
    return Reading(torch.cat(pieces), torch.cat([silent, own]))


def _read(lm: LanguageModel, forest: Forest) -> tuple[Reading, attention.Layout]:
    """What the plan at hand gives, and the layout in which its layers have left their wishes."""
    with _frozen(lm), leaves(lm) as given, _layouts(lm) as layouts:
        logps = logprobs.token_logps(lm, forest)
        reading = Reading(logps.detach(), _slope(logps, _weights(forest, lm.device), given))
    return reading, layouts[0]


def _weights(forest: Forest, device: torch.device) -> Float[Tensor, " scored"]:
    """The last tree's tokens, each of which counts differently, so that swapped ones show. The
    others' count nothing, and their slopes are zero: the oracle's backward pass over every row
    would take as long as the rest of the proof."""
    num = sum(map(len, forest.trees[-1].responses))
    weights = torch.zeros(len(forest.scored), device=device)
    weights[-num:] = torch.linspace(0.5, 1.5, num, device=device)
    return weights


def _slope(
    logps: Float[Tensor, " scored"], weights: Float[Tensor, " scored"], given: list[Tensor]
) -> Float[Tensor, "tokens width"]:
    if len(given) != 1:
        raise attention.CannotShare("it does not embed its tokens once")
    return torch.autograd.grad((logps * weights).sum(), given)[0][0]


@contextlib.contextmanager
def _frozen(lm: LanguageModel) -> Generator[None]:
    """No weight wants a gradient: those of a large model would not fit beside it."""
    trained = [p for p in lm.model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def leaves(lm: LanguageModel) -> Generator[list[Tensor]]:
    """What the embedding gives from here on, as leaves that a backward pass ends at."""
    given: list[Tensor] = []

    def leaf(_module: nn.Module, _args: object, out: Tensor) -> Tensor:
        given.append(out.detach().requires_grad_())
        return given[-1]

    handle = lm.causal.get_input_embeddings().register_forward_hook(leaf)
    try:
        yield given
    finally:
        handle.remove()


@contextlib.contextmanager
def _layouts(lm: LanguageModel) -> Generator[list[attention.Layout]]:
    """The layouts that the model is handed from here on."""
    given: list[attention.Layout] = []

    def look(_module: nn.Module, _args: object, options: dict[str, Any]) -> None:
        given.append(options["forest_layout"])

    handle = lm.causal.base_model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield given
    finally:
        handle.remove()


def _failure(lm: LanguageModel, plan: ForwardPlan, probe: Forest, truth: Reading) -> str | None:
    """What is wrong with a plan, or None. Runs in the weights' own dtype, without autocast; the
    variable-length kernel, which knows half precision only, runs in the compute dtype.

    Rows that are unshared have transformers' own backward pass, which is not ours to prove.
    """
    if plan.attention == "flex" and lm.device.type != "cuda":
        return "its kernel has a gradient on CUDA only"
    before, compute_dtype = lm.plan, lm.compute_dtype
    implementation = attention.implementation(lm.causal)
    proved = exact_dtype(lm, plan)
    lm.plan, lm.compute_dtype = plan, proved
    try:
        if plan.shared:
            lm.causal.set_attn_implementation(attention.NAME)
            got, layout = _read(lm, probe)
            # In the dtype that trains, too: alone, attention is held to more than a model's depth
            # of roundings leaves.
            narrow = {
                replace(a, dtype=compute_dtype) for a in layout.asked if a.dtype == torch.float32
            }
            return (
                _misplaced_window(lm, layout)
                or _difference(got, truth, proved)
                or fault_beyond_a_block(lm, plan.attention, layout.asked | narrow)
            )
        with torch.no_grad():
            return _difference(Reading(logprobs.token_logps(lm, probe), None), truth, proved)
    except attention.CannotShare as error:
        return str(error)
    except (RuntimeError, NotImplementedError, TypeError, AttributeError, ImportError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        lm.plan, lm.compute_dtype = before, compute_dtype
        lm.causal.set_attn_implementation(implementation)


def _difference(got: Reading, truth: Reading, dtype: torch.dtype) -> str | None:
    worst = (got.logps.to(truth.logps) - truth.logps).abs().max().item()
    if not worst <= TOLERANCE_NATS[dtype]:
        return f"a token's log-prob is {worst:.3g} nats off"
    if got.slopes is None or truth.slopes is None:
        return None
    size = truth.slopes.norm(dim=-1)
    off = (got.slopes.to(truth.slopes) - truth.slopes).norm(dim=-1)
    worst = (off / size.clamp(min=size[size > 0].mean())).max().item()
    if not worst <= TOLERANCE_SLOPE[dtype]:
        return f"the gradient at a token is {worst:.2g} of its size off"
    return None


def exact_dtype(lm: LanguageModel, plan: ForwardPlan) -> torch.dtype:
    """What a plan is compared in: the weights' own dtype, or the variable-length kernel's."""
    weights = next(lm.model.parameters()).dtype
    return lm.compute_dtype if plan.attention == "varlen" and weights == torch.float32 else weights


def _misplaced_window(lm: LanguageModel, layout: attention.Layout) -> str | None:
    """A layer whose sliding window does not reach the attention function, in words, or None."""
    config = lm.causal.config
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or kinds is None or "sliding_attention" not in kinds:
        return None
    for layer, kind in enumerate(kinds):
        if kind == "sliding_attention" and layout.windows.get(layer) != window:
            return f"layer {layer} applies its sliding window outside of its attention function"
    return None
