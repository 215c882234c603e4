"""Prompts -> K answers of the policy -> rewards -> advantages, a round at a time; what fit() eats.

A round is drawn from the policy as it is, learned from for a few steps, and kept as a Parquet file
(rollouts/round-000001.parquet), so that a run that is resumed in its middle goes on with it and a
person can read what was said and what it was worth.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from upweight.data.preferences import preferences_from_scores
from upweight.data.stream import epoch_order
from upweight.losses.advantages import (
    GROUP_ADVANTAGES,
    generalized_advantages,
    next_kl_coefficient,
    penalized_rewards,
    whiten,
)
from upweight.losses.policy import KL_ESTIMATORS
from upweight.models.load import LanguageModel
from upweight.models.reading import read_trees
from upweight.models.sample import Sample, sample, sample_trees
from upweight.models.served import Server, sample_by
from upweight.training.round import ByResponse, Round, read_round, write_round
from upweight.types import Forest, Preference, ResponseId, Tree


@dataclass(frozen=True)
class Sizes:
    """How many prompts, answers and updates a round has. An answer has at most `max_tokens`, and
    together with its prompt `max_length`."""

    prompts: int
    responses: int
    max_tokens: int
    max_length: int | None
    passes: int
    minibatches: int
    seed: int

    @property
    def steps(self) -> int:
        return self.passes * self.minibatches

    def room(self, prompt: Tree) -> int:
        """The tokens that an answer to the prompt may have."""
        if self.max_length is None:
            return self.max_tokens
        return min(self.max_tokens, self.max_length - len(prompt.prompt))


@dataclass(frozen=True)
class Credit:
    """How rewards become advantages: by a prompt's group, or with `trace` by values (PPO).

    `kl` is the estimator that is taken from the reward, None where it stands in the loss.
    """

    group: str | None
    kl: str | None
    discount: float = 1.0
    trace: float = 0.95
    whiten: bool = True


def num_rounds(num_prompts: int, prompts_per_round: int, epochs: float) -> int:
    """Rounds in which every prompt is asked `epochs` times, the last round whole; one at least."""
    return max(1, math.ceil(num_prompts / prompts_per_round * epochs - 1e-9))


def by_response(
    read: Callable[[Forest], Float[Tensor, "scored ..."]],
    trees: Sequence[Tree],
    tokens_per_bin: int,
    on_smaller: Callable[[int], None] = lambda tokens_per_bin: None,
) -> dict[ResponseId, Float[Tensor, "tokens ..."]]:
    """What `read` says of each response's tokens, without gradients, on the CPU; `on_smaller` is
    told of bins that did not fit into memory and were halved."""
    found: ByResponse = {}
    with torch.no_grad():
        for forest, said in read_trees(read, trees, tokens_per_bin, on_smaller):
            pieces = said.float().cpu().split(forest.tokens_per_response.tolist())
            ids = (i for tree in forest.trees for i in tree.ids)
            found |= zip(ids, pieces, strict=True)
    # Not in the bins' order, which the round's file would not keep.
    return {i: found[i] for tree in trees for i in tree.ids}


def draw_answers(
    lm: LanguageModel,
    prompts: Sequence[Tree],
    number: int,
    sizes: Sizes,
    stop_ids: Sequence[int],
    server: Server | None = None,
) -> tuple[list[Tree], dict[ResponseId, tuple[float, ...]]]:
    """K answers to each prompt at temperature 1, as trees, and the sampler's own log-probs.

    At temperature 1 and from the whole distribution: what is drawn otherwise is not the policy's.
    Those of a server are drawn by random numbers of its own.
    """
    draw = (
        functools.partial(sample, lm, seed=sizes.seed * 1_000_003 + number)
        if server is None
        else functools.partial(sample_by, server, lm)
    )
    drawn = draw(
        [tree.prompt for tree in prompts],
        num=sizes.responses,
        max_new_tokens=sizes.max_tokens,
        stop_token_ids=stop_ids,
        max_length=sizes.max_length,
    )
    trees = [
        # A row may be drawn twice in a round: its answers are numbered on.
        replace(
            tree,
            ids=tuple(
                ResponseId(prompt.ids[0].row, slot * sizes.responses + k)
                for k in range(sizes.responses)
            ),
        )
        for slot, (prompt, tree) in enumerate(
            zip(prompts, sample_trees([p.prompt for p in prompts], drawn), strict=True)
        )
    ]
    said = {
        i: s.logps
        for tree, answers in zip(trees, drawn, strict=True)
        for i, s in zip(tree.ids, answers, strict=True)
    }
    return trees, said


def credited(found: Round, credit: Credit) -> Round:
    """The round with its advantages, and returns where it has values."""
    ids = list(found.logps)
    compared = found.compared
    scores = torch.tensor([compared[i] for i in ids])
    lengths = torch.tensor([len(found.logps[i]) for i in ids])
    logps, reference = (
        torch.cat([known[i] for i in ids]) for known in (found.logps, found.reference_logps)
    )
    kl = torch.zeros_like(logps)
    if credit.kl is not None:
        kl = KL_ESTIMATORS[credit.kl](logps, reference)

    def pieces(flat: Tensor) -> ByResponse:
        return dict(zip(ids, flat.split(lengths.tolist()), strict=True))

    if found.values is not None:
        values = torch.cat([found.values[i] for i in ids])
        rewards = penalized_rewards(scores, kl, lengths, beta=found.beta)
        advantages, returns = generalized_advantages(
            rewards, values, lengths, gamma=credit.discount, lam=credit.trace
        )
        advantages = whiten(advantages) if credit.whiten else advantages
        return replace(found, advantages=pieces(advantages), returns=pieces(returns))
    assert credit.group is not None
    number = {i: n for n, tree in enumerate(found.trees) for i in tree.ids}
    of_response = torch.arange(len(ids)).repeat_interleave(lengths)
    penalty = torch.zeros(len(ids)).index_add(0, of_response, kl)
    group = torch.tensor([number[i] for i in ids])
    each = GROUP_ADVANTAGES[credit.group](scores, group, found.beta * penalty)
    return replace(found, advantages=pieces(each.repeat_interleave(lengths)))


def ranked(found: Round) -> Round:
    """The round with the best answer of each prompt preferred to the worst, and no others; prompts
    whose answers all score the same are left out."""
    compared = found.compared
    trees: list[Tree] = []
    for tree in found.trees:
        scores = [compared[i] for i in tree.ids]
        for p in preferences_from_scores(scores, "extremes"):
            pick = (p.chosen, p.rejected)
            trees.append(
                Tree(
                    prompt=tree.prompt,
                    responses=tuple(tree.responses[k] for k in pick),
                    preferences=(Preference(0, 1),),
                    ids=tuple(tree.ids[k] for k in pick),
                    stopped=tuple(tree.stopped[k] for k in pick),
                )
            )
    return replace(found, trees=tuple(trees), drawn=found.trees)


@dataclass
class Rollouts:
    """The rounds of a run: the one that is learned from, made anew when its steps are done.

    `make(asked, number, beta)` draws the round of that number, or one of the next; `asked` gives
    the prompts of a round. With `epochs` the run is done when the prompts were asked so often.
    """

    prompts: Sequence[Tree]
    sizes: Sizes
    folder: Path
    make: Callable[[Callable[[int], Sequence[Tree]], int, float], Round]
    beta: float
    kl_target: float | None = None
    kl_stop: float | None = None
    epochs: float | None = None
    round: Round | None = None
    begins: int = 0
    ends: int = 0

    def trees(self, step: int) -> list[Tree]:
        """The trees of a step: its share of the round's, in another order each pass."""
        if self.round is None or step >= self.ends:
            self._renew(step)
        made = self.now
        parts = self._parts(made)
        turn, part = divmod(step - self.begins, parts)
        order = epoch_order(len(made.trees), self.sizes.seed + made.number, turn)
        return [made.trees[i] for i in order[part::parts]]

    @property
    def now(self) -> Round:
        """The round that is learned from."""
        assert self.round is not None
        return self.round

    def _renew(self, step: int) -> None:
        if self.round is not None and self.kl_target is not None:
            self.beta = next_kl_coefficient(self.beta, self.round.kl, target=self.kl_target)
        number = 1 if self.round is None else self.round.number + 1
        made = self.make(self.asked, number, self.beta)
        write_round(self.folder, made)
        self.round, self.begins = made, step
        self.ends = step + self.sizes.passes * self._parts(made)

    def _parts(self, made: Round) -> int:
        return min(self.sizes.minibatches, len(made.trees))

    def asked(self, number: int) -> list[Tree]:
        """The prompts of a round (from 1): epoch after epoch, each in an order of its own."""
        total, first = len(self.prompts), (number - 1) * self.sizes.prompts
        orders: dict[int, list[int]] = {}
        found: list[Tree] = []
        for at in range(first, first + self.sizes.prompts):
            epoch = at // total
            if epoch not in orders:
                orders[epoch] = epoch_order(total, self.sizes.seed, epoch)
            found.append(self.prompts[orders[epoch][at % total]])
        return found

    def epoch(self, step: int) -> float:
        """How often the prompts were asked: those of the rounds before, and of this one the share
        of its steps that are taken, which are fewer where it ends early."""
        if self.round is None:
            return 0.0
        taken = (step - self.begins) / max(1, self.ends - self.begins)
        return (self.round.number - 1 + min(1.0, taken)) * self.sizes.prompts / len(self.prompts)

    def is_done(self, step: int) -> bool:
        """Whether after so many steps the round at hand is learned from, and no epoch is left."""
        if self.round is None or self.epochs is None or step < self.ends:
            return False
        rounds = num_rounds(len(self.prompts), self.sizes.prompts, self.epochs)
        return self.round.number >= rounds

    def after(self, record: Mapping[str, object]) -> None:
        """Ends the round's update where the policy has gone too far from what drew it."""
        moved = record.get("approx_kl")
        if self.kl_stop is not None and isinstance(moved, float) and moved > self.kl_stop:
            step = record["step"]
            assert isinstance(step, int)
            self.ends = min(self.ends, step)

    def position(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        number = 0 if self.round is None else self.round.number
        return {"round": number, "begins": self.begins, "ends": self.ends, "beta": self.beta}

    def go_back(self, where: Mapping[str, Any]) -> None:
        """To where `position` was. Raises OutputError where the round's file is gone."""
        self.begins, self.ends, self.beta = where["begins"], where["ends"], where["beta"]
        self.round = read_round(self.folder, where["round"]) if where["round"] else None


def texts_of(lm: LanguageModel, tree: Tree) -> list[str]:
    """The tree's answers as text, without their stop tokens."""
    from upweight.data.trees import text_after

    return [
        text_after(tree.prompt, response[:-1] if stopped else response, lm.tokenizer)
        for response, stopped in zip(tree.responses, tree.stopped, strict=True)
    ]


def as_tree(prompt: Tree, answers: Sequence[Sample]) -> Tree:
    """A prompt's tree with answers drawn for it."""
    (tree,) = sample_trees([prompt.prompt], [answers])
    return replace(tree, ids=tuple(ResponseId(prompt.ids[0].row, k) for k in range(len(answers))))
