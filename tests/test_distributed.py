"""What one process can tell of several; tests/faults runs them for real."""

import re
import subprocess
import sys

import jax
import pytest

from flax_lstm import distributed
from flax_lstm.config import UserError


def test_off_joins_nothing(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", None)
    distributed.join("off")
    assert not distributed.several()
    assert distributed.is_first()


def test_auto_is_one_process_where_jax_detects_no_cluster():
    """In a process of its own, without what a cluster puts into the environment."""
    program = (
        "import jax\n"
        "from flax_lstm import distributed\n"
        "distributed.join('auto')\n"
        "print(jax.distributed.is_initialized(), distributed.several())"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env={"PATH": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.stdout.split() == ["False", "False"], ended.stderr
    assert "AloneWarning: JAX detects no cluster; this process works" in ended.stderr


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "1",
}


def test_auto_joins_the_processes_that_slurm_started():
    """A step of one task; JAX detects it by these variables."""
    program = (
        "import jax\n"
        "from flax_lstm import distributed\n"
        "distributed.join('auto')\n"
        "print(jax.distributed.is_initialized(), jax.process_count())"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env={
            "PATH": "",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": ":".join(sys.path),
            **SLURM,
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.stdout.split() == ["True", "1"], ended.stderr


@pytest.mark.parametrize(
    "where", ["", "on", "localhost", "localhost:", "host:0", "a b:1"]
)
def test_what_is_no_address_is_refused(where):
    with pytest.raises(UserError, match=r"must be auto, off or HOST:PORT; got '"):
        distributed.join(where, 0, 2)


@pytest.mark.parametrize("where", ["off", "auto"])
@pytest.mark.parametrize("numbers", [(3, 7), (0, None), (None, 4)])
def test_numbers_are_refused_where_they_would_be_ignored(monkeypatch, where, numbers):
    monkeypatch.setattr(jax.distributed, "initialize", None)
    with pytest.raises(UserError, match=rf"are for .*HOST:PORT; with {where} they"):
        distributed.join(where, *numbers)


def test_the_numbers_must_be_given_and_fit(monkeypatch):
    for name in distributed.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="needs --process-id, or JAX_PROCESS_ID"):
        distributed.join("localhost:1", None, 2)
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    with pytest.raises(UserError, match="needs --process-count, or JAX_NUM_PROCESSES"):
        distributed.join("localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(UserError, match=r"below process_count; got 2 of 2\."):
        distributed.join("localhost:1")


def fake_gather(monkeypatch, *others):
    """Stands for the other processes."""
    monkeypatch.setattr(distributed, "gather", lambda mine: [mine, *others])
    monkeypatch.setattr(distributed, "several", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 1 + len(others))


def test_processes_that_differ_are_named_with_both_values(monkeypatch):
    fake_gather(monkeypatch, {"a": {"b": 1}}, {"a": {"b": 2, "c": 0}})
    with pytest.raises(
        UserError, match=r"process 2 differs from process 0 in a\.b: 2 there, 1 here"
    ):
        distributed.agree(a={"b": 1})
    fake_gather(monkeypatch, {"a": {"b": 1}})
    distributed.agree(a={"b": 1})


def test_the_error_of_one_is_the_error_of_all(monkeypatch):
    fake_gather(monkeypatch, None, "no such file")
    with (
        pytest.raises(UserError, match="process 2 of 3: no such file"),
        distributed.together(),
    ):
        pass
    told = []
    monkeypatch.setattr(distributed, "gather", lambda mine: told.append(mine))
    with pytest.raises(KeyError), distributed.together():
        raise KeyError("mine")
    assert told == ["'mine'"]


def test_alone_nothing_is_exchanged(monkeypatch):
    monkeypatch.setattr(distributed, "multihost_utils", None)
    assert distributed.gather({"a": 1}) == [{"a": 1}]
    assert distributed.from_first("x") == "x"
    distributed.agree(a=1)
    distributed.barrier("here")
    with pytest.raises(ZeroDivisionError), distributed.together():
        raise ZeroDivisionError


@pytest.mark.parametrize(
    "text",
    [
        "UNKNOWN: Gloo all-reduce failed: timed out",
        "INTERNAL: NCCL operation ncclAllReduce failed: unhandled system error",
        "UNAVAILABLE: Failed to send RPC to coordination service.",
        "Coordination service agent is in error state.",
        "UNKNOWN: [127.0.0.1]:40001: Connection closed by peer",
        "UNAVAILABLE: task 1 heartbeat timeout",
    ],
)
def test_a_failed_collective_is_said_in_words(monkeypatch, text):
    failed = ValueError(text)
    with pytest.raises(ValueError, match=re.escape(text)), distributed.watching():
        raise failed  # alone: no other process can be meant
    monkeypatch.setattr(distributed, "several", lambda: True)
    with (
        pytest.raises(distributed.LostProcessError, match="another process"),
        distributed.watching(),
    ):
        raise failed
    with pytest.raises(ValueError, match="other"), distributed.watching():
        raise ValueError("some other error")


def test_an_abort_ends_with_a_message():
    """As JAX's coordination client does it: C's `abort`, in a thread of its own."""
    program = (
        "import ctypes, threading, time\n"
        "from flax_lstm import distributed\n"
        "distributed.say_on_abort('first words')\n"
        "distributed.say_on_abort('lost the others')\n"
        "threading.Thread(target=ctypes.CDLL(None).abort).start()\n"
        "time.sleep(60)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=50
    )
    assert ended.returncode == 1
    assert ended.stderr == "flax-lstm: lost the others\n"


def test_json_goes_around_as_it_is(monkeypatch):
    """Numbers keep their bits on their way through JSON."""
    monkeypatch.setattr(distributed, "several", lambda: True)
    monkeypatch.setattr(distributed, "gather_bytes", lambda said: [said, b"7"])
    value = {"third": 1 / 3, "text": "naïve", "none": None, "list": [1, 2.5]}
    assert distributed.gather(value) == [value, 7]
    assert distributed.from_first(1 / 3) == 1 / 3
