"""Wrong usage, told as every other error is: in one line, and before any work."""

import contextlib
import io
import itertools
import re
import sys
from collections.abc import Iterator, Sequence

from flax_lstm.config import UserError

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@contextlib.contextmanager
def one_line(argv: Sequence[str] = ()) -> Iterator[None]:
    """Turns the box in which tyro says what is wrong into the text of a UserError.

    Args:
      argv: The arguments that tyro is given.

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
        raise UserError(pointed(flat(said.getvalue()), argv)) from None
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
        if text and set(text) <= {"─", "-"}:
            parts.append([])
        elif text and text[0] not in "╭╰":
            parts[-1].append(text)
    if "╭" not in box:  # drawn in ASCII, where the title stands above the first rule
        parts = parts[1:] or parts
    return ". ".join(" ".join(part).removesuffix(".") for part in parts if part)


def pointed(message: str, argv: Sequence[str]) -> str:
    """Points a message of tyro to the command's own help, and says what was meant.

    A bare file is data; what begins with one dash, or holds a space, is a text.

    >>> pointed("Unrecognized options: a.csv. Run flax-lstm --help", ["train", "a.csv"])
    'Unrecognized options: a.csv (data are given by --data a.csv). Run flax-lstm train \
--help'
    """
    command = argv[0] if argv else ""
    if not command.isalpha() or "subcommands" in message:
        return message
    message = message.replace("flax-lstm --help", f"flax-lstm {command} --help")
    if command == "train":
        bare = r"(Unrecognized options: ([^-,\s][^,\s]*))(?=\. )"
        message = re.sub(bare, r"\1 (data are given by --data \2)", message)
    texts = [word for word in argv if re.match(r"-[^-]|-.* ", word)]
    if command in ("predict", "trace") and texts and "Unrecognized" in message:
        message += f"; put -- before texts that begin with a dash, as {texts[0]!r}"
    return message


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


def check_out(argv: Sequence[str]) -> None:
    """Raises UserError where --out is empty, as by a variable that is not set.

    As a path it would be the folder that one is in.
    """
    words = list(itertools.takewhile(lambda word: word != "--", argv))
    if "--out=" in words or ("--out", "") in itertools.pairwise(words):
        raise UserError("--out is empty; give the folder of the run.")
