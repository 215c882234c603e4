"""upweight against TRL in fp32: the same model, rows and order give the same numbers.

    python benchmarks/equal.py --data pairs.jsonl

compares token ids, the log-prob of every response before training, and the loss of the first
steps; prints the largest differences and ends with status 1 where one is larger than allowed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from environment import trl_python
from protocol import Event, Spec, named, one, run
from results import markdown_table, save
from rows import make_work, model_without_tail, renderer_of, rows_of
from settings import parse_settings
from upweight.models.named import demo_model_path
from upweight.models.named import resolve as resolve_model

LARGEST_LOSS_DIFFERENCE = 1e-4
LARGEST_LOGP_DIFFERENCE = 1e-3


@dataclass(frozen=True)
class Comparison:
    """Both sides' events: pairs before training, then steps."""

    ours: tuple[list[Event], list[Event]]
    theirs: tuple[list[Event], list[Event]]

    @property
    def same_tokens(self) -> bool:
        def ids(pairs: list[Event]) -> list[Any]:
            return [[list(p[k]) for k in ("prompt", "chosen", "rejected")] for p in pairs]

        return ids(self.ours[0]) == ids(self.theirs[0])

    @property
    def logp_difference(self) -> float:
        return max(
            abs(a[key] - b[key])
            for a, b in zip(self.ours[0], self.theirs[0], strict=True)
            for key in ("logp_chosen", "logp_rejected")
        )

    @property
    def loss_difference(self) -> float:
        return max(
            abs(a["loss"] - b["loss"]) for a, b in zip(self.ours[1], self.theirs[1], strict=True)
        )

    @property
    def holds(self) -> bool:
        return (
            self.same_tokens
            and self.logp_difference <= LARGEST_LOGP_DIFFERENCE
            and self.loss_difference <= LARGEST_LOSS_DIFFERENCE
        )

    def lines(self) -> list[str]:
        logps = [p[key] for p in self.ours[0] for key in ("logp_chosen", "logp_rejected")]
        return [
            f"token ids: {'the same' if self.same_tokens else 'NOT THE SAME'}",
            f"log-probs of {len(logps)} responses ({min(logps):.1f} to {max(logps):.1f} nats): "
            f"largest difference {self.logp_difference:.2e} (allowed {LARGEST_LOGP_DIFFERENCE})",
            f"losses of {len(self.ours[1])} steps: largest difference {self.loss_difference:.2e} "
            f"(allowed {LARGEST_LOSS_DIFFERENCE})",
        ]

    def table(self) -> str:
        return markdown_table(
            ["step", "loss upweight", "loss TRL", "difference", "grad norm upweight", "TRL"],
            [
                [
                    str(a["step"]),
                    f"{a['loss']:.7f}",
                    f"{b['loss']:.7f}",
                    f"{abs(a['loss'] - b['loss']):.1e}",
                    f"{a['grad_norm']:.5f}",
                    f"{b['grad_norm']:.5f}",
                ]
                for a, b in zip(self.ours[1], self.theirs[1], strict=True)
            ],
        )


def compare(args: argparse.Namespace, scratch: Path) -> tuple[Comparison, dict[str, Any]]:
    model = model_without_tail(resolve_model(args.model or demo_model_path()), scratch / "model")
    work = make_work(
        "equal",
        rows_of(args.data),
        renderer_of(model),
        scratch / "rows",
        pairs_per_step=args.pairs_per_step,
        steps=args.steps,
    )
    print(work.describe(), file=sys.stderr)
    shared = Spec(
        task="score",
        model=model,
        rows=str(work.ours),
        steps=args.steps,
        pairs_per_step=args.pairs_per_step,
        learning_rate=args.learning_rate,
        beta=args.beta,
        threads=args.threads,
        settings=parse_settings(args.set),
    )
    theirs = replace(
        shared,
        rows=str(work.theirs),
        settings={
            "per_device_train_batch_size": args.trl_batch,
            "gradient_checkpointing": False,
        },
    )
    python = trl_python()
    events = [
        run(sys.executable, "upweight_worker.py", shared),
        run(sys.executable, "upweight_worker.py", replace(shared, task="train")),
        run(python, "trl_worker.py", theirs),
        run(python, "trl_worker.py", replace(theirs, task="train")),
    ]
    sides = {"upweight": one(events[1], "side"), "TRL": one(events[3], "side")}
    comparison = Comparison(
        (named(events[0], "pair"), named(events[1], "step")),
        (named(events[2], "pair"), named(events[3], "step")),
    )
    return comparison, {"work": work.describe(), "sides": sides}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--data", nargs="+", required=True, help="files of preferences")
    parser.add_argument("--model", help="hub id, folder or .gguf file; left out: the demo's model")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--pairs-per-step", type=int, default=8)
    parser.add_argument("--trl-batch", type=int, default=4, help="pairs that TRL computes at once")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="upweight's keys")
    parser.add_argument("--name", default="equal", help="of the files under benchmarks/results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="upweight-equal-") as scratch:
        comparison, about = compare(args, Path(scratch))
    verdict = "equal" if comparison.holds else "NOT EQUAL"
    text = "\n".join(
        [
            f"# upweight and TRL in fp32: {verdict}",
            "",
            about["work"] + f"; learning rate {args.learning_rate}, beta {args.beta}",
            "",
            *(f"- {line}" for line in comparison.lines()),
            "",
            comparison.table(),
        ]
    )
    print(text)
    record = {**about, "ours": comparison.ours, "theirs": comparison.theirs, "holds": verdict}
    save(args.name, text, record)
    return 0 if comparison.holds else 1


if __name__ == "__main__":
    sys.exit(main())
