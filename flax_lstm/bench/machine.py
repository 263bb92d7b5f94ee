"""What the numbers were taken on: device, processor, threads, versions, commit."""

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import jax

from flax_lstm.environment import commit, installed

VARIABLES = (
    "XLA_FLAGS",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "NPROC",
)
"""Variables that change what is measured; recorded where they are set."""


def threads() -> int:
    """Returns the number of threads that XLA computes with on the CPU.

    Counts them on Linux; elsewhere, the CPUs of the machine. Fewer are had by starting
    the process on fewer, as `taskset -c 0` does.
    """
    if "--xla_cpu_multi_thread_eigen=false" in os.environ.get("XLA_FLAGS", ""):
        return 1
    jax.devices()  # starts them
    tasks = Path("/proc/self/task")
    if tasks.is_dir():
        names = [_name(task) for task in tasks.iterdir()]
        found = sum(name.startswith("tf_XLAEigen") for name in names)
        return found or len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _name(task: Path) -> str:
    try:
        return (task / "comm").read_text()
    except OSError:  # it ended meanwhile
        return ""


def processor() -> str:
    """Returns the name of the processor and the number of CPUs that may be used."""
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        named = [line.split(":", 1)[1] for line in lines if "model name" in line]
        name = named[0].strip() if named else name
    usable = getattr(os, "sched_getaffinity", None)
    return f"{name} x{len(usable(0)) if usable else os.cpu_count()}"


def provenance() -> dict[str, Any]:
    """Returns what every row of a run says of where it comes from."""
    described = commit()
    return {
        "device": f"{jax.default_backend()} {jax.devices()[0].device_kind}",
        "processor": processor(),
        "threads": threads(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": installed("jaxlib"),
        "flax": installed("flax"),
        "commit": None if described is None else described.removesuffix("+"),
        "dirty": None if described is None else described.endswith("+"),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def surroundings(freed_memory_kept: bool = False) -> dict[str, Any]:
    """Returns what else may have changed the numbers: load, variables, platform."""
    load = os.getloadavg() if hasattr(os, "getloadavg") else (None,) * 3
    return {
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "load_1min": load[0],
        "freed_memory_kept": freed_memory_kept,
        "variables": {
            name: os.environ[name] for name in VARIABLES if name in os.environ
        },
    }
