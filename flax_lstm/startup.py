"""How long a run takes to its first step, and how much of that XLA compiles."""

import dataclasses
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path

import jax.monitoring

COMPILED = "/jax/core/compile/backend_compile_duration"
"""JAX's event of a program made ready: compiled, or read from the cache on disk."""


@functools.cache
def compile_clock() -> Callable[[], float]:
    """Returns a function that tells the seconds of compiling since this first call."""
    total = [0.0]

    def listen(event: str, duration_secs: float, **_: object) -> None:
        if event == COMPILED:
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
      clock: Tells the time in seconds.
      compiled: Tells the seconds of compiling until now.
    """

    began: float
    seconds: float | None = None
    compile_seconds: float | None = None
    clock: Callable[[], float] = time.perf_counter
    compiled: Callable[[], float] = dataclasses.field(default_factory=compile_clock)

    def __post_init__(self):
        self._compiled_before = self.compiled()

    def first_step(self) -> None:
        """Notes that a step has been handed over; only the first one counts."""
        if self.seconds is None:
            self.seconds = self.clock() - self.began
            self.compile_seconds = self.compiled() - self._compiled_before
