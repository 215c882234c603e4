"""upweight against TRL: the same model, rows, order, precision and steps, in turn.

    python benchmarks/compare.py --data pairs.jsonl responses.jsonl --generate 150/50/50

prints tables of ratios with their spread and writes them under benchmarks/results. Each run is a
process of its own that starts cold; a round runs every side once, so that what else the machine
does in that time hits all of them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from environment import trl_python
from floor import ModelShape, model_shape, operations
from protocol import Event, Spec, WorkerError, named, one, run
from results import markdown_table, save, spread
from rows import (
    Work,
    generated_rows,
    make_work,
    model_without_tail,
    one_pair_rows,
    renderer_of,
    rows_of,
)
from settings import ABLATIONS, BEST, CANDIDATES, DEFAULTS, Settings, parse_settings
from upweight.models.named import demo_model_path
from upweight.models.named import resolve as resolve_model

OURS, THEIRS = "upweight", "TRL"
SIDES = ("TRL defaults", "TRL best", OURS)


@dataclass(frozen=True)
class Side:
    """One contestant: a package with its settings."""

    name: str
    package: str
    settings: Settings


@dataclass(frozen=True)
class Measured:
    """What one run of one side came to. The first step is a warm-up and in no rate.

    `reference_seconds` is the pass over all rows before the first step; 0 where the reference is
    computed within the steps (`reference_inside`).
    """

    losses: tuple[float, ...]
    seconds: tuple[float, ...]
    reference_seconds: float
    reference_inside: bool
    peak_bytes: int
    seconds_to_first_step: float
    settings: Settings

    def pairs_per_second(self, work: Work) -> float:
        """With a reference that is known already (unless it is computed within the steps)."""
        return work.pairs_per_step * len(self.seconds[1:]) / sum(self.seconds[1:])

    def pairs_per_second_with_reference(self, work: Work) -> float:
        """The reference pass paid too, as in a first run of one epoch."""
        return 1 / (1 / self.pairs_per_second(work) + self.reference_seconds / work.pairs)

    def tokens_per_second(self, work: Work) -> float:
        """Unique tokens: each prompt once, no padding, whatever the side computed."""
        return sum(map(work.num_tokens, range(1, len(work.steps)))) / sum(self.seconds[1:])

    def operations_per_second(self, work: Work, shape: ModelShape, *, lora: bool) -> float:
        done = sum(operations(shape, step, lora=lora) for step in work.steps[1:])
        return done / sum(self.seconds[1:])


@dataclass
class Rounds:
    """All runs of the sides on one set of rows, by side; a side that failed has its reason.

    `peaks` are the matrix products per second that were measured between the rounds.
    """

    work: Work
    lora: bool
    runs: dict[str, list[Measured]] = field(default_factory=dict[str, list[Measured]])
    failed: dict[str, str] = field(default_factory=dict[str, str])
    peaks: list[float] = field(default_factory=list[float])

    def ratios(self, of: str, to: str, value: Any) -> list[float]:
        """value(run of one side) / value(the other's run in the same round)."""
        pairs = zip(self.runs.get(of, []), self.runs.get(to, []), strict=False)
        return [value(a) / value(b) for a, b in pairs]


@dataclass(frozen=True)
class Bench:
    """What every part of the program needs."""

    args: argparse.Namespace
    model: str
    shape: ModelShape
    trl: Path
    record: dict[str, Any]

    def spec(self, work: Work, side: Side, *, lora: bool, task: str = "train") -> Spec:
        return Spec(
            task=task,
            model=self.model,
            rows=str(work.ours if side.package == OURS else work.theirs),
            steps=len(work.steps),
            pairs_per_step=work.pairs_per_step,
            precision=self.args.precision,
            lora=lora,
            learning_rate=self.args.learning_rate,
            threads=self.args.threads,
            settings=side.settings,
        )

    def measure(self, work: Work, side: Side, *, lora: bool) -> Measured:
        spec = self.spec(work, side, lora=lora)
        if side.package == OURS:
            events = run(sys.executable, "upweight_worker.py", spec)
        else:
            events = run(self.trl, "trl_worker.py", spec)
        measured = _measured(events)
        self.keep(work, side.name, lora, events)
        say(f"  {side.name}: {measured.pairs_per_second(work):.3f} pairs/s")
        return measured

    def peak(self, work: Work) -> float:
        side = Side("peak", OURS, {})
        events = run(
            sys.executable, "upweight_worker.py", self.spec(work, side, lora=False, task="peak")
        )
        return float(one(events, "peak")["flops"])

    def keep(self, work: Work, name: str, lora: bool, events: list[Event]) -> None:
        kept = {"data": work.name, "side": name, "lora": lora, "events": events}
        self.record.setdefault("runs", []).append(kept)


def _measured(events: list[Event]) -> Measured:
    steps, end = named(events, "step"), one(events, "end")
    reference = [event["seconds"] for event in named(events, "reference")]
    return Measured(
        losses=tuple(step["loss"] for step in steps),
        seconds=tuple(step["seconds"] for step in steps),
        reference_seconds=sum(reference),
        reference_inside=not reference,
        peak_bytes=end["peak_bytes"],
        seconds_to_first_step=end["seconds_to_first_step"],
        settings=one(events, "side")["settings"],
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def alternate(bench: Bench, work: Work, sides: Sequence[Side], *, lora: bool) -> Rounds:
    """Every side once a round. A side that fails is out, and the table says why."""
    rounds = Rounds(work, lora)
    for number in range(bench.args.rounds):
        say(f"{work.name}, {_tuning(lora)}, round {number + 1} of {bench.args.rounds}")
        rounds.peaks.append(bench.peak(work))
        for side in sides:
            if side.name in rounds.failed:
                continue
            try:
                measured = bench.measure(work, side, lora=lora)
            except WorkerError as error:
                say(f"  {side.name}: {error}\n{error.said}")
                rounds.failed[side.name] = str(error)
                rounds.runs.pop(side.name, None)
            else:
                rounds.runs.setdefault(side.name, []).append(measured)
    return rounds


def _tuning(lora: bool) -> str:
    return "LoRA" if lora else "full"


def peers(bench: Bench, work: Work, *, lora: bool) -> str:
    """upweight, TRL at its best settings and TRL left alone, with the ratios of the first two.

    The best settings are those of `--best` that were fastest here.
    """
    tried = [Side(name, THEIRS, CANDIDATES[name] | bench.args.set_trl) for name in bench.args.best]
    sides = [
        Side("TRL defaults", THEIRS, DEFAULTS),
        *(tried if "TRL best" in bench.args.sides else []),
        Side(OURS, OURS, bench.args.set),
    ]
    sides = [side for side in sides if side in tried or side.name in bench.args.sides]
    rounds = alternate(bench, work, sides, lora=lora)
    speeds = {
        side.name: statistics.median(m.pairs_per_second(work) for m in rounds.runs[side.name])
        for side in tried
        if side.name in rounds.runs
    }
    best = max(speeds, key=speeds.__getitem__, default=None)
    if best is not None:
        rounds.runs["TRL best"] = rounds.runs[best]
    found = ", ".join(f"{name} {speed:.3f}" for name, speed in speeds.items())
    parts = [
        f"## {work.name}, {_tuning(lora)}, {bench.args.precision}",
        f"{work.describe()}.",
        f"TRL best: {best}. Tried (pairs/s): {found}.",
        _peers_table(bench, rounds),
        "First losses:",
        _losses_table(rounds),
        *(f"- {name} failed: {why}" for name, why in rounds.failed.items()),
    ]
    return "\n\n".join(parts)


def _peers_table(bench: Bench, rounds: Rounds) -> str:
    work, peak = rounds.work, statistics.median(rounds.peaks)
    measures: list[tuple[str, Any, int]] = [
        ("pairs/s, reference not counted", lambda m: m.pairs_per_second(work), 3),
        ("pairs/s, reference counted", lambda m: m.pairs_per_second_with_reference(work), 3),
        ("unique tokens/s", lambda m: m.tokens_per_second(work), 1),
        (
            f"share of the GEMM peak ({peak / 1e9:.0f} GFLOP/s)",
            lambda m: m.operations_per_second(work, bench.shape, lora=rounds.lora) / peak,
            3,
        ),
        ("peak memory, GiB", lambda m: m.peak_bytes / 2**30, 2),
        ("seconds to the end of step 1", lambda m: m.seconds_to_first_step, 1),
    ]
    names = list(SIDES)
    rows: list[list[str]] = []
    for label, value, digits in measures:
        cells = [
            spread([value(m) for m in rounds.runs.get(n, [])], digits) if n in rounds.runs else "-"
            for n in names
        ]
        if label.endswith("not counted") and any(
            m.reference_inside for m in rounds.runs.get("TRL defaults", [])
        ):
            # It computes the reference within its steps, where it cannot be told apart.
            cells[0] = "-"
        against = [spread(rounds.ratios(OURS, name, value)) for name in ("TRL best", names[0])]
        against[1] = against[1] if cells[0] != "-" else "-"
        rows.append([label, *cells, *against])
    return markdown_table(["", *names, "upweight / TRL best", "upweight / TRL defaults"], rows)


def _losses_table(rounds: Rounds) -> str:
    names = [name for name in SIDES if name in rounds.runs]
    columns = [rounds.runs[name][0].losses for name in names]
    steps = zip(*columns, strict=True)
    rows = [[str(i), *(f"{loss:.6f}" for loss in step)] for i, step in enumerate(steps, 1)]
    return markdown_table(["step", *names], rows)


def price(bench: Bench, work: Work, *, lora: bool) -> str:
    """The time of a DPO step with a warm reference over that of an SFT step on the same trees."""
    ratios: list[float] = []
    for _ in range(bench.args.rounds):
        side = Side(OURS, OURS, bench.args.set)
        spec = bench.spec(work, side, lora=lora, task="price")
        events = run(sys.executable, "upweight_worker.py", spec)
        bench.keep(work, "DPO and SFT", lora, events)
        steps = named(events, "price")
        seconds = {
            name: [s["seconds"] for s in steps if s["objective"] == name and s["step"] > 1]
            for name in ("dpo", "sft")
        }
        ratios += [a / b for a, b in zip(seconds["dpo"], seconds["sft"], strict=True)]
    return (
        f"## {work.name}, {_tuning(lora)}: DPO step / SFT step on the same trees\n\n"
        f"{spread(ratios)} over {len(ratios)} steps"
    )


def ablation(bench: Bench, work: Work, *, lora: bool) -> str:
    """upweight with one switch turned, over upweight as it is: time for the same pairs."""
    whole = Side(OURS, OURS, bench.args.set)
    turned = [Side(name, OURS, bench.args.set | change) for name, change in ABLATIONS.items()]
    rounds = alternate(bench, work, [whole, *turned], lora=lora)

    def seconds(measured: Measured) -> float:
        return 1 / measured.pairs_per_second(work)

    def memory(measured: Measured) -> float:
        return measured.peak_bytes / 2**30

    rows = [
        [
            side.name,
            spread([m.pairs_per_second(work) for m in rounds.runs.get(side.name, [])], 3),
            spread(rounds.ratios(side.name, OURS, seconds)),
            spread(rounds.ratios(side.name, OURS, memory)),
        ]
        for side in [whole, *turned]
    ]
    paid = [m.pairs_per_second_with_reference(work) for m in rounds.runs.get(OURS, [])]
    free = [m.pairs_per_second(work) for m in rounds.runs.get(OURS, [])]
    ratios = [a / b for a, b in zip(free, paid, strict=True)]
    rows.append(["cached reference off", spread(paid, 3), spread(ratios), "-"])
    table = markdown_table(["", "pairs/s", "time / upweight's", "memory / upweight's"], rows)
    failed = [f"- {name} failed: {why}" for name, why in rounds.failed.items()]
    return "\n\n".join([f"## {work.name}, {_tuning(lora)}: one switch turned", table, *failed])


def search(bench: Bench, work: Work, *, lora: bool) -> str:
    """TRL at each of the settings that are tried."""
    sides = [Side("defaults", THEIRS, DEFAULTS)]
    sides += [Side(name, THEIRS, settings) for name, settings in CANDIDATES.items()]
    rounds = alternate(bench, work, sides, lora=lora)
    rows = [
        [
            side.name,
            spread([m.pairs_per_second(work) for m in rounds.runs.get(side.name, [])], 3),
            spread(
                [m.pairs_per_second_with_reference(work) for m in rounds.runs.get(side.name, [])],
                3,
            ),
            spread([m.peak_bytes / 2**30 for m in rounds.runs.get(side.name, [])]),
            rounds.failed.get(side.name, ""),
        ]
        for side in sides
    ]
    head = ["TRL", "pairs/s", "pairs/s, reference counted", "peak memory, GiB", "failed"]
    note = "pairs/s counts the reference where it is computed within the steps (in memory)."
    title = f"## {work.name}, {_tuning(lora)}: TRL's settings"
    return "\n\n".join([title, markdown_table(head, rows), note])


PARTS: Mapping[str, Any] = {
    "peers": peers,
    "price": price,
    "ablation": ablation,
    "search": search,
}


def works(args: argparse.Namespace, model: str, folder: Path) -> list[Work]:
    renderer = renderer_of(model)
    found = [(Path(file).stem, rows_of([file])) for file in args.data]
    found += [(f"{Path(file).stem}-one-pair", one_pair_rows(file)) for file in args.one_pair]
    for text in args.generate:
        try:
            prompt, chosen, rejected = (int(n) for n in text.split("/"))
        except ValueError:
            raise SystemExit(f"--generate {text}: give three token counts, P/C/R") from None
        num = args.steps * args.pairs_per_step
        rows = generated_rows(renderer, prompt, chosen, rejected, num)
        found.append((f"generated-{prompt}-{chosen}-{rejected}", rows))
    if not found:
        raise SystemExit(
            "nothing to compare on: give --data FILE, --one-pair FILE or --generate P/C/R"
        )
    return [
        make_work(
            name,
            rows,
            renderer,
            folder / name,
            pairs_per_step=args.pairs_per_step,
            steps=args.steps,
        )
        for name, rows in found
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", nargs="+", default=[], help="files of preferences, each its own")
    parser.add_argument(
        "--one-pair", nargs="+", default=[], metavar="FILE",
        help="files of K scored responses, each row as the pair of its best and its worst",
    )  # fmt: skip
    parser.add_argument("--generate", nargs="+", default=[], metavar="P/C/R", help="token counts")
    parser.add_argument("--model", help="hub id, folder or .gguf file; left out: the demo's model")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["peers", "price", "ablation"])
    parser.add_argument("--search", action="store_true", help="only try TRL's settings")
    parser.add_argument("--tuning", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--steps", type=int, default=4, help="the first is a warm-up")
    parser.add_argument("--pairs-per-step", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="who takes part")
    parser.add_argument(
        "--best", nargs="+", choices=CANDIDATES, default=BEST,
        help="TRL's settings that are tried; the fastest is its best",
    )  # fmt: skip
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="upweight's keys")
    parser.add_argument("--set-trl", nargs="*", default=[], metavar="KEY=VALUE", help="DPOConfig's")
    parser.add_argument("--name", default="compare", help="of the files under benchmarks/results")
    args = parser.parse_args()
    if args.steps < 2:
        raise SystemExit("--steps: the first step is a warm-up; give at least 2")
    args.set, args.set_trl = parse_settings(args.set), parse_settings(args.set_trl)
    args.parts = ["search"] if args.search else args.parts
    return args


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory(prefix="upweight-compare-") as scratch:
        folder = Path(scratch)
        model = resolve_model(args.model or demo_model_path())
        model = model_without_tail(model, folder / "model")
        bench = Bench(args, model, model_shape(model), trl_python(), {})
        texts = ["# upweight against TRL"]
        for work in works(args, model, folder):
            for part in args.parts:
                for tuning in args.tuning:
                    text = PARTS[part](bench, work, lora=tuning == "lora")
                    print(f"\n{text}", flush=True)
                    texts.append(text)
                    # Written as it grows: hours of it should survive what ends it early.
                    path = save(args.name, "\n\n".join(texts), bench.record)
        print(f"\n{path}")


if __name__ == "__main__":
    main()
