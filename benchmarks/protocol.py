"""What the programs here and the two workers say to each other. Standard library only: the workers
run in different environments.

A worker is told its Spec as a JSON file and writes JSON lines, each with an "event":

side       versions and the settings that hold
reference  seconds of the reference pass that came before the first step
pair       (task score) token ids and log-probs of one preference before training
step       number, loss, gradient norm, seconds since the step before it ended
price      (task price) objective, step, seconds
peak       (task peak) operations per second of plain matrix products
end        peak memory, seconds from the process's start to the end of its first step
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
Event = dict[str, Any]


@dataclass(frozen=True)
class Spec:
    """One run of one side. `settings` are the side's own: DPOConfig's or run.yaml's keys.

    `rows` is the side's file (rows.py writes both). `scratch` is removed after the run, and with
    it all caches: every run starts cold. `started` is when the process was asked for.
    """

    task: str
    model: str
    rows: str
    steps: int
    pairs_per_step: int
    precision: str = "float32"
    lora: bool = False
    beta: float = 0.1
    learning_rate: float = 1e-5
    seed: int = 0
    threads: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    scratch: str = ""
    out: str = ""
    started: float = 0.0


LORA = {"rank": 16, "alpha": 32.0, "dropout": 0.0, "targets": "all-linear"}
"""The adapter that both sides train when spec.lora is set."""


class WorkerError(Exception):
    """A worker that did not finish: how it ended, and `said`, the last lines it wrote."""

    def __init__(self, reason: str, said: str) -> None:
        super().__init__(reason)
        self.said = said


def work(main: Callable[[Spec, Callable[..., None]], None]) -> None:
    """A worker's whole program: read the spec, run `main(spec, emit)`, end with the peak memory."""
    spec = Spec(**json.loads(Path(sys.argv[1]).read_text()))
    first_step: list[float] = []
    with open(spec.out, "a", buffering=1) as out:

        def emit(event: str, **values: Any) -> None:
            if event == "step" and not first_step:
                first_step.append(time.time() - spec.started)
            out.write(json.dumps({"event": event, **values}) + "\n")

        main(spec, emit)
        emit(
            "end",
            peak_bytes=peak_bytes(),
            seconds_to_first_step=first_step[0] if first_step else None,
        )


def peak_bytes() -> int:
    """The most resident memory this program has had.

    VmHWM begins anew with the program; getrusage's figure starts at that of the process which
    started it.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def run(python: Path | str, worker: str, spec: Spec) -> list[Event]:
    """The events of one run of `worker` in a process, a scratch folder and caches of its own.

    Raises WorkerError when it ends with an error or is killed.
    """
    with tempfile.TemporaryDirectory(prefix="upweight-benchmark-") as scratch:
        folder = Path(scratch)
        env = dict(os.environ)
        # Nothing that an earlier run computed may shorten this one.
        env |= {"UPWEIGHT_CACHE": str(folder / "upweight"), "HF_DATASETS_CACHE": str(folder / "hf")}
        env |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        env.pop("PYTHONPATH", None)
        if spec.threads:
            env["OMP_NUM_THREADS"] = str(spec.threads)
        out = folder / "events.jsonl"
        told = replace(spec, scratch=scratch, out=str(out), started=time.time())
        (folder / "spec.json").write_text(json.dumps(asdict(told)))
        with open(folder / "log", "w+") as log:
            command = [str(python), str(HERE / worker), str(folder / "spec.json")]
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=env)
            log.seek(0)
            said = log.read().strip().splitlines()[-15:] or ["it said nothing"]
        if done.returncode:
            ending = f"signal {-done.returncode}" if done.returncode < 0 else "an error"
            raise WorkerError(f"{worker} ended with {ending}: {said[-1]}", "\n".join(said))
        return [json.loads(line) for line in out.read_text().splitlines()]


def named(events: list[Event], name: str) -> list[Event]:
    return [event for event in events if event["event"] == name]


def one(events: list[Event], name: str) -> Event:
    (event,) = named(events, name)
    return event
