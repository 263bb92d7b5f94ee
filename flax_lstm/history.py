"""The records of a run's epochs: in memory, and line by line in `metrics.jsonl`.

There is one more with every epoch. So a checkpoint does not hold them, but the length
and the SHA-256 of the lines there were when it was made. They are on disk before it is:
the file may hold more than a checkpoint knows of, and where it holds less, or something
else, that is said.
"""

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from flax_lstm.folder import unused, write_text


class HistoryWarning(UserWarning):
    """Records of epochs were lost."""


class History:
    """The records of the epochs of a run.

    Attributes:
      records: One for each epoch, as plain JSON data.
    """

    def __init__(self, records: list[dict[str, Any]] | None = None):
        self.records: list[dict[str, Any]] = []
        self._bytes, self._sha256 = 0, hashlib.sha256()
        self._file: BinaryIO | None = None
        self._lost = False
        for record in records or ():
            self.append(record)

    @classmethod
    def read(cls, path: Path, meta: dict[str, Any]) -> "History":
        """Reads the records that a checkpoint knows of.

        Args:
          path: The file; it may go on after them.
          meta: Data of the checkpoint.

        Warns:
          HistoryWarning: If the file does not hold them. There are none then.
        """
        held = meta["progress"].get("history")  # until the third format
        if held is not None:
            return cls(held)
        known = meta["history"]
        try:
            with open(path, "rb") as file:
                content = file.read(known["bytes"])
        except FileNotFoundError:
            content = b""
        if hashlib.sha256(content).hexdigest() == known["sha256"]:
            return cls([json.loads(line) for line in content.splitlines()])
        warnings.warn(
            f"{path} does not begin with the {known['bytes']} bytes that the checkpoint"
            f" of epoch {meta['progress']['epoch']} knows of: it was lost, cut off or "
            "changed. The records of the epochs until then are left out.",
            HistoryWarning,
            stacklevel=2,
        )
        history = cls()
        history._lost = True
        return history

    @contextlib.contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """Lets a file hold these records alone, and then those that are appended.

        A file that did not hold what it should is kept under another name.
        """
        if self._lost and path.exists():
            path.rename(unused(path.parent, f"{path.stem}-damaged"))
        write_text(path, "".join(map(line_of, self.records)))
        with open(path, "ab") as self._file:
            try:
                yield
            finally:
                self._file = None

    def append(self, record: dict[str, Any]) -> None:
        """Adds a record; on return it is on disk, where there is a file."""
        line = line_of(record).encode()
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        self.records.append(record)
        self._bytes += len(line)
        self._sha256.update(line)

    def known(self) -> dict[str, Any]:
        """Returns what a checkpoint is to know of the records there are now."""
        return {"bytes": self._bytes, "sha256": self._sha256.hexdigest()}

    def wait_share(self) -> float:
        """Returns the share of all training time that was spent waiting for input."""
        seconds = sum(record["seconds"] for record in self.records)
        waited = sum(one["wait_share"] * one["seconds"] for one in self.records)
        return waited / seconds if seconds else 0.0

    def skipped(self) -> int:
        """Returns the steps of all epochs that were skipped."""
        return sum(record.get("skipped", 0) for record in self.records)


def line_of(record: dict[str, Any]) -> str:
    """Returns a record as a line of JSON; the same bytes for what is read back."""
    return json.dumps(record, ensure_ascii=False) + "\n"
