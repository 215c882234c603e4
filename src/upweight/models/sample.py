"""Batched generation, and the log-probs of what was generated."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from upweight.data.pack import bins, collate
from upweight.models.attention import native_attention
from upweight.models.head import logits
from upweight.models.load import LanguageModel, evaluation_mode
from upweight.models.logprobs import response_logps, token_logps
from upweight.types import ResponseId, RowId, Tree

KEPT_SHARE = 0.8
"""Rows that ended leave the batch when this share or less is still being written."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One response drawn from the model. `tokens` end with the stop token if `stopped`."""

    tokens: tuple[int, ...]
    stopped: bool


def sample(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    num: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    rows_per_batch: int = 128,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[Sample]]:
    """`num` responses to each prompt (token ids), in the prompts' order.

    temperature 0 is greedy. Nothing else bends the distribution: what the model's generation
    config may ask for (top-k, repetition penalty) is not applied. A response is drawn with random
    numbers of its own, so that it does not depend on what else is in its batch (families that
    cannot share a prompt are drawn by transformers, batch by batch). The caller's random state is
    left alone.
    """
    draw = _Draw(max_new_tokens, temperature, top_p, frozenset(lm.stop_token_ids))
    noise = torch.rand(
        (len(prompts), num, max_new_tokens),
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64,
    )
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    per_batch = max(1, rows_per_batch // num)
    drawn: list[list[Sample]] = [[] for _ in prompts]
    with torch.no_grad(), evaluation_mode(lm), native_attention(lm.causal), lm.compute():
        for first in range(0, len(order), per_batch):
            group = order[first : first + per_batch]
            ids, mask = _left_padded(lm, [prompts[i] for i in group])
            rows = (
                _with_cache(lm, draw, ids, mask, noise[group].flatten(0, 1).to(lm.device))
                if lm.plan.shared
                else _generate(lm, draw, ids, mask, num, seed + first)
            )
            for row, tokens in enumerate(rows):
                stopped = tokens[-1] in draw.stop
                drawn[group[row // num]].append(Sample(tuple(tokens), stopped))
            on_progress(first + len(group), len(order))
    return drawn


@dataclass(frozen=True)
class _Draw:
    max_new_tokens: int
    temperature: float
    top_p: float
    stop: frozenset[int]

    def pick(self, scores: Float[Tensor, "rows vocab"], u: Float[Tensor, " rows"]) -> list[int]:
        """One token a row: the argmax, or the inverse of the distribution function at `u`."""
        if self.temperature == 0:
            return scores.argmax(-1).tolist()
        p = (scores.float() / self.temperature).softmax(-1)
        if self.top_p < 1:
            ranked, token = p.sort(dim=-1, descending=True)
            ranked[ranked.cumsum(-1) - ranked >= self.top_p] = 0.0
            p = torch.zeros_like(p).scatter(1, token, ranked)
        # In fp32 a running sum over a large vocabulary loses the tokens of its tail.
        below = p.double().cumsum(-1)
        at = (u * below[:, -1])[:, None]
        return torch.searchsorted(below, at, right=True).clamp(max=p.shape[1] - 1)[:, 0].tolist()


def _left_padded(lm: LanguageModel, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(token ids, attention mask), both [prompts, longest]."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), _pad(lm))
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    return ids.to(lm.device), mask.to(lm.device)


def _pad(lm: LanguageModel) -> int:
    found = lm.tokenizer.pad_token_id
    return found if isinstance(found, int) else next(iter(lm.stop_token_ids), 0)


def _with_cache(
    lm: LanguageModel, draw: _Draw, ids: Tensor, mask: Tensor, noise: Float[Tensor, "rows steps"]
) -> list[list[int]]:
    """Token by token: a prompt is read once for all its responses, and rows that ended leave."""
    cache = DynamicCache(config=lm.causal.config)
    now = _next_logits(lm, ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache)
    num = len(noise) // len(ids)
    cache.batch_repeat_interleave(num)
    mask, now = mask.repeat_interleave(num, 0), now.repeat_interleave(num, 0)
    answers: list[list[int]] = [[] for _ in noise]
    active = list(range(len(noise)))
    for step in range(draw.max_new_tokens):
        tokens = draw.pick(now, noise[active, step])
        for row, token in zip(active, tokens, strict=True):
            if not answers[row] or answers[row][-1] not in draw.stop:
                answers[row].append(token)
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
    return answers


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


def _generate(
    lm: LanguageModel, draw: _Draw, ids: Tensor, mask: Tensor, num: int, seed: int
) -> list[list[int]]:
    """By transformers' generate, which knows each family's own state."""
    config = GenerationConfig(
        max_new_tokens=draw.max_new_tokens,
        do_sample=draw.temperature > 0,
        temperature=draw.temperature or 1.0,
        top_k=0,
        top_p=draw.top_p,
        eos_token_id=sorted(draw.stop) or None,
        pad_token_id=_pad(lm),
        use_cache=True,
    )
    with torch.random.fork_rng([lm.device] if lm.device.type == "cuda" else []), _only(lm, config):
        torch.manual_seed(seed)
        out = lm.model.generate(  # pyright: ignore
            input_ids=ids.repeat_interleave(num, 0),
            attention_mask=mask.repeat_interleave(num, 0),
            generation_config=config,
        )
    rows: list[list[int]] = []
    for row in out[:, ids.shape[1] :].tolist():
        end = next((n for n, token in enumerate(row) if token in draw.stop), None)
        rows.append(row if end is None else row[: end + 1])
    return rows


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
        for group in bins(list(trees), tokens_per_bin):
            forest = collate(group)
            sums = response_logps(token_logps(lm, forest), forest).tolist()
            for tree in forest.trees:
                result[where[id(tree)]] = sums[: len(tree.responses)]
                del sums[: len(tree.responses)]
    return result
