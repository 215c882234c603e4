"""Trackers hold what metrics.jsonl holds, and none of them ends a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from tiny import save_tiny
from upweight.cli import main
from upweight.config.base import Tracker as Name
from upweight.errors import ConfigError
from upweight.evidence.track import (
    IDS,
    TRACKERS,
    Kind,
    Target,
    Tracker,
    Tracking,
    clients,
    scalars,
    tracking,
)

CONFIG = {"model": "m", "track": ["mlflow"], "loss.beta": 0.1, "lora": None, "resume": False}


def record(step: int, loss: float, kind: str = "train") -> dict[str, object]:
    place = {"set": "held out"} if kind == "eval" else {}
    return {"step": step, "epoch": step / 4, "kind": kind, **place, "loss": loss}


def records_of(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPWEIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    save_tiny("model")
    rows = [{"prompt": f"q {i}", "chosen": "fine", "rejected": f"bad {i}"} for i in range(16)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(out: str, *more: str) -> int:
    words = f"train --model model --data pairs.jsonl --out {out} --pairs_per_step 4 --samples 0"
    words += " --learning-rate 1e-3 --dtype float32 --fraction 0.25 --track tensorboard"
    return main([*words.split(), *more])


# ---- what a tracker is told


def test_every_tracker_that_the_config_knows_is_in_the_table():
    assert tuple(TRACKERS) == get_args(Name)


def test_a_records_numbers_go_by_the_names_of_its_kind_and_set():
    train_record = record(3, 0.5) | {"rewards/margins": 1, "note": "text", "kl": None}
    assert scalars(train_record) == (
        3,
        {"train/epoch": 0.75, "train/loss": 0.5, "train/rewards/margins": 1.0},
    )
    step, numbers = scalars(record(0, 0.5, "eval"))
    assert (step, set(numbers)) == (0, {"eval/held out/epoch", "eval/held out/loss"})


# ---- packages that are not there


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, TRACKERS[name].module, None)
    with pytest.raises(ConfigError, match=rf"track: {name} needs .*pip install {name}"):
        clients([name])


@pytest.mark.parametrize("command", ["train", "check"])
def test_a_missing_package_is_told_before_anything_is_read_or_written(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    words = f"{command} --model nowhere --data nothing.jsonl --out run --track wandb"
    assert main(words.split()) == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_a_packages_name_is_not_taken_for_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "left_behind").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(TRACKERS, "wandb", Kind("left_behind", TRACKERS["wandb"].open))
    with pytest.raises(ConfigError, match="only a folder named wandb"):
        clients(["wandb"])


# ---- trackers that fail


class Refuses(Exception):
    pass


@pytest.fixture
def opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Tracker], tuple[Any, list[str]]]:
    """tracking() of one tracker named "mine", and the list of what it notes."""

    def open_one(tracker: Tracker) -> tuple[Any, list[str]]:
        monkeypatch.setitem(TRACKERS, "mine", Kind("json", lambda client, target: tracker))
        notes: list[str] = []
        return tracking(clients(["mine"]), Target(tmp_path, CONFIG), notes.append), notes

    return open_one


def test_a_tracker_that_never_answers_is_told_once_counted_and_seldom_tried(opened: Any):
    tried: list[int] = []

    def log(step: int, numbers: dict[str, float]) -> None:
        tried.append(step)
        raise Refuses("no route to host.\nand a page of details")

    context, notes = opened(Tracker(log, lambda finished: None))
    with context as trackers:
        for step in range(1, 101):
            trackers.log(record(step, 0.5))
        trackers.close(finished=True)
    # One record waits at the first attempt, then 2, 4, 8, 16, 32, 64; the last one is the close.
    assert tried == [1] * 8
    first, last = notes
    assert first.startswith("warning: mine did not take step 1: Refuses: no route to host. ")
    assert last.startswith("warning: mine never took 100 records, from step 1 on")


def test_a_tracker_that_answers_again_gets_every_record_in_order(opened: Any):
    taken: list[int] = []
    outage = iter([False, True, True, False])

    def log(step: int, numbers: dict[str, float]) -> None:
        if next(outage, False):
            raise Refuses
        taken.append(step)

    context, notes = opened(Tracker(log, lambda finished: None))
    with context as trackers:
        for step in range(1, 10):
            trackers.log(record(step, 0.5))
    assert taken == list(range(1, 10))
    assert [note.partition(":")[0] for note in notes] == [
        "warning",
        "mine has every record after all.",
    ]


def test_a_tracker_that_does_not_close_is_told(opened: Any):
    def close(finished: bool) -> None:
        raise Refuses("disk full")

    context, notes = opened(Tracker(lambda step, numbers: None, close))
    with context as trackers:
        trackers.log(record(1, 0.5))
    (note,) = notes
    assert note.startswith("warning: mine was not closed: Refuses: disk full. ")


def test_a_run_that_fails_closes_its_trackers_as_not_finished_and_once(opened: Any):
    closed: list[bool] = []
    context, _ = opened(Tracker(lambda step, numbers: None, closed.append))
    with pytest.raises(Refuses), context:
        raise Refuses
    assert closed == [False]
    context, _ = opened(Tracker(lambda step, numbers: None, closed.append))
    with context as trackers:
        trackers.close(finished=True)
    assert closed == [False, True]


def test_a_tracker_that_does_not_open_is_an_error_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(client: Any, target: Target) -> Tracker:
        raise Refuses("no key")

    closed: list[bool] = []
    works = Tracker(lambda step, numbers: None, closed.append, id="7")
    monkeypatch.setitem(TRACKERS, "works", Kind("json", lambda client, target: works))
    monkeypatch.setitem(TRACKERS, "refuses", Kind("json", refuse))
    both, target = clients(["works", "refuses"]), Target(tmp_path, CONFIG)
    said = "refuses cannot be opened: Refuses: no key. Repair that, or take refuses out of track.$"
    with pytest.raises(ConfigError, match=said), tracking(both, target, print):
        pass
    assert closed == [False]
    assert list(tmp_path.iterdir()) == []
    target.keep_ids({"refuses": "8"})
    with pytest.raises(ConfigError, match=IDS), tracking(both, target, print):
        pass


def test_a_run_goes_on_without_its_tracker(
    files: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def log(step: int, numbers: dict[str, float]) -> None:
        raise Refuses("gone")

    dead = Kind("json", lambda client, target: Tracker(log, lambda finished: None))
    monkeypatch.setitem(TRACKERS, "tensorboard", dead)
    assert train("run") == 0
    error = capsys.readouterr().err
    assert error.count("tensorboard did not take step 0: Refuses: gone") == 1
    assert f"tensorboard never took {len(records_of('run'))} records" in " ".join(error.split())
    assert Path("run/report.html").exists()


# ---- TensorBoard


def scalars_in(folder: str) -> dict[tuple[str, int], float]:
    """What TensorBoard shows; a step that it shows twice fails."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
    shown = [
        ((tag, e.step), e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)
    ]
    assert len(shown) == len(dict(shown))
    return dict(shown)


def expected(run: str) -> dict[tuple[str, int], float]:
    told = [scalars(r) for r in records_of(run)]
    return {(key, step): float(np.float32(v)) for step, n in told for key, v in n.items()}


def test_tensorboard_shows_what_metrics_jsonl_says(files: None):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data

    assert train("run") == 0
    assert scalars_in("run/tensorboard") == expected("run")
    assert ("train/loss", 1) in expected("run") and ("eval/heldout/loss", 0) in expected("run")
    content = EventAccumulator("run/tensorboard").Reload().summary_metadata
    start = content["_hparams_/session_start_info"].plugin_data.content
    told = parse_session_start_info_plugin_data(start).hparams
    assert told["batch.pairs_per_step"].number_value == 4
    assert told["reference"].string_value == "null"
    assert "_hparams_/session_end_info" in content


def test_tensorboard_forgets_what_a_resumed_run_forgets(files: None):
    every_step = ("--checkpoint.every", "1", "--keep", "9")
    assert train("run", *every_step) == 0
    before = records_of("run")
    for folder in sorted(Path("run/checkpoints").iterdir())[1:]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    # Fewer records than before: what is not said again must be forgotten too.
    assert main(["train", "run/run.yaml", "resume=true", "log_every=2"]) == 0
    assert len(records_of("run")) < len(before)
    assert scalars_in("run/tensorboard") == expected("run")


def test_a_resume_that_is_refused_leaves_tensorboard_as_it_was(files: None):
    assert train("run") == 0
    found = sorted(Path("run/tensorboard").iterdir())
    assert main(["train", "run/run.yaml", "resume=true", "beta=0.3"]) == 2
    assert sorted(Path("run/tensorboard").iterdir()) == found


# ---- the others, where they are installed

their_own_warnings = pytest.mark.filterwarnings("default")


def twice(name: str, folder: Path) -> str:
    """Steps 1 to 3, then from the checkpoint of step 2 on steps 3 and 4; the tracker's run."""
    folder.mkdir()
    client = clients([name])
    with tracking(client, Target(folder, CONFIG), print) as trackers:
        send(trackers, [record(0, 9.0, "eval"), *(record(s, float(s)) for s in (1, 2, 3))])
    id = json.loads((folder / IDS).read_text())[name]
    with tracking(client, Target(folder, CONFIG, after=2), print) as trackers:
        send(trackers, [record(s, float(s)) for s in (3, 4)])
        trackers.close(finished=True)
    assert json.loads((folder / IDS).read_text())[name] == id
    return id


def send(trackers: Tracking, records: list[dict[str, object]]) -> None:
    for one in records:
        trackers.log(one)


@their_own_warnings
def test_mlflow_goes_on_with_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    id = twice("mlflow", tmp_path / "a")
    api = mlflow.MlflowClient()
    run = api.get_run(id)
    assert (run.info.run_name, run.info.status) == ("a", "FINISHED")
    assert api.get_experiment(run.info.experiment_id).name == "upweight"
    assert run.data.params["loss.beta"] == "0.1" and run.data.params["track"] == '["mlflow"]'
    assert run.data.metrics["eval/held out/loss"] == 9.0
    losses = [(m.step, m.value) for m in api.get_metric_history(id, "train/loss")]
    assert sorted(losses) == [(1, 1.0), (2, 2.0), (3, 3.0), (3, 3.0), (4, 4.0)]
    assert "warning" not in capfd.readouterr().out


@their_own_warnings
def test_trackio_goes_on_with_the_same_run_and_never_with_anothers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    storage = pytest.importorskip("trackio.sqlite_storage")
    monkeypatch.setattr(storage, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setenv("TRACKIO_PROJECT", "mine")
    id = twice("trackio", tmp_path / "a")
    logs = storage.SQLiteStorage.get_logs("mine", "a", run_id=id)
    losses = [(row["step"], row["train/loss"]) for row in logs if "train/loss" in row]
    assert sorted(losses) == [(1, 1.0), (2, 2.0), (3, 3.0), (3, 3.0), (4, 4.0)]
    assert storage.SQLiteStorage.get_run_config("mine", "a")["loss.beta"] == 0.1
    assert capsys.readouterr().out == ""
    (tmp_path / "other").mkdir()
    twice("trackio", tmp_path / "other" / "a")
    target = Target(tmp_path / "a", CONFIG, after=4)
    with (
        pytest.raises(ConfigError, match=f'newest run named "a" of .* mine is another .*{IDS}'),
        tracking(clients(["trackio"]), target, print),
    ):
        pass


def records_in(file: Path) -> Iterator[Any]:
    """The records of a W&B file under 32 kB: 7 bytes, then (crc 4, length 2, kind 1, bytes)."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at = file.read_bytes(), 7
    assert len(content) < 1 << 15
    while at < len(content):
        length = int.from_bytes(content[at + 4 : at + 6], "little")
        yield Record.FromString(content[at + 7 : at + 7 + length])
        at += 7 + length


@their_own_warnings
def test_wandb_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    id = twice("wandb", tmp_path / "a")
    losses, ends = [], []
    for file in sorted(tmp_path.glob(f"wandb/offline-run-*/run-{id}.wandb")):
        for one in records_in(file):
            match one.WhichOneof("record_type"):
                case "history":
                    items = {"/".join(i.nested_key): i.value_json for i in one.history.item}
                    losses.append((items["train/global_step"], items.get("train/loss")))
                case "exit":
                    ends.append(one.exit.exit_code)
                case "run":
                    assert (one.run.display_name, one.run.project) == ("a", "upweight")
    steps = [("0", None), ("1", "1"), ("2", "2"), ("3", "3"), ("3", "3"), ("4", "4")]
    assert [(s, loss and loss.removesuffix(".0")) for s, loss in losses] == steps
    assert ends == [1, 0]
