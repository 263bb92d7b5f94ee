"""How a run is asked to stop: it saves at its next step, and ends.

A request is a flag where there is something to save, and an exception elsewhere: in
`train` before the first step and after the last, nothing is lost by leaving at once.
Who asks (a signal, another thread, a scheduler's client) is not known here.
"""

import contextlib
from collections.abc import Iterator


class Stopped(BaseException):
    """A run was asked to stop; no `Exception`, so that nothing takes it for an error.

    Args:
      reason: What asked, as it was given to `Stop.ask`.
      message: How far the run is, and what of it is saved.
    """

    def __init__(self, reason: int, message: str = ""):
        super().__init__(message or "stopped before anything was to be saved")
        self.reason = reason


class Stop:
    """A request to stop, which somebody makes and a run looks at.

    >>> stop = Stop()
    >>> with stop.deferred():
    ...     stop.ask(15)
    ...     stop.reason
    15
    """

    def __init__(self) -> None:
        self.reason: int | None = None
        self._deferred = False

    def ask(self, reason: int) -> None:
        """Asks the run to stop.

        To be called in the thread of the run, as Python's signal handlers are; in any
        other thread while it trains.

        Args:
          reason: Given back by `Stopped`; the command line gives a signal's number.

        Raises:
          Stopped: If the run has nothing to save.
        """
        self.reason = reason
        self.check()

    def check(self) -> None:
        """Raises Stopped if it was asked for and is not deferred."""
        if self.reason is not None and not self._deferred:
            raise Stopped(self.reason)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Lets requests wait for the code inside, which looks at `reason` itself."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
