"""What a run ran on, for its record; and XLA's cache of compiled programs."""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

PACKAGES = (
    "flax-lstm",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "datasets",
    "tokenizers",
    "numpy",
)


def describe(devices: Sequence[Any]) -> dict[str, Any]:
    """Returns versions, devices, Python, commit and command of this process."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "folder": os.getcwd(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "devices": [f"{device.platform} {device.device_kind}" for device in devices],
        "packages": {name: installed(name) for name in PACKAGES},
        "commit": commit(),
        "x64": jax.dtypes.canonicalize_dtype("float64").name == "float64",
    }


def installed(name: str) -> str | None:
    """Returns the version of an installed distribution, None where there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """Returns the commit this package is a checkout of, with `+` when it was changed.

    None where it is not a checkout, or git is not there.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        lines = subprocess.run(
            ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None


def use_compilation_cache(folder: str | Path | None = None) -> Path:
    """Keeps compiled programs on disk, so that a second run starts sooner.

    Args:
      folder: Where to keep them. When None: what `JAX_COMPILATION_CACHE_DIR` says,
        else `flax-lstm/xla` in the user's cache folder.

    Returns:
      The folder in use.
    """
    chosen = jax.config.values.get("jax_compilation_cache_dir")
    if folder is not None:
        chosen = folder
    elif not chosen:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        chosen = Path(home) / "flax-lstm" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(chosen))
    # JAX looks for the folder once, when it first compiles; make it look again.
    compilation_cache.reset_cache()
    # What compiles in less than this is not worth a file.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return Path(chosen)
