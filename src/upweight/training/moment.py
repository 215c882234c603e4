"""A moment of training: what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import UInt8
from torch import Tensor


@dataclass(frozen=True)
class Position:
    """Where a run is, in plain values.

    `step` counts the updates made and `epoch` the passes over the data that they are (2.5 is the
    middle of the third), whose order is drawn from `order_seed`; `num_tokens` is what they read.
    `best` is the best value so far of the metric that checkpoints are kept by, at `best_step`.
    The fingerprints and digests say what the run began with: its reference, its own weights, its
    settings, the trees of every set by name, and what is behind its rewards. `window` is what was
    summed for the next record, `tokens_per_bin` what fitted into memory so far, `rollout` which
    round of answers is learned from. `first_losses` are those of each set before step 1.
    """

    step: int
    epoch: float
    num_tokens: int
    order_seed: int
    reference_fingerprint: str
    config_digest: str
    best: float | None = None
    best_step: int | None = None
    seconds: float = 0.0
    model_fingerprint: str = ""
    data_digests: Mapping[str, str] = field(default_factory=dict[str, str])
    reward_digests: Mapping[str, str] = field(default_factory=dict[str, str])
    window: Mapping[str, Any] | None = None
    tokens_per_bin: int | None = None
    rollout: Mapping[str, Any] | None = None
    first_losses: Mapping[str, Sequence[float]] = field(default_factory=dict[str, Sequence[float]])


@dataclass(frozen=True)
class RandomState:
    """The states of the global generators; `cuda` is the current device's, None without one.

    `python` and `numpy` are as JSON has them.
    """

    torch: UInt8[Tensor, " bytes"]
    cuda: UInt8[Tensor, " gpu_bytes"] | None
    python: Sequence[Any]
    numpy: Mapping[str, Any]


@dataclass(frozen=True)
class TrainState:
    """A moment of training. `moments[parameter name][slot]` is the optimizer's state."""

    position: Position
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Mapping[str, Tensor]]
    random: RandomState

    @property
    def num_bytes(self) -> int:
        slots = (tensor for slots in self.moments.values() for tensor in slots.values())
        return sum(t.nbytes for t in self.weights.values()) + sum(t.nbytes for t in slots)
