"""What comparison.json says: its keys are the fields of `Study`, at every depth."""

from __future__ import annotations

from dataclasses import dataclass

from upweight.stats import Interval


@dataclass(frozen=True, slots=True)
class Point:
    """A policy as it was evaluated after `step`: its true reward and its sampled KL, in nats per
    answer, with their 95 % intervals (nan where not known), and its answers' mean tokens.

    The answers of best-of-n have `step` n.
    """

    step: int
    kl: float
    kl_low: float
    kl_high: float
    reward: float
    reward_low: float
    reward_high: float
    length: float

    @property
    def kl_interval(self) -> Interval:
        return Interval(self.kl, self.kl_low, self.kl_high)

    @property
    def reward_interval(self) -> Interval:
        return Interval(self.reward, self.reward_low, self.reward_high)


@dataclass(frozen=True, slots=True)
class Method:
    """One method and its evaluations in step order. `seconds` and `tokens` are those of training,
    rollouts included; `failed` says why it did not get to its end."""

    name: str
    objective: str
    note: str
    seconds: float
    tokens: int
    points: tuple[Point, ...]
    failed: str | None = None

    @property
    def is_path(self) -> bool:
        """Whether its points are one policy on its way; those of best-of-n are not."""
        return not self.objective.lower().startswith("best")


@dataclass(frozen=True, slots=True)
class Start:
    """What the policy that every method starts from earns, at KL 0."""

    reward: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Pair:
    """A run of DPO and one of PPO, by their names. `said` ends a sentence that begins "DPO's
    frontier is", or says why the two are not `compared`."""

    dpo: str
    ppo: str
    compared: bool
    holds: bool | None
    said: str


@dataclass(frozen=True, slots=True)
class Claim:
    """Whether DPO's frontier is not below PPO's at equal KL; None where neither is shown.

    `said` is the verdict over all `pairs`.
    """

    holds: bool | None
    said: str
    pairs: tuple[Pair, ...] = ()

    @property
    def lines(self) -> tuple[str, ...]:
        """One line for each pair, where the verdict is over several."""
        if len(self.pairs) < 2:
            return ()
        return tuple(f"{pair.dpo} against {pair.ppo}: {pair.said}." for pair in self.pairs)


@dataclass(frozen=True, slots=True)
class Study:
    """A comparison by the true reward named `reward`, within `budget`, on `machine`."""

    title: str
    reward: str
    start: Start
    methods: tuple[Method, ...]
    budget: str
    machine: str
    seconds: float
    claim: Claim
