"""What a run is measured against: the reference as numbers, and as a model where it is asked."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from upweight.config import Run
from upweight.data.pack import bins, collate
from upweight.data.stream import plan_epoch
from upweight.errors import DataError, Refusal
from upweight.evidence import evaluate
from upweight.models.adapter import adapter_off
from upweight.models.finite import finite
from upweight.models.load import (
    ForwardPlan,
    LanguageModel,
    bit_sums,
    evaluation_mode,
    fingerprint,
    load,
)
from upweight.models.logprobs import token_logps
from upweight.models.reference import Reference
from upweight.models.sample import Sample, sample
from upweight.recipes.exported import require_start_as_exported
from upweight.recipes.kinds import KINDS, PROMPTS
from upweight.recipes.prepare import Prepared, fill_reference
from upweight.recipes.screen import Screen
from upweight.stats import Interval
from upweight.training.rollout import as_tree
from upweight.trust.identity import PROBES
from upweight.trust.likely import own_nats, spread
from upweight.types import Tree

FEWEST_ROWS = 16
"""Of fewer, none right, the interval's upper end is near a quarter: swapped columns would not
show."""
PROBE_ROWS = 32
PROBE_TOKENS = 2048
PROBE_ANSWERS = 6
PROBE_LONGEST = 64
"""What `check` asks the reference about in each set: minutes of training are seconds here."""


DRAWN_TOKENS = 16
"""Of each answer that a run of rounds is held against its reference by."""


@dataclass(frozen=True)
class Against:
    """The reference's log-probs, how it runs forests, and its answers by evaluation set.

    `own` is the mean log-prob per token of its own answers, in nats; None where the rows are not
    compared with it. `model_fingerprint` is that of the policy at its start. `bit_sums` are those
    of the reference's weights where it stays in memory, under the policy's adapter. `probes` are
    answers of the policy's that a run of rounds is held against it by.
    """

    logps: Reference
    plan: ForwardPlan
    answers: Mapping[str, Sequence[Sample]]
    own: Interval | None
    model_fingerprint: str
    bit_sums: Mapping[str, int] | None = None
    probes: Sequence[Tree] = ()


@dataclass(frozen=True)
class Probed:
    """What `check` hears of the reference: answers by set, its log-probs of a few rows where the
    rows are held against it, else of `probes`, and `own` and `probes` as in Against."""

    answers: Mapping[str, Sequence[Sample]]
    logps: Reference
    own: Interval | None
    probes: Sequence[Tree]


def ask_reference(run: Run, lm: LanguageModel, prepared: Prepared, screen: Screen) -> Against:
    """Everything the reference has to say before step 1. `lm` is the policy at its start, with
    its adapter if it gets one; without a named reference it is the reference itself."""
    kind = KINDS[run.objective]
    trees = [t for name, found in prepared.trees.items() if name != PROMPTS for t in found]
    stop_ids = prepared.renderer.stop_ids
    if not kind.answers:
        start = fingerprint(lm)
        return Against(Reference(start, Path()), lm.plan, {}, None, start)
    probes = drawn_probes(run, lm, prepared)
    with _at_start(run, lm) as model, evaluation_mode(model):
        own = None
        if kind.by_reference:
            train = prepared.trees["train"]
            numbers = plan_epoch(train, run.batch.pairs_per_step, run.seed, 0)
            steps = [[train[i] for i in step] for step in numbers]
            logps = fill_reference(run, model, trees, screen, steps)
            own = own_nats(model, prepared.trees["train"], stop_ids, run.seed)
        else:
            logps = Reference(fingerprint(model), Path())
            _take(logps, model, probes)
        answers = {
            name: draw(run, model, sampled_prompts(run, found), stop_ids)
            for name, found in answered_sets(run, prepared).items()
        }
        plan = model.plan
        sums = bit_sums(model) if model is lm and lm.has_adapter else None
    start = logps.fingerprint if run.reference is None else fingerprint(lm)
    return Against(logps, plan, answers, own, start, sums, probes)


def probe_reference(run: Run, lm: LanguageModel, prepared: Prepared) -> Probed:
    """What the reference says of a few rows of each set, or where it is not asked about rows, of
    `drawn_probes`; and answers to a few of the prompts that it will be asked. Kept nowhere."""
    stop_ids = prepared.renderer.stop_ids
    logps, probes = Reference("", Path()), drawn_probes(run, lm, prepared)
    with _at_start(run, lm) as model, evaluation_mode(model):
        answers = {
            name: draw(run, model, sampled_prompts(run, trees)[:PROBE_ANSWERS], stop_ids)
            for name, trees in _briefly_answered(run, prepared).items()
        }
        if not KINDS[run.objective].by_reference:
            _take(logps, model, probes)
            return Probed(answers, logps, None, probes)
        for name, trees in prepared.trees.items():
            if name != PROMPTS:
                _take(logps, model, _probes(trees))
        own = own_nats(model, prepared.trees["train"], stop_ids, run.seed)
        return Probed(answers, logps, own, probes)


def _take(logps: Reference, model: LanguageModel, trees: Sequence[Tree]) -> None:
    for group in bins(trees, PROBE_TOKENS):
        forest = collate(group)
        with torch.no_grad():
            logps.take(forest, finite(token_logps, model)(forest))


def pulled_elsewhere(run: Run) -> bool:
    """Whether a run of rounds is pulled to a reference that was named: it may not be its start."""
    return KINDS[run.objective].draws and run.reference is not None and run.loss.beta > 0


def drawn_probes(run: Run, lm: LanguageModel, prepared: Prepared) -> list[Tree]:
    """The beginnings of the policy's answers to a few short prompts, where it is to be held against
    a reference and the rows have no responses."""
    if not pulled_elsewhere(run):
        return []
    asked = sorted(spread(prepared.trees["train"], 4 * PROBES), key=lambda tree: tree.num_tokens)
    asked = asked[:PROBES]
    with evaluation_mode(lm):
        drawn = sample(
            lm,
            [tree.prompt for tree in asked],
            max_new_tokens=DRAWN_TOKENS,
            seed=run.seed,
            stop_token_ids=prepared.renderer.stop_ids,
        )
    return [as_tree(tree, answers) for tree, answers in zip(asked, drawn, strict=True)]


def has_a_say(run: Run, prepared: Prepared) -> bool:
    """Whether `probe_reference` has anything to ask."""
    asked = KINDS[run.objective].by_reference or pulled_elsewhere(run)
    return asked or bool(_briefly_answered(run, prepared))


def _briefly_answered(run: Run, prepared: Prepared) -> dict[str, list[Tree]]:
    """None where answers may be long: whoever has raised evaluation.max_new_tokens waits for them
    in a run."""
    if run.evaluation.max_new_tokens > PROBE_LONGEST:
        return {}
    return answered_sets(run, prepared)


def _probes(trees: Sequence[Tree]) -> list[Tree]:
    """As many rows as have about PROBE_TOKENS, spread over the data. Where those are too few, short
    ones of as many prompts as it takes."""
    per_row = sum(tree.num_tokens for tree in trees) / len(trees)
    num = min(PROBE_ROWS, int(PROBE_TOKENS / per_row))
    if num >= FEWEST_ROWS:
        return spread(trees, num)
    by_prompt = {tree.prompt: tree for tree in spread(trees, 8 * FEWEST_ROWS)}
    return sorted(by_prompt.values(), key=lambda tree: tree.num_tokens)[:FEWEST_ROWS]


@contextlib.contextmanager
def _at_start(run: Run, lm: LanguageModel) -> Generator[LanguageModel]:
    """The reference before step 1, where without a name or an adapter it is the policy itself.

    Raises Refusal UW401 or UW402 for one that is not what was exported.
    """
    if run.reference is None and not lm.has_adapter:
        yield lm
        return
    with reference_model(run, lm) as model:
        if run.reference is not None:
            require_start_as_exported(run, run.reference, model)
        yield model


def answered_sets(run: Run, prepared: Prepared) -> dict[str, list[Tree]]:
    """The sets whose prompts policy and reference answer at every evaluation."""
    if not run.evaluation.samples or not KINDS[run.objective].answers:
        return {}
    if PROMPTS in prepared.trees:
        return {PROMPTS: prepared.trees[PROMPTS]}
    return {name: trees for name, trees in prepared.trees.items() if name != "train"}


def sampled_prompts(run: Run, trees: Sequence[Tree]) -> list[tuple[int, ...]]:
    """The first prompts of a set, which policy and reference answer at every evaluation."""
    return [tree.prompt for tree in sampled_trees(run, trees)]


def sampled_trees(run: Run, trees: Sequence[Tree]) -> list[Tree]:
    """The trees of `sampled_prompts`: the first of each prompt."""
    first = {tree.prompt: tree for tree in reversed(trees)}
    return [first[p] for p in dict.fromkeys(t.prompt for t in trees)][: run.evaluation.samples]


def draw(
    run: Run, lm: LanguageModel, prompts: Sequence[Sequence[int]], stop_ids: Collection[int]
) -> list[Sample]:
    """One answer to each prompt, ended by the tokens that training ends responses with."""
    options = run.evaluation
    return evaluate.draw(
        lm, prompts, options.max_new_tokens, options.temperature, run.seed, stop_ids
    )


@contextlib.contextmanager
def reference_model(
    run: Run, lm: LanguageModel, plan: ForwardPlan | None = None
) -> Generator[LanguageModel]:
    """The reference as a model, for as long as the block runs: the adapter switched off, or the
    named model (else the policy's own start) loaded once more.

    A `plan` that was proved on its weights before is not proved again.
    """
    if run.reference is None and lm.has_adapter:
        with adapter_off(lm) as reference:
            yield reference
        return
    loaded = load(
        run.reference or run.model,
        device=str(lm.device),
        dtype=str(lm.compute_dtype).removeprefix("torch."),
        path=run.compute.attention,
        sharing=run.compute.sharing,
        trust_remote_code=run.compute.trust_remote_code,
        plan=plan,
        quantize=None if run.lora is None else run.lora.quantize,
    )
    require_same_tokens(run, lm, loaded.tokenizer)
    yield loaded


@contextlib.contextmanager
def same_reference(run: Run, lm: LanguageModel, against: Against) -> Generator[LanguageModel]:
    """The reference as a model, for an evaluation.

    Raises Refusal UW108 when its weights are not those that training is measured against.
    """
    with reference_model(run, lm, against.plan) as model:
        known = against.logps.fingerprint
        # What was hashed when the run began and has stayed in memory is not hashed again.
        same = against.bit_sums is not None and bit_sums(model) == against.bit_sums
        if not same and (found := fingerprint(model)) != known:
            raise Refusal(
                "UW108",
                f"the reference {run.reference or run.model} is not what it was when the run "
                f"began: its fingerprint is {found[:12]}, and training is measured against "
                f"{known[:12]}. Put its files back as they were, then resume.",
            )
        yield model


def require_same_tokens(run: Run, lm: LanguageModel, tokenizer: PreTrainedTokenizerBase) -> None:
    if lm.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise DataError(
            f"reference {run.reference} has another vocabulary than {run.model}: log-probs of the "
            "same ids would be of different texts. Use a reference with the same tokenizer."
        )
