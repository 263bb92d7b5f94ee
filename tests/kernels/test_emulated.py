"""What the compiler makes of the Hopper kernels, run on the CPU by `emulator`.

Where the interpreter runs the source of a kernel, this runs the PTX that Mosaic makes
of it: where each value lies in registers, how tiles are swizzled, descriptors of matrix
products, tensor maps, barriers. Copies and products run as late as what waits for them
allows, or at any time. Each test is one process, which loads the compiler.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
EXPERIMENTS = HERE.parents[1] / "experiments"

pytestmark = [
    pytest.mark.kernels("compiled"),
    pytest.mark.parametrize(("target", "compiler"), [("h100", "cuda")]),
]


@pytest.fixture
def run(cache, target, compiler, tmp_path):
    """Returns what runs problems, see `emulator/run.py`, and what was wrong of each."""
    del compiler  # for the fixture
    vendor, _ = importlib.import_module("compile_kernels").TARGETS[target]
    made = os.environ | vendor.environment(cache, str(tmp_path))
    places = [EXPERIMENTS, HERE, HERE.parent, made["PYTHONPATH"]]
    made["PYTHONPATH"] = os.pathsep.join(map(str, places))

    def run(*asked):
        done = subprocess.run(
            [sys.executable, "-m", "emulator.run", json.dumps(asked)],
            env=made,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        told = [line for line in done.stdout.splitlines() if line.startswith("{")]
        assert len(told) == len(asked)
        return [json.loads(line)["wrong"] for line in told]

    return run


def asked(kernel, dtype, shape, *, order="late", reverse=False, without=""):
    return {
        "kernel": kernel,
        "dtype": dtype,
        "shape": shape,
        "reverse": reverse,
        "order": order,
        "seed": sum(shape),
        "without": without,
    }


def test_the_emulator_runs_a_product_that_is_known_to_be_right(run):
    """JAX's own, which its makers run on the device: two swizzles, either order."""
    shapes = [[128, 128, 192, tile] for tile in (64, 32)]
    assert run(*(asked("matmul", "bfloat16", shape) for shape in shapes)) == [""] * 2


@pytest.mark.parametrize(
    "problems",
    [
        (
            asked("single", "bfloat16", [3, 8, 32, 64]),
            asked("single", "bfloat16", [3, 9, 40, 100], reverse=True),
            asked("single", "float32", [8, 1, 20, 64], order="any"),
        ),
        (asked("cluster", "bfloat16", [3, 9, 20, 136], order="any", reverse=True),),
        (asked("grid", "float32", [3, 9, 40, 90]),),
        (asked("step", "bfloat16", [3, 9, 20, 72], reverse=True),),
    ],
    ids=lambda problems: problems[0]["kernel"],
)
def test_what_is_compiled_gives_what_numpy_does(run, problems):
    """Values of training and of inference, and all gradients; NaN in the padding.

    Of whole tiles, which TMA copies; of rows and units that are none; of one row.
    """
    assert run(*problems) == [""] * len(problems)


def test_what_is_taken_out_is_found(run):
    """By wrong outputs, or as a fault; whole, the kernel is right, see above."""
    found = {
        "waits for copies": "hs",
        "waits for products": "before its matrix products have ended",
        "waits for stores": "before its copies have read shared memory",
        "fences": "reads what no fence follows",
        "order of operands": "hs",
        "swizzles": "hs",
    }
    problem = "single", "bfloat16", [3, 11, 20, 64]
    told = run(*(asked(*problem, without=what) for what in found))
    for wrong, wanted in zip(told, found.values(), strict=True):
        assert wrong == wanted if wanted == "hs" else wrong.endswith(wanted)
