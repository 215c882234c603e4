"""run.yaml of a run: what was left open is there as what it became, and a resumption accepts it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from runs import furnish, train
from upweight.cli import main
from upweight.config import load_run
from upweight.evidence.records.settings import read_settings


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tmp_path, monkeypatch)


def settings(out: str) -> dict[str, tuple[str, str]]:
    return {s.key: (s.value, s.origin) for s in read_settings(Path(out, "run.yaml"))}


def test_what_was_left_open_is_in_run_yaml_as_what_it_became():
    assert train("run", "--epochs", "5", "--lora.rank", "3") == 0
    found = settings("run")
    # 19 or 20 pairs in steps of 4, five times.
    assert found["steps"] == ("null", "default; here 25")
    assert found["evaluation.every"] == found["checkpoint.every"] == ("2", "resolved")
    assert found["data.max_length"] == ("512", "inherited from the model")
    assert found["data.template"] == ("chat", "inherited from the model")
    assert found["compute.threads"] == (str(torch.get_num_threads()), "resolved")
    assert found["compute.device"] == ("auto", "default; here cpu")
    assert found["compute.attention"] == ("auto", "default; here tiles")
    assert found["lora.alpha"] == ("6.0", "default")
    assert found["loss.beta"] == ("0.1", "default")
    assert found["lora.rank"] == ("3", "flag")
    text = Path("run/run.yaml").read_text()
    assert text.endswith("\n# stop tokens: '<|im_end|>' (2), inherited from the model\n")


def test_a_dtype_that_was_probed_says_so():
    assert train("run", "--dtype", "auto", command="check") == 0
    assert train("run", "--dtype", "auto", "--steps", "1") == 0
    value, origin = settings("run")["compute.dtype"]
    assert value in ("float32", "bfloat16") and origin == "found by a probe"


def cut(out: str) -> None:
    """As if the run had been stopped after its second step."""
    for folder in sorted(Path(out, "checkpoints").iterdir())[2:]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def test_a_resumption_takes_what_the_run_filled_in_and_keeps_its_origins():
    often = ("--checkpoint.every", "1", "--keep", "9")
    assert train("run", *often) == 0
    before = settings("run")
    cut("run")
    torch.set_num_threads(2)
    try:
        # Neither by the words that began it, nor by its run.yaml, is anything another value.
        assert train("run", *often, "--resume") == 0
        assert settings("run") == before
        cut("run")
        assert main(["train", "run/run.yaml", "resume=true", "log_every=2"]) == 0
    finally:
        torch.set_num_threads(1)
    after = settings("run")
    assert after.pop("log_every") == ("2", "override") and before.pop("log_every")[1] == "default"
    assert after == before


def test_run_yaml_begins_the_same_run_anew():
    assert train("run") == 0
    assert main(["train", "run/run.yaml", "out=again"]) == 0
    one, other = (load_run(f"{out}/run.yaml").run for out in ("run", "again"))
    assert other.model_copy(update={"out": "run"}) == one
    assert Path("run/metrics.jsonl").read_text().count("\n") == Path(
        "again/metrics.jsonl"
    ).read_text().count("\n")
