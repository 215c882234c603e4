"""A run's loss by its options: the same one trains and evaluates."""

from __future__ import annotations

import functools
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from upweight.config import Run
from upweight.losses import PAIR_LOSSES
from upweight.losses.reward import bradley_terry


def pair_loss(run: Run) -> Callable[..., Float[Tensor, " pairs"]]:
    """PairLogps -> one loss per preference."""
    options = run.loss
    return functools.partial(
        PAIR_LOSSES["dpo"], beta=options.beta, label_smoothing=options.label_smoothing
    )


def score_loss(run: Run) -> Callable[..., Float[Tensor, " pairs"]]:
    """A reward model's scores of chosen and rejected -> one loss per preference."""
    options = run.loss
    return functools.partial(
        bradley_terry, label_smoothing=options.label_smoothing, centering=options.centering
    )
