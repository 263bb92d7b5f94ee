"""What all commands share of a terminal: exit codes, the screen, and what is said."""

import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

FAILED, USAGE, INTERRUPTED, UNREAD = 1, 2, 130, 141


class Screen(Console):
    """A console without rich's own ideas: no highlighting, wrapping or exit codes."""

    def __init__(self, *, stderr: bool = False):
        super().__init__(stderr=stderr, highlight=False, soft_wrap=True)

    def on_broken_pipe(self) -> None:
        """Leaves the error to `main`."""
        raise  # rich calls this while it handles the BrokenPipeError


def near(folder: Path) -> Path:
    """Returns the folder as seen from here, where it is below."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def program() -> str:
    """Returns how this command was called, so that what is printed can be pasted."""
    called = sys.argv[0]
    if Path(called).parts[-2:] == ("flax_lstm", "__main__.py"):
        return f"{shlex.quote(sys.executable)} -m flax_lstm"
    found = shutil.which("flax-lstm")
    if found and Path(called).exists() and Path(found).samefile(called):
        return "flax-lstm"
    is_ours = Path(called).name == "flax-lstm"
    return shlex.quote(called) if is_ours else "flax-lstm"


def say(message: str) -> None:
    """Prints a message of the program itself on the standard error."""
    print(f"flax-lstm: {message}", file=sys.stderr)


def without_echoes(report: Callable[[Any], None]) -> Callable[[Any], None]:
    """Returns a `sys.unraisablehook` that is silent on what was said already.

    Where one of Orbax's writes fails, as on a full disk, it raises that and closes the
    event loop of the others, each of which then says so from a thread of its own.

    Args:
      report: Is told of all else.
    """

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        closed = isinstance(error, RuntimeError)
        if not (closed and str(error) == "Event loop is closed"):
            report(unraisable)

    return hook
