"""Labels that look wrong: contradicted with confidence by the model, and by a rule that knows only
length and words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from upweight.trust.words import Compared, count_words, log_odds


@dataclass(frozen=True, slots=True)
class Judged:
    """A preference, and the policy's margin on it before it was trained on it, if ever it was.

    Margins of one `set` are of one kind: those of the training set are of the policy on its way.
    """

    set: str
    compared: Compared
    margin: float


@dataclass(frozen=True, slots=True)
class Suspect:
    """`model` and `words` are the odds against the label of judged[index]: 4.0 is four to one.
    `tokens` speak most against it."""

    index: int
    model: float
    words: float
    tokens: tuple[int, ...]


def suspects(judged: Sequence[Judged], confidence: float) -> list[Suspect]:
    """Those whose label the model and the rule hold wrong with at least `confidence`, the surest
    first.

    Both are turned into odds on preferences of other prompts, so that what knows nothing is sure
    of nothing: from labels that are noise there are no suspects.
    """
    compared = [one.compared for one in judged]
    words = count_words(compared)
    if words is None:
        return []
    lengths = [len(c.chosen) - len(c.rejected) for c in compared]
    rule = log_odds(np.stack([words.margins(compared), np.asarray(lengths, float)], 1), words.fold)
    model = np.zeros(len(judged))
    for name in dict.fromkeys(one.set for one in judged):
        of = np.asarray([one.set == name for one in judged])
        margins = np.asarray([one.margin for one in judged])[of]
        model[of] = log_odds(margins[:, None], words.fold[of])
    least = math.log(confidence / (1 - confidence))
    found = [i for i in range(len(judged)) if -model[i] >= least and -rule[i] >= least]
    found.sort(key=lambda i: model[i] + rule[i])
    return [
        Suspect(
            i,
            math.exp(-model[i]),
            math.exp(-rule[i]),
            tuple(words.against(i, compared[i])),
        )
        for i in found
    ]
