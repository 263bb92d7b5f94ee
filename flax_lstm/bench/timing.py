"""Times callables in alternating rounds within one process.

Each round gives every callable one turn, in an order drawn anew, so that a busy moment
of the machine meets all of them alike and none always comes after the same one. A turn
is one call, or as many as take two milliseconds. Before it comes a pause: threads that
spin while they wait for more work (those of OpenMP do, for milliseconds) would slow
down those of the next one. Garbage is collected between rounds only.
"""

import gc
import random
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

SAMPLE_S = 2e-3
"""A turn takes at least about this long; a clock reads in tens of nanoseconds."""
MOST_ROUNDS = 200


class Samples(NamedTuple):
    """Seconds of one call, as measured in each round.

    Attributes:
      seconds: One value for each round: the turn's time over its calls.
      calls: Calls of a turn.
    """

    seconds: tuple[float, ...]
    calls: int

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """The first quartile, the median and the third, in seconds."""
        low, middle, high = np.percentile(self.seconds, [25, 50, 75])
        return float(low), float(middle), float(high)


def alternate(
    cases: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 5,
    budget_s: float = 10.0,
    pause_s: float = 0.02,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Samples]:
    """Times every case, each of which returns only when its work is done.

    Args:
      cases: Callables by name; compiled, their arguments in place.
      rounds: Rounds at the least.
      budget_s: Seconds within which further rounds are started.
      pause_s: Seconds before each turn.
      clock: Seconds, as `time.perf_counter`.
      sleep: As `time.sleep`.

    Returns:
      The samples of each case, all of the same number of rounds.

    Raises:
      ValueError: If `rounds` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1; got {rounds}.")

    def turn(call: Callable[[], Any], calls: int) -> float:
        start = clock()
        for _ in range(calls):
            call()
        return (clock() - start) / calls

    calls = {}
    for name, call in cases.items():
        turn(call, 1)
        calls[name] = max(1, round(SAMPLE_S / max(turn(call, 1), 1e-7)))
    names = list(cases)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.freeze()  # what is there already need not be looked at in every round
    start, done = clock(), 0
    try:
        while done < rounds or (done < MOST_ROUNDS and clock() - start < budget_s):
            gc.enable()
            gc.collect()
            gc.disable()
            for name in random.Random(done).sample(names, len(names)):
                sleep(pause_s)
                seconds[name].append(turn(cases[name], calls[name]))
            done += 1
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()
        else:
            gc.disable()
    return {name: Samples(tuple(seconds[name]), calls[name]) for name in names}
