"""What length and words say of a preference, learned from the preferences of other prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FOLDS = 5
"""Of the prompts: a rule is asked about prompts that it has not counted."""

Ids = tuple[int, ...]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Compared:
    """A preference as token ids."""

    prompt: Ids
    chosen: Ids
    rejected: Ids


@dataclass(frozen=True)
class Words:
    """A naive Bayes classifier over tokens, one for each fold: `weights[fold]` are log-odds that
    a token is in a chosen response, counted on the other folds."""

    fold: npt.NDArray[np.int64]
    weights: Floats

    def margins(self, compared: Sequence[Compared]) -> Floats:
        """Above 0 where the words speak for the label."""
        of = zip((self.weights[f] for f in self.fold), compared, strict=True)
        return np.asarray([w[list(c.chosen)].sum() - w[list(c.rejected)].sum() for w, c in of])

    def against(self, index: int, compared: Compared, most: int = 3) -> list[int]:
        """The tokens that speak most against a label, the strongest first."""
        weights = self.weights[self.fold[index]]
        said: dict[int, float] = {}
        for ids, sign in ((compared.chosen, 1.0), (compared.rejected, -1.0)):
            for token in ids:
                said[token] = said.get(token, 0.0) + sign * float(weights[token])
        return [token for token in sorted(said, key=said.__getitem__) if said[token] < 0][:most]


def count_words(compared: Sequence[Compared]) -> Words | None:
    """None where there are too few prompts to leave any out."""
    prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(c.prompt for c in compared))}
    if len(prompts) < 2 * FOLDS:
        return None
    fold = np.asarray([prompts[c.prompt] % FOLDS for c in compared])
    size = 1 + max(max(ids) for c in compared for ids in (c.chosen, c.rejected))
    counts = np.zeros((2, FOLDS, size))
    for f, c in zip(fold, compared, strict=True):
        for side, ids in enumerate((c.chosen, c.rejected)):
            np.add.at(counts[side, f], list(ids), 1.0)
    others = counts.sum(1, keepdims=True) - counts + 1.0
    likely = np.log(others) - np.log(others.sum(-1, keepdims=True))
    return Words(fold, likely[0] - likely[1])


def log_odds(features: Floats, fold: npt.NDArray[np.int64]) -> Floats:
    """Of each preference, that its label is right: a logistic regression on differences between
    chosen and rejected, fitted on the other folds' preferences. No constant: chosen and rejected
    are told apart by their features or not at all. The first feature is a judge's margin, and
    speaks for a label or not at all: its weight is at least 0.

    A ridge of one preference's worth keeps what separates the labels perfectly finite.
    """
    scale = np.sqrt((features**2).mean(0))
    scaled = features / np.where(scale > 0, scale, 1.0)
    found = np.zeros(len(scaled))
    for f in np.unique(fold):
        held = fold == f
        weights = _fitted(scaled[~held])
        if weights[0] < 0:
            weights = np.concatenate([[0.0], _fitted(scaled[~held, 1:])])
        found[held] = scaled[held] @ weights
    return found


def _fitted(x: Floats, num_steps: int = 30) -> Floats:
    """The weights that maximise sum log sigmoid(x w) - |w|^2 / 2, by Newton's method."""
    weights = np.zeros(x.shape[1])
    for _ in range(num_steps):
        wrong = 1 / (1 + np.exp(np.clip(x @ weights, -30, 30)))
        slope = x.T @ wrong - weights
        curvature = (x * (wrong * (1 - wrong))[:, None]).T @ x + np.eye(x.shape[1])
        weights = weights + np.linalg.solve(curvature, slope)
    return weights
