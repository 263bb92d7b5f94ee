"""csv, tsv, json and jsonl files into columns, with the line of every row.

Parsed by the standard library rather than by `datasets.load_dataset`, which turns the
text `NA` into a missing value, takes the first field of an over-long csv row for an
index, mixes types in silence, and seldom names a line (datasets 5.2).
"""

import csv
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flax_lstm.columns import check_names
from flax_lstm.config import UserError, object_once
from flax_lstm.labels import shown

MOST_NAMES = 1000
"""Different keys of the objects of a json file; columns are as long as the file."""
_FORMS = {
    b"\x1f\x8b": "compressed by gzip; unpack it first, as by `gunzip`",
    b"PK\x03\x04": "a zip archive; unpack it first, as by `unzip`",
    b"BZh": "compressed by bzip2; unpack it first, as by `bunzip2`",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it first, as by `unzstd`",
    b"PAR1": "a Parquet file; rename it to .parquet",
    b"\xff\xfe": "UTF-16; convert it, as by `iconv -f UTF-16 -t UTF-8`",
    b"\xfe\xff": "UTF-16; convert it, as by `iconv -f UTF-16 -t UTF-8`",
}
"""What a file is that begins with these bytes, and what to do about it."""


def none() -> int:
    """Returns 0: nothing comes before."""
    return 0


def decode(
    content: bytes, path: Path, start: int = 0, lines: Callable[[], int] = none
) -> str:
    """Decodes UTF-8, with or without a byte order mark.

    Args:
      content: Of the file, from `start` on.
      path: For messages.
      start: Bytes that come before.
      lines: Returns the lines that come before; asked for a message only.

    Raises:
      UserError: If the bytes are not UTF-8; names the file and the first wrong byte.
    """
    if not start:
        check_form(content, path)
    try:
        return content.decode("utf-8" if start else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1 + lines()
        raise UserError(
            f"{path} is not UTF-8: byte {start + error.start}, in line {line}, is "
            f"0x{error.object[error.start]:02x}. Convert the file, for example with "
            "`iconv -f LATIN1 -t UTF-8`."
        ) from error


def check_form(content: bytes, path: Path) -> None:
    """Raises UserError where a file begins as something else than text does."""
    for start, form in _FORMS.items():
        if content.startswith(start):
            raise UserError(f"{path} is {form}; expected UTF-8 text.")
    if b"\0" in content[:2]:  # no mark, but the first character has a zero byte
        raise UserError(
            f"{path} begins with a NUL byte as UTF-16 does; expected UTF-8 text. "
            "Convert it, as by `iconv -f UTF-16LE -t UTF-8`."
        )


def parse_csv(
    content: bytes, path: Path, tabs: bool, lines: Callable[[], int] = none
) -> tuple[dict[str, list[Any]], list[int], str]:
    """Returns the columns as text, and the line in which each row ends.

    Args:
      content: UTF-8, already found to be so; with or without a byte order mark.
      path: For messages.
      tabs: Whether tabs separate the fields.
      lines: Returns the lines left out between the header and the rest; asked for a
        message only, and not in what is returned.
    """
    limit = csv.field_size_limit(sys.maxsize)
    # Decoded anew piece by piece: a StringIO holds four bytes for each character.
    text = io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", newline="")
    reader = csv.reader(text, delimiter="\t" if tabs else ",", strict=True)
    began, before = 1, none
    try:
        header = [name.strip() for name in next(reader)]
        if not any(header):
            raise UserError(
                f"line 1 of {path} names no column; expected a header, as text,label."
            )
        check_names(header, path)
        records, ends, before = [], [], lines
        began = reader.line_num + 1
        for record in reader:
            if tabs and reader.line_num > began:
                _check_quoted(record, path, began, reader.line_num, before)
            if record and len(record) != len(header):
                raise UserError(
                    f"line {before() + reader.line_num} of {path} has {len(record)} "
                    f"fields and "
                    f"the header has {len(header)} ({', '.join(header)}); quote texts "
                    "that hold the separator."
                )
            if record:  # else a blank line
                records.append(record)
                ends.append(reader.line_num)
            began = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"the row that begins in line {before() + began} of {path} does not parse, "
            f"up to line {before() + reader.line_num}: {error}. Is a quote left open?"
        ) from error
    finally:
        csv.field_size_limit(limit)
    values = zip(*records, strict=True) if records else [[] for _ in header]
    columns = {name: list(column) for name, column in zip(header, values, strict=True)}
    return columns, ends, "line"


def _check_quoted(
    record: list[str], path: Path, first: int, last: int, before: Callable[[], int]
) -> None:
    """Raises UserError where rows of a tsv seem to lie within the quotes of one text.

    Many a tsv is written without quoting. There a text that begins with a quote would
    go on, over rows and their labels, up to one that ends with a quote.
    """
    if any("\t" in text and ("\n" in text or "\r" in text) for text in record):
        raise UserError(
            f"the row in lines {before() + first} to {before() + last} of {path} has a "
            "text within quotes that holds tabs and line breaks, as if it were several "
            "rows. A text that begins with a quote must be quoted itself, with its "
            "quotes doubled, or be given as jsonl."
        )


def is_array(text: str) -> bool:
    """Says whether a json file is an array, which has no lines of its own."""
    return text.lstrip().startswith("[")


def parse_json(
    text: str, path: Path, lines: Callable[[], int] = none, *, part: bool = False
) -> tuple[dict[str, list[Any]], list[int], str]:
    """Returns the columns of an array of objects, or of one object per line.

    Args:
      text: The array, or lines.
      path: For messages.
      lines: Returns the lines that come before; asked for a message only, and not in
        what is returned.
      part: Whether `text` is some of the lines, of which there may be none.
    """
    decoder = json.JSONDecoder(object_pairs_hook=object_once)
    records: list[tuple[int, Any]] = []
    line, array = 1, is_array(text) and not part
    unit = "row" if array else "line"
    try:
        if array:
            records = list(enumerate(decoder.decode(text), start=1))
        else:
            for line, content in enumerate(text.split("\n"), start=1):
                if content.strip():
                    records.append((line, decoder.decode(content)))
    except json.JSONDecodeError as error:
        raise UserError(
            f"line {lines() + line + error.lineno - 1} of {path} is not JSON: "
            f"{error.msg} (column {error.colno}). Expected an array of objects, or one "
            "whole object per line."
        ) from error
    except (ValueError, RecursionError) as error:  # a key twice, digits, nesting
        where = f"{path}" if array else f"line {lines() + line} of {path}"
        raise UserError(f"{where} cannot be used: {error}.") from error
    names: dict[str, None] = {}
    escapes = "\\ud" in text or "\\uD" in text  # no lone surrogate without one
    for number, record in records:
        if not isinstance(record, dict):
            raise UserError(
                f"{unit} {lines() + number} of {path} is {shown(record)}; expected an "
                'object such as {"text": "...", "label": 1}.'
            )
        names.update(dict.fromkeys(record))
        if len(names) > MOST_NAMES:
            raise UserError(
                f"{path} has more than {MOST_NAMES} different keys, the last of them "
                f"{shown(list(names)[-1])} in {unit} {lines() + number}; expected "
                'objects with the same keys, such as {"text": "...", "label": 1}.'
            )
        if escapes:
            _check_characters(record, unit, number, path, lines)
    if not records and not part:
        raise UserError(f"no rows in {path}.")
    columns = {name: [r.get(name) for _, r in records] for name in names}
    return columns, [number for number, _ in records], unit


def _check_characters(
    record: dict[str, Any], unit: str, number: int, path: Path, lines: Callable
) -> None:
    for name, value in record.items():
        try:
            f"{name} {value}".encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{unit} {lines() + number} of {path} has half a surrogate pair in "
                f"{name!a:.40}, which is no character. Correct the row or remove it."
            ) from error
