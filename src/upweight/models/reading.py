"""Log-probs of many trees without a gradient, in bins that get smaller where memory runs out."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.data.pack import bins, collate
from upweight.errors import ModelError
from upweight.types import Forest, Tree

T = TypeVar("T")
TokenLogps = Callable[[Forest], Float[Tensor, "scored ..."]]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: torch has one exception for it on GPUs, none on the CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def free_cached() -> None:
    """Gives back what the failed attempt held, before there is another."""
    gc.collect()
    torch.cuda.empty_cache()


def read_trees(
    logps: TokenLogps,
    trees: Sequence[Tree],
    tokens_per_bin: int,
    on_smaller: Callable[[int], None] = lambda tokens_per_bin: None,
    together: Sequence[list[Tree]] = (),
) -> Iterator[tuple[Forest, Float[Tensor, "scored ..."]]]:
    """Every tree once, bin by bin: the bin's forest and its token log-probs, or whatever else
    `logps` gives in the order of the responses. The bins of `together` come first, as they are.

    Bins that do not fit into memory are halved, of which `on_smaller` is told; a tree that does not
    fit is read some responses at a time. Raises ModelError where one response does not fit.
    """
    todo = [*together, *bins(list(trees), tokens_per_bin)][::-1]
    while todo:
        forest = collate(todo[-1])
        found = attempt(functools.partial(logps, forest))
        if not isinstance(found, Exception):
            todo.pop()
            yield forest, found
        elif len(forest.trees) == 1:
            yield forest, _by_responses(logps, todo.pop()[0], found)
        else:
            tokens_per_bin = forest.num_tokens // 2
            on_smaller(tokens_per_bin)
            left = [tree for group in reversed(todo) for tree in group]
            todo = bins(left, tokens_per_bin)[::-1]


def attempt(compute: Callable[[], T]) -> T | Exception:
    """What `compute` gives, or the error of an allocation that failed.

    It is handed back and not raised: whoever caught it would still hold, in its frames, the tensors
    that have to go before there is another attempt.
    """
    try:
        return compute()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failed = error.with_traceback(None)
    free_cached()
    return failed


def _by_responses(logps: TokenLogps, tree: Tree, failed: Exception) -> Float[Tensor, "scored ..."]:
    """One tree's log-probs from two of half its responses each, and so on."""
    middle = len(tree.responses) // 2
    if not middle:
        said = next(iter(str(failed).splitlines()), type(failed).__name__)
        raise ModelError(
            f"{tree.ids[0].row} ran out of memory: {tree.num_tokens:,} tokens, a prompt and one "
            f"response, cannot be fewer at once ({said}). Needs less: a smaller data.max_length "
            "with data.truncation=prompt, a smaller model."
        ) from failed
    found: list[Tensor] = []
    for part in (slice(0, middle), slice(middle, None)):
        half = replace(
            tree,
            responses=tree.responses[part],
            preferences=(),
            ids=tree.ids[part],
            stopped=tree.stopped[part],
        )
        got = attempt(functools.partial(logps, collate([half])))
        found.append(_by_responses(logps, half, got) if isinstance(got, Exception) else got)
    return torch.cat(found)
