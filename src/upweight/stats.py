"""Intervals for what is measured of preferences and answers. Those of one prompt are not
independent: everything here takes the prompt as the unit that is sampled."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

_DRAWS_AT_ONCE = 1_000_000

WINDOW = 4
"""Tokens in a row of which repetition is counted."""

FEWEST = 6
"""Prompts below which a mean has no interval: even all of them, from the least to the greatest,
miss the middle of what they were drawn from in 2^(1-n) of cases, which 5 % allows from six on."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and the bounds of its interval, in the unit of what was estimated."""

    value: float
    low: float
    high: float


def mean_interval(
    values: Sequence[float | int],
    prompts: Sequence[Hashable] | None = None,
    *,
    sizes: Sequence[float | int] | None = None,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The mean of `values` with a percentile bootstrap interval that resamples whole prompts.

    `prompts` names the prompt of each value; without it every value is a prompt of its own. With
    `sizes` each value is a sum over so many, of which the mean is taken. The same seed gives the
    same interval. Of fewer than six prompts (`FEWEST`) the bounds are nan.

    Efron 1979; resampling of clusters: Davison and Hinkley 1997, section 3.8.
    """
    sums, counts = _per_prompt(values, prompts, sizes)
    mean = float(sums.sum() / counts.sum())
    if len(sums) < FEWEST:
        return Interval(mean, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    rows = max(1, _DRAWS_AT_ONCE // len(sums))
    means: list[npt.NDArray[np.float64]] = []
    for start in range(0, num_resamples, rows):
        drawn = rng.integers(len(sums), size=(min(rows, num_resamples - start), len(sums)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(means), (tail, 1 - tail))
    return Interval(mean, float(low), float(high))


def accuracy_interval(
    margins: Sequence[float | int],
    prompts: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
) -> Interval:
    """Share of positive margins, a tie (exactly 0) counting one half, with its Wilson interval.

    `prompts` names the prompt of each margin. Several preferences of one prompt tend to be right
    or wrong together, so the interval is that of n/d independent preferences, d >= 1 being their
    design effect: the variance between prompts over the variance p(1-p)/n of independent ones.
    Where all margins agree no variance shows and each prompt counts once.

    Wilson 1927; the effective size in place of n: Korn and Graubard 1998.
    """
    signs = np.sign(np.asarray(margins, dtype=np.float64))
    assert not np.isnan(signs).any(), "a margin is nan"
    sums, counts = _per_prompt(((signs + 1) / 2).tolist(), prompts)
    num_pairs, num_prompts = float(counts.sum()), len(sums)
    share = float(sums.sum()) / num_pairs
    independent = share * (1 - share) / num_pairs
    if num_prompts == num_pairs:
        effective = num_pairs
    elif num_prompts == 1 or independent == 0:
        effective = float(num_prompts)
    else:
        residuals = sums - share * counts
        between = num_prompts / (num_prompts - 1) * float(residuals @ residuals) / num_pairs**2
        effective = max(1.0, num_pairs / max(1.0, between / independent))
    return wilson_interval(share, effective, level=level)


def wilson_interval(share: float, n: float | int, *, level: float = 0.95) -> Interval:
    """Wilson's score interval for `share` of `n` independent trials; `n` need not be whole."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    # At 0 and 1 the bound equals the share; rounding must not push it past.
    return Interval(share, min(low, share), max(high, share))


@lru_cache
def t_quantile(share: float, freedom: int) -> float:
    """What Student's t with so many degrees of freedom stays below with a probability `share` of
    at least one half.

    By halving the angle atan(t / sqrt(freedom)), in which |t|'s distribution is a finite sum:
    Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        if _within(angle, freedom) < 2 * share - 1:
            low = angle
        else:
            high = angle
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """P(|t| <= sqrt(freedom) tan(angle))."""
    squared, total = math.cos(angle) ** 2, 0.0
    term = math.cos(angle) if freedom % 2 else 1.0
    for power in range(freedom % 2, freedom - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * squared
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if freedom % 2 else total


def sign_test(num_better: int, num_worse: int) -> float:
    """Two-sided exact probability of a split at least this uneven if both sides were equal.

    Ties are left out by the caller. 1.0 when there is nothing to compare.
    """
    n, fewer = num_better + num_worse, min(num_better, num_worse)
    ways, tail = 1, 0
    for k in range(fewer + 1):
        tail += ways
        ways = ways * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)


def repeated(tokens: Sequence[int]) -> float:
    """The share of windows of four tokens that the answer has had before (seq-rep-4, Welleck et al.
    2020, arXiv:1908.04319); 0 for an answer that is shorter."""
    windows = [tuple(tokens[i : i + WINDOW]) for i in range(len(tokens) - WINDOW + 1)]
    return 1 - len(set(windows)) / len(windows) if windows else 0.0


def _per_prompt(
    values: Sequence[float | int],
    prompts: Sequence[Hashable] | None,
    sizes: Sequence[float | int] | None = None,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The sum and the size of the values of each prompt, in order of first appearance; their
    number without `sizes`."""
    array = np.asarray(values, dtype=np.float64)
    assert len(array), "an interval needs at least one value"
    size = np.ones_like(array) if sizes is None else np.asarray(sizes, dtype=np.float64)
    assert len(size) == len(array), (len(size), len(array))
    if prompts is None:
        return array, size
    assert len(prompts) == len(array), (len(prompts), len(array))
    index: dict[Hashable, int] = {}
    of = [index.setdefault(prompt, len(index)) for prompt in prompts]
    sums, counts = np.zeros(len(index)), np.zeros(len(index))
    np.add.at(sums, of, array)
    np.add.at(counts, of, size)
    return sums, counts
