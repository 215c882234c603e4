"""What travels with an exported model: conversations, the token ids that training made of them, and
the log-probs that the trained model gives an answer. No row of anyone's data is among them.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from upweight.data.render import Renderer, make_renderer
from upweight.data.trees import prompt_ids, text_after, tree, trees
from upweight.errors import DataError, ModelError, Refusal
from upweight.types import Dropped, Example, Message, Response, ResponseId, RowId, Text, Tree

FILE = "probes.json"
ANSWER = "Heron."
BIRD: Message = {"role": "user", "content": "Name a bird."}
CONVERSATIONS: tuple[tuple[Message, ...], ...] = (
    (BIRD,),
    ({"role": "system", "content": "Be brief."}, BIRD),
    (BIRD, {"role": "assistant", "content": ANSWER}, {"role": "user", "content": "Zwölf  & 3.5?"}),
)
TEXTS = ("A bird:", "Q: Zwölf  & 3.5?\n\nA:")


@dataclass(frozen=True)
class Probe:
    """A prompt, its ids as serving should render it, and an answer with its log-probs in nats;
    `start_logps` are those that the model gave it before training, none where they are no others.
    """

    prompt: Text
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logps: tuple[float, ...] = ()
    start_logps: tuple[float, ...] = ()


@dataclass(frozen=True)
class Probes:
    """The probes of one model, and how they are rendered; `date` is Renderer's."""

    template: str
    template_options: Mapping[str, Any]
    stop_ids: tuple[int, ...]
    probes: tuple[Probe, ...]
    date: str | None = None


def examples(template: str) -> list[Example]:
    prompts: Sequence[Text] = CONVERSATIONS if template == "chat" else TEXTS
    answer = (Response(ANSWER),)
    return [Example(p, answer, (), RowId("probe", i)) for i, p in enumerate(prompts, start=1)]


def make_probes(renderer: Renderer) -> Probes:
    """Those of the conversations that the template takes, without log-probs yet.

    Where the prompt that is served is not how the conversation goes on to be rendered (a template
    may open a thought that this answer has none of), the answer's own tokens stand behind it.
    """
    unlimited = replace(renderer, max_length=None)
    plain = renderer.tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    found: list[Probe] = []
    for example in examples(renderer.template):
        grown, served = tree(example, unlimited), prompt_ids(example, unlimited)
        if isinstance(served, Dropped):
            continue
        response = (*plain, renderer.end)
        if not isinstance(grown, Dropped) and grown[0].prompt == served:
            response = grown[0].responses[0]
        found.append(Probe(example.prompt, served, response))
    return Probes(
        renderer.template,
        renderer.template_options,
        tuple(sorted(renderer.stop_ids)),
        tuple(found),
        renderer.date,
    )


def probe_trees(probes: Probes) -> list[Tree]:
    return [
        Tree(p.prompt_ids, (p.response_ids,), (), (ResponseId(RowId(FILE, i), 0),), (True,))
        for i, p in enumerate(probes.probes, start=1)
    ]


def with_logps(probes: Probes, logps: Float[Tensor, " scored"]) -> Probes:
    """`logps` are those of `probe_trees`, in order."""
    pieces = logps.split([len(p.response_ids) for p in probes.probes])
    told = (replace(p, logps=tuple(x.tolist())) for p, x in zip(probes.probes, pieces, strict=True))
    return replace(probes, probes=tuple(told))


def with_start(probes: Probes, start: Probes, measurable: float) -> Probes:
    """With the log-probs of the same probes before training, where one of them has changed by more
    than is `measurable`."""
    pairs = list(zip(probes.probes, start.probes, strict=True))
    changes = [abs(x - y) for p, s in pairs for x, y in zip(p.logps, s.logps, strict=True)]
    if not max(changes, default=0.0) > measurable:
        return probes
    return replace(probes, probes=tuple(replace(p, start_logps=s.logps) for p, s in pairs))


def write_probes(folder: Path, probes: Probes, tokenizer: PreTrainedTokenizerBase) -> None:
    record = {
        "about": "what this model gives in float32; compared by: upweight check --model FOLDER",
        "upweight": importlib.metadata.version("upweight"),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "template": probes.template,
        "template_options": dict(probes.template_options),
        "date": probes.date,
        "stop_token_ids": list(probes.stop_ids),
        "probes": [
            {
                "text" if isinstance(p.prompt, str) else "messages": p.prompt,
                "response": text_after(p.prompt_ids, p.response_ids, tokenizer),
                "prompt_ids": list(p.prompt_ids),
                "response_ids": list(p.response_ids),
                "logps": list(p.logps),
                "start_logps": list(p.start_logps),
            }
            for p in probes.probes
        ],
    }
    (folder / FILE).write_text(json.dumps(record, ensure_ascii=False, indent=1), encoding="utf-8")


def read_probes(path: Path) -> Probes:
    """Raises DataError when the file is not what write_probes writes."""
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
        found = tuple(
            Probe(
                p["text"] if "text" in p else tuple(p["messages"]),
                tuple(map(int, p["prompt_ids"])),
                tuple(map(int, p["response_ids"])),
                tuple(map(float, p["logps"])),
                tuple(map(float, p.get("start_logps", ()))),
            )
            for p in record["probes"]
        )
        options: Mapping[str, Any] = dict(record["template_options"])
        stops = tuple(map(int, record["stop_token_ids"]))
        for i, probe in enumerate(found, start=1):
            _require_whole(probe, f"probe {i}")
        day = record.get("date")
        if day is not None:
            day = date.fromisoformat(day).isoformat()
        read = Probes(str(record["template"]), options, stops, found, day)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{path} is not what an export writes ({type(error).__name__}: {error}). Copy it from "
            "the run's model folder again."
        ) from error
    return read


def _require_whole(probe: Probe, where: str) -> None:
    ids = (*probe.prompt_ids, *probe.response_ids)
    if not (probe.prompt_ids and probe.response_ids) or min(ids) < 0:
        raise ValueError(f"{where} has no token ids in prompt_ids or response_ids")
    wanted = len(probe.response_ids)
    if len(probe.logps) != wanted or len(probe.start_logps) not in (0, wanted):
        raise ValueError(
            f"{where} has {len(probe.logps)} logps and {len(probe.start_logps)} start_logps for "
            f"{wanted} response_ids"
        )


def require_same_rendering(
    name: str, tokenizer: PreTrainedTokenizerBase, renderer: Renderer, rows: Sequence[Example]
) -> None:
    """What `tokenizer` makes of the rows, against what `renderer` made of them in training.

    Raises Refusal UW402 where a token differs.
    """
    probes = replace(make_probes(renderer), probes=())
    again = _renderer(name, tokenizer, probes, renderer)
    alone = [row for row in rows if not row.responses]
    rows = [row for row in rows if row.responses]
    for example in alone:
        was, found = (prompt_ids(example, r) for r in (renderer, again))
        if isinstance(was, Dropped) or isinstance(found, Dropped):
            _require_same_fate(name, example, was, found)
        else:
            _require_same_ids(name, str(example.row), was, found, tokenizer)
    pairs = zip(rows, trees(rows, renderer), trees(rows, again), strict=True)
    for example, then, now in pairs:
        if isinstance(then, Dropped) or isinstance(now, Dropped):
            _require_same_fate(name, example, then, now)
            continue
        texts = ((grown.prompt, *grown.responses) for grown in (then[0], now[0]))
        for was, found in zip(*texts, strict=True):
            _require_same_ids(name, str(example.row), was, found, tokenizer)


def _require_same_fate(name: str, example: Example, then: object, now: object) -> None:
    """Of rows that are not used, now or in training: used or dropped for the same reason."""
    was, found = (g.reason if isinstance(g, Dropped) else "used" for g in (then, now))
    if was != found:
        raise _renders_otherwise(name, f"{example.row} is {found} and was {was}")


def require_same_probes(name: str, tokenizer: PreTrainedTokenizerBase, probes: Probes) -> None:
    """Raises Refusal UW402 where `tokenizer` makes other tokens of the probes' prompts."""
    again = replace(_renderer(name, tokenizer, probes), max_length=None)
    for i, probe in enumerate(probes.probes, start=1):
        row = RowId(FILE, i)
        found = prompt_ids(Example(probe.prompt, (), (), row), again)
        if isinstance(found, Dropped):
            raise _renders_otherwise(name, f"{row} cannot be rendered: {found.detail}")
        _require_same_ids(name, str(row), probe.prompt_ids, found, tokenizer)


def _renderer(
    name: str, tokenizer: PreTrainedTokenizerBase, probes: Probes, like: Renderer | None = None
) -> Renderer:
    try:
        return make_renderer(
            tokenizer,
            template="chat" if probes.template == "chat" else "none",
            stop_token_ids=probes.stop_ids,
            max_length=like.max_length if like else None,
            truncation=like.truncation if like else "drop",
            template_options=probes.template_options,
            date=probes.date,
        )
    except ModelError as error:
        raise _renders_otherwise(name, str(error)) from error


def _require_same_ids(
    name: str,
    where: str,
    was: Sequence[int],
    found: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    if tuple(was) == tuple(found):
        return
    longest = max(len(was), len(found))
    at = next(i for i in range(longest) if tuple(was[i : i + 1]) != tuple(found[i : i + 1]))
    now, then = (
        f"{tokenizer.convert_ids_to_tokens(ids[at])!r} ({ids[at]})" if at < len(ids) else "nothing"
        for ids in (found, was)
    )
    raise _renders_otherwise(name, f"token {at + 1} of {where} is {now} and was {then} in training")


def _renders_otherwise(name: str, said: str) -> Refusal:
    return Refusal("UW402", f"{name} writes other tokens than training did: {said}.")


def served_otherwise(renderer: Renderer, rows: Sequence[Example]) -> str | None:
    """What a server must be told to write prompts as training did, where its defaults do not."""
    own = [row for row in rows if row.template_options]
    if own and renderer.template == "chat":
        said = json.dumps(dict(own[0].template_options or {}), ensure_ascii=False, default=str)
        return (
            f"rows set template options of their own (such as {own[0].row}: {said}): requests of "
            "their kind must set chat_template_kwargs to the same"
        )
    tokenizer = renderer.tokenizer
    if renderer.template == "none":
        if not tokenizer.chat_template:
            return None
        return "it was trained on text without its chat template: serve it with completions of text"
    for example in examples("chat"):
        wanted = prompt_ids(example, replace(renderer, max_length=None))
        if isinstance(wanted, Dropped) or isinstance(example.prompt, str):
            continue
        served = tokenizer.apply_chat_template(
            [dict(turn) for turn in example.prompt], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(str(served), add_special_tokens=False)["input_ids"]
        if tuple(ids) != wanted and renderer.template_options:
            said = json.dumps(dict(renderer.template_options), ensure_ascii=False)
            return f"requests must set chat_template_kwargs to {said}, as training did"
    return None
