"""Examples to trees: the token ids of a prompt and its responses, and what had to be done to them.

Input: an Example (text). Does: renders it, tokenizes prompt and responses, finds the boundary
between them in tokens, cuts what is too long by the policy asked for, leaves out what cannot be
used. Output: a Tree with its TreeNotes, or a Dropped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice

from upweight.data.preferences import clipped, left_out
from upweight.data.render import Answer, Problem, Renderer, Rendering, Tokenizer, render
from upweight.rows import Dropped, Example, ResponseId, Tree

Ids = tuple[int, ...]
_ROWS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class TreeNotes:
    """What was done to a row on its way to a tree: nothing of it shows in the tree itself.

    `left_out` are the row's responses that are not in the tree, with the reason word (unpaired: in
    no preference). `prompt_cut` and `response_cut` count tokens, the latter for each response of
    the tree.
    """

    left_out: Mapping[int, str]
    num_appended: int
    num_unfinished: int
    num_rewritten: int
    repaired: bool
    special_in_prompt: bool
    prompt_cut: int
    response_cut: tuple[int, ...]


Grown = tuple[Tree, TreeNotes] | Dropped


def tree(example: Example, renderer: Renderer) -> Grown:
    """One example as a tree. Raises ModelError for messages where there is no chat template."""
    return next(trees([example], renderer))


def trees(examples: Iterable[Example], renderer: Renderer) -> Iterator[Grown]:
    """One result for every example, in order; texts are tokenized many rows at a time."""
    remaining = iter(examples)
    while batch := list(islice(remaining, _ROWS_AT_ONCE)):
        renderings = [render(e, _wanted(e), renderer) for e in batch]
        texts = {
            text: None
            for rendering in renderings
            if isinstance(rendering, Rendering)
            for text in _pieces(rendering, renderer)
            if text
        }
        ids = dict(zip(texts, _encode(list(texts), renderer.tokenizer), strict=True))
        ids[""] = ()
        for example, rendering in zip(batch, renderings, strict=True):
            grown = isinstance(rendering, Rendering)
            yield _grow(example, rendering, ids, renderer) if grown else rendering


def prompt_ids(example: Example, renderer: Renderer) -> Ids | Dropped:
    """The ids of the prompt alone, as serving renders it: what a sample begins with.

    A tree's prompt is shorter where white space at its end joins the responses. Dropped where
    max_length leaves no room for a response.
    """
    rendering = render(example, (), renderer)
    if isinstance(rendering, Dropped):
        return rendering
    head, tail = _pieces(rendering, renderer)
    (ids,) = _encode([head + tail], renderer.tokenizer)
    ids, limit = _led(ids, rendering, renderer), renderer.max_length
    if limit is not None and len(ids) >= limit:
        detail = f"prompt {len(ids)} tokens, and max_length is {limit}, response included"
        return Dropped(example.row, "too_long", detail)
    return ids


def _wanted(example: Example) -> list[int]:
    """The responses that some preference uses, or all usable ones where there are none."""
    if example.preferences:
        return sorted({i for p in example.preferences for i in (p.chosen, p.rejected)})
    out = left_out(example)
    return [i for i in range(len(example.responses)) if i not in out]


def _encode(texts: list[str], tokenizer: Tokenizer) -> list[Ids]:
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [tuple(ids) for ids in encoded["input_ids"]]


def _pieces(rendering: Rendering, renderer: Renderer) -> list[str]:
    """The texts to tokenize: what precedes the prompt's last special token, then what follows,
    alone and with each response. So the prompt is tokenized once, however many responses it has:
    a special token splits text before anything else does."""
    at = max((m.start() for m in renderer.splits.finditer(rendering.prompt)), default=0)
    head, tail = rendering.prompt[:at], rendering.prompt[at:]
    return [head, tail, *(tail + answer.text for answer in rendering.answers.values())]


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A row between text and tree; responses, problems and cuts by the response's number."""

    prompt: Ids
    responses: Mapping[int, Ids]
    problems: Mapping[int, Problem]
    prompt_cut: int = 0
    response_cut: Mapping[int, int] = field(default_factory=dict[int, int])


def _grow(
    example: Example, rendering: Rendering, ids: Mapping[str, Ids], renderer: Renderer
) -> Grown:
    head, *tails = (ids[text] for text in _pieces(rendering, renderer))
    prompt, *fulls = (_led(head + tail, rendering, renderer) for tail in tails)
    split = _split(prompt, dict(zip(rendering.answers, fulls, strict=True)), rendering, renderer)
    repaired = bool(split.responses) and len(split.prompt) < len(prompt)
    if not split.prompt:
        if renderer.bos is None:
            return Dropped(example.row, "empty_prompt", "the prompt is white space alone")
        split = replace(split, prompt=(renderer.bos,))
    return _tree(example, rendering, _cut(split, renderer), repaired)


def _led(ids: Ids, rendering: Rendering, renderer: Renderer) -> Ids:
    """The ids of a whole text, with the tokenizer's own beginning-of-text, and with only one."""
    bos, lead = renderer.bos, renderer.lead
    if bos is None:
        return lead + ids
    if not rendering.prompt:
        lead = lead or (bos,)
    ids = lead + ids
    return ids[1:] if ids[:2] == (bos, bos) else ids


def _split(
    prompt: Ids, fulls: Mapping[int, Ids], rendering: Rendering, renderer: Renderer
) -> _Tokens:
    """The prompt's ids, the same for all responses, and each response's with its stop token.

    Where a response's beginning joins the prompt's end into other tokens, the prompt ends at the
    last token that all of them have, so long as only white space moves over.
    """
    problems = dict(rendering.problems)
    shared: dict[int, int] = {}
    for i, full in fulls.items():
        num_shared = _num_shared(prompt, full)
        if _decode(prompt[num_shared:], renderer.tokenizer).strip():
            detail = _boundary_detail(prompt, full, num_shared, renderer.tokenizer)
            problems[i] = Problem("boundary", detail)
        elif rendering.answers[i].stopped and full[-1] not in renderer.stop_ids:
            problems[i] = Problem("boundary", "its stop token is not one token")
        elif said := _stop_inside(full[num_shared:], rendering.answers[i], renderer):
            problems[i] = Problem("stop_in_response", said)
        else:
            shared[i] = num_shared
    end = min(shared.values(), default=len(prompt))
    added = (renderer.added_stop,)
    responses = {
        i: fulls[i][end:] + (() if answer.stopped or answer.unfinished else added)
        for i, answer in rendering.answers.items()
        if i in shared
    }
    return _Tokens(prompt[:end], responses, problems)


def _stop_inside(ids: Ids, answer: Answer, renderer: Renderer) -> str | None:
    """Text may become a stop token without holding its text: by a tokenizer's normalization, or
    because an ordinary token is said to be a stop."""
    places = [k for k, i in enumerate(ids) if i in renderer.stop_ids]
    if len(places) <= answer.num_stops:
        return None
    near = _decode(ids[max(0, places[0] - 8) : places[0] + 1], renderer.tokenizer)
    token = renderer.tokenizer.convert_ids_to_tokens(ids[places[0]])
    return f"its tokens hold {token}, at which generation stops: {clipped(near)}"


def _boundary_detail(prompt: Ids, full: Ids, num_shared: int, tokenizer: Tokenizer) -> str:
    start = max(0, num_shared - 1)
    alone, joined = (
        [_decode((i,), tokenizer) for i in ids[start : num_shared + 3]] for ids in (prompt, full)
    )
    return f"the prompt alone ends in the tokens {alone}, with the response it goes on {joined}"


def _cut(tokens: _Tokens, renderer: Renderer) -> _Tokens:
    """Makes prompt and response fit max_length by the policy. Where they cannot, or the policy is
    to drop, the response is a problem. One token of the prompt and of the response always stay."""
    limit, prompt = renderer.max_length, tokens.prompt
    if limit is None:
        return tokens
    kept = 1 if prompt[0] == renderer.bos else 0
    shortest = len(prompt)
    if renderer.truncation == "prompt":
        shortest = min(len(prompt), kept + 1)
    problems = dict(tokens.problems)
    responses: dict[int, Ids] = {}
    for i, ids in tokens.responses.items():
        need = 1 if renderer.truncation == "response" else len(ids)
        if shortest + need <= limit:
            responses[i] = ids
        else:
            problems[i] = Problem(
                "too_long",
                f"prompt {len(prompt)} + response {len(ids)} tokens, and max_length is {limit}",
            )
    if renderer.truncation == "response":
        room = limit - len(prompt)
        cuts = {i: len(ids) - room for i, ids in responses.items() if len(ids) > room}
        responses = {i: ids[:room] for i, ids in responses.items()}
        return _Tokens(prompt, responses, problems, 0, cuts)
    over = max((len(prompt) + len(ids) - limit for ids in responses.values()), default=0)
    over = max(0, over)
    return _Tokens(prompt[:kept] + prompt[kept + over :], responses, problems, over)


def _tree(example: Example, rendering: Rendering, tokens: _Tokens, repaired: bool) -> Grown:
    first: dict[Ids, int] = {}
    same = {i: first.setdefault(ids, i) for i, ids in tokens.responses.items()}
    problems = dict(tokens.problems)
    for i, j in same.items():
        if i != j:
            detail = f"responses {j} and {i} are the same {len(tokens.responses[i])} tokens"
            problems[i] = Problem("identical_responses", detail)
    moved = (
        replace(p, chosen=same[p.chosen], rejected=same[p.rejected])
        for p in example.preferences
        if p.chosen in same and p.rejected in same
    )
    preferences = [p for p in moved if p.chosen != p.rejected]
    used = sorted({i for p in preferences for i in (p.chosen, p.rejected)})
    if not example.preferences:
        used = sorted(first.values())
    if not used:
        problem = next(iter(problems.values()), Problem("no_preference", "it has no responses"))
        return Dropped(example.row, problem.reason, problem.detail)
    unused = (i for i in range(len(example.responses)) if i not in used)
    known = left_out(example) | {i: p.reason for i, p in problems.items()}
    number = {i: k for k, i in enumerate(used)}
    answers = [rendering.answers[i] for i in used]
    notes = TreeNotes(
        left_out={i: known.get(i, "unpaired") for i in unused},
        num_appended=sum(
            not a.stopped and not a.unfinished and i not in tokens.response_cut
            for i, a in zip(used, answers, strict=True)
        ),
        num_unfinished=sum(a.unfinished for a in answers),
        num_rewritten=sum(a.rewritten for a in answers),
        repaired=repaired,
        special_in_prompt=rendering.special_in_prompt,
        prompt_cut=tokens.prompt_cut,
        response_cut=tuple(tokens.response_cut.get(i, 0) for i in used),
    )
    grown = Tree(
        prompt=tokens.prompt,
        responses=tuple(tokens.responses[i] for i in used),
        preferences=tuple(
            replace(p, chosen=number[p.chosen], rejected=number[p.rejected]) for p in preferences
        ),
        ids=tuple(ResponseId(example.row, i) for i in used),
        stopped=tuple(
            not a.unfinished and i not in tokens.response_cut
            for i, a in zip(used, answers, strict=True)
        ),
    )
    return grown, notes


@dataclass(frozen=True, slots=True)
class ShownResponse:
    """A response as it is scored: its text, then its stop token, None where it was cut off."""

    role: str
    scored: str
    stop: str | None
    tokens: int


@dataclass(frozen=True, slots=True)
class Shown:
    """A tree as a person reads it. `str` writes line breaks and quotes as in JSON: what stands
    between the bars is the response, and what follows the last bar is its stop token."""

    row: str
    prompt: str
    prompt_tokens: int
    responses: tuple[ShownResponse, ...]

    def __str__(self) -> str:
        lines = [f"{self.row}", f"prompt   {_quoted(self.prompt)}"]
        for response in self.responses:
            end = "cut, no stop" if response.stop is None else _quoted(response.stop)
            lines.append(f"{response.role:<8} | {_quoted(response.scored)} | {end}")
        return "\n".join(lines)


def show(tree: Tree, tokenizer: Tokenizer) -> Shown:
    """The tree as text, what is scored set apart from what is not."""
    responses: list[ShownResponse] = []
    for k, (ids, stopped) in enumerate(zip(tree.responses, tree.stopped, strict=True)):
        wins = any(p.chosen == k for p in tree.preferences)
        losses = any(p.rejected == k for p in tree.preferences)
        role = "response" if wins == losses else "chosen" if wins else "rejected"
        body, stop = (ids[:-1], ids[-1:]) if stopped else (ids, ())
        text = text_after(tree.prompt, body, tokenizer)
        end = _decode(stop, tokenizer) if stopped else None
        responses.append(ShownResponse(role, text, end, len(ids)))
    prompt = _decode(tree.prompt, tokenizer)
    return Shown(str(tree.ids[0].row), prompt, len(tree.prompt), tuple(responses))


def text_after(prompt: Ids, ids: Ids, tokenizer: Tokenizer) -> str:
    """What the ids say after the prompt. Alone, many tokenizers decode them without the space that
    they begin with."""
    before, whole = _decode(prompt, tokenizer), _decode(prompt + ids, tokenizer)
    return whole[len(before) :] if whole.startswith(before) else _decode(ids, tokenizer)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _decode(ids: Ids, tokenizer: Tokenizer) -> str:
    if not ids:
        return ""
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )


def _num_shared(a: Ids, b: Ids) -> int:
    """The length of the common prefix; b is nearly always all of a and more."""
    if b[: len(a)] == a:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(b))


def ended(tree: Tree, end: int, positions: int | None) -> Tree:
    """The tree as a reward model reads it, which scores whole answers that end in the stop token
    `end`: it is put behind each that was cut, in the place of its last token where that one filled
    the model's `positions`, and in the place of another stop token, of which it learned nothing."""

    def whole(response: tuple[int, ...]) -> tuple[int, ...]:
        full = positions is not None and len(tree.prompt) + len(response) == positions
        return (*(response[:-1] if full else response), end)

    answers = zip(tree.responses, tree.stopped, strict=True)
    responses = tuple(
        (*response[:-1], end) if stopped else whole(response) for response, stopped in answers
    )
    return replace(tree, responses=responses, stopped=(True,) * len(responses))
