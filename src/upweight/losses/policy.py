"""Losses on sampled responses: one value per scored token, unreduced, to be minimised.

Token tensors are flat: a response's tokens are contiguous and in order, `response_of` names each
token's response and `tokens_per_response` counts them. Every token counts, there is no mask: what
should not be learned from is left out beforehand. `advantages.py` makes the advantages.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def clipped_surrogate(
    logps: Float[Tensor, " scored"],
    old_logps: Float[Tensor, " scored"],
    advantages: Float[Tensor, " scored"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Float[Tensor, " scored"]:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = exp(logp - old logp).

    Schulman et al. 2017, eq. 7 (PPO, arXiv:1707.06347), negated. clip_high > clip_low is DAPO's
    clip-higher (Yu et al. 2025, arXiv:2503.14476). dual_clip = c > 1 also bounds the loss where
    A < 0, at -c A (Ye et al. 2020, arXiv:1912.09729): without it a token that has become
    far more probable than when it was sampled has no bound. `old_logps` are those of the policy
    that sampled; at r = 1 the gradient is the policy gradient, -A grad log pi.
    """
    low, high = _log_bounds(advantages, clip_low, clip_high, dual_clip)
    # Clipped before the exponential, which is the same function: a ratio that overflows would give
    # a clipped token the gradient 0 * inf.
    return -advantages * (logps - old_logps).clamp(low, high).exp()


def clipped_tokens(
    logps: Float[Tensor, " scored"],
    old_logps: Float[Tensor, " scored"],
    advantages: Float[Tensor, " scored"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Bool[Tensor, " scored"]:
    """r outside the bound that holds on A's side: the tokens without a gradient.

    Of `clipped_surrogate`, with the same options; their share is a metric. A token whose advantage
    is 0 has no gradient either way and counts as one whose advantage is positive.
    """
    low, high = _log_bounds(advantages, clip_low, clip_high, dual_clip)
    log_ratio = (logps - old_logps).detach()
    return (log_ratio < low) | (log_ratio > high)


def _log_bounds(
    advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> tuple[Tensor, Tensor]:
    """The minimum of the two terms is one clip whose bounds depend on the sign of A.

    Where A is positive the ratio has no lower bound, where it is negative no upper one.
    """
    assert 0 <= clip_low <= 1 <= 1 + clip_high
    assert dual_clip is None or dual_clip > 1
    negative = advantages.detach() < 0
    ratio = torch.zeros_like(advantages)
    low = ratio.masked_fill(negative, 1 - clip_low)
    high = (ratio + 1 + clip_high).masked_fill(negative, dual_clip or torch.inf)
    return low.log(), high.log()


def clipped_value_loss(
    values: Float[Tensor, " scored"],
    old_values: Float[Tensor, " scored"],
    returns: Float[Tensor, " scored"],
    *,
    clip: float = 0.2,
) -> Float[Tensor, " scored"]:
    """max((V - R)^2, (old V + clip(V - old V, -clip, clip) - R)^2) / 2.

    Engstrom et al. 2020 (arXiv:2005.12729), as PPO's reference implementation has it;
    the half belongs to it, some implementations leave it out. The unit of `clip` is that of the
    returns, so it binds more the larger these are. Infinity is the plain squared error.
    """
    near = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum((values - returns).square(), (near - returns).square()) / 2


def k1(
    logps: Float[Tensor, " scored"], reference_logps: Float[Tensor, " scored"]
) -> Float[Tensor, " scored"]:
    """log pi - log pref.

    Schulman 2020, "Approximating KL divergence". Unbiased, of either sign, of large variance. As
    a loss it does nothing: its gradient, grad log pi, is 0 in expectation under pi. It belongs
    into the reward, where the policy gradient of its sum is that of the KL of whole responses.
    """
    return logps - reference_logps


def k2(
    logps: Float[Tensor, " scored"], reference_logps: Float[Tensor, " scored"]
) -> Float[Tensor, " scored"]:
    """(log pi - log pref)^2 / 2.

    Schulman 2020, "Approximating KL divergence". Never negative, of small variance, biased: equal
    to the KL up to third order in log pi - log pref. As a loss on samples of pi its gradient is
    exactly that of KL(pi || pref), token by token (Tang and Munos 2025, arXiv:2506.09477): what a
    token does to the prefixes of later ones is left out.
    """
    return (logps - reference_logps).square() / 2


def k3(
    logps: Float[Tensor, " scored"], reference_logps: Float[Tensor, " scored"]
) -> Float[Tensor, " scored"]:
    """pref/pi - 1 - log(pref/pi).

    Schulman 2020, "Approximating KL divergence"; GRPO's choice (Shao et al. 2024, eq. 4,
    arXiv:2402.03300). Unbiased and never negative, but where pi has given up what the reference
    says its variance has no bound. As a loss on samples of pi its gradient is that of the other
    direction, KL(pref || pi) (Tang and Munos 2025, arXiv:2506.09477), so that the optimum is not
    pref exp(r/beta)/Z.
    """
    log_ratio = reference_logps - logps
    return log_ratio.expm1() - log_ratio


KL_ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Float[Tensor, " scored"]]] = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
}
"""(policy log-probs, reference log-probs) of tokens that the policy sampled -> KL per token.

In nats. Their values estimate KL(pi || pref); what each does when it is differentiated as a loss
differs, and is in its docstring. All of it holds for samples of the policy as it is: after some
steps on the same samples it holds only nearly.
"""


def by_token(
    response_of: Int[Tensor, " scored"],
    tokens_per_response: Int[Tensor, " responses"],
    *,
    max_new_tokens: int,
) -> tuple[Float[Tensor, " scored"], Float[Tensor, ""]]:
    """(1, number of tokens): every token counts the same, long responses count more.

    DAPO (Yu et al. 2025, section 3.3, arXiv:2503.14476).
    """
    weight = torch.ones_like(response_of, dtype=torch.float32)
    return weight, weight.sum()


def by_response(
    response_of: Int[Tensor, " scored"],
    tokens_per_response: Int[Tensor, " responses"],
    *,
    max_new_tokens: int,
) -> tuple[Float[Tensor, " scored"], Float[Tensor, ""]]:
    """(1 / tokens of its response, number of responses): the mean over responses of their means.

    GRPO (Shao et al. 2024, eq. 3, arXiv:2402.03300). Every response counts the same, so a wrong
    one costs less per token the longer it is.
    """
    weight = tokens_per_response.float().reciprocal()[response_of]
    return weight, _num_responses(tokens_per_response)


def by_constant(
    response_of: Int[Tensor, " scored"],
    tokens_per_response: Int[Tensor, " responses"],
    *,
    max_new_tokens: int,
) -> tuple[Float[Tensor, " scored"], Float[Tensor, ""]]:
    """(1 / max_new_tokens, number of responses): sums over responses, scaled by a constant.

    Dr. GRPO (Liu et al. 2025, arXiv:2503.20783). The policy gradient of the mean
    score up to that constant, without the weight that length has in the other two.
    """
    weight = torch.full_like(response_of, 1 / max_new_tokens, dtype=torch.float32)
    return weight, _num_responses(tokens_per_response)


def _num_responses(tokens_per_response: Tensor) -> Tensor:
    # A response without tokens has no loss and so no part in the mean over responses.
    return (tokens_per_response > 0).sum().float()


AGGREGATIONS: dict[str, Callable[..., tuple[Float[Tensor, " scored"], Float[Tensor, ""]]]] = {
    "token": by_token,
    "response": by_response,
    "constant": by_constant,
}
"""(response_of, tokens_per_response, *, max_new_tokens) -> (weight of each token, count).

The mean over an optimizer step is sum(weight * loss) / sum(count). Both sums add up over
micro-batches and ranks, so that how the step is cut does not matter, so long as whole responses
are cut. fp32.
"""
