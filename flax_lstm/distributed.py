"""Several processes that train one run together, over `jax.distributed`.

Every process runs the same program on its own devices, so all must come to the same
collectives in the same order. Here is what they tell each other beside those of the
training step: that they are all there, that they were asked for the same thing, and
that one of them cannot go on. Only process 0 writes and speaks; of a checkpoint each
writes its parts.
"""

import contextlib
import ctypes
import functools
import json
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int32

from flax_lstm.config import UserError
from flax_lstm.rollcall import roll_call

START_LIMIT_S = 120
"""Time that all processes have to come together."""
HEARTBEAT_S = 30
"""A process that was not heard of for so long counts as dead."""
GRACE_S = 2.0
"""Time that process 0 gives the others to end with it."""
ADDRESS = re.compile(r"[^\s:]+:[1-9]\d{0,4}")
ENVIRONMENT = ("JAX_PROCESS_ID", "JAX_NUM_PROCESSES")
"""Where the number of the process, and of all, are read when not given."""


class LostProcessError(RuntimeError):
    """Another process of the run has ended, or cannot be reached."""


class AloneWarning(UserWarning):
    """A cluster was to be detected, and there is none."""


def join(where: str, process: int | None = None, count: int | None = None) -> None:
    """Joins the processes of a run; before JAX looks for devices.

    Args:
      where: "off"; "auto", what JAX detects (Slurm, Open MPI, Cloud TPU, Kubernetes),
        and one process where it detects nothing; or HOST:PORT of process 0.
      process: Number of this process, for HOST:PORT; JAX_PROCESS_ID when None.
      count: Number of processes, likewise; JAX_NUM_PROCESSES when None.

    Raises:
      UserError: If the numbers are missing, do not fit together, or are given where
        they would be ignored.
      ConnectionError: If not all processes came in time.
    """
    if where in ("off", "auto") and (process, count) != (None, None):
        raise UserError(
            "process_id and process_count are for distributed = HOST:PORT; with "
            f"{where} they would be ignored. Give --distributed HOST:PORT of process "
            "0, or leave them out."
        )
    if where == "off":
        return
    # JAX's would take SIGTERM away from this process, and tell of it at a step only.
    jax.config.update("jax_enable_preemption_service", False)
    limits: dict[str, Any] = {
        "initialization_timeout": START_LIMIT_S,
        "heartbeat_timeout_seconds": HEARTBEAT_S,
        # A process that fails leaves without this; see `leave`.
        "shutdown_timeout_seconds": HEARTBEAT_S,
    }
    if where == "auto":
        say_on_abort(
            f"not all processes of the detected cluster came within {START_LIMIT_S} s; "
            "see the logs of the others."
        )
        try:
            jax.distributed.initialize(**limits)
        except ValueError as error:
            # JAX's words where it detects no cluster.
            if "coordinator_address should be defined" not in str(error):
                raise UserError(f"cannot join the detected cluster: {error}") from error
            warnings.warn(
                "JAX detects no cluster; this process works alone.",
                AloneWarning,
                stacklevel=2,
            )
            return
    else:
        if not ADDRESS.fullmatch(where):
            raise UserError(
                f"distributed must be auto, off or HOST:PORT; got {where!r}."
            )
        process = _number("process_id", ENVIRONMENT[0], process)
        count = _number("process_count", ENVIRONMENT[1], count)
        if not 0 <= process < count:
            raise UserError(
                f"process_id must be below process_count; got {process} of {count}."
            )
        roll_call(where, process, count, START_LIMIT_S)
        say_on_abort(f"process {process} of {count} lost the others at {where}.")
        jax.distributed.initialize(
            where, count, process, cluster_detection_method="deactivate", **limits
        )
    say_on_abort(LOST)


def _number(name: str, variable: str, given: int | None) -> int:
    """Returns what was given, or what the environment says."""
    if given is not None:
        return given
    said = os.environ.get(variable, "")
    if not said.isdecimal():
        raise UserError(
            f"distributed = HOST:PORT needs --{name.replace('_', '-')}, or {variable} "
            f"in the environment, a whole number; got {said!r}."
        )
    return int(said)


def several() -> bool:
    """Says whether this process is one of several."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Says whether this is the process that writes and speaks."""
    return jax.process_index() == 0


def place() -> tuple[int, int]:
    """Returns the number of this process, and how many there are."""
    return jax.process_index(), jax.process_count()


def gather_bytes(said: bytes) -> list[bytes]:
    """Returns the bytes of every process, by its number. All must call it."""
    if not several():
        return [said]
    mine = np.frombuffer(said, np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array(mine.size)))
    padded = np.zeros(_width(sizes), np.uint8)
    padded[: mine.size] = mine
    all_said = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:size].tobytes() for row, size in zip(all_said, sizes, strict=True)]


def gather(value: Any) -> list[Any]:
    """Returns the plain JSON data of every process, by its number. All must call it."""
    if not several():
        return [value]
    return [json.loads(said) for said in gather_bytes(json.dumps(value).encode())]


def exchange(given: Sequence[Int32[np.ndarray, "_"]]) -> list[Int32[np.ndarray, "_"]]:
    """Gives process k the k-th of some arrays; returns what each gives to this one.

    All must call it. What goes to others is not held here: each device gets what is for
    its process.
    """
    if not several():
        return list(given)
    process, count = place()
    sizes = np.array(gather([len(one) for one in given]))
    width = _width(sizes)
    padded = np.zeros((1, count, width), np.int32)
    for k, one in enumerate(given):
        padded[0, k, : len(one)] = one
    swap, where = _swap()
    sent = jax.make_array_from_process_local_data(where, padded, (count, count, width))
    got = np.asarray(swap(sent).addressable_data(0))
    return [got[k, 0, : sizes[k, process]] for k in range(count)]


def _width(sizes: np.ndarray) -> int:
    """Returns a width for all: an eighth more at the most, so that few are compiled."""
    most = max(int(sizes.max()), 1024)
    unit = 1 << (most.bit_length() - 4)
    return -(-most // unit) * unit


@functools.cache  # compiled once for each width
def _swap() -> tuple[Callable, NamedSharding]:
    """Returns what swaps the first two axes over processes, and where they lie."""
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    by_process = np.array(devices).reshape(jax.process_count(), -1)
    mesh = Mesh(by_process, ("process", "device"))
    rows, columns = PartitionSpec("process"), PartitionSpec(None, "process")
    swap = jax.shard_map(
        lambda x: lax.all_to_all(x, "process", split_axis=1, concat_axis=0, tiled=True),
        mesh=mesh,
        in_specs=rows,
        out_specs=columns,
    )
    return jax.jit(swap), NamedSharding(mesh, rows)


def from_first(value: Any) -> Any:
    """Returns the plain JSON data of process 0. All must call it."""
    return gather(value)[0]


def agree(**facts: Any) -> None:
    """Refuses to go on where the processes differ. All must call it.

    Args:
      facts: Plain JSON data that must be the same everywhere.

    Raises:
      UserError: In every process; names one that differs, in what, and both values.
    """
    first, *others = gather(facts)
    for number, other in enumerate(others, 1):
        found = difference(first, other)
        if found:
            name, one, two = found
            raise UserError(
                f"process {number} differs from process 0 in {name}: {two!r:.200} "
                f"there, {one!r:.200} here at 0. Give all processes the same "
                "configuration, code and data."
            )


def difference(one: Any, other: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Returns the dotted name of the first difference of JSON data, and both values.

    >>> difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}})
    ('a.c', 2, 3)
    """
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            below = f"{name}.{key}" if name else key
            found = difference(one.get(key), other.get(key), below)
            if found:
                return found
        return None
    return None if one == other else (name, one, other)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Makes the error of one process that of all. All must come to it.

    Inside it there may be no collective: a process that has failed comes to none.
    """
    if not several():
        yield
        return
    try:
        yield
    except Exception as error:  # whatever it is, the others have to be told
        gather(str(error) or type(error).__name__)
        raise
    failed = {n: said for n, said in enumerate(gather(None)) if said is not None}
    if failed:
        number, said = next(iter(failed.items()))
        raise UserError(f"process {number} of {place()[1]}: {said}")


def barrier(name: str) -> None:
    """Returns once all processes have come here."""
    if several():
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """Says in words that a collective failed because of another process.

    Raises:
      LostProcessError: In place of the error of the collective.
    """
    try:
        yield
    except UserError:  # ours, whatever words it has
        raise
    except Exception as error:  # a checkpoint's barrier is wrapped by its own error
        chain = [error, error.__cause__, error.__context__]
        text = " ".join(str(one) for one in chain if one is not None)
        if several() and any(sign in text for sign in SIGNS):
            raise LostProcessError(LOST) from error
        raise


LOST = (
    "another process of the run has ended or cannot be reached, so this one ends too; "
    "see what the other said. Go on with `flax-lstm train --resume`, on as many "
    "processes as there are; where the run folder is not there yet, start again."
)
SIGNS = ("Gloo", "NCCL", "oordination service", "closed by peer", "heartbeat")
"""Words of collectives that failed because of another process."""

_handlers: list[Any] = []
"""Kept alive: C does not know that Python would free them."""


def say_on_abort(message: str) -> None:
    """Lets this process end with a message and exit code 1 where XLA aborts it.

    JAX's client of the coordination service aborts a process when another one is lost,
    whatever Python does: no handler of Python's own would be run any more.
    """
    words = f"flax-lstm: {message}\n".encode()

    def say(number: int) -> None:
        os.write(2, words)
        os._exit(1)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(say)
    _handlers.append(handler)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, type(handler))
    libc.signal.restype = ctypes.c_void_p
    libc.signal(int(signal.SIGABRT), handler)


def leave(code: int) -> None:
    """Ends a process that failed among several, at once.

    A normal end would wait for the others, which wait for this one.
    """
    if code and jax.distributed.is_initialized() and several():
        if is_first():  # which the others need to end as they want, if they now do
            time.sleep(GRACE_S)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # closed: nothing to save
                stream.flush()
        os._exit(code)
