"""Losses on preferred pairs: PairLogps -> one value per pair, unreduced.

To add one: write the pure function (equation and source in its docstring, options keyword-only)
and its line in PAIR_LOSSES. Its options are then checked and its contract is tested.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from upweight.types import PairLogps


def dpo(
    logps: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Float[Tensor, " pairs"]:
    """-(1-e) log sigmoid(beta h) - e log sigmoid(-beta h), h the margin of log-ratios, in nats.

    Rafailov et al. 2023, eq. 7 (arXiv:2305.18290). Log-probs are summed over each response, stop
    token included. e = label_smoothing > 0 is the conservative variant (cDPO, Mitchell 2023) for
    labels that are flipped with probability e: it is stationary at h = logit(1-e)/beta, and its
    floor is not 0. Where rows say how sure their labels are, e is theirs too (`probably_flipped`).
    The reference to start from; beta 0.1 to 0.5 holds the policy near its
    reference, 0.01 lets it go.
    """
    h, e = beta * logps.margin, probably_flipped(label_smoothing, logps.flipped)
    return -(1 - e) * F.logsigmoid(h) - e * F.logsigmoid(-h)


def probably_flipped(
    label_smoothing: float, flipped: Float[Tensor, " pairs"] | None
) -> float | Float[Tensor, " pairs"]:
    """The probability that a label is the wrong way around, if that of all labels and the pair's
    own may each have turned it: e + f - 2 e f."""
    if flipped is None:
        return label_smoothing
    return label_smoothing + flipped * (1 - 2 * label_smoothing)


PAIR_LOSSES: dict[str, Callable[..., Float[Tensor, " pairs"]]] = {
    "dpo": dpo,
}
