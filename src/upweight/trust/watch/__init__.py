"""What goes wrong while training runs: seen in the records as they are written, in the rows of each
step, and in a sample of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from upweight.config import Watch as Limits
from upweight.data.stream import StepPlan
from upweight.errors import Refusal
from upweight.models.load import LanguageModel
from upweight.trust.codes import page
from upweight.trust.finding import Finding
from upweight.trust.watch.answers import (
    does_not_stop,
    far_from_the_reference,
    kl_below_zero,
    length_runs_away,
    repeats_itself,
)
from upweight.trust.watch.curves import (
    displaced,
    flat,
    held_out_is_solved,
    not_better_than_chance,
    saturated,
    too_easy,
)
from upweight.trust.watch.orders import require_whole_step
from upweight.trust.watch.rounds import (
    rounds_change_in_length,
    rounds_do_not_stop,
    rounds_repeat_themselves,
)
from upweight.trust.watch.seen import RECENT, Record, Seen, Told, some_weights
from upweight.trust.watch.weights import (
    is_the_reference,
    nothing_is_taught,
    nothing_learns,
    same_order,
    swallowed,
)
from upweight.types import Forest, Tree

__all__ = ["RECENT", "Told", "Watch"]

Observer = Callable[[Seen, Record], Finding | None]

TRAINING: Sequence[Observer] = (
    nothing_learns,
    nothing_is_taught,
    swallowed,
    is_the_reference,
    displaced,
    too_easy,
    saturated,
    flat,
    same_order,
    rounds_change_in_length,
    rounds_repeat_themselves,
    rounds_do_not_stop,
    far_from_the_reference,
    kl_below_zero,
)
"""What looks at training records."""

EVALUATION: Sequence[Observer] = (
    displaced,
    not_better_than_chance,
    held_out_is_solved,
    saturated,
    length_runs_away,
    repeats_itself,
    does_not_stop,
    far_from_the_reference,
    kl_below_zero,
)
"""What looks at the records of evaluations."""


class Watch:
    """Asks every observer, and reports what it sees once in a run: for each metric that shows it,
    of training and of each set. `trained` is what the optimizer moves, where that is more than the
    policy: a ModuleDict that names a value model `value`."""

    def __init__(
        self,
        lm: LanguageModel,
        limits: Limits,
        told: Told | None = None,
        trained: nn.Module | None = None,
    ) -> None:
        trained = lm.model if trained is None else trained
        self.seen = Seen(lm, limits, told or Told(), trained, some_weights(trained))
        self.reported: set[tuple[object, ...]] = set()

    def resumed(self, records: Iterable[Mapping[str, object]]) -> None:
        """What the run has written so far: it goes on from there."""
        for record in records:
            if record["kind"] == "warning":
                self.reported.add(_said_by(record.get("observer"), record.get("metric"), record))
            if record["kind"] == "train":
                self.seen.remember(_numbers(record))

    def packed(
        self, step: int, plan: StepPlan | None, batch: Sequence[Tree], forests: Sequence[Forest]
    ) -> None:
        """The trees of step `step` (from 0), the bins that they are packed into, and the plan that
        they are of, where they are rows. Raises Refusal UW302."""
        require_whole_step(batch, forests, step + 1)
        if plan is not None:
            self.seen.orders.saw(plan, batch)

    def after(self, record: Mapping[str, object]) -> list[Finding]:
        """What a record of metrics.jsonl shows that was not shown before.

        Raises Refusal for what cannot end well: the weights are as the last checkpoint has them.
        """
        values = _numbers(record)
        trained = record["kind"] == "train"
        if trained:
            self.seen.train(values)
        found: list[Finding] = []
        # Before the first step nothing that is seen can be training's doing; that a start is not
        # its reference is said before (UW101).
        observers = TRAINING if trained else EVALUATION if values["step"] > 0 else ()
        for observer in observers:
            finding = observer(self.seen, values)
            if finding is None:
                continue
            name = observer.__name__
            said = _said_by(name, finding.metric, record)
            if said not in self.reported:
                if page(finding.code).severity == "refuses":
                    raise Refusal(finding.code, finding.sentence)
                self.reported.add(said)
                found.append(replace(finding, observer=name))
        return found


def _said_by(observer: object, metric: object, record: Mapping[str, object]) -> tuple[object, ...]:
    """What is not said again, of the record or in the line that it was said in. Not the code alone:
    pairs that are solved must not keep silent that others are learned by heart."""
    return observer, metric, record.get("set")


def _numbers(record: Mapping[str, object]) -> dict[str, float]:
    return {k: float(v) for k, v in record.items() if isinstance(v, (int, float))}
