"""Where numbers come from: threads are those that XLA has, not a guess."""

import os
import platform
import subprocess
import sys

import pytest

from flax_lstm.bench import machine

THREADS = "from flax_lstm.bench.machine import threads; print(threads())"


def threads_in_a_new_process(**variables: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", THREADS],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(
    platform.system() != "Linux", reason="threads are counted on Linux only"
)
@pytest.mark.parametrize("count", [1, 3])
def test_the_threads_are_those_that_xla_was_started_with(count):
    """NPROC is XLA's own way to be told how many CPUs there are."""
    assert threads_in_a_new_process(NPROC=str(count)) == count


def test_one_thread_by_xla_s_flag():
    flag = "--xla_cpu_multi_thread_eigen=false"
    assert threads_in_a_new_process(XLA_FLAGS=flag) == 1


def test_every_row_says_where_it_comes_from():
    found = machine.provenance()
    assert found["python"] == platform.python_version()
    assert found["device"] == "cpu cpu"
    assert found["threads"] >= 1
    assert " x" in found["processor"]
    assert (found["commit"] is None) == (found["dirty"] is None)
    assert not str(found["commit"]).endswith("+")


def test_variables_that_change_the_numbers_are_recorded(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    found = machine.surroundings()["variables"]
    assert found["OMP_WAIT_POLICY"] == "passive"
    assert "GOMP_SPINCOUNT" not in found
