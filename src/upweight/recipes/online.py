"""PPO, GRPO, RLOO and online DPO: the policy answers, the answers are scored, fit() learns."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from upweight.config import Run
from upweight.data.trees import text_after
from upweight.errors import DataError, OutputError
from upweight.models.finite import finite
from upweight.models.frozen import Frozen
from upweight.models.head import head_logps
from upweight.models.load import LanguageModel, evaluation_mode
from upweight.models.logprobs import scored_hidden, token_logps
from upweight.models.offload import offloaded
from upweight.models.reference import TOLERANCE_NATS
from upweight.models.scalar import (
    score_head,
    state_values,
    with_scalar_head,
)
from upweight.models.served import Server
from upweight.recipes.drawing import require_same_policy, server_of
from upweight.recipes.kinds import KINDS
from upweight.recipes.losses import pair_loss
from upweight.recipes.plan import rollout_sizes
from upweight.recipes.prepare import load_policy
from upweight.recipes.reference import reference_model
from upweight.recipes.rewarding import Scorer, is_judge, make_scorer, reward_model_beside
from upweight.recipes.start import trained
from upweight.recipes.state import State, Values, Work, smaller_bins, write_account
from upweight.recipes.unwatched import by_first_round, told
from upweight.training.agreement import held_against
from upweight.training.loop import Record
from upweight.training.objectives import Surrogate, of_round, pair, policy_gradient
from upweight.training.rollout import (
    Credit,
    Rollouts,
    by_response,
    credited,
    draw_answers,
    ranked,
    texts_of,
)
from upweight.training.round import Round, Spent, read_round, write_round
from upweight.training.rundir import replacing
from upweight.types import Forest, Tree

TRIES = 8
"""Rounds in a row without a preference, after which online DPO stops: the reward tells no answers
apart."""

Asked = Callable[[int], Sequence[Tree]]


def values_of(run: Run, lm: LanguageModel, stop_ids: Sequence[int]) -> Values | None:
    """The value model of a PPO run, None for other objectives.

    A trunk of its own is the reward model's where there is one, else the policy's; a shared one is
    the policy's. The head starts as zeros: a reward model has learned what whole answers are
    worth, and is further off for their beginnings than a constant is (LOG.md, 2026-11-24).
    """
    if run.objective != "ppo":
        return None
    if run.policy.value == "shared":
        width = scored_width(lm)
        head = nn.Linear(width, 1, bias=False, device=lm.device)
        nn.init.zeros_(head.weight)
        return Values(None, head)
    spec = run.rollout.reward
    as_trained = functools.partial(trained, run, stop_ids=stop_ids)
    if spec is not None and is_judge(spec):
        quantize = None if run.lora is None else run.lora.quantize
        critic = reward_model_beside(lm, spec, run, as_trained, quantize)
    else:
        critic = with_scalar_head(as_trained(load_policy(run)), stop_ids, run.seed)
    nn.init.zeros_(score_head(critic.model).weight)
    return Values(critic, critic.model)


def scored_width(lm: LanguageModel) -> int:
    head = lm.causal.get_output_embeddings()
    assert head is not None
    return next(head.parameters()).shape[1]


def online(state: State) -> Work:
    """The work of a run that learns from its own answers."""
    run, lm = state.run, state.lm
    reward, judged_by = run.rollout.reward, run.evaluation.true_reward
    assert reward is not None, "require_rewards comes first"
    start = Reference.of(state)
    # Most runs are judged by what they are trained on: a reward model is then loaded once.
    same = state.judge is not None and judged_by in (None, reward)
    end = state.begun.prepared.renderer.end
    score = state.judge if state.judge is not None and same else make_scorer(reward, run, lm, end)
    rollouts = Rollouts(
        prompts=state.begun.prepared.trees["train"],
        sizes=rollout_sizes(run),
        folder=state.rundir.file("rollouts"),
        make=functools.partial(_round, state, score, start, server_of(state)),
        beta=run.loss.beta,
        kl_target=run.policy.kl_target,
        kl_stop=run.policy.kl_stop,
        epochs=None if run.steps is not None else run.epochs,
    )
    if run.objective == "online_dpo":
        objective = pair(
            lambda forest: rollouts.now.experience(forest).reference_logps,
            pair_loss(run),
            run.loss.beta,
        )
    else:
        objective = policy_gradient(
            lambda forest: rollouts.now.experience(forest),
            _surrogate(run),
            functools.partial(_read, state),
            lambda: rollouts.beta,
        )
    objective = of_round(objective, _shown(rollouts, start))
    session = Session(rollouts, start, functools.partial(_say_unwatched, state))
    return Work(objective, rollouts.trees, rounds=session)


def _shown(rollouts: Rollouts, start: Reference) -> Callable[[], Mapping[str, float]]:
    """What the records say of the round. `reference/renewed`: the share of their steps that learn
    from a round which its own reference drew, so that log-ratios begin at exactly 0."""
    if start.every is None:
        return lambda: rollouts.now.means
    return lambda: {**rollouts.now.means, "reference/renewed": float(start.drew)}


def _surrogate(run: Run) -> Surrogate:
    kind, options = KINDS[run.objective], run.policy
    estimator = options.kl_estimator or kind.kl
    shared = run.objective == "ppo" and options.value == "shared"
    return Surrogate(
        clip_low=options.clip_low,
        clip_high=options.clip_high,
        aggregation=options.aggregation or kind.aggregation,
        max_tokens=run.rollout.max_tokens,
        kl=None if run.objective == "ppo" or estimator == "k1" else estimator,
        value_clip=options.value_clip,
        value_coefficient=options.value_coefficient if shared else 1.0,
    )


def _credit(run: Run) -> Credit:
    kind, options = KINDS[run.objective], run.policy
    estimator = options.kl_estimator or kind.kl
    in_loss = run.objective != "ppo" and estimator != "k1"
    return Credit(
        group=options.advantages or kind.group,
        kl=None if in_loss else estimator,
        discount=options.discount,
        trace=options.trace,
        whiten=options.whiten,
    )


def _read(state: State, lm: LanguageModel, forest: Forest) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the forest's tokens, and their values where there is a value model."""
    values = state.values
    if values is None:
        return token_logps(lm, forest), None
    if values.critic is not None:
        logps = token_logps(lm, forest)
        with offloaded(values.critic):  # which leaves this model's weights where they are
            return logps, state_values(values.critic, forest)
    hidden = scored_hidden(lm, forest)
    logps = (
        token_logps(lm, forest)
        if lm.plan.native_head
        else head_logps(lm, hidden, forest.token_ids[forest.scored])
    )
    assert isinstance(values.module, nn.Linear)
    return logps, hidden.float() @ values.module.weight[0].float()


def _round(
    state: State,
    score: Scorer,
    start: Reference,
    server: Server | None,
    asked: Asked,
    number: int,
    beta: float,
) -> Round:
    """A round with something to learn from: one without a preference is followed by the next."""
    spent = Spent()
    start.drew = False
    for at in range(number, number + TRIES):
        made = _draw(state, score, start, server, asked(at), at, beta)
        spent = spent.plus(made.spent)
        if made.trees:
            return replace(made, spent=spent)
        # For whoever asks why; what it took is counted with the round that follows.
        write_round(state.rundir.file("rollouts"), replace(made, spent=Spent()))
        state.screen.note(f"round {at}: every answer to a prompt scores the same; drawing anew")
    raise DataError(
        f"rollout.reward {state.run.rollout.reward} told no two answers to a prompt apart in "
        f"{TRIES} rounds: there is nothing to learn from it. Look at {state.rundir.path}/rollouts, "
        "and raise rollout.responses or take another reward."
    )


def _draw(
    state: State,
    score: Scorer,
    start: Reference,
    server: Server | None,
    prompts: Sequence[Tree],
    number: int,
    beta: float,
) -> Round:
    """One round: answers, rewards, log-probs then and of the reference, values, advantages."""
    run, lm = state.run, state.lm
    stop_ids = sorted(state.begun.prepared.renderer.stop_ids)
    trees, said = draw_answers(lm, prompts, number, rollout_sizes(run), stop_ids, server)
    scores = {
        i: value
        for tree, values in zip(trees, score(trees), strict=True)
        for i, value in zip(tree.ids, values, strict=True)
    }
    smaller = functools.partial(smaller_bins, state, f"round {number}")
    with evaluation_mode(lm):
        read = finite(lambda _, forest: _both(state, forest), lm, "log-probs or values")
        found = by_response(read, trees, state.tokens_per_bin, smaller)
    logps = {i: both[:, 0] for i, both in found.items()}
    values = None if state.values is None else {i: both[:, 1] for i, both in found.items()}
    require_same_policy(
        held_against(logps, said, TOLERANCE_NATS[lm.compute_dtype]), run.rollout.server
    )
    with start.in_round(lm, number) as reference:
        read = finite(token_logps, reference)
        known = by_response(read, trees, state.tokens_per_bin, smaller)
    made = Round(
        number=number,
        beta=beta,
        trees=tuple(trees),
        num_stopped=sum(sum(tree.stopped) for tree in trees),
        scores=scores,
        logps=logps,
        reference_logps=known,
        advantages={i: torch.zeros_like(x) for i, x in logps.items()},
        values=values,
        stop_penalty=run.rollout.stop_penalty,
        texts={
            name: text
            for tree in trees
            for name, text in zip(tree.ids, texts_of(lm, tree), strict=True)
        },
        prompt_texts={p.ids[0].row: text_after((), p.prompt, lm.tokenizer) for p in prompts},
        spent=Spent(
            asked=len(prompts),
            drawn=len(logps),
            computed=sum(tree.num_tokens for tree in trees) * _times_read(state),
        ),
    )
    if number == 1:
        _say_unwatched(state, made)
        write_account(state)
    if run.objective == "online_dpo":
        return ranked(made)
    return credited(made, _credit(run))


def _say_unwatched(state: State, first: Round) -> None:
    """What the first round's answers leave unseen of later ones."""
    num_prompts = len({name.row for name in first.logps})
    said = by_first_round(state.run, first.num_stopped / len(first.logps), num_prompts)
    state.begun = replace(state.begun, prepared=told(state.begun.prepared, said, state.screen))


def _times_read(state: State) -> int:
    """How often a token of a round goes through a model: it is drawn, and read by the policy, the
    reference, a value model of its own and a reward model."""
    own = state.values is not None and state.values.critic is not None
    return 3 + own + is_judge(state.run.rollout.reward)


def _both(state: State, forest: Forest) -> Float[Tensor, "scored 2"]:
    """Log-prob and value of each token, the latter 0 where there is no value model."""
    logps, values = _read(state, state.lm, forest.to(state.lm.device))
    return torch.stack([logps, torch.zeros_like(logps) if values is None else values], dim=1)


@dataclass
class Reference:
    """What a run of rounds is measured against: the policy's start or a named model, and after
    `renewed` the policy as it was then. `drew`: the policy has not moved from it when it drew the
    round that is learned from, which may be a later one than was renewed before."""

    fixed: LanguageModel | None
    frozen: Frozen
    folder: Path
    every: int | None
    device: str
    renewed: int = 0
    drew: bool = False

    @staticmethod
    def of(state: State) -> Reference:
        """To be called before a checkpoint is restored: the policy is at its start."""
        run, lm = state.run, state.lm
        fixed, frozen = None, Frozen()
        if run.reference is None:
            frozen = Frozen.of(lm)
        else:
            with reference_model(run, lm, state.against.plan) as named:
                fixed = named
        folder = state.rundir.file("rollouts")
        return Reference(fixed, frozen, folder, run.rollout.renew_reference, str(lm.device))

    @contextlib.contextmanager
    def in_round(self, lm: LanguageModel, number: int) -> Generator[LanguageModel]:
        self.drew |= number == 1 and self.fixed is None
        due = self.every is not None and number > 1 and (number - 1) % self.every == 0
        if due and self.renewed < number:
            self.frozen, self.fixed, self.renewed = Frozen.of(lm), None, number
            self.drew = True
            self.folder.mkdir(exist_ok=True)
            with replacing(self._file(number), self.frozen.num_bytes) as temporary:
                save_file(self.frozen.weights, temporary)
        if self.fixed is not None:
            yield self.fixed
            return
        with self.frozen.in_place(lm):
            yield lm

    def _file(self, number: int) -> Path:
        return self.folder / f"reference-{number:06d}.safetensors"

    def position(self) -> dict[str, Any]:
        return {"renewed": self.renewed, "drew": self.drew}

    def go_back(self, renewed: int, drew: bool) -> None:
        self.drew = drew
        if not renewed:
            return
        file = self._file(renewed)
        if not file.is_file():
            raise OutputError(f"{file} is gone: the reference since round {renewed}. Put it back.")
        kept = load_file(file, device=self.device)
        self.frozen, self.fixed, self.renewed = Frozen(kept), None, renewed

    def tidy(self, kept: Collection[int]) -> None:
        """Removes what no checkpoint goes back to."""
        wanted = {self._file(number).name for number in (*kept, self.renewed)}
        for file in self.folder.glob("reference-*.safetensors"):
            if file.name not in wanted:
                file.unlink()


@dataclass(frozen=True)
class Session:
    """What a checkpoint has to know of rounds and reference. `look` is for the first round, which
    a run that is resumed reads again."""

    rollouts: Rollouts
    reference: Reference
    look: Callable[[Round], None]

    def after(self, record: Record) -> None:
        self.rollouts.after(record)

    def epoch(self, step: int) -> float:
        return self.rollouts.epoch(step)

    def is_done(self, step: int) -> bool:
        return self.rollouts.is_done(step)

    def position(self) -> dict[str, Any]:
        return {**self.rollouts.position(), **self.reference.position()}

    def go_back(self, where: Mapping[str, Any]) -> None:
        self.rollouts.go_back(where)
        if where["round"]:
            # A first round that cannot be read any more is missed by this sentence alone.
            with contextlib.suppress(OutputError):
                self.look(read_round(self.rollouts.folder, 1))
        self.reference.go_back(where["renewed"], where["drew"])

    def tidy(self, kept: Sequence[Mapping[str, Any]]) -> None:
        self.reference.tidy([where["renewed"] for where in kept])
