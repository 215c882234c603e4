"""Whether the scored tokens are what the rows say: read back, and compared with the text.

What made the tokens is not asked. Every scored span is decoded and compared with its response. Of
the rows where that is not plain, and of a sample of the others, the conversation is tokenized
again as serving does it: by the tokenizer's own chat template, whole and in one go.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import cast

import jinja2

from upweight.config import Preflight
from upweight.data.account import ONE_ANSWER, Account
from upweight.data.render import Renderer
from upweight.trust.finding import Finding, Refused
from upweight.trust.markers import (
    Held,
    in_prompts,
    in_texts,
    other_markers,
    specials_written,
)
from upweight.trust.reread import Kind, Odd, again, decode, plainly_says, served, turns_of, unsaid
from upweight.trust.unused import accounted, dropped
from upweight.types import Example, Message, Response, RowId, Tree

NUM_AGAIN = 100
"""Rows that are tokenized again, of each kind: those whose text is not plainly in their tokens, and
the others. Spread evenly over the set."""

_ECHO = 20
"""Letters of a prompt that a response may begin with by chance."""
_ROWS_NAMED = 5


@dataclass(frozen=True)
class Texts:
    """One set as text and as the tokens made of it. Generation ends at `stops`."""

    name: str
    examples: Sequence[Example]
    trees: Sequence[Tree]
    account: Account
    renderer: Renderer
    stops: frozenset[int]
    limits: Preflight

    @cached_property
    def rows(self) -> list[tuple[Example, Tree]]:
        """A prompt alone has an id that is of no response."""
        by_row = {example.row: example for example in self.examples}
        return [
            (by_row[tree.ids[0].row], tree if tree.responses else replace(tree, ids=()))
            for tree in self.trees
        ]

    @cached_property
    def plain(self) -> list[bool]:
        """Of each row, whether its scored tokens plainly say its responses."""
        spans = iter(decode([ids for tree in self.trees for ids in tree.responses], self.renderer))
        return [
            # A list, so that each response takes its span.
            all([plainly_says(next(spans), e.responses[of.index], self.renderer) for of in t.ids])
            for e, t in self.rows
        ]

    @cached_property
    def odd(self) -> list[Odd]:
        """What tokenizing again showed, for the rows of which that was asked."""
        found: list[Odd] = []
        for wanted in (False, True):
            rows = [r for r, p in zip(self.rows, self.plain, strict=True) if p == wanted]
            asked = _spread(rows)
            for example, tree in asked:
                odds = (again(example, tree, self.renderer), unsaid(example, self.renderer))
                share = len(rows) / len(asked)
                found += [replace(one, stands_for=share) for one in odds if one is not None]
        return found

    def said(self, text: str) -> str:
        return f"{self.name}: {text}"


@dataclass(frozen=True)
class _Wrong:
    finding: Finding
    certain: bool = field(default=True)


def examine_texts(texts: Texts) -> list[Finding]:
    """What is certain, the first to be told first, then what is suspicious, in the order of the
    codes."""
    found = [wrong for examination in EXAMINATIONS for wrong in examination(texts)]
    certain = [Refused(w.finding.code, w.finding.said, w.finding.rows) for w in found if w.certain]
    doubted = [wrong.finding for wrong in found if not wrong.certain]
    return [*certain, *sorted(doubted, key=lambda finding: finding.code)]


def scored(texts: Texts) -> list[_Wrong]:
    """The scored tokens are the response's, all of them, and of nothing else."""
    found = _dropped(texts, "other_turns_in_response", "UW201", _OTHER_TURNS, ONE_ANSWER)
    for odd in _of(texts, "span")[:1]:
        found.append(_wrong("UW201", texts.said(odd.detail), [odd]))
    for kind, what in _TEXT_LOST.items():
        found += _lost(texts, kind, "UW201", what)
    total, limit = len(texts.rows), texts.limits.spans
    echoes = [example.row for example, _ in texts.rows if _echoes(example)]
    if len(echoes) > limit * total:
        said = f"in {len(echoes)} of {total} rows every response begins with the whole prompt"
        said = f"{said}, which is then scored (preflight.spans is {limit:.0%})."
        finding = Finding("UW201", texts.said(said), tuple(map(str, echoes[:_ROWS_NAMED])))
        found.append(_Wrong(finding, certain=False))
    return found + prompts_taken(texts)


def prompts_taken(texts: Texts) -> list[_Wrong]:
    """Prompts that no row states: what two texts begin with alike is a guess, and where it is wrong
    the responses lack their first words."""
    account = texts.account
    if account.unprompted:
        rows, said = account.unprompted, "have no prompt, where other rows of their file have one"
        said += ": what chosen and rejected begin with alike stands for it, or nothing. Give each "
        said += "its prompt, or remove it"
    elif texts.renderer.template == "chat":
        rows, said = account.shared_prompts, "state no prompt: what chosen and rejected begin with "
        said += "alike is taken for it and rendered as the user's turn. If that is not what was "
        said += "asked, give a column prompt"
    else:
        return []
    if not rows:
        return []
    said = texts.said(f"{len(rows)} rows {said}.")
    return [_Wrong(Finding("UW201", said, tuple(rows[:_ROWS_NAMED])), certain=False)]


_OTHER_TURNS = "whose responses hold turns that are not the assistant's and would be learned"
_TEXT_LOST: dict[Kind, str] = {
    "rewritten": "the chat template leaves out part of a response, and it is not scored",
    "unwritten": "the tokenizer has no tokens for part of a response, and it is not scored",
}


def boundary(texts: Texts) -> list[_Wrong]:
    """The prompt's tokens are serving's, and how prompt and response together begin."""
    odds = _of(texts, "prompt")
    if odds:
        return [_wrong("UW202", texts.said(odds[0].detail), odds)]
    found = _dropped(texts, "boundary", "UW202", "whose prompt and response do not come apart")
    return found + _lost(texts, "unsaid", "UW202", _PROMPT_LOST)


_PROMPT_LOST = "the chat template leaves out part of the prompt, and the model never sees it"


def answered_before(texts: Texts) -> list[_Wrong]:
    """Prompts that end in an answer: the responses are second ones, behind a header of their
    own."""
    rows = [
        example.row
        for example in texts.examples
        if isinstance(example.prompt, tuple)
        and example.prompt
        and example.prompt[-1]["role"] == "assistant"
    ]
    limit, total = texts.limits.spans, len(texts.examples)
    if len(rows) <= limit * total:
        return []
    said = (
        f"in {len(rows)} of {total} rows the prompt ends in a turn of the assistant's: the "
        "responses are rendered as another turn behind it, and do not go on with it (preflight."
        f"spans is {limit:.0%})."
    )
    named = tuple(map(str, rows[:_ROWS_NAMED]))
    return [_Wrong(Finding("UW202", texts.said(said), named), certain=False)]


def _lost(texts: Texts, kind: Kind, code: str, what: str) -> list[_Wrong]:
    """Text that does not become tokens, as many rows as there are likely to be."""
    odds, total, limit = _of(texts, kind), len(texts.rows), texts.limits.spans
    if not odds:
        return []
    num = round(sum(odd.stands_for for odd in odds))
    said = f"in {'' if num == len(odds) else 'about '}{num} of {total} rows {what}, such as"
    said = texts.said(f"{said} {odds[0].detail} (preflight.spans is {limit:.0%}).")
    return [_wrong(code, said, odds, num > limit * total)]


def stops(texts: Texts) -> list[_Wrong]:
    """One stop token at the end of each response, none where it was cut, and one that serving
    knows."""
    renderer, ends = texts.renderer, set[int]()
    for example, tree in texts.rows:
        for ids, stopped, of in zip(tree.responses, tree.stopped, tree.ids, strict=True):
            places = [k for k, i in enumerate(ids) if i in renderer.stop_ids]
            turns = turns_of(example.responses[of.index].content, "assistant")
            # The assistant's turns before the last have stops of their own.
            inner = places[:-1] if stopped else places
            if (stopped and places[-1:] != [len(ids) - 1]) or (inner and len(turns) == 1):
                said = f"response {of.index} has {len(places)} stop tokens in {len(ids)}"
                said = f"{of.row}: {said}; right is {'one, the last' if stopped else 'none'}."
                return [_Wrong(Finding("UW203", texts.said(said)))]
            ends.update(ids[-1:] if stopped else ())
    found = _dropped(texts, "stop_in_response", "UW203", "whose text holds a special token")
    name = renderer.tokenizer.convert_ids_to_tokens
    if missing := ends - texts.stops:
        known = ", ".join(str(name(i)) for i in sorted(texts.stops)) or "nothing"
        said = f"responses end in {name(min(missing))}, and the model's generation ends at {known}"
        found.append(_Wrong(Finding("UW203", texts.said(f"{said} alone.")), certain=False))
    closing = (renderer.after or "").strip()
    if closing and texts.account.appended_stop and not renderer.stops.search(closing):
        said = f"the chat template ends a response in {closing!r}, which is no token of this "
        said += f"tokenizer: {name(renderer.added_stop)} was appended in its place."
        found.append(_Wrong(Finding("UW203", texts.said(said)), certain=False))
    return found


def beginnings(texts: Texts) -> list[_Wrong]:
    """Beginning-of-text stands first, and elsewhere only where the chat template writes it."""
    renderer, rows = texts.renderer, list[RowId]()
    bos, own = renderer.bos, dict[str, int]()
    if bos is None or bos in renderer.stop_ids:
        return rendered_before(texts)
    for example, tree in texts.rows:
        if not tree.responses:
            continue  # a prompt alone: what is said of specials below is all
        longest = max(tree.responses, key=lambda ids: ids.count(bos))
        num = tree.prompt.count(bos) + longest.count(bos)
        if num > (tree.prompt[0] == bos):
            response = example.responses[tree.ids[tree.responses.index(longest)].index]
            plain = renderer.template == "none"
            if plain or num > _written_by_template(example, response, renderer, own):
                rows.append(example.row)
    if not rows:
        return rendered_before(texts)
    limit, total = texts.limits.spans, len(texts.rows)
    said = texts.said(
        f"{len(rows)} of {total} rows hold {renderer.tokenizer.bos_token} themselves, which makes "
        f"a second beginning of text (preflight.spans is {limit:.0%})."
    )
    named = tuple(map(str, rows[:_ROWS_NAMED]))
    return [_Wrong(Finding("UW204", said, named), len(rows) > limit * total)]


def rendered_before(texts: Texts) -> list[_Wrong]:
    """Rows that hold what a chat template writes: rendered once more they say something else."""
    renderer, limits, total = texts.renderer, texts.limits, len(texts.rows)
    if renderer.template == "chat":
        own = in_prompts(texts.examples, specials_written(renderer))
        if len(own) > limits.spans * total:
            said = "which the chat template writes: they were rendered before. Give messages or "
            said += "texts without it, or set data.template=none"
            return [_marked(texts, own, said, f"preflight.spans is {limits.spans:.0%}", True)]
        special = in_prompts(texts.examples, renderer.specials)
        if len(special) > limits.spans * total:
            said = "a special token, in their prompts"
            return [_marked(texts, special, said, f"preflight.spans is {limits.spans:.0%}", False)]
    foreign = in_texts(texts.examples, other_markers(renderer))
    if len(foreign) > limits.markers * total:
        first = ascii(next(iter(foreign.values())))
        said = f"{len(foreign)} of {total} rows hold what a chat template writes, such as {first}"
        said = f"{said}: it is learned as text (preflight.markers is {limits.markers:.0%})."
        rows = tuple(map(str, foreign))[:_ROWS_NAMED]
        return [_Wrong(Finding("UW204", texts.said(said), rows), certain=False)]
    return []


def _marked(texts: Texts, held: Held, what: str, limit: str, certain: bool) -> _Wrong:
    said = f"{len(held)} of {len(texts.rows)} rows hold {next(iter(held.values()))}, {what}"
    rows = tuple(map(str, held))[:_ROWS_NAMED]
    return _Wrong(Finding("UW204", texts.said(f"{said} ({limit})."), rows), certain)


def unused(texts: Texts) -> list[_Wrong]:
    """The rows that did not become tokens."""
    found = [
        *accounted(texts.name, texts.account, len(texts.trees)),
        *dropped(texts.name, texts.account, texts.limits),
    ]
    return [_Wrong(finding, certain=isinstance(finding, Refused)) for finding in found]


EXAMINATIONS: tuple[Callable[[Texts], list[_Wrong]], ...] = (
    # First what says most about its cause: a stop too many is another scored token too.
    stops,
    boundary,
    answered_before,
    scored,
    beginnings,
    unused,
)


def _wrong(code: str, said: str, odds: Sequence[Odd], certain: bool = True) -> _Wrong:
    return _Wrong(Finding(code, said, tuple(str(o.row) for o in odds[:_ROWS_NAMED])), certain)


def _of(texts: Texts, kind: Kind) -> list[Odd]:
    return [odd for odd in texts.odd if odd.kind == kind]


def _dropped(texts: Texts, reason: str, code: str, what: str, advice: str = "") -> list[_Wrong]:
    account, limit = texts.account, texts.limits.spans
    rows, left = account.dropped.get(reason, 0), account.left_out.get(reason, 0)
    answers = account.responses + sum(account.left_out.values())
    if rows <= limit * account.read and left <= limit * answers:
        return []
    said = f"{rows} of {account.read} rows and {left} of {answers} responses were left out, {what}"
    named = account.examples.get(reason, [])
    said += f", such as {named[0][0]}: {named[0][1]}" if named else ""
    said = texts.said(f"{said} (preflight.spans is {limit:.0%}). {advice}".strip())
    return [_Wrong(Finding(code, said))]


def _spread(rows: Sequence[tuple[Example, Tree]]) -> list[tuple[Example, Tree]]:
    if len(rows) <= NUM_AGAIN:
        return list(rows)
    return [rows[k * (len(rows) - 1) // (NUM_AGAIN - 1)] for k in range(NUM_AGAIN)]


def _written_by_template(
    example: Example, response: Response, renderer: Renderer, known: dict[str, int]
) -> int:
    """How often the template itself writes beginning-of-text into such a conversation."""

    def blank(turns: Iterable[Message]) -> tuple[Message, ...]:
        return tuple({"role": turn["role"], "content": "x"} for turn in turns)

    prompt = blank(turns_of(example.prompt, "user"))
    answer = blank(turns_of(response.content, "assistant"))
    key = str([prompt, answer, example.tools, example.template_options])
    if key not in known:
        blanked = Example(prompt, (Response(answer),), (), example.row, example.tools,
                          example.template_options)  # fmt: skip
        try:
            ids = served(blanked, blanked.responses[0], renderer)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError):
            # Nothing is known of the template, so nothing is said against it.
            return sys.maxsize
        known[key] = ids.count(cast(int, renderer.bos))
    return known[key]


def _echoes(example: Example) -> bool:
    prompt = example.prompt
    said = (
        prompt if isinstance(prompt, str) else str(prompt[-1].get("content", "")) if prompt else ""
    )
    said = said.strip()
    answers = [turns_of(r.content, "assistant")[:1] for r in example.responses]
    texts = [str(turn.get("content", "")).strip() for turns in answers for turn in turns]
    return (
        len(said) >= _ECHO and bool(texts) and all(t.startswith(said) and t != said for t in texts)
    )
