"""What scores answers: a function of the table, one of the user's, an address, a reward model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from upweight.config import Run
from upweight.data.columns import READ
from upweight.data.formats import answer_of, prompt_of
from upweight.data.read import read_rows
from upweight.data.trees import ended
from upweight.errors import ConfigError, DataError, ModelError, RewardError
from upweight.models.load import LanguageModel
from upweight.models.scalar import is_reward_model, load_reward_model, tree_scores
from upweight.recipes.kinds import KINDS
from upweight.recipes.prepare import Prepared, tokens_read_at_once
from upweight.recipes.reference import answered_sets, sampled_trees
from upweight.recipes.screen import Screen, counted
from upweight.training.rewards import COLUMNS, REWARDS, Sampled, in_folder, open_reward
from upweight.training.rollout import texts_of
from upweight.trust.likely import spread
from upweight.types import Example, RowId, Text, Tree
from upweight.web import ADDRESSES

Scorer = Callable[[Sequence[Tree]], list[list[float]]]
"""Trees -> the reward of each of their responses."""

ASKED = 8
"""Rows that a reward is asked about before step 1: a column that it needs is missing in most."""

NO_ANSWER = "a"
"""What is scored where no row that is asked about has an answer."""


def is_judge(spec: str | None) -> bool:
    """Whether a reward is the folder of a reward model."""
    return spec is not None and in_folder(spec) and is_reward_model(spec)


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
        if spec is None or is_judge(spec) or (later and key == "rollout.reward"):
            continue
        if in_folder(spec):
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

    A reward model reads the policy's own token ids, so it must have the policy's tokenizer, and an
    answer that was cut with the stop token `end` behind it (data.trees.ended).
    """
    if not in_folder(spec):
        return _by_text(spec, lm)
    judge = reward_model_beside(lm, spec, run)
    if judge.tokenizer.get_vocab() != lm.tokenizer.get_vocab():
        raise DataError(
            f"the reward model {spec} has another vocabulary than {lm.name}: it would read other "
            "texts than were written. Use a reward model with the same tokenizer."
        )

    def score(trees: Sequence[Tree]) -> list[list[float]]:
        whole = [ended(tree, end, judge.max_length) for tree in trees]
        longest = max(len(t.prompt) + len(r) for t in whole for r in t.responses)
        if judge.max_length is not None and longest > judge.max_length:
            raise DataError(
                f"the reward model {spec} was made for {judge.max_length:,} tokens, and a prompt "
                f"with its answer has {longest:,}. Lower rollout.max_tokens or "
                "evaluation.max_new_tokens, leave long prompts out, or use another reward model."
            )
        return tree_scores(judge, whole, tokens_read_at_once(run, judge))

    return score


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
    rows: dict[RowId, Asked] = {}

    def score(trees: Sequence[Tree]) -> list[list[float]]:
        missing = {t.ids[0].row.source for t in trees if _whole(t.ids[0].row) not in rows}
        rows.update(_asked_in(missing, spec))
        items = [
            _sampled(rows, tree.ids[0].row, text) for tree in trees for text in texts_of(lm, tree)
        ]
        flat = iter(reward(items))
        return [[next(flat) for _ in tree.responses] for tree in trees]

    return score


Asked = tuple[Text, Mapping[str, Any]]
"""A prompt, and the row that it stands in."""


def _asked_in(files: Collection[str], spec: str) -> Iterator[tuple[RowId, Asked]]:
    # A function of the user's, or one behind an address, may read any column.
    columns = READ.union(COLUMNS[spec]) if spec in COLUMNS else None
    for row_id, row in read_rows(sorted(files), columns):
        asked = prompt_of(row, row_id)
        if isinstance(asked, Example):
            yield row_id, (asked.prompt, row)


def _sampled(rows: Mapping[RowId, Asked], where: RowId, response: str) -> Sampled:
    prompt, row = rows[_whole(where)]
    if where.turn is not None and not isinstance(prompt, str):
        prompt = prompt[: where.turn - 1]
    return Sampled(_as_text(prompt), response, row, where)


def ask_rewards(run: Run, prepared: Prepared, screen: Screen) -> None:
    """Has the run's rewards score the answers that stand in a few rows, before anything else is
    computed, and says from where to where they reach. Raises RewardError for what would end the run
    later.

    Not a reward model, which needs no column, and not an address, which may charge for it.
    """
    specs = {
        "rollout.reward": run.rollout.reward,
        "evaluation.true_reward": run.evaluation.true_reward,
    }
    asked: dict[str, list[RowId]] = {key: [] for key in specs}
    if KINDS[run.objective].draws:
        asked["rollout.reward"] += spread(_rows_of(prepared.trees["train"]), ASKED)
    sets = answered_sets(run, prepared).values()
    judged = [tree for trees in sets for tree in sampled_trees(run, trees)]
    judge = "rollout.reward" if run.evaluation.true_reward is None else "evaluation.true_reward"
    asked[judge] += spread(_rows_of(judged), ASKED)
    for key, spec in specs.items():
        if spec is None or not asked[key] or in_folder(spec):
            continue
        if spec.startswith(ADDRESSES):
            screen.note(f"{key}: {spec} is an address, and was not asked about any row")
            continue
        found = _in_rows(asked[key], spec)
        try:
            rewards = open_reward(spec)([item for item, _ in found])
        except RewardError as error:
            raise RewardError(
                f"{key}, asked about a few rows before step 1: {error} Mend the rows or the reward."
            ) from None
        num_rows = len({_whole(item.id) for item, _ in found})
        others = ", ".join(dict.fromkeys(other for _, other in found if other))
        range_of = " to ".join(dict.fromkeys(f"{end(rewards):.4g}" for end in (min, max)))
        screen.note(
            f"{key}: {spec} gives {range_of} to the answers of "
            f"{counted(num_rows, 'row')}{f' ({others} where a row has none)' if others else ''}"
        )
        own = [reward for reward, (_, other) in zip(rewards, found, strict=True) if not other]
        if len(own) > 1 and min(own) == max(own):
            screen.warn(
                f"warning: {key}: {spec} gives {own[0]:.4g} to each of the {len(own)} answers that "
                "rows have of their own. Where they are equally good, as correct solutions are, "
                "that is right; else read it, and the columns that it compares with."
            )


def _rows_of(trees: Sequence[Tree]) -> list[RowId]:
    """Each once: several sets may have a row."""
    return list(dict.fromkeys(tree.ids[0].row for tree in trees))


def _in_rows(asked: Sequence[RowId], spec: str) -> list[tuple[Sampled, str]]:
    """The answer that stands in each row and "", or what is scored where none does and its name:
    what the row's column `answer` says, the answer of another row, NO_ANSWER."""
    wanted = set(map(_whole, asked))
    in_files = _asked_in({row_id.source for row_id in wanted}, spec)
    rows = {row_id: there for row_id, there in in_files if row_id in wanted}
    answers = [_answer_to(rows[_whole(where)], where) for where in asked]
    known = [_as_text(answer) for answer in answers if answer is not None]
    spare = (known[0], "that of another row") if known else (NO_ANSWER, f'"{NO_ANSWER}"')
    found: list[tuple[Sampled, str]] = []
    for where, answer in zip(asked, answers, strict=True):
        right = rows[_whole(where)][1].get("answer")
        if answer is not None:
            text, other = _as_text(answer), ""
        elif right not in (None, ""):
            text, other = str(right), "its column answer"
        else:
            text, other = spare
        found.append((_sampled(rows, where, text), other))
    return found


def _answer_to(asked: Asked, where: RowId) -> Text | None:
    """What the row answers; of an earlier turn, the message that stands there."""
    prompt, row = asked
    if where.turn is None or isinstance(prompt, str):
        return answer_of(row, where)
    return prompt[where.turn - 1 : where.turn]


def _whole(row: RowId) -> RowId:
    """The row of the file, of which an earlier turn is a part."""
    return replace(row, turn=None)


def _as_text(prompt: Text) -> str:
    """A conversation as its last turn: what is answered."""
    if isinstance(prompt, str):
        return prompt
    return str(prompt[-1].get("content", "")) if prompt else ""
