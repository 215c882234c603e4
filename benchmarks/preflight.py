"""Seconds that the preflight takes: for generated rows, part by part, or of the demo.

    python benchmarks/preflight.py [--rows 10000] [--model FOLDER]
    python benchmarks/preflight.py --demo

The second runs the demo and takes the time of each part of its preflight, and of the whole: both in
one run, on the same threads. What a run without a preflight would do too, reading and tokenizing
the rows, is no part of it.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

import upweight.recipes.prepare as prepare_module
import upweight.recipes.reference as reference_module
import upweight.recipes.start as start_module
import upweight.recipes.train as train_module
from results import markdown_table, save
from upweight.config import load_run
from upweight.data.stream import grow, load_examples
from upweight.demo.run import demo
from upweight.models.named import demo_model_path
from upweight.recipes.prepare import load_policy
from upweight.recipes.reference import probe_reference
from upweight.recipes.rendering import renderer_for
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


PARTS = {
    "read back, tokenized again": (start_module, "_texts"),
    "copies": (prepare_module, "copies"),
    "examinations": (start_module, "examine"),
    "packed = alone": (start_module, "require_alone"),
    "noise": (start_module, "require_quiet"),
    "step 0, what the reference says": (train_module, "with_reference"),
    "answers of the reference": (reference_module, "own_nats"),
}
"""What the preflight is made of, by where a run looks each up."""


def of_the_demo() -> None:
    """The demo's preflight and the whole demo, as results/preflight.md."""
    spent = dict.fromkeys(PARTS, 0.0)

    def watched(name: str, do: Callable[..., T]) -> Callable[..., T]:
        def run(*args: Any, **kwargs: Any) -> T:
            began = time.perf_counter()
            try:
                return do(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - began

        return run

    for name, (module, attribute) in PARTS.items():
        setattr(module, attribute, watched(name, getattr(module, attribute)))
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        outcome = demo(None, str(Path(folder, "demo")), Silent())
        whole = time.perf_counter() - began
        assert outcome is not None
    total = sum(spent.values())
    lines = [*spent.items(), ("preflight", total), ("whole demo", whole)]
    table = [[name, f"{seconds:.2f}", f"{100 * seconds / whole:.2f}"] for name, seconds in lines]
    text = markdown_table(["", "seconds", "% of the demo"], table)
    print(text)
    threads = f"{torch.get_num_threads()} threads"
    print(save("preflight", f"# The demo's preflight, {threads}\n\n{text}", {"seconds": spent}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--demo", action="store_true", help="the demo's preflight in a whole demo")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--model", help="the demo's, unless another is named")
    arguments = parser.parse_args()
    if arguments.demo:
        of_the_demo()
        return
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
        reference, own, _ = timed(
            "reference on a few rows", lambda: probe_reference(run, lm, begun.prepared)
        )
        timed("what it says", lambda: with_reference(begun, reference, own, Silent(), fresh=True))


if __name__ == "__main__":
    main()
