"""What was asked of the kernels on an H100, what `h100.py` saw, and its plots."""

import csv
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Target:
    """How many times faster than a peer ours must be.

    Attributes:
      part: The race that shows it.
      shape: Name of a shape of `race_shapes`.
      mode: "forward" or "gradient".
      peer: "cudnn" for the fastest of torch's and JAX's, "flax" for Flax's scan.
      ratio: The peer's time over ours.
    """

    part: str
    shape: str
    mode: str
    peer: str
    ratio: float


def targets() -> Iterator[Target]:
    """Yields what was asked of the kernels before any of them had run."""
    for mode in ("forward", "gradient"):
        for shape in ("tutorial-244-1", "tutorial-244-2"):
            yield Target("race-bfloat16", shape, mode, "cudnn", 2.0)
            yield Target("race-bfloat16", shape, mode, "flax", 10.0)
        for part in ("race-bfloat16", "race-float32"):
            yield Target(part, "batch-512", mode, "cudnn", 2.0)
            yield Target(part, "stream-16", mode, "cudnn", 2.0)
        yield Target("race-bfloat16", "batch-1024", mode, "cudnn", 1.3)
    yield Target("race-bfloat16", "row-1024", "forward", "cudnn", 2.0)


PEERS = {
    "cudnn": ("torch", "torch-packed", "jax-cudnn"),
    "flax": ("linen-optimized", "linen-plain", "nnx-optimized", "nnx-plain"),
}


def judge_targets(out: Path) -> list[dict[str, Any]]:
    """Returns a row for each target: the times, the ratio, and whether it holds."""
    rows = []
    for target in targets():
        times = read_times(out / target.part, target.shape, target.mode)
        ours = times.get("ours-pallas")
        others = {n: times[n] for n in PEERS[target.peer] if n in times}
        fastest = min(others, key=others.__getitem__, default=None)
        ratio = others[fastest] / ours if ours and fastest else None
        rows.append(
            {
                "dtype": target.part.removeprefix("race-"),
                "shape": target.shape,
                "mode": target.mode,
                "against": fastest or target.peer,
                "ours_ms": ours,
                "theirs_ms": others.get(fastest) if fastest else None,
                "asked": target.ratio,
                "seen": ratio,
                "met": None if ratio is None else ratio >= target.ratio,
            }
        )
    return rows


def read_times(folder: Path, shape: str, mode: str) -> dict[str, float]:
    """Returns medians in milliseconds by implementation, of what was timed."""
    path = folder / "results.csv"
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {
            row["implementation"]: float(row["median_ms"])
            for row in csv.DictReader(file)
            if (row["shape"], row["mode"], row["status"]) == (shape, mode, "timed")
        }


def tell_targets(out: Path) -> None:
    """Writes and prints what was asked and what was seen."""
    rows = judge_targets(out)
    write_csv(out / "targets.csv", rows)
    print("\n== targets")
    for row in rows:
        seen = "not seen" if row["seen"] is None else f"{row['seen']:.2f}"
        print(
            f"{row['dtype']} {row['shape']} {row['mode']} against {row['against']}: "
            f"asked {row['asked']:g}, {seen}"
        )


def plot_races(out: Path) -> list[Path]:
    """Draws every race that is on disk; returns the files."""
    from flax_lstm.bench import plots
    from flax_lstm.bench.results import Results

    if reason := plots.missing():
        raise SystemExit(reason)
    drawn = []
    for results in sorted(out.glob("race-*/results.json")):
        drawn += plots.save_plots(Results.load(results), results.parent / "plots")
    return drawn


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
