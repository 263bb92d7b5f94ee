"""The folder of a run: one writer at a time, and files that are whole or absent."""

import contextlib
import fcntl
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flax_lstm import distributed
from flax_lstm.config import UserError, read_limited

LOCK = ".lock"
SHARED_LIMIT_S = 5.0
"""What a network's file system may take to show a new file everywhere."""
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
METRICS = "metrics.jsonl"
ENVIRONMENT = "environment.json"
SUMMARY = "summary.json"
CHECKPOINTS = "checkpoints"
NAMES = (LOCK, CONFIG, TOKENIZER, METRICS, ENVIRONMENT, SUMMARY, CHECKPOINTS)
"""All that a run writes in its folder."""


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Holds a run's folder for this process; creates it, and finds it writable.

    The lock is the kernel's: it goes with the process that holds it, however it ends.
    Where no run begins, what was made for it goes again.

    Raises:
      UserError: If another process holds the folder (names it), if it cannot be
        written, if one of its own names is a link, or if there is no run in it but
        something of these names.
    """
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        _check_links(folder)
        _check_unclaimed(folder)
        with open(_open_lock(folder), "r+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = file.read() or "another process"
                raise UserError(
                    f"the run folder {folder} is being written by {holder}; wait for "
                    "it to end, or give another folder."
                ) from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            try:
                yield
            finally:
                if not holds_run(folder):
                    _remove_empty(folder / CHECKPOINTS)
                    (folder / LOCK).unlink(missing_ok=True)
    finally:
        _remove_empty(*made)


def _check_links(folder: Path) -> None:
    """Refuses a link in the place of what a run writes, or prunes, in its folder.

    It would let a folder from elsewhere empty the file that it leads to.
    """
    for name in NAMES:
        path = folder / name
        if os.path.islink(path):
            raise UserError(
                f"{path} is a link, to {os.readlink(path)}; a run writes in its own "
                "folder alone. Put what it leads to in its place, or give another "
                "folder."
            )


def _check_unclaimed(folder: Path) -> None:
    """Refuses to start a run over what has the names of its files.

    They are somebody's own, or what is left of a run that lost its configuration.
    """
    names = [name for name in NAMES if name != LOCK]
    with reading(folder):
        taken = [name for name in names if _is_something(folder / name)]
    if taken and not holds_run(folder):
        raise UserError(
            f"{folder} holds no run (no {CONFIG}), but {', '.join(taken)}, which a run "
            "would write over. Give another folder, or move that away. Nothing was "
            "changed."
        )


def _is_something(path: Path) -> bool:
    """Says whether there is a file, or a folder that is not empty."""
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _open_lock(folder: Path) -> int:
    """Makes the folder and opens its lock file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
        return os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise UserError(
            f"cannot write to the run folder {folder}: {error.strerror}; give one that "
            "can be written (--out), or free its disk."
        ) from error


def _remove_empty(*folders: Path) -> None:
    """Removes folders, inner ones first; keeps what is not empty, and is no error."""
    with contextlib.suppress(OSError):
        for path in folders:
            path.rmdir()


@contextlib.contextmanager
def writing_together(folder: Path) -> Iterator[None]:
    """Holds a run's folder for all processes of the run; the first one has the lock.

    Raises:
      UserError: As `writing`, in every process; and if a process sees another folder
        there than the first one.
    """
    with contextlib.ExitStack() as stack:
        holder = ""
        with distributed.together():
            if distributed.is_first():
                stack.enter_context(writing(folder))
                holder = (folder / LOCK).read_text(encoding="utf-8")
        holder = distributed.from_first(holder)
        with distributed.together():
            until = time.monotonic() + SHARED_LIMIT_S
            while not _held_by(folder, holder):
                if time.monotonic() > until:
                    raise UserError(
                        f"{folder} is not the folder that process 0 writes; all "
                        "processes must share it. Give one on a file system that they "
                        "share (--out)."
                    )
                time.sleep(0.1)
        yield


def _held_by(folder: Path, holder: str) -> bool:
    try:
        return (folder / LOCK).read_text(encoding="utf-8") == holder
    except OSError:
        return False


def write_json(path: Path, value: Any) -> None:
    """Writes JSON; `path` is never half there."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes to a neighbouring file first, so that `path` is never half there."""
    whole = path.with_name(f".{path.name}.tmp")
    whole.unlink(missing_ok=True)
    with open(whole, "x", encoding="utf-8") as file:  # a link is not followed
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    whole.replace(path)


def read_json(path: Path) -> Any:
    """Reads a JSON file of a run.

    Raises:
      UserError: If it is missing or damaged.
    """
    try:
        return json.loads(read_limited(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} of the run: {error}.") from error


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Says what of a run cannot be read, as for want of permission.

    Raises:
      UserError: In place of an OSError of the system.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename or folder} of the run: "
            f"{error.strerror or error}."
        ) from error


def holds_run(folder: Path) -> bool:
    """Says whether a run was started in this folder.

    Raises:
      UserError: If it cannot be looked into.
    """
    with reading(folder):
        return (folder / CONFIG).exists()


def unused(parent: Path, name: str) -> Path:
    """Returns the first of `parent/name-1`, `parent/name-2`, … that does not exist."""
    n = 1
    while (parent / f"{name}-{n}").exists():
        n += 1
    return parent / f"{name}-{n}"
