"""Processes that are threads: each is told that it is one of several.

What they tell each other goes through memory, not through JAX; tests/faults
has real processes.
"""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from flax_lstm import distributed

LIMIT_S = 60
"""Time that one waits for the others."""


class Group:
    """So many processes, and the memory between them."""

    def __init__(self, count: int):
        self.count = count
        self._here = threading.local()
        self._said: list[Any] = [None] * count
        self._barrier = threading.Barrier(count, timeout=LIMIT_S)

    def place(self) -> tuple[int, int]:
        return self._here.process, self.count

    def gather(self, value: Any) -> list[Any]:
        self._barrier.wait()  # all have taken what was said before
        self._said[self._here.process] = value
        self._barrier.wait()
        return list(self._said)

    def exchange(self, given: list[Any]) -> list[Any]:
        return [of[self._here.process] for of in self.gather(list(given))]

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """Runs work(k) in process k; returns what each gives, an error among it."""
        results: list[Any] = [None] * self.count

        def one(process: int) -> None:
            self._here.process = process
            try:
                results[process] = work(process)
            except Exception as error:  # whatever it is, the test looks at it
                results[process] = error

        threads = [threading.Thread(target=one, args=(k,)) for k in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def processes(monkeypatch: pytest.MonkeyPatch, count: int) -> Group:
    """Makes `distributed` believe in so many processes."""
    group = Group(count)
    monkeypatch.setattr(distributed, "several", lambda: count > 1)
    monkeypatch.setattr(distributed, "place", group.place)
    monkeypatch.setattr(distributed, "gather_bytes", group.gather)
    monkeypatch.setattr(distributed, "exchange", group.exchange)
    return group
