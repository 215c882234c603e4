"""What a run has shown so far, and what it was told: all that an observer looks at."""

from __future__ import annotations

import math
import re
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from statistics import fmean, geometric_mean

import torch
from torch import Tensor, nn

from upweight.config import Watch as Limits
from upweight.data.pack import collate
from upweight.models.load import LanguageModel, evaluation_mode
from upweight.models.logprobs import token_logps
from upweight.trust.watch.orders import Orders
from upweight.types import Preference, Tree

ELEMENTS = 256
"""Of each tensor that are looked at: enough to say whether it moves, and nothing beside a step."""

MOST = 0.5
"""Of a row's tokens: where so many have changed, none of a whole step's is no chance."""

RECENT = 8
"""Steps that a mean is taken over at least, and records at most: one step's pairs are few."""

LAYER = re.compile(r"\w+\.\d+(?=\.)")
"""The first part of a parameter's name that counts: layers.3, h.11, block.0."""

VALUES, HEAD = "value.", "value.head"
"""What the names of a value model's parameters begin with, and what is said of those that are in
none of its layers."""

FACTORS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))
"""What peft calls the two factors of an adapter."""

MOST_COMPARED = 1000
"""Preferences of which chosen and rejected are compared, once, when a cause is looked for."""

Record = Mapping[str, float]


@dataclass(frozen=True)
class Told:
    """What a run was told, from which a likely cause is read."""

    beta: float = 0.1
    total_steps: int | None = None
    trees: Sequence[Tree] = ()
    log_every: int = 1
    objective: str = "dpo"

    @property
    def imitates(self) -> bool:
        """Whether the run is meant to leave its start, for answers like its training responses."""
        return self.objective == "sft"

    @cached_property
    def alike(self) -> float:
        """The share of tokens that chosen and rejected have in common, on average."""
        pairs = [
            (t.responses[p.chosen], t.responses[p.rejected])
            for t, p in islice(self._preferences(), MOST_COMPARED)
        ]
        shares = [
            2 * (Counter(chosen) & Counter(rejected)).total() / (len(chosen) + len(rejected))
            for chosen, rejected in pairs
        ]
        return fmean(shares) if shares else 0.0

    @cached_property
    def lengths(self) -> tuple[int, int]:
        """Tokens of all chosen and of all rejected responses."""
        pairs = [(t.responses[p.chosen], t.responses[p.rejected]) for t, p in self._preferences()]
        return sum(len(c) for c, _ in pairs), sum(len(r) for _, r in pairs)

    @cached_property
    def length(self) -> float:
        """Tokens of a response, in the geometric mean: a few long ones are not what is usual."""
        lengths = [len(response) for tree in self.trees for response in tree.responses]
        return geometric_mean(lengths) if lengths else math.nan

    @cached_property
    def unstopped(self) -> float:
        """The share of preferred responses, without preferences of all, that lack their end."""
        ends = [t.stopped[p.chosen] for t, p in self._preferences()]
        ends = ends or [end for tree in self.trees for end in tree.stopped]
        return 1 - fmean(ends) if ends else 0.0

    def _preferences(self) -> Iterator[tuple[Tree, Preference]]:
        return ((tree, p) for tree in self.trees for p in tree.preferences)


@dataclass
class Seen:
    """`moved` is the share of the policy's weights that have moved since `start`, None before the
    first step; neither those of `still` count, the layers in which none has, nor those that cannot
    have moved. `still` has those of a value model too. `looks` is how often that was asked.
    `learns` says that some have, and `judged` that the layers were looked at too. `start` are some
    of the weights of `trained` as they were. `taught`: rewards have told answers apart, or the run
    has none that could. `first` is the first training record. `own` are the policy's log-probs of a
    row when they were asked for first."""

    lm: LanguageModel
    limits: Limits
    told: Told
    trained: nn.Module
    start: Mapping[str, Tensor]
    recent: deque[Record] = field(default_factory=lambda: deque[Record](maxlen=RECENT))
    orders: Orders = field(default_factory=Orders)
    moved: float | None = None
    looks: int = 0
    still: list[str] = field(default_factory=list[str])
    learns: bool = False
    judged: bool = False
    taught: bool = False
    first: Record | None = None
    own: Tensor | None = None

    def remember(self, record: Record) -> None:
        """What is kept of the whole run."""
        self.first = self.first or record
        self.taught |= _told_apart(record, self.first)

    def train(self, record: Record) -> None:
        self.remember(record)
        self.recent.append(record)
        if self.moved is None or not self.judged:
            now = some_weights(self.trained)
            self.moved, self.still = _share_moved(self.start, now)
            self.looks += 1

    def look_again(self) -> None:
        """Whether the weights move is asked anew, of the next step."""
        self.moved, self.start, self.looks = None, some_weights(self.trained), 0

    def says_something_else(self) -> bool:
        """Whether the policy gives most tokens of a row other log-probs than when this was asked
        first. An update can be too small for what a forward pass in bf16 holds."""
        if not self.told.trees:
            return False
        tree = min(self.told.trees[:MOST_COMPARED], key=lambda tree: tree.num_tokens)
        if not tree.responses:
            tree = replace(tree, responses=(tree.prompt,), stopped=(False,))
        with torch.no_grad(), evaluation_mode(self.lm):
            now = token_logps(self.lm, collate([tree])).cpu()
        if self.own is None:
            self.own = now
        return bool((now != self.own).float().mean() >= MOST)

    def mean(self, key: str) -> float:
        """Over the recent training records, each of which is a mean over `log_every` steps; nan
        where those are few, or one does not have it."""
        if len(self.recent) * self.told.log_every < RECENT:
            return math.nan
        return fmean(record.get(key, math.nan) for record in self.recent)


def some_weights(trained: nn.Module) -> dict[str, Tensor]:
    """Evenly spaced elements of every tensor that is trained."""
    return {
        name: p.detach().flatten()[:: max(1, p.numel() // ELEMENTS)].clone()
        for name, p in trained.named_parameters()
        if p.requires_grad
    }


def _told_apart(record: Record, first: Record) -> bool:
    """Whether rewards tell answers apart, or the run has none that could. Advantages do not say it:
    a KL term, or values that foresee nothing, give some to answers that all earn the same."""
    if "advantages/nonzero" not in record or record.get("tied") != 1:
        return True
    # Values compare the answers of one round with those of another.
    return "value_loss" in record and not math.isclose(
        record["reward"], first["reward"], rel_tol=1e-5
    )


def _share_moved(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> tuple[float, list[str]]:
    """The share of the policy's elements that have moved, and the layers of which none has, in
    their order.

    These do not count in the share: the more of them, the surer it is to be of the others. What is
    outside of layers is in no list: of an embedding, only rows whose tokens were met have
    gradients. Of a value model it is, as one, since its head is among it.
    """
    changed = {name: int((after[name] != values).sum()) for name, values in before.items()}
    by_layer: dict[str, int] = {}
    layers = {name: layer for name in before if (layer := _layer(name))}
    for name, layer in layers.items():
        by_layer[layer] = by_layer.get(layer, 0) + changed[name]
    still = [layer for layer, num in by_layer.items() if not num]
    counted = [
        name
        for name in before
        if layers.get(name) not in still and (changed[name] or not _is_held(name, before))
        if not name.startswith(VALUES)
    ]
    num = sum(before[name].numel() for name in counted)
    return sum(changed[name] for name in counted) / max(1, num), still


def _layer(name: str) -> str | None:
    found = LAYER.search(name)
    if not name.startswith(VALUES):
        return found.group() if found else None
    return VALUES + found.group() if found else HEAD


def _is_held(name: str, weights: Mapping[str, Tensor]) -> bool:
    """Whether it is the first factor of an adapter whose second is 0, as all are at first: the
    gradient of the one is the other's size."""
    for first, second in FACTORS:
        if first in name:
            return not weights[name.replace(first, second)].any()
    return False
