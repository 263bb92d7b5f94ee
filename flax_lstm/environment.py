"""What a run ran on, for its record; and XLA's cache of compiled programs."""

import hashlib
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
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


class NoDeviceError(RuntimeError):
    """JAX has no device of the platform that it was told to use."""


def check_devices() -> None:
    """Starts JAX's backend, or says in one line why there is none.

    Raises:
      NoDeviceError: If there is none.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX 0.10 asserts, with no text
        wanted = jax.config.values.get("jax_platforms")
        why = (str(error).strip().splitlines() or ["none of them has a device here"])[0]
        raise NoDeviceError(
            f"JAX_PLATFORMS={wanted} cannot be had: {why}. Unset it to use what there "
            "is, or set it to cpu."
        ) from error


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


def code() -> dict[str, Any]:
    """Returns what must be the same in all processes that compute one thing."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return {
        "packages": {name: installed(name) for name in PACKAGES},
        "source": digest.hexdigest(),
        "x64": jax.dtypes.canonicalize_dtype("float64").name == "float64",
        "backend": jax.default_backend(),
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


class CompilationCacheWarning(UserWarning):
    """Compiled programs cannot be kept; they are compiled anew each time."""


def use_compilation_cache(folder: str | Path | None = None) -> Path | None:
    """Keeps compiled programs on disk, so that a second run starts sooner.

    Warns, and keeps none, where the folder cannot be written.

    Args:
      folder: Where to keep them. When None: what `JAX_COMPILATION_CACHE_DIR` says,
        else `flax-lstm/xla` in the user's cache folder.

    Returns:
      The folder in use; None where there is none.
    """
    chosen = jax.config.values.get("jax_compilation_cache_dir")
    if folder is not None:
        chosen = folder
    elif not chosen:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        chosen = Path(home) / "flax-lstm" / "xla"
    if "://" not in str(chosen):  # JAX takes addresses of object stores as well
        try:
            Path(chosen).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=chosen) as probe:
                probe.write(b"x")
        except OSError as error:
            warnings.warn(
                f"cannot keep compiled programs in {chosen}: {error.strerror}; every "
                "start compiles anew. Set JAX_COMPILATION_CACHE_DIR to a folder that "
                "can be written, or give --no-compilation-cache.",
                CompilationCacheWarning,
                stacklevel=2,
            )
            jax.config.update("jax_compilation_cache_dir", None)
            compilation_cache.reset_cache()
            return None
    jax.config.update("jax_compilation_cache_dir", str(chosen))
    # JAX looks for the folder once, when it first compiles; make it look again.
    compilation_cache.reset_cache()
    # What compiles in less than this is not worth a file.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return Path(chosen)
