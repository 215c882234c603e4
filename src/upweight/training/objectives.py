"""(model, forest) -> Step: a loss sum, the count it is a sum over, metrics as (sum, count)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.losses.policy import (
    AGGREGATIONS,
    KL_ESTIMATORS,
    clipped_surrogate,
    clipped_tokens,
    clipped_value_loss,
)
from upweight.models.load import LanguageModel
from upweight.models.logprobs import pair_logps, response_logps, token_logps
from upweight.models.scalar import response_scores
from upweight.types import Experience, Forest, PairLogps, Step, sent

PairLoss = Callable[[PairLogps], Float[Tensor, " pairs"]]
Metrics = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Objective:
    """What a step's loss is a mean of (`items`), how many of them a forest has, known before it is
    computed, and how a forest gives its part of the sum."""

    items: str
    count: Callable[[Forest], float]
    step: Callable[[LanguageModel, Forest], Step]

    def num_items(self, forest: Forest) -> int:
        """For the record: items as they are counted on fingers, without their weights."""
        numbers = {
            "pairs": forest.num_pairs,
            "scored": forest.scored.shape[0],
            "responses": forest.num_responses,
        }
        return numbers[self.items]


def pair(
    reference: Callable[[Forest], Tensor],
    loss: PairLoss,
    beta: float,
    on_margins: Callable[[Forest, Tensor], None] | None = None,
) -> Objective:
    """Preferred pairs under `loss`, its options bound; `beta` scales the rewards that are shown.

    `reference` gives a forest's per-token log-probs under the reference, in forest.scored's order.
    `on_margins` is given each forest's margins, beta times the difference of log-ratios.
    """

    def step(lm: LanguageModel, forest: Forest) -> Step:
        policy = token_logps(lm, forest)
        logps = pair_logps(policy, sent(reference(forest), policy.device), forest)
        if on_margins is not None:
            on_margins(forest, beta * logps.margin.detach())
        weight = forest.weight.to(policy.device)
        return Step((loss(logps) * weight).sum(), weight.sum(), pair_metrics(logps, beta))

    return Objective("pairs", _pair_weight, step)


def _pair_weight(forest: Forest) -> float:
    return float(forest.weight.sum())


def pair_metrics(logps: PairLogps, beta: float) -> Metrics:
    """The metrics of a preference run, by the names that dashboards know, as (sum, count).

    A tie, such as every pair at step 0, counts as half an accurate pair.
    """
    with torch.no_grad():
        values = {
            **_ranked(beta * logps.chosen_logratio, beta * logps.rejected_logratio),
            "rewards/spread": (beta * logps.margin).abs(),
            "logps/chosen": logps.policy_chosen,
            "logps/rejected": logps.policy_rejected,
            "logratios/chosen": logps.chosen_logratio,
            "logratios/rejected": logps.rejected_logratio,
            "tokens/chosen": logps.tokens_chosen.float(),
            "tokens/rejected": logps.tokens_rejected.float(),
        }
        return _summed(values)


def _ranked(
    chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"]
) -> dict[str, Tensor]:
    margins = chosen - rejected
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).float() + 0.5 * (margins == 0).float(),
    }


def _summed(values: dict[str, Tensor]) -> Metrics:
    """Each as its sum and the number of its values."""
    return {
        name: (value.detach().sum(), _number(value.numel(), value.device))
        for name, value in values.items()
    }


def _number(value: int, device: torch.device) -> Float[Tensor, ""]:
    # Filled there: torch.tensor() would copy it there, and wait for what runs.
    return torch.full((), float(value), device=device)


def sft() -> Objective:
    """-log pi(response | prompt), the mean over all response tokens of a step."""

    def step(lm: LanguageModel, forest: Forest) -> Step:
        logps = token_logps(lm, forest)
        metrics = {
            "logps/response": response_logps(logps, forest),
            "tokens/response": forest.tokens_per_response.to(logps.device).float(),
        }
        count = _number(logps.numel(), logps.device)
        return Step(-logps.sum(), count, _summed(metrics))

    return Objective("scored", lambda forest: float(forest.scored.shape[0]), step)


def reward(loss: Callable[..., Float[Tensor, " pairs"]], margin: float | int = 0.0) -> Objective:
    """Preferred pairs by the scores of a reward model: `lm` has a scalar head (scalar.py). The
    forest scores all K responses of a prompt in one pass, whatever pairs they make.

    `loss(chosen, rejected, margin=, flipped=)` is given scores, `margin` times the pairs' own
    margins, and how likely their labels are flipped.
    """

    def step(lm: LanguageModel, forest: Forest) -> Step:
        scores = response_scores(lm, forest)
        chosen, rejected = scores[forest.chosen], scores[forest.rejected]
        weight = forest.weight.to(scores.device)
        metrics = _summed(_ranked(chosen.detach(), rejected.detach()))
        # Not read where it has no weight: gaps of scores may be beyond what fp32 holds.
        asked = margin * forest.margin.to(scores.device) if margin else torch.zeros_like(chosen)
        losses = loss(chosen, rejected, margin=asked, flipped=forest.flipped.to(scores))
        return Step((losses * weight).sum(), weight.sum(), metrics)

    return Objective("pairs", _pair_weight, step)


@dataclass(frozen=True)
class Surrogate:
    """What a policy-gradient step optimizes: the clipped surrogate, a KL term in the loss where
    `kl` names an estimator, and the value loss where there are values."""

    clip_low: float
    clip_high: float
    aggregation: str
    max_tokens: int
    kl: str | None = None
    value_clip: float | None = None
    value_coefficient: float = 1.0


def of_round(objective: Objective, means: Callable[[], Mapping[str, float]]) -> Objective:
    """`objective`, whose metrics also say what the round was like that is learned from."""

    def step(lm: LanguageModel, forest: Forest) -> Step:
        made = objective.step(lm, forest)
        once = torch.ones((), device=made.count.device)
        whole = {name: (value * once, once) for name, value in means().items()}
        return replace(made, metrics={**made.metrics, **whole})

    return replace(objective, step=step)


def policy_gradient(
    experience: Callable[[Forest], Experience],
    surrogate: Surrogate,
    values: Callable[[LanguageModel, Forest], tuple[Tensor, Tensor | None]],
    beta: Callable[[], float],
) -> Objective:
    """PPO, GRPO and RLOO on what was drawn and is known as its `experience`.

    `values` gives a forest's log-probs and, for PPO, its values; `beta` the weight of the KL term
    at present.
    """
    weigh = AGGREGATIONS[surrogate.aggregation]
    items = "scored" if surrogate.aggregation == "token" else "responses"

    def weights(forest: Forest) -> tuple[Tensor, Tensor]:
        return weigh(
            forest.response_of, forest.tokens_per_response, max_new_tokens=surrogate.max_tokens
        )

    def step(lm: LanguageModel, forest: Forest) -> Step:
        logps, now = values(lm, forest)
        known = experience(forest).to(logps.device)
        weight, count = (x.to(logps.device) for x in weights(forest))
        clips = {"clip_low": surrogate.clip_low, "clip_high": surrogate.clip_high}
        old, advantages = known.logps, known.advantages
        loss = clipped_surrogate(logps, old, advantages, **clips)
        metrics = _summed(
            {
                "clip_fraction": clipped_tokens(logps, old, advantages, **clips).float(),
                "approx_kl": KL_ESTIMATORS["k3"](old, logps.detach()),
                "ratio": (logps.detach() - old).exp(),
                "advantages/nonzero": (advantages != 0).float(),
            }
        )
        if surrogate.kl is not None:
            loss = loss + beta() * KL_ESTIMATORS[surrogate.kl](logps, known.reference_logps)
        if now is not None:
            assert known.values is not None and known.returns is not None
            clip = torch.inf if surrogate.value_clip is None else surrogate.value_clip
            error = clipped_value_loss(now, known.values, known.returns, clip=clip)
            # Means as the loss is one, so that it is the one plus the coefficient times the other.
            for name, part in (("policy_loss", loss), ("value_loss", error)):
                metrics[name] = (weight * part.detach()).sum(), count
            loss = loss + surrogate.value_coefficient * error
        return Step((weight * loss).sum(), count, metrics)

    return Objective(items, lambda forest: float(weights(forest)[1]), step)
