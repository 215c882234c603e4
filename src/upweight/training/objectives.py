"""(model, forest) -> Step: a loss sum, the count it is a sum over, metrics as (sum, count)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.models.load import LanguageModel
from upweight.models.logprobs import pair_logps, token_logps
from upweight.models.reference import Reference
from upweight.types import Forest, PairLogps, Step

Objective = Callable[[LanguageModel, Forest], Step]
PairLoss = Callable[[PairLogps], Float[Tensor, " pairs"]]


def pair(
    reference: Reference,
    loss: PairLoss,
    beta: float,
    on_margins: Callable[[Forest, Tensor], None] | None = None,
) -> Objective:
    """Preferred pairs under `loss`, its options bound; `beta` scales the rewards that are shown.

    `on_margins` is given each forest's margins, beta times the difference of log-ratios.
    """

    def objective(lm: LanguageModel, forest: Forest) -> Step:
        policy = token_logps(lm, forest)
        logps = pair_logps(policy, reference.logps(forest).to(policy.device), forest)
        if on_margins is not None:
            on_margins(forest, beta * logps.margin.detach())
        weight = forest.weight.to(policy.device)
        return Step((loss(logps) * weight).sum(), weight.sum(), pair_metrics(logps, beta))

    return objective


def pair_metrics(logps: PairLogps, beta: float) -> dict[str, tuple[Tensor, Tensor]]:
    """The metrics of a preference run, by the names that dashboards know, as (sum, count).

    A tie, such as every pair at step 0, counts as half an accurate pair.
    """
    with torch.no_grad():
        margins = beta * logps.margin
        values = {
            "rewards/chosen": beta * logps.chosen_logratio,
            "rewards/rejected": beta * logps.rejected_logratio,
            "rewards/margins": margins,
            "rewards/spread": margins.abs(),
            "rewards/accuracies": (margins > 0).float() + 0.5 * (margins == 0).float(),
            "logps/chosen": logps.policy_chosen,
            "logps/rejected": logps.policy_rejected,
            "logratios/chosen": logps.chosen_logratio,
            "logratios/rejected": logps.rejected_logratio,
            "tokens/chosen": logps.tokens_chosen.float(),
            "tokens/rejected": logps.tokens_rejected.float(),
        }
        count = torch.tensor(float(margins.shape[0]), device=margins.device)
        return {name: (value.detach().sum(), count) for name, value in values.items()}
