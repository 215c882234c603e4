"""What is refused before there is a model is what would be refused later, and no more."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import pytest

from runs import PAIRS, furnish, write_rows
from upweight.config import load_stages
from upweight.errors import DataError, ModelError, OutputError
from upweight.recipes.look import look

STAGES = """
model: model
data: pairs.jsonl
out: run
stages:
  - objective: sft
  - objective: dpo
    model: {model}
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tmp_path, monkeypatch)


def looked(file: str | None = None, command: str = "train", **values: object) -> None:
    base = {} if file else {"model": "model", "data": "pairs.jsonl", "out": "out"}
    look(command, load_stages(file, values=base | values))


def test_rows_and_files_behind_a_limit_are_not_looked_at():
    text = Path("pairs.jsonl").read_text()
    Path("bad.jsonl").write_text(f"{text}no row\n")
    looked(data="bad.jsonl", limit=len(PAIRS))
    looked(data=["pairs.jsonl", "missing.jsonl"], limit=len(PAIRS))
    with pytest.raises(DataError, match=f"bad.jsonl:{len(PAIRS) + 1}"):
        looked(data="bad.jsonl", limit=len(PAIRS) + 1)
    with pytest.raises(DataError, match="missing.jsonl does not exist"):
        looked(data=["pairs.jsonl", "missing.jsonl"])


def test_a_pipe_is_left_to_who_reads_it_whole():
    os.mkfifo("rows.jsonl")
    looked(data="rows.jsonl")


def test_a_name_that_no_file_can_have_is_refused_like_any_other():
    with pytest.raises(DataError, match="name too long"):
        looked(data="x" * 300 + ".jsonl")


@pytest.mark.parametrize(
    "model",
    ["run/1-sft/model", "run/1-sft/model/", "./run/../run/1-sft/adapter", "{cwd}/run/1-sft"],
)
def test_a_model_that_an_earlier_stage_makes_may_be_written_as_paths_are(model: str):
    Path("run.yaml").write_text(STAGES.format(model=model.format(cwd=Path.cwd())))
    looked("run.yaml")


@pytest.mark.parametrize("model", ["run/2-dpo/model", "run/1-dpo/model"])
def test_a_model_that_no_earlier_stage_makes_has_to_be_there(model: str):
    Path("run.yaml").write_text(STAGES.format(model=model))
    with pytest.raises(ModelError, match=f"stage 2-dpo: model: there is no folder {model}"):
        looked("run.yaml")


def test_a_folder_in_use_is_refused_before_any_stage_begins():
    Path("run.yaml").write_text(STAGES.format(model="model"))
    Path("run/2-dpo").mkdir(parents=True)
    with Path("run/2-dpo/.upweight.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="stage 2-dpo: run/2-dpo is in use by"):
            looked("run.yaml")
        looked("run.yaml", "check")
    shutil.rmtree("run")
    looked("run.yaml")


def test_fewer_rows_than_are_looked_at_have_to_be_of_use():
    write_rows("same.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}])
    with pytest.raises(DataError, match="identical_responses"):
        looked(data="same.jsonl")
