"""Rows of results, on disk as JSON and CSV.

A row is one implementation at one shape, dtype and mode. `COLUMNS` says what each of
its fields means; the README numbers them in this order.
"""

import csv
import dataclasses
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax_lstm.bench.limits import Limits
from flax_lstm.bench.timing import Samples
from flax_lstm.bench.work import Work
from flax_lstm.config import UserError

FORMAT = 1
"""Of results.json; raised when a field changes its meaning."""
COLUMNS = {
    "implementation": "what ran; `flax-lstm bench --catalogue` explains the names",
    "family": "ours, jax or torch",
    "shape": "name of the shape",
    "mode": "forward, gradient (forward and backward) or step (one step)",
    "dtype": "dtype of weights, inputs, states and outputs",
    "batch": "B, rows",
    "steps": "T, padded time",
    "inputs": "I, input size",
    "hidden": "H, units",
    "tokens": "valid steps of all rows",
    "lengths": "yes: heeded; padded: every step computed; -: all rows are of length T",
    "resets": "yes: heeded; ignored: ran without them; -: the shape has none",
    "status": "timed; wrong: other numbers than ours; unable; missing; failed",
    "reason": "why it was not timed, or what a reader must know",
    "error": "largest error of an output or a gradient, relative to its norm",
    "q25_ms": "first quartile of the time of a call over the rounds, milliseconds",
    "median_ms": "median",
    "q75_ms": "third quartile",
    "rounds": "rounds, each with one turn of every implementation",
    "calls": "calls in a turn",
    "compile_s": "tracing and compiling, seconds; empty where nothing is compiled",
    "tokens_per_s": "valid steps a second",
    "gflop_per_s": "useful flops a second: the products of the valid steps",
    "gb_per_s": "least bytes that must move, a second",
    "intensity": "useful flops for each of these bytes",
    "limit_gflop_per_s": "what the machine allows at this intensity (roofline)",
    "limit_percent": "gflop_per_s of limit_gflop_per_s",
    "packages": "the library's own version",
    "device": "backend and device of JAX",
    "processor": "processor and CPUs that may be used",
    "threads": "threads that XLA, and torch, compute with on the CPU",
    "python": "version",
    "jax": "version",
    "jaxlib": "version",
    "flax": "version",
    "commit": "of this package; empty where there is no git",
    "dirty": "whether the tree differed from the commit",
    "date": "start of the run",
}
Row = dict[str, Any]


def timed(
    row: Row,
    samples: Samples,
    work: Work | None = None,
) -> Row:
    """Returns `row` with what was measured, and rates where the work is known.

    Args:
      row: Names, sizes and provenance, under any of the names of `COLUMNS`.
      samples: The times.
      work: What a call had to do.
    """
    low, median, high = samples.quartiles
    row = row | {
        "status": "timed",
        "q25_ms": 1e3 * low,
        "median_ms": 1e3 * median,
        "q75_ms": 1e3 * high,
        "rounds": len(samples.seconds),
        "calls": samples.calls,
        "samples_ms": [1e3 * seconds for seconds in samples.seconds],
    }
    if work is not None:
        row |= {
            "tokens": work.tokens,
            "tokens_per_s": work.tokens / median,
            "gflop_per_s": work.flops / median / 1e9,
            "gb_per_s": work.bytes / median / 1e9,
            "intensity": work.intensity,
        }
    return row


def limited(row: Row, limits: Limits) -> Row:
    """Returns `row`, if its rates are known, with what the machine allows."""
    if "intensity" not in row:
        return row
    seconds = row["median_ms"] / 1e3
    moved = row["gb_per_s"] * 1e9 * seconds
    flops = row["gflop_per_s"] * 1e9 * seconds
    allowed = limits.attainable(Work(row["tokens"], flops, moved), row["dtype"])
    return row | {
        "limit_gflop_per_s": allowed / 1e9,
        "limit_percent": 100 * row["gflop_per_s"] * 1e9 / allowed,
    }


@dataclasses.dataclass(frozen=True)
class Results:
    """One run.

    Attributes:
      rows: See `COLUMNS`; JSON has `samples_ms`, every round's time, besides.
      limits: `Limits.to_dict`.
      surroundings: What else may have changed the numbers.
      summary: See `summary_lines`.
    """

    rows: Sequence[Row]
    limits: dict[str, Any]
    surroundings: dict[str, Any]
    summary: Sequence[str] = ()

    def save(self, folder: Path) -> None:
        """Writes results.json and results.csv, each whole or as it was before.

        Raises:
          UserError: If the folder cannot be written.
        """
        content = {"format": FORMAT} | dataclasses.asdict(self)
        text = json.dumps(content, indent=1, allow_nan=False, default=str)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _replace(folder / "results.json", text + "\n")
            write_csv(folder / "results.csv", self.rows)
        except OSError as error:
            raise UserError(
                f"cannot write the results to {folder}: {error.strerror}; give a "
                "folder that can be written (--out)."
            ) from error

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Reads results.json.

        Raises:
          UserError: If the file is missing or is no such file.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            return cls(**content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"cannot read {path}: {error}. Expected the results.json that "
                "`flax-lstm bench` wrote."
            ) from error


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Writes the columns of every row; figures to six digits."""
    beside = path.with_name(path.name + ".part")
    with beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
            )
    os.replace(beside, path)


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def summary_lines(rows: Sequence[Row]) -> list[str]:
    """Says for each mode and dtype how much slower the others' fastest is than ours.

    Ours is the one that a user gets by default. Geometric mean and minimum are over the
    shapes where both were timed; where rows have resets, only those who heed them
    compete.
    """
    lines = []
    groups = sorted({(row["mode"], row["dtype"]) for row in rows})
    for mode, dtype in groups:
        for family, name in (("torch", "torch"), ("jax", "JAX peer")):
            ratios = speed_ratios(rows, mode, dtype, family)
            if not ratios:
                continue
            worst = min(ratios, key=ratios.__getitem__)
            shapes = f"{len(ratios)} shape{'s' * (len(ratios) > 1)}"
            lines.append(
                f"{mode}, {dtype}: time of the fastest {name} / ours: geometric mean "
                f"{statistics.geometric_mean(ratios.values()):.2f}, "
                f"minimum {ratios[worst]:.2f} "
                f"({worst}), over {shapes}"
            )
    return lines


def speed_ratios(
    rows: Sequence[Row], mode: str, dtype: str, family: str
) -> dict[str, float]:
    """Returns, by shape, the fastest median of a family over our default's."""
    ours: dict[str, float] = {}
    others: dict[str, float] = {}
    for row in rows:
        same = (row["mode"], row["dtype"], row["status"]) == (mode, dtype, "timed")
        if not same or row["resets"] == "ignored":
            continue
        shape, median = row["shape"], row["median_ms"]
        if row["implementation"] == "ours":
            ours[shape] = median
        elif row["family"] == family:
            others[shape] = min(median, others.get(shape, median))
    return {shape: others[shape] / ours[shape] for shape in others if shape in ours}
