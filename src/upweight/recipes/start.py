"""All that can be known of a run before its reference is asked: what train and check share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from upweight.config import Resolved, Run
from upweight.data.stream import num_steps, plan_epoch
from upweight.models.adapter import add_lora, keep_frozen_in_compute_dtype
from upweight.models.load import LanguageModel, checkpoint_layers
from upweight.models.weights import load_tokenizer
from upweight.recipes.best import Best, best_metric
from upweight.recipes.prepare import (
    Prepared,
    account_lines,
    describe,
    load_policy,
    prepare,
    with_rates,
)
from upweight.recipes.reference import require_same_tokens
from upweight.recipes.resume import require_same_settings
from upweight.recipes.screen import Screen
from upweight.training.checkpoint import Position
from upweight.training.loop import Plan
from upweight.training.memory import plan_memory
from upweight.training.optimizer import MOMENT_BYTES, require_moments
from upweight.training.rundir import require_space
from upweight.trust.preflight import Examined, examine


@dataclass(frozen=True)
class Start:
    """The settings with what was left open filled in, the policy with its adapter, the rows, and
    what is done when."""

    resolved: Resolved
    lm: LanguageModel
    prepared: Prepared
    plan: Plan
    best: Best | None

    @property
    def run(self) -> Run:
        return self.resolved.run


def start(resolved: Resolved, screen: Screen, saved: Position | None = None) -> Start:
    """Model, reference's tokenizer, rows, adapter, plan and room on the disk. Writes nothing.

    `saved` is where the run that is resumed was. Raises UpweightError children.
    """
    resolved = with_rates(resolved)
    best = best_metric(resolved.run)
    require_moments(resolved.run.optimizer.moments)
    screen.stage("model")
    lm = load_policy(resolved.run)
    if resolved.run.compute.dtype == "auto":
        # What the probe found is the run's from here on, also where it is resumed.
        dtype = str(lm.compute_dtype).removeprefix("torch.")
        resolved = resolved.with_value("compute.dtype", dtype, "resolved")
    run = resolved.run
    if run.reference is not None:
        trusted = run.compute.trust_remote_code
        tokenizer = load_tokenizer(run.reference, trust_remote_code=trusted)
        require_same_tokens(run, lm, tokenizer)
    screen.stage("rows")
    prepared = prepare(run, lm)
    for line in account_lines(prepared):
        screen.note(line)
    found = tuple(f for examined in examined_sets(run, prepared) for f in examine(examined))
    prepared = replace(prepared, findings=found)
    for finding in found:
        screen.note(str(finding))
    if saved is not None:
        require_same_settings(saved, run, prepared)
    lm = _trained(run, lm)
    screen.note(f"model: {lm.name}, {describe(lm)}")
    trees = prepared.trees["train"]
    steps = plan_epoch(trees, run.batch.pairs_per_step, run.seed, 0)
    moment = MOMENT_BYTES[run.optimizer.moments]
    memory = plan_memory(lm, trees, steps, run.batch.tokens_per_bin, moment)
    screen.note(memory.describe())
    if run.batch.tokens_per_bin is None:
        resolved = resolved.with_value("batch.tokens_per_bin", memory.tokens_per_bin, "resolved")
        run = resolved.run
    if run.out is not None:
        _require_room(run, lm, Path(run.out))
    return Start(resolved, lm, prepared, _plan(run, prepared), best)


def examined_sets(run: Run, prepared: Prepared) -> list[Examined]:
    return [
        Examined(name, trees, prepared.accounts[name], run.preflight)
        for name, trees in prepared.trees.items()
    ]


def _trained(run: Run, lm: LanguageModel) -> LanguageModel:
    """The policy as it is trained: with its adapter, and recomputing if that is asked for."""
    if run.lora is not None:
        lm = add_lora(
            lm,
            rank=run.lora.rank,
            alpha=run.lora.alpha,
            dropout=run.lora.dropout,
            targets=run.lora.targets,
            seed=run.seed,
        )
        keep_frozen_in_compute_dtype(lm)
    if run.compute.checkpointing:
        checkpoint_layers(lm)
    return lm


def _require_room(run: Run, lm: LanguageModel, out: Path) -> None:
    weights = sum(p.numel() * p.element_size() for p in lm.model.parameters())
    trained = sum(p.numel() * p.element_size() for p in lm.model.parameters() if p.requires_grad)
    # Weights and AdamW's two moments, in each checkpoint that is kept and the one being written.
    require_space(out, weights + 3 * trained * (run.checkpoint.keep + 1))


def _plan(run: Run, prepared: Prepared) -> Plan:
    trees, size = prepared.trees["train"], run.batch.pairs_per_step
    total = run.steps or num_steps(trees, size, run.seed, run.epochs)
    tenth = max(1, total // 10)
    rate = run.optimizer.learning_rate
    assert rate is not None
    return Plan(
        total_steps=total,
        steps_per_epoch=len(plan_epoch(trees, size, run.seed, 0)),
        learning_rate=rate,
        warmup=run.optimizer.warmup,
        schedule=run.optimizer.schedule,
        max_grad_norm=run.optimizer.max_grad_norm,
        log_every=run.log_every,
        evaluate_every=(run.evaluation.every or tenth) if len(prepared.trees) > 1 else None,
        checkpoint_every=run.checkpoint.every or tenth,
    )
