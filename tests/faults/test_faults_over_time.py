"""A short form of `experiments/soak.py`, whose long one runs on demand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "experiments" / "soak.py"


@pytest.mark.usefixtures("compilation_cache")
def test_a_run_bears_faults_without_end_and_leaks_nothing(tmp_path):
    """Sixty epochs with a save every seven steps, and four faults between them."""
    done = subprocess.run(
        [sys.executable, str(SOAK), "--epochs", "60", "--faults", "4", "--dry"],
        capture_output=True,
        text=True,
        timeout=540,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads(done.stdout.splitlines()[-2])
    assert row["same_bits"] is True
    assert row["faults"] >= 1
