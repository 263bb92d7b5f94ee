"""The stretch of a file of lines that one of several processes reads.

The bytes are cut into equal stretches, each moved on to the next end of a line. A csv
row may go over several lines, and whether a quote is open where a stretch begins is
known only from all before it. So each process reads its stretch for both cases, and
with what the others say about theirs it knows which one is true. A row belongs to the
process in whose stretch it begins.
"""

import contextlib
import csv
import hashlib
import io
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

from flax_lstm.config import UserError
from flax_lstm.sharing import Share

BLOCK = 2**20
"""Bytes of a file read at a time."""
OPEN = "unexpected end of data"
"""What the csv module says where a quote is open at the end."""


@contextlib.contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Says in words that a file cannot be read.

    Raises:
      UserError: In place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error


def line_stretch(path: Path, share: Share) -> tuple[int, int]:
    """Returns where the bytes of this process begin and end, each after a line."""
    size = path.stat().st_size
    even = share.stretch(size)
    with path.open("rb") as file:
        return _next_line(file, even.start, size), _next_line(file, even.stop, size)


def _next_line(file: io.BufferedReader, place: int, size: int) -> int:
    """Returns the first place from here on at which a line begins, or the end."""
    if place in (0, size):
        return place
    file.seek(place - 1)
    file.readline()
    return file.tell()


def read_bytes(path: Path, start: int, stop: int) -> bytes:
    """Reads a stretch of a file."""
    with path.open("rb") as file:
        file.seek(start)
        return file.read(stop - start)


def count_lines(content: bytes) -> int:
    r"""Counts ends of lines, of any of the three kinds.

    >>> count_lines(b"a\r\nb\rc\n")
    3
    """
    return content.count(b"\n") + content.count(b"\r") - content.count(b"\r\n")


def csv_stretch(
    path: Path, tabs: bool, start: int, stop: int, share: Share
) -> tuple[int, int]:
    """Returns where the rows that begin in this stretch begin and end, in bytes.

    All processes must call it.
    """
    with share.together(), read_errors(path):
        content = read_bytes(path, start, stop)
        ends = [_is_open(content, tabs, opened) for opened in (False, True)]
    del content
    opened: list[bool | None] = [False]
    for of in share.gather(ends):
        # Where a row does not parse, its process says so, and the others say nothing.
        opened.append(None if opened[-1] is None else of[int(opened[-1])])
    mine, after = opened[share.process : share.process + 2]
    with share.together(), read_errors(path):
        if mine is None:
            return start, start
        first = _end_of_row(path, tabs, start) if mine else start
        return first, max(first, _end_of_row(path, tabs, stop) if after else stop)


def _is_open(content: bytes, tabs: bool, opened: bool) -> bool | None:
    """Says whether a quote is open at the end, if one is at the beginning or not.

    None where that cannot be: the rows would not parse.
    """
    if b'"' not in content:
        return opened
    lines = _lines(io.BytesIO(content))
    try:
        for _ in _rows(itertools.chain(['"'] * opened, lines), tabs):
            pass
    except csv.Error as error:
        return True if OPEN in str(error) else None
    return False


def _end_of_row(path: Path, tabs: bool, start: int) -> int:
    """Returns where a row ends in which a quote is open at `start`."""
    read = []

    def lines(file: io.BufferedReader) -> Iterator[str]:
        yield '"'
        for line in _lines(file):
            read.append(line)
            yield line

    with path.open("rb") as file:
        file.seek(start)
        # What is wrong with the row, the process says in whose stretch it begins.
        with contextlib.suppress(csv.Error):
            next(_rows(lines(file), tabs))
    return start + len("".join(read).encode("utf-8", "surrogateescape"))


def csv_header(path: Path, tabs: bool) -> bytes:
    """Returns the bytes of the first row."""
    read = []
    # The process that has this row says what is wrong with it.
    with path.open("rb") as file, contextlib.suppress(csv.Error, StopIteration):
        next(_rows((read.append(line) or line for line in _lines(file)), tabs))
    return "".join(read).encode("utf-8", "surrogateescape")


def _lines(file: io.BytesIO | io.BufferedReader) -> io.TextIOWrapper:
    """Returns the lines of a file as `formats.parse_csv` sees them, whatever is in."""
    return io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="")


def _rows(lines: Iterator[str], tabs: bool) -> Iterator[list[str]]:
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield from csv.reader(lines, delimiter="\t" if tabs else ",", strict=True)
    finally:
        csv.field_size_limit(limit)


def common_digest(
    path: Path, start: int, stop: int, share: Share, *, gaps: bool = False
) -> str:
    """Returns the SHA-256 of a file, of which each process has read a stretch.

    That of the whole cannot be put together from those of its stretches. So process 0
    reads all bytes once more, and finds whether the others read the same file.

    Args:
      path: The file.
      start: First byte that this process has read.
      stop: Where it stopped.
      share: The processes. All must call it.
      gaps: Whether stretches may overlap, or leave out bytes.

    Raises:
      UserError: If a process has another file there.
    """
    with share.together(), read_errors(path):
        mine = hashlib.sha256()
        size = path.stat().st_size
        for block in _blocks(path, start, stop):
            mine.update(block)
    share.agree(bytes_of_file=size)
    said = share.gather([start, stop, mine.hexdigest()])
    whole = ""
    with share.together(), read_errors(path):
        if share.process == 0:
            whole = _digest_of_all(path, size, said, gaps)
    return share.gather(whole)[0]


def _digest_of_all(path: Path, size: int, said: list, gaps: bool) -> str:
    whole, place = hashlib.sha256(), 0
    of_stretch = {(start, stop): hashlib.sha256() for start, stop, _ in said}
    for block in _blocks(path, 0, size):
        whole.update(block)
        for (start, stop), digest in of_stretch.items():
            digest.update(block[max(start - place, 0) : max(stop - place, 0)])
        place += len(block)
    end = 0
    for process, (start, stop, digest) in enumerate(said):
        same = digest == of_stretch[start, stop].hexdigest()
        if not same or (start != end and not gaps):
            raise UserError(
                f"process {process} differs from process 0 in what bytes {start} to "
                f"{stop} of {path} are. Give all processes the same data."
            )
        end = stop
    return whole.hexdigest()


def _blocks(path: Path, start: int, stop: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while start < stop and (block := file.read(min(BLOCK, stop - start))):
            start += len(block)
            yield block
