"""What comparison.json says: its keys are the fields of `Study`, at every depth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from upweight.stats import FEWEST, Interval, t_quantile


@dataclass(frozen=True, slots=True)
class Point:
    """A policy as it was evaluated after `step`: its true reward and its sampled KL, in nats per
    answer, with their 95 % bootstrap intervals over `num_prompts` prompts (nan where not known),
    and its answers' mean tokens.

    The answers of best-of-n have `step` n, and their KL is no estimate but a bound from above.
    """

    step: int
    kl: float
    kl_low: float
    kl_high: float
    reward: float
    reward_low: float
    reward_high: float
    length: float
    num_prompts: int

    @property
    def kl_interval(self) -> Interval:
        return Interval(self.kl, self.kl_low, self.kl_high)

    @property
    def reward_interval(self) -> Interval:
        return Interval(self.reward, self.reward_low, self.reward_high)


ROWS = "the rows"
"""What tells good from bad where nothing scores: the labels or answers that stand in the data."""


@dataclass(frozen=True, slots=True)
class Taught:
    """What a method learned from. There were `there` items of a `kind` (preferences, responses or
    prompts), of which it saw `seen`, each as often as it came, in `steps` steps; `answers` were
    drawn on the way. `by` told good from bad: ROWS, the name of a method that trained a reward
    model, or another reward."""

    kind: str
    there: int
    seen: int
    steps: int
    answers: int
    by: str


@dataclass(frozen=True, slots=True)
class Noticed:
    """What was reported while a method trained: a diagnosis code, at which step, what was seen."""

    code: str
    step: int
    said: str


@dataclass(frozen=True, slots=True)
class Method:
    """One method and its evaluations in step order. `seconds` and `tokens` are those of training,
    rollouts included; `failed` says why it did not get to its end. `taught` is None where that is
    not known, as of one that failed before its first step."""

    name: str
    objective: str
    note: str
    seconds: float
    tokens: int
    points: tuple[Point, ...]
    failed: str | None = None
    taught: Taught | None = None
    noticed: tuple[Noticed, ...] = ()

    @property
    def is_path(self) -> bool:
        """Whether its points are one policy on its way; those of best-of-n are not."""
        return not self.objective.lower().startswith("best")


@dataclass(frozen=True, slots=True)
class Start:
    """What the policy that every method starts from earns, at KL 0, over `num_prompts` prompts."""

    reward: float
    low: float
    high: float
    num_prompts: int


@dataclass(frozen=True, slots=True)
class Pair:
    """A run of DPO and one of PPO, by their names. `said` ends a sentence that begins "DPO's
    frontier is", or says why the two are not `compared`. `in_part`: DPO's is above at some KL, and
    elsewhere nothing is shown. `gained`: one of them earns more somewhere than where both begin."""

    dpo: str
    ppo: str
    compared: bool
    holds: bool | None
    said: str
    in_part: bool = False
    gained: bool = True

    @property
    def way(self) -> str:
        """What is shown, in a few words."""
        if self.holds is None and not self.gained:
            return "without a gain"
        if self.holds is None:
            return "above at some KL" if self.in_part else "not shown to differ"
        return "not below" if self.holds else "below"


def widening(places: int, num_prompts: int) -> float:
    """sqrt(n/(n-1)) t(1 - 0.05/(2m)) / z(1 - 0.05/2): how many times as wide as a bootstrap of n
    prompts has it for itself each of m intervals is where all m are to hold together in 95 of 100
    cases; t is Student's quantile with n - 1 degrees of freedom, and z the normal one.

    A percentile bootstrap's bounds are z of its own standard error away, which is too small by
    sqrt((n-1)/n), and as uncertain as the spread of n prompts: Hesterberg 2015, "What teachers
    should know about the bootstrap" (arXiv:1411.5279), who takes percentiles that are further out.
    Dunn 1961, "Multiple comparisons among means", JASA 56, with Bonferroni's inequality: it asks
    nothing of how the m estimates depend on each other, only that each is about normal.
    """
    n = max(FEWEST, num_prompts)  # of fewer no bounds are known
    together = t_quantile(1 - 0.05 / (2 * max(1, places)), n - 1)
    return math.sqrt(n / (n - 1)) * together / NormalDist().inv_cdf(1 - 0.05 / 2)


@dataclass(frozen=True, slots=True)
class Claim:
    """Whether DPO's frontier is not below PPO's at equal KL; None where neither is shown.

    `said` is the verdict over all `pairs`; `places` is at how many evaluations they were compared,
    which all hold together in 95 of 100 cases, and `num_prompts` how many each was asked at least.
    """

    holds: bool | None
    said: str
    pairs: tuple[Pair, ...] = ()
    places: int = 0
    num_prompts: int = 0

    @property
    def sure(self) -> str:
        """How sure the verdict is, as a sentence; '' where nothing was compared."""
        if not self.places:
            return ""
        where = "one place" if self.places == 1 else f"{self.places} places"
        if self.num_prompts < FEWEST:
            return (
                f"The frontiers were compared at {where}, by {self.num_prompts} prompts: of fewer "
                f"than {FEWEST} no interval is known."
            )
        wider = (
            f"{widening(self.places, self.num_prompts):.2f} times as wide as a bootstrap of "
            f"{self.num_prompts:,} prompts alone"
        )
        if self.places == 1:
            return (
                "The frontiers were compared at one place; the interval, which has the sampling of "
                f"rewards and of KL in it, is {wider}, so that it holds with 95 % confidence."
            )
        return (
            f"The frontiers were compared at {where}; the intervals, which have the sampling of "
            f"rewards and of KL in them, are {wider}, so that all of them hold together with 95 % "
            "confidence."
        )

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

    @property
    def noticed(self) -> tuple[str, ...]:
        """One line for each method of which something was reported, by its codes: a reward that
        rises while an answer's length or the KL runs away is not all that was asked for."""
        return tuple(
            f"{method.name} was reported while it trained: {', '.join(codes)}."
            for method in self.methods
            if (codes := dict.fromkeys(f"{n.code} at step {n.step}" for n in method.noticed))
        )
