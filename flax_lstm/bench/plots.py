"""SVG plots of a run: times of each shape as bars, and the roofline.

matplotlib is imported where it is used: `pip install 'flax-lstm[plot]'`.
"""

# Imports what need not be installed.
# pyright: reportMissingImports=false

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax_lstm.bench.results import Results, Row
from flax_lstm.bench.tables import label

COLORS = {"ours": "#0b7a4b", "torch": "#e4572e", "jax": "#4c6ea8"}
STANDING = {
    "ours": "flax-lstm, default",
    "torch": "torch, fastest",
    "jax": "other JAX libraries, fastest",
}
MARKS = {"ours": "o", "torch": "s", "jax": "^"}
LOG_RATIO = 8
"""Times further apart than this are shown on a logarithmic axis."""


def missing() -> str | None:
    """Says what to install for plots, or None."""
    if importlib.util.find_spec("matplotlib") is None:
        return "plots need matplotlib: pip install 'flax-lstm[plot]'"
    return None


def save_plots(results: Results, folder: Path) -> list[Path]:
    """Draws every shape and each dtype's roofline; returns the files."""
    rows = [row for row in results.rows if row["status"] == "timed"]
    paths = []
    for shape, dtype in dict.fromkeys((row["shape"], row["dtype"]) for row in rows):
        those = [r for r in rows if (r["shape"], r["dtype"]) == (shape, dtype)]
        paths.append(folder / f"{shape}-{dtype}.svg")
        _save(bars(those), paths[-1])
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        those = [r for r in rows if r["dtype"] == dtype and "intensity" in r]
        if those and dtype in results.limits.get("gflop_per_s", {}):
            paths.append(folder / f"roofline-{dtype}.svg")
            _save(roofline(those, results.limits, dtype), paths[-1])
    return paths


def figure(width: float, height: float) -> Any:
    """Returns a figure that needs no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def ordered(rows: Sequence[Row]) -> list[Row]:
    """Returns ours first, the default before all; the others by time."""
    return sorted(
        rows,
        key=lambda row: (
            row["implementation"] != "ours",
            row["family"] != "ours",
            row["median_ms"],
        ),
    )


def bars(rows: Sequence[Row]) -> Any:
    """Returns one shape's times: a panel for each mode, a bar for each row.

    Bars are medians, the lines on them reach from quartile to quartile.
    """
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    most = max(sum(row["mode"] == mode for row in rows) for mode in modes)
    drawn = figure(1 + 5.2 * len(modes), 1.6 + 0.3 * most)
    first = rows[0]
    sizes = "B{batch} T{steps} I{inputs} H{hidden}".format(**first)
    drawn.suptitle(
        f"{first['shape']} ({sizes}, {first['tokens']:,} valid steps), "
        f"{first['dtype']}\n{first['device']}, {first['processor']}, "
        f"{first['threads']} threads",
        fontsize=10,
    )
    panels = drawn.subplots(1, len(modes), squeeze=False)[0]
    for axes, mode in zip(panels, modes, strict=True):
        _panel(axes, mode, ordered([row for row in rows if row["mode"] == mode]))
    return drawn


def _panel(axes: Any, mode: str, rows: Sequence[Row]) -> None:
    """Draws one mode's bars; what was not the same work is hatched and named."""
    medians = [row["median_ms"] for row in rows]
    spread = [
        [row["median_ms"] - row["q25_ms"] for row in rows],
        [row["q75_ms"] - row["median_ms"] for row in rows],
    ]
    places = range(len(rows))
    drawn = axes.barh(
        places,
        medians,
        xerr=spread,
        color=[COLORS[row["family"]] for row in rows],
        error_kw={"ecolor": "#222222", "elinewidth": 1.2, "capsize": 2.5},
    )
    for bar, row in zip(drawn, rows, strict=True):
        if label(row) != row["implementation"]:
            bar.set(hatch="///", edgecolor="white", linewidth=0)
    axes.set_yticks(places, [label(row) for row in rows], fontsize=8)
    axes.invert_yaxis()
    far = max(medians) > LOG_RATIO * min(medians)
    if far:
        axes.set_xscale("log")
        axes.set_xlim(min(medians) / 2, max(row["q75_ms"] for row in rows) * 4)
    else:
        axes.set_xlim(0, max(row["q75_ms"] for row in rows) * 1.25)
    for place, row in zip(places, rows, strict=True):
        text = f"{row['median_ms']:.3g}"
        axes.annotate(
            text,
            (row["q75_ms"], place),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
        )
    axes.set_xlabel(f"ms a call{', log scale' if far else ''}", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title(mode, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def roofline(rows: Sequence[Row], limits: dict[str, Any], dtype: str) -> Any:
    """Returns what was reached over the intensity, below what the machine allows.

    A panel for each mode. The default of ours and the fastest of the others stand out;
    every other row is a pale dot. The short line over a case is its own limit, which is
    above the roof where the working set lies in a cache.
    """
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    drawn = figure(1 + 5.5 * len(modes), 5.6)
    drawn.suptitle(
        f"Roofline, {dtype}: {rows[0]['device']}, {rows[0]['processor']}, "
        f"{rows[0]['threads']} threads",
        fontsize=10,
    )
    panels = drawn.subplots(1, len(modes), squeeze=False)[0]
    for axes, mode in zip(panels, modes, strict=True):
        those = [row for row in rows if row["mode"] == mode]
        _roof(axes, those, limits, dtype)
        axes.set_title(mode, fontsize=9)
    panels[0].set_ylabel("useful GFLOP/s", fontsize=8)
    return drawn


def _roof(axes: Any, rows: Sequence[Row], limits: dict[str, Any], dtype: str) -> None:
    """Draws one mode's panel."""
    peak = limits["gflop_per_s"][dtype]["rate"]
    rates = {int(size): found["rate"] for size, found in limits["gb_per_s"].items()}
    memory = rates[max(rates)]
    low = min(*(row["intensity"] for row in rows), peak / memory) / 2
    high = max(*(row["intensity"] for row in rows), peak / memory) * 3
    axes.plot([low, peak / memory, high], [low * memory, peak, peak], color="#222222")
    bottom = min(row["gflop_per_s"] for row in rows) / 3
    top = max(peak, *(max(r["gflop_per_s"], r["limit_gflop_per_s"]) for r in rows))
    ceiling = top * (top / bottom) ** 0.6  # room for the names
    shapes = {row["shape"]: row for row in rows}
    names = sorted(shapes, key=lambda name: shapes[name]["intensity"])
    for row in rows:
        axes.plot(row["intensity"], row["gflop_per_s"], ".", color="#c8c8c8", zorder=2)
    for family, one in COLORS.items():
        found = [row for row in _standing(rows, names) if row["family"] == family]
        axes.plot(
            [row["intensity"] for row in found],
            [row["gflop_per_s"] for row in found],
            MARKS[family],
            color=one,
            alpha=0.85,
            zorder=3,
            label=STANDING[family],
        )
    width = math.log(high / low)
    places = [math.log(shapes[name]["intensity"] / low) / width for name in names]
    places = spread(places, 0.04)
    for name, place in zip(names, places, strict=True):
        row, x = shapes[name], low * (high / low) ** place
        axes.plot(row["intensity"], row["limit_gflop_per_s"], "_", color="#222222")
        axes.annotate(
            name,
            (row["intensity"], row["limit_gflop_per_s"]),
            (x, top * 2),
            rotation=90,
            fontsize=7,
            ha="center",
            va="bottom",
            arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.6},
        )
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom, ceiling))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.6g}")
        axis.set_minor_formatter(lambda value, _: "")
    axes.set_xlabel(
        f"useful flops for each byte (memory {memory:,.0f} GB/s, "
        f"products {peak:,.0f} GFLOP/s)",
        fontsize=8,
    )
    axes.tick_params(labelsize=8)
    axes.grid(which="major", color="#e8e8e8")
    axes.set_axisbelow(True)
    axes.legend(fontsize=7.5, loc="lower right")


def spread(places: Sequence[float], least: float) -> list[float]:
    """Moves rising places apart until they are `least` from each other.

    >>> spread([1.0, 1.0, 5.0], 1.0)
    [0.5, 1.5, 5.0]
    """
    groups: list[list[float]] = []  # runs of neighbours, as [middle, count]
    for place in places:
        groups.append([place, 1])
        while len(groups) > 1:
            (left, n), (right, m) = groups[-2:]
            if right - left >= least * (n + m) / 2:
                break
            groups[-2:] = [[(left * n + right * m) / (n + m), n + m]]
    return [
        middle + least * (k - (count - 1) / 2)
        for middle, count in groups
        for k in range(int(count))
    ]


def _standing(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """Returns, for each shape, our default and each other family's fastest."""
    found = [row for row in rows if row["implementation"] == "ours"]
    for family in ("torch", "jax"):
        for name in names:
            those = [r for r in rows if (r["family"], r["shape"]) == (family, name)]
            found += sorted(those, key=lambda row: row["median_ms"])[:1]
    return found


def _save(drawn: Any, path: Path) -> None:
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "flax-lstm", "svg.fonttype": "none"}):
        drawn.savefig(path, metadata={"Date": None})
