"""The settings of the benchmark suite, light enough for the command line to import."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """Times LSTM implementations side by side, and compares with the machine's limit.

    Implementations that are not installed are listed with the reason. Tables go to the
    standard output; results.json, results.csv and plots to the folder --out.
    """

    shapes: tuple[str, ...] = ()
    """Names of shapes; all when not given. --catalogue shows them."""
    implementations: tuple[str, ...] = ()
    """Names of implementations; all when not given. --catalogue shows them."""
    modes: tuple[str, ...] = ()
    """forward, gradient, step; each shape's own when not given."""
    dtypes: tuple[str, ...] = ("float32",)
    """float32, bfloat16, float16."""
    rounds: int = 5
    """Rounds at the least: in each, every implementation has its turn."""
    budget_s: float = 10.0
    """Seconds in which a shape goes on with more rounds, in each mode and dtype."""
    pause_s: float = 0.02
    """Idle seconds before each turn, in which the threads of the one before stop
    spinning."""
    seed: int = 0
    """Draws weights, inputs, lengths and resets."""
    out: Path | None = None
    """Folder of the results; benchmarks/1, 2, ... when not given."""
    smoke: bool = False
    """Tiny shapes, few rounds, few implementations: does it work here?"""
    system_malloc: bool = False
    """Leave freed memory to the system, which takes it back and hands it out anew in
    every call. Else it stays with the process, for all implementations, as in
    training."""
    catalogue: bool = False
    """Lists shapes and implementations, the missing ones with the reason, and stops."""
    compare: tuple[Path, Path] | None = None
    """Two results.json, before and after: says what became faster or slower, and
    stops."""
    debug: bool = False
    """Show where an error came from."""
