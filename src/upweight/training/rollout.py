"""Prompts -> K answers of the policy -> rewards -> advantages, a round at a time; what fit() eats.

A round is drawn from the policy as it is, learned from for a few steps, and kept as a Parquet file
(rollouts/round-000001.parquet), so that a run that is resumed in its middle goes on with it and a
person can read what was said and what it was worth.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from upweight.data.pack import bins, collate
from upweight.data.preferences import preferences_from_scores
from upweight.data.stream import epoch_order
from upweight.errors import OutputError
from upweight.losses.advantages import (
    GROUP_ADVANTAGES,
    generalized_advantages,
    next_kl_coefficient,
    penalized_rewards,
    stop_penalized,
    whiten,
)
from upweight.losses.policy import KL_ESTIMATORS
from upweight.models.load import LanguageModel, evaluation_mode
from upweight.models.sample import Sample, sample, sample_trees
from upweight.training.rundir import write_atomic
from upweight.types import Experience, Forest, Preference, ResponseId, RowId, Tree

ByResponse = dict[ResponseId, Float[Tensor, " tokens"]]


@dataclass(frozen=True)
class Sizes:
    """How many prompts, answers and updates a round has."""

    prompts: int
    responses: int
    max_tokens: int
    passes: int
    minibatches: int
    seed: int

    @property
    def steps(self) -> int:
        return self.passes * self.minibatches


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
    stop_penalty: float = 0.0


@dataclass(frozen=True)
class Round:
    """What was drawn, by response; `beta` is the weight of the KL term that it was made with."""

    number: int
    beta: float
    trees: tuple[Tree, ...]
    num_stopped: int
    scores: Mapping[ResponseId, float]
    logps: ByResponse
    reference_logps: ByResponse
    advantages: ByResponse
    values: ByResponse | None = None
    returns: ByResponse | None = None

    def experience(self, forest: Forest) -> Experience:
        """What is known of the forest's tokens, in their order."""
        ids = [i for tree in forest.trees for i in tree.ids]

        def flat(known: ByResponse) -> Tensor:
            return torch.cat([known[i] for i in ids])

        return Experience(
            logps=flat(self.logps),
            reference_logps=flat(self.reference_logps),
            advantages=flat(self.advantages),
            values=None if self.values is None else flat(self.values),
            returns=None if self.returns is None else flat(self.returns),
        )

    @property
    def kl(self) -> float:
        """Sampled KL(policy, reference) in nats a response, of the policy that drew the round."""
        gaps = [float((self.logps[i] - self.reference_logps[i]).sum()) for i in self.logps]
        return sum(gaps) / len(gaps)

    @property
    def means(self) -> dict[str, float]:
        """What the whole round was like, by the names of metrics.jsonl."""
        lengths = [len(logps) for logps in self.logps.values()]
        return {
            "reward": sum(self.scores.values()) / len(self.scores),
            "kl": self.kl,
            "length": sum(lengths) / len(lengths),
            "stopped": self.num_stopped / len(lengths),
            "beta": self.beta,
        }


def by_response(
    read: Callable[[Forest], Float[Tensor, " scored"]], trees: Sequence[Tree], tokens_per_bin: int
) -> ByResponse:
    """What `read` says of each response's tokens, without gradients, on the CPU."""
    found: ByResponse = {}
    with torch.no_grad():
        for group in bins(list(trees), tokens_per_bin):
            forest = collate(group)
            pieces = read(forest).float().cpu().split(forest.tokens_per_response.tolist())
            ids = (i for tree in forest.trees for i in tree.ids)
            found |= zip(ids, pieces, strict=True)
    return found


def draw_answers(
    lm: LanguageModel,
    prompts: Sequence[Tree],
    number: int,
    sizes: Sizes,
    stop_ids: Sequence[int],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Tree], dict[ResponseId, tuple[float, ...] | None]]:
    """K answers to each prompt at temperature 1, as trees, and the sampler's own log-probs.

    At temperature 1 and from the whole distribution: what is drawn otherwise is not the policy's.
    """
    drawn = sample(
        lm,
        [tree.prompt for tree in prompts],
        num=sizes.responses,
        max_new_tokens=sizes.max_tokens,
        seed=sizes.seed * 1_000_003 + number,
        stop_token_ids=stop_ids,
        on_progress=on_progress,
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
    penalized = _penalized(found, credit.stop_penalty)
    scores = torch.tensor([penalized[i] for i in ids])
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
    each = GROUP_ADVANTAGES[credit.group](scores - found.beta * penalty, group)
    return replace(found, advantages=pieces(each.repeat_interleave(lengths)))


def _penalized(found: Round, penalty: float) -> dict[ResponseId, float]:
    """The scores, lower by `penalty` for answers that do not stop by themselves."""
    ids = [i for tree in found.trees for i in tree.ids]
    scores = stop_penalized(
        torch.tensor([found.scores[i] for i in ids]),
        torch.tensor([stops for tree in found.trees for stops in tree.stopped]),
        penalty=penalty,
    )
    return dict(zip(ids, scores.tolist(), strict=True))


def ranked(found: Round, stop_penalty: float = 0.0) -> Round:
    """The round with the best answer of each prompt preferred to the worst, and no others; prompts
    whose answers all score the same are left out."""
    penalized = _penalized(found, stop_penalty)
    trees: list[Tree] = []
    for tree in found.trees:
        scores = [penalized[i] for i in tree.ids]
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
    return replace(found, trees=tuple(trees))


@dataclass
class Rollouts:
    """The rounds of a run: the one that is learned from, made anew when its steps are done.

    `make(asked, number, beta)` draws the round of that number, or one of the next; `asked` gives
    the prompts of a round.
    """

    prompts: Sequence[Tree]
    sizes: Sizes
    folder: Path
    make: Callable[[Callable[[int], Sequence[Tree]], int, float], Round]
    beta: float
    kl_target: float | None = None
    kl_stop: float | None = None
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


_LISTS = ("logps", "reference_logps", "advantages", "values", "returns")
_SCHEMA = pa.schema(
    [("source", pa.string()), ("line", pa.int64()), ("index", pa.int64()), ("score", pa.float64())]
    + [("tree", pa.int64()), ("chosen", pa.bool_()), ("rejected", pa.bool_())]
    + [("stopped", pa.bool_()), ("beta", pa.float64()), ("num_stopped", pa.int64())]
    + [("prompt", pa.list_(pa.int32())), ("response", pa.list_(pa.int32()))]
    + [(name, pa.list_(pa.float32())) for name in _LISTS]
)
"""One row for each response; `tree` is null for those that are not learned from."""


def round_file(folder: Path, number: int) -> Path:
    return folder / f"round-{number:06d}.parquet"


def write_round(folder: Path, made: Round) -> None:
    places = {
        name: (number, k, tree)
        for number, tree in enumerate(made.trees)
        for k, name in enumerate(tree.ids)
    }
    rows: list[dict[str, object]] = []
    for name, score in made.scores.items():
        row: dict[str, object] = {
            "source": name.row.source,
            "line": name.row.line,
            "index": name.index,
            "score": score,
            "beta": made.beta,
            "num_stopped": made.num_stopped,
        }
        for key in _LISTS:
            known: ByResponse | None = getattr(made, key)
            row[key] = None if known is None else known[name].tolist()
        if name in places:
            number, k, tree = places[name]
            row |= {
                "tree": number,
                "stopped": tree.stopped[k],
                "prompt": tree.prompt,
                "response": tree.responses[k],
                "chosen": any(p.chosen == k for p in tree.preferences),
                "rejected": any(p.rejected == k for p in tree.preferences),
            }
        rows.append(row)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), sink, compression="zstd")
    folder.mkdir(exist_ok=True)
    write_atomic(round_file(folder, made.number), sink.getvalue().to_pybytes())


def read_round(folder: Path, number: int) -> Round:
    """A round as `write_round` wrote it, to the last bit. Raises OutputError without its file."""
    file = round_file(folder, number)
    try:
        rows = pq.read_table(file, schema=_SCHEMA).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise OutputError(
            f"{file} cannot be read ({next(iter(str(error).splitlines()), '')}), and the run "
            "stopped in the middle of learning from it. Put it back, or start a new run with "
            "another out."
        ) from None
    known: dict[str, ByResponse] = {key: {} for key in _LISTS}
    scores: dict[ResponseId, float] = {}
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        name = _name(row)
        scores[name] = row["score"]
        for key in _LISTS:
            if row[key] is not None:
                known[key][name] = torch.tensor(row[key], dtype=torch.float32)
        if row["tree"] is not None:
            groups.setdefault(row["tree"], []).append(row)
    return Round(
        number=number,
        beta=rows[0]["beta"],
        trees=tuple(_read_tree(group) for _, group in sorted(groups.items())),
        num_stopped=rows[0]["num_stopped"],
        scores=scores,
        logps=known["logps"],
        reference_logps=known["reference_logps"],
        advantages=known["advantages"],
        values=known["values"] or None,
        returns=known["returns"] or None,
    )


def _name(row: Mapping[str, Any]) -> ResponseId:
    return ResponseId(RowId(row["source"], row["line"]), row["index"])


def _read_tree(group: list[dict[str, Any]]) -> Tree:
    # A tree of a preference has the chosen response first, whatever their order when drawn.
    group = sorted(group, key=lambda row: row["rejected"])
    return Tree(
        prompt=tuple(group[0]["prompt"]),
        responses=tuple(tuple(row["response"]) for row in group),
        preferences=(Preference(0, 1),) if group[0]["chosen"] else (),
        ids=tuple(map(_name, group)),
        stopped=tuple(row["stopped"] for row in group),
    )


@dataclass
class Frozen:
    """The weights that are trained, as they were: a reference that costs one copy of them."""

    weights: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    @staticmethod
    def of(lm: LanguageModel) -> Frozen:
        named = lm.model.named_parameters()
        return Frozen({name: p.detach().clone() for name, p in named if p.requires_grad})

    @property
    def num_bytes(self) -> int:
        return sum(kept.nbytes for kept in self.weights.values())

    @contextlib.contextmanager
    def in_place(self, lm: LanguageModel) -> Generator[LanguageModel]:
        """`lm` with these weights, for as long as the block runs."""
        parameters = dict(lm.model.named_parameters())
        present = {name: parameters[name].data for name in self.weights}
        try:
            for name, kept in self.weights.items():
                parameters[name].data = kept
            with evaluation_mode(lm):
                yield lm
        finally:
            for name, weights in present.items():
                parameters[name].data = weights


def largest_gap(found: ByResponse, said: Mapping[ResponseId, tuple[float, ...] | None]) -> float:
    """Between the trainer's log-probs and the sampler's own: the mean over all tokens, in nats."""
    gaps = [
        (found[i].double() - torch.tensor(logps, dtype=torch.float64)).abs()
        for i, logps in said.items()
        if logps is not None
    ]
    return float(torch.cat(gaps).mean()) if gaps else 0.0


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
