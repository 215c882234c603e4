"""Batched generation, and the log-probs of what was generated."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList

from upweight.errors import ConfigError, ModelError
from upweight.models.adapter import Converted
from upweight.models.attention import native_attention
from upweight.models.compiled import as_written
from upweight.models.finite import finite
from upweight.models.head import at_least_fp32, logits, read
from upweight.models.load import LanguageModel, evaluation_mode
from upweight.models.logprobs import response_logps, token_logps
from upweight.models.reading import attempt, read_trees
from upweight.types import ResponseId, RowId, Tree

KEPT_SHARE = 0.8
"""Rows that ended leave the batch when this share or less is still being written."""

PAD = 0
"""An id that every model has an embedding for, where a tokenizer's own may have none. No row reads
its padding."""

LOWEST_TEMPERATURE = 1e-6
"""Below it sampling is greedy: logits divided by less leave fp32, and all but ties is decided."""


Drawn = tuple[list[int], list[float]]
"""The tokens of a response, and their log-probs."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One response drawn from the model. `tokens` end with the stop token if `stopped`; else it was
    cut, at max_new_tokens or where the model's positions end. `logps` are the tokens' log-probs in
    nats as they were drawn, with the temperature."""

    tokens: tuple[int, ...]
    stopped: bool
    logps: tuple[float, ...] = ()


def sample(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    num: int = 1,
    max_new_tokens: int = 256,
    temperature: float | int = 1.0,
    top_p: float | int = 1.0,
    seed: int = 0,
    stop_token_ids: Collection[int] | None = None,
    max_length: int | None = None,
    rows_per_batch: int = 128,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[Sample]]:
    """`num` responses to each prompt (token ids), in the prompts' order.

    A response ends with one of `stop_token_ids` (None: the model's; what training ends responses
    with are a renderer's stop_ids), after `max_new_tokens`, or where prompt and response fill
    lm.max_length. temperature 0 is greedy. Nothing else bends the distribution: what the model's
    generation config may ask for (top-k, repetition penalty) is not applied. A response is drawn
    with random numbers of its own, so that it does not depend on what else is in its batch
    (families that cannot share a prompt are drawn by transformers, batch by batch). The caller's
    random state is left alone.

    Raises ConfigError for an option out of its range, ModelError for a prompt that is empty, leaves
    no room for a response or holds a token that the model has no embedding for.
    """
    _require_options(num, max_new_tokens, temperature, top_p)
    limits = room_for_responses(lm, prompts, max_new_tokens, max_length)
    stop = frozenset(lm.stop_token_ids if stop_token_ids is None else stop_token_ids)
    heat = 0.0 if temperature < LOWEST_TEMPERATURE else float(temperature)
    draw = _Draw(max_new_tokens, heat, float(top_p), stop)
    noise = torch.rand(
        (len(prompts), num, max_new_tokens),
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64,
    )
    done, drawn = 0, [list[Sample]() for _ in prompts]
    read = _with_cache if lm.plan.shared else _generate
    size = max(1, rows_per_batch // num)
    with (
        torch.no_grad(),
        as_written(),
        Converted(lm).in_place(),
        evaluation_mode(lm),
        native_attention(lm.causal),
        lm.compute(),
    ):
        for group, limit in _batches(prompts, limits, size):
            upto = replace(draw, max_new_tokens=limit)

            def answer(numbers: list[int], upto: _Draw = upto) -> list[Drawn]:
                asked = [prompts[i] for i in numbers]
                return read(lm, upto, asked, noise[numbers].flatten(0, 1))

            for row, (tokens, logps) in enumerate(_as_fits(answer, group)):
                found = Sample(tuple(tokens), tokens[-1] in stop, tuple(logps))
                drawn[group[row // num]].append(found)
            done += len(group)
            on_progress(done, len(prompts))
    return drawn


def _require_options(
    num: int, max_new_tokens: int, temperature: float | int, top_p: float | int
) -> None:
    for name, value, fits, allowed in (
        ("num", num, num >= 1, "1 or more"),
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "1 or more"),
        ("temperature", temperature, 0 <= temperature < math.inf, "0 (greedy), or a number above"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0, to 1"),
    ):
        if not fits:
            raise ConfigError(f"sample: {name} is {value}; allowed: {allowed}.")


def room_for_responses(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    max_length: int | None,
) -> list[int]:
    """The tokens that a response to each prompt may have. Raises ModelError as `sample` does."""
    longest = lm.max_length if max_length is None else min(max_length, lm.max_length or max_length)
    for number, prompt in enumerate(prompts, 1):
        where = f"sample: prompt {number} of {len(prompts)}"
        if not prompt:
            raise ModelError(f"{where} has no tokens. Leave it out.")
        if longest is not None and len(prompt) >= longest:
            raise ModelError(
                f"{where} has {len(prompt)} tokens, and the model reads at most {longest}, "
                "response included. Leave it out, or shorten it."
            )
        if (last := max(prompt)) >= lm.vocab_size:
            raise ModelError(
                f"{where} holds the token {lm.tokenizer.decode([last])!r} (id {last}), and the "
                f"model has embeddings for the ids 0 to {lm.vocab_size - 1}. Use the model's own "
                "tokenizer, or leave the prompt out."
            )
    room = math.inf if longest is None else longest
    return [int(min(max_new_tokens, room - len(prompt))) for prompt in prompts]


def _batches(
    prompts: Sequence[Sequence[int]], limits: Sequence[int], size: int
) -> Iterator[tuple[list[int], int]]:
    """Prompts of about equal length, by their index, and how long their responses may be. Where
    the limits differ, a batch is of one length: all its rows end at once."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for limit, same in groupby(order, key=limits.__getitem__):
        group = list(same)
        for first in range(0, len(group), size):
            yield group[first : first + size], limit


@dataclass(frozen=True)
class _Draw:
    max_new_tokens: int
    temperature: float
    top_p: float
    stop: frozenset[int]

    def pick(
        self, scores: Float[Tensor, "rows vocab"], u: Float[Tensor, " rows"]
    ) -> tuple[list[int], list[float]]:
        """One token a row and its log-prob in nats: the argmax, or the inverse of the distribution
        function at `u`. What is greedy has the log-prob 0: nothing else can be drawn."""
        if self.temperature == 0:
            return scores.argmax(-1).tolist(), [0.0] * len(scores)
        p = (scores.float() / self.temperature).softmax(-1)
        if self.top_p < 1:
            ranked, token = p.sort(dim=-1, descending=True)
            ranked[ranked.double().cumsum(-1) - ranked >= self.top_p] = 0.0
            p = torch.zeros_like(p).scatter(1, token, ranked)
        # In fp32 a running sum over a large vocabulary loses the tokens of its tail.
        below = p.double().cumsum(-1)
        at = (u * below[:, -1])[:, None]
        token = torch.searchsorted(below, at, right=True).clamp(max=p.shape[1] - 1)
        logps = (p.double().gather(1, token) / below[:, -1:]).log()
        return token[:, 0].tolist(), logps[:, 0].tolist()


def _left_padded(lm: LanguageModel, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(token ids, attention mask), both [prompts, longest]."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), PAD)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    return ids.to(lm.device), mask.to(lm.device)


def _as_fits(answer: Callable[[list[int]], list[Drawn]], numbers: list[int]) -> list[Drawn]:
    """What `answer` gives for a batch of prompts, in halves where memory runs out."""
    rows = attempt(functools.partial(answer, numbers))
    if not isinstance(rows, Exception):
        return rows
    middle = len(numbers) // 2
    if not middle:
        said = next(iter(str(rows).splitlines()), type(rows).__name__)
        raise ModelError(
            f"sample: prompt {numbers[0] + 1} ran out of memory alone ({said}). Needs less: fewer "
            "responses to a prompt (-n), a smaller evaluation.max_new_tokens, a smaller model."
        ) from rows
    return _as_fits(answer, numbers[:middle]) + _as_fits(answer, numbers[middle:])


def _with_cache(
    lm: LanguageModel,
    draw: _Draw,
    prompts: Sequence[Sequence[int]],
    noise: Float[Tensor, "rows steps"],
) -> list[Drawn]:
    """Token by token: a prompt is read once for all its responses, and rows that ended leave."""
    (ids, mask), noise = _left_padded(lm, prompts), noise.to(lm.device)
    cache = DynamicCache(config=lm.causal.config)
    now = _next_logits(lm, ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache)
    num = len(noise) // len(ids)
    cache.batch_repeat_interleave(num)
    mask, now = mask.repeat_interleave(num, 0), now.repeat_interleave(num, 0)
    answers: list[list[int]] = [[] for _ in noise]
    logps: list[list[float]] = [[] for _ in noise]
    active = list(range(len(noise)))
    for step in range(draw.max_new_tokens):
        tokens, likely = draw.pick(now, noise[active, step])
        for row, token, logp in zip(active, tokens, likely, strict=True):
            if not answers[row] or answers[row][-1] not in draw.stop:
                answers[row].append(token)
                logps[row].append(logp)
        alive = [i for i, row in enumerate(active) if answers[row][-1] not in draw.stop]
        if not alive or step == draw.max_new_tokens - 1:
            break
        if len(alive) <= KEPT_SHARE * len(active):
            kept = torch.tensor(alive, device=lm.device)
            cache.batch_select_indices(kept)
            mask = mask[kept]
            active, tokens = [active[i] for i in alive], [tokens[i] for i in alive]
        mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)
        latest = torch.tensor(tokens, device=lm.device)[:, None]
        now = _next_logits(lm, latest, mask, mask.sum(-1, keepdim=True) - 1, cache)
    return list(zip(answers, logps, strict=True))


def _next_logits(
    lm: LanguageModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache
) -> Float[Tensor, "rows vocab"]:
    hidden = lm.causal.base_model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, -1]
    head = lm.causal.get_output_embeddings()
    assert head is not None
    return logits(head, lm.causal.config, hidden)


def first_logps(
    lm: LanguageModel, prompts: Sequence[tuple[Sequence[int], int]]
) -> Float[Tensor, " prompts"]:
    """log p(token | prompt) in nats for (prompt, token), from one padded batch as `sample` reads
    it: what a proof of sampling compares with each prompt alone."""
    ids, mask = _left_padded(lm, [prompt for prompt, _ in prompts])
    cache = DynamicCache(config=lm.causal.config)
    with torch.no_grad(), evaluation_mode(lm), native_attention(lm.causal), lm.compute():
        now = _next_logits(lm, ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache)
    tokens = torch.tensor([token for _, token in prompts], device=now.device)
    return read(at_least_fp32(now), tokens)


def _generate(
    lm: LanguageModel,
    draw: _Draw,
    prompts: Sequence[Sequence[int]],
    noise: Float[Tensor, "rows steps"],
) -> list[Drawn]:
    """By transformers' generate, which knows each family's own state; what is drawn from its scores
    is decided here."""
    (ids, mask), noise = _left_padded(lm, prompts), noise.to(lm.device)
    num = len(noise) // len(ids)
    tokens: list[list[int]] = [[] for _ in noise]
    logps: list[list[float]] = [[] for _ in noise]

    def decide(before: Tensor, scores: Tensor) -> Tensor:
        """Leaves the token that is drawn as the only one that the greedy search can take."""
        step = before.shape[1] - ids.shape[1]
        drawn, likely = draw.pick(scores, noise[:, step])
        for row in range(len(noise)):
            if not tokens[row] or tokens[row][-1] not in draw.stop:
                tokens[row].append(drawn[row])
                logps[row].append(likely[row])
        only = torch.full_like(scores, -math.inf)
        return only.scatter(1, torch.tensor(drawn, device=scores.device)[:, None], 0.0)

    config = GenerationConfig(
        max_new_tokens=draw.max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(draw.stop) or None,
        pad_token_id=PAD,
        use_cache=True,
    )
    with _only(lm, config):
        lm.model.generate(  # pyright: ignore
            input_ids=ids.repeat_interleave(num, 0),
            attention_mask=mask.repeat_interleave(num, 0),
            generation_config=config,
            logits_processor=LogitsProcessorList([decide]),
        )
    return list(zip(tokens, logps, strict=True))


@contextmanager
def _only(lm: LanguageModel, config: GenerationConfig) -> Generator[None]:
    """`config` alone decides: generate() would fill what it leaves open from the model's own."""
    own = lm.causal.generation_config
    lm.causal.generation_config = config
    try:
        yield
    finally:
        lm.causal.generation_config = own


def sample_trees(
    prompts: Sequence[Sequence[int]], samples: Sequence[Sequence[Sample]], source: str = "sample"
) -> list[Tree]:
    """Each prompt with the responses drawn for it, as a tree to be scored."""
    return [
        Tree(
            prompt=tuple(prompt),
            responses=tuple(s.tokens for s in drawn),
            preferences=(),
            ids=tuple(ResponseId(RowId(source, line), i) for i in range(len(drawn))),
            stopped=tuple(s.stopped for s in drawn),
        )
        for line, (prompt, drawn) in enumerate(zip(prompts, samples, strict=True), 1)
    ]


def tree_logps(
    lm: LanguageModel, trees: Sequence[Tree], tokens_per_bin: int = 8192
) -> list[list[float]]:
    """The log-prob in nats of every response of every tree, in the trees' order."""
    where = {id(tree): i for i, tree in enumerate(trees)}
    result: list[list[float]] = [[] for _ in trees]
    with torch.no_grad(), evaluation_mode(lm):
        asked = finite(token_logps, lm)
        for forest, logps in read_trees(asked, trees, tokens_per_bin):
            sums = response_logps(logps, forest).tolist()
            for tree in forest.trees:
                result[where[id(tree)]] = sums[: len(tree.responses)]
                del sums[: len(tree.responses)]
    return result
