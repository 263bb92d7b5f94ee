"""How long a run takes to its first step, and what that time goes into."""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.monitoring

COMPILED = (
    "/jax/core/compile/backend_compile_duration",
    "/flax_lstm/compile_duration",
)
"""Events of a program made ready: by XLA, compiled or read from the cache on disk; and
of the kernel in C++ (`flax_lstm_kernels.cpu`), compiled at its first use."""


@functools.cache
def compile_clock() -> Callable[[], float]:
    """Returns a function that tells the seconds of compiling since this first call."""
    total = [0.0]

    def listen(event: str, duration_secs: float, **_: object) -> None:
        if event in COMPILED:
            total[0] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    return lambda: total[0]


def process_start() -> float:
    """Returns when this process started, on the clock of `time.perf_counter`.

    The time of the call where the system does not tell (`/proc` is Linux's).
    """
    now = time.perf_counter()
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        # The 22nd field of proc(5), in ticks since the machine started; the name of
        # the program, which may hold spaces, is the second.
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return now - (time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, AttributeError):
        return now


@dataclasses.dataclass
class Startup:
    """The time before the first step; ends when that is compiled and handed over.

    Attributes:
      began: When the command or the call started, by `clock`.
      seconds: From there to the first step; None before it.
      compile_seconds: What of it went into compiling; None before the first step.
      import_seconds: What went by until this was made: a command imports meanwhile.
      data_seconds: What `loading` took.
      clock: Tells the time in seconds.
      compiled: Tells the seconds of compiling until now.
    """

    began: float
    seconds: float | None = None
    compile_seconds: float | None = None
    import_seconds: float = 0.0
    data_seconds: float = 0.0
    clock: Callable[[], float] = time.perf_counter
    compiled: Callable[[], float] = dataclasses.field(default_factory=compile_clock)

    def __post_init__(self):
        self.import_seconds = self.clock() - self.began
        self._compiled_before = self.compiled()

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Takes the time of what reads the data."""
        before = self.clock()
        yield
        self.data_seconds += self.clock() - before

    def first_step(self) -> None:
        """Notes that a step has been handed over; only the first one counts."""
        if self.seconds is None:
            self.seconds = self.clock() - self.began
            self.compile_seconds = self.compiled() - self._compiled_before
