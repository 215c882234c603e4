"""Attention beyond one block of its kernel, held against the dense mask in float64.

The trees on which proof.py tries a whole model lie in one tile of tiles.py, and in one block of the
kernels on CUDA: what is wrong between blocks does not show there, and a model that reads longer
trees takes longer than all else at start. But attention is all of it that knows of blocks, so that
alone is called again, as each kind of layer has called it, on random numbers along longer trees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from upweight.data.pack import collate
from upweight.models import attention
from upweight.models.attention import Asked, Layout
from upweight.models.load import LanguageModel
from upweight.types import ResponseId, RowId, Tree

SHAPES = ((20, (9, 4)), (260, (210, 140)))
"""Prompts and their responses: blocks of 128 tokens, and the tiles of at most 192, end inside a
prompt, inside each of two siblings, and nowhere where one of them ends."""

WINDOW = 200
"""A window that binds on these trees, in place of one that lies beyond them."""

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.04}
"""Largest distance of a row of the output, or of a gradient, that rounding explains: relative to
the row's norm, or to the mean of all rows' where that is more.

A row that misses one of 470 keys is 0.03 off or more, one that misses a block of 128 by 0.5. In
half precision a query that has one key to itself gets a gradient which is a difference of equals:
the output's rounding, 2^-9 of it in bf16, is some 0.02 of the mean row there, and 0.08 at the
worst of thousands.
"""


def fault_beyond_a_block(lm: LanguageModel, path: str, asked: Iterable[Asked]) -> str | None:
    """What is wrong with an attention path on long trees, in words, or None."""
    forest = collate([_tree(*shape) for shape in SHAPES]).to(lm.device)
    layout = attention.layout_of(forest, path)
    for case in _cases(asked):
        inputs = _inputs(case, forest.num_tokens, lm.device)
        with lm.compute():
            got = _read(_as_asked(case, layout), inputs)
        wanted = _read(_exactly(case, layout), [x.double() for x in inputs])
        off = [_distance(g, w) for g, w in zip(got, wanted, strict=True)]
        worst = torch.stack(off).max().item()
        if not worst <= TOLERANCE[case.dtype]:
            longest = max(prompt + max(responses) for prompt, responses in SHAPES)
            return (
                f"on sequences of up to {longest} tokens a row of its output or of a gradient is "
                f"{worst:.2g} of its size off"
            )
    return None


def _tree(prompt: int, responses: Sequence[int]) -> Tree:
    ids = tuple(ResponseId(RowId("probe", prompt), k) for k in range(len(responses)))
    made = tuple((0,) * length for length in responses)
    return Tree((0,) * prompt, made, (), ids, (True,) * len(made))


def _cases(asked: Iterable[Asked]) -> set[Asked]:
    """Each with a window that binds, and as it is where none does."""
    cases: set[Asked] = set()
    for case in asked:
        cases.add(replace(case, window=None))
        if case.window is not None:
            cases.add(replace(case, window=min(case.window, WINDOW)))
    return cases


def _inputs(case: Asked, num_tokens: int, device: torch.device) -> list[Tensor]:
    """Query, key, value and sinks; last, what the output's gradient is."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    # Scores have a spread of 1, whatever the model's scale is for.
    query = normal(1, case.heads.query, num_tokens, case.dim)
    found = [query / (case.scale * case.dim**0.5), normal(1, case.heads.key, num_tokens, case.dim)]
    found.append(normal(1, case.heads.key, num_tokens, case.value_dim))
    if case.sinks is not None:
        found.append(normal(case.heads.query, dtype=case.sinks))
    return [*found, normal(1, case.heads.query, num_tokens, case.value_dim)]


Attend = Callable[..., Tensor]


def _as_asked(case: Asked, layout: Layout) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None) -> Tensor:
        out, _ = attention.forest_attention(
            nn.Identity(),
            query,
            key,
            value,
            None,
            scaling=case.scale,
            sliding_window=case.window,
            softcap=case.softcap,
            s_aux=sinks,
            forest_layout=layout,
        )
        return out.transpose(1, 2)

    return attend


def _exactly(case: Asked, layout: Layout) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None) -> Tensor:
        mask = layout.mask(case.window)
        scale, softcap = case.scale, case.softcap
        return attention.dense_attention(query, key, value, mask, scale, softcap, sinks)

    return attend


def _read(attend: Attend, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The output, and the gradient of each input."""
    *given, pull = inputs
    leaves = [x.detach().requires_grad_() for x in given]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, pull.to(out.dtype))]


def _distance(got: Tensor, wanted: Tensor) -> Tensor:
    """The worst row's; a NaN stays one."""
    size = wanted.norm(dim=-1)
    off = (got.double() - wanted).norm(dim=-1)
    return (off / size.clamp(min=size.mean())).max()
