"""What supervised fine-tuning and rollouts take from rows: responses without preferences, the
assistant's earlier turns, prompts alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from upweight.data.account import Account
from upweight.data.preferences import clipped, left_out, said_other
from upweight.data.render import Renderer
from upweight.data.stream import prompt_key
from upweight.data.trees import prompt_ids
from upweight.rows import Dropped, Example, Message, Response, ResponseId, Tree


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


def learned(
    examples: Iterable[Example], account: Account, *, everything: bool = False
) -> list[Example]:
    """The rows with the responses that are learned, and without preferences: those that are chosen
    and never rejected, or all, where there are no preferences or `everything` is wanted.

    What is not learned is not tokenized either: it may be as long as it likes. A row whose chosen
    responses cannot be used is dropped, since what is left was rejected. All is counted.
    """
    found: list[Example] = []
    for example in examples:
        if everything or not example.preferences:
            found.append(replace(example, preferences=()))
            continue
        chosen = {p.chosen for p in example.preferences}
        rejected = {p.rejected for p in example.preferences}
        out = left_out(example)
        kept = sorted(chosen - rejected - out.keys())
        if not kept:
            account.used -= 1
            account.drop(_not_learned(example, chosen - rejected, out))
            continue
        for i in range(len(example.responses)):
            if i not in kept:
                reason = out.get(i, "not_chosen" if i in chosen | rejected else "unpaired")
                account.left_out[reason] = account.left_out.get(reason, 0) + 1
        responses = tuple(example.responses[i] for i in kept)
        found.append(replace(example, responses=responses, preferences=()))
    account.check()
    return found


def _not_learned(example: Example, best: Collection[int], out: Mapping[int, str]) -> Dropped:
    if not best:
        return Dropped(example.row, "not_chosen", "every response is rejected too")
    first = min(best)
    if out[first] == "other_turns_in_response":
        return Dropped(example.row, out[first], said_other(example, {first: out[first]}))
    shown = clipped(example.responses[first].content)
    return Dropped(example.row, out[first], f"the chosen response {shown}")


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
