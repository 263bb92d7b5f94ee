"""The script for the H100: what it judges, and that no part can hold up the others."""

import csv
import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from flax_lstm.bench import plots
from flax_lstm.bench.results import Results

EXPERIMENTS = Path(__file__).parents[2] / "experiments"

pytestmark = pytest.mark.kernels


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    names = ("h100", "h100_numbers", "h100_micro", "h100_targets")
    return [importlib.import_module(name) for name in names]


def write_race(folder, times):
    folder.mkdir()
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["implementation", "shape", "mode", "status", "median_ms"])
        writer.writerows(
            [name, "tutorial-244-1", "forward", status, median]
            for name, status, median in times
        )


def test_a_target_is_held_against_the_fastest_peer_that_was_timed(scripts, tmp_path):
    *_, targets = scripts
    write_race(
        tmp_path / "race-bfloat16",
        [
            ("ours-pallas", "timed", 2.0),
            ("torch", "timed", 6.0),
            ("torch-packed", "timed", 5.0),
            ("jax-cudnn", "wrong", 1.0),
            ("linen-optimized", "timed", 19.0),
        ],
    )
    rows = {
        (row["shape"], row["mode"], row["asked"]): row
        for row in targets.judge_targets(tmp_path)
        if row["dtype"] == "bfloat16"
    }
    against_cudnn = rows["tutorial-244-1", "forward", 2.0]
    assert (against_cudnn["against"], against_cudnn["seen"]) == ("torch-packed", 2.5)
    assert against_cudnn["met"] is True
    assert rows["tutorial-244-1", "forward", 10.0]["met"] is False
    assert rows["tutorial-244-2", "forward", 2.0]["met"] is None  # nobody was timed


def test_races_on_disk_are_drawn_beside_their_results(scripts, tmp_path, monkeypatch):
    *_, targets = scripts
    for name in ("race-bfloat16", "race-float32"):
        Results([{"shape": name}], {}, {}).save(tmp_path / name)
    drawn = []
    monkeypatch.setattr(plots, "missing", lambda: None)
    monkeypatch.setattr(
        plots,
        "save_plots",
        lambda results, folder: drawn.append((results.rows[0]["shape"], folder)) or [],
    )
    targets.plot_races(tmp_path)
    assert drawn == [
        (name, tmp_path / name / "plots") for name in ("race-bfloat16", "race-float32")
    ]


def test_a_part_that_hangs_is_ended_and_told(scripts, tmp_path, monkeypatch):
    h100, *_ = scripts
    hangs = tmp_path / "hangs.py"
    hangs.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(h100, "__file__", str(hangs))
    names = ["micro", "environment"]
    wrong = h100.run_children(names, tmp_path, True, 1.0)
    assert [line.split(" after ")[0] for line in wrong] == [
        "micro: was ended",
        "environment: was ended",
    ]
    left = h100.run_children(names, tmp_path, True, -1.0)
    assert left == [f"{name}: no time was left for it" for name in names]


def test_an_error_is_relative_to_the_norm(scripts):
    _, numbers, *_ = scripts
    got, wanted = np.array([3.0, 4.5]), np.array([3.0, 4.0])
    assert numbers.distance(got, wanted) == pytest.approx(0.1)


def test_a_case_that_fails_on_the_device_is_told_and_the_others_go_on(
    scripts, tmp_path, monkeypatch
):
    _, numbers, *_ = scripts

    def results(implementation, arrays, options):
        if implementation == "pallas" and arrays[1].dtype == "float16":
            raise jax.errors.JaxRuntimeError("INTERNAL: cannot be launched")
        return {"float": 1.0}

    told = SimpleNamespace(implementation="pallas")
    monkeypatch.setattr(numbers, "explain", lambda *_, **__: told)
    monkeypatch.setattr(numbers, "in_float64", lambda *_: None)
    monkeypatch.setattr(numbers, "results", results)
    monkeypatch.setattr(numbers, "distances", lambda *_: {"outputs": 1e-9})
    monkeypatch.setattr(numbers, "CASES", [numbers.Case("single", 2, 3, 4, 5)])
    wrong = numbers.numbers_part("single-5", tmp_path, dry=False)
    assert {row["dtype"] for row in wrong} == {"float16"}
    assert {row["reason"] for row in wrong} == {"INTERNAL: cannot be launched"}
    assert {row["ok"] for row in wrong} == {False}
    with (tmp_path / "numbers-single-5.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["ok"] for row in rows].count("True") == 2 * len(numbers.VARIANTS)


def test_a_case_with_lengths_is_never_empty(scripts):
    """Of three rows of three steps all were: nothing was computed, without an error."""
    _, numbers, *_ = scripts
    _, options = numbers.drawn(numbers.Case("grid", 3, 3, 5, 1024), "float32", "all")
    assert options["lengths"].max() == 3


def test_every_case_of_the_numbers_has_its_part(scripts):
    h100, numbers, *_ = scripts
    parts = {part for part in h100.PARTS if part.startswith("numbers-")}
    assert parts == {f"numbers-{case.name}" for case in numbers.CASES}
    assert {f"numbers-{name}" for name in numbers.DRY} <= parts


def test_every_target_names_a_shape_that_is_raced(scripts):
    h100, *_, targets = scripts
    shapes = {shape.name: shape for shape in h100.race_shapes(dry=False)}
    for target in targets.targets():
        assert target.mode in shapes[target.shape].modes
        assert target.part in h100.PARTS


@pytest.mark.kernels("lowered")
def test_every_operation_of_a_step_lowers_for_cuda(scripts):
    _, _, h100_micro, _ = scripts
    for micro in h100_micro.micros():
        run = jax.jit(micro.make(2))
        exported = jax.export.export(
            run,
            platforms=["cuda"],
            disabled_checks=[
                jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
            ],
        )(*micro.arguments)
        assert exported.platforms == ("cuda",)


@pytest.mark.kernels("interpreted")
def test_a_dry_run_judges_the_interpreted_kernel(tmp_path):
    """Only that the script works: the numbers are tested in test_connected.py."""
    done = subprocess.run(
        [
            *(sys.executable, EXPERIMENTS / "h100.py", "--dry", "--out", tmp_path),
            *("--parts", "environment", "numbers-single-64", "micro", "pieces"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "numbers-single-64.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["ok"] for row in rows} == {"True"}
    assert len(rows) == 12  # three results, with and without six gradients
    assert "wgmma 8 columns: defined" in done.stdout
    with (tmp_path / "pieces.csv").open(newline="") as file:
        apart = [row["steps_apart"] for row in csv.DictReader(file)]
    assert apart == ["as chosen", "3"]
