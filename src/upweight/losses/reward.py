"""The loss of a reward model: scores of preferred pairs -> one value per pair, unreduced."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from upweight.losses.pair import probably_flipped


def bradley_terry(
    chosen: Float[Tensor, " pairs"],
    rejected: Float[Tensor, " pairs"],
    *,
    margin: float | Float[Tensor, " pairs"] = 0.0,
    label_smoothing: float = 0.0,
    flipped: Float[Tensor, " pairs"] | None = None,
    centering: float = 0.0,
) -> Float[Tensor, " pairs"]:
    """-(1-e) log sigmoid(z) - e log sigmoid(-z) + c (s_w + s_l)^2, z = s_w - s_l - margin.

    Ouyang et al. 2022, eq. 1 (arXiv:2203.02155), on the scores of a reward model. margin > 0 asks
    for a distance, per pair where preferences have a strength (Touvron et al. 2023, eq. 2,
    arXiv:2307.09288). e = label_smoothing is the probability that the label is flipped; per
    pair (`flipped`, pair.probably_flipped), 1 - e is a soft label. Preferences fix scores only up
    to a constant of the prompt: c = centering > 0 holds it near 0 (Eisenstein et al. 2023,
    arXiv:2312.09244; 0.01 is usual).
    """
    z = chosen - rejected - margin
    e = probably_flipped(label_smoothing, flipped)
    fit = -(1 - e) * F.logsigmoid(z) - e * F.logsigmoid(-z)
    return fit + centering * (chosen + rejected).square()
