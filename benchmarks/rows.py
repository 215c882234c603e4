"""The same rows for both sides: in the same order, in the same steps, rendered the same.

upweight plans the order of its steps from a seed. Here rows are chosen so that whole steps fill
exactly, upweight's file is written so that its plan takes them as they were chosen, and TRL's file
has one pair a line in the order in which upweight's steps have them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from upweight.data.pack import merge_same_prompts
from upweight.data.read import read_rows
from upweight.data.render import Renderer, make_renderer
from upweight.data.stream import epoch_order, grow, load_examples, plan_epoch
from upweight.types import Example, Text, Tree

_LOOK_AHEAD = 64


@dataclass(frozen=True)
class Work:
    """What both sides train on. `steps` are each step's trees, equal prompts merged."""

    name: str
    ours: Path
    theirs: Path
    steps: tuple[tuple[Tree, ...], ...]
    pairs_per_step: int

    @property
    def pairs(self) -> int:
        return self.pairs_per_step * len(self.steps)

    def num_tokens(self, step: int) -> int:
        return sum(tree.num_tokens for tree in self.steps[step])

    def describe(self) -> str:
        trees = [tree for step in self.steps for tree in step]
        responses = [len(r) for tree in trees for r in tree.responses]
        return (
            f"{len(self.steps)} steps of {self.pairs_per_step} pairs; {len(trees)} prompts of "
            f"{sum(len(t.prompt) for t in trees) / len(trees):.0f} tokens and {len(responses)} "
            f"responses of {sum(responses) / len(responses):.0f} tokens on average"
        )


def renderer_of(model: str) -> Renderer:
    config = AutoConfig.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    limit = getattr(config, "max_position_embeddings", None)
    return make_renderer(tokenizer, template="chat", max_length=limit)


def model_without_tail(model: str, folder: Path) -> str:
    """`model`, or a copy whose chat template renders nothing behind an answer's stop token.

    TRL scores all that a template renders after the prompt, upweight ends with the stop token.
    Weights are linked, not copied.
    """
    renderer = renderer_of(model)
    after = renderer.after or ""
    stop = renderer.stops.search(after)
    tail = after[stop.end() :] if stop else ""
    if not tail:
        return model
    tokenizer = renderer.tokenizer
    # The variable is set by the template itself, so that it is cut however it was written.
    tokenizer.chat_template = (
        "{% set whole %}" + tokenizer.chat_template + "{% endset %}"
        "{% if whole.endswith(" + json.dumps(tail) + ") and not add_generation_prompt %}"
        "{{ whole[:-" + str(len(tail)) + "] }}{% else %}{{ whole }}{% endif %}"
    )
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    for file in Path(model).iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).symlink_to(file.resolve())
    assert renderer_of(str(folder)).after == after[: len(after) - len(tail)]
    return str(folder)


def one_pair_rows(file: str) -> list[dict[str, Any]]:
    """Rows of K scored responses, each as the pair of its best and its worst."""
    examples, _ = load_examples([file], pairing="extremes")
    return [
        {
            "prompt": example.prompt,
            "chosen": example.responses[pair.chosen].content,
            "rejected": example.responses[pair.rejected].content,
        }
        for example in examples
        for pair in example.preferences[:1]
    ]


def make_work(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    renderer: Renderer,
    folder: Path,
    *,
    pairs_per_step: int,
    steps: int,
    seed: int = 0,
) -> Work:
    """Both sides' files in `folder`, for `steps` steps of exactly `pairs_per_step` pairs.

    Raises SystemExit when the rows do not suffice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Rows often lie sorted by topic or length.
    drawn = [rows[i] for i in epoch_order(len(rows), seed, 0)]
    everything = folder / "all.jsonl"
    _write(everything, drawn)
    _, trees = _grown(everything, renderer)
    chosen = _fill(trees, pairs_per_step, steps, name)
    flat = [drawn[trees[i].ids[0].row.line - 1] for step in chosen for i in step]
    ours, theirs = folder / "upweight.jsonl", folder / "trl.jsonl"
    placed: list[Mapping[str, Any]] = [{}] * len(flat)
    for row, place in zip(flat, epoch_order(len(flat), seed, 0), strict=True):
        placed[place] = row
    _write(ours, placed)
    examples, trees = _grown(ours, renderer)
    plan = plan_epoch(trees, pairs_per_step, seed, 0)
    assert len(trees) == len(flat), "a row is dropped that was not before"
    assert [len(step) for step in plan] == [len(step) for step in chosen], "steps do not fill"
    by_line = {example.row.line: example for example in examples}
    order = [by_line[trees[i].ids[0].row.line] for step in plan for i in step]
    _write(theirs, [pair for example in order for pair in _pairs(example)])
    merged = (tuple(merge_same_prompts(trees[i] for i in step)) for step in plan)
    return Work(name, ours, theirs, tuple(merged), pairs_per_step)


def _grown(path: Path, renderer: Renderer) -> tuple[list[Example], list[Tree]]:
    examples, account = load_examples([str(path)])
    return examples, grow(examples, renderer, account)


def _fill(
    trees: Sequence[Tree], pairs_per_step: int, steps: int, name: str
) -> list[tuple[int, ...]]:
    """Trees for each step, in order, whose pairs add up exactly. A tree that does not fit waits."""
    waiting = list(range(len(trees)))
    chosen: list[tuple[int, ...]] = []
    for _ in range(steps):
        # For every number of pairs, the first trees found that make it.
        reached: dict[int, tuple[int, ...]] = {0: ()}
        for i in waiting[: _LOOK_AHEAD + 4 * pairs_per_step]:
            for total, taken in sorted(reached.items(), reverse=True):
                more = total + len(trees[i].preferences)
                if more <= pairs_per_step:
                    reached.setdefault(more, (*taken, i))
            if pairs_per_step in reached:
                break
        if pairs_per_step not in reached:
            raise SystemExit(
                f"{name}: its rows fill {len(chosen)} steps of exactly {pairs_per_step} pairs, "
                f"not {steps}. Take fewer steps, or other --pairs-per-step."
            )
        chosen.append(reached[pairs_per_step])
        waiting = [i for i in waiting if i not in chosen[-1]]
    return chosen


def _pairs(example: Example) -> Iterable[Mapping[str, Any]]:
    """TRL's rows: one for each preference, as messages."""
    for preference in example.preferences:
        yield {
            "prompt": _turns(example.prompt, "user"),
            "chosen": _turns(example.responses[preference.chosen].content, "assistant"),
            "rejected": _turns(example.responses[preference.rejected].content, "assistant"),
        }


def _turns(text: Text, role: str) -> list[dict[str, Any]]:
    turns = [{"role": role, "content": text}] if isinstance(text, str) else text
    return [dict(turn) for turn in turns]


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def rows_of(files: Sequence[str]) -> list[Mapping[str, Any]]:
    return [row for _, row in read_rows(files)]


def generated_rows(
    renderer: Renderer, prompt: int, chosen: int, rejected: int, num: int, seed: int = 0
) -> list[Mapping[str, Any]]:
    """`num` pairs whose prompt, chosen and rejected have so many tokens, of random words.

    The chat template's tokens count as the prompt's, the stop token as the response's. Raises
    SystemExit for lengths that the template alone exceeds.
    """
    tokenizer = renderer.tokenizer
    words = _one_token_words(tokenizer)
    if not words:
        raise SystemExit("--generate: this model's tokenizer has no words of one token")
    draw = random.Random(seed)

    def text(length: int) -> str:
        return " ".join(draw.choice(words) for _ in range(length))

    def encoded(turns: list[dict[str, str]]) -> int:
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return len(tokenizer(rendered, add_special_tokens=False)["input_ids"])

    around = encoded([{"role": "user", "content": "a"}]) - 1
    if prompt <= around or chosen < 2 or rejected < 2:
        raise SystemExit(
            f"--generate {prompt}/{chosen}/{rejected}: the template alone has {around} tokens in "
            "the prompt, and a response is at least a word and its stop token."
        )
    return [
        {
            "prompt": text(prompt - around),
            "chosen": text(chosen - 1),
            "rejected": text(rejected - 1),
        }
        for _ in range(num)
    ]


def _one_token_words(tokenizer: Any) -> list[str]:
    """Words that are one token at a text's beginning and one after a space."""
    words = sorted(
        text
        for text in (tokenizer.decode([i]) for i in range(len(tokenizer)))
        if text.isascii() and text.isalpha() and text.islower() and len(text) > 2
    )
    first = tokenizer(words, add_special_tokens=False)["input_ids"]
    later = tokenizer(["a " + word for word in words], add_special_tokens=False)["input_ids"]
    return [w for w, a, b in zip(words, first, later, strict=True) if len(a) == 1 and len(b) == 2]
