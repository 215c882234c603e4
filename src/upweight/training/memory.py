"""What a step will need, before it is taken: weights, gradients, moments, activations of a bin."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from upweight.data.pack import collate
from upweight.models.head import kept_bytes
from upweight.models.load import LanguageModel
from upweight.models.logprobs import token_logps
from upweight.types import Forest, ResponseId, RowId, Tree

TOKENS_PER_BIN = {"cpu": 2048, "cuda": 32768}
"""Where a larger bin is no faster: products of this many rows are at the device's limit."""

TOKENS_PER_MASK = 4096
"""Of the dense path: its mask and scores grow with the square of a bin's tokens."""

SHARE = 0.8
"""Of the free memory, what is planned with. The rest is for what a plan does not see: temporary
tensors, and holes between those of unequal size."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that training needs. `free` is what the device had before gradients and moments were
    there, None where it cannot be asked; `longest` is the tokens of the longest tree, which may be
    more than `tokens_per_bin`, and `tokens_per_step` the most that a step has. `per_scored` is
    kept for each scored token, up to `most_scored` of all. `beside` is what else is held, by what
    it is: other models of the run, with what their training needs. `host_per_token` is what waits
    in host memory instead, of which `host_free` is left."""

    tokens_per_bin: int
    longest: int
    tokens_per_step: int
    weights: int
    gradients: int
    moments: int
    fixed: int
    per_token: int
    per_scored: int
    scored_share: float
    free: int | None
    most_scored: int | None = None
    beside: Mapping[str, int] = field(default_factory=dict[str, int])
    host_per_token: int = 0
    host_free: int | None = None

    def activations(self, num_tokens: int) -> int:
        """What the backward pass of a bin of so many tokens finds kept."""
        scored = num_tokens * self.per_scored * self.scored_share
        if self.most_scored is not None:
            scored = min(scored, self.most_scored)
        return self.fixed + int(num_tokens * self.per_token + scored)

    def fits(self, num_bytes: int) -> int | None:
        """The largest number of tokens whose activations are within `num_bytes`; None: any."""
        left = num_bytes - self.fixed
        each = self.per_token + self.per_scored * self.scored_share
        # Two slopes: up to where the head keeps the most, and from there on.
        slopes = [(left, each)]
        if self.most_scored is not None:
            slopes.append((left - self.most_scored, self.per_token))
        if any(slope == 0 for room, slope in slopes if room > 0):
            return None
        return max((int(room / slope) for room, slope in slopes if room > 0), default=0)

    @property
    def largest_bin(self) -> int:
        return min(max(self.tokens_per_bin, self.longest), self.tokens_per_step)

    @property
    def needed(self) -> int:
        """On top of the weights, which are there."""
        beside = sum(self.beside.values())
        return self.gradients + self.moments + beside + self.activations(self.largest_bin)

    def describe(self) -> str:
        parts = [
            f"weights {size(self.weights)}",
            f"gradients {size(self.gradients)}",
            f"AdamW {size(self.moments)}",
            f"activations {size(self.activations(self.largest_bin))} for {self.largest_bin:,} "
            f"tokens at once",
            *(f"{what} {size(num_bytes)}" for what, num_bytes in self.beside.items()),
        ]
        total = size(self.weights + self.needed)
        said = f"memory: about {total}"
        if self.host_per_token:
            waiting = size(self.largest_bin * self.host_per_token)
            said += f", and {waiting} of activations in host memory"
        if self.free is not None:
            said += f"; {size(self.free)} are free beside the weights"
            if self.needed > self.free:
                said += (
                    f". That is {size(self.needed - self.free)} too little: "
                    "compute.checkpointing=true, lora=true or a smaller data.max_length need less"
                )
        return f"{said}\n  = {' + '.join(parts)}"


def size(num_bytes: int) -> str:
    """As a person reads it: 1.5 GiB."""
    for unit, power in (("bytes", 0), ("KiB", 10), ("MiB", 20)):
        if num_bytes < 1000 << power:
            return f"{num_bytes / (1 << power):.0f} {unit}"
    return f"{num_bytes / (1 << 30):.1f} GiB"


def plan_memory(
    lm: LanguageModel,
    trees: Sequence[Tree],
    steps: Sequence[Sequence[int]],
    tokens_per_bin: int | None = None,
    moment_bytes: int = 4,
    forward: Callable[[LanguageModel, Forest], Tensor] = token_logps,
    *,
    beside: Mapping[str, int] | None = None,
    passes: int = 1,
) -> MemoryPlan:
    """What training `lm` on `trees` needs, from two small forward passes. `steps` has the trees of
    each step, by number; `moment_bytes` is what each of AdamW's two takes for a weight, and
    `forward` what is differentiated. `beside` is what else is held (MemoryPlan), and `passes` how
    many models of the policy's size keep activations for one backward pass.

    Without `tokens_per_bin`, bins are as large as fits, up to where larger ones are no faster.
    """
    per_scored, most_scored = kept_bytes(lm) if forward is token_logps else (0, None)
    small, large = (_kept(lm, times, forward) for times in (1, 3))
    num_tokens = _probe().num_tokens
    per_token = max(0, large - small) // (2 * num_tokens)
    # Of what is kept in host memory, one layer's is on the device at a time.
    layers = _num_layers(lm) if lm.offload else 1
    parameters = list(lm.model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    all_tokens = sum(tree.num_tokens for tree in trees)
    scored = sum(len(response) for tree in trees for response in tree.responses)
    plan = MemoryPlan(
        tokens_per_bin=tokens_per_bin or enough_tokens(lm),
        longest=max((tree.num_tokens for tree in trees), default=0),
        tokens_per_step=max((sum(trees[i].num_tokens for i in step) for step in steps), default=0),
        weights=_bytes(parameters),
        gradients=_bytes(trained),
        moments=2 * moment_bytes * sum(p.numel() for p in trained),
        fixed=passes * max(0, small - per_token * num_tokens),
        per_token=passes * (per_token // layers),
        per_scored=per_scored,
        scored_share=scored / max(1, all_tokens),
        free=free_bytes(lm.device),
        most_scored=most_scored,
        beside=beside or {},
        host_per_token=passes * _moved_per_token(lm, forward) if lm.offload else 0,
        host_free=free_bytes(torch.device("cpu")) if lm.offload else None,
    )
    if tokens_per_bin is not None or plan.free is None:
        return plan
    others = sum(plan.beside.values())
    fits = plan.fits(int(plan.free * SHARE) - plan.gradients - plan.moments - others)
    if plan.host_free is not None and plan.host_per_token:
        waiting = int(plan.host_free * SHARE) // plan.host_per_token
        fits = waiting if fits is None else min(fits, waiting)
    if fits is None:
        return plan
    # In whole steps, so that a few bytes more or less do not change a run.
    fits = max(256, fits // 256 * 256)
    return replace(plan, tokens_per_bin=min(plan.tokens_per_bin, fits))


def enough_tokens(lm: LanguageModel) -> int:
    """The tokens of a bin from which on a larger one is no faster."""
    enough = TOKENS_PER_BIN.get(lm.device.type, 2048)
    dense = lm.plan.shared and lm.plan.attention == "dense"
    return min(enough, TOKENS_PER_MASK) if dense else enough


def _num_layers(lm: LanguageModel) -> int:
    num = getattr(lm.causal.config, "num_hidden_layers", 1)
    return max(1, num if isinstance(num, int) else 1)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def free_bytes(device: torch.device, root: Path = Path("/")) -> int | None:
    """What can be allocated on the device; None where that cannot be asked. `root` is where /proc
    and /sys are."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    with contextlib.suppress(OSError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return min([int(line.split()[1]) * 1024, *_left_by_limits(root)])
    return None


@dataclass(frozen=True)
class _Groups:
    """Where control groups are, their files of limit and use, and the statistic of cached files,
    which are in use and give way."""

    folder: str
    limit: str
    used: str
    cached: str


GROUPS = {
    "": _Groups("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": _Groups(
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}
"""By the controller that /proc/self/cgroup names; version 2 names none."""


def _left_by_limits(root: Path) -> list[int]:
    """What each control group that this process is in leaves it: a container's limit, of which
    /proc/meminfo, the host's, says nothing."""
    found: list[int | None] = []
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, own = line.split(":", 2)
            # A container may see its own group as the top, whatever it is called outside.
            group = Path(own.lstrip("/"))
            for name in GROUPS.keys() & set(controllers.split(",")):
                groups = GROUPS[name]
                above = (root / groups.folder / at for at in (group, *group.parents))
                found += [_left_in(folder, groups) for folder in above]
    return [left for left in found if left is not None]


def _left_in(folder: Path, groups: _Groups) -> int | None:
    """None where there is no such group, or no limit."""
    with contextlib.suppress(OSError, ValueError):
        most, used = (int((folder / file).read_text()) for file in (groups.limit, groups.used))
        lines = (folder / "memory.stat").read_text().splitlines()
        cached = dict(line.split() for line in lines).get(groups.cached, "0")
        return max(0, most - used + int(cached))
    return None


def _probe() -> Tree:
    """A prompt with two responses; all tokens are the same."""
    row = RowId("probe", 0)
    return Tree(
        prompt=(0,) * 32,
        responses=((0,) * 32, (0,) * 32),
        preferences=(),
        ids=(ResponseId(row, 0), ResponseId(row, 1)),
        stopped=(True, True),
    )


def _moved_per_token(lm: LanguageModel, forward: Callable[[LanguageModel, Forest], Tensor]) -> int:
    """Bytes of a token that wait in host memory, where each product keeps a copy of its own."""
    small, large = (_kept(lm, times, forward, copies=True) for times in (1, 3))
    return max(0, large - small) // (2 * _probe().num_tokens)


def _kept(
    lm: LanguageModel,
    times: int,
    forward: Callable[[LanguageModel, Forest], Tensor],
    *,
    copies: bool = False,
) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights aside: each storage once, or
    as often as it is kept."""
    weights = {p.untyped_storage().data_ptr() for p in lm.model.parameters()}
    kept: dict[int, int] = {}
    held: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            own = len(held) if copies else storage.data_ptr()
            kept[own] = tensor.nbytes if copies else storage.nbytes()
            held.append(tensor.detach())  # an address that is freed would be another tensor's
        # Without its graph, which would hold this function, and with it itself, for good.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward(lm, collate([_probe()] * times))
    held.clear()
    return sum(kept.values())
