"""Log-probs and scores that are no finite numbers are refused where they are made: a mean or an
interval over them says nothing, and not in which rows they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor, nn

from upweight.data.pack import collate
from upweight.errors import Refusal, some_of
from upweight.models.load import LanguageModel
from upweight.types import Forest

Read = Callable[[LanguageModel, Forest], Tensor]
"""A model and a forest -> a value for each scored token, or one for each response."""


def finite(read: Read, lm: LanguageModel, what: str = "log-probs") -> Callable[[Forest], Tensor]:
    """`read` of `lm`. Raises Refusal UW303, with the rows, for values that are no finite numbers:
    `what` they are."""

    def asked(forest: Forest) -> Tensor:
        values = read(lm, forest)
        if not bool(torch.isfinite(values).all()):
            _refuse(read, lm, forest, what)
        return values

    return asked


def _refuse(read: Read, lm: LanguageModel, forest: Forest, what: str) -> NoReturn:
    rows = _not_finite(read, lm, forest)
    cause = weights_not_finite(lm.model)
    cause = cause or "the forward pass overflowed: try compute.dtype=float32"
    said = f"{lm.name} gives {what} that are no finite numbers; {cause}. Rows: {some_of(rows)}."
    raise Refusal("UW303", said)


def _not_finite(read: Read, lm: LanguageModel, forest: Forest) -> list[str]:
    """The rows of which a value alone is not finite, else all: what one row says can make a number
    of a neighbour's undefined, though it has no weight there."""
    found: list[str] = []
    for tree in forest.trees:
        alone = collate([tree])
        values, lengths = read(lm, alone), alone.tokens_per_response.tolist()
        if len(values) != sum(lengths):
            lengths = [1] * len(lengths)
        parts = torch.isfinite(values).cpu().split(lengths)
        found += [
            str(of.row) for of, part in zip(tree.ids, parts, strict=True) if not bool(part.all())
        ]
    return list(dict.fromkeys(found or (str(of.row) for t in forest.trees for of in t.ids)))


def weights_not_finite(model: nn.Module) -> str:
    """How many tensors have an element that is no finite number, and the first of them; or ""."""
    broken = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    if not broken:
        return ""
    return (
        f"weights are not finite (tensors: {len(broken)}, first {broken[0]}): the model's files, "
        "or a learning rate that is too high"
    )
