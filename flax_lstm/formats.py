"""csv, tsv, json and jsonl files into columns, with the line of every row.

Parsed by the standard library rather than by `datasets.load_dataset`, which turns the
text `NA` into a missing value, takes the first field of an over-long csv row for an
index, mixes types in silence, and seldom names a line (datasets 5.2).
"""

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

from flax_lstm.config import UserError
from flax_lstm.labels import shown


def decode(content: bytes, path: Path) -> str:
    """Decodes UTF-8, with or without a byte order mark.

    Raises:
      UserError: If the bytes are not UTF-8; names the file and the first wrong byte.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8: byte {error.start} is "
            f"0x{error.object[error.start]:02x}. Convert the file, for example with "
            "`iconv -f LATIN1 -t UTF-8`."
        ) from error


def parse_csv(
    text: str, path: Path, tabs: bool
) -> tuple[dict[str, list[Any]], list[int], str]:
    """Returns the columns as text, and the line in which each row ends."""
    limit = csv.field_size_limit(sys.maxsize)
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter="\t" if tabs else ",", strict=True
    )
    try:
        header = [name.strip() for name in next(reader)]
        repeated = sorted({name for name in header if header.count(name) > 1 and name})
        if repeated:
            raise UserError(
                f"{path} has more than one column {repeated[0]!r}; rename them so that "
                "each name occurs once."
            )
        records, lines = [], []
        for record in reader:
            if not record:
                continue  # a blank line
            if len(record) != len(header):
                raise UserError(
                    f"line {reader.line_num} of {path} has {len(record)} fields and "
                    f"the header has {len(header)} ({', '.join(header)}); quote texts "
                    "that hold the separator."
                )
            records.append(record)
            lines.append(reader.line_num)
    except csv.Error as error:
        raise UserError(
            f"line {reader.line_num} of {path} does not parse: {error}. Is a quote "
            "left open?"
        ) from error
    finally:
        csv.field_size_limit(limit)
    values = zip(*records, strict=True) if records else [[] for _ in header]
    columns = {name: list(column) for name, column in zip(header, values, strict=True)}
    return columns, lines, "line"


def parse_json(text: str, path: Path) -> tuple[dict[str, list[Any]], list[int], str]:
    """Returns the columns of an array of objects, or of one object per line."""
    records: list[tuple[int, Any]] = []
    line = 1
    try:
        if text.lstrip().startswith("["):
            unit = "row"
            records = list(enumerate(json.loads(text), start=1))
        else:
            unit = "line"
            for line, content in enumerate(text.split("\n"), start=1):
                if content.strip():
                    records.append((line, json.loads(content)))
    except json.JSONDecodeError as error:
        raise UserError(
            f"line {line + error.lineno - 1} of {path} is not JSON: {error.msg} "
            f"(column {error.colno}). Expected an array of objects, or one object per "
            "line."
        ) from error
    names: dict[str, None] = {}
    for number, record in records:
        if not isinstance(record, dict):
            raise UserError(
                f"{unit} {number} of {path} is {shown(record)}; expected an object "
                'such as {"text": "...", "label": 1}.'
            )
        names.update(dict.fromkeys(record))
    columns = {name: [r.get(name) for _, r in records] for name in names}
    return columns, [number for number, _ in records], unit
