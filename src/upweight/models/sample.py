"""Batched generation, and the log-probs of what was generated."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import GenerationConfig

from upweight.data.pack import bins, collate
from upweight.models.attention import native_attention
from upweight.models.load import LanguageModel
from upweight.models.logprobs import response_logps, token_logps
from upweight.types import ResponseId, RowId, Tree


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
    rows_per_batch: int = 64,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[Sample]]:
    """`num` responses to each prompt (token ids), in the prompts' order.

    temperature 0 is greedy. Nothing else bends the distribution: what the model's generation
    config may ask for (top-k, repetition penalty) is not applied. The same seed, batch and
    machine give the same responses; the caller's random state is left alone.
    """
    stop = lm.stop_token_ids
    pad = lm.tokenizer.pad_token_id
    pad = pad if isinstance(pad, int) else (stop[0] if stop else 0)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else 1.0,
        top_k=0,
        top_p=top_p,
        eos_token_id=list(stop) or None,
        pad_token_id=pad,
        use_cache=True,
    )
    jobs = sorted(
        (i for i in range(len(prompts)) for _ in range(num)), key=lambda i: len(prompts[i])
    )
    drawn: list[list[Sample]] = [[] for _ in prompts]
    devices = [lm.device] if lm.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.no_grad(),
        native_attention(lm.causal),
        _only(lm, config),
    ):
        torch.manual_seed(seed)
        for first in range(0, len(jobs), rows_per_batch):
            batch = jobs[first : first + rows_per_batch]
            width = max(len(prompts[i]) for i in batch)
            ids = torch.full((len(batch), width), pad)
            mask = torch.zeros(len(batch), width, dtype=torch.long)
            for row, i in enumerate(batch):
                ids[row, width - len(prompts[i]) :] = torch.tensor(list(prompts[i]))
                mask[row, width - len(prompts[i]) :] = 1
            out = lm.model.generate(  # pyright: ignore
                input_ids=ids.to(lm.device),
                attention_mask=mask.to(lm.device),
                generation_config=config,
            )
            for i, row in zip(batch, out[:, width:].tolist(), strict=True):
                end = next((n for n, token in enumerate(row) if token in stop), None)
                tokens = row if end is None else row[: end + 1]
                drawn[i].append(Sample(tuple(tokens), end is not None))
            on_progress(first + len(batch), len(jobs))
    return drawn


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
    with torch.no_grad():
        for group in bins(list(trees), tokens_per_bin):
            forest = collate(group)
            sums = response_logps(token_logps(lm, forest), forest).tolist()
            for tree in forest.trees:
                result[where[id(tree)]] = sums[: len(tree.responses)]
                del sums[: len(tree.responses)]
    return result
