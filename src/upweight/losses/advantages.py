"""Scores of sampled responses -> how much better than expected each response or token was.

Flat token tensors as in policy.py. Advantages and returns are targets: nothing here has a
gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def penalized_rewards(
    scores: Float[Tensor, " responses"],
    kl: Float[Tensor, " scored"],
    tokens_per_response: Int[Tensor, " responses"],
    *,
    beta: float,
) -> Float[Tensor, " scored"]:
    """-beta kl at every token, plus the response's score at its last token.

    Ziegler et al. 2019, eq. 2 (arXiv:1909.08593); Ouyang et al. 2022, eq. 2 (arXiv:2203.02155).
    `kl` is one of KL_ESTIMATORS of the policy that sampled; with k1 a response's rewards sum to
    score - beta log(pi/pref), whose maximum in expectation is pref exp(score/beta)/Z. A response
    without tokens has nowhere to put its score and is an error of the caller.
    """
    assert bool((tokens_per_response > 0).all())
    rewards = (-beta * kl).detach()
    return rewards.index_add(0, tokens_per_response.cumsum(0) - 1, scores.detach().to(rewards))


def stop_penalized(
    scores: Float[Tensor, " responses"], stopped: Bool[Tensor, " responses"], *, penalty: float
) -> Float[Tensor, " responses"]:
    """score - penalty for a response without its stop token, the score for one that stopped.

    After Ziegler et al. 2019 (arXiv:1909.08593), who give cut responses a fixed
    low score; subtracting keeps their order, and suits scores of any scale.
    """
    return torch.where(stopped, scores, scores - penalty)


def generalized_advantages(
    rewards: Float[Tensor, " scored"],
    values: Float[Tensor, " scored"],
    tokens_per_response: Int[Tensor, " responses"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Float[Tensor, " scored"], Float[Tensor, " scored"]]:
    """A_t = d_t + gamma lam A_(t+1), d_t = r_t + gamma V_(t+1) - V_t; returns R_t = A_t + V_t.

    Schulman et al. 2016, eq. 16 (GAE, arXiv:1506.02438). V_t is the value before token t is
    drawn, at the state that predicts it. Behind its last token a response is over and worth 0,
    also where it was cut: what it would have gone on to earn is not known. lam = 1 gives the
    return minus the value, without bias; lam = 0 the one-step error, with the least variance.
    """
    # A rectangle, one row per response: a loop over positions, and none over responses. It is 0
    # behind the end of a shorter one, which is what that one's last token has to see there.
    longest = int(tokens_per_response.max()) if len(tokens_per_response) else 0
    there = torch.arange(longest, device=values.device) < tokens_per_response[:, None]
    reward, value, advantage = values.new_zeros(3, len(tokens_per_response), longest)
    reward[there], value[there] = rewards.detach(), values.detach()
    next_value = next_advantage = values.new_zeros(len(tokens_per_response))
    for at in reversed(range(longest)):
        error = reward[:, at] + gamma * next_value - value[:, at]
        next_advantage = error + gamma * lam * next_advantage
        next_value = value[:, at]
        advantage[:, at] = next_advantage
    flat = advantage[there]
    return flat, flat + values.detach()


def whiten(x: Float[Tensor, " scored"], *, shift_mean: bool = True) -> Float[Tensor, " scored"]:
    """(x - mean) / sqrt(variance + 1e-8), plus the mean again where shift_mean is False.

    As Ziegler et al. 2019 (arXiv:1909.08593) do it: advantages with, rewards without the shift.
    Over all tokens of the rollout at once, before it is cut into steps; the variance is that of
    the tokens themselves (divided by their number). Where all are equal the result is 0, or x.
    """
    x = x.detach()
    # Differences to one of the values are exactly 0 where all are equal, those to a rounded mean
    # are not, and dividing by the standard deviation would blow them up.
    above = x - x[:1]
    centred = above - above.mean()
    whitened = centred * (centred.square().mean() + 1e-8).rsqrt()
    return whitened if shift_mean else whitened + x.mean()


def next_kl_coefficient(
    coefficient: float, kl: float, *, target: float, gain: float = 0.1
) -> float:
    """coefficient * (1 + gain clip(kl/target - 1, -0.2, 0.2)).

    Ziegler et al. 2019 (arXiv:1909.08593): a proportional controller in log space.
    `kl` is the mean over the last rollout's responses, in nats like `target`. Where implementations
    have a horizon, gain is responses per rollout / horizon.
    """
    # In this order of arguments a KL that is nan stays nan.
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + gain * error)


def grpo(
    scores: Float[Tensor, " responses"],
    group_of: Int[Tensor, " responses"],
    penalty: Float[Tensor, " responses"] | None = None,
    *,
    eps: float = 1e-4,
) -> Float[Tensor, " responses"]:
    """(score - penalty - mean of its group) * (w / (s + eps) + 1 - w), w = s^2 / (s^2 + p^2).

    s and p are the standard deviations of a group's scores and of its penalties, those of a sample
    (divided by n - 1), as most implementations have them. Without a penalty w is 1: Shao et al.
    2024 (GRPO, arXiv:2402.03300), who have the KL in the loss. Groups of small spread weigh as much
    as others then, so with a KL term in the loss, beta means beta times the spread of each prompt.

    The weight w is ours. Divided by s + eps, scores that nearly tie would blow what the KL takes up
    to p / eps. Here its share of the advantage is s p / (s^2 + p^2) <= 1/2 of a deviation, plus the
    penalty itself, undivided; and as s goes to 0 the divisor goes, as it has to where no reward
    tells answers apart. The numerator is that of `dr_grpo`, so that pref exp(score/beta)/Z, where
    it is 0 in every group, stays a fixed point.
    """
    spread = _variance(scores, group_of)
    of_penalty = torch.zeros_like(spread) if penalty is None else _variance(penalty, group_of)
    weight = torch.where(of_penalty > 0, spread / (spread + of_penalty), 1.0)
    # Equal scores without a penalty: 0 divided by nothing.
    divisor = torch.where(spread > 0, spread.sqrt() + eps, 1.0)
    above = _deviations(_after(scores, penalty), group_of)[0]
    return above * (weight / divisor + (1 - weight))


def dr_grpo(
    scores: Float[Tensor, " responses"],
    group_of: Int[Tensor, " responses"],
    penalty: Float[Tensor, " responses"] | None = None,
) -> Float[Tensor, " responses"]:
    """score - penalty - mean of its group.

    Liu et al. 2025 (Dr. GRPO, arXiv:2503.20783). In expectation the policy gradient
    times (n - 1)/n, n the size of the group, since a score is part of its own mean.
    """
    return _deviations(_after(scores, penalty), group_of)[0]


def rloo(
    scores: Float[Tensor, " responses"],
    group_of: Int[Tensor, " responses"],
    penalty: Float[Tensor, " responses"] | None = None,
) -> Float[Tensor, " responses"]:
    """score - penalty - mean of the others of its group.

    Ahmadian et al. 2024 (RLOO, arXiv:2402.14740). n/(n - 1) times `dr_grpo`: in expectation
    exactly the policy gradient. Alone in its group a response has no others, and gets 0.
    """
    deviation, size, _ = _deviations(_after(scores, penalty), group_of)
    return deviation * size / (size - 1).clamp(min=1)


def _after(scores: Tensor, penalty: Tensor | None) -> Tensor:
    return scores if penalty is None else scores - penalty


def _variance(values: Tensor, group_of: Tensor) -> Tensor:
    """Of a sample, in each value's group; exactly 0 where all are equal, or one is alone."""
    deviation, size, sum_of_group = _deviations(values, group_of)
    return sum_of_group(deviation.square()) / (size - 1).clamp(min=1)


def _deviations(
    scores: Tensor, group_of: Tensor
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """(score - mean of its group, size of its group, x -> the sum of x over its group)."""
    names, group = group_of.unique(return_inverse=True)

    def sum_of_group(x: Tensor) -> Tensor:
        return x.new_zeros(len(names)).index_add(0, group, x)[group]

    scores = scores.detach()
    # Above the group's lowest, equal scores are exactly 0 and so is their deviation.
    lowest = scores.new_full((len(names),), torch.inf).scatter_reduce(0, group, scores, "amin")
    above = scores - lowest[group]
    size = sum_of_group(torch.ones_like(above))
    return above - sum_of_group(above) / size, size, sum_of_group


GROUP_ADVANTAGES: dict[str, Callable[..., Float[Tensor, " responses"]]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
}
"""(scores, group_of, penalty) -> one advantage per response, which all its tokens share.

`group_of` is any number that responses to the same prompt have in common; groups may differ in
size. `penalty` is what a response's KL takes from its score (beta times its KL). A group whose
scores are all equal, one of a single response included, gives exactly 0 without a penalty.
"""
