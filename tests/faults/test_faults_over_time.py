"""A short form of `experiments/soak.py`, whose long one runs on demand."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "experiments" / "soak.py"


@pytest.mark.usefixtures("compilation_cache")
def test_a_run_bears_faults_without_end_and_leaks_nothing(tmp_path):
    """Sixty epochs with a save every seven steps, and two faults between them."""
    done = subprocess.run(
        [sys.executable, str(SOAK), "--epochs", "60", "--faults", "2", "--dry"],
        capture_output=True,
        text=True,
        timeout=540,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads(done.stdout.splitlines()[-2])
    assert row["same_bits"] is True
    assert row["faults"] >= 1


FINE = {
    "faults": 3,
    "same_bits": True,
    "memory_mib": "100",
    "memory_spread": "0.04",
    "files_first_half": 20,
    "files_second_half": 22,
    "folder_straight_mib": "1",
    "folder_faulty_mib": "2",
}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, None),
        ({"faults": 0}, "no fault came"),
        ({"same_bits": False}, "digests differ"),
        ({"memory_spread": "0.06"}, "memory varies"),
        ({"files_second_half": 23}, "open files"),
        ({"folder_faulty_mib": "2.1"}, "the folder grew"),
    ],
)
def test_what_a_soak_must_not_show_is_told(changed, told, monkeypatch):
    monkeypatch.syspath_prepend(str(SOAK.parent))
    wrong = importlib.import_module("soak").verdict(FINE | changed)
    assert [told in line for line in wrong] == ([] if told is None else [True])


def test_files_of_a_checkpoint_under_way_do_not_stay_and_a_leak_does(monkeypatch):
    monkeypatch.syspath_prepend(str(SOAK.parent))
    staying = importlib.import_module("soak").staying
    assert staying([9, *[13] * 12, *[22] * 7]) == 13
    assert staying(list(range(13, 33))) + 2 < staying(list(range(33, 53)))
