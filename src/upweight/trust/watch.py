"""What goes wrong while training runs: seen in the records as they are written, and in a sample of
the weights."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from torch import Tensor

from upweight.config import Watch as Limits
from upweight.errors import Refusal
from upweight.models.load import LanguageModel
from upweight.trust.codes import page
from upweight.trust.finding import Finding

ELEMENTS = 256
"""Of each tensor that are looked at: enough to say whether it moves, and nothing beside a step."""

RECENT = 8
"""Training records that a mean is taken over: one step's pairs are few."""


@dataclass
class Watch:
    """What has been seen so far. Each code is reported once in a run."""

    lm: LanguageModel
    limits: Limits
    start: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    recent: deque[Mapping[str, float]] = field(
        default_factory=lambda: deque[Mapping[str, float]](maxlen=RECENT)
    )
    reported: set[str] = field(default_factory=set[str])
    moved: float | None = None

    def __post_init__(self) -> None:
        self.start = _some_weights(self.lm)

    def after(self, record: Mapping[str, object]) -> list[Finding]:
        """What a record of metrics.jsonl shows that was not shown before.

        Raises Refusal for what cannot end well: the weights are as the last checkpoint has them.
        """
        values = {k: float(v) for k, v in record.items() if isinstance(v, (int, float))}
        trained = record["kind"] == "train"
        if trained:
            self.recent.append(values)
            if self.moved is None:
                self.moved = _share_moved(self.start, _some_weights(self.lm))
                self.start = {}
        found: list[Finding] = []
        for observer, keys in (TRAINING if trained else EVALUATION).items():
            finding = observer(self, values) if all(k in values for k in keys) else None
            if finding is not None and finding.code not in self.reported:
                if page(finding.code).severity == "refuses":
                    raise Refusal(finding.code, finding.sentence)
                self.reported.add(finding.code)
                found.append(finding)
        return found

    def mean(self, key: str) -> float:
        return fmean(values[key] for values in self.recent)


def _some_weights(lm: LanguageModel) -> dict[str, Tensor]:
    """Evenly spaced elements of every tensor that is trained."""
    return {
        name: p.detach().flatten()[:: max(1, p.numel() // ELEMENTS)].clone()
        for name, p in lm.model.named_parameters()
        if p.requires_grad
    }


def _share_moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    changed = sum(int((after[name] != values).sum()) for name, values in before.items())
    return changed / max(1, sum(values.numel() for values in before.values()))


def nothing_learns(watch: Watch, record: Mapping[str, float]) -> Finding | None:
    """No weight has moved after the first step, whose learning rate is never 0."""
    if watch.moved is None or watch.moved > 0:
        return None
    if record.get("advantages/nonzero") == 0:
        # A first round whose answers all scored the same has no gradient, and the next may.
        watch.moved, watch.start = None, _some_weights(watch.lm)
        return None
    if record["grad_norm"] == 0:
        cause = "every gradient is 0: no scored token depends on a weight that is trained"
    else:
        cause = (
            f"the updates of a learning rate of {record['learning_rate']:.3g} are smaller than "
            "what the weights can hold: raise optimizer.learning_rate"
        )
    return Finding("UW103", f"step {record['step']:.0f}: no weight has moved; {cause}.")


def swallowed(watch: Watch, record: Mapping[str, float]) -> Finding | None:
    """Weights in half precision of which few have moved."""
    half = [p.dtype for p in watch.lm.model.parameters() if p.requires_grad and p.itemsize < 4]
    if not half or watch.moved is None or not 0 < watch.moved < watch.limits.moved:
        return None
    return Finding(
        "UW104",
        f"step {record['step']:.0f}: {watch.moved:.0%} of the weights have moved (watch.moved is "
        f"{watch.limits.moved:.0%}): they are kept in {str(half[0]).removeprefix('torch.')}, which "
        "rounds small updates away. Keep them in float32.",
    )


def is_the_reference(watch: Watch, record: Mapping[str, float]) -> Finding | None:
    """The weights move and the margin stays exactly 0."""
    if record["step"] < 2 or not watch.moved:
        return None
    if any(record[f"logratios/{side}"] != 0 for side in ("chosen", "rejected")):
        return None
    return Finding(
        "UW102",
        f"step {record['step']:.0f}: the weights have moved, and the policy's log-probs are still "
        "exactly the reference's: the reference is the policy itself.",
    )


def displaced(watch: Watch, record: Mapping[str, float]) -> Finding | None:
    """The chosen responses lose probability, and the rejected ones more."""
    if len(watch.recent) < RECENT:
        return None
    per_token = watch.mean("logratios/chosen") / watch.mean("tokens/chosen")
    if per_token >= -watch.limits.displaced:
        return None
    rejected = watch.mean("logratios/rejected") / watch.mean("tokens/rejected")
    return Finding(
        "UW304",
        f"step {record['step']:.0f}: chosen responses have lost {-per_token:.2f} nats a token "
        f"since the start (watch.displaced is {watch.limits.displaced}), rejected ones "
        f"{-rejected:.2f}: probability goes to what is neither. A smaller "
        "optimizer.learning_rate or a larger loss.beta holds it.",
    )


def too_easy(watch: Watch, record: Mapping[str, float]) -> Finding | None:
    """Training pairs are all right with next to no loss: nothing is left to learn from them."""
    if len(watch.recent) < RECENT or watch.mean("rewards/accuracies") < watch.limits.solved:
        return None
    if watch.mean("loss") > 0.01:
        return None
    return Finding(
        "UW306",
        f"step {record['step']:.0f}: {watch.mean('rewards/accuracies'):.1%} of the training pairs "
        f"are told apart at a mean loss of {watch.mean('loss'):.4f}: nothing is left to learn "
        "from them. Fewer epochs, a smaller optimizer.learning_rate, or harder pairs.",
    )


def not_better_than_chance(watch: Watch, record: Mapping[str, float]) -> Finding | None:
    """The training pairs are learned and the held-out ones are not."""
    if not watch.recent or watch.mean("rewards/accuracies") < 0.9:
        return None
    low, accuracy = record["rewards/accuracies_low"], record["rewards/accuracies"]
    if record["step"] == 0 or low > 0.5 or accuracy > 0.6:
        return None
    return Finding(
        "UW306",
        f"step {record['step']:.0f}: {watch.mean('rewards/accuracies'):.0%} of the training pairs "
        f"are told apart, and {accuracy:.0%} of the held-out ones [from {low:.0%}]: what is "
        "learned is not shown to hold beyond the rows trained on.",
    )


def length_runs_away(watch: Watch, record: Mapping[str, float]) -> Finding | None:
    """Sampled answers are several times as long as the reference's, or as short."""
    if not record.get("length") or not record.get("reference_length"):
        return None
    ratio, most = record["length"] / record["reference_length"], watch.limits.length
    if 1 / most <= ratio <= most:
        return None
    return Finding(
        "UW305",
        f"step {record['step']:.0f}: sampled answers have {record['length']:.0f} tokens, the "
        f"reference's {record['reference_length']:.0f} (watch.length is {most:g}): read "
        "samples.jsonl, and compare the lengths of chosen and rejected in account.json.",
    )


def far_from_the_reference(watch: Watch, record: Mapping[str, float]) -> Finding | None:
    """The policy's own answers are improbable under the reference."""
    if not record.get("kl_low", 0.0) > watch.limits.kl:
        return None
    return Finding(
        "UW308",
        f"step {record['step']:.0f}: the policy is {record['kl']:.0f} nats an answer away from the "
        f"reference [from {record['kl_low']:.0f}] (watch.kl is {watch.limits.kl:g}): raise "
        "loss.beta or lower optimizer.learning_rate.",
    )


Observer = Callable[[Watch, Mapping[str, float]], Finding | None]

_LOGRATIOS = ("logratios/chosen", "logratios/rejected")
_ACCURACY = ("rewards/accuracies",)

TRAINING: Mapping[Observer, Sequence[str]] = {
    nothing_learns: (),
    swallowed: (),
    is_the_reference: _LOGRATIOS,
    displaced: _LOGRATIOS,
    too_easy: _ACCURACY,
}
"""What looks at training records, and the metrics that it reads: an objective that has others is
not looked at."""

EVALUATION: Mapping[Observer, Sequence[str]] = {
    not_better_than_chance: _ACCURACY,
    length_runs_away: (),
    far_from_the_reference: (),
}
"""What looks at the records of evaluations."""
