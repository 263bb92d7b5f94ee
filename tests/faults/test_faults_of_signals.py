"""What a signal, a closed pipe, or a lack of memory does to a run."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from fault_runs import (
    COMPILING,
    STEPS,
    TIME_LIMIT_S,
    at_step,
    final,
    resumed_as_straight,
    start,
    train,
)
from fault_runs import train_argv as argv_of

pytestmark = pytest.mark.usefixtures("compilation_cache")

ASK = "os.kill(os.getpid(), signal.{})"
CODES = {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129}
WORDS = {"SIGTERM": "terminated", "SIGINT": "interrupted", "SIGHUP": "hung up"}


@pytest.mark.parametrize("name", CODES)
def test_a_signal_during_a_step(source, tmp_path, straight_run, name):
    """Asked before step 18, the run takes it, saves, and stops."""
    folder = tmp_path / "run"
    stopped = train(source, folder, fault=at_step(18, ASK.format(name)))
    assert stopped.code == CODES[name]
    message = stopped.message()
    assert message.startswith(
        f"flax-lstm: {WORDS[name]}: stopped after step 18 of {STEPS}, which is saved; "
    )
    assert message.endswith(f"--resume --out {folder}` goes on.")
    assert (folder / "checkpoints" / "18").is_dir()
    resumed_as_straight(source, folder, straight_run())


IN_SAVE = """
import os, signal
import flax_lstm.checkpoint
write = flax_lstm.checkpoint.Checkpoints._write
def asked(self, step, *rest):
    if step == 10:
        os.kill(os.getpid(), signal.SIGTERM)
    write(self, step, *rest)
flax_lstm.checkpoint.Checkpoints._write = asked
"""


def test_sigterm_during_a_save(source, tmp_path, straight_run):
    folder = tmp_path / "run"
    stopped = train(source, folder, "--save-every", "5", fault=IN_SAVE)
    assert stopped.code == 143
    assert "which is saved" in stopped.message()
    assert (folder / "checkpoints" / "10").is_dir()
    resumed_as_straight(source, folder, straight_run())


def test_sigterm_during_compilation(source, tmp_path, straight_run):
    """It is heard once XLA returns; nothing is lost, and no step more is taken."""
    folder = tmp_path / "run"
    fault = COMPILING.format(action=ASK.format("SIGTERM"))
    stopped = train(source, folder, "--no-compilation-cache", fault=fault)
    assert stopped.code == 143
    assert f"stopped after step 1 of {STEPS}" in stopped.message()
    resumed_as_straight(source, folder, straight_run())


def test_a_second_signal_during_compilation_ends_it_at_once(source, tmp_path):
    """XLA holds the main thread then, and Python runs no handler."""
    folder = tmp_path / "run"
    twice = f"{ASK.format('SIGTERM')}; time.sleep(0.2); {ASK.format('SIGTERM')}"
    fault = COMPILING.format(action=twice)
    left = train(source, folder, "--no-compilation-cache", fault=fault)
    assert left.code == 143
    assert "a step was taken" not in left.err
    assert left.message() == "flax-lstm: asked twice, and left at once."


IN_DATA = """
import os, signal
import flax_lstm.data
def asked(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError("it went on")
flax_lstm.data.load = asked
"""


def test_sigterm_during_the_load_of_the_data(source, tmp_path):
    folder = tmp_path / "run"
    stopped = train(source, folder, fault=IN_DATA)
    assert stopped.code == 143
    assert stopped.message() == (
        "flax-lstm: terminated: stopped before anything was to be saved."
    )
    assert not folder.exists()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_second_signal_ends_it_at_once(source, tmp_path, straight_run, name):
    """While it hangs in a step; what was saved before stays."""
    folder = tmp_path / "run"
    twice = f"{ASK.format(name)}; {ASK.format(name)}; import time; time.sleep(999)"
    left = train(source, folder, "--save-every", "5", fault=at_step(18, twice))
    assert left.code == CODES[name]
    assert left.message() == "flax-lstm: asked twice, and left at once."
    resumed_as_straight(source, folder, straight_run())


def test_a_signal_that_is_ignored_stays_ignored(source, tmp_path):
    """As under `nohup`."""
    done = train(
        source,
        tmp_path / "run",
        fault="import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        + at_step(3, ASK.format("SIGHUP")),
    )
    assert done.code == 0, done.err


def test_a_closed_standard_output(source, tmp_path, straight_run):
    """As of `| head -1`."""
    folder = tmp_path / "run"
    child = start(*argv_of(source, folder))
    child.stdout.readline()
    child.stdout.close()
    _, said = child.communicate(timeout=240)
    assert child.returncode == 141
    assert said == ""
    resumed_as_straight(source, folder, straight_run())


EXHAUST = "import jax.numpy as jnp; jnp.zeros((1 << 45,))"


def test_out_of_memory_in_a_step(source, tmp_path, straight_run):
    """More than there can be is asked of XLA's own allocator, beside a step."""
    folder = tmp_path / "run"
    failed = train(source, folder, "--save-every", "5", fault=at_step(18, EXHAUST))
    assert failed.code == 1
    message = failed.message()
    assert message.startswith("flax-lstm: out of memory (RESOURCE_EXHAUSTED")
    for name in ("data.batch_size 8", "data.max_length 8", "model.features (5,)"):
        assert name in message
    resumed_as_straight(source, folder, straight_run())


def test_a_limit_of_memory(source, tmp_path):
    """`ulimit -v`: refused before anything is allocated, by the limit that is set."""
    limit = 16 * 2**30  # JAX starts in it; the batch takes 17 GiB at the least
    refused = train(
        source,
        tmp_path / "run",
        *("--batch-size", "130000000"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert refused.code == 2
    assert "this machine has 16 GiB" in refused.message()
    assert "data.batch_size 130000000" in refused.message()
    assert not (tmp_path / "run").exists()


def test_no_such_device(source, tmp_path):
    refused = train(source, tmp_path / "run", env={"JAX_PLATFORMS": "cuda"})
    assert refused.code == 1
    assert refused.message().startswith("flax-lstm: JAX_PLATFORMS=cuda cannot be had")
    assert not (tmp_path / "run").exists()


ODD_WORLD = """
import socket, time
now, shift = time.time, [-365]  # days: what lies on the disk is of next year
time.time = lambda: now() + 86400 * shift[0]
def refuse(*_):
    raise AssertionError("it went to the network")
socket.socket.connect = refuse
"""


def test_an_odd_clock_and_home_and_no_network(source, tmp_path, straight_run):
    """In the second epoch the clock jumps back by ten years; no time is negative."""
    folder = tmp_path / "run"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    done = train(
        source,
        folder,
        fault=ODD_WORLD + at_step(12, "shift[0] -= 3650"),
        env={
            "TZ": "Pacific/Kiritimati",
            "HOME": "/proc/nowhere",  # cannot be written, and is not there
            "XDG_CACHE_HOME": str(cache),  # the same kernels, so the same bits
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "0",
        },
    )
    assert done.code == 0, done.err
    assert "on cpu" in done.out
    assert final(folder) == final(straight_run())
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    for epoch in map(json.loads, lines):
        assert 0 < epoch["seconds"] < TIME_LIMIT_S
        assert 0 < epoch["validation_seconds"] < TIME_LIMIT_S
        assert 0 <= epoch["wait_share"] <= 1
    result = json.loads((folder / "summary.json").read_text())["result"]
    for name in ("seconds", "startup_seconds", "startup_import_seconds"):
        assert 0 < result[name] < TIME_LIMIT_S, name


def test_without_a_home_programs_are_not_kept_and_it_is_said():
    """A folder that cannot be written; kept programs are no condition of a run."""
    code = (
        "from flax_lstm.environment import use_compilation_cache as use\nprint(use())"
    )
    environment = {**os.environ, "HOME": "/proc/nowhere", "JAX_PLATFORMS": "cpu"}
    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "None\n", done.stderr
    assert "cannot keep compiled programs in /proc/nowhere" in done.stderr
