"""What is on the screen."""

import io

import pytest
from rich.console import Console

from flax_lstm.bench import tables
from flax_lstm.bench.compare import Comparison
from flax_lstm.bench.limits import Limits
from flax_lstm.bench.peers import catalogue
from flax_lstm.bench.peers.base import Implementation, Prepared
from flax_lstm.bench.shapes import SHAPES


def printed(*things: object, width: int = 200) -> str:
    screen = Console(file=io.StringIO(), width=width, no_color=True)
    for thing in things:
        screen.print(thing)
    return screen.file.getvalue()


def row(name: str, median: float | None, **changed: object) -> dict:
    row = {"implementation": name, "family": "jax", "status": "timed", "error": 1e-7}
    if median is not None:
        row |= {"median_ms": median, "q25_ms": median - 1, "q75_ms": median + 1}
    return row | {"lengths": "-", "resets": "-"} | changed


ROWS = [
    row("ours", 20.0, gflop_per_s=123.4, limit_percent=61.7),
    row("torch", 50.0, lengths="padded", compile_s=None),
    row("haiku", 10.0),
    row("keras", None, status="wrong", reason="y is off"),
    row("equinox", None, status="missing", reason="not here"),
]


def test_rows_stand_by_time_with_what_they_left_out():
    text = printed(tables.rows_table("A title", ROWS, 200))
    first = [line.split()[0] for line in text.splitlines() if line.strip()]
    assert first[-3:] == ["haiku", "ours", "torch"]
    assert "A title" in text
    (line,) = [line for line in text.splitlines() if "torch" in line]
    assert line.split() == [
        "torch",
        "(padded)",
        "50.0",
        "49.0",
        "51.0",
        "1e-07",
        "2.50",
    ]
    assert "keras" not in text


def test_what_was_not_timed_says_why_once_missing_ones_aside():
    assert tables.untimed_lines(ROWS) == ["keras wrong: y is off"]


def test_a_narrow_screen_has_fewer_columns():
    wide = tables.rows_table("", ROWS, tables.WIDE)
    narrow = tables.rows_table("", ROWS, 80)
    assert len(wide.columns) == len(narrow.columns) + 3
    assert all(len(line) <= 80 for line in printed(narrow, width=80).splitlines())


def test_a_table_without_ours_has_no_ratio():
    text = printed(tables.rows_table("", ROWS[1:3], 200))
    assert "2.50" not in text
    assert "50.0" in text


def test_the_catalogue_names_everything_and_what_is_missing():
    shapes, found = list(SHAPES.values()), list(catalogue.implementations().values())
    text = printed(*tables.catalogue_tables(shapes, found))
    for one in (*shapes, *found):
        assert one.name in text
    assert "needs a CUDA device" in text


def test_the_catalogue_prints_the_words_in_brackets():
    def prepare(problem: object) -> Prepared:
        raise NotImplementedError

    needed = "pip install 'x[bench]'"
    one = Implementation("one", "jax", "", lambda: needed, prepare)
    assert needed in printed(*tables.catalogue_tables([], [one]))


def test_comparisons_and_refusals():
    key = ("ours", "a", "float32", "forward")
    found = [
        Comparison(key, 1.25, "faster"),
        Comparison(("x", *key[1:]), None, "refused", "no such row"),
    ]
    text = printed(tables.comparison_table(found))
    assert "1.25" in text
    assert "faster" in text
    assert "no such row" not in text
    assert tables.refused_lines(found) == ["x a float32 forward: refused, no such row"]


def test_limits_name_who_reached_them():
    limits = Limits({"float32": (2e12, "jax 8x8")}, {2**20: (5e10, "numpy copy")})
    assert tables.limits_lines(limits) == [
        "Largest matrix-product rate, float32: 2,000.0 GFLOP/s (jax 8x8)",
        "Largest memory rate, 1 MiB: 50.0 GB/s (numpy copy)",
    ]


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.01234, "0.0123"), (99.96, "100"), (1234.5, "1,234"), (None, "")],
)
def test_figures_have_three_digits(value, said):
    assert tables.figure(value) == said
