"""Where the prompt ends and the responses begin, in rows that say it in one of several ways."""

from __future__ import annotations

from collections.abc import Sequence

from upweight.data.columns import printable
from upweight.rows import Dropped, Message, RowId, Text

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def explicit(
    prompt: Text, contents: Sequence[Text], names: Sequence[str], row_id: RowId
) -> tuple[Text, tuple[Text, ...]] | Dropped:
    """The prompt and its responses, all text or all messages.

    Where any of them is messages, a text prompt is one user turn and a text response one assistant
    turn. Responses that repeat the prompt's messages lose them. `names` are the columns, for the
    reason of a drop.
    """
    if isinstance(prompt, str) and all(isinstance(c, str) for c in contents):
        return prompt, tuple(contents)
    answers = [_as_turns(c, "assistant") for c in contents]
    turns = _as_turns(prompt, "user")
    if isinstance(prompt, str):
        turns = _prompt_in(turns[0], answers) or turns
    found: list[Text] = []
    for name, answer in zip(names, answers, strict=True):
        rest = answer[len(turns) :] if answer[: len(turns)] == turns else answer
        wrong = _not_an_answer(rest, name)
        if wrong:
            return Dropped(row_id, wrong[0], wrong[1])
        found.append(rest)
    return turns, tuple(found)


def implicit(
    chosen: Text, rejected: Text, row_id: RowId
) -> tuple[Text, tuple[Text, ...]] | Dropped:
    """What chosen and rejected share, and their two ends.

    Messages: the split is at the first message that differs, which both times must be the
    assistant's. Text: at the last white space that they share, never inside a word, or at the last
    "\\n\\nAssistant:" that they share where they are transcripts of Human and Assistant.
    """
    if isinstance(chosen, str) and isinstance(rejected, str):
        split = _shared_text(chosen, rejected)
        return split if split else Dropped(row_id, "prompt_mismatch", _DIFFERENT_TRANSCRIPTS)
    if isinstance(chosen, str) or isinstance(rejected, str):
        return Dropped(
            row_id,
            "prompt_mismatch",
            "one of chosen and rejected is text, the other messages, and there is no prompt",
        )
    num_shared = _num_shared(chosen, rejected)
    if num_shared == len(chosen) == len(rejected):
        num_shared = max(0, num_shared - 1)
    ends = chosen[num_shared:], rejected[num_shared:]
    for name, end in zip(("chosen", "rejected"), ends, strict=True):
        wrong = _not_an_answer(end, name)
        if wrong:
            return Dropped(row_id, wrong[0], f"{wrong[1]}, after {num_shared} shared messages")
    return chosen[:num_shared], ends


_DIFFERENT_TRANSCRIPTS = "the transcripts differ before the last answer"


def _not_an_answer(turns: tuple[Message, ...], name: str) -> tuple[str, str] | None:
    if not turns:
        return "empty_response", f"{name} is no message"
    if turns[0]["role"] != "assistant":
        return "prompt_mismatch", f"{name} goes on with a {printable(turns[0]['role'])} message"
    if turns[-1]["role"] != "assistant":
        return "not_assistant", f"{name} ends with a {printable(turns[-1]['role'])} message"
    return None


def _as_turns(content: Text, role: str) -> tuple[Message, ...]:
    return ({"role": role, "content": content},) if isinstance(content, str) else content


def _prompt_in(user: Message, answers: Sequence[tuple[Message, ...]]) -> tuple[Message, ...] | None:
    """The turns, such as a system message, up to the user turn that the text prompt repeats."""
    for i, turn in enumerate(answers[0]):
        same = turn["role"] == "user" and turn.get("content") == user["content"]
        if same and all(a[: i + 1] == answers[0][: i + 1] for a in answers):
            return answers[0][: i + 1]
    return None


def _num_shared(a: Text, b: Text) -> int:
    """The length of the common prefix, by bisection: comparing two slices costs next to nothing."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def _shared_text(a: str, b: str) -> tuple[str, tuple[str, str]] | None:
    shared = _num_shared(a, b)
    if all(_ASSISTANT in text and _HUMAN in f"\n\n{text}" for text in (a, b)):
        at = a.rfind(_ASSISTANT, 0, shared)
        end = at + len(_ASSISTANT)
        if at < 0 or _HUMAN in a[end:] or _HUMAN in b[end:]:
            return None
        return a[:end], (a[end:], b[end:])
    # Both ends must keep a word, and neither may begin inside one.
    end = max(0, min(shared, len(a.rstrip()) - 1, len(b.rstrip()) - 1))
    while end and not (_between_words(a, end) and _between_words(b, end)):
        end -= 1
    # A tokenizer joins one space to the word that follows, and leaves a line break apart.
    if end and a[end - 1] == " ":
        end -= 1
    return a[:end], (a[end:], b[end:])


def _between_words(text: str, at: int) -> bool:
    return text[at - 1].isspace() or text[at].isspace()
