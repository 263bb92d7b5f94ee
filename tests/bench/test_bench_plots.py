"""The plots: what stands in them, read from the SVG."""

import itertools
import re
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

from flax_lstm.bench import plots
from flax_lstm.bench.results import Results

pytest.importorskip("matplotlib", reason="draws: pip install 'flax-lstm[plot]'")

LIMITS = {
    "gflop_per_s": {"float32": {"rate": 100.0, "by": "jax"}},
    "gb_per_s": {"1000": {"rate": 50.0, "by": "a"}, "4000": {"rate": 20.0, "by": "b"}},
}


def row(name: str, family: str, mode: str, median: float, **changed: object) -> dict:
    return {
        "implementation": name,
        "family": family,
        "shape": "rl-256",
        "mode": mode,
        "dtype": "float32",
        "status": "timed",
        "batch": 2,
        "steps": 3,
        "inputs": 4,
        "hidden": 5,
        "tokens": 6,
        "lengths": "-",
        "resets": "yes",
        "device": "cpu cpu",
        "processor": "a & b x2",
        "threads": 2,
        "median_ms": median,
        "q25_ms": 0.9 * median,
        "q75_ms": 1.1 * median,
        "intensity": 10.0 if mode == "forward" else 20.0,
        "gflop_per_s": 100 / median,
        "limit_gflop_per_s": 90.0,
    } | changed


ROWS = [
    row("torch", "torch", "forward", 4.0, resets="ignored"),
    row("haiku", "jax", "forward", 2.0),
    row("ours-scan", "ours", "forward", 3.0),
    row("ours", "ours", "forward", 3.5),
    row("ours", "ours", "gradient", 5.0),
    row("haiku", "jax", "gradient", 200.0),
    row("keras", "jax", "gradient", 1.0, status="wrong"),
]


def words(path: Path) -> str:
    root = xml.parse(path).getroot()
    texts = root.iter("{http://www.w3.org/2000/svg}text")
    return " | ".join("".join(text.itertext()).strip() for text in texts)


def test_each_shape_and_each_roof_has_a_file(tmp_path):
    paths = plots.save_plots(Results(ROWS, LIMITS, {}), tmp_path)
    assert [path.name for path in paths] == [
        "rl-256-float32.svg",
        "roofline-float32.svg",
    ]
    bars, roof = (words(path) for path in paths)
    for said in ("torch (no resets)", "haiku", "forward", "gradient", "B2 T3 I4 H5"):
        assert said in bars
    assert "6 valid steps" in bars
    assert "a & b x2" in bars
    assert "keras" not in bars
    # Of the panels only the gradient's times are far apart.
    assert len(re.findall("ms a call, log scale", bars)) == 1
    assert "memory 20 GB/s, products 100 GFLOP/s" in roof
    assert roof.count("rl-256") == 2  # a panel for each mode
    for said in ("flax-lstm, default", "torch, fastest", "forward", "gradient"):
        assert said in roof


def test_ours_stands_first_and_the_default_before_all():
    names = [r["implementation"] for r in plots.ordered(ROWS[:4])]
    assert names == ["ours", "ours-scan", "haiku", "torch"]


@pytest.mark.parametrize(
    "places", [[0.0, 0.0, 0.0, 0.0], [0.0, 0.9, 1.8, 1.9], [0.0, 5.0, 5.5, 9.0], []]
)
def test_names_are_spread_no_further_than_needed(places):
    found = plots.spread(places, 1.0)
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert all(gap >= 1 - 1e-12 for gap in gaps)
    # The middle of what is moved stays.
    assert sum(found) == pytest.approx(sum(places))


def test_rows_without_work_have_bars_and_no_roof(tmp_path):
    """As those of whole training steps."""
    bare = {k: v for k, v in ROWS[3].items() if not re.search("intensity|_per_s", k)}
    bare["mode"] = "train step"
    paths = plots.save_plots(Results([bare], {}, {}), tmp_path)
    assert [path.name for path in paths] == ["rl-256-float32.svg"]
    assert "train step" in words(paths[0])


def test_the_same_rows_give_the_same_file(tmp_path):
    first, *_ = plots.save_plots(Results(ROWS, LIMITS, {}), tmp_path / "1")
    second, *_ = plots.save_plots(Results(ROWS, LIMITS, {}), tmp_path / "2")
    assert first.read_bytes() == second.read_bytes()
