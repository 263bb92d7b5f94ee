"""Wrong usage, told as every other error is: in one line, and before any work."""

import contextlib
import io
import re
import sys
from collections.abc import Iterator, Sequence

from flax_lstm.config import UserError

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Turns the box in which tyro says what is wrong into the text of a UserError.

    Raises:
      UserError: Where tyro would end the program with an error.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(flat(said.getvalue())) from None
    else:
        print(said.getvalue(), file=sys.stderr, end="")


def flat(box: str) -> str:
    r"""Returns the text in a box, its parts after each other in one line.

    >>> print(flat("╭─ Error ─╮\n│ no      │\n│ --x     │\n│ ─────── │\n"
    ...            "│ see -h  │\n╰─────────╯"))
    no --x. see -h
    """
    parts = [[]]
    for line in _COLOUR.sub("", box).splitlines():
        text = line.strip().strip("│").strip()
        if set(text) == {"─"}:
            parts.append([])
        elif text and text[0] not in "╭╰":
            parts[-1].append(text)
    return ". ".join(" ".join(part).removesuffix(".") for part in parts if part)


def check_given_once(argv: Sequence[str]) -> None:
    """Raises UserError where a flag is given twice: all but the last would be lost."""
    seen: dict[str, str] = {}
    for word in argv:
        if word == "--":  # texts follow
            return
        if not word.startswith("--"):
            continue
        flag = word.partition("=")[0].replace("_", "-")
        name = flag.removeprefix("--").removeprefix("no-")
        if seen.get(name) == flag:
            raise UserError(f"{flag} was given more than once; give it once.")
        if name in seen:
            raise UserError(f"{seen[name]} and {flag} contradict; give one of them.")
        seen[name] = flag
