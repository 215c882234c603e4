"""From a config to a model, its trees and its reference: what every recipe starts with."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from upweight.config import Resolved, Run
from upweight.data.account import Account, percentiles, require_used
from upweight.data.render import Renderer, make_renderer
from upweight.data.stream import grow, load_examples, overlap, split_account, split_by_prompt
from upweight.errors import Refusal
from upweight.models.load import LanguageModel, fingerprint, load
from upweight.models.reference import Reference, fill, open_reference, verify
from upweight.recipes.screen import Screen
from upweight.training.memory import TOKENS_PER_BIN
from upweight.trust.finding import Finding
from upweight.types import Example, Tree


@dataclass(frozen=True)
class Prepared:
    """Trees by set ("train" first), the account of each, and what is suspicious about them."""

    def __repr__(self) -> str:
        return "\n".join(account_lines(self))

    trees: dict[str, list[Tree]]
    accounts: dict[str, Account]
    renderer: Renderer
    findings: tuple[Finding, ...] = ()


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

    def examples(paths: Sequence[str], limit: int | None) -> tuple[list[Example], Account]:
        return load_examples(
            paths,
            layout=run.data.format,
            pairing=run.data.pairing,
            min_gap=run.data.min_score_gap,
            limit=limit,
        )

    train, account = examples(run.data.path, run.data.limit)
    require_used(account, f"data {', '.join(run.data.path)}")
    sets: dict[str, tuple[list[Example], Account]] = {}
    train, heldout = split_by_prompt(train, run.evaluation.fraction, run.seed)
    if heldout:
        account, held_account = split_account(account, len(heldout))
        sets["heldout"] = (heldout, held_account)
    for name, paths in run.evaluation.sets.items():
        sets[name] = examples(paths, None)
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
        "findings": [asdict(finding) for finding in prepared.findings],
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
        lines += _length_lines(name, account)
    return lines


def _length_lines(name: str, account: Account) -> list[str]:
    """Half of the prompts and responses are shorter than the first number, one in 100 longer than
    the second."""
    found = {side: percentiles(lengths) for side, lengths in account.lengths.items() if lengths}
    sides = [f"{side} {p['p50']} / {p['p99']} / {p['max']}" for side, p in found.items()]
    return [f"{name}: tokens (median / 99 % / most): {', '.join(sides)}"] if sides else []


def fill_reference(
    run: Run, model: LanguageModel, trees: Sequence[Tree], screen: Screen
) -> Reference:
    """The reference's log-probs for all trees, from the cache where it has them.

    `model` is the reference. A handful of rows that were known is recomputed; Refusal UW107 when
    they differ.
    """
    reference = open_reference(fingerprint(model), model)
    known = len(trees) - len(reference.missing(trees))
    computed = fill(
        reference,
        model,
        trees,
        tokens_read_at_once(run, model),
        screen.progress,
        on_smaller=functools.partial(note_smaller, screen, "the reference pass"),
    )
    if known:
        verify(reference, model, trees)
    screen.note(
        f"reference: {computed} responses computed, {known} of {len(trees)} prompts known "
        f"from before (kept in {reference.folder})"
    )
    return reference


def note_smaller(screen: Screen, what: str, tokens_per_bin: int) -> None:
    screen.note(f"{what} ran out of memory: going on with bins of {tokens_per_bin:,}")


def tokens_read_at_once(run: Run, lm: LanguageModel) -> int:
    """batch.tokens_per_bin, or what is enough for speed where nothing is kept for a gradient."""
    return run.batch.tokens_per_bin or TOKENS_PER_BIN[lm.device.type]


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
