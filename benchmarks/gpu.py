"""Every GPU path against the oracle, then its speed on random weights: one command, no downloads.

    python benchmarks/gpu.py

checks token log-probs and gradients of each way through the engine against float64, one sequence at
a time, and times training steps of three models, built on the device, beside a plain trainer on the
same rows. Written to results/gpu.md and gpu.json. Status 1 where a difference is larger than
allowed.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
import transformers

from on_gpu.cells import OURS, Budget, Cell, blame
from on_gpu.checks import correctness
from on_gpu.models import SHAPES, SIZES, TOY_SHAPES, TOY_SIZES
from on_gpu.report import Report, describe, hardware
from on_gpu.speed import time_model
from upweight.models.reading import free_cached


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (default 8)")
    parser.add_argument("--tiny", action="store_true", help="toy sizes on the CPU: a rehearsal")
    parser.add_argument("--trl", action="store_true", help="TRL too, where it is installed")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device; --tiny rehearses the program on the CPU")
    return args


def main() -> int:
    # A step that has begun is finished, and the files are written, in the last twentieth.
    began, args = time.monotonic(), arguments()
    transformers.utils.logging.set_verbosity_error()
    device = "cpu" if args.tiny else "cuda"
    sizes, shapes = (TOY_SIZES, TOY_SHAPES) if args.tiny else (SIZES, SHAPES)
    report = Report("gpu-tiny" if args.tiny else "gpu", hardware(device, args.tiny))
    print(describe(report.about), flush=True)
    for check in correctness(device, args.tiny):
        report.add(check)
    report.save()
    sides = 3 if args.trl else 2
    for done, size in enumerate(sizes):
        left = (len(sizes) - done) * len(shapes) * sides
        budget = Budget(began + 57 * args.minutes, left)
        try:
            for result in time_model(size, shapes, device, budget, args.trl):
                report.add(result)
                report.save()
        except Exception as error:
            # The model itself did not fit, or the device is gone. The others have their turn.
            cell = Cell(size.name, "-", OURS, 0, 0, 0.0, "-")
            blame(cell, error, "before the first step")
            report.add(cell)
        free_cached()
    path = report.save()
    print(f"\n{path.read_text()}\n{path}, {time.monotonic() - began:.0f} s")
    return 0 if report.holds else 1


if __name__ == "__main__":
    sys.exit(main())
