"""All that can be known of a run before its reference is asked: what train and check share."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from upweight.config import (
    INHERITED,
    PROBED,
    RESOLVED,
    Resolved,
    Run,
    require_read,
    unread,
)
from upweight.errors import ModelError, Refusal
from upweight.models.adapter import add_lora, keep_frozen_in_compute_dtype
from upweight.models.compiled import can_compile, compile_layers, pays_back
from upweight.models.load import LanguageModel, checkpoint_layers
from upweight.models.logprobs import token_logps
from upweight.models.nf4 import require_quantizer
from upweight.models.reference import Reference
from upweight.models.sample import Sample
from upweight.models.scalar import response_scores, with_scalar_head
from upweight.models.weights import load_tokenizer
from upweight.recipes.beside import has_own_critic, held_beside, require_room
from upweight.recipes.best import Best, best_metric
from upweight.recipes.exported import day_of_export, require_start_as_exported
from upweight.recipes.kinds import KINDS, PROMPTS
from upweight.recipes.plan import (
    learned_from,
    planned,
    short_of_room,
    stays_put,
    tokens_of,
)
from upweight.recipes.prepare import (
    Prepared,
    account_lines,
    account_record,
    describe,
    ended_answers,
    figure_lines,
    load_policy,
    prepare,
)
from upweight.recipes.reference import require_same_tokens
from upweight.recipes.resume import as_begun, require_same_settings
from upweight.recipes.screen import Screen
from upweight.recipes.sets import read_sets
from upweight.recipes.unwatched import before_step_1, by_reference_answers, told
from upweight.stats import Interval
from upweight.training.loop import Plan
from upweight.training.memory import MemoryPlan, plan_memory
from upweight.training.moment import Position
from upweight.training.optimizer import MOMENT_BYTES, require_moments
from upweight.trust.finding import Finding, Refused
from upweight.trust.identity import (
    PROBES,
    computed_together,
    require_alone,
    require_quiet,
    starts_elsewhere,
)
from upweight.trust.likely import by_reference, spread, swapped
from upweight.trust.preflight import Examined, Figures, cut, examine, settle, unfinished
from upweight.trust.spans import Texts, examine_texts
from upweight.types import Tree


@dataclass(frozen=True)
class Start:
    """The settings with what was left open filled in, the policy with its adapter, the rows, and
    what is done when."""

    resolved: Resolved
    lm: LanguageModel
    prepared: Prepared
    plan: Plan
    best: Best | None
    memory: MemoryPlan

    @property
    def run(self) -> Run:
        return self.resolved.run


def start(resolved: Resolved, screen: Screen, saved: Position | None = None) -> Start:
    """Model, reference's tokenizer, rows, adapter, plan and room on the disk. Writes nothing.

    `saved` is where the run that is resumed was. Raises UpweightError children.
    """
    require_read("train", resolved.run, resolved.places)
    if saved is not None:
        resolved = as_begun(resolved)
    resolved = _with_rates(resolved)
    best = best_metric(resolved.run)
    require_moments(resolved.run.optimizer.moments)
    if resolved.run.lora is not None:
        require_quantizer(resolved.run.lora.quantize)
    _require_offload_has_effect(resolved.run)
    screen.stage("rows")
    sets = read_sets(resolved.run)
    screen.stage("model")
    lm = load_policy(resolved.run)
    require_start_as_exported(resolved.run, resolved.run.model, lm)
    resolved = _with_model(resolved, lm)
    run = resolved.run
    if run.reference is not None:
        trusted = run.compute.trust_remote_code
        tokenizer = load_tokenizer(run.reference, trust_remote_code=trusted)
        require_same_tokens(run, lm, tokenizer)
    screen.stage("rows")
    prepared = prepare(run, lm, sets)
    del sets  # the texts are with what was prepared, and go with it
    if run.data.template == "auto":
        resolved = resolved.with_value("data.template", prepared.renderer.template, INHERITED)
    if run.data.date is None and prepared.renderer.date is not None:
        origin = INHERITED if day_of_export(run.model) else RESOLVED
        resolved = resolved.with_value("data.date", prepared.renderer.date, origin)
    run = resolved.run
    for line in account_lines(prepared):
        screen.note(line)
    for finding in prepared.findings:
        screen.warn(str(finding))
    prepared = _noticed(prepared, _texts(run, prepared, lm), screen)
    prepared = _noticed(
        prepared, {e.name: examine(e) for e in examined_sets(run, prepared)}, screen
    )
    if PROMPTS in prepared.trees:
        trees, account = prepared.trees[PROMPTS], prepared.accounts[PROMPTS]
        asked = Examined(PROMPTS, trees, account, run.preflight)
        prepared = _noticed(prepared, {PROMPTS: settle([cut(asked)])}, screen)
    kind = KINDS[run.objective]
    if kind.answers:  # A reward model reads a stop token behind what was cut.
        ends = {e.name: ({}, unfinished(e)) for e in examined_sets(run, prepared)}
        prepared = _noticed(prepared, ends, screen)
    if kind.rows == "preferences" and not kind.by_reference:
        # What the lengths say does not take a reference.
        alone = {e.name: settle([swapped(e, ())]) for e in examined_sets(run, prepared)}
        prepared = _noticed(prepared, alone, screen)
    _require_accepted(prepared, screen)
    # The texts have been read back, and are not needed in memory while the run goes on.
    prepared = replace(prepared, examples={})
    if run.objective == "reward":
        prepared = ended_answers(prepared, lm)
    if saved is not None:
        require_same_settings(saved, run, prepared)
    if not kind.draws:
        off = require_alone(lm, computed_together(prepared.trees["train"]))
        prepared = prepared.noticed({"train": {"alone_nats": Interval(off, off, off)}}, [])
    if short := short_of_room(run, prepared):
        screen.note(short)
    trees, steps = learned_from(run, prepared)
    plan = planned(run, prepared)
    lm = trained(run, lm, prepared.renderer.stop_ids)
    screen.note(f"model: {lm.name}, {describe(lm)}")
    resolved = _compiled(resolved, lm, tokens_of(run, trees, steps, plan), screen)
    run = resolved.run
    forward = token_logps if kind.answers else response_scores
    if run.lora is None or not run.lora.dropout:
        few = spread(prepared.trees["train"], 16)
        require_quiet(lm, min(few, key=lambda tree: tree.num_tokens), forward)
    moment = MOMENT_BYTES[run.optimizer.moments]
    memory = plan_memory(
        lm,
        trees,
        steps,
        run.batch.tokens_per_bin,
        moment,
        forward,
        beside=held_beside(run, lm),
        passes=2 if has_own_critic(run) else 1,
    )
    screen.note(memory.describe())
    if run.batch.tokens_per_bin is None:
        resolved = resolved.with_value("batch.tokens_per_bin", memory.tokens_per_bin, RESOLVED)
    prepared = _noticed(prepared, {"train": ({}, stays_put(run, plan, lm))}, screen)
    prepared = told(prepared, before_step_1(run, prepared), screen)
    resolved = _with_plan(resolved, plan)
    if resolved.run.out is not None:
        require_room(resolved.run, lm, Path(resolved.run.out))
    return Start(resolved, lm, prepared, plan, best, memory)


def _require_offload_has_effect(run: Run) -> None:
    """Raises Refusal UW109 where activations are in host memory anyway."""
    device = run.compute.device
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    if run.compute.offload and on_cpu:
        where = "" if device == "cpu" else ", since torch sees no CUDA device"
        raise Refusal(
            "UW109",
            f"compute.offload is true, and the model runs on the CPU{where}: activations are in "
            "host memory anyway. Leave it out; compute.checkpointing=true needs less memory.",
        )


def _with_rates(resolved: Resolved) -> Resolved:
    """The learning rate that was left open: by the objective, for LoRA or full training."""
    if resolved.run.optimizer.learning_rate is not None:
        return resolved
    kind = KINDS[resolved.run.objective]
    rate = kind.lora if resolved.run.lora is not None else kind.full
    return resolved.with_value("optimizer.learning_rate", rate, RESOLVED)


def _with_model(resolved: Resolved, lm: LanguageModel) -> Resolved:
    """With what the model and the machine decide where the run left it open. It is the run's from
    here on, also where it is resumed."""
    run = resolved.run
    if run.compute.dtype == "auto":
        dtype = str(lm.compute_dtype).removeprefix("torch.")
        resolved = resolved.with_value("compute.dtype", dtype, PROBED)
    if run.compute.threads is None:
        resolved = resolved.with_value("compute.threads", torch.get_num_threads(), RESOLVED)
    if run.data.max_length is None and lm.max_length is not None:
        resolved = resolved.with_value("data.max_length", lm.max_length, INHERITED)
    return resolved


def _compiled(resolved: Resolved, lm: LanguageModel, num_tokens: float, screen: Screen) -> Resolved:
    """Compiles the layers where that was left open and pays; where it cannot be, says so."""
    if resolved.run.compute.compile is not None:
        return resolved
    # With an adapter nothing was gained (LOG.md, 2026-11-28).
    pays = not lm.has_adapter and pays_back(lm, num_tokens) and can_compile()
    if pays:
        screen.note("compiling the layers: the run is long enough to pay for it")
        try:
            compile_layers(lm)
        except ModelError as error:
            screen.note(f"left as they are: {error}")
            pays = False
    return resolved.with_value("compute.compile", pays, RESOLVED)


def _with_plan(resolved: Resolved, plan: Plan) -> Resolved:
    run = resolved.run
    if run.evaluation.every is None and plan.evaluate_every is not None:
        resolved = resolved.with_value("evaluation.every", plan.evaluate_every, RESOLVED)
    if run.checkpoint.every is None:
        resolved = resolved.with_value("checkpoint.every", plan.checkpoint_every, RESOLVED)
    return resolved


def found_beside(begun: Start) -> dict[str, str]:
    """What run.yaml says beside its values: what auto stands for here, what the objective does not
    read, and what comes with the model and has no key."""
    run, renderer = begun.run, begun.prepared.renderer
    stops = sorted(renderer.stop_ids)
    texts = [repr(renderer.tokenizer.convert_ids_to_tokens(i)) for i in stops]
    found = {key: f"not read by {run.objective}" for key in unread(run.objective)}
    if run.compute.device == "auto":
        found["compute.device"] = f"here {begun.lm.device.type}"
    if run.compute.attention == "auto":
        shared = begun.lm.plan.shared
        found["compute.attention"] = f"here {begun.lm.plan.attention if shared else 'native'}"
    if run.steps is None:
        found["steps"] = f"here {begun.plan.total_steps}"
    pairs = ", ".join(f"{text} ({i})" for i, text in zip(stops, texts, strict=True))
    return {**found, "stop tokens": f"{pairs}, {INHERITED}"}


def examined_sets(run: Run, prepared: Prepared) -> list[Examined]:
    return [
        Examined(name, prepared.trees[name], prepared.accounts[name], run.preflight, copies)
        for name, copies in prepared.copies.items()
    ]


def _texts(
    run: Run, prepared: Prepared, lm: LanguageModel
) -> dict[str, tuple[Figures, Sequence[Finding]]]:
    """What is found where the scored tokens are read back, by set."""
    stops = frozenset(lm.stop_token_ids)
    accounts, renderer = prepared.accounts, prepared.renderer
    return {
        name: (
            {},
            examine_texts(
                Texts(
                    name, rows, prepared.trees[name], accounts[name], renderer, stops, run.preflight
                )
            ),
        )
        for name, rows in prepared.examples.items()
    }


def with_reference(
    begun: Start,
    reference: Reference,
    own: Interval | None,
    screen: Screen,
    *,
    fresh: bool,
    probes: Sequence[Tree] = (),
) -> Start:
    """With what the reference says against the rows that it was asked about (`own`: its own answers
    to them), and, where the policy is still at its start, against it: of those rows, or of
    `probes`."""
    run, prepared = begun.run, begun.prepared
    found: dict[str, tuple[Figures, list[Finding]]] = {"train": ({}, [])}
    if own is not None:
        trees = prepared.trees["train"]
        unknown = set(map(id, reference.missing(trees)))
        known = [tree for tree in trees if id(tree) not in unknown]
        # What is wrong with a start is wrong in every row: short ones are asked.
        probes = sorted(spread(known, 16), key=lambda tree: tree.num_tokens)[:PROBES]
        found = {e.name: by_reference(e, reference, own) for e in examined_sets(run, prepared)}
    if fresh and probes:
        first = "the first loss is not ln 2" if own is not None else "the first KL is not 0"
        named = run.reference is not None
        elsewhere = starts_elsewhere(begun.lm, reference, probes, first, named=named)
        found["train"][0].update(elsewhere.figures)
        if elsewhere.finding is not None:
            found["train"][1].append(elsewhere.finding)
    return replace(begun, prepared=_noticed(prepared, found, screen))


def with_answers(begun: Start, answers: Mapping[str, Sequence[Sample]], screen: Screen) -> Start:
    """With what the reference's answers to held-out prompts, or some of them, leave unseen."""
    said = by_reference_answers(begun.run, begun.prepared, answers)
    return replace(begun, prepared=told(begun.prepared, said, screen))


def _noticed(
    prepared: Prepared, found: Mapping[str, tuple[Figures, Sequence[Finding]]], screen: Screen
) -> Prepared:
    figures = {name: measured for name, (measured, _) in found.items()}
    findings = [finding for _, warned in found.values() for finding in warned]
    for finding in findings:
        if not isinstance(finding, Refused):
            screen.warn(str(finding))
    return prepared.noticed(figures, findings)


def _require_accepted(prepared: Prepared, screen: Screen) -> None:
    """Raises the first Refusal that the rows have earned, once everything else is said."""
    refused = [f for f in prepared.findings if isinstance(f, Refused)]
    if not refused:
        return
    for line in figure_lines(prepared.figures):
        screen.note(line)
    first, *others = refused
    for finding in others:
        screen.note(str(finding))
    codes = sorted({f.code for f in prepared.findings} - {first.code})
    also = f" Found besides, above: {', '.join(codes)}." if codes else ""
    raise Refusal(first.code, first.sentence + also, account_record(prepared))


def trained(run: Run, lm: LanguageModel, stop_ids: Collection[int]) -> LanguageModel:
    """The model as it is trained: with its adapter, its scalar head if it is to be a reward model,
    recomputing and compiled if that is asked for."""
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
    if not KINDS[run.objective].answers:
        lm = with_scalar_head(lm, stop_ids, run.seed)
    if run.compute.checkpointing:
        checkpoint_layers(lm)
    if run.compute.compile:
        compile_layers(lm)
    return replace(lm, offload=run.compute.offload)
