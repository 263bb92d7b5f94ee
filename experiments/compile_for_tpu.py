"""Compiles the kernels for TPUs that are not there; see `compile_kernels.py`.

Costs    VLIW bundles of the innermost loop, which is one time step (one panel of one
         where the weights are streamed), and KiB of vector memory.
"""

import re
import subprocess
import sys
from collections import Counter
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

from kernel_cases import Case, lowered

# Of the TPU's compiler: name of the target, and of its topology.
TARGETS = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "v7x": "tpu7x:2x2x1",
}
COSTS = ("bundles", "vmem_kib")
# Its listings, by the name of the pass after which they are written.
BUNDLES, ALLOCATIONS = "final_bundles", "pre-finalize-registers-and-allocations"


def compiler(cache: Path) -> Path:
    """Returns the TPU's compiler, which it installs where it is missing."""
    wanted = next(
        line.split(";")[0].strip()
        for line in requires("jax") or []
        if line.startswith("libtpu")
    )
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    folder = cache / f"libtpu-jax{version('jax')}-{python}"
    library = folder / "libtpu" / "libtpu.so"
    if not library.exists():
        print(f"installing {wanted} into {folder}", flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--target", str(folder), wanted], check=True)
    return library


def made_with(cache: Path) -> str:
    """Returns name and version of the compiler, as the budgets record it."""
    (found,) = compiler(cache).parents[1].glob("libtpu-*.dist-info")
    return found.name.removesuffix(".dist-info")


def environment(cache: Path, dump: str) -> dict[str, str]:
    """Returns what a process needs that compiles and lists what it made in `dump`."""
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_LIBRARY_PATH": str(compiler(cache)),
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no device is opened
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true "
        f"--xla_jf_dump_llo_pass_label_regex=.*({BUNDLES}|{ALLOCATIONS}).*",
    }


def sharding(target: str) -> Any:
    """Returns what places an array on the device that is not there."""
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    found = topologies.get_topology_desc(platform="tpu", topology_name=TARGETS[target])
    return SingleDeviceSharding(found.devices[0])


def compiled(case: Case, place: Any, dump: Path) -> dict[str, Any]:
    """Compiles one case; returns its plan and its costs."""
    import jax.numpy as jnp
    from flax_lstm_kernels import tpu
    from flax_lstm_kernels.tpu.plan import Sizes, choose

    (device,) = place.device_set
    kind = device.device_kind
    backward = case.computes == "backward"
    plan, _ = choose(
        "backward" if backward else "forward",
        Sizes(
            case.T,
            case.B,
            0 if backward else case.I,
            case.H,
            jnp.dtype(case.dtype).itemsize,
            keep=case.computes != "inference",
        ),
        kind,
    )
    lowered(case, tpu, place, kind=kind, plan=plan).compile()
    text = " ".join(f"{name}={int(v)}" for name, v in plan._asdict().items())
    return {"plan": text} | costs(dump)


def costs(dump: Path) -> dict[str, int]:
    """Reads the compiler's listing of the kernel: bundles and vector memory.

    In it every bundle is a line, behind its address as many `>` as loops it stands in.
    """
    name = "flax_lstm"
    (final,) = [
        path
        for path in dump.glob(f"*{name}*{BUNDLES}.txt")
        if "schedule-analysis" not in path.name
    ]
    depths: Counter[int] = Counter()
    pattern = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s*[A-Z: ]*((?:> ?)*)\s*\{")
    for line in final.read_text(errors="replace").splitlines():
        if match := pattern.match(line):
            depths[match[1].count(">")] += 1
    (allocated,) = dump.glob(f"*{name}*{ALLOCATIONS}.txt")
    sizes = re.findall(
        r"space=vmem, size = (0x[0-9a-f]+)", allocated.read_text(errors="replace")
    )
    return {
        "bundles": depths[max(depths)],
        "vmem_kib": sum(int(size, 16) for size in sizes) >> 10,
    }
