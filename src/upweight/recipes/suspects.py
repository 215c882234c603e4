"""suspects.jsonl: the labels of a finished run that a person should look at.

Held-out preferences are judged by the finished policy, which was not trained on them. Those of the
training set are judged by the policy as it first met them: once it has been trained on a flipped
label it has learned to agree with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from upweight.evidence import evaluate
from upweight.evidence.records.ledger import read_ledger
from upweight.recipes.state import State
from upweight.training.rundir import write_atomic
from upweight.trust.suspects import Judged, Suspect, suspects
from upweight.trust.words import Compared
from upweight.types import Preference, Tree


@dataclass(frozen=True)
class _Place:
    tree: Tree
    preference: Preference


Key = tuple[str, str, int, int]
"""A preference: its set, its row, and the two responses by their number there."""


def write_suspects(state: State) -> None:
    """Says on the screen how many there are, if any."""
    places = dict(_places(state))
    margins = dict(_margins(state))
    keys = [key for key in places if key in margins]
    judged = [Judged(key[0], _compared(places[key]), margins[key]) for key in keys]
    found = suspects(judged, state.run.watch.suspect)
    lines = [_line(state, keys[s.index], places[keys[s.index]], judged[s.index], s) for s in found]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomic(state.rundir.file("suspects.jsonl"), text)
    if found:
        state.screen.note(
            f"labels: {len(found)} of {len(judged)} preferences are contradicted by the policy and "
            f"by length and words; read them in {state.rundir.file('suspects.jsonl')}"
        )


def _places(state: State) -> Iterator[tuple[Key, _Place]]:
    for name, trees in state.begun.prepared.trees.items():
        for tree in trees:
            for p in tree.preferences:
                if p.probability < 1:
                    continue  # the row says itself that its label is in doubt
                chosen, rejected = tree.ids[p.chosen], tree.ids[p.rejected]
                yield (name, str(chosen.row), chosen.index, rejected.index), _Place(tree, p)


def _margins(state: State) -> Iterator[tuple[Key, float]]:
    path = state.rundir.file("margins.jsonl")
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        for row, chosen, rejected, margin in json.loads(line)["margins"]:
            yield ("train", row, chosen, rejected), margin
    for row in read_ledger(state.rundir.file("ledger.parquet")):
        yield (row.set, row.row, row.chosen, row.rejected), row.margin


def _compared(place: _Place) -> Compared:
    tree, p = place.tree, place.preference
    return Compared(tree.prompt, tree.responses[p.chosen], tree.responses[p.rejected])


def _line(state: State, key: Key, place: _Place, judged: Judged, found: Suspect) -> dict[str, Any]:
    tokenizer, tree = state.lm.tokenizer, place.tree
    name, row, chosen, rejected = key
    texts = evaluate.texts(tree, tokenizer)
    words = [str(tokenizer.decode([token])).strip() for token in found.tokens]
    said = ", ".join(json.dumps(word, ensure_ascii=False) for word in words if word)
    met = "when it first met it" if name == "train" else "without having trained on it"
    why = (
        f"The policy held the rejected response better {met}, {found.model:.1f} to 1, and so do "
        f"length and words, {found.words:.1f} to 1"
    )
    return {
        "set": name,
        "row": row,
        "chosen_index": chosen,
        "rejected_index": rejected,
        "prompt": str(tokenizer.decode(list(tree.prompt), skip_special_tokens=False)),
        "chosen": texts[chosen],
        "rejected": texts[rejected],
        "margin": judged.margin,
        "odds_model": found.model,
        "odds_words": found.words,
        "why": f"{why} (such as {said})." if said else f"{why}.",
    }
