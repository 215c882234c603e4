"""From a config to a model, its trees and its reference: what every recipe starts with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch

from upweight.config import Run, write
from upweight.data.account import Account, percentiles, require_used
from upweight.data.render import Renderer
from upweight.data.stream import grow, load_prompts
from upweight.data.supervised import plant
from upweight.data.trees import ended
from upweight.errors import Refusal
from upweight.models.load import LanguageModel, fingerprint, load
from upweight.models.nf4 import num_weights, quantized_layers
from upweight.models.reference import Reference, fill, open_reference, verify
from upweight.models.scalar import load_reward_model
from upweight.recipes.apart import nearly_apart, require_apart
from upweight.recipes.kinds import KINDS, PROMPTS
from upweight.recipes.rendering import renderer_for, require_rows_read
from upweight.recipes.screen import Screen, counted
from upweight.recipes.sets import Sets, read_sets, reads_margins
from upweight.stats import Interval
from upweight.training.memory import enough_tokens
from upweight.training.records import finite
from upweight.trust.figures import FIGURES
from upweight.trust.finding import Finding
from upweight.trust.near import copies
from upweight.trust.preflight import Figures
from upweight.types import Example, RowId, Tree

RENDERED_AGAIN = 8
"""Rows that an export renders once more: a template or tokenizer that differs does so in most."""


@dataclass(frozen=True)
class Prepared:
    """Trees by set ("train" first), the account of each, which rows repeat an earlier one, and what
    was measured before step 1, is suspicious, and will not be watched.

    `examples` are the trees' rows as text, for who compares the two, and `rows` a few of those
    trained on: what an export is asked to render. `split` says how many prompts were held out of
    the data.
    """

    def __repr__(self) -> str:
        return "\n".join(account_lines(self))

    trees: dict[str, list[Tree]]
    accounts: dict[str, Account]
    renderer: Renderer
    copies: Mapping[str, Mapping[RowId, RowId]]
    findings: tuple[Finding, ...] = ()
    rows: tuple[Example, ...] = ()
    examples: dict[str, list[Example]] = field(default_factory=dict[str, list[Example]])
    figures: Mapping[str, Figures] = field(default_factory=dict[str, Figures])
    unwatched: tuple[str, ...] = ()
    split: str | None = None

    def noticed(self, figures: Mapping[str, Figures], findings: Sequence[Finding]) -> Prepared:
        """With more figures of its sets, and more findings."""
        merged = {name: {**self.figures.get(name, {}), **more} for name, more in figures.items()}
        return replace(
            self, findings=(*self.findings, *findings), figures={**self.figures, **merged}
        )


def load_policy(run: Run) -> LanguageModel:
    return _loaded(load, run)


def load_scorer(run: Run) -> LanguageModel:
    """run.model with its scalar head. Raises ModelError where it is no reward model."""
    return _loaded(load_reward_model, run)


def _loaded(read: Callable[..., LanguageModel], run: Run) -> LanguageModel:
    if run.compute.threads:
        torch.set_num_threads(run.compute.threads)
    return read(
        run.model,
        device=run.compute.device,
        dtype=run.compute.dtype,
        path=run.compute.attention,
        sharing=run.compute.sharing,
        trust_remote_code=run.compute.trust_remote_code,
        quantize=None if run.lora is None else run.lora.quantize,
    )


def prepare(run: Run, lm: LanguageModel, sets: Sets | None = None) -> Prepared:
    """Renders and tokenizes every row of `sets`, or of those that it reads; each is in an account.

    Raises DataError when a set has nothing to use, Refusal UW209 when a prompt is on both sides.
    """
    renderer = renderer_for(run, lm)
    sets = sets or read_sets(run)
    (train, account), held = sets.train, sets.held

    def grown(rows: Sequence[Example], account: Account) -> list[Tree]:
        if KINDS[run.objective].draws:
            return plant(rows, renderer, account)
        return grow(rows, renderer, account)

    for rows in (train, *(rows for rows, _ in held.values())):
        require_rows_read(rows, renderer)
    trees, accounts = {"train": grown(train, account)}, {"train": account}
    repeats = {"train": copies(train)}
    require_used(account, f"data {', '.join(run.data.path)}")
    _require_margins(run, trees["train"])
    for name, (rows, its_account) in held.items():
        trees[name], accounts[name] = grown(rows, its_account), its_account
        repeats[name] = copies(rows)
        require_used(its_account, f"the evaluation set {name}")
    asked: list[Example] = []
    if sets.asked is not None:
        trees[PROMPTS], asked, accounts[PROMPTS] = _asked(run, renderer, *sets.asked)
        require_apart(PROMPTS, train, asked)
    own = [row for row in train if row.template_options][:1]
    rows = (*own, *train[:: max(1, len(train) // RENDERED_AGAIN)][:RENDERED_AGAIN])
    texts = {name: rows for name, (rows, _) in held.items()}
    near = tuple(nearly_apart(train, {**texts, PROMPTS: asked}))
    texts = {"train": train, **texts, **({PROMPTS: asked} if asked else {})}
    return Prepared(
        trees, accounts, renderer, repeats, near, rows=rows, examples=texts, split=sets.split
    )


def load_asked(run: Run, renderer: Renderer) -> tuple[list[Tree], list[Example], Account]:
    """The prompts of evaluation.prompt_files as trees, their rows, and the account of these.

    Raises DataError when there is nothing to use, Refusal UW109 for template options of a row's
    own that nothing reads.
    """
    return _asked(run, renderer, *load_prompts(run.evaluation.prompt_files or []))


def _asked(
    run: Run, renderer: Renderer, rows: list[Example], account: Account
) -> tuple[list[Tree], list[Example], Account]:
    require_rows_read(rows, renderer)
    trees = plant(rows, renderer, account)
    files = ", ".join(run.evaluation.prompt_files or [])
    require_used(account, f"evaluation.prompt_files {files}")
    return trees, rows, account


def ended_answers(prepared: Prepared, lm: LanguageModel) -> Prepared:
    """With a stop token behind answers that were cut, as a reward model reads them everywhere."""
    end = prepared.renderer.end
    trees = {
        name: [ended(tree, end, lm.max_length) for tree in found]
        for name, found in prepared.trees.items()
    }
    return replace(prepared, trees=trees)


def _require_margins(run: Run, trees: Sequence[Tree]) -> None:
    """Raises Refusal UW109 for a share of margins where no row has any."""
    if reads_margins(run) and not any(p.margin for tree in trees for p in tree.preferences):
        raise Refusal(
            "UW109",
            f"loss.margin is {write(run.loss.margin)}, and no row has a margin, or scores that "
            "make its preferences. Give pairs a column margin, or leave it out.",
        )


def account_record(prepared: Prepared) -> dict[str, object]:
    """account.json."""
    return {
        "template": prepared.renderer.template,
        "sets": {name: account.to_json() for name, account in prepared.accounts.items()},
        "findings": [asdict(finding) for finding in prepared.findings],
        "figures": {
            # Of a few prompts there is no interval.
            name: {figure: finite(asdict(value)) for figure, value in figures.items()}
            for name, figures in prepared.figures.items()
        },
        "unwatched": list(prepared.unwatched),
    }


def account_lines(prepared: Prepared) -> list[str]:
    """The account as a person reads it, one line per set."""
    day = prepared.renderer.date
    lines = [
        "text is rendered with the model's chat template"
        if prepared.renderer.template == "chat"
        else "text is used as it is, without a chat template"
    ]
    if day is not None:
        lines.append(
            f"the chat template may write the day's date: {day} in every row (data.date); a server "
            "writes its own"
        )
    for name, account in prepared.accounts.items():
        drops = ", ".join(f"{num} {reason}" for reason, num in account.dropped.items())
        cuts = {side: num for side, num in account.truncated.items() if num}
        parts = [
            f"{name}: {counted(account.read, 'row')} read = {account.used:,} used + "
            f"{sum(account.dropped.values()):,} dropped" + (f" ({drops})" if drops else ""),
            counted(account.preferences, "preference")
            if account.preferences
            else counted(account.responses, "response")
            if account.responses
            else "prompts alone",
        ]
        if name == "heldout" and prepared.split is not None:
            parts.append(prepared.split)
        if account.earlier_turns:
            parts.append(f"earlier turns of other rows: {account.earlier_turns:,}")
        if account.left_out:
            parts.append(
                "responses left out: "
                + ", ".join(f"{num} {reason}" for reason, num in account.left_out.items())
            )
        if cuts:
            parts.append("cut: " + ", ".join(f"{num} {side}" for side, num in cuts.items()))
        for label, num in (
            ("stop tokens appended", account.appended_stop),
            ("stop tokens cut off", account.truncated["response"]),
            ("responses that did not stop, by their rows", account.unfinished),
            ("boundaries repaired", account.boundary_repaired),
            ("rewritten by the template", account.rewritten),
            ("with special tokens in the prompt", account.special_in_prompt),
            ("duplicate rows", account.duplicates),
            ("prompts taken from what both texts begin with", len(account.shared_prompts)),
            ("without a prompt where others have one", len(account.unprompted)),
        ):
            if num:
                parts.append(f"{num} {label}")
        for column, num in account.unused_columns.items():
            parts.append(f"column {column} is not read ({counted(num, 'row')})")
        lines.append("; ".join(parts))
        lines += _length_lines(name, account)
    return lines


def _length_lines(name: str, account: Account) -> list[str]:
    """Half of the prompts and responses are shorter than the first number, one in 100 longer than
    the second."""
    found = {side: percentiles(lengths) for side, lengths in account.lengths.items() if lengths}
    sides = [f"{side} {p['p50']} / {p['p99']} / {p['max']}" for side, p in found.items()]
    return [f"{name}: tokens (median / 99 % / most): {', '.join(sides)}"] if sides else []


def figure_lines(figures: Mapping[str, Figures]) -> list[str]:
    """What was measured of each set, one line per figure."""
    return [
        f"{name}: {_figure(figure, value)} {FIGURES[figure]}"
        for name, found in figures.items()
        for figure, value in found.items()
    ]


def _figure(name: str, value: Interval) -> str:
    shown = "{:.1%}"
    if name.endswith("_nats"):
        shown = "{:.2f}" if abs(value.value) > 0.01 else "{:.0e}"
    said = shown.format(value.value)
    if value.low < value.high:
        said += f" [{shown.format(value.low)}, {shown.format(value.high)}]"
    return said


def fill_reference(
    run: Run,
    model: LanguageModel,
    trees: Sequence[Tree],
    screen: Screen,
    steps: Sequence[Sequence[Tree]] = (),
) -> Reference:
    """The reference's log-probs for all trees, from the cache where it has them. Those of `steps`
    are read as training reads them.

    `model` is the reference. A handful of the rows that were known is recomputed; Refusal UW107
    when they differ.
    """
    reference = open_reference(fingerprint(model), model)
    # Before fill(): what it computes, known rows of a step's bins among it, agrees with `model`
    # whatever the cache held.
    unknown = set(map(id, reference.missing(trees)))
    known = [tree for tree in trees if id(tree) not in unknown]
    if known:
        verify(reference, model, known)
    computed = fill(
        reference,
        model,
        trees,
        tokens_read_at_once(run, model),
        screen.progress,
        on_smaller=functools.partial(note_smaller, screen, "the reference pass"),
        steps=steps,
    )
    screen.note(
        f"reference: {counted(computed, 'response')} computed, {len(known):,} of "
        f"{counted(len(trees), 'prompt')} known from before (kept in {reference.folder})"
    )
    return reference


def note_smaller(screen: Screen, what: str, tokens_per_bin: int) -> None:
    screen.note(f"{what} ran out of memory: going on with bins of {tokens_per_bin:,}")


def tokens_read_at_once(run: Run, lm: LanguageModel) -> int:
    """batch.tokens_per_bin, or what is enough for speed where nothing is kept for a gradient."""
    return run.batch.tokens_per_bin or enough_tokens(lm)


def describe(lm: LanguageModel) -> str:
    total = num_weights(lm.model)
    trained = sum(p.numel() for p in lm.model.parameters() if p.requires_grad)
    share = "all trained" if trained == total else f"{trained:,} trained"
    if packed := sum(x.in_features * x.out_features for x in quantized_layers(lm.model)):
        share += f", {packed:,} in nf4"
    dtype = str(lm.compute_dtype).removeprefix("torch.")
    return (
        f"{total:,} parameters ({share}), products in {dtype} on {lm.device}; {lm.plan.describe()}"
    )
