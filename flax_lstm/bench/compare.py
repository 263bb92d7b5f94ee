"""Two runs side by side: what became faster or slower, where that can be told."""

import dataclasses
from collections.abc import Sequence

from flax_lstm.bench.results import Row

SAME = ("batch", "steps", "inputs", "hidden", "tokens", "lengths", "resets")
"""What the work is; a difference here makes two times two different questions."""
SAME_MACHINE = ("device", "processor", "threads")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One implementation at one shape, dtype and mode in two runs.

    Attributes:
      key: (implementation, shape, dtype, mode).
      ratio: Median before over median after, above 1 where it became faster; None where
        the rows were refused.
      verdict: "faster" or "slower" where the quartiles part, "no difference seen" where
        they overlap, "refused".
      reason: Why it was refused.
    """

    key: tuple[str, str, str, str]
    ratio: float | None
    verdict: str
    reason: str = ""


def compare(before: Sequence[Row], after: Sequence[Row]) -> list[Comparison]:
    """Compares the rows of two runs that have the same key, in the order of `after`."""
    old = {key_of(row): row for row in before}
    new = {key_of(row): row for row in after}
    found = [
        Comparison(key, None, "refused", "only in the second run")
        if key not in old
        else compare_rows(old[key], row)
        for key, row in new.items()
    ]
    gone = [key for key in old if key not in new]
    return found + [
        Comparison(key, None, "refused", "only in the first run") for key in gone
    ]


def compare_rows(before: Row, after: Row) -> Comparison:
    """Compares two rows of the same key."""
    key = key_of(after)
    for row, which in ((before, "first"), (after, "second")):
        if row["status"] != "timed":
            reason = f"{row['status']} in the {which} run"
            return Comparison(key, None, "refused", reason)
    differing = [
        f"{name} {before.get(name)} and {after.get(name)}"
        for name in (*SAME, *SAME_MACHINE)
        if before.get(name) != after.get(name)
    ]
    if differing:
        reason = f"not the same work: {', '.join(differing)}"
        return Comparison(key, None, "refused", reason)
    verdict = "no difference seen"
    if after["q75_ms"] < before["q25_ms"]:
        verdict = "faster"
    elif after["q25_ms"] > before["q75_ms"]:
        verdict = "slower"
    return Comparison(key, before["median_ms"] / after["median_ms"], verdict)


def key_of(row: Row) -> tuple[str, str, str, str]:
    """Returns what identifies a row within a run."""
    return row["implementation"], row["shape"], row["dtype"], row["mode"]
