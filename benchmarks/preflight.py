"""Seconds that the preflight takes for generated rows, part by part.

    python benchmarks/preflight.py [--rows 10000] [--model FOLDER]

Without a model: what needs the rows and a tokenizer alone. With one, also what `check` asks it.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from upweight.config import load_run
from upweight.data.stream import grow, load_examples
from upweight.models.weights import demo_model_path
from upweight.recipes.prepare import load_policy, renderer_for
from upweight.recipes.reference import probe_reference
from upweight.recipes.screen import Silent
from upweight.recipes.start import start, with_reference
from upweight.trust.identity import computed_together, require_alone
from upweight.trust.near import copies
from upweight.trust.preflight import EXAMINATIONS, Examined

T = TypeVar("T")
STEMS = ["the", "of", "and", "to", "in", "is", "that", "for", "with", "as", "on", "by"]
WORDS = [stem + end for stem in STEMS for end in ("", "ly", "s")]


def rows(num: int) -> list[dict[str, str]]:
    """Prompts of about 40 words and responses of about 100, one in fifty a repetition."""
    draw = random.Random(0)

    def words(num: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(num // 2, num * 3 // 2)))

    made = [
        {"prompt": f"{i} {words(40)}", "chosen": words(100), "rejected": words(100)}
        for i in range(num)
    ]
    for i in range(49, num, 50):
        made[i] = made[i - 1]
    return made


def timed(name: str, do: Callable[[], T]) -> T:
    began = time.perf_counter()
    made = do()
    print(f"{name:<28} {time.perf_counter() - began:7.2f} s", flush=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--model", help="the demo's, unless another is named")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "rows.jsonl"))
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows(arguments.rows)))
        values = {"model": arguments.model or demo_model_path(), "data": path}
        resolved = load_run(None, values=values)
        run = resolved.run
        lm = timed("model", lambda: load_policy(run))
        renderer = renderer_for(run, lm)
        examples, account = timed("read", lambda: load_examples([path]))
        trees = timed("render and tokenize", lambda: grow(examples, renderer, account))
        repeated = timed("copies", lambda: copies(examples))
        examined = Examined("train", trees, account, run.preflight, repeated)
        for examination in EXAMINATIONS:
            timed(examination.__name__, lambda examination=examination: examination(examined))
        timed("packed = alone", lambda: require_alone(lm, computed_together(trees)))
        begun = timed("start, all of the above", lambda: start(resolved, Silent()))
        found = timed("reference on a few rows", lambda: probe_reference(run, lm, begun.prepared))
        timed("what it says", lambda: with_reference(begun, *found, Silent(), fresh=True))


if __name__ == "__main__":
    main()
