"""What supervised fine-tuning and rollouts take from rows: responses without preferences, the
assistant's earlier turns, prompts alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from upweight.data.account import Account
from upweight.data.render import Renderer
from upweight.data.stream import prompt_key
from upweight.data.trees import prompt_ids
from upweight.types import Dropped, Example, Message, Response, ResponseId, Tree


def each_turn(examples: Sequence[Example], account: Account) -> list[Example]:
    """Each conversation once for every turn of the assistant's, the last included: what came before
    is the prompt.

    The prefixes are rendered one by one, as serving renders them: templates drop what an earlier
    turn thought, so one rendering of the whole would teach other contexts than the model meets.
    The account counts the turns as rows.
    """
    found: list[Example] = []
    for example in examples:
        turns, earlier = _earlier(example)
        found += [
            replace(
                example,
                prompt=turns[:i],
                responses=(Response((turns[i],)),),
                preferences=(),
                row=replace(example.row, turn=i + 1),
            )
            for i in earlier
        ]
        found.append(example)
        account.read += len(earlier)
        account.used += len(earlier)
        account.earlier_turns += len(earlier)
    return found


def opening_key(example: Example) -> str:
    """prompt_key of what the assistant's first turn answers.

    Conversations that share any turn's prompt share this one: split by it, no turn's prompt is on
    both sides.
    """
    turns, earlier = _earlier(example)
    return prompt_key(replace(example, prompt=turns[: earlier[0]]) if earlier else example)


def _earlier(example: Example) -> tuple[tuple[Message, ...], list[int]]:
    """The prompt's turns, and which of them are the assistant's: where it begins the conversation,
    there is no prompt."""
    turns = example.prompt if isinstance(example.prompt, tuple) else ()
    return turns, [i for i, turn in enumerate(turns) if i and turn["role"] == "assistant"]


def preferred(trees: Iterable[Tree], account: Account, *, everything: bool = False) -> list[Tree]:
    """Of each tree the responses that are chosen and never rejected, without their preferences; all
    responses where there are no preferences, or `everything` is wanted. What is left out is
    counted."""
    found: list[Tree] = []
    for tree in trees:
        chosen = {p.chosen for p in tree.preferences} - {p.rejected for p in tree.preferences}
        whole = everything or not tree.preferences
        kept = list(range(len(tree.responses))) if whole else sorted(chosen)
        num_left_out = len(tree.responses) - len(kept)
        if not kept:
            account.used -= 1
            account.drop(Dropped(tree.ids[0].row, "not_chosen", "every response is rejected too"))
            continue
        if num_left_out:
            before = account.left_out.get("not_chosen", 0)
            account.left_out["not_chosen"] = before + num_left_out
        found.append(
            replace(
                tree,
                responses=tuple(tree.responses[k] for k in kept),
                preferences=(),
                ids=tuple(tree.ids[k] for k in kept),
                stopped=tuple(tree.stopped[k] for k in kept),
            )
        )
    account.check()
    return found


def plant(examples: Iterable[Example], renderer: Renderer, account: Account) -> list[Tree]:
    """Prompts as trees without responses: what a rollout's answers grow on."""
    found: list[Tree] = []
    for example in examples:
        ids = prompt_ids(example, renderer)
        if isinstance(ids, Dropped):
            account.used -= 1
            account.drop(ids)
            continue
        account.lengths["prompt"].append(len(ids))
        found.append(Tree(ids, (), (), (ResponseId(example.row, 0),), ()))
    account.check()
    return found
