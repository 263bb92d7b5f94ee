"""Do the kernels compile for the accelerators that are not here, and what do they cost?

Compiles each kernel ahead of time with the vendor's own compiler, on any machine, and
counts what it made of it: VLIW bundles of the innermost loop, which is one time step
(one panel of one where the weights are streamed), and bytes of vector memory. Both are
the same at every run; `kernels/budgets.csv` holds them, and a kernel that exceeds its
row by more than 5 % fails, as does one that does not compile.

    python experiments/compile_kernels.py                  compare with the budgets
    python experiments/compile_kernels.py --write          set the budgets anew
    python experiments/compile_kernels.py --only v5e

The TPU's compiler, libtpu in the version that the installed JAX names, is installed
into `--cache` at the first use (1.3 GB): $FLAX_LSTM_COMPILERS, else
flax-lstm/compilers in the user's cache folder.
"""

import argparse
import csv
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BUDGETS = ROOT / "kernels" / "budgets.csv"
SLACK = 1.05
KEY = ("target", "kernel", "dtype", "T", "B", "I", "H")
COSTS = ("bundles", "vmem_kib")
# Listings of the TPU's compiler, by the name of the pass after which they are written.
BUNDLES, ALLOCATIONS = "final_bundles", "pre-finalize-registers-and-allocations"


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel at one shape; `kernel` is "forward" or "backward"."""

    kernel: str
    dtype: str
    T: int
    B: int
    I: int  # noqa: E741 the name of the axis everywhere in the project
    H: int


def cases() -> list[Case]:
    """Sizes at which weights stay, and are streamed, on some target or other."""
    shapes = (
        ("bfloat16", (1024, 16, 256, 256)),
        ("float32", (40, 3, 5, 130)),  # nothing fits the lanes
        ("bfloat16", (244, 256, 300, 128)),
        ("bfloat16", (64, 64, 512, 512)),
        ("bfloat16", (128, 128, 1024, 1024)),
        ("bfloat16", (64, 64, 256, 2048)),
        ("float32", (64, 64, 256, 2048)),
    )
    return [
        Case(kernel, dtype, *shape)
        for dtype, shape in shapes
        for kernel in ("forward", "backward")
    ]


# Of the TPU's compiler: name of the target, and of its topology.
TPUS = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "v7x": "tpu7x:2x2x1",
}


def libtpu(cache: Path) -> Path:
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


def run_tpu(target: str, chosen: list[Case], cache: Path) -> list[dict[str, Any]]:
    """Compiles for one TPU in a process of its own, for it loads the library once."""
    library = libtpu(cache)
    (installed,) = library.parents[1].glob("libtpu-*.dist-info")
    made = {
        "jax": version("jax"),
        "compiler": installed.name.removesuffix(".dist-info"),
    }
    with tempfile.TemporaryDirectory() as dump:
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "TPU_LIBRARY_PATH": str(library),
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no device is opened
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true "
            f"--xla_jf_dump_llo_pass_label_regex=.*({BUNDLES}|{ALLOCATIONS}).*",
        }
        asked = json.dumps(
            [TPUS[target], dump, [dataclasses.astuple(c) for c in chosen]]
        )
        process = subprocess.Popen(
            [sys.executable, __file__, "--child-tpu", asked],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        rows = []
        for line in process.stdout or ():
            if line.startswith("{"):
                rows.append(made | {"target": target} | json.loads(line))
                report(rows[-1])
        if process.wait():
            raise SystemExit(f"compiling for {target} ended with {process.returncode}")
    return rows


def child_tpu(topology: str, dump: str, chosen: list[list[Any]]) -> None:
    """Compiles in this process; prints a row for each case."""
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    device = found.devices[0]
    sharding = SingleDeviceSharding(device)
    for case in (Case(*values) for values in chosen):
        row = dataclasses.asdict(case) | {"kind": device.device_kind}
        for old in Path(dump).iterdir():
            old.unlink()
        try:
            row["plan"] = compile_tpu(case, device.device_kind, sharding)
            row |= costs_tpu(Path(dump))
        except (RuntimeError, ValueError) as error:  # as lowering and compiler raise
            row["error"] = f"{type(error).__name__}: {str(error)[:2000]}"
        print(json.dumps(row), flush=True)


def compile_tpu(case: Case, kind: str, sharding: Any) -> str:
    """Compiles one case for a device; returns its plan."""
    import jax
    import jax.numpy as jnp
    from flax_lstm_kernels import tpu
    from flax_lstm_kernels.tpu.plan import Sizes, choose

    dtype = jnp.dtype(case.dtype)

    def like(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    rows, hidden = case.B, case.H
    state = like(rows, hidden)
    masks = like(rows, dtype=jnp.int32), like(case.T, rows, dtype=jnp.uint8)
    recurrent = like(hidden, 4 * hidden, dtype=dtype)
    backward = case.kernel == "backward"
    sizes = Sizes(
        case.T,
        rows,
        0 if backward else case.I,
        hidden,
        dtype.itemsize,
        keep=True,
    )
    plan, _ = choose("backward" if backward else "forward", sizes, kind)
    if backward:
        arguments = (
            like(case.T, rows, hidden),
            state,
            state,
            like(case.T, rows, 4 * hidden),
            like(case.T, rows, hidden),
            recurrent,
            *masks,
        )

        def call(*arrays):
            return tpu.backward(*arrays, reverse=False, kind=kind, plan=plan)

    else:
        arguments = (
            like(case.T, rows, case.I, dtype=dtype),
            like(case.I, 4 * hidden, dtype=dtype),
            recurrent,
            like(4 * hidden, dtype=dtype),
            state,
            like(rows, hidden, dtype=dtype),
            *masks,
        )

        def call(*arrays):
            return tpu.forward(*arrays, reverse=False, keep=True, kind=kind, plan=plan)

    jax.jit(call).lower(*arguments).compile()
    return " ".join(f"{name}={int(v)}" for name, v in plan._asdict().items())


def costs_tpu(dump: Path) -> dict[str, int]:
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


# A Hopper target is a further entry: a function (target, cases, cache) -> rows.
TARGETS = dict.fromkeys(TPUS, run_tpu)


def report(row: dict[str, Any]) -> None:
    case = " ".join(str(row[name]) for name in KEY)
    told = row.get("error") or ", ".join(f"{row[cost]} {cost}" for cost in COSTS)
    print(f"{case}: {told}", flush=True)


def judged(rows: list[dict[str, Any]], budgets: list[dict[str, str]]) -> list[str]:
    """Returns what is wrong: rows above their budget, without one, or not compiled."""
    allowed = {tuple(row[name] for name in KEY): row for row in budgets}
    wrong = []
    for row in rows:
        key = tuple(str(row[name]) for name in KEY)
        budget = allowed.get(key)
        if "error" in row:
            wrong.append(f"{' '.join(key)}: does not compile")
        elif budget is None:
            wrong.append(f"{' '.join(key)}: has no row in {BUDGETS.name}; use --write")
        else:
            wrong += [
                f"{' '.join(key)}: {row[cost]} {cost}, budget {budget[cost]}"
                for cost in COSTS
                if row[cost] > SLACK * int(budget[cost])
            ]
    return wrong


def write(rows: list[dict[str, Any]]) -> None:
    """Puts the rows in the place of those of the same cases."""
    fields = [*KEY, *COSTS, "plan", "jax", "compiler"]
    table = {tuple(str(row[name]) for name in KEY): row for row in [*read(), *rows]}
    order = list(TARGETS)
    with BUDGETS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(
            file, fields, lineterminator="\n", extrasaction="ignore"
        )
        writer.writeheader()
        writer.writerows(sorted(table.values(), key=lambda r: order.index(r["target"])))


def read() -> list[dict[str, str]]:
    if not BUDGETS.exists():
        return []
    with BUDGETS.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = os.environ.get("FLAX_LSTM_COMPILERS") or home / "flax-lstm" / "compilers"
    parser.add_argument("--cache", type=Path, default=Path(cache))
    parser.add_argument("--only", choices=TARGETS, action="append")
    parser.add_argument("--kernel", help="only the cases whose text contains this")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--child-tpu", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child_tpu:
        child_tpu(*json.loads(options.child_tpu))
        return
    chosen = [case for case in cases() if (options.kernel or "") in str(case)]
    rows = []
    for target in options.only or TARGETS:
        made = TARGETS[target](target, chosen, options.cache)
        if options.write:
            write([row for row in made if "error" not in row])
        rows += made
    found = judged(rows, read())
    print("\n".join(found) or f"{len(rows)} kernels within their budgets")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
