"""A few steps on the demo's model and the data sets, with nothing wrong: no code is raised, by what
is asked before step 1 or by the watch."""

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
SETS = {
    Path(demo.__file__).parent / "train.jsonl": 12,
    DATA / "truthfulqa_pairs.jsonl": 12,
    DATA / "gsm8k_responses.jsonl": 3,
    DATA / "longprompt_pairs.jsonl": 3,
}
"""Rows that are read of each: as many as a core trains on in a quarter of a minute."""


@pytest.mark.slow
@pytest.mark.parametrize("file", SETS, ids=lambda file: file.stem)
def test_a_short_run_on_real_rows_raises_nothing(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    if not file.is_file():
        pytest.skip(f"shared/data/{file.name} is not there")
    try:
        model = resolve(demo_model_path())
    except ModelError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("UPWEIGHT_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "run"
    values = {"data.limit": SETS[file], "batch.pairs_per_step": 1, "steps": 3, "lora": True}
    uw.train(model=model, data=str(file), out=str(out), learning_rate=2e-4, **values)
    assert json.loads((out / "account.json").read_text())["findings"] == []
    assert [row for row in rows_of(out / "metrics.jsonl") if row["kind"] == "warning"] == []
    assert "warning" not in capsys.readouterr().err
