"""The reference is data: its per-token log-probs, computed once, kept by content, shared by runs.

A response's key is the sha256 of the reference's fingerprint and of exactly the token ids that the
model saw. Changing beta, loss, learning rate, batch or packing finds everything again; changing a
template, a truncation or a weight finds nothing that it should not.

On disk: one folder per reference, header.json and Parquet parts of (key, fp32 log-probs).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from jaxtyping import Float
from torch import Tensor

from upweight.data.pack import bins_of_step, collate, merge_same_prompts, num_tokens
from upweight.errors import OutputError, Refusal
from upweight.models.finite import finite
from upweight.models.load import LanguageModel
from upweight.models.logprobs import token_logps
from upweight.models.named import cache_dir
from upweight.models.reading import read_trees
from upweight.types import Forest, Tree

SCHEMA = pa.schema([("key", pa.binary(32)), ("logps", pa.list_(pa.float32()))])

TOLERANCE_NATS = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float64: 1e-8}
"""Mean difference per token, over a response, that rounding explains when rows are packed anew.

In bf16 a hidden state is rounded to 8 bits of mantissa at each of some sixty products, which
moves one token's log-prob by a few hundredths; a shifted row or another model moves it by nats.
A few tokens may all be unlucky (`explained`).
"""


def explained(tolerance: float, num_tokens: int) -> float:
    """What rounding explains of a mean size over so many tokens, `tolerance` being that of many.

    Tokens round nearly independently, each by its mean size give or take about as much, so that a
    mean of n scatters by that over sqrt(n); four such are held.
    """
    return tolerance * (1 + 4 / math.sqrt(num_tokens))


def response_key(fingerprint: str, prompt: Sequence[int], response: Sequence[int]) -> bytes:
    digest = hashlib.sha256(fingerprint.encode())
    digest.update(len(prompt).to_bytes(8, "little"))
    digest.update(array("q", prompt).tobytes())
    digest.update(array("q", response).tobytes())
    return digest.digest()


@dataclass
class Reference:
    """Log-probs of the reference that `fingerprint` names; `folder` is where they are kept."""

    fingerprint: str
    folder: Path
    table: dict[bytes, np.ndarray] = field(default_factory=dict[bytes, np.ndarray], repr=False)

    def logps(self, forest: Forest) -> Float[Tensor, " scored"]:
        """Per-token log-probs in the order of forest.scored, fp32, on the CPU."""
        rows = [self.table[key] for key in self._keys(forest.trees)]
        return torch.from_numpy(np.concatenate(rows)) if rows else torch.zeros(0)

    def token_logps(self, tree: Tree, response: int) -> np.ndarray:
        """One response's log-probs, token by token, in nats."""
        return self.table[response_key(self.fingerprint, tree.prompt, tree.responses[response])]

    def missing(self, trees: Sequence[Tree]) -> list[Tree]:
        """The trees of which some response is not known yet."""
        return [t for t in trees if any(key not in self.table for key in self._keys([t]))]

    def _keys(self, trees: Sequence[Tree]) -> list[bytes]:
        return [response_key(self.fingerprint, t.prompt, r) for t in trees for r in t.responses]

    def take(self, forest: Forest, logps: Float[Tensor, " scored"]) -> list[bytes]:
        """Remember a forest's log-probs; the keys that were new."""
        lengths = forest.tokens_per_response.tolist()
        rows = np.split(logps.float().cpu().numpy(), np.cumsum(lengths)[:-1])
        fresh: list[bytes] = []
        for key, row in zip(self._keys(forest.trees), rows, strict=True):
            if key not in self.table:
                fresh.append(key)
            self.table[key] = row
        return fresh


def open_reference(fingerprint: str, lm: LanguageModel, root: Path | None = None) -> Reference:
    """What is known already of the reference with this fingerprint; an empty one if nothing is.

    A part that cannot be read (a disk that filled up in an old version, say) is computed anew, and
    so are log-probs that are no finite numbers.
    Raises OutputError when the cache cannot be written.
    """
    folder = (root or cache_dir() / "reference") / fingerprint[:32]
    header = {
        "fingerprint": fingerprint,
        "model": lm.name,
        "compute_dtype": str(lm.compute_dtype).removeprefix("torch."),
        "attention": lm.plan.describe(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "header.json").exists():
            _write(folder / "header.json", json.dumps(header, indent=1).encode())
    except OSError as error:
        raise OutputError(
            f"the reference cache {folder} cannot be written: {error.strerror}. "
            "Set UPWEIGHT_CACHE to a folder that can."
        ) from error
    reference = Reference(fingerprint, folder)
    for part in sorted(folder.glob("part-*.parquet")):
        try:
            columns = pq.read_table(part, schema=SCHEMA)
        except (OSError, pa.ArrowInvalid):
            part.unlink(missing_ok=True)
            continue
        values = columns["logps"].combine_chunks()
        flat = values.flatten().to_numpy(zero_copy_only=False)
        offsets = values.offsets.to_numpy() - values.offsets[0].as_py()
        for i, key in enumerate(columns["key"].to_pylist()):
            logps = flat[offsets[i] : offsets[i + 1]]
            if np.isfinite(logps).all():
                reference.table[key] = logps
    return reference


def fill(
    reference: Reference,
    lm: LanguageModel,
    trees: Sequence[Tree],
    tokens_per_bin: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    seconds_per_part: float = 60.0,
    on_smaller: Callable[[int], None] = lambda tokens_per_bin: None,
    steps: Sequence[Sequence[Tree]] = (),
) -> int:
    """Compute what is missing with `lm` as it stands; returns the number of responses computed.

    Trees of `steps`, which are among `trees`, are read in the bins that training makes of each
    step: half-precision log-probs move with the bin, and the first steps are then measured against
    what the policy itself said.

    `lm` must be the reference: the model before its first step, or its adapter switched off.
    Written about once a minute, so that a pass that is cut off goes on where it was.
    `on_progress(done, total)` counts tokens; `on_smaller` is told of bins that had to be halved.
    """
    packed = [group for step in steps for group in bins_of_step(step, tokens_per_bin)]
    together = sorted(filter(reference.missing, packed), key=num_tokens, reverse=True)
    in_steps = {id(tree) for step in steps for tree in step}
    others = [tree for tree in trees if id(tree) not in in_steps]
    todo = merge_same_prompts(reference.missing(others), tokens_per_bin)
    todo.sort(key=lambda tree: tree.num_tokens, reverse=True)
    total = num_tokens(todo) + sum(map(num_tokens, together))
    done, computed, last = 0, 0, time.monotonic()
    fresh: list[bytes] = []
    with torch.no_grad():
        asked = finite(token_logps, lm)
        for forest, logps in read_trees(asked, todo, tokens_per_bin, on_smaller, together):
            keys = reference.take(forest, logps)
            fresh += keys
            computed += len(keys)
            done += forest.num_tokens
            on_progress(done, total)
            if time.monotonic() - last > seconds_per_part:
                _write_part(reference, fresh)
                fresh, last = [], time.monotonic()
    _write_part(reference, fresh)
    return computed


def _write_part(reference: Reference, keys: list[bytes]) -> None:
    if not keys:
        return
    table = pa.table({"key": keys, "logps": [reference.table[key] for key in keys]}, schema=SCHEMA)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    name = hashlib.sha256(b"".join(keys)).hexdigest()[:16]
    _write(reference.folder / f"part-{time.time_ns()}-{name}.parquet", sink.getvalue().to_pybytes())


def _write(path: Path, content: bytes) -> None:
    scratch = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".writing-", delete=False) as f:
            scratch = f.name
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(scratch, path)
    except OSError as error:
        if scratch:
            Path(scratch).unlink(missing_ok=True)
        raise OutputError(
            f"the reference cache {path} could not be written: {error.strerror}. Free some space, "
            "or set UPWEIGHT_CACHE to a folder on another disk."
        ) from error


@dataclass(frozen=True)
class Difference:
    """The mean size per token of a response, in nats, between what is kept and what a model says;
    what of it rounding explains; and the row."""

    found: float
    allowed: float
    row: str

    @property
    def is_rounding(self) -> bool:
        return self.found <= self.allowed


def largest_difference(
    reference: Reference, lm: LanguageModel, trees: Sequence[Tree], num: int = 8
) -> Difference:
    """Between what is kept and what `lm` says, over `num` trees, evenly spaced: that of the
    response which is furthest beyond rounding. Raises Refusal UW303 for what is no number."""
    step = max(1, len(trees) // num)
    tolerance = TOLERANCE_NATS[lm.compute_dtype]
    largest = Difference(0.0, tolerance, "")
    for tree in trees[::step][:num]:
        forest = collate([tree])
        with torch.no_grad():
            got = finite(token_logps, lm)(forest).cpu()
        apart = (got - reference.logps(forest)).abs().split(forest.tokens_per_response.tolist())
        for response, delta in zip(tree.ids, apart, strict=True):
            allowed = explained(tolerance, len(delta))
            here = Difference(delta.mean().item(), allowed, str(response.row))
            if not here.found / here.allowed <= largest.found / largest.allowed:
                largest = here
    return largest


def verify(reference: Reference, lm: LanguageModel, trees: Sequence[Tree], num: int = 8) -> float:
    """Recomputes `num` trees and compares; the largest difference that `largest_difference` finds.

    Raises Refusal UW107 where they differ by more than rounding: then what is kept is stale,
    shifted, or of another model, template or truncation, and training against it would be silently
    wrong.
    """
    largest = largest_difference(reference, lm, trees, num)
    if not largest.is_rounding:
        raise Refusal(
            "UW107",
            f"the reference log-probs kept in {reference.folder} are not this reference's: "
            f"{largest.row} differs by {largest.found:.3g} nats per token when recomputed "
            f"(rounding: {largest.allowed:.2g}). Delete that folder to compute them again.",
        )
    return largest.found
