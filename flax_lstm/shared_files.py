"""Files of text, of which each of several processes reads and parses a stretch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax_lstm.columns import Where
from flax_lstm.config import UserError
from flax_lstm.formats import check_form, decode, is_array, parse_csv, parse_json
from flax_lstm.parquet import check_memory
from flax_lstm.sharing import Share
from flax_lstm.stretches import (
    BLOCK,
    common_digest,
    count_lines,
    csv_header,
    csv_stretch,
    line_stretch,
    read_bytes,
    read_errors,
)

Columns = dict[str, list[Any]]


def read_stretch(path: Path, share: Share) -> tuple[Columns, Where, str]:
    """Reads the rows of a csv, tsv, json or jsonl file that are this process'.

    An array in a json file is parsed by every process, for only a parser finds its
    rows; each keeps its own. All processes must call this.

    Returns:
      All columns of the file with the values of these rows, the names of the rows, and
      the SHA-256 of the whole file.

    Raises:
      UserError: If the file cannot be read, or a row of it does not parse.
    """
    json = path.suffix.lower() in (".json", ".jsonl")
    with share.together(), read_errors(path):
        check_form(read_bytes(path, 0, 4), path)
        array = json and _is_array(path)
        start, stop = line_stretch(path, share)
    if array:
        return _read_array(path, share)
    if json:
        columns, numbers, lines, blank = _read_json_lines(path, start, stop, share)
    else:
        columns, numbers, lines, blank = _read_csv(path, start, stop, share)
    said = share.gather([list(columns), lines, blank])
    if all(blank for _, _, blank in said):
        raise UserError(f"no rows in {path}: the file is empty.")
    names = dict.fromkeys(name for names, _, _ in said for name in names)
    missing = [None] * len(numbers)
    before = sum(lines for _, lines, _ in said[: share.process])
    where = Where(str(path), [before + number for number in numbers], "line")
    digest = common_digest(path, start, stop, share)
    return {name: columns.get(name, missing) for name in names}, where, digest


def _read_json_lines(
    path: Path, start: int, stop: int, share: Share
) -> tuple[Columns, Sequence[int], int, bool]:
    """Returns columns, the line of each row, all lines, and if there is no text."""

    def lines() -> int:
        return read_bytes(path, 0, start).count(b"\n")

    with share.together(), read_errors(path):
        check_memory(path, stop - start)
        content = read_bytes(path, start, stop)
        text = decode(content, path, start, lines)
        columns, numbers, _ = parse_json(text, path, lines, part=True)
        return columns, numbers, content.count(b"\n"), not text.strip()


def _read_csv(
    path: Path, start: int, stop: int, share: Share
) -> tuple[Columns, Sequence[int], int, bool]:
    """Returns columns, the line in which each row ends, all lines, and if all is blank.

    Lines are counted from where the rows of this process begin.
    """
    tabs = path.suffix.lower() == ".tsv"
    first, last = csv_stretch(path, tabs, start, stop, share)

    def lines() -> int:
        return count_lines(read_bytes(path, len(header), max(first, len(header))))

    with share.together(), read_errors(path):
        check_memory(path, last - first)
        content = read_bytes(path, first, last)
        text = decode(
            content, path, first, lambda: read_bytes(path, 0, first).count(b"\n")
        )
        blank, ends = not text.strip(), count_lines(content)
        del text  # parsed from the bytes, as the whole file would be
        header = csv_header(path, tabs)
        of_header = 0
        if header and (first or not content):
            content, of_header = header + content, count_lines(header)
        if blank and not header.strip():  # of a file that is empty
            return {}, [], 0, True
        columns, numbers, _ = parse_csv(content, path, tabs, lines)
        return columns, [number - of_header for number in numbers], ends, blank


def _is_array(path: Path) -> bool:
    """Says whether a json file is an array, from where it begins."""
    with path.open("rb") as file:
        begin = file.read(BLOCK).removeprefix(b"\xef\xbb\xbf")
        while begin and not begin.strip():
            begin = file.read(BLOCK)
    return is_array(begin.decode("utf-8", "replace"))


def _read_array(path: Path, share: Share) -> tuple[Columns, Where, str]:
    with share.together(), read_errors(path):
        size = path.stat().st_size
        check_memory(path, size)
        text = decode(read_bytes(path, 0, size), path)
        columns, numbers, unit = parse_json(text, path)
    mine = share.stretch(len(numbers))
    where = Where(str(path), numbers[mine], unit)
    digest = common_digest(path, 0, size, share, gaps=True)
    return {name: column[mine] for name, column in columns.items()}, where, digest
