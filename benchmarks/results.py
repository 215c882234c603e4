"""Results as files: what was measured as JSON, what a person reads as Markdown."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "results"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns padded so that it reads in a terminal too."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    return "\n".join([line(head), line(["-" * w for w in widths]), *map(line, rows)])


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median and range: "3.10 (2.95..3.20)"; a dash where there is nothing."""
    if not values:
        return "-"
    middle = f"{statistics.median(values):.{digits}f}"
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def machine() -> dict[str, Any]:
    """Where a result comes from. A load average above the threads in use spoils timings."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        # Where files lie on this machine says nothing about the result.
        "command": " ".join(Path(w).name if Path(w).exists() else w for w in sys.argv),
    }


def save(name: str, text: str, record: Mapping[str, Any]) -> Path:
    """results/NAME.md and results/NAME.json; returns the former."""
    FOLDER.mkdir(exist_ok=True)
    about = machine()
    foot = (
        f"{about['date']}; {about['cpu']}, {about['cores']} cores, load {about['load'][0]:.1f}; "
        f"Python {about['python']}\n\n`{about['command']}`\n"
    )
    (FOLDER / f"{name}.json").write_text(json.dumps({"machine": about, **record}, indent=1))
    path = FOLDER / f"{name}.md"
    path.write_text(f"{text}\n\n{foot}")
    return path
