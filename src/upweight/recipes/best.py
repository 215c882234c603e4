"""checkpoint.best: which metric of which evaluation set the best checkpoint is kept by."""

from __future__ import annotations

from dataclasses import dataclass

from upweight.config import Run
from upweight.errors import ConfigError, nearest

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
    *REPETITION,
    *("stopped", "stopped_low", "stopped_high", "reference_stopped"),
)


@dataclass(frozen=True)
class Best:
    """A metric of an evaluation set."""

    set: str
    metric: str

    def improves(self, value: float, best: float | None) -> bool:
        """Whether `value` is better than the best one before. Less is, of losses,
        KL and repetition."""
        if best is None:
            return True
        return value < best if self.metric in ("loss", *KL, *REPETITION) else value > best


def metrics(run: Run) -> tuple[str, ...]:
    """The numbers that an evaluation of this run records for each set."""
    if not run.evaluation.samples:
        return SCORED
    return (*SCORED, *SAMPLED, *(KL if samples_are_the_policys(run) else ()))


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
    known = metrics(run)
    if wanted in known:
        return Best(sets[0], wanted)
    for name in sets:
        if wanted.removeprefix(f"{name}/") in known:
            return Best(name, wanted.removeprefix(f"{name}/"))
    guess = nearest(wanted, [*known, *(f"{name}/{metric}" for name in sets for metric in known)])
    raise ConfigError(
        f"checkpoint.best is {wanted}, which no evaluation of this run records.{guess} It takes "
        f"METRIC (of {sets[0]}) or SET/METRIC. Metrics: {', '.join(known)}. Sets: "
        f"{', '.join(sets)}."
    )
