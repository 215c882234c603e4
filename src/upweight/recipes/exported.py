"""A model that was exported, against the probes that travel with it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from upweight.config import Run
from upweight.data.pack import collate
from upweight.errors import DataError, Refusal
from upweight.models.load import LanguageModel
from upweight.models.probes import FILE, Probes, probe_trees, read_probes, require_same_probes
from upweight.models.proof import TOLERANCE_NATS, one_at_a_time

PLAINLY = 2
"""So many times nearer to the start is the start. Rounding moves a model in any direction: one that
has learned less than it is rounded by is about as far from the one as from the other."""


@dataclass(frozen=True)
class Compared:
    """How many probes were compared, the largest difference of a token's log-prob, and what the
    rounding of the weights explains, in nats; and why what was learned may be lost all the same."""

    num_probes: int
    worst: float
    allowed: float
    doubt: str | None = None


def probes_beside(name: str) -> Path:
    """The file of probes of the model in a folder, or of the file of weights."""
    path = Path(name).expanduser()
    return (path.parent if path.is_file() else path) / FILE


def day_of_export(name: str) -> str | None:
    """The day that an exported model's prompts were of in training; None where nothing says it."""
    file = probes_beside(name)
    return read_probes(file).date if file.is_file() else None


def require_as_exported(name: str, lm: LanguageModel, probes: Probes) -> Compared:
    """Raises Refusal UW402 where the tokenizer and template of `lm` write other tokens than the
    probes have, UW401 where it gives other log-probs, DataError for another model's probes."""
    largest = max(max(*p.prompt_ids, *p.response_ids) for p in probes.probes)
    if largest >= lm.vocab_size:
        raise DataError(
            f"{probes_beside(name)} has the token id {largest:,}, and {name} has "
            f"{lm.vocab_size:,} tokens: it is another model's. Copy the {FILE} that this one was "
            "exported with."
        )
    require_same_probes(name, lm.tokenizer, probes)
    known = torch.tensor([x for probe in probes.probes for x in probe.logps])
    found = one_at_a_time(lm, collate(probe_trees(probes))).cpu()
    worst, allowed = (found - known).abs().max().item(), _rounding(Path(lm.folder))
    if not worst <= allowed:
        raise Refusal(
            "UW401",
            f"{name} is not the model that was exported: a token's log-prob is {worst:.3g} "
            f"nats off (rounding of its weights: {allowed}).",
        )
    return Compared(len(probes.probes), worst, allowed, _what_is_left(name, found, probes))


def _what_is_left(name: str, found: Tensor, probes: Probes) -> str | None:
    """Where rounding explains a difference, it may have taken what was learned with it: why that
    may be so. Raises Refusal UW401 where the model is plainly the one that training began with."""
    start = torch.tensor([x for probe in probes.probes for x in probe.start_logps])
    if not len(start):
        return None
    trained = torch.tensor([x for probe in probes.probes for x in probe.logps])
    to_trained, to_start = (_apart(found, other) for other in (trained, start))
    if to_start >= to_trained:
        return None
    said = (
        f"{name} is nearer to the model that training began with ({to_start:.2g} nats a token on "
        f"its probes) than to the trained one ({to_trained:.2g} nats)"
    )
    if PLAINLY * to_start < to_trained:
        raise Refusal(
            "UW401",
            f"{said}: what was learned is not in it. It is the start itself, or was rounded back "
            "to it: keep a model in float32 whose updates are smaller than that.",
        )
    return f"{said}: its rounding is as large as what was learned"


def _apart(one: Tensor, other: Tensor) -> float:
    """The root of the mean square, over all tokens."""
    return (one - other).square().mean().sqrt().item()


def require_start_as_exported(run: Run, name: str, lm: LanguageModel) -> None:
    """What a run starts from, or is held against, as `require_as_exported`; where it has no probes
    (a chat template may take none of the conversations), or is rounded to four bits now, there is
    nothing to compare.

    `lm` is the model as it was loaded, without the adapter that is trained.
    """
    file = probes_beside(name)
    if not file.is_file() or (run.lora is not None and run.lora.quantize is not None):
        return
    probes = read_probes(file)
    if not probes.probes:
        return
    try:
        require_as_exported(name, lm, probes)
    except Refusal as refusal:
        raise Refusal(
            str(refusal.code),
            f"{refusal.said} Put back the files that it was exported with (of an adapter: its "
            f"base too), or remove {file} if it was changed on purpose.",
        ) from None


def _rounding(folder: Path) -> float:
    """What the dtype that the weights are stored in explains. An adapter's base is read in fp32."""
    config = folder / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    stored = settings.get("dtype") or settings.get("torch_dtype") or "float32"
    return TOLERANCE_NATS.get(getattr(torch, str(stored), torch.float32), 0.0)
