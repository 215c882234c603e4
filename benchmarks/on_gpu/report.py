"""What was found, as tables, and kept on disk as it grows."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from on_gpu.cells import PLAIN, Cell
from on_gpu.checks import Check, checks_table
from results import markdown_table, save

DATA_SHEET = {"H100 80GB HBM3": 989.4, "H100 PCIe": 756, "H200": 989.4}
DATA_SHEET |= {"H100 NVL": 835, "A100": 312, "L40S": 362, "B200": 2250}
"""Dense bf16 TFLOP/s that the vendor gives, by a part of the device's name."""

VERSIONS = ("torch", "transformers", "peft", "upweight", "bitsandbytes")


def matmul_peak(device: str, size: int) -> float:
    """Operations per second of a square bf16 product of random numbers, the best of ten."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = math.inf
    for _ in range(10):
        start = time.perf_counter()
        _ = a @ b, a @ b, a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / 3)
    return 2 * size**3 / best


def speed_table(cells: Sequence[Cell], peak: float, sheet: float | None) -> str:
    head = ["model", "P/C/R", "pairs", "side", "pairs/s", "x plain", "unique tokens/s", "MFU"]
    head += ["MFU, data sheet", "peak GiB", "tokens at once", "attention", "steps", "note"]
    plain = {(c.model, c.lengths): c.step for c in cells if c.side == PLAIN}
    rows: list[list[str]] = []
    for cell in cells:
        step, other = cell.step, plain.get((cell.model, cell.lengths))
        rates = ["-"] * 5
        if step is not None:
            rates = [
                f"{cell.pairs / step:.2f}",
                f"{other / step:.2f}" if other else "-",
                f"{cell.tokens / step:,.0f}",
                f"{cell.work / step / peak:.1%}",
                f"{cell.work / step / sheet:.1%}" if sheet else "-",
            ]
        memory = "-" if cell.peak_bytes is None else f"{cell.peak_bytes / 2**30:.1f}"
        used = f"{cell.at_once:,}" if cell.at_once else "-"
        done = str(max(0, len(cell.seconds) - 1))
        about = [cell.model, cell.lengths, str(cell.pairs), cell.side]
        rows.append([*about, *rates, memory, used, cell.attention, done, cell.note])
    return markdown_table(head, rows)


def hardware(device: str, tiny: bool) -> dict[str, Any]:
    """Device, versions, and how fast it multiplies matrices."""
    found: dict[str, Any] = {}
    for name in VERSIONS:
        with contextlib.suppress(PackageNotFoundError):  # bitsandbytes is an extra
            found[name] = version(name)
    found |= {"device": "cpu", "matmul_peak": matmul_peak(device, 256 if tiny else 8192)}
    if device == "cuda":
        about = torch.cuda.get_device_properties(0)
        found |= {"device": about.name, "memory_bytes": about.total_memory}
        found["cuda"] = torch.version.cuda
    sheet = [v for name, v in DATA_SHEET.items() if name in found["device"]]
    return found | {"data_sheet_peak": sheet[0] * 1e12 if sheet else None}


def describe(about: Mapping[str, Any]) -> str:
    sheet, memory = about["data_sheet_peak"], about.get("memory_bytes")
    parts = [about["device"]] + ([f"{memory / 2**30:.0f} GiB"] if memory else [])
    parts.append(f"bf16 products at {about['matmul_peak'] / 1e12:.3g} TFLOP/s")
    parts += [f"data sheet {sheet / 1e12:.0f}"] if sheet else []
    names = ("upweight", "torch", "cuda", "transformers", "peft", "bitsandbytes")
    versions = [f"{name} {about[name]}" for name in names if name in about]
    return f"{', '.join(parts)}\n\n{', '.join(versions)}"


@dataclass
class Report:
    """What is known so far, kept on disk as it grows."""

    name: str
    about: Mapping[str, Any]
    checks: list[Check] = field(default_factory=list[Check])
    cells: list[Cell] = field(default_factory=list[Cell])

    @property
    def holds(self) -> bool:
        failed = any(cell.failed for cell in self.cells)
        return all(check.holds for check in self.checks) and not failed

    def text(self) -> str:
        failed = sum(not check.holds for check in self.checks)
        verdict = f"{failed} of {len(self.checks)} NOT within what is allowed" if failed else "hold"
        peak, sheet = self.about["matmul_peak"], self.about["data_sheet_peak"]
        parts = ["# upweight on a GPU", describe(self.about), f"## Checks: {verdict}"]
        parts += [checks_table(self.checks), "## Speed", speed_table(self.cells, peak, sheet)]
        return "\n\n".join(parts)

    def add(self, result: Check | Cell) -> None:
        if isinstance(result, Check):
            self.checks.append(result)
            print(" | ".join(result.cells()), flush=True)
        else:
            self.cells.append(result)
            rate = f"{result.pairs / result.step:.2f} pairs/s" if result.step else result.note
            print(f"{result.model} | {result.lengths} | {result.side}: {rate}", flush=True)

    def save(self) -> Path:
        record = {
            "about": self.about,
            "checks": [{**asdict(check), "holds": check.holds} for check in self.checks],
            "cells": [asdict(cell) for cell in self.cells],
        }
        return save(self.name, self.text(), record)
