"""What a person reads on the screen, as renderables of rich; prints nothing."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from flax_lstm.bench.compare import Comparison
from flax_lstm.bench.limits import Limits
from flax_lstm.bench.peers.base import Implementation
from flax_lstm.bench.results import Row
from flax_lstm.bench.shapes import Shape

STYLES = {"ours": "bold green", "faster": "green", "slower": "red"}
WIDE = 124
"""Columns of a screen on which a table of rows has all it can show."""


def table(title: str, *columns: str) -> Table:
    """Returns a table whose columns align right where their name begins with >."""
    made = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for column in columns:
        justify = "right" if column.startswith(">") else "left"
        made.add_column(column.removeprefix(">"), justify=justify)
    return made


def rows_table(title: str, rows: Sequence[Row], width: int) -> Table:
    """Returns one shape's rows that were timed, by time.

    Args:
      title: Stands above.
      rows: Rows of one shape, mode and dtype.
      width: Columns of the screen; on less than `WIDE`, some of the table's are left
        to results.csv.
    """
    timed = [row for row in rows if row["status"] == "timed"]
    ours = next((r for r in timed if r["implementation"] == "ours"), None)
    base = ours["median_ms"] if ours else None
    shown = {
        ">median ms": lambda row: figure(row["median_ms"]),
        ">quartiles": lambda row: f"{figure(row['q25_ms'])} {figure(row['q75_ms'])}",
        ">tokens/s": lambda row: figure(row.get("tokens_per_s")),
        ">GFLOP/s": lambda row: figure(row.get("gflop_per_s")),
        ">GB/s": lambda row: figure(row.get("gb_per_s")),
        ">% of limit": lambda row: figure(row.get("limit_percent")),
        ">error": lambda row: f"{row['error']:.0e}" if "error" in row else "",
        ">compile s": lambda row: figure(row.get("compile_s")),
        ">time / ours": lambda row: figure(row["median_ms"] / base) if base else "",
    }
    if width < WIDE:
        for name in (">GB/s", ">error", ">compile s"):
            del shown[name]
    made = table(title, "implementation", *shown)
    made.columns[0].no_wrap = True
    for row in sorted(timed, key=lambda row: row["median_ms"]):
        cells = [cell(row) for cell in shown.values()]
        made.add_row(label(row), *cells, style=STYLES.get(row["family"]))
    return made


def label(row: Row) -> str:
    """Returns a row's name, with what it did not do.

    >>> label({"implementation": "torch", "lengths": "padded", "resets": "-"})
    'torch (padded)'
    """
    left_out = {"padded": "padded", "ignored": "no resets"}
    said = [left_out.get(row.get(name, "-")) for name in ("lengths", "resets")]
    said = [words for words in said if words]
    return row["implementation"] + (f" ({', '.join(said)})" if said else "")


def untimed_lines(rows: Sequence[Row]) -> list[str]:
    """Says of each row that was not timed why."""
    return [
        f"{row['implementation']} {row['status']}: {row['reason']}"
        for row in rows
        if row["status"] not in ("timed", "missing")
    ]


def limits_lines(limits: Limits) -> list[str]:
    """Says what the machine can do."""
    lines = [
        f"Largest matrix-product rate, {dtype}: {rate / 1e9:,.1f} GFLOP/s ({by})"
        for dtype, (rate, by) in limits.flops_per_s.items()
    ]
    for size, (rate, by) in limits.bytes_per_s.items():
        lines.append(
            f"Largest memory rate, {size / 2**20:g} MiB: {rate / 1e9:,.1f} GB/s ({by})"
        )
    return lines


def catalogue_tables(
    shapes: Sequence[Shape], implementations: Sequence[Implementation]
) -> list[Table]:
    """Returns what there is to choose from."""
    first = table(
        "Shapes", "name", ">B", ">T", ">I", ">H", "lengths", "resets", "modes", "about"
    )
    for shape in shapes:
        first.add_row(
            shape.name,
            *(str(n) for n in (shape.batch, shape.steps, shape.inputs, shape.hidden)),
            shape.lengths or "-",
            f"{shape.reset:g}" if shape.reset else "-",
            " ".join(shape.modes),
            shape.about,
        )
    second = table("Implementations", "name", "what", "here")
    for one in implementations:
        # As plain text: rich would take [bench] for an instruction.
        second.add_row(one.name, one.about, Text(one.missing() or "yes"))
    return [first, second]


def comparison_table(found: Sequence[Comparison]) -> Table:
    """Returns a row for each comparison that was made."""
    made = table(
        "Median before / median after; a verdict where the quartiles part",
        "implementation",
        "shape",
        "dtype",
        "mode",
        ">ratio",
        "verdict",
    )
    for one in found:
        if one.ratio is not None:
            style = STYLES.get(one.verdict)
            made.add_row(*one.key, f"{one.ratio:.2f}", one.verdict, style=style)
    return made


def refused_lines(found: Sequence[Comparison]) -> list[str]:
    """Says which rows were not compared, and why."""
    return [
        f"{' '.join(one.key)}: refused, {one.reason}"
        for one in found
        if one.ratio is None
    ]


def figure(value: float | None) -> str:
    """Returns three digits, without an exponent.

    >>> figure(0.01234), figure(12.34), figure(1234.5), figure(None)
    ('0.0123', '12.3', '1,234', '')
    """
    if value is None:
        return ""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")
