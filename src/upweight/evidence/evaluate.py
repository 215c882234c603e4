"""What a model does on preferences and prompts it was not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from upweight.data.trees import text_after
from upweight.evidence.records.ledger import SCHEMA
from upweight.models.finite import finite
from upweight.models.load import LanguageModel, evaluation_mode
from upweight.models.logprobs import response_logps, token_logps
from upweight.models.reading import read_trees
from upweight.models.reference import Reference
from upweight.models.sample import Sample, sample, sample_trees, tree_logps
from upweight.models.scalar import tree_scores
from upweight.stats import accuracy_interval, mean_interval, repeated, wilson_interval
from upweight.types import Forest, PairLogps, Tree

Row = dict[str, Any]

SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Losses:
    """The loss of each preference times its weight, or of each response summed over its tokens; the
    weight or the number of tokens; and the prompt it belongs to."""

    sums: Sequence[float]
    sizes: Sequence[float | int]
    prompts: Sequence[Hashable]

    @property
    def mean(self) -> float:
        return math.fsum(self.sums) / math.fsum(self.sizes)

    def since(self, first: Sequence[float]) -> Row:
        """By how much the mean has changed since the sums were `first`, and its 95 % interval where
        there are prompts enough for one."""
        change = [now - then for now, then in zip(self.sums, first, strict=True)]
        found = mean_interval(change, self.prompts, sizes=self.sizes)
        ends = {"loss_change_low": found.low, "loss_change_high": found.high}
        known = {name: end for name, end in ends.items() if math.isfinite(end)}
        return {"loss_change": found.value, **known}


def score_trees(
    lm: LanguageModel | None,
    trees: Sequence[Tree],
    reference: Reference | None,
    beta: float,
    tokens_per_bin: int,
    on_smaller: Callable[[int], None] = lambda tokens_per_bin: None,
) -> list[Row]:
    """One row per preference, in the trees' order: the keys of `upweight score`, in nats.

    Without a reference the ref_ and reward fields and the margin are None. Without `lm` the policy
    is the reference, as it is before step 1: computed anew in bf16 and packed otherwise it would
    differ by tenths of a nat, and the signs of such margins are noise. `on_smaller` is told of bins
    that had to be halved.
    """
    if lm is None:
        assert reference is not None
        return _score(read_trees(reference.logps, trees, tokens_per_bin), trees, reference, beta)
    with evaluation_mode(lm), torch.no_grad():
        asked = finite(token_logps, lm)
        found = read_trees(asked, trees, tokens_per_bin, on_smaller)
        return _score(found, trees, reference, beta)


def _score(
    read: Iterable[tuple[Forest, Tensor]],
    trees: Sequence[Tree],
    reference: Reference | None,
    beta: float,
) -> list[Row]:
    where = {id(tree): i for i, tree in enumerate(trees)}
    found: list[list[Row]] = [[] for _ in trees]
    for forest, logps in read:
        policy = response_logps(logps, forest).double().tolist()
        ref = (
            response_logps(reference.logps(forest), forest).double().tolist()
            if reference is not None
            else None
        )
        first = 0
        for tree in forest.trees:
            for p in tree.preferences:
                c, r = first + p.chosen, first + p.rejected
                found[where[id(tree)]].append(
                    _row(tree, p.chosen, p.rejected, c, r, policy, ref, beta)
                )
            first += len(tree.responses)
    return [row for rows in found for row in rows]


def _row(
    tree: Tree,
    chosen: int,
    rejected: int,
    c: int,
    r: int,
    policy: Sequence[float],
    ref: Sequence[float] | None,
    beta: float,
) -> Row:
    reward_chosen = None if ref is None else beta * (policy[c] - ref[c])
    reward_rejected = None if ref is None else beta * (policy[r] - ref[r])
    margin = None
    if reward_chosen is not None and reward_rejected is not None:
        margin = reward_chosen - reward_rejected
    return {
        "row": str(tree.ids[chosen].row),
        "chosen": tree.ids[chosen].index,
        "rejected": tree.ids[rejected].index,
        "logp_chosen": policy[c],
        "logp_rejected": policy[r],
        "ref_logp_chosen": None if ref is None else ref[c],
        "ref_logp_rejected": None if ref is None else ref[r],
        "reward_chosen": reward_chosen,
        "reward_rejected": reward_rejected,
        "margin": margin,
        "tokens_chosen": len(tree.responses[chosen]),
        "tokens_rejected": len(tree.responses[rejected]),
    }


def rank_trees(
    lm: LanguageModel,
    trees: Sequence[Tree],
    tokens_per_bin: int,
    on_smaller: Callable[[int], None] = lambda tokens_per_bin: None,
) -> list[Row]:
    """One row per preference, in the trees' order: the keys of `upweight score` of a reward model,
    whose scores have no unit."""
    return [
        {
            "row": str(tree.ids[p.chosen].row),
            "chosen": tree.ids[p.chosen].index,
            "rejected": tree.ids[p.rejected].index,
            "score_chosen": scores[p.chosen],
            "score_rejected": scores[p.rejected],
            "margin": scores[p.chosen] - scores[p.rejected],
            "tokens_chosen": len(tree.responses[p.chosen]),
            "tokens_rejected": len(tree.responses[p.rejected]),
        }
        for tree, scores in zip(
            trees, tree_scores(lm, trees, tokens_per_bin, on_smaller), strict=True
        )
        for p in tree.preferences
    ]


def higher(rows: Sequence[Row], trees: Sequence[Tree]) -> str:
    """In how many of the preferences the chosen response is worth more, with the share's 95 %
    interval, as a sentence that says by what.

    By the implicit reward, without a reference by the log-prob, of a reward model by its score.
    """
    first = rows[0]
    by = "score" if "score_chosen" in first else "logp" if first["margin"] is None else "reward"
    margins = [row[f"{by}_chosen"] - row[f"{by}_rejected"] for row in rows]
    prompts = _prompts(trees)
    found, ties = accuracy_interval(margins, prompts), sum(margin == 0 for margin in margins)
    num_prompts = len(set(prompts))
    return (
        f"chosen above rejected by {_MEASURES[by]}: {found.value:.1%} "
        f"[{100 * found.low:.1f}, {100 * found.high:.1f}], "
        f"{sum(margin > 0 for margin in margins):,} of {len(rows):,} preferences"
        + (f" and {ties:,} ties, which count half," if ties else "")
        + f" of {num_prompts:,} prompt{'' if num_prompts == 1 else 's'}"
    )


_MEASURES = {
    "reward": "implicit reward",
    "logp": "log-prob (without a reference)",
    "score": "the reward model's score",
}


def summary(
    rows: Sequence[Row], trees: Sequence[Tree], beta: float, loss: Callable[[PairLogps], Tensor]
) -> tuple[Row, Losses]:
    """The means of scored rows by the names of metrics.jsonl; accuracy with its 95 % interval.

    `rows` are those of the trees' preferences, in their order. `loss` is that of training, and
    weights count as there.
    """

    def mean(values: list[float]) -> float:
        return math.fsum(values) / len(values)

    margins = [row["margin"] for row in rows]
    accuracy = accuracy_interval(margins, _prompts(trees))
    weighted = _weighted(loss(_logps(rows, trees)), trees)
    record: Row = {"loss": weighted.mean, "num_pairs": len(rows)}
    for side in SIDES:
        rewards = mean([row[f"reward_{side}"] for row in rows])
        record[f"rewards/{side}"] = rewards
        record[f"logps/{side}"] = mean([row[f"logp_{side}"] for row in rows])
        record[f"logratios/{side}"] = rewards / beta
        record[f"tokens/{side}"] = mean([float(row[f"tokens_{side}"]) for row in rows])
    record["rewards/margins"] = mean(margins)
    record["rewards/spread"] = mean([abs(margin) for margin in margins])
    record["rewards/accuracies"] = accuracy.value
    record["rewards/accuracies_low"], record["rewards/accuracies_high"] = (
        accuracy.low,
        accuracy.high,
    )
    return record, weighted


def likelihood(lm: LanguageModel, trees: Sequence[Tree], tokens_per_bin: int) -> tuple[Row, Losses]:
    """-log p of the responses' tokens in nats: the mean over all tokens, as in training."""
    flat = [logp for logps in tree_logps(lm, trees, tokens_per_bin) for logp in logps]
    lengths = [len(response) for tree in trees for response in tree.responses]
    prompts = [tree.prompt for tree in trees for _ in tree.responses]
    losses = Losses([-logp for logp in flat], lengths, prompts)
    record = {
        "loss": losses.mean,
        "num_responses": len(flat),
        "logps/response": math.fsum(flat) / len(flat),
        "tokens/response": sum(lengths) / len(lengths),
    }
    return record, losses


def ranking(
    lm: LanguageModel,
    trees: Sequence[Tree],
    tokens_per_bin: int,
    loss: Callable[..., Tensor],
    margin: float | int = 0.0,
) -> tuple[Row, Losses]:
    """How a reward model ranks preferences: accuracy with its 95 % interval, scores, margins.

    `loss` and `margin` are those of training (objectives.reward), and weights count as there.
    """
    rows = rank_trees(lm, trees, tokens_per_bin)
    chosen, rejected = (
        torch.tensor([row[f"score_{side}"] for row in rows], dtype=torch.float64) for side in SIDES
    )
    asked, flipped = margin * _of_each(trees, "margin"), 1 - _of_each(trees, "probability")
    losses = _weighted(loss(chosen, rejected, margin=asked, flipped=flipped), trees)
    margins = [row["margin"] for row in rows]
    accuracy = accuracy_interval(margins, _prompts(trees))
    record = {
        "loss": losses.mean,
        "num_pairs": len(rows),
        "rewards/chosen": chosen.mean().item(),
        "rewards/rejected": rejected.mean().item(),
        "rewards/margins": math.fsum(margins) / len(margins),
        "rewards/accuracies": accuracy.value,
        "rewards/accuracies_low": accuracy.low,
        "rewards/accuracies_high": accuracy.high,
    }
    return record, losses


def _prompts(trees: Sequence[Tree]) -> list[tuple[int, ...]]:
    """The prompt of each preference: preferences of one prompt are not independent."""
    return [tree.prompt for tree in trees for _ in tree.preferences]


def _logps(rows: Sequence[Row], trees: Sequence[Tree]) -> PairLogps:
    """What was scored as a pair loss sees it, in fp64."""
    names = ("logp_chosen", "logp_rejected", "ref_logp_chosen", "ref_logp_rejected")
    logps = (torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in names)
    tokens = (torch.tensor([row[f"tokens_{side}"] for row in rows]) for side in SIDES)
    return PairLogps(*logps, *tokens, flipped=1 - _of_each(trees, "probability"))


def _of_each(trees: Sequence[Tree], name: str) -> Tensor:
    """A property of every preference, in fp64."""
    values = [getattr(p, name) for tree in trees for p in tree.preferences]
    return torch.tensor(values, dtype=torch.float64)


def _weighted(losses: Tensor, trees: Sequence[Tree]) -> Losses:
    """Those of the trees' preferences, by their weights."""
    weights = _of_each(trees, "weight")
    return Losses((losses * weights).tolist(), weights.tolist(), _prompts(trees))


def ledger_table(rows: Sequence[Row]) -> pa.Table:  # pyright: ignore
    return pa.Table.from_pylist(list(rows), schema=SCHEMA)


def texts(tree: Tree, tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The text of each response by its index in its row, without the stop token."""
    found: dict[int, str] = {}
    for response, stopped, where in zip(tree.responses, tree.stopped, tree.ids, strict=True):
        body = response[:-1] if stopped else response
        found[where.index] = text_after(tree.prompt, body, tokenizer)
    return found


def draw(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    stop_token_ids: Collection[int] | None = None,
) -> list[Sample]:
    """One response to each prompt, as `sample` draws it."""
    drawn = sample(
        lm,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        stop_token_ids=stop_token_ids,
    )
    return [answers[0] for answers in drawn]


def sample_logps(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], samples: Sequence[Sample]
) -> list[float]:
    """log pi(y|x) of each sample under `lm`, in nats, at temperature 1."""
    trees = sample_trees(prompts, [[s] for s in samples])
    return [logps[0] for logps in tree_logps(lm, trees)]


def kl_record(policy_logps: Sequence[float], reference_logps: Sequence[float]) -> Row:
    """Sampled KL(policy, reference) in nats per response: the mean of log pi - log pi_ref over the
    policy's own samples (the k1 estimator, unbiased), with a 95 % bootstrap interval.

    A sample that was cut at max_new_tokens contributes what it has.
    """
    gaps = [p - r for p, r in zip(policy_logps, reference_logps, strict=True)]
    interval = mean_interval(gaps)
    return {"kl": interval.value, "kl_low": interval.low, "kl_high": interval.high}


def answers_record(policy: Sequence[Sample], reference: Sequence[Sample]) -> Row:
    """Length, repetition and the share that ended by itself, of what policy and reference said to
    the same prompts; 95 % intervals of the policy's (bootstrap; Wilson for the share).

    `length_ratio` is how many times as long the policy's answer to a prompt is as the reference's,
    in the geometric mean.
    """
    pairs = zip(policy, reference, strict=True)
    ratio = mean_interval([math.log(len(a.tokens) / len(b.tokens)) for a, b in pairs])
    repetition = mean_interval([repeated(s.tokens) for s in policy])
    stopped = wilson_interval(_mean([s.stopped for s in policy]), len(policy))
    return {
        "length": _mean([len(s.tokens) for s in policy]),
        "reference_length": _mean([len(s.tokens) for s in reference]),
        "length_ratio": math.exp(ratio.value),
        "length_ratio_low": math.exp(ratio.low),
        "length_ratio_high": math.exp(ratio.high),
        "repetition": repetition.value,
        "repetition_low": repetition.low,
        "repetition_high": repetition.high,
        "reference_repetition": _mean([repeated(s.tokens) for s in reference]),
        "stopped": stopped.value,
        "stopped_low": stopped.low,
        "stopped_high": stopped.high,
        "reference_stopped": _mean([s.stopped for s in reference]),
    }


def _mean(values: Sequence[float | int]) -> float:
    return sum(values) / len(values)


def sample_records(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    policy: Sequence[Sample],
    reference: Sequence[Sample],
    policy_logps: Sequence[float],
    reference_logps: Sequence[float],
) -> list[Row]:
    """Lines of samples.jsonl: what policy and reference say to the same prompts."""

    def text(prompt: Sequence[int], drawn: Sample) -> str:
        body = drawn.tokens[:-1] if drawn.stopped else drawn.tokens
        return text_after(tuple(prompt), body, lm.tokenizer)

    return [
        {
            "prompt": str(lm.tokenizer.decode(list(prompt), skip_special_tokens=False)),
            "policy": text(prompt, ours),
            "reference": text(prompt, theirs),
            "policy_tokens": len(ours.tokens),
            "reference_tokens": len(theirs.tokens),
            "policy_logp": logp,
            "policy_reference_logp": reference_logp,
        }
        for prompt, ours, theirs, logp, reference_logp in zip(
            prompts, policy, reference, policy_logps, reference_logps, strict=True
        )
    ]
