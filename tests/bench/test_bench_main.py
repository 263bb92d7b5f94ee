"""The command: its files, its comparison with itself, and its messages."""

import csv
import io
import json
import math
import os
import subprocess
import sys

import pytest
from rich.console import Console

from flax_lstm import cli
from flax_lstm.bench import main
from flax_lstm.bench.options import BenchOptions
from flax_lstm.bench.results import COLUMNS
from flax_lstm.config import UserError

COMMAND = "import sys; from flax_lstm.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The folder and the output of a smoke run in a process of its own."""
    folder = tmp_path_factory.mktemp("bench") / "out"
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "bench", "--smoke", "--out", str(folder)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def bench(**options: object) -> str:
    screen = Console(file=io.StringIO(), width=200, no_color=True)
    main.bench(BenchOptions(**options), screen)
    return screen.file.getvalue()


@pytest.mark.slow
def test_the_smoke_run_times_every_case_and_saves_all_of_it(smoke):
    folder, output = smoke
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    timed = {
        (row["shape"], row["mode"])
        for row in content["rows"]
        if (row["implementation"], row["status"]) == ("ours", "timed")
    }
    assert timed == {
        ("smoke-lengths", "forward"),
        ("smoke-lengths", "gradient"),
        ("smoke-resets", "forward"),
        ("smoke-step", "step"),
    }
    assert {row["status"] for row in content["rows"]} <= {"timed", "missing"}
    for row in content["rows"]:
        assert set(row) - {"samples_ms"} <= set(COLUMNS)
        assert row["jax"] == content["rows"][0]["jax"]
    with (folder / "results.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(content["rows"])
    assert "smoke-lengths gradient float32" in output
    assert "time of the fastest JAX peer / ours" in output
    assert str(folder) in output
    assert content["summary"]


@pytest.mark.slow
def test_a_run_differs_in_nothing_from_itself(smoke):
    path = smoke[0] / "results.json"
    output = bench(compare=(path, path))
    assert output.count("no difference seen") >= 4
    assert "faster" not in output.replace("became faster", "")
    assert "slower" not in output


def test_results_that_are_there_are_not_written_over(tmp_path):
    (tmp_path / "results.csv").write_text("precious")
    with pytest.raises(UserError, match=r"holds results.csv, .* Nothing was changed"):
        bench(smoke=True, out=tmp_path)
    assert (tmp_path / "results.csv").read_text() == "precious"


def test_the_catalogue_runs_nothing():
    output = bench(catalogue=True)
    assert "tutorial-40-1" in output
    assert "linen-optimized" in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"shapes": ("rl",)},
            "--shapes: there is no rl; expected any of tutorial-40-1",
        ),
        ({"implementations": ("jax",)}, "--implementations: there is no jax; expected"),
        (
            {"implementations": ("jax-cudnn",)},
            "--implementations: none of them can run here. jax-cudnn: ",
        ),
        ({"modes": ("backward",)}, "--modes: there is no backward; expected any of"),
        ({"dtypes": ("int8",)}, "--dtypes: there is no int8; expected any of float32"),
        ({"rounds": 0}, "--rounds must be at least 1; got 0"),
        ({"pause_s": math.nan}, "--pause-s must be at least 0; got nan"),
        ({"budget_s": -1.0}, "--budget-s must be at least 0; got -1.0"),
        ({"seed": -1}, "--seed must be at least 0; got -1"),
        (
            {"shapes": ("step-256",), "modes": ("gradient",)},
            "none of the shapes chosen is timed in it",
        ),
        ({"compare": ("a.json", "b.json")}, "cannot read a.json"),
    ],
)
def test_what_cannot_be_met_says_what_can(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "compare" in options:
        options["compare"] = tuple(tmp_path.joinpath(p) for p in options["compare"])
        message = f"cannot read {tmp_path / 'a.json'}"
    with pytest.raises(UserError) as caught:
        bench(**options)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_folders_are_counted(tmp_path):
    assert main.next_folder(tmp_path).name == "1"
    (tmp_path / "1").mkdir()
    assert main.next_folder(tmp_path).name == "2"


def test_the_command_line_reaches_the_options():
    command = cli.parse(
        ["bench", "--shapes", "rl-256", "imdb", "--modes", "forward", "--smoke"]
    )
    assert command == BenchOptions(
        shapes=("rl-256", "imdb"), modes=("forward",), smoke=True
    )
    command = cli.parse(["bench", "--compare", "A.json", "B.json"])
    assert [path.name for path in command.compare] == ["A.json", "B.json"]
