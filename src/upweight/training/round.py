"""A round of answers: what was drawn, what it was worth, and its Parquet file."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from upweight.errors import OutputError
from upweight.losses.advantages import stop_penalized
from upweight.stats import mean_interval, repeated, wilson_interval
from upweight.training.rundir import write_atomic
from upweight.types import Experience, Forest, Preference, ResponseId, RowId, Tree

ByResponse = dict[ResponseId, Float[Tensor, " tokens"]]


@dataclass(frozen=True)
class Spent:
    """What it took: prompts that were asked and answers that were drawn, each time, and tokens that
    went through a model, each time that they did."""

    asked: int = 0
    drawn: int = 0
    computed: int = 0

    def plus(self, other: Spent) -> Spent:
        return Spent(
            self.asked + other.asked, self.drawn + other.drawn, self.computed + other.computed
        )


@dataclass(frozen=True)
class Round:
    """What was drawn, by response; `beta` is the weight of the KL term that it was made with, and
    `stop_penalty` what answers that do not stop by themselves pay. `spent` is what it took, with
    the rounds before it in which there was nothing to learn from. `drawn` are the prompts with all
    of their answers where `trees` has but some of them, `prompt_texts` and `texts` what prompts and
    answers say: these are for whoever reads the round's file (docs/rollouts.md), and are not read
    back from it."""

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
    stop_penalty: float = 0.0
    spent: Spent = Spent()
    drawn: tuple[Tree, ...] = ()
    texts: Mapping[ResponseId, str] = field(default_factory=dict[ResponseId, str])
    prompt_texts: Mapping[RowId, str] = field(default_factory=dict[RowId, str])

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
    def compared(self) -> dict[ResponseId, float]:
        """What the answers that are learned from are compared by: their scores, lower by the
        penalty where they do not stop by themselves."""
        ids = [i for tree in self.trees for i in tree.ids]
        compared = stop_penalized(
            torch.tensor([self.scores[i] for i in ids], dtype=torch.float32),
            torch.tensor([stop for tree in self.trees for stop in tree.stopped], dtype=torch.bool),
            penalty=self.stop_penalty,
        )
        return dict(zip(ids, compared.tolist(), strict=True))

    @property
    def tied(self) -> float | None:
        """The share of prompts whose answers all earn the same, so that no reward tells them
        apart; None where a prompt has one answer, or pairs are what is learned from. Values compare
        answers to different prompts too: there it is 1 where all of the round earn the same, and
        else 0."""
        groups = [tree.ids for tree in self.trees if not tree.preferences]
        if self.values is not None:
            groups = [tuple(self.logps)]
        groups = [ids for ids in groups if len(ids) > 1]
        compared = self.compared
        same = [len({compared[i] for i in ids}) == 1 for ids in groups]
        return sum(same) / len(same) if same else None

    @property
    def entropy(self) -> float:
        """Nats a token: the mean of -log pi over the tokens that the policy drew, an unbiased
        estimate of the entropy of what it drew them from."""
        drawn = torch.cat(list(self.logps.values()))
        return -drawn.double().mean().item()

    @property
    def explained_variance(self) -> float | None:
        """1 - var(returns - values) / var(returns) over all tokens: 1 for values that foresee what
        is earned, 0 for those that know no more than the mean, below for worse ones. None without
        values, or where all returns are equal."""
        if self.values is None or self.returns is None:
            return None
        values, returns = (
            torch.cat([known[i] for i in self.logps]).double()
            for known in (self.values, self.returns)
        )
        spread = returns.var(correction=0).item()
        if not spread > 0:
            return None
        return 1 - (returns - values).var(correction=0).item() / spread

    @cached_property
    def means(self) -> dict[str, float]:
        """What the whole round was like, by the names of metrics.jsonl, with 95 % intervals of what
        the watch looks at where there are prompts enough for one."""
        prompts = [i.row for i in self.logps]
        gaps = [float((self.logps[i] - self.reference_logps[i]).sum()) for i in self.logps]
        said = [
            (i.row, repeated(r))
            for t in self.trees
            for i, r in zip(t.ids, t.responses, strict=True)
        ]
        stopped = self.num_stopped / len(prompts)
        found = {
            "kl": mean_interval(gaps, prompts),
            "length": mean_interval([len(logps) for logps in self.logps.values()], prompts),
            # Answers to one prompt end alike: each prompt counts once.
            "stopped": wilson_interval(stopped, len(set(prompts))),
            "repetition": mean_interval([share for _, share in said], [row for row, _ in said]),
        }
        ends = {
            f"{name}_{end}": value
            for name, interval in found.items()
            for end, value in (("low", interval.low), ("high", interval.high))
            if math.isfinite(value)
        }
        scores, lengths = list(self.scores.values()), [len(x) for x in self.logps.values()]
        known = {
            "reward_std": statistics.stdev(scores) if len(scores) > 1 else None,
            "tied": self.tied,
            "explained_variance": self.explained_variance,
        }
        return {
            "reward": sum(scores) / len(scores),
            "beta": self.beta,
            "entropy": self.entropy,
            "length/min": float(min(lengths)),
            "length/max": float(max(lengths)),
            **{name: value for name, value in known.items() if value is not None},
            **{name: interval.value for name, interval in found.items()},
            **ends,
        }


_LISTS = ("logps", "reference_logps", "advantages", "values", "returns")
SCHEMA = pa.schema(
    [("source", pa.string()), ("line", pa.int64()), ("index", pa.int64()), ("score", pa.float64())]
    + [("tree", pa.int64()), ("chosen", pa.bool_()), ("rejected", pa.bool_())]
    + [("stopped", pa.bool_()), ("beta", pa.float64()), ("num_stopped", pa.int64())]
    + [("stop_penalty", pa.float64())]
    + [(name, pa.int64()) for name in asdict(Spent())]
    + [("prompt", pa.list_(pa.int32())), ("response", pa.list_(pa.int32()))]
    + [("prompt_text", pa.string()), ("text", pa.string())]
    + [(name, pa.list_(pa.float32())) for name in _LISTS]
)
"""One row for each response: docs/rollouts.md."""


def round_file(folder: Path, number: int) -> Path:
    return folder / f"round-{number:06d}.parquet"


def write_round(folder: Path, made: Round) -> None:
    places = _places(made.trees)
    said = _places(made.drawn or made.trees)
    rows: list[dict[str, object]] = []
    for name, score in made.scores.items():
        row: dict[str, object] = {
            "source": name.row.source,
            "line": name.row.line,
            "index": name.index,
            "score": score,
            "prompt_text": made.prompt_texts.get(name.row),
            "text": made.texts.get(name),
            "beta": made.beta,
            "num_stopped": made.num_stopped,
            "stop_penalty": made.stop_penalty,
            **asdict(made.spent),
        }
        for key in _LISTS:
            known: ByResponse | None = getattr(made, key)
            row[key] = None if known is None else known[name].tolist()
        _, k, tree = said[name]
        row |= {
            "stopped": tree.stopped[k],
            "prompt": tree.prompt,
            "response": tree.responses[k],
        }
        if name in places:
            number, k, tree = places[name]
            row |= {
                "tree": number,
                "chosen": any(p.chosen == k for p in tree.preferences),
                "rejected": any(p.rejected == k for p in tree.preferences),
            }
        rows.append(row)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), sink, compression="zstd")
    folder.mkdir(exist_ok=True)
    write_atomic(round_file(folder, made.number), sink.getvalue().to_pybytes())


def _places(trees: Sequence[Tree]) -> dict[ResponseId, tuple[int, int, Tree]]:
    """Of each answer its tree's number, its own in the tree, and the tree."""
    return {
        name: (number, k, tree)
        for number, tree in enumerate(trees)
        for k, name in enumerate(tree.ids)
    }


def read_round(folder: Path, number: int) -> Round:
    """A round as `write_round` wrote it, to the last bit. Raises OutputError without its file."""
    file = round_file(folder, number)
    try:
        rows = pq.read_table(file, schema=SCHEMA).to_pylist()
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
        stop_penalty=rows[0]["stop_penalty"] or 0.0,
        spent=_spent(rows),
        scores=scores,
        logps=known["logps"],
        reference_logps=known["reference_logps"],
        advantages=known["advantages"],
        values=known["values"] or None,
        returns=known["returns"] or None,
    )


def spent_on(folder: Path) -> Spent:
    """What all the rounds of a run took, by their files."""
    columns, found = ["source", "line", *asdict(Spent())], Spent()
    for file in folder.glob("round-*.parquet"):
        rows = pq.read_table(file, schema=SCHEMA, columns=columns).to_pylist()
        found = found.plus(_spent(rows))
    return found


def _spent(rows: Sequence[Mapping[str, Any]]) -> Spent:
    """Of a file that does not say what was asked, its own rows are counted."""
    first, prompts = rows[0], {(row["source"], row["line"]) for row in rows}
    if first["asked"] is None:
        return Spent(len(prompts), len(rows), first["computed"] or 0)
    return Spent(first["asked"], first["drawn"], first["computed"])


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
