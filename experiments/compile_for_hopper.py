"""Compiles the kernels for an H100 that is not there; see `compile_kernels.py`.

The compiler is the one inside JAX's CUDA plugin, with NVIDIA's ptxas for the last
step; both are installed beside the project, and need no driver and no device.
`h100_target.txt` tells XLA what it would ask the device.

Costs    Of all kernels that one call runs: registers of a thread and KiB of shared
         memory, those of the greediest; bytes spilled from registers to memory, the
         sum; instructions of the time loop (`sass.py`), the longest.
"""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kernel_cases import Case, least_steps, lowered
from sass import time_loop

TARGETS = {"h100": Path(__file__).with_name("h100_target.txt")}
COSTS = ("registers", "spill_bytes", "smem_kib", "instructions")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
SHARED = re.compile(r"dynamic_shared_memory_size %c(\d+)_i32")
# ptxas' warning where it cannot keep matrix products in flight: it waits for each.
SERIALIZED = "wgmma.mma_async instructions are serialized"


def compiler(cache: Path) -> Path:
    """Returns the folder of the CUDA compiler, which it installs where it is missing.

    NVIDIA's part is the newest of any CUDA 13: its packages are not tied to JAX's.
    """
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    folder = cache / f"cuda-jax{version('jax')}-{python}"
    if not (folder / "nvidia" / "cu13" / "bin" / "nvdisasm").exists():
        wanted = [f"jax-cuda13-{part}=={version('jax')}" for part in ("plugin", "pjrt")]
        wanted += [f"nvidia-{part}" for part in ("cuda-nvcc", "cuda-nvdisasm", "nvvm")]
        print(f"installing {' '.join(wanted)} into {folder}", flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        # --upgrade, for a folder that holds some of them is not added to.
        subprocess.run(
            [*pip, "--upgrade", "--target", str(folder), *wanted], check=True
        )
    return folder


def made_with(cache: Path) -> str:
    """Returns name and version of the compiler, as the budgets record it."""
    (found,) = compiler(cache).glob("nvidia_cuda_nvcc-*.dist-info")
    return found.name.removesuffix(".dist-info")


def environment(cache: Path, dump: str) -> dict[str, str]:
    """Returns what a process needs that compiles and lists what it made in `dump`."""
    folder = str(compiler(cache))
    paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(paths),
        "MOSAIC_GPU_DUMP_TO": dump,
    }


def sharding(target: str) -> Any:
    """Returns what places an array on the device that is not there."""
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    found = topologies.get_topology_desc(
        target, "cuda", target_config=TARGETS[target].read_text(), topology="1x1x1"
    )
    return SingleDeviceSharding(found.devices[0])


def compiled(case: Case, place: Any, dump: Path) -> dict[str, Any]:
    """Compiles one case, by the plan of its kernel; returns plan and costs.

    Raises:
      NotImplementedError: If the kernel cannot run at these sizes.
    """
    import jax.numpy as jnp
    from flax_lstm_kernels import gpu
    from flax_lstm_kernels.gpu.plan import PLANNERS, Sizes
    from flax_lstm_kernels.gpu.project import Cut

    if case.computes == "project":
        lowered(case, gpu, place).compile()
        least = least_steps(case) * case.B
        cut = Cut.of(least, case.I, jnp.dtype(case.dtype).itemsize)
        return {"plan": f"rows={cut.rows} vector={cut.vector}"} | costs(dump)
    backward = case.computes == "backward"
    sizes = Sizes(
        "backward" if backward else "forward",
        case.T,
        case.B,
        case.H,
        jnp.dtype(case.dtype).itemsize,
        keep=case.computes != "inference",
    )
    name: Any = case.kernel.split()[0]
    plan = PLANNERS[name](sizes)
    if isinstance(plan, str):
        raise NotImplementedError(plan)
    lowered(case, gpu, place, plan=plan).compile()
    text = " ".join(f"{name}={value}" for name, value in plan._asdict().items())
    # Inference has its inputs projected by a kernel with cases of its own.
    return {"plan": text} | costs(dump, but_for="gpu/project.py")


def costs(dump: Path, but_for: str = "nothing") -> dict[str, Any]:
    """Reads what was listed of every kernel.

    Args:
      dump: The folder with the lists.
      but_for: Source of a kernel that counts only by what it spills.

    Raises:
      ValueError: If nothing was, or ptxas serializes the matrix products.
    """
    kernels = sorted(dump.glob("*.ptxas"))
    if not kernels:
        raise ValueError("no kernel of ours was compiled")
    registers, spilled, shared, instructions = [], [], [], []
    for path in kernels:
        told = path.read_text()
        if SERIALIZED in told:
            raise ValueError(f"{path.stem}: {SERIALIZED}")
        spilled += [int(a) + int(b) for a, b in SPILLS.findall(told)]
        # The last of the passes has the constants that the launch is made with.
        passes = path.with_suffix(".mlir-passes.log").read_text(errors="replace")
        if but_for in passes:
            continue
        registers += [int(n) for n in re.findall(r"Used (\d+) registers", told)]
        shared.append(int(SHARED.findall(passes)[-1]))
        instructions.append(time_loop(path.with_suffix(".sass_ctrl").read_text()))
    return {
        "registers": max(registers),
        "spill_bytes": sum(spilled),
        "smem_kib": -(-max(shared) // 1024),
        "instructions": max(instructions),
    }
