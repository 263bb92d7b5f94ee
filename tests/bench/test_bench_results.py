"""Rows on disk, the rates in them, and the summary over shapes."""

import csv
import json

import pytest

from flax_lstm.bench.limits import Limits
from flax_lstm.bench.results import COLUMNS, Results, limited, summary_lines, timed
from flax_lstm.bench.timing import Samples
from flax_lstm.bench.work import Work
from flax_lstm.config import UserError

SAMPLES = Samples((0.001, 0.002, 0.003), 4)


def test_rates_are_work_over_the_median():
    row = timed({"shape": "a", "dtype": "float32"}, SAMPLES, Work(10, 8e6, 2e6))
    row = limited(row, Limits({"float32": (8e9, "")}, {1: (1e12, "")}))
    assert row["median_ms"] == pytest.approx(2)
    assert (row["q25_ms"], row["q75_ms"]) == pytest.approx((1.5, 2.5))
    assert row["tokens_per_s"] == pytest.approx(5000)
    assert row["gflop_per_s"] == pytest.approx(4)
    assert row["gb_per_s"] == pytest.approx(1)
    assert row["limit_gflop_per_s"] == pytest.approx(8)
    assert row["limit_percent"] == pytest.approx(50)
    assert (row["rounds"], row["calls"], row["status"]) == (3, 4, "timed")
    assert set(row) - {"samples_ms"} <= set(COLUMNS)


def test_without_work_there_are_times_alone():
    """As for a whole training step, whose flops nobody counted."""
    row = timed({"shape": "a", "mode": "train step"}, SAMPLES)
    assert "gflop_per_s" not in row
    assert limited(row, Limits({}, {})) == row
    assert row["median_ms"] == pytest.approx(2)


def test_what_is_saved_is_read_back_and_the_csv_has_the_columns(tmp_path):
    rows = [timed({"shape": "a", "commit": None, "dirty": None}, SAMPLES)]
    results = Results(rows, {"gb_per_s": {}}, {"cpus": 2}, ["a line"])
    results.save(tmp_path / "new")
    assert Results.load(tmp_path / "new" / "results.json") == results
    with (tmp_path / "new" / "results.csv").open(encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert list(row) == list(COLUMNS)
    assert row["median_ms"] == "2"
    assert row["commit"] == ""
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "results.csv",
        "results.json",
    ]


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"format": 99}'])
def test_a_file_that_is_no_result_is_an_error_of_the_user(tmp_path, content):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"cannot read .*results\.json.*Expected"):
        Results.load(path)


def test_a_folder_that_cannot_be_written_is_an_error_of_the_user(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="give a folder that can be written"):
        Results([], {}, {}).save(tmp_path / "file")


def test_json_holds_no_value_that_is_not_json(tmp_path):
    Results([timed({}, SAMPLES)], {}, {}).save(tmp_path)

    def refuse(name: str):
        raise AssertionError(name)

    text = (tmp_path / "results.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=refuse)["format"] == 1


def entry(name: str, shape: str, median: float, **changed: object) -> dict:
    family = "ours" if name.startswith("ours") else "torch"
    family = "jax" if name.startswith("linen") else family
    return {
        "implementation": name,
        "family": family,
        "shape": shape,
        "mode": "forward",
        "dtype": "float32",
        "status": "timed",
        "resets": "-",
        "median_ms": median,
    } | changed


def test_the_summary_is_over_shapes_and_takes_the_fastest_of_each_family():
    rows = [
        entry("ours", "a", 2.0),
        entry("ours-xla", "a", 0.1),  # nobody's default
        entry("torch", "a", 8.0),
        entry("torch-packed", "a", 16.0),
        entry("ours", "b", 1.0),
        entry("torch", "b", 1.0),
        entry("linen-plain", "b", 3.0),
        entry("torch", "c", 5.0),  # nothing of ours to compare with
        entry("ours", "d", 1.0),
        entry("torch", "d", 0.1, resets="ignored"),  # not the same work
        entry("linen-plain", "d", None, status="wrong"),
    ]
    assert summary_lines(rows) == [
        "forward, float32: time of the fastest torch / ours: geometric mean 2.00, "
        "minimum 1.00 (b), over 2 shapes",
        "forward, float32: time of the fastest JAX peer / ours: geometric mean 3.00, "
        "minimum 3.00 (b), over 1 shape",
    ]


def test_no_competition_gives_no_summary():
    assert summary_lines([entry("ours", "a", 2.0)]) == []
