"""What steps are made of: each pair and response of a step once, each epoch in an order of its
own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from upweight.data.stream import StepPlan
from upweight.errors import Refusal
from upweight.types import Forest, Tree

FEWEST_ROWS = 10
"""Below this two orders may well be the same by chance."""


def require_whole_step(batch: Sequence[Tree], forests: Sequence[Forest], step: int) -> None:
    """Raises Refusal UW302 when the bins of step `step` (from 1) do not hold its rows' pairs and
    responses, of which many an objective has no pairs."""
    wanted = _said(sum(len(t.preferences) for t in batch), sum(len(t.responses) for t in batch))
    packed = _said(sum(f.num_pairs for f in forests), sum(f.num_responses for f in forests))
    if packed != wanted:
        raise Refusal(
            "UW302",
            f"step {step}: its rows have {wanted}, and the {len(forests)} bins that they are "
            f"packed into have {packed}. What a step learns from depends on how it is packed. This "
            "is a fault of the packing: report it, with your data's format.",
        )


def _said(pairs: int, responses: int) -> str:
    return f"{pairs} preferences and {responses} responses"


@dataclass
class Orders:
    """The order in which each epoch's rows were trained on, as a digest. `repeated` is an epoch and
    an earlier one of the same order, from 1."""

    known: dict[str, int] = field(default_factory=dict[str, int])
    repeated: tuple[int, int] | None = None
    epoch: int = -1
    last_step: int = -1
    num_rows: int = 0
    digest: str = ""

    def saw(self, plan: StepPlan, batch: Sequence[Tree]) -> None:
        """`batch` is what step `plan` was trained on, in its order.

        An epoch that a resumed run sees from its middle has a digest like no other.
        """
        if plan.step <= self.last_step:
            return  # it ran out of memory, and is taken again
        if plan.epoch != self.epoch:
            self.epoch, self.num_rows, self.digest = plan.epoch, 0, ""
        self.last_step = plan.step
        self.num_rows += len(batch)
        rows = " ".join(f"{i.row}/{i.index}" for tree in batch for i in tree.ids)
        self.digest = hashlib.sha256(f"{self.digest} {rows}".encode()).hexdigest()
        if plan.epochs_done >= plan.epoch + 1 and self.num_rows >= FEWEST_ROWS:
            earlier = self.known.setdefault(self.digest, plan.epoch)
            if earlier != plan.epoch and self.repeated is None:
                self.repeated = (plan.epoch + 1, earlier + 1)
