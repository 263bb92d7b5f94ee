"""A kernel of each kind through its vendor's compiler, where that is installed.

All kernels and targets are compiled by `python experiments/compile_kernels.py`, which
also installs the compilers.
"""

import importlib
import subprocess
import sys
from pathlib import Path

import jax
import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.mark.kernels("compiled")
@pytest.mark.parametrize(
    ("target", "compiler", "kernel"),
    [
        ("v5e", "libtpu", "'forward', 'float32', 40"),
        ("h100", "cuda", "single backward', 'float32'"),
    ],
)
def test_a_kernel_compiles_within_its_budget(target, compiler, kernel, monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    cache = importlib.import_module("compile_kernels").default_cache()
    if not list(cache.glob(f"{compiler}-jax{jax.__version__}-*")):
        pytest.skip(
            f"the compiler for {target} is not in {cache}; "
            "python experiments/compile_kernels.py installs it"
        )
    command = (EXPERIMENTS / "compile_kernels.py", "--only", target, "--kernel", kernel)
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kernels" in done.stdout.splitlines()[-1]
