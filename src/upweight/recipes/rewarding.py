"""What scores answers: a function of the table, one of the user's, an address, a reward model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from upweight.config import Run
from upweight.data.formats import prompt_of
from upweight.data.read import read_rows
from upweight.errors import ConfigError, DataError, ModelError, RewardError
from upweight.models.load import LanguageModel
from upweight.models.scalar import is_reward_model, load_reward_model, tree_scores
from upweight.recipes.kinds import KINDS
from upweight.recipes.prepare import tokens_read_at_once
from upweight.training.rewards import REWARDS, Sampled, open_reward
from upweight.training.rollout import texts_of
from upweight.types import Example, RowId, Text, Tree

Scorer = Callable[[Sequence[Tree]], list[list[float]]]
"""Trees -> the reward of each of their responses."""


def require_rewards(run: Run, *, later: bool = False) -> None:
    """Raises ConfigError where an objective that draws answers has nothing to score them by, and
    RewardError or ModelError where what is named is no reward. Needs no model. A reward model that
    is trained by then (`later`) is not looked for."""
    if KINDS[run.objective].draws and run.rollout.reward is None:
        raise ConfigError(
            f"objective {run.objective} needs rollout.reward, which scores the answers that it "
            f"draws: {', '.join(REWARDS)}, FILE.py:FUNCTION, an http:// address, or the folder of "
            "a reward model."
        )
    named = {"rollout.reward": run.rollout.reward, "evaluation.true_reward": None}
    if KINDS[run.objective].answers:
        named["evaluation.true_reward"] = run.evaluation.true_reward
    for key, spec in named.items():
        if spec is None or is_reward_model(spec) or (later and key == "rollout.reward"):
            continue
        if Path(spec).is_dir():
            raise ModelError(
                f"{key}: {spec} is not a reward model: its config.json names no "
                "sequence-classification model with one label. Train one with objective=reward, "
                "and give its model folder."
            )
        try:
            open_reward(spec)
        except RewardError as error:
            raise RewardError(f"{key}: {error}") from None


def make_scorer(spec: str, run: Run, lm: LanguageModel, end: int) -> Scorer:
    """Raises ModelError for a reward model that cannot be used, ConfigError for an unknown name.

    A reward model reads the policy's own token ids, so it must have the policy's tokenizer. It
    learned what whole answers are worth, at their stop token: an answer that was cut is read with
    `end`, that token, behind it.
    """
    if not Path(spec).is_dir():
        return _by_text(spec, lm)
    judge = reward_model_beside(lm, spec, run)
    if judge.tokenizer.get_vocab() != lm.tokenizer.get_vocab():
        raise DataError(
            f"the reward model {spec} has another vocabulary than {lm.name}: it would read other "
            "texts than were written. Use a reward model with the same tokenizer."
        )

    def score(trees: Sequence[Tree]) -> list[list[float]]:
        whole = [_ended(tree, end, judge.max_length) for tree in trees]
        return tree_scores(judge, whole, tokens_read_at_once(run, judge))

    return score


def _ended(tree: Tree, end: int, positions: int | None) -> Tree:
    """The tree with a stop token behind each answer that was cut, in the place of its last token
    where the model has no position left."""
    room = math.inf if positions is None else positions - len(tree.prompt) - 1
    whole = [
        response if stopped else (*response[: int(min(len(response), room))], end)
        for response, stopped in zip(tree.responses, tree.stopped, strict=True)
    ]
    return replace(tree, responses=tuple(whole), stopped=(True,) * len(whole))


def reward_model_beside(
    lm: LanguageModel,
    spec: str,
    run: Run,
    adapt: Callable[[LanguageModel], LanguageModel] = lambda lm: lm,
    quantize: str | None = None,
) -> LanguageModel:
    """The reward model `spec` where and as `lm` runs, by the run's settings."""
    return load_reward_model(
        spec,
        adapt,
        device=str(lm.device),
        dtype=str(lm.compute_dtype).removeprefix("torch."),
        path=run.compute.attention,
        sharing=run.compute.sharing,
        trust_remote_code=run.compute.trust_remote_code,
        quantize=quantize,
    )


def _by_text(spec: str, lm: LanguageModel) -> Scorer:
    reward = open_reward(spec)
    rows: dict[RowId, tuple[Text, Mapping[str, Any]]] = {}

    def score(trees: Sequence[Tree]) -> list[list[float]]:
        missing = {t.ids[0].row.source for t in trees if _whole(t.ids[0].row) not in rows}
        for row_id, row in read_rows(sorted(missing)):
            asked = prompt_of(row, row_id)
            if isinstance(asked, Example):
                rows[row_id] = asked.prompt, row
        items: list[Sampled] = []
        for tree in trees:
            where = tree.ids[0].row
            prompt, row = rows[_whole(where)]
            if where.turn is not None and not isinstance(prompt, str):
                prompt = prompt[: where.turn - 1]
            question = _as_text(prompt)
            items += [Sampled(question, text, row, where) for text in texts_of(lm, tree)]
        flat = iter(reward(items))
        return [[next(flat) for _ in tree.responses] for tree in trees]

    return score


def _whole(row: RowId) -> RowId:
    """The row of the file, of which an earlier turn is a part."""
    return replace(row, turn=None)


def _as_text(prompt: Text) -> str:
    """A conversation as its last turn: what is answered."""
    if isinstance(prompt, str):
        return prompt
    return str(prompt[-1].get("content", "")) if prompt else ""
