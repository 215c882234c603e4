"""upweight's side, in the package's environment.

Tasks: train (the recipe that `upweight train` runs, up to the end of its last step), score (token
ids and log-probs of every pair before training), price (DPO and SFT steps over the same trees, in
turn), peak (plain matrix products at the model's shapes).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import torch
import transformers

from floor import matrix_products_per_second, model_shape
from protocol import LORA, Spec, work
from upweight.config import Resolved, load_run
from upweight.data.pack import bins, collate, merge_same_prompts
from upweight.data.stream import plan_epoch, planned
from upweight.evidence.evaluate import score_trees
from upweight.losses import PAIR_LOSSES
from upweight.models import head
from upweight.recipes import start
from upweight.recipes.prepare import (
    describe,
    fill_reference,
    load_policy,
    prepare,
    tokens_read_at_once,
)
from upweight.recipes.screen import Silent
from upweight.recipes.train import train_model
from upweight.training.loop import Hooks, Plan, Progress, fit
from upweight.training.objectives import Objective, pair, sft
from upweight.training.optimizer import make_optimizer
from upweight.types import Forest

Emit = Callable[..., None]


class Finished(Exception):
    """The last step is done. What a run writes after it is not what is measured."""


class Stopwatch(Silent):
    """A Screen that says when the reference pass and each step ended, and stops after the last."""

    def __init__(self, emit: Emit) -> None:
        self.emit = emit
        self.before = time.perf_counter()

    def stage(self, name: str) -> None:
        self.before = time.perf_counter()

    def progress(self, done: int, total: int) -> None:
        if done == total:
            # From the stage's start: fingerprinting the model is part of what the pass costs.
            self.emit("reference", seconds=time.perf_counter() - self.before)

    def note(self, text: str) -> None:
        if text.startswith("model: "):
            print(text)

    def warn(self, text: str) -> None: ...

    def record(self, record: Mapping[str, object], total_steps: int) -> None:
        now = time.perf_counter()
        self.emit(
            "step",
            step=record["step"],
            loss=record["loss"],
            grad_norm=record["grad_norm"],
            rewards=[record["rewards/chosen"], record["rewards/rejected"]],
            seconds=now - self.before,
            num_pairs=record["num_pairs"],
        )
        self.before = now
        if record["step"] == total_steps:
            raise Finished


def resolve(spec: Spec) -> Resolved:
    """The run that the spec asks for: what both sides share, then the side's own settings."""
    values: dict[str, Any] = {
        "model": spec.model,
        "data": spec.rows,
        "data.template": "chat",
        "out": f"{spec.scratch}/run",
        "steps": spec.steps,
        "seed": spec.seed,
        "loss.beta": spec.beta,
        "batch.pairs_per_step": spec.pairs_per_step,
        "optimizer.learning_rate": spec.learning_rate,
        "optimizer.schedule": "constant",
        "optimizer.warmup": 0.0,
        "compute.dtype": spec.precision,
        "checkpoint.every": spec.steps,
        **({"lora": LORA} if spec.lora else {}),
        **{key: value for key, value in spec.settings.items() if key != "bench"},
    }
    return load_run(None, values=values, required=("out",))


def two_passes() -> None:
    """The head as where it is not a plain matrix: dense chunks, recomputed backward."""
    head._is_plain = lambda *_: False


SWITCHES: dict[str, Callable[[], None]] = {"two passes": two_passes}
"""What the ablation turns that is no setting of a run; asked for as `bench: NAME`."""


def train(spec: Spec, emit: Emit) -> None:
    if (name := spec.settings.get("bench")) is not None:
        SWITCHES[name]()
    try:
        train_model(resolve(spec), Stopwatch(emit))
    except Finished:
        return
    raise AssertionError("the recipe ended without its last step")


def score(spec: Spec, emit: Emit) -> None:
    run = resolve(spec).run
    lm = load_policy(run)
    print(describe(lm))
    trees = prepare(run, lm).trees["train"]
    order = [i for step in plan_epoch(trees, spec.pairs_per_step, spec.seed, 0) for i in step]
    trees = [trees[i] for i in order]
    scores = iter(score_trees(lm, trees, None, spec.beta, tokens_read_at_once(run, lm)))
    for tree in trees:
        for preference in tree.preferences:
            found = next(scores)
            emit(
                "pair",
                prompt=tree.prompt,
                chosen=tree.responses[preference.chosen],
                rejected=tree.responses[preference.rejected],
                logp_chosen=found["logp_chosen"],
                logp_rejected=found["logp_rejected"],
            )


def price(spec: Spec, emit: Emit) -> None:
    """DPO with a warm reference, and SFT, on the same forests: one step each, the order turning."""
    run = resolve(spec).run
    lm = load_policy(run)
    prepared = prepare(run, lm)
    trees = prepared.trees["train"]
    reference = fill_reference(run, lm, trees, Silent())
    lm = start.trained(run, lm, prepared.renderer.stop_ids)
    options = run.optimizer
    optimizer = make_optimizer(
        lm.model,
        learning_rate=spec.learning_rate,
        weight_decay=options.weight_decay,
        beta1=options.beta1,
        beta2=options.beta2,
        epsilon=options.epsilon,
    )
    loss = functools.partial(PAIR_LOSSES["dpo"], beta=spec.beta)
    dpo = pair(reference.logps, loss, spec.beta)
    objectives: dict[str, Objective] = {"dpo": dpo, "sft": sft()}
    capacity = tokens_read_at_once(run, lm)
    plan_of = planned(trees, spec.pairs_per_step, spec.seed)

    def forests(step: int) -> list[Forest]:
        batch = [trees[i] for i in plan_of(step).trees]
        return [collate(group) for group in bins(merge_same_prompts(batch, capacity), capacity)]

    hooks = Hooks(lambda record: None, lambda progress: False, lambda progress: None)
    for step in range(spec.steps):
        names = ["dpo", "sft"] if step % 2 == 0 else ["sft", "dpo"]
        for name in names:
            plan = Plan(step + 1, spec.steps, spec.learning_rate, 0.0, "constant", 1.0)
            before = time.perf_counter()
            fit(lm, optimizer, objectives[name], forests, plan, hooks, Progress(step))
            emit("price", objective=name, step=step + 1, seconds=time.perf_counter() - before)


def peak(spec: Spec, emit: Emit) -> None:
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[spec.precision]
    emit("peak", flops=matrix_products_per_second(model_shape(spec.model), dtype))


TASKS: dict[str, Callable[[Spec, Emit], None]] = {
    "train": train,
    "score": score,
    "price": price,
    "peak": peak,
}


def main(spec: Spec, emit: Emit) -> None:
    if spec.threads:
        torch.set_num_threads(spec.threads)
    versions = {"upweight": version("upweight"), "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    settings = dict(spec.settings)
    emit("side", versions=versions, settings=settings, threads=torch.get_num_threads())
    TASKS[spec.task](spec, emit)


if __name__ == "__main__":
    work(main)
