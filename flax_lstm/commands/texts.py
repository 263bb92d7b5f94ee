"""Texts from the arguments, a file, or the standard input."""

import codecs
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from flax_lstm.commands.terminal import say
from flax_lstm.config import UserError


def texts_of(given: Sequence[str], path: Path | None) -> Iterator[str]:
    """Yields the texts given, or those of the file, or of the standard input."""
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
    else:
        if sys.stdin.isatty():
            say("reading texts, one on each line; Ctrl-D ends.")
        yield from lines(sys.stdin.buffer, "the standard input")


def lines(file: IO[bytes], name: str) -> Iterator[str]:
    r"""Yields the lines of a UTF-8 file without their ends (`\n` or `\r\n`).

    Raises:
      UserError: If there is no line, or one holds a NUL byte or is not UTF-8.
    """
    number = 0
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
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


def chunks(texts: Iterator[str], size: int) -> Iterator[list[str]]:
    """Yields lists of `size` texts and a last one with the rest."""
    while chunk := list(itertools.islice(texts, size)):
        yield chunk
