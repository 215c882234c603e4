"""How many steps a run takes, of which rows, at which rates, and whether they get anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from upweight.config import Run, default_passes
from upweight.data.stream import num_steps, plan_epoch
from upweight.models.adapter import most_change
from upweight.models.load import LanguageModel
from upweight.recipes.kinds import KINDS
from upweight.recipes.prepare import Prepared
from upweight.training.loop import Plan
from upweight.training.rollout import Sizes, num_rounds
from upweight.training.schedules import summed_factors
from upweight.trust.finding import Finding
from upweight.trust.preflight import Reach, hardly_moves
from upweight.types import Tree


def rollout_sizes(run: Run) -> Sizes:
    kind, options = KINDS[run.objective], run.rollout
    return Sizes(
        prompts=options.prompts_per_round,
        responses=options.responses or kind.num_responses,
        max_tokens=options.max_tokens,
        max_length=run.data.max_length,
        passes=options.passes or default_passes(run.objective),
        minibatches=options.minibatches,
        seed=run.seed,
    )


def learned_from(run: Run, prepared: Prepared) -> tuple[Sequence[Tree], Sequence[Sequence[int]]]:
    """The trees of an epoch, and which of them make a step. Answers that are yet to be drawn are
    as long as they may be."""
    trees = prepared.trees["train"]
    if not KINDS[run.objective].draws:
        return trees, plan_epoch(trees, run.batch.pairs_per_step, run.seed, 0)
    sizes = rollout_sizes(run)
    imagined = [
        replace(tree, responses=((0,) * sizes.room(tree),) * sizes.responses)
        for tree in sorted(trees, key=lambda tree: -tree.num_tokens)[: sizes.prompts]
    ]
    return imagined, [range(len(imagined))]


def short_of_room(run: Run, prepared: Prepared) -> str | None:
    """Of a run that draws its answers: how many prompts leave less room than they may take."""
    if not KINDS[run.objective].draws:
        return None
    sizes, trees = rollout_sizes(run), prepared.trees["train"]
    room = [sizes.room(tree) for tree in trees]
    short = sum(left < sizes.max_tokens for left in room)
    if not short:
        return None
    return (
        f"{short:,} of {len(trees):,} prompts leave less than rollout.max_tokens="
        f"{sizes.max_tokens:,} of data.max_length={sizes.max_length:,}, {min(room):,} at the "
        "least: answers to them are cut there"
    )


def planned(run: Run, prepared: Prepared) -> Plan:
    trees, size = prepared.trees["train"], run.batch.pairs_per_step
    if KINDS[run.objective].draws:
        sizes = rollout_sizes(run)
        per_epoch = max(1, round(len(trees) / sizes.prompts * sizes.steps))
        total = run.steps or num_rounds(len(trees), sizes.prompts, run.epochs) * sizes.steps
    else:
        per_epoch = len(plan_epoch(trees, size, run.seed, 0))
        total = run.steps or num_steps(trees, size, run.seed, run.epochs)
    tenth = max(1, total // 10)
    rate = run.optimizer.learning_rate
    assert rate is not None
    return Plan(
        total_steps=total,
        steps_per_epoch=per_epoch,
        learning_rate=rate,
        warmup=run.optimizer.warmup,
        schedule=run.optimizer.schedule,
        max_grad_norm=run.optimizer.max_grad_norm,
        log_every=run.log_every,
        evaluate_every=(run.evaluation.every or tenth) if len(prepared.trees) > 1 else None,
        checkpoint_every=run.checkpoint.every or tenth,
    )


def tokens_of(run: Run, trees: Sequence[Tree], steps: Sequence[Sequence[int]], plan: Plan) -> float:
    """Of the whole run: an epoch's or a round's, as often as its steps are taken."""
    once = sum(trees[i].num_tokens for step in steps for i in step)
    each = rollout_sizes(run).minibatches if KINDS[run.objective].draws else len(steps)
    return once * plan.total_steps / max(1, each)


def stays_put(run: Run, plan: Plan, lm: LanguageModel) -> list[Finding]:
    """What is said of a plan that gets nowhere."""
    reach = summed_factors(plan.total_steps, plan.warmup, plan.schedule) * plan.learning_rate
    if run.lora is not None:
        reach *= most_change(lm)
    options = run.optimizer
    # |g| / (|g| + epsilon) is what is left of a step, and no element is above the clipped norm.
    held = 1.0
    if plan.max_grad_norm is not None:
        held = min(1.0, plan.max_grad_norm / options.epsilon)
    steps = Reach(plan.total_steps, plan.learning_rate, reach * held, held)
    return hardly_moves(steps, run.preflight.reach, adapted=run.lora is not None)
