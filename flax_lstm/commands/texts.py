"""Texts from the arguments, a file, or the standard input."""

import codecs
import sys
from collections.abc import Iterable, Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

from flax_lstm.commands.terminal import say
from flax_lstm.config import UserError

MOST_LINE_BYTES = 2**26
"""Of one text; a hundred novels. What has no line ends is not read into memory."""
CHUNK_TEXTS, CHUNK_CHARACTERS = 1024, 2**24
"""Texts predicted at a time, so that a stream of any length fits in memory."""
BLOCK_BYTES = 2**16
"""Read at a time: what a pipe of Linux holds."""


def texts_of(given: Sequence[str], path: Path | None) -> Iterator[str | None]:
    """Yields the texts given, or those of the file, or of the standard input.

    And None where it is going to wait for more: somebody may wait for an answer.
    """
    if given:
        yield from map(argument_text, given)
    elif path is not None:
        try:
            with open(path, "rb") as file:
                yield from lines(file, str(path))
        except OSError as error:
            raise UserError(
                f"cannot read {path}: {error.strerror}; expected a file of "
                "texts, one on each line."
            ) from error
    elif sys.stdin is None:
        raise UserError(
            "the standard input is closed; give texts, --file, or an open input."
        )
    else:
        if typed(given, path):
            say("reading texts, one on each line; Ctrl-D ends.")
        standard: Any = sys.stdin.buffer  # typed as what it is only by default
        yield from lines(standard, "the standard input")


def lines(file: BufferedReader, name: str) -> Iterator[str | None]:
    r"""Yields the lines of a UTF-8 file without their ends (`\n` or `\r\n`).

    And None where those at hand have been given, and it is going to wait for more.

    Raises:
      UserError: If there is no line, or one is longer than `MOST_LINE_BYTES`, holds a
        NUL byte or is not UTF-8.
    """
    number = 0
    for line in _lines_at_hand(file):
        if line is None:
            yield None
            continue
        number += 1
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if len(line) > MOST_LINE_BYTES:
            raise UserError(
                f"line {number} of {name} is longer than {MOST_LINE_BYTES // 2**20} "
                "MiB; expected one text on each line."
            )
        if b"\0" in line:
            raise UserError(
                f"line {number} of {name} holds a NUL byte; expected UTF-8 text. Is it "
                "UTF-16, or not text? `iconv -f UTF-16 -t UTF-8` converts."
            )
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"line {number} of {name} is not UTF-8 (byte {error.start + 1}: "
                f"{line[error.start]:#04x}); convert it, as by "
                "`iconv -f LATIN1 -t UTF-8`."
            ) from error
        yield text.removesuffix("\n").removesuffix("\r")
    if not number:
        raise UserError(f"{name} is empty; expected texts, one on each line.")


def _lines_at_hand(file: BufferedReader) -> Iterator[bytes | None]:
    """Yields lines with their ends; and None where less came than was asked for.

    One that is longer than `MOST_LINE_BYTES` comes in parts.
    """
    begun, size = [], 0
    while block := file.read1(BLOCK_BYTES):
        *ended, rest = block.split(b"\n")
        for line in ended:
            yield b"".join([*begun, line, b"\n"])
            begun, size = [], 0
        begun.append(rest)
        size += len(rest)
        if size > MOST_LINE_BYTES:
            yield b"".join(begun)
            begun, size = [], 0
        if len(block) < BLOCK_BYTES:
            yield None
    if size:
        yield b"".join(begun)


def argument_text(text: str) -> str:
    """Returns a text of the command line.

    Raises:
      UserError: If the bytes given were not UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"the argument {text!a:.60} is not in the terminal's encoding, UTF-8."
        ) from error
    return text


def typed(given: Sequence[str], path: Path | None) -> bool:
    """Says whether `texts_of` reads what a person types, who waits for each answer."""
    return not given and path is None and sys.stdin is not None and sys.stdin.isatty()


def chunks(texts: Iterable[str | None], most: int = CHUNK_TEXTS) -> Iterator[list[str]]:
    """Yields the texts in lists of a bounded size, `most` texts in each at the most.

    A list ends where `texts_of` is going to wait.
    """
    chunk, size = [], 0
    for text in texts:
        if text is not None:
            chunk.append(text)
            size += len(text)
        if chunk and (text is None or len(chunk) == most or size > CHUNK_CHARACTERS):
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
