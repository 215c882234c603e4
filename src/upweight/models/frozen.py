"""The weights that are trained, as they were, put in place for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass, field

from torch import Tensor

from upweight.models.load import LanguageModel, evaluation_mode


@dataclass
class Frozen:
    """The weights that are trained, as they were: a reference that costs one copy of them."""

    weights: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    @staticmethod
    def of(lm: LanguageModel) -> Frozen:
        named = lm.model.named_parameters()
        return Frozen({name: p.detach().clone() for name, p in named if p.requires_grad})

    @property
    def num_bytes(self) -> int:
        return sum(kept.nbytes for kept in self.weights.values())

    @contextlib.contextmanager
    def in_place(self, lm: LanguageModel) -> Generator[LanguageModel]:
        """`lm` with these weights, for as long as the block runs."""
        parameters = dict(lm.model.named_parameters())
        present = {name: parameters[name].data for name in self.weights}
        try:
            for name, kept in self.weights.items():
                parameters[name].data = kept
            with evaluation_mode(lm):
                yield lm
        finally:
            for name, weights in present.items():
                parameters[name].data = weights
