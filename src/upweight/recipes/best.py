"""checkpoint.best: which metric of which evaluation set the best checkpoint is kept by."""

from __future__ import annotations

import math
from dataclasses import dataclass

from upweight.config import Run
from upweight.errors import ConfigError, nearest
from upweight.recipes.kinds import KINDS, PROMPTS
from upweight.stats import FEWEST

SCORED = (
    "loss",
    *(f"{kind}/{side}" for kind in ("rewards", "logps", "logratios", "tokens")
      for side in ("chosen", "rejected")),
    "rewards/margins",
    "rewards/spread",
    "rewards/accuracies",
    "rewards/accuracies_low",
    "rewards/accuracies_high",
)  # fmt: skip
KL = ("kl", "kl_low", "kl_high")
REPETITION = ("repetition", "repetition_low", "repetition_high", "reference_repetition")
SAMPLED = (
    "length",
    "reference_length",
    *("length_ratio", "length_ratio_low", "length_ratio_high"),
    *REPETITION,
    *("stopped", "stopped_low", "stopped_high", "reference_stopped"),
)


REWARD = ("reward", "reward_low", "reward_high", "reference_reward")
MEASURED: dict[tuple[str, bool], tuple[str, ...]] = {
    ("preferences", True): SCORED,
    ("preferences", False): tuple(
        m for m in SCORED if m == "loss" or (m.startswith("rewards/") and m != "rewards/spread")
    ),
    ("responses", True): ("loss", "logps/response", "tokens/response"),
    ("prompts", True): (),
}
"""What is recorded of a set, by what its rows are and whether the model answers."""


@dataclass(frozen=True)
class Best:
    """A metric of an evaluation set."""

    set: str
    metric: str

    def improves(self, value: float, best: float | None) -> bool:
        """Whether `value` is better than the best one before. Less is, of losses,
        KL and repetition. A bound that is not known is not."""
        if best is None or math.isnan(value):
            return not math.isnan(value)
        return value < best if self.metric in ("loss", *KL, *REPETITION) else value > best


def metrics(run: Run, name: str) -> tuple[str, ...]:
    """The numbers that an evaluation of this run records for the set `name`."""
    kind = KINDS[run.objective]
    scored = () if name == PROMPTS else MEASURED[kind.rows, kind.answers]
    answered = kind.answers and run.evaluation.samples > 0
    if not answered or (run.evaluation.prompt_files is not None and name != PROMPTS):
        return scored
    kl = KL if samples_are_the_policys(run) else ()
    rewarded = run.evaluation.true_reward or run.rollout.reward
    sampled = (*SAMPLED, *kl, *(REWARD if rewarded else ()))
    if run.evaluation.samples < FEWEST:  # Means, and no intervals of them.
        sampled = tuple(m for m in sampled if not m.endswith(("_low", "_high")) or "stopped" in m)
    return (*scored, *sampled)


def samples_are_the_policys(run: Run) -> bool:
    """Whether samples are drawn from the policy itself, as the estimate of a KL needs."""
    return run.evaluation.temperature == 1


def best_metric(run: Run) -> Best | None:
    """checkpoint.best, which is SET/METRIC or METRIC of the first set. Raises ConfigError where no
    evaluation of the run records that."""
    wanted = run.checkpoint.best
    if wanted is None:
        return None
    sets = (["heldout"] if run.evaluation.fraction else []) + list(run.evaluation.sets)
    sets += [PROMPTS] if run.evaluation.prompt_files else []
    known = {name: metrics(run, name) for name in sets}
    for name in sets:
        for said in (wanted, wanted.removeprefix(f"{name}/")):
            if said in known[name]:
                return Best(name, said)
    pairs = [f"{name}/{metric}" for name in sets for metric in known[name]]
    guess = nearest(wanted, [*dict.fromkeys(m for found in known.values() for m in found), *pairs])
    raise ConfigError(
        f"checkpoint.best is {wanted}, which no evaluation of this run records.{guess} It takes "
        f"METRIC (of the first set that has it) or SET/METRIC. "
        + " ".join(f"Metrics of {name}: {', '.join(found)}." for name, found in known.items())
    )
