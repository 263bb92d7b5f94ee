"""Runs in processes of their own, into which faults are injected.

A child runs the command line, after a piece of Python that puts the fault in place. All
children share one cache of compiled programs (the fixture `compilation_cache`), and
most are forks of a process that has imported the package (`warm.py`), so that one costs
two seconds of a core or so.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import warm

TIME_LIMIT_S = 240
"""Nothing here takes a tenth of it; a child that hangs is a failure."""

TINY = (
    *("--features", "5", "--embedding-size", "4", "--embedding-scale", "0.5"),
    *("--buckets", "1", "--max-length", "8", "--batch-size", "8", "--epochs", "4"),
    *("--learning-rate", "0.1", "--dropout", "0.1", "--patience", "None"),
)
"""Eight steps in each of four epochs on the texts of the fixture `source`. AdamW, a
falling rate, and dropout: optimiser, step and key all matter."""
STEPS, BATCHES = 32, 8
"""Of such a run, and of an epoch of it."""

EVERY = ("--save-every", "5")
"""Steps between checkpoints: prime to the steps of an epoch, so that they fall on
different places of it."""

CARRIED = (
    *("--pipeline", "tutorial", "--carry-state", "--pooling", "last"),
    *("--optimizer", "adadelta", "--test-with", "last"),
)
"""The tutorial's ways: a state is carried from batch to batch."""

LISTEN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
"""
"""What a shell starts in the background, as CI's lanes are, ignores Ctrl-C; and under
`nohup` a hang-up."""

MAIN = "import sys\nfrom flax_lstm.cli import main\nsys.exit(main())"


class Ended(NamedTuple):
    """How a child ended: its exit code and what it said.

    Attributes:
      code: Exit code; the negative number of the signal that killed it.
      out: Standard output.
      err: Standard error.
    """

    code: int
    out: str
    err: str

    def message(self) -> str:
        """Returns the last line said, after checking that all of it is readable.

        Ten lines at most, and no traceback.
        """
        lines = self.err.strip().splitlines()
        assert lines, "nothing was said"
        assert len(lines) <= 10, self.err
        assert "Traceback" not in self.err, self.err
        return lines[-1]


def start(*argv: str, fault: str = "", **options: Any) -> subprocess.Popen | warm.Fork:
    """Starts the command line in a process of its own; a new one, where it matters.

    Args:
      argv: Arguments of `flax-lstm`.
      fault: Python to run before the command line.
      options: Of `subprocess.Popen`; `env` is put over the environment.
    """
    environment = {**os.environ, "COLUMNS": "100", "JAX_PLATFORMS": "cpu"}
    changes = options.pop("env", {})
    environment.update(changes)
    code = f"{LISTEN}\n{fault}\n{MAIN}"
    if changes.keys() <= {"JAX_NUM_CPU_DEVICES"} and options.keys() <= {"cwd"}:
        return warm.start(code, argv, environment, options.get("cwd", "."))
    return subprocess.Popen(
        [sys.executable, "-c", code, *argv],
        stdin=subprocess.DEVNULL,
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=options.pop("stderr", subprocess.PIPE),
        text=True,
        env=environment,
        **options,
    )


def end(process: subprocess.Popen | warm.Fork) -> Ended:
    """Waits for a child and returns how it ended; one that hangs is killed."""
    try:
        out, err = process.communicate(timeout=TIME_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"it hung; it said:\n{out}\n{err}") from None
    return Ended(process.wait(), out, err)


def run(*argv: str, fault: str = "", **options: Any) -> Ended:
    """Runs the command line in a process of its own to its end."""
    return end(start(*argv, fault=fault, **options))


def train(
    source: Path, folder: Path, *argv: str, fault: str = "", **options: Any
) -> Ended:
    """Trains the tiny run in `folder`; for the first time, or with `--resume`."""
    return run(*train_argv(source, folder, *argv), fault=fault, **options)


def train_argv(source: Path, folder: Path, *argv: str) -> Sequence[str]:
    """Returns the arguments of the tiny run, with those given put over them."""
    pairs = zip(TINY[::2], TINY[1::2], strict=True)
    tiny = [word for pair in pairs if pair[0] not in argv for word in pair]
    return ["train", "--data", str(source), "--out", str(folder), *tiny, *argv]


def at_step(step: int, action: str, *, after: bool = False) -> str:
    """Returns a fault: an action before (or after) the n-th step of the process.

    Args:
      step: Counted from 1, from where the process starts or resumes.
      action: Python statements on one line. `state` and `batch` are what the step is
        given, and `os`, `signal` are imported.
      after: Acts when the step has been computed.
    """
    before, behind = ("", action) if after else (action, "")
    return f"""
import os, signal
import jax
import flax_lstm.run
compiled, taken = flax_lstm.run.parallelize, 0
def with_fault(*args, **kwargs):
    program = compiled(*args, **kwargs)
    def step(state, batch):
        global taken
        taken += 1
        if taken == {step}:
            {before or "pass"}
        result = program.step(state, batch)
        if taken == {step}:
            jax.block_until_ready(result)
            {behind or "pass"}
        return result
    return program._replace(step=step)
flax_lstm.run.parallelize = with_fault
"""


SAVED_AT_ONCE = """
import flax_lstm.checkpoint
begin = flax_lstm.checkpoint.Checkpoints.save
def saved(self, *args, **kwargs):
    begin(self, *args, **kwargs)
    self.wait()
flax_lstm.checkpoint.Checkpoints.save = saved
"""
"""Put before a fault, so that it meets no save that is still under way."""

FIRST_IS_BEST = """
import flax_lstm.epochs
measured = flax_lstm.epochs.Trainer.evaluate
def as_the_first(self, state, part):
    found = measured(self, state, part)
    return found if part == "test" else {**found, "accuracy": 0.5, "loss": 1.0}
flax_lstm.epochs.Trainer.evaluate = as_the_first
"""
"""No fault: every validation gives the same, so that the first epoch stays the best.

In the tiny run each epoch is better than the one before, and nothing would tell a lost
best one from the last.
"""

KILL = "os.kill(os.getpid(), signal.SIGKILL)"
"""An action: dies at once, as from the out-of-memory killer."""

NOTE = """
def note(state, path):
    import jax, numpy as np
    arrays = {}
    for keys, leaf in jax.tree.leaves_with_path(state):
        name = jax.tree_util.keystr(keys)
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        arrays[name] = np.asarray(leaf)
        for part in leaf.addressable_shards:
            np.testing.assert_array_equal(part.data, arrays[name][part.index], name)
    np.savez(path, **arrays)
"""
"""Put before a fault, whose action may be `note(state, PATH)`: keeps what a state is on
its devices, for `noted`."""

COMPILING = """
import os, signal, sys, threading, time
import flax_lstm.run
from flax_lstm.startup import Startup
compiled, started = flax_lstm.run.parallelize, []
def act():
    time.sleep(0.7)
    {action}
def with_fault(*args, **kwargs):
    program = compiled(*args, **kwargs)
    def step(state, batch):
        if not started:
            started.append(1)
            threading.Thread(target=act).start()
        return program.step(state, batch)
    return program._replace(step=step)
flax_lstm.run.parallelize = with_fault
first_step = Startup.first_step
def told(self):
    if self.seconds is None:
        sys.stderr.write("a step was taken\\n")
    first_step(self)
Startup.first_step = told
"""
"""A fault: an action in a thread of its own, while the first step is being compiled.

To be filled in by `format`. A child that keeps no compiled programs takes seconds for
that, and says when it is done.
"""

TIMES = ("seconds", "tokens_per_second", "validation_seconds", "wait_share")
"""Of the record of an epoch, what no two runs have in common."""


def newest(folder: Path) -> Path:
    """Returns the newest checkpoint of a run."""
    steps = [p for p in (folder / "checkpoints").iterdir() if p.name.isdigit()]
    return max(steps, key=lambda path: int(path.name))


def final(folder: Path) -> dict[str, Any]:
    """Returns what must be equal, to the bit, however a run got to its end.

    The SHA-256 of every leaf of the newest checkpoint (parameters, optimiser, key,
    step, carried state), the records of all epochs, the result of the test, and which
    epoch was the best and which was tested.
    """
    last = newest(folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    result = json.loads((folder / "summary.json").read_text())["result"] or {}
    return {
        "step": int(last.name),
        "leaves": json.loads((last / "meta" / "metadata").read_text())["leaves"],
        "epochs": [
            {name: v for name, v in one.items() if name not in TIMES} for one in records
        ],
        **{name: result.get(name) for name in ("test", "best_epoch", "tested_epoch")},
    }


def noted(path: Path) -> dict[str, np.ndarray]:
    """Returns the leaves of a state that was noted, by name."""
    with np.load(path) as file:
        return dict(file)


def resumed_as_straight(
    source: Path, folder: Path, straight: Path, *argv: str, fault: str = ""
) -> None:
    """Resumes a run, which must end with the bits of the one without a break."""
    resumed = train(source, folder, *argv, "--auto-resume", fault=fault)
    assert resumed.code == 0, resumed.err
    assert "skipped" not in resumed.err  # no checkpoint was damaged
    assert final(folder) == final(straight)
    assert final(folder)["step"] == STEPS
    assert not list((folder / "checkpoints").glob("*tmp*"))
