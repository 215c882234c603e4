"""Every evaluation set scored, a few answers sampled, and what was found written down."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from upweight.evidence import evaluate
from upweight.evidence.records.ledger import SCHEMA
from upweight.models.load import LanguageModel
from upweight.models.sample import Sample, tree_logps
from upweight.recipes.best import samples_are_the_policys
from upweight.recipes.kinds import KINDS, PROMPTS
from upweight.recipes.losses import pair_loss, score_loss
from upweight.recipes.reference import answered_sets, draw, same_reference, sampled_trees
from upweight.recipes.state import State, log, smaller_bins
from upweight.stats import mean_interval
from upweight.training.loop import Progress, Record
from upweight.training.records import append_jsonl, write_ledger
from upweight.training.rollout import as_tree
from upweight.types import Tree


def evaluate_sets(state: State, progress: Progress) -> bool:
    """Scores every set and samples answers; whether checkpoint.best is better than ever."""
    run, last = state.run, state.is_last(progress.step)
    sets = {n: trees for n, trees in state.begun.prepared.trees.items() if n != "train"}
    answered = answered_sets(run, state.begun.prepared)
    sampled = _sampled(state, answered) if answered else {}
    rows: list[evaluate.Row] = []
    improved = False
    for name, trees in sets.items():
        kind = KINDS[run.objective]
        measure = _answers if name == PROMPTS else MEASURES[kind.rows, kind.answers]
        measured, scored, losses = measure(state, progress, trees)
        record: Record = {
            "step": progress.step,
            "epoch": state.epoch(progress.step),
            "kind": "eval",
            "set": name,
            **measured,
            **_since_the_start(state, progress, name, losses),
        }
        if name in sampled:
            record |= _write_samples(state, progress, name, sampled[name])
        log(state, record)
        improved |= _note_best(state, progress, name, record)
        rows += [{"step": progress.step, "set": name, **row} for row in scored]
        if last and scored:
            _add_texts(state, trees, rows[len(rows) - len(scored) :])
    if rows:
        _append_ledger(state, rows)
    return improved


Measured = tuple[evaluate.Row, list[evaluate.Row], evaluate.Losses | None]
"""A set's record, its rows of the ledger, and its losses one by one, where it has any."""


def _preferences(state: State, progress: Progress, trees: Sequence[Tree]) -> Measured:
    run = state.run
    is_the_reference = progress.step == 0 and run.reference is None
    policy = None if is_the_reference else state.lm
    smaller = functools.partial(smaller_bins, state, f"the evaluation after step {progress.step}")
    scored = evaluate.score_trees(
        policy, trees, state.against.logps, run.loss.beta, state.tokens_per_bin, smaller
    )
    found, losses = evaluate.summary(scored, trees, run.loss.beta, pair_loss(run))
    return found, scored, losses


def _likelihood(state: State, progress: Progress, trees: Sequence[Tree]) -> Measured:
    found, losses = evaluate.likelihood(state.lm, trees, state.tokens_per_bin)
    return found, [], losses


def _ranking(state: State, progress: Progress, trees: Sequence[Tree]) -> Measured:
    loss, margin = score_loss(state.run), state.run.loss.margin
    found, losses = evaluate.ranking(state.lm, trees, state.tokens_per_bin, loss, margin)
    return found, [], losses


def _answers(state: State, progress: Progress, trees: Sequence[Tree]) -> Measured:
    """Prompts alone: all that there is to measure is what is sampled."""
    return {}, [], None


MEASURES: dict[tuple[str, bool], Callable[[State, Progress, Sequence[Tree]], Measured]] = {
    ("preferences", True): _preferences,
    ("preferences", False): _ranking,
    ("responses", True): _likelihood,
    ("prompts", True): _answers,
}
"""What is measured on a set, by what its rows are and whether the model answers."""


def _since_the_start(
    state: State, progress: Progress, name: str, losses: evaluate.Losses | None
) -> Record:
    """How the set's loss has changed. Preference by preference, or response by response: most of
    what a mean over few of them is uncertain by is in both."""
    if losses is None:
        return {}
    if progress.step == 0:
        state.first_losses[name] = list(losses.sums)
        return {}
    first = state.first_losses.get(name)
    return {} if first is None else losses.since(first)


def _note_best(state: State, progress: Progress, name: str, record: Record) -> bool:
    best = state.begun.best
    if best is None or name != best.set:
        return False
    value = record[best.metric]
    assert isinstance(value, float)
    if not best.improves(value, state.best):
        return False
    state.best, state.best_step = value, progress.step
    return True


@dataclass(frozen=True)
class _Sampled:
    """What the policy answers to a set's first prompts, and how likely that is, in nats."""

    prompts: Sequence[Sequence[int]]
    trees: Sequence[Tree]
    policy: Sequence[Sample]
    policy_logps: Sequence[float]
    reference_logps: Sequence[float]


def _sampled(state: State, sets: Mapping[str, Sequence[Tree]]) -> dict[str, _Sampled]:
    """By set. The reference is asked once for all sets: it may have to be read from disk."""
    stop_ids = state.begun.prepared.renderer.stop_ids
    asked = {name: sampled_trees(state.run, trees) for name, trees in sets.items()}
    prompts = {name: [tree.prompt for tree in trees] for name, trees in asked.items()}
    policy = {name: draw(state.run, state.lm, prompts[name], stop_ids) for name in sets}
    drawn = {name: _as_trees(asked[name], policy[name]) for name in sets}
    ours = {name: _logps(state.lm, drawn[name]) for name in sets}
    with same_reference(state.run, state.lm, state.against) as reference:
        theirs = {name: _logps(reference, drawn[name]) for name in sets}
    return {n: _Sampled(prompts[n], asked[n], policy[n], ours[n], theirs[n]) for n in sets}


def _as_trees(asked: Sequence[Tree], drawn: Sequence[Sample]) -> list[Tree]:
    """The prompts with an answer each, under the names of the prompts' rows."""
    return [as_tree(tree, [answer]) for tree, answer in zip(asked, drawn, strict=True)]


def _logps(lm: LanguageModel, trees: Sequence[Tree]) -> list[float]:
    return [logp for (logp,) in tree_logps(lm, trees)]


def _write_samples(state: State, progress: Progress, name: str, found: _Sampled) -> Record:
    """Answers of policy and reference side by side, to samples.jsonl; sampled KL and lengths."""
    answers = state.against.answers[name]
    for line in evaluate.sample_records(
        state.lm, found.prompts, found.policy, answers, found.policy_logps, found.reference_logps
    ):
        record = {"step": progress.step, "set": name, **line}
        append_jsonl(state.rundir.file("samples.jsonl"), record)
    kl = evaluate.kl_record(found.policy_logps, found.reference_logps)
    return {
        **(kl if samples_are_the_policys(state.run) else {}),
        **evaluate.answers_record(found.policy, answers),
        **_rewards(state, name, found.trees, found.policy, answers),
    }


def _rewards(
    state: State,
    name: str,
    asked: Sequence[Tree],
    policy: Sequence[Sample],
    reference: Sequence[Sample],
) -> Record:
    """The mean reward of the policy's answers and of the reference's, and how much more that is,
    with 95 % intervals. The reference's, which do not change, are scored once."""
    if state.judge is None:
        return {}
    judge = state.judge

    def rewards(drawn: Sequence[Sample]) -> list[float]:
        return [score for (score,) in judge(_as_trees(asked, drawn))]

    if name not in state.judged:
        state.judged[name] = rewards(reference)
    ours, theirs = rewards(policy), state.judged[name]
    found = mean_interval(ours)
    # Prompt by prompt: what both answer well or badly tells nothing about their difference.
    gain = mean_interval([a - b for a, b in zip(ours, theirs, strict=True)])
    return {
        "reward": found.value,
        "reward_low": found.low,
        "reward_high": found.high,
        "reference_reward": sum(theirs) / len(theirs),
        "reward_gain": gain.value,
        "reward_gain_low": gain.low,
        "reward_gain_high": gain.high,
    }


def _add_texts(state: State, trees: Sequence[Tree], rows: Sequence[evaluate.Row]) -> None:
    remaining = iter(rows)
    for tree in trees:
        texts = evaluate.texts(tree, state.lm.tokenizer)
        prompt = state.lm.tokenizer.decode(list(tree.prompt), skip_special_tokens=False)
        for _ in tree.preferences:
            row = next(remaining)
            row["prompt_text"] = prompt
            row["chosen_text"], row["rejected_text"] = texts[row["chosen"]], texts[row["rejected"]]


def _append_ledger(state: State, rows: Sequence[evaluate.Row]) -> None:
    path = state.rundir.file("ledger.parquet")
    table = evaluate.ledger_table(rows)
    if path.exists():
        table = pa.concat_tables([pq.read_table(path, schema=SCHEMA), table])
    write_ledger(path, table)
