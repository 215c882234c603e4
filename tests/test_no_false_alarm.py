"""The demo's model and real rows, with nothing wrong: the watch of a run that is long enough to be
watched raises no code, evaluations too. What is asked of all rows before: test_real_model.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import upweight as uw
import upweight.demo as demo
from runs import rows_of
from upweight.errors import ModelError
from upweight.models.named import demo_model_path, resolve

DATA = Path(__file__).parents[2] / "shared" / "data"
DEMO = Path(demo.__file__).parent / "train.jsonl"
PAIRS = DATA / "truthfulqa_pairs.jsonl"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    try:
        folder = resolve(demo_model_path())
    except ModelError as error:
        pytest.skip(str(error))
    # The model is read once for all tests; log-probs that another run kept would hide a fault.
    monkeypatch.setenv("UPWEIGHT_CACHE", str(tmp_path / "cache"))
    return folder


def require(file: Path) -> str:
    if not file.is_file():
        pytest.skip(f"shared/data/{file.name} is not there")
    return str(file)


@pytest.mark.slow
@pytest.mark.parametrize("file", [DEMO, PAIRS], ids=lambda file: file.stem)
def test_a_run_on_real_rows_that_is_watched_raises_nothing(
    file: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Past the records that the watch takes the mean of, with held-out rows and answers enough for
    an interval: every observer has something to look at."""
    out = tmp_path / "run"
    values = {
        "data.limit": 60 if file == DEMO else 36, "batch.pairs_per_step": 2, "steps": 10,
        "lora": True,
        "evaluation.fraction": 0.3, "evaluation.samples": 6, "evaluation.max_new_tokens": 40,
        "evaluation.every": 10,
    }  # fmt: skip
    uw.train(model=model, data=require(file), out=str(out), learning_rate=2e-4, **values)
    records = rows_of(out / "metrics.jsonl")
    last = [row for row in records if row["kind"] == "eval"][-1]
    intervals = ("kl_low", "length_ratio_low", "stopped_low", "loss_change_low")
    assert all(last[name] is not None for name in intervals)
    assert json.loads((out / "account.json").read_text())["findings"] == []
    assert [row for row in records if row["kind"] == "warning"] == []
    assert "warning" not in capsys.readouterr().err
