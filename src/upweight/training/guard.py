"""What keeps a step that must not be taken from the weights: UW302 and UW303.

A loss or a gradient that is not finite, or one that was divided by another count than it is a sum
over, is refused before the optimizer sees it. On a GPU asking for a number waits for all that runs
there. So there the steps of which nothing is shown or kept are not asked about: the optimizer gets
the verdict as a tensor, as torch.amp hands it an overflow (`found_inf`), and takes no step from the
first refused one on. It is read at the next step that somebody looks at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.data.pack import collate
from upweight.errors import Refusal, some_of
from upweight.models.finite import weights_not_finite
from upweight.models.load import LanguageModel
from upweight.training.objectives import Objective
from upweight.types import WAITING_DEVICES, Forest, Tree

ROUNDING = 1e-5
"""Sums of the same fp32 weights in other orders differ by 1e-6 of themselves at most."""


@dataclass(frozen=True)
class Made:
    """What a step's backward pass has left: the sum of its losses over their count, what was
    counted, what the loss was divided by, and the norm of each part's gradient."""

    loss: Float[Tensor, ""]
    count: Float[Tensor, ""]
    total: float
    norms: Sequence[Float[Tensor, ""]]


@dataclass
class Guard:
    """Stands between the steps of `objective` and their optimizer.

    `found` is [1 if it is refused, its number from 0, loss, count, norms ...] of the first refused
    step that nobody has asked about, or of the last step; `unasked` has the steps' micro-batches.
    """

    lm: LanguageModel
    objective: Objective
    optimizer: torch.optim.Optimizer
    found: Float[Tensor, " numbers"] | None = None
    unasked: dict[int, tuple[float, Sequence[Forest]]] = field(
        default_factory=dict[int, tuple[float, Sequence[Forest]]]
    )

    @property
    def defers(self) -> bool:
        """Whether a step need not be asked about before it is taken: only torch's fused kernels
        take the verdict as a tensor."""
        fused = isinstance(self.optimizer, torch.optim.AdamW) and all(
            group["fused"] for group in self.optimizer.param_groups
        )
        return fused and self.lm.device.type in WAITING_DEVICES

    def look(self, step: int, batch: Sequence[Forest], made: Made, *, ask: bool) -> None:
        """At what step `step` (from 0) has made. Raises as `ask` does, at once where `ask` is True
        or asking costs nothing."""
        device = made.loss.device
        parts = [made.loss, made.count, *made.norms]
        values = torch.stack([x.detach().to(device, torch.float64) for x in parts])
        right = (values[1] - made.total).abs() <= ROUNDING * made.total
        right = right & torch.isfinite(values).all()
        number = torch.full((1,), float(step), dtype=torch.float64, device=device)
        now = torch.cat([(~right).double()[None], number, values])
        self.found = now if self.found is None else torch.where(self.found[0] > 0, self.found, now)
        self.unasked[step] = (made.total, batch)
        if ask or not self.defers:
            self.ask()

    def take(self) -> None:
        """The optimizer's step: none at all if a step is refused that nobody has asked about."""
        if self.found is not None:
            vars(self.optimizer)["found_inf"] = self.found[0].float()
        try:
            self.optimizer.step()
        finally:
            vars(self.optimizer).pop("found_inf", None)

    def ask(self) -> None:
        """Raises Refusal UW302 or UW303 for the first refused step that was not asked about. It has
        the step's number, from 1, in `found`."""
        if self.found is None:
            return
        refused, step, loss, count, *norms = self.found.tolist()
        unasked, self.found, self.unasked = self.unasked, None, {}
        if not refused:
            return
        total, batch = unasked[int(step)]
        _refuse_miscounted(count, total, len(batch), int(step))
        _refuse_nonfinite(self, loss, norms, batch, int(step))

    def not_finite(self, batch: Sequence[Forest]) -> list[Tree]:
        """The trees whose loss is not finite: computed alone, or else with those of their bin."""

        def spoils(forest: Forest) -> bool:
            with torch.no_grad():
                made = self.objective.step(self.lm, forest.to(self.lm.device))
            return not bool(torch.isfinite(made.loss_sum))

        found: list[Tree] = []
        for forest in filter(spoils, batch):
            alone = [tree for tree in forest.trees if spoils(collate([tree]))]
            found += alone or forest.trees
        return found

    def cause(self, finite_loss: bool) -> str:
        if broken := weights_not_finite(self.lm.model):
            return f"before this step already {broken}"
        if finite_loss:
            return "the backward pass overflowed: try compute.dtype=float32"
        return "the forward pass overflowed: score these rows, and try compute.dtype=float32"


def _refuse_miscounted(count: float, total: float, num: int, step: int) -> None:
    """What the objective says that its sums are over must be what they were divided by."""
    if not abs(count - total) <= ROUNDING * total:
        raise Refusal(
            "UW302",
            f"step {step + 1}: its {num} micro-batches weigh {total:g}, by which their "
            f"gradients were divided, and their losses are sums over {count:g}: the "
            "gradient's scale would depend on how a step is cut up. The objective must return the "
            "sum of its weights as Step.count.",
            {"step": step + 1},
        )


def _refuse_nonfinite(
    guard: Guard, loss: float, norms: Sequence[float], batch: Sequence[Forest], step: int
) -> None:
    # The weights are as they were before the step: what is computed is what it computed.
    trees = [tree for forest in batch for tree in forest.trees]
    finite = math.isfinite(loss)
    norm = next((norm for norm in norms if not finite or not math.isfinite(norm)), math.nan)
    found = [] if finite else guard.not_finite(batch)
    some = 0 < len(found) < len(trees)
    rows = list(dict.fromkeys(str(i.row) for t in (found if some else trees) for i in t.ids))
    whose = "The rows whose loss it is" if some else "Its rows"
    raise Refusal(
        "UW303",
        f"step {step + 1}: the loss is {loss:.4g}, the gradient's norm {norm:.4g}; "
        f"{guard.cause(finite)}. The weights are as they were before this step. "
        f"{whose}: {some_of(rows)}.",
        {"step": step + 1},
    )
