"""Signals that end a command: the first asks, the second ends it at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from flax_lstm.stopping import Stop

ENDING = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP")
    if hasattr(signal, name)
)


@contextlib.contextmanager
def listening(stop: Stop) -> Iterator[None]:
    """Hands the first signal to `stop`; a second one ends the process at once.

    Python runs a handler between two of its own instructions, so not while XLA
    compiles. A thread is told of signals as they come, and sees to the second one; what
    is on disk stays as it is. Signals that are ignored (`nohup`) stay ignored.
    """
    before = {number: signal.getsignal(number) for number in ENDING}
    heard = {n: was for n, was in before.items() if was is not signal.SIG_IGN}
    reading, writing = os.pipe()
    os.set_blocking(writing, False)  # as `set_wakeup_fd` asks for

    def watch() -> None:
        count = 0
        while numbers := os.read(reading, 1):
            count += numbers[0] in heard
            if count == 2:
                os.write(2, b"flax-lstm: asked twice, and left at once.\n")
                os._exit(exit_code(numbers[0]))

    thread = threading.Thread(target=watch, name="signals", daemon=True)
    thread.start()
    woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in heard:
        signal.signal(number, lambda number, frame: stop.ask(number))
    try:
        yield
    finally:
        for number, was in heard.items():
            signal.signal(number, was)
        signal.set_wakeup_fd(woken)
        os.close(writing)
        thread.join()
        os.close(reading)


def exit_code(number: int) -> int:
    """Returns the exit code of a process that a signal ended, as shells tell it."""
    return 128 + number
