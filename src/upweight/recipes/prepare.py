"""From a config to a model, its trees and its reference: what every recipe starts with."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from upweight.config import Resolved, Run
from upweight.data.account import Account, require_used
from upweight.data.render import Renderer, make_renderer
from upweight.data.stream import grow, load_examples, overlap, split_account, split_by_prompt
from upweight.data.trees import show
from upweight.errors import DataError, Refusal
from upweight.evidence.track import clients
from upweight.models.load import LanguageModel, adapter_off, fingerprint, load
from upweight.models.reference import Reference, fill, open_reference, verify
from upweight.recipes.screen import Screen, Silent
from upweight.types import Example, Tree


@dataclass(frozen=True)
class Prepared:
    """Trees by set ("train" first), and the account of each."""

    trees: dict[str, list[Tree]]
    accounts: dict[str, Account]
    renderer: Renderer


def load_policy(run: Run) -> LanguageModel:
    if run.compute.threads:
        torch.set_num_threads(run.compute.threads)
    return load(
        run.model,
        device=run.compute.device,
        dtype=run.compute.dtype,
        path=run.compute.attention,
        sharing=run.compute.sharing,
        trust_remote_code=run.compute.trust_remote_code,
    )


def renderer_for(run: Run, lm: LanguageModel) -> Renderer:
    limits = [n for n in (run.data.max_length, lm.max_length) if n is not None]
    return make_renderer(
        lm.tokenizer,
        template=run.data.template,
        stop_token_ids=lm.stop_token_ids,
        max_length=min(limits, default=None),
        truncation=run.data.truncation,
        template_options=run.data.template_options,
    )


def prepare(run: Run, lm: LanguageModel) -> Prepared:
    """Reads, splits, renders and tokenizes every row; each is in an account.

    Raises DataError when a set has nothing to use, Refusal UW209 when a prompt is on both sides.
    """
    renderer = renderer_for(run, lm)

    def examples(paths: Sequence[str]) -> tuple[list[Example], Account]:
        return load_examples(
            paths,
            layout=run.data.format,
            pairing=run.data.pairing,
            min_gap=run.data.min_score_gap,
            limit=run.data.limit,
        )

    train, account = examples(run.data.path)
    require_used(account, f"data {', '.join(run.data.path)}")
    sets: dict[str, tuple[list[Example], Account]] = {}
    train, heldout = split_by_prompt(train, run.evaluation.fraction, run.seed)
    if heldout:
        account, held_account = split_account(account, len(heldout))
        sets["heldout"] = (heldout, held_account)
    for name, paths in run.evaluation.sets.items():
        sets[name] = examples(paths)
        if both := overlap(train, sets[name][0]):
            mine, theirs = both[0]
            raise Refusal(
                "UW209",
                f"{len(both)} rows of the evaluation set {name} have a prompt that is trained on "
                f"too, such as {theirs} and {mine}. Remove them from one side, or use "
                "evaluation.fraction to split by prompt.",
            )
    trees, accounts = {"train": grow(train, renderer, account)}, {"train": account}
    require_used(account, f"data {', '.join(run.data.path)}")
    for name, (rows, its_account) in sets.items():
        trees[name], accounts[name] = grow(rows, renderer, its_account), its_account
        require_used(its_account, f"the evaluation set {name}")
    return Prepared(trees, accounts, renderer)


def account_record(prepared: Prepared) -> dict[str, object]:
    """account.json."""
    return {
        "template": prepared.renderer.template,
        "sets": {name: account.to_json() for name, account in prepared.accounts.items()},
    }


def account_lines(prepared: Prepared) -> list[str]:
    """The account as a person reads it, one line per set."""
    lines = [
        "text is rendered with the model's chat template"
        if prepared.renderer.template == "chat"
        else "text is used as it is, without a chat template"
    ]
    for name, account in prepared.accounts.items():
        drops = ", ".join(f"{num} {reason}" for reason, num in account.dropped.items())
        cuts = {side: num for side, num in account.truncated.items() if num}
        parts = [
            f"{name}: {account.read} rows read = {account.used} used + "
            f"{sum(account.dropped.values())} dropped" + (f" ({drops})" if drops else ""),
            f"{account.preferences} preferences",
        ]
        if account.left_out:
            parts.append(
                "responses left out: "
                + ", ".join(f"{num} {reason}" for reason, num in account.left_out.items())
            )
        if cuts:
            parts.append("cut: " + ", ".join(f"{num} {side}" for side, num in cuts.items()))
        for label, num in (
            ("stop tokens appended", account.appended_stop),
            ("boundaries repaired", account.boundary_repaired),
            ("rewritten by the template", account.rewritten),
            ("with special tokens in the prompt", account.special_in_prompt),
            ("duplicate rows", account.duplicates),
        ):
            if num:
                parts.append(f"{num} {label}")
        for column, num in account.unused_columns.items():
            parts.append(f"column {column} is not read ({num} rows)")
        lines.append("; ".join(parts))
    return lines


@contextlib.contextmanager
def reference_model(run: Run, lm: LanguageModel) -> Generator[LanguageModel]:
    """The reference as a model, for as long as the block runs: the adapter switched off, or the
    named model (else the policy's own start) loaded once more."""
    if run.reference is None and lm.has_adapter:
        with adapter_off(lm) as reference:
            yield reference
        return
    name = run.reference or run.model
    loaded = load(
        name,
        device=str(lm.device),
        dtype=str(lm.compute_dtype).removeprefix("torch."),
        path=run.compute.attention,
        sharing=run.compute.sharing,
        trust_remote_code=run.compute.trust_remote_code,
        plan=lm.plan if run.reference is None else None,
    )
    _require_same_tokens(run, lm, loaded)
    yield loaded


def _require_same_tokens(run: Run, lm: LanguageModel, reference: LanguageModel) -> None:
    if lm.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        raise DataError(
            f"reference {run.reference} has another vocabulary than {run.model}: log-probs of the "
            "same ids would be of different texts. Use a reference with the same tokenizer."
        )


def fill_reference(run: Run, lm: LanguageModel, trees: Sequence[Tree], screen: Screen) -> Reference:
    """The reference's log-probs for all trees, from the cache where it has them.

    `lm` is the policy at its start, which is the reference when none is named. A handful of rows
    is recomputed; Refusal UW107 when they differ.
    """
    with contextlib.ExitStack() as stack:
        model = lm if run.reference is None else stack.enter_context(reference_model(run, lm))
        reference = open_reference(fingerprint(model), model)
        known = len(trees) - len(reference.missing(trees))
        computed = fill(reference, model, trees, run.batch.tokens_per_bin, screen.progress)
        if known:
            verify(reference, model, trees)
        screen.note(
            f"reference: {computed} responses computed, {known} of {len(trees)} prompts known "
            f"from before (kept in {reference.folder})"
        )
    return reference


def check(resolved: Resolved, screen: Screen | None = None, num_shown: int = 3) -> Prepared:
    """Everything that can be known before step 1, without training: model, rows, what is scored.

    Raises what training would raise.
    """
    screen = screen or Silent()
    run = resolved.run
    clients(run.track)
    screen.stage("model")
    lm = load_policy(run)
    screen.note(f"model: {lm.name}, {describe(lm)}")
    screen.stage("rows")
    prepared = prepare(run, lm)
    for line in account_lines(prepared):
        screen.note(line)
    for tree in prepared.trees["train"][:num_shown]:
        screen.note(show(tree, lm.tokenizer))
    return prepared


def describe(lm: LanguageModel) -> str:
    total = sum(p.numel() for p in lm.model.parameters())
    trained = sum(p.numel() for p in lm.model.parameters() if p.requires_grad)
    share = "all trained" if trained == total else f"{trained:,} trained"
    dtype = str(lm.compute_dtype).removeprefix("torch.")
    return (
        f"{total:,} parameters ({share}), products in {dtype} on {lm.device}; {lm.plan.describe()}"
    )


def with_rates(resolved: Resolved) -> Resolved:
    """The learning rate that was left open: 1e-5 for LoRA, 5e-7 for full training."""
    if resolved.run.optimizer.learning_rate is not None:
        return resolved
    rate = 1e-5 if resolved.run.lora is not None else 5e-7
    return resolved.with_value("optimizer.learning_rate", rate, "resolved")
