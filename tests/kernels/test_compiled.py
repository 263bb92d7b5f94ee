"""A kernel of each kind through its vendor's compiler, where that is installed.

All kernels and targets are compiled by `python experiments/compile_kernels.py`, which
also installs the compilers.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
# Peaks of kernel and scan, in bytes, at the first shape of compile_memory.py;
# in a process of its own, for it loads the compiler.
PEAKS = """
import jax
from compile_memory import KINDS, SHAPES, program
from compile_for_tpu import sharding
from flax_lstm_kernels.target import on

for name in "pallas", "scan":
    function, arguments = program(SHAPES[0], name, "forward", sharding("v5e"))
    with on(*KINDS["v5e"]):
        compiled = jax.jit(function).lower(*arguments[:2]).compile()
    print("peak", compiled.memory_analysis().peak_memory_in_bytes)
"""


@pytest.fixture
def cache(monkeypatch, request):
    """Returns where the compilers are; skips where the one of the test is not."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    cache = importlib.import_module("compile_kernels").default_cache()
    target, compiler = (request.getfixturevalue(n) for n in ("target", "compiler"))
    if not list(cache.glob(f"{compiler}-jax{jax.__version__}-*")):
        pytest.skip(
            f"the compiler for {target} is not in {cache}; "
            "python experiments/compile_kernels.py installs it"
        )
    return cache


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
@pytest.mark.parametrize(("target", "compiler"), [("v5e", "libtpu")])
def test_inputs_of_no_whole_lanes_are_not_copied_for_a_tpu(
    target, compiler, cache, tmp_path
):
    """Forward alone, the kernel's peak is not above the scan's: that copies nothing."""
    del target, compiler  # for the fixture
    environment = importlib.import_module("compile_for_tpu").environment
    path = os.pathsep.join([str(EXPERIMENTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", PEAKS],
        env=os.environ | environment(cache, str(tmp_path)) | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    kernel, scan = [int(line[1]) for line in lines if line[0] == "peak"]
    assert kernel <= scan
