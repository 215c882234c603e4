"""The run directory: held by one process at a time, its files whole or absent.

Every file is written beside its final name and moved there, except the .jsonl records, which
grow by whole lines (records.py). What the operating system refuses becomes an OutputError that
says what to do.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import platform
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType

from upweight.errors import OutputError, some_of

TEMPORARY = ".tmp-"
"""How the name of an unfinished file or folder begins; nothing under such a name is ever read."""

CHECKPOINT = "step-"
REPLACED = ".old-step-"
"""How a checkpoint's folder begins, and for a moment that of one that the same step replaces."""

RECORDS = (
    "run.yaml",
    "account.json",
    "environment.json",
    "evaluation.json",
    "metrics.jsonl",
    "ledger.parquet",
    "samples.jsonl",
    "rollouts",
    "margins.jsonl",
    "suspects.jsonl",
    "checkpoints",
    "model",
    "report.html",
    "tensorboard",
)
FINISHED = {"model", "report.html"}
"""What only the end of a run writes."""
_LOCK = ".upweight.lock"
_LOCKS_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_ADVICE = {
    errno.ENOSPC: "Free some space, or choose another out.",
    errno.EDQUOT: "Your quota on this disk is used up: free some of it, or choose another out.",
    errno.EFBIG: "Raise the limit on file sizes (ulimit -f), or choose another out.",
    errno.EACCES: "Give yourself permission to write there, or choose another out.",
    errno.EPERM: "Give yourself permission to write there, or choose another out.",
    errno.EROFS: "It is mounted read-only: choose another out.",
    errno.ENOTDIR: "A part of the path is a file: choose another out.",
    errno.EEXIST: "It is a file where a folder belongs: choose another out.",
}
_logger = logging.getLogger(__name__)


class HoldsRun(OutputError):
    """There is a run in the folder, and none is resumed."""


@dataclass(frozen=True)
class RunDir:
    """An open run directory; a context manager that gives it back.

    The lock is the kernel's and ends with the process, however the process ends. `left` are the
    records of a run that stopped here before its first checkpoint: the one that begins removes
    them with its first file. `made` are the folders that were not there, the run's own first: where
    a run fails before its first file, they go again.
    """

    path: Path
    resumed: bool
    lock: TextIOWrapper
    left: tuple[str, ...] = ()
    made: tuple[Path, ...] = ()

    def remove_left(self) -> None:
        with writing(self.path):
            for record in self.left:
                remove(self.path / record)

    def file(self, record: str) -> Path:
        """The path of one of RECORDS, such as "metrics.jsonl"."""
        assert record in RECORDS, f"{record} is not a file of a run directory"
        return self.path / record

    def close(self) -> None:
        self.lock.close()

    def __enter__(self) -> RunDir:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and self.made:
            self._remove_empty()
        self.close()

    def _remove_empty(self) -> None:
        """While the lock is ours: nobody else has begun here."""
        # A folder that holds what others have put there stays, and so do its parents.
        with suppress(OSError):
            if os.listdir(self.path) == [_LOCK]:
                (self.path / _LOCK).unlink()
                for folder in self.made:
                    folder.rmdir()


def open_run_dir(path: Path, resume: bool) -> RunDir:
    """Takes `path` for this process: a new or empty folder, one whose run stopped before its first
    checkpoint, or with `resume` a stopped run's.

    Raises OutputError when another living process has it, when it holds a run and `resume` is
    False, when it holds anything else, when it has nothing to resume, and when it is a file or
    cannot be written. A refused folder is left as it was found.
    """
    with writing(path):
        _require_fits(path, resume)
        ours = (path / _LOCK).exists()
        made = tuple(folder for folder in (path, *path.parents) if not folder.exists())
        path.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
        try:
            # Read again: another process may have come and gone before the lock was ours.
            _require_fits(path, resume)
            left = _require_startable(path, resume, ours)
            for unfinished in path.glob(f"{TEMPORARY}*"):
                remove(unfinished)
        except BaseException:
            lock.close()
            raise
        return RunDir(path, resume, lock, left, made)


def require_run_dir(path: Path, resume: bool) -> None:
    """Raises what `open_run_dir` would, but for a folder in use. Writes nothing."""
    with writing(path):
        _require_fits(path, resume)
        _require_startable(path, resume, (path / _LOCK).exists())
        existing = path.absolute()
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "", str(path))
        effective = os.access in os.supports_effective_ids
        if not os.access(existing, os.W_OK | os.X_OK, effective_ids=effective):
            raise PermissionError(errno.EACCES, "", str(path))


def require_free(path: Path) -> None:
    """Raises OutputError where a living process has this run directory."""
    # What cannot be asked is said when the lock is taken.
    with suppress(OSError), (path / _LOCK).open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(path, lock) from None


def require_file(path: Path, *, overwrite: bool = True) -> None:
    """Raises OutputError where `write_atomic` could not put a file at `path`, and without
    `overwrite` where one is that holds anything; for use before the work that ends there. The
    folders that are to hold it are made."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        final = _replaceable(path)
        held = final.stat().st_size if final.exists() else 0
        temporary = temporary_name(final)
        temporary.touch()
        temporary.unlink()
    if held and not overwrite:
        raise OutputError(
            f"{path} exists and holds {_size(held)}. Choose another out, or replace it: "
            "--overwrite (in Python overwrite=True)."
        )


def _require_fits(path: Path, resume: bool) -> None:
    """What is refused before the lock: nothing is written into a folder that is not a run's."""
    entries = _entries(path)
    if _is_run(path, entries):
        return
    if resume:
        found = f"it holds {some_of(sorted(entries), 3)}" if entries else "it is empty or not there"
        raise OutputError(
            f"{path} has no run to resume: {found}. Check out, or leave resume off to start a run."
        )
    if entries:
        raise OutputError(
            f"{path} holds files that are not a run's: {some_of(sorted(entries), 3)}. Choose an "
            "out that is empty or not there yet."
        )


def _require_startable(path: Path, resume: bool, ours: bool) -> tuple[str, ...]:
    """What is asked once the lock is ours: a folder in use is said to be in use first. The records
    that a run left here before its first checkpoint, where one begins."""
    entries, checkpoints = _entries(path), _entries(path / "checkpoints")
    resumable = any(entry.startswith((CHECKPOINT, REPLACED)) for entry in checkpoints)
    if resume and not resumable:
        raise OutputError(
            f"{path} has no checkpoint to resume: its run stopped before the first one. Choose "
            "another out, or leave resume off to begin again."
        )
    if resume or not entries:
        return ()
    # Nothing is removed that a run did not make, or that somebody may come back to.
    if not ours or checkpoints or not entries.isdisjoint(FINISHED):
        choices = "Choose another out, or remove the folder if you do not need it."
        found = "Set resume: true to continue it." if resumable else "It has no checkpoint."
        raise HoldsRun(f"{path} holds a run already. {found} {choices}")
    return tuple(sorted(entries.intersection(RECORDS)))


def _entries(path: Path) -> set[str]:
    """The names in the folder, without the lock and what a killed process left unfinished."""
    if not path.exists():
        return set()
    return {e for e in os.listdir(path) if e != _LOCK and not e.startswith(TEMPORARY)}


def _is_run(path: Path, entries: set[str]) -> bool:
    # A run.yaml alone may be one that somebody wrote, beside their data.
    begun = (path / _LOCK).exists() and not entries.isdisjoint(RECORDS)
    return begun or "checkpoints" in entries


def _lock(folder: Path) -> TextIOWrapper:
    path = folder / _LOCK
    lock = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}")
        lock.flush()
    except BlockingIOError:
        error = _in_use(folder, lock)
        lock.close()
        raise error from None
    except OSError as error:
        if error.errno not in _LOCKS_UNSUPPORTED:
            lock.close()
            raise
        _logger.warning(
            "%s lies on a file system without locks: nothing keeps a second run out of it.", folder
        )
    if not path.exists() or not os.path.samestat(os.fstat(lock.fileno()), path.stat()):
        # Taken between its opening and its locking: whoever had it was refused, and removed it.
        lock.close()
        raise OutputError(f"{folder} was in use until this moment. Run the same command again.")
    return lock


def _in_use(folder: Path, lock: TextIOWrapper) -> OutputError:
    return OutputError(
        f"{folder} is in use by {lock.read() or 'another process'}. Wait until it ends, stop it, "
        "or choose another out."
    )


@contextmanager
def writing(path: Path, num_bytes: int | None = None) -> Generator[None]:
    """Turns what the operating system refuses inside the block into an OutputError about `path`.

    `num_bytes` is how much was to be written, for the message.
    """
    try:
        yield
    except OSError as error:
        needed = f" ({_size(num_bytes)} were to be written)" if num_bytes is not None else ""
        reason = os.strerror(error.errno) if error.errno else str(error)
        # The file at fault may be a temporary one or a parent; both are named where they differ.
        at = f" at {error.filename}" if error.filename not in (None, str(path)) else ""
        raise OutputError(
            f"{path} cannot be written: {reason}{at}{needed}. "
            f"{_ADVICE.get(error.errno or 0, 'Choose another out.')}"
        ) from error


def require_space(path: Path, num_bytes: int) -> None:
    """Raises OutputError when the disk that `path` is or will be on has under `num_bytes` free."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        raise OutputError(
            f"{path} needs {_size(num_bytes)} and its disk has {_size(free)} free. "
            f"{_ADVICE[errno.ENOSPC]}"
        )


def _size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def sync(path: Path) -> None:
    """Returns when the file or folder is on the disk and not only in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """A name in the same folder, so that a rename to `path` is atomic, and used by nobody else."""
    return path.with_name(f"{TEMPORARY}{path.name}.{secrets.token_hex(4)}")


def remove(path: Path) -> None:
    """Deletes a file, or a folder with everything in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path, num_bytes: int | None = None) -> Generator[Path]:
    """Gives a temporary path to write a file to, which becomes `path` when the block ends well.

    Until then `path` is what it was before; when the block fails the temporary file is removed.
    A link stays, and the file that it leads to is replaced. Raises OutputError for what the
    operating system refuses and for a device, pipe or folder: a rename would replace that itself.
    """
    with writing(path):
        final = _replaceable(path)
    temporary = temporary_name(final)
    try:
        with writing(path, num_bytes):
            yield temporary
            sync(temporary)
            os.replace(temporary, final)
            sync(final.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _replaceable(path: Path) -> Path:
    final = path.resolve()
    if final.exists() and not final.is_file():
        raise OutputError(f"{path} is not a file that can be replaced. Choose a file's name.")
    return final


def write_atomic(path: Path, content: str | bytes) -> None:
    """Makes `content` (text as UTF-8) the whole of the file at `path`, or leaves it untouched."""
    encoded = content.encode() if isinstance(content, str) else content
    with replacing(path, len(encoded)) as temporary:
        temporary.write_bytes(encoded)
