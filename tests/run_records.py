"""A small finished run directory, with any of its records replaced or left out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from upweight.evidence.records import LedgerRow, Measurement, Records, SetAccount

NASTY = (
    "<script>document.title='owned'</script> \x00 \ud800 \u202e \U0001f3ac & \"quoted\" 'single'"
)


def train_line(step: int, **values: Any) -> dict[str, Any]:
    metrics = {
        "loss": 0.69 - 0.01 * step,
        "rewards/margins": 0.02 * step,
        "rewards/accuracies": 0.7,
        "logratios/chosen": 0.01 * step,
        "logratios/rejected": -0.2 * step,
        "tokens/chosen": 40.0,
        "tokens/rejected": 38.5,
        "grad_norm": 3.0,
        "learning_rate": 1e-5,
        "num_tokens": 5000 * step,
        "num_pairs": 64,
        "tokens_per_second": 4000.0,
        "seconds": 1.5 * step,
    }
    return {"step": step, "epoch": step / 10, "kind": "train"} | metrics | values


def eval_line(step: int, set_name: str = "heldout", **values: Any) -> dict[str, Any]:
    accuracy = 0.5 if step == 0 else 0.78
    metrics = {
        "loss": 0.69 if step == 0 else 0.5,
        "rewards/margins": 0.02 * step,
        "rewards/accuracies": accuracy,
        "rewards/accuracies_low": accuracy - 0.07,
        "rewards/accuracies_high": accuracy + 0.06,
        "logratios/chosen": 0.01 * step,
        "logratios/rejected": -0.2 * step,
        "kl": 0.1 * step,
        "kl_low": 0.08 * step,
        "kl_high": 0.12 * step,
        "length": 41.0,
        "reference_length": 44.0,
    }
    return {"step": step, "epoch": step / 10, "kind": "eval", "set": set_name} | metrics | values


def ledger_row(i: int, **values: Any) -> dict[str, Any]:
    margin = 1.5 if i % 9 < 7 else -0.5
    row = {
        "step": 20,
        "set": "heldout",
        "row": f"pairs.jsonl:{i + 1}",
        "chosen": 0,
        "rejected": 1,
        "logp_chosen": -40.0,
        "logp_rejected": -50.0,
        "ref_logp_chosen": -41.0,
        "ref_logp_rejected": -45.0,
        "reward_chosen": margin,
        "reward_rejected": 0.0,
        "margin": margin + i / 1000,
        "tokens_chosen": 40 + i % 5,
        "tokens_rejected": 42,
        "prompt_text": f"Prompt {i}",
        "chosen_text": f"Chosen {i}",
        "rejected_text": f"Rejected {i}",
    }
    return row | values


def sample(step: int, prompt: str = "Say something.", **values: Any) -> dict[str, Any]:
    row = {
        "step": step,
        "set": "heldout",
        "prompt": prompt,
        "policy": f"Policy answer at {step}",
        "reference": "Reference answer",
        "policy_tokens": 4,
        "reference_tokens": 2,
        "policy_logp": -5.0,
        "policy_reference_logp": -7.5,
    }
    return row | values


def suspect(**values: Any) -> dict[str, Any]:
    row = {
        "set": "train",
        "row": "pairs.jsonl:9",
        "chosen_index": 0,
        "rejected_index": 1,
        "prompt": "Say something.",
        "chosen": "A bad thing",
        "rejected": "A good thing",
        "margin": -1.5,
        "odds_model": 5.0,
        "odds_words": 6.0,
        "why": "Both held the rejected response better.",
    }
    return row | values


def account(**values: Any) -> dict[str, Any]:
    percentiles = {"p50": 40, "p90": 60, "p99": 80, "max": 1200}
    entry = {
        "read": 100,
        "used": 98,
        "dropped": {"identical": 2},
        "examples": {"identical": [["pairs.jsonl:7", "both responses are the same"]]},
        "truncated": {"prompt": 0, "response": 3},
        "appended_stop": 196,
        "preferences": 98,
        "responses": 196,
        "lengths": {"prompt": percentiles, "chosen": percentiles, "rejected": percentiles},
    }
    return entry | values


RUN_YAML = """\
# Every value of this run, and where it came from.
model: "folder #1/model"  # file run.yaml
data:
  path: [a.jsonl, "b: c.jsonl"]  # flag
  max_length: 512  # resolved
objective: dpo  # default
loss:
  beta: 0.05  # python
reference: null  # default
evaluation:
  sets: {}  # default
  fraction: 0.1  # file run.yaml
"""


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_run(folder: Path, *, without: tuple[str, ...] = ()) -> Path:
    """A run of 20 steps with one evaluation before, one half way and one after."""
    folder.mkdir(parents=True, exist_ok=True)
    metrics = [eval_line(0)]
    for step in range(1, 21):
        metrics.append(train_line(step))
        metrics += [eval_line(step)] if step in (10, 20) else []
    metrics.append(
        {"step": 14, "kind": "warning", "code": "UW308", "said": "step 14: far away.", "rows": []}
    )
    write_jsonl(folder / "metrics.jsonl", metrics)
    rows = [ledger_row(i, step=step) for step in (0, 20) for i in range(30)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "ledger.parquet")
    write_jsonl(folder / "suspects.jsonl", [suspect()])
    write_jsonl(folder / "samples.jsonl", [sample(0), sample(20), sample(20, "Another prompt.")])
    sets = {"train": account(), "heldout": account(read=30, used=30, dropped={}, examples={})}
    findings = [{"code": "UW210", "said": "train: a circle.", "rows": ["pairs.jsonl:3"]}]
    whole = {"sets": sets, "template": "chat", "findings": findings}
    (folder / "account.json").write_text(json.dumps(whole))
    environment = {
        "upweight": "0.1.0",
        "model": "tiny",
        "gpu": None,
        "sharing": True,
        "started": "2026-01-02T03:04:05+00:00",
        "finished": "2026-01-02T03:08:17+00:00",
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "run.yaml").write_text(RUN_YAML)
    for name in without:
        (folder / name).unlink()
    return folder


def measured(line: dict[str, Any]) -> Measurement:
    fixed = ("step", "epoch", "kind", "set")
    values = {k: math.nan if v is None else float(v) for k, v in line.items() if k not in fixed}
    return Measurement(line["step"], line["epoch"], line.get("set"), values)


def evaluated(*lines: dict[str, Any], **rest: Any) -> Records:
    return Records("run", evals={"heldout": tuple(map(measured, lines))}, **rest)


def trained(num_steps: int, **values: Any) -> tuple[Measurement, ...]:
    return tuple(measured(train_line(step, **values)) for step in range(1, num_steps + 1))


def ledger(num_rows: int, **values: Any) -> tuple[LedgerRow, ...]:
    return tuple(LedgerRow(**ledger_row(i, **values)) for i in range(num_rows))


def set_account(**values: Any) -> SetAccount:
    entry = account(**values)
    entry["examples"] = {k: tuple(map(tuple, v)) for k, v in entry["examples"].items()}
    entry["lengths"] = {k: {p: float(n) for p, n in v.items()} for k, v in entry["lengths"].items()}
    return SetAccount(**entry)
