"""What the watch costs: seconds a step that its functions take, beside the step itself.

    python benchmarks/watch.py [--steps 8]

SmolLM2-135M-Instruct on the demo's preferences, 8 pairs a step: a small step, beside which what is
paid once a step weighs most.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import results
import upweight as uw
import upweight.recipes.state as run_state
import upweight.recipes.train as run_train
import upweight.training.guard as guard
from upweight.models.named import demo_model_path
from upweight.trust.watch import Watch

DEMO = Path(uw.__file__).parent / "demo"
WATCHED = (
    (Watch, "packed"),
    (Watch, "after"),
    (run_train, "note"),
    (run_state, "_write_noted"),
    (guard.Guard, "look"),
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    spent = timing(setattr)
    with tempfile.TemporaryDirectory() as folder:
        uw.train(
            **{
                "model": demo_model_path(),
                "data": str(DEMO / "train.jsonl"),
                "data.format": "responses",
                "out": f"{folder}/run",
                "data.limit": 16,  # what the reference says of the others is not looked at
                "batch.pairs_per_step": 8,
                "steps": args.steps,
            }
        )
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    ends = [r["seconds"] for r in records if r["kind"] == "train"]
    step = statistics.median(b - a for a, b in zip(ends, ends[1:], strict=False))
    rows = [
        [name, f"{1000 * sum(times) / args.steps:.2f}", f"{sum(times) / args.steps / step:.3%}"]
        for name, times in spent.items()
    ]
    total = sum(sum(times) for times in spent.values()) / args.steps
    rows.append(["all of it", f"{1000 * total:.2f}", f"{total / step:.3%}"])
    text = (
        f"# What the watch costs\n\nSmolLM2-135M-Instruct, all weights, 8 pairs a step: "
        f"{step:.2f} s a step (median of {len(ends) - 1}).\n\n"
        + results.markdown_table(["function", "ms a step", "of a step"], rows)
    )
    print(text)
    print(results.save("watch", text, {"step_seconds": step, "seconds": spent}))


def timing(put: Callable[[Any, str, Any], None]) -> dict[str, list[float]]:
    """The seconds of each call of what is watched, from here on: `put` exchanges it for what takes
    the time."""
    spent = {name: list[float]() for _, name in WATCHED}
    for owner, name in WATCHED:
        put(owner, name, timed(getattr(owner, name), spent[name]))
    return spent


def timed(function: Callable[..., Any], into: list[float]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            into.append(time.perf_counter() - began)

    return call


if __name__ == "__main__":
    main()
