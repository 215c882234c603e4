"""What draws the answers of rounds: this process, or a server that has to prove itself first."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import replace

import torch

from upweight.errors import ConfigError, ModelError, Refusal
from upweight.models.export import findable_base
from upweight.models.finite import finite
from upweight.models.load import evaluation_mode
from upweight.models.logprobs import token_logps
from upweight.models.reference import TOLERANCE_NATS
from upweight.models.served import Server, handed_over, require_processed
from upweight.recipes.plan import rollout_sizes
from upweight.recipes.state import State, smaller_bins
from upweight.training.agreement import Beside, held_against
from upweight.training.rollout import by_response, draw_answers
from upweight.training.round import ByResponse
from upweight.types import Tree

PROMPTS = 4
"""How many a server is asked before step 1."""

MOVED_NATS = 0.5
"""How much an adapter must change a token's log-prob, in the mean, to be told from none: five times
what rounding explains in bf16."""


def server_of(state: State) -> Server | None:
    """The server that the run names, after it has proved that it draws from what it is handed.

    A fresh adapter is the identity: a server that ignores it would be found when training has moved
    it far. So one that moves every layer is handed over first. Raises Refusal UW101 for a server
    that draws from something else, ModelError for one that does not answer, ConfigError for a start
    that no server can hold.
    """
    run, lm = state.run, state.lm
    if run.rollout.server is None:
        return None
    if findable_base(lm) is None:
        raise ConfigError(
            f"rollout.server: no server can hold {run.model}, an adapter or a converted file whose "
            "weights are put together here. Name a folder with whole weights: export.merge=true "
            "writes one, and so is the base/ beside an exported adapter."
        )
    server = Server(run.rollout.server, state.rundir.file("rollouts"))
    prompts = state.begun.prepared.trees["train"][:PROMPTS]
    stop_ids = sorted(state.begun.prepared.renderer.stop_ids)
    sizes = replace(rollout_sizes(run), responses=2)
    sizes = replace(sizes, max_tokens=min(16, sizes.max_tokens))
    ours, _ = draw_answers(lm, prompts, 0, sizes, stop_ids)
    with moved(state, ours):
        with handed_over(server, lm) as adapter:
            require_processed(server, adapter, prompts[0].prompt)
        trees, said = draw_answers(lm, prompts, 0, sizes, stop_ids, server)
        compared = held_against(_logps(state, trees), said, TOLERANCE_NATS[lm.compute_dtype])
        require_same_policy(compared, server.url)
    state.screen.note(f"rollout.server: {server.url} draws from the adapter that it is handed")
    return server


@contextlib.contextmanager
def moved(state: State, trees: Sequence[Tree]) -> Generator[None]:
    """The adapter of the policy away from its start, by so much that these answers show it."""
    lm = state.lm
    outer = {n: p for n, p in lm.model.named_parameters() if ".lora_B." in n}
    kept = {name: parameter.detach().clone() for name, parameter in outer.items()}
    draw = torch.Generator().manual_seed(state.run.seed)
    ways = {name: torch.randn(p.shape, generator=draw).to(p) for name, p in kept.items()}
    before = torch.cat(list(_logps(state, trees).values()))
    size = 0.002
    try:
        while True:
            with torch.no_grad():
                for name, parameter in outer.items():
                    parameter.copy_(kept[name] + size * ways[name])
            by = (torch.cat(list(_logps(state, trees).values())) - before).abs().mean().item()
            if by >= MOVED_NATS:
                break
            if size > 1:
                raise ModelError(
                    f"rollout.server: an adapter that is moved by {size:.1g} changes log-probs by "
                    f"{by:.2g} nats a token alone, which no server could be asked to show."
                )
            size *= 2
        yield
    finally:
        with torch.no_grad():
            for name, parameter in outer.items():
                parameter.copy_(kept[name])


def _logps(state: State, trees: Sequence[Tree]) -> ByResponse:
    lm = state.lm

    def smaller(tokens_per_bin: int) -> None:
        smaller_bins(state, "rollout.server", tokens_per_bin)

    with evaluation_mode(lm):
        read = finite(token_logps, lm)
        return by_response(read, trees, state.tokens_per_bin, smaller)


def require_same_policy(compared: Sequence[Beside], server: str | None = None) -> None:
    """What drew the answers must be what is trained: raises Refusal UW101 otherwise."""
    worst = max(compared, key=lambda beside: beside.beyond)
    if worst.agrees:
        return
    who = "the sampler" if server is None else f"what draws at {server}"
    what = "" if server is None else " It has to hold the same model, in compute.dtype."
    raise Refusal(
        "UW101",
        f"{who} is not the policy: {worst.said} (rounding: {worst.allowed:.2g}).{what}",
    )
