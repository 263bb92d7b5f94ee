"""A kernel of each kind through its vendor's compiler, where that is installed.

All kernels and targets are compiled by `python experiments/compile_kernels.py`, which
also installs the compilers.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
# Peaks of kernel and scan at shapes of compile_memory.py, and by how much inference may
# be above; in a process of its own, for it loads the compiler.
PEAKS = """
import sys

import jax
from compile_memory import MORE, ODD, SHAPES, TARGETS, planned

target, lengths = sys.argv[1], sys.argv[2] == "lengths"
place = TARGETS[target][0].sharding(target)
asked = [(SHAPES[0], "forward", 0)]
_, rows, _, hidden = SHAPES[2]
# An H100 projects the last four steps apart, four planes each. Weights once more would
# be four times as much.
planes = 4 * 4 * rows * hidden * 2 / 2**20
asked += [(SHAPES[2], "forward", planes if target == "h100" else 0)]
if target == "h100":
    # `step`, whose weights are nearly all that there is.
    asked += [((32, 16, 256, 2048), "forward", 0, "float32")]
for shape in MORE[target]:
    asked += [(shape, "forward", 0)]
    # A few steps of it: the compiler takes long over a scan's.
    asked += [((32, *shape[1:]), "gradient", 0)]
for shape in ODD.get(target, ())[:1]:
    asked += [((128, *shape[1:]), "gradient", 0)]
    # Of one row the planes of 16 steps are apart, and the bias is there in float32. Its
    # states are filled up to 8: c in four bytes and h in two, both before and after,
    # and h as operand, twice.
    states = 8 * (2 * (4 + 2) + 2 * 2)
    asked += [(shape, "forward", (4 * 16 * 2 + 4 * 4 + states) * shape[-1] / 2**20)]
# Rows and units of no whole tile are read and written where they lie.
for shape in ODD.get(target, ())[2:]:
    asked += [(shape, "forward", 0)]
for shape, mode, above, *dtype in asked:
    plans = [
        planned(target, shape, name, mode, place, lengths, *dtype)
        for name in ("pallas", "scan")
    ]
    peaks = [plan.peak_memory_in_bytes / 2**20 for plan in plans]
    print("peaks", *peaks, above, *shape, mode, *dtype)
"""


@pytest.mark.kernels("compiled")
@pytest.mark.parametrize(
    ("target", "compiler", "kernel"),
    [
        ("v5e", "libtpu", "'forward', 'float32', 40"),
        ("h100", "cuda", "single backward', 'float32'"),
    ],
)
@pytest.mark.usefixtures("cache")
def test_a_kernel_compiles_within_its_budget(target, compiler, kernel):
    del compiler  # for the fixture
    command = (EXPERIMENTS / "compile_kernels.py", "--only", target, "--kernel", kernel)
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kernels" in done.stdout.splitlines()[-1]


@pytest.mark.kernels("compiled")
@pytest.mark.parametrize(
    ("target", "compiler", "lengths"),
    [("v5e", "libtpu", "none"), ("h100", "cuda", "none")],
)
def test_the_kernel_takes_no_more_memory_than_the_scan(
    target, compiler, lengths, cache, tmp_path
):
    """On a TPU, inputs and outputs of no whole lanes, few rows; on an H100, in pieces.

    There also weights that have to be turned; one row, whose states are filled up; and
    rows of no whole tile. Without lengths, where a scan copies nothing.
    """
    del compiler  # for the fixture
    vendor, _ = importlib.import_module("compile_kernels").TARGETS[target]
    made = os.environ | vendor.environment(cache, str(tmp_path))
    made["PYTHONPATH"] = os.pathsep.join([str(EXPERIMENTS), made.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", PEAKS, target, lengths],
        env=made,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    found = [line for line in lines if line[0] == "peaks"]
    assert found
    for line in found:
        (kernel, scan, above), hidden = map(float, line[1:4]), int(line[7])
        # Weights and states, which are filled up, are less than a hundredth of all.
        assert kernel <= scan * (1.01 if hidden % 128 else 1) + above, line
