from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from upweight.errors import DataError, OutputError
from upweight.training.records import (
    append_jsonl,
    truncate_jsonl_after,
    truncate_ledger_after,
    write_ledger,
)
from upweight.training.rundir import (
    open_run_dir,
    replacing,
    require_file,
    require_run_dir,
    require_space,
    write_atomic,
    writing,
)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def stopped_run(folder: Path, checkpoints: bool = True) -> Path:
    with open_run_dir(folder, resume=False) as run:
        write_atomic(run.file("run.yaml"), "model: m\n")
        if checkpoints:
            (run.file("checkpoints") / "step-00000010").mkdir(parents=True)
    return folder


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """The kernel refuses to let a file grow beyond this, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def locked_folder() -> Iterator[Path]:
    """A folder that this process may read and not write, also when the tests run as root."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        yield folder
    except PermissionError:
        pytest.skip("this user cannot take another's permissions")
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_new_run_gets_its_folder_and_leaves_it_free_afterwards(tmp_path: Path) -> None:
    with open_run_dir(tmp_path / "a" / "b", resume=False) as run:
        assert run.file("metrics.jsonl") == tmp_path / "a" / "b" / "metrics.jsonl"
        assert not run.resumed
    with open_run_dir(tmp_path / "a" / "b", resume=False):
        pass


def test_a_file_that_is_no_record_is_our_bug(tmp_path: Path) -> None:
    with (
        open_run_dir(tmp_path, resume=False) as run,
        pytest.raises(AssertionError, match="metrics.json is not a file of a run directory"),
    ):
        run.file("metrics.json")


def test_a_stopped_run_is_resumed_and_rid_of_unfinished_files(tmp_path: Path) -> None:
    stopped_run(tmp_path)
    (tmp_path / ".tmp-report.html.00").write_text("half")
    (tmp_path / ".tmp-model.00").mkdir()
    (tmp_path / ".tmp-model.00" / "x").write_text("half")
    with open_run_dir(tmp_path, resume=True) as run:
        assert run.resumed
        assert names(tmp_path) == [".upweight.lock", "checkpoints", "run.yaml"]


def test_a_folder_that_holds_a_run_is_not_begun_again(tmp_path: Path) -> None:
    stopped_run(tmp_path)
    said = (
        f"{tmp_path} holds a run already. Set resume: true to continue it. Choose another out, or"
        " remove the folder if you do not need it."
    )
    with pytest.raises(OutputError, match=re.escape(said)):
        open_run_dir(tmp_path, resume=False)
    assert (tmp_path / "run.yaml").read_text() == "model: m\n"


def test_a_run_that_stopped_before_its_first_checkpoint_is_begun_anew(tmp_path: Path) -> None:
    stopped_run(tmp_path, checkpoints=False)
    (tmp_path / "checkpoints" / ".tmp-step-00000010.00").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="has no checkpoint to resume: its run stopped before"):
        open_run_dir(tmp_path, resume=True)
    require_run_dir(tmp_path, resume=False)
    with open_run_dir(tmp_path, resume=False) as run:
        assert run.left == ("checkpoints", "run.yaml")
        assert set(run.left) < set(names(tmp_path)), "what fails before its first file removes none"
        run.remove_left()
    assert names(tmp_path) == [".upweight.lock", "notes.txt"]


@pytest.mark.parametrize(
    "kept", ["model", "report.html", "checkpoints/mine", "checkpoints/.old-step-1"]
)
def test_what_somebody_may_come_back_to_is_not_begun_anew(tmp_path: Path, kept: str) -> None:
    stopped_run(tmp_path, checkpoints=False)
    (tmp_path / kept).mkdir(parents=True)
    for take in (open_run_dir, require_run_dir):
        with pytest.raises(OutputError, match="holds a run already"):
            take(tmp_path, resume=False)
    assert (tmp_path / kept).is_dir() and (tmp_path / "run.yaml").is_file()


def test_checkpoints_of_another_program_are_not_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(OutputError, match=r"holds a run already\. It has no checkpoint\. Choose"):
        open_run_dir(tmp_path, resume=False)
    assert (tmp_path / "checkpoints").is_dir()


def test_a_folder_of_other_files_is_left_as_it_is(tmp_path: Path) -> None:
    for name in ("run.yaml", "train.jsonl", "b", "a", "c"):
        (tmp_path / name).write_text(name)
    said = f"{tmp_path} holds files that are not a run's: a, b, c and 2 more. Choose an out that"
    with pytest.raises(OutputError, match=re.escape(said)):
        open_run_dir(tmp_path, resume=False)
    with pytest.raises(OutputError, match="has no run to resume: it holds a, b, c and 2 more"):
        open_run_dir(tmp_path, resume=True)
    assert names(tmp_path) == ["a", "b", "c", "run.yaml", "train.jsonl"]


def test_there_is_nothing_to_resume_in_an_absent_or_empty_folder(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(OutputError, match="no run to resume: it is empty or not there"):
            open_run_dir(folder, resume=True)
    assert names(tmp_path) == []


def test_a_run_that_was_killed_before_it_wrote_anything_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / ".upweight.lock").write_text("process 1 on elsewhere")
    (tmp_path / ".tmp-run.yaml.00").write_text("half")
    with open_run_dir(tmp_path, resume=False):
        assert names(tmp_path) == [".upweight.lock"]


def test_what_opening_would_refuse_is_known_without_writing(tmp_path: Path) -> None:
    stopped_run(tmp_path / "run")
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    for path, resume in (("run", False), ("new", True), ("file", False), ("file/new", False)):
        with pytest.raises(OutputError) as known:
            require_run_dir(tmp_path / path, resume)
        with pytest.raises(OutputError) as refused:
            open_run_dir(tmp_path / path, resume)
        assert str(known.value) == str(refused.value)
    require_run_dir(tmp_path / "run", True)
    require_run_dir(tmp_path / "new" / "er", False)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_without_permission_is_known_without_writing(locked_folder: Path) -> None:
    with pytest.raises(OutputError, match="Permission denied"):
        require_run_dir(locked_folder / "new", False)
    with pytest.raises(OutputError, match="Permission denied"):
        require_file(locked_folder / "scores.jsonl")


def test_a_file_that_could_not_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    require_file(tmp_path / "a" / "b" / "scores.jsonl")
    assert names(tmp_path / "a" / "b") == []
    (tmp_path / "file").write_text("kept")
    require_file(tmp_path / "file")
    with pytest.raises(OutputError, match="file exists and holds 4 bytes"):
        require_file(tmp_path / "file", overwrite=False)
    assert (tmp_path / "file").read_text() == "kept" and names(tmp_path) == ["a", "file"]
    for path in ("file/x", "a", "/proc/x/y", "x" * 300):
        with pytest.raises(OutputError):
            require_file(tmp_path / path)


def test_a_folder_in_use_names_the_process_until_the_kernel_ends_it(tmp_path: Path) -> None:
    stopped_run(tmp_path)
    program = (
        "import sys; from pathlib import Path\n"
        "from upweight.training.rundir import open_run_dir\n"
        "run = open_run_dir(Path(sys.argv[1]), resume=True)\n"
        "print('open', flush=True)\n"
        "sys.stdin.read()\n"
    )
    arguments = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"open\n"
        for resume in (False, True):
            with pytest.raises(OutputError, match=rf"is in use by process {holder.pid} on .*Wait"):
                open_run_dir(tmp_path, resume=resume)
        holder.kill()
    with open_run_dir(tmp_path, resume=True):
        pass


def test_one_process_cannot_open_a_folder_twice(tmp_path: Path) -> None:
    with (
        open_run_dir(tmp_path, resume=False),
        pytest.raises(OutputError, match=f"in use by process {os.getpid()} on"),
    ):
        open_run_dir(tmp_path, resume=False)


def test_a_run_that_fails_before_its_first_file_takes_its_folder_with_it(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with pytest.raises(DataError), open_run_dir(out, resume=False):
        raise DataError("no row")
    assert names(tmp_path) == []
    for record in ("run.yaml", "of another"):
        with pytest.raises(DataError), open_run_dir(out, resume=False):
            (out / record).write_text("kept")
            raise DataError("no row")
        assert record in names(out)
        shutil.rmtree(tmp_path / "a")
    # Folders that were there, or that hold something else by then, stay.
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError), open_run_dir(out, resume=False):
        raise DataError("no row")
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == []


def test_a_folder_that_its_holder_removes_is_not_taken_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock

    def late(file: int, operation: int) -> None:
        shutil.rmtree(tmp_path / "a")
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(OutputError, match="was in use until this moment. Run the same command"):
        open_run_dir(tmp_path / "a", resume=False)


def test_a_file_system_without_locks_is_said_to_have_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with open_run_dir(tmp_path, resume=False):
        assert "without locks: nothing keeps a second run out of it" in caplog.text


def test_out_that_is_or_lies_in_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="file cannot be written: Not a directory"):
        open_run_dir(tmp_path / "file", resume=False)
    with pytest.raises(OutputError, match="A part of the path is a file: choose another out"):
        open_run_dir(tmp_path / "file" / "a", resume=False)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_without_write_permission_is_refused(locked_folder: Path) -> None:
    for out in (locked_folder, locked_folder / "new"):
        with pytest.raises(OutputError, match="Permission denied.*permission to write there"):
            open_run_dir(out, resume=False)
    with pytest.raises(OutputError, match="run.yaml cannot be written: Permission denied"):
        write_atomic(locked_folder / "run.yaml", "x")
    with pytest.raises(OutputError, match="metrics.jsonl cannot be written: Permission denied"):
        append_jsonl(locked_folder / "metrics.jsonl", {"step": 1})


def test_an_atomic_write_replaces_the_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a.json", "longer than the next")
    write_atomic(tmp_path / "a.json", "é")
    assert (tmp_path / "a.json").read_bytes() == b"\xc3\xa9"
    write_atomic(tmp_path / "a.json", b"\xff")
    assert (tmp_path / "a.json").read_bytes() == b"\xff"
    assert names(tmp_path) == ["a.json"]


def test_an_atomic_write_goes_through_a_link_and_spares_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "a")
    write_atomic(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "a").read_text() == "x"
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "elsewhere"):
        with pytest.raises(OutputError, match=f"{name} is not a file that can be replaced"):
            write_atomic(tmp_path / name, "x")
    assert (tmp_path / "pipe").is_fifo()


def test_a_write_that_does_not_fit_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a.json", "before")
    said = r"a\.json cannot be written: File too large.* \(100\.0 kB were to be written\)\. Raise"
    with largest_file(10_000), pytest.raises(OutputError, match=said):
        write_atomic(tmp_path / "a.json", "x" * 100_000)
    assert (tmp_path / "a.json").read_text() == "before"
    assert names(tmp_path) == ["a.json"]


def test_a_failure_of_the_writer_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "No space left on device. Free some space, or choose another out."),
        (errno.EDQUOT, "quota on this disk is used up"),
        (errno.EPERM, "permission to write there"),
        (errno.EROFS, "mounted read-only"),
        (errno.EEXIST, "It is a file where a folder belongs"),
        (errno.EIO, "Input/output error. Choose another out."),
    ],
)
def test_what_the_system_refuses_is_answered_with_what_to_do(number: int, advice: str) -> None:
    with (
        pytest.raises(OutputError, match=rf"^runs/a cannot be written: .*{re.escape(advice)}"),
        writing(Path("runs/a")),
    ):
        raise OSError(number, os.strerror(number))


def test_a_failure_without_a_number_is_passed_on_in_words() -> None:
    with pytest.raises(OutputError, match="a cannot be written: the disk said no"):  # noqa: SIM117
        with writing(Path("a")):
            raise OSError("the disk said no")


def test_space_is_asked_for_before_it_is_used(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "there", 1)
    free = r"[\d.]+ (bytes|kB|MB|GB) free"
    said = rf"there needs 1000000000\.0 GB and its disk has {free}\. Free some"
    with pytest.raises(OutputError, match=said):
        require_space(tmp_path / "not" / "there", 10**18)


def test_a_record_is_one_line_of_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    odd = "line\nend \u2028 é \ud800"  # a lone surrogate has no UTF-8
    values = (float("nan"), [float("inf"), 0.1], {"a": -float("inf")})
    append_jsonl(path, {"step": 1, "policy": odd, "values": values})
    append_jsonl(path, {"step": 2})
    first, second, rest = path.read_bytes().split(b"\n")
    assert json.loads(first) == {
        "step": 1,
        "policy": odd,
        "values": [None, [None, 0.1], {"a": None}],
    }
    assert (second, rest) == (b'{"step": 2}', b"")
    assert "é".encode() in first


def test_a_line_that_does_not_fit_is_not_begun(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, {"step": 1})
    whole = path.read_bytes()
    with largest_file(20), pytest.raises(OutputError, match="File too large"):
        append_jsonl(path, {"step": 2, "loss": 0.6931})
    assert path.read_bytes() == whole


def test_a_full_disk_is_told_from_a_record(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    said = r"No space left on device \(12 bytes were to be written\)\. Free some space"
    with pytest.raises(OutputError, match=said):
        append_jsonl(tmp_path / "metrics.jsonl", {"step": 1})


def lines_of(steps: list[int]) -> list[bytes]:
    return [f'{{"step": {step}, "text": "é\u2028 }}"}}\n'.encode() for step in steps]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.integers(0, 9), max_size=6), st.integers(0, 9), st.integers(0, 300))
def test_truncation_keeps_the_whole_records_up_to_the_step_wherever_the_file_was_cut(
    tmp_path: Path, steps: list[int], last: int, cut: int
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(lines_of(steps))[:cut])
    present = path.read_bytes()
    # A record is whole once its closing brace is there, with or without the line's end.
    whole = [s for i, s in enumerate(steps) if len(b"".join(lines_of(steps[: i + 1]))) - 1 <= cut]
    kept = [step for step in whole if step <= last]
    num_lines = present.count(b"\n") + (not present.endswith(b"\n") and present != b"")
    assert truncate_jsonl_after(path, last) == num_lines - len(kept)
    assert path.read_bytes() == b"".join(lines_of(kept))
    assert names(tmp_path) == ["metrics.jsonl"]


def test_truncating_a_file_that_is_not_there_drops_nothing(tmp_path: Path) -> None:
    assert truncate_jsonl_after(tmp_path / "metrics.jsonl", 1) == 0
    assert truncate_ledger_after(tmp_path / "ledger.parquet", 1) == 0


@pytest.mark.parametrize("bad", [b"{", b"[]", b"{}", b'{"step": "1"}', b"\xff", b""])
def test_a_bad_line_in_the_middle_is_named(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join([b'{"step": 1}\n', bad, b'\n{"step": 2}\n']))
    with pytest.raises(DataError, match=r'metrics\.jsonl:2 is not a JSON object with a "step"'):
        truncate_jsonl_after(path, 1)


def ledger(steps: list[int]) -> pa.Table:
    return pa.table({"step": steps, "margin": [0.5 * step for step in steps]})


def test_a_ledger_is_replaced_whole_and_cut_at_a_step(tmp_path: Path) -> None:
    path = tmp_path / "ledger.parquet"
    write_ledger(path, ledger([9]))
    write_ledger(path, ledger([0, 10, 10, 20]))
    assert truncate_ledger_after(path, 10) == 1
    assert pq.read_table(path).equals(ledger([0, 10, 10]))
    assert truncate_ledger_after(path, 10) == 0
    assert names(tmp_path) == ["ledger.parquet"]


def test_a_ledger_that_does_not_fit_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "ledger.parquet"
    write_ledger(path, ledger([1]))
    with largest_file(1000), pytest.raises(OutputError, match=r"ledger\.parquet cannot be written"):
        write_ledger(path, ledger(list(range(5000))))
    assert pq.read_table(path).equals(ledger([1]))
    assert names(tmp_path) == ["ledger.parquet"]
