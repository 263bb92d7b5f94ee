"""What the kernels do on an H100: are they right, how fast, and next to whom?

    python experiments/h100.py                  on the machine; needs no network
    python experiments/h100.py --dry            tiny and interpreted, on any machine
    python experiments/h100.py --parts numbers-single-64 race-bfloat16
    python experiments/h100.py --plot           draws the races on disk, where
                                                matplotlib is

Every part is a process of its own with a time limit, so that a kernel that hangs costs
its own part alone; most of the numbers are had at once. All end within `--minutes`.
What a part finds is on disk when it has found it:

    environment.json     device, driver, versions, commit
    numbers-*.csv        every kernel against float64: values and gradients
    race-*/results.csv   time against torch's cuDNN, JAX's, Flax's scan and our "xla":
                         columns as those of `flax-lstm bench`, with the share of what
                         the chip allows, measured in the same run; and plots/
    micro.csv            the operations that a step waits for (`h100_micro.py`)
    pieces.csv           inference in more and in fewer pieces (`h100_pieces.py`)
    targets.csv          what was asked of the kernels, and what was seen

"float32" means products of tf32 operands, for all that take part; the part
`race-exact` switches them off.
"""

# Imports what need not be installed.
# pyright: reportMissingImports=false

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h100_targets

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(Path(__file__).parent)]
RESULTS = Path(__file__).parent / "results" / "h100"
NUMBERS = (
    *("numbers-single-64", "numbers-single-128", "numbers-single-100"),
    *("numbers-cluster-256", "numbers-cluster-512", "numbers-step-2000"),
)
STAGES = (
    (60, ("environment",)),
    (120, NUMBERS),  # mostly compiling: together they take the machine's cores
    (60, ("numbers-grid-1000",)),  # which wants the device for itself
    (40, ("numbers-grid-640",)),
    (170, ("race-bfloat16",)),
    (170, ("race-float32",)),
    (60, ("micro",)),
    (60, ("pieces",)),
    (90, ("race-float16",)),
    (90, ("race-exact",)),
)
"""Seconds, and the parts that run at once for so long; in the order of their weight."""
PARTS = [name for _, names in STAGES for name in names]
DRY_LIMITS = 4  # times as long for what is interpreted


def race_shapes(dry: bool) -> list[Any]:
    """Returns the shapes of the targets; in a dry run tiny ones of the same names."""
    from flax_lstm.bench.shapes import SHAPES, Shape

    shapes = [
        SHAPES["tutorial-244-1"],
        SHAPES["tutorial-244-2"],
        Shape("batch-512", 64, 512, 512, 512, "many rows, H 512"),
        Shape("stream-16", 16, 1024, 256, 256, "few rows, long"),
        Shape("batch-1024", 128, 1024, 1024, 1024, "many rows, H 1024"),
        Shape("row-1024", 1, 2048, 1024, 1024, "one row, H 1024", modes=("forward",)),
    ]
    if dry:
        shapes = [dataclasses.replace(s, batch=2, steps=3, inputs=8) for s in shapes]
        shapes = [dataclasses.replace(s, hidden=64) for s in shapes[:2]]
    return shapes


def environment_part(out: Path, dry: bool) -> None:
    """Writes what the machine is; fails where it is no Hopper."""
    import jax

    from flax_lstm import environment

    found = environment.describe(jax.devices())
    query = "name,driver_version,memory.total,clocks.max.sm,mig.mode.current"
    for name, command in (
        ("nvidia_smi", ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]),
        ("torch", [sys.executable, "-c", TORCH]),
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=50)
            found[name] = done.stdout.strip() or done.stderr.strip()[-300:]
        except OSError as error:
            found[name] = str(error)
    (out / "environment.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    kind = jax.devices()[0].device_kind
    if not dry and not any(name in kind for name in ("H100", "H200", "GH200")):
        raise SystemExit(f"needs a Hopper GPU (H100, H200); the device is {kind}")


TORCH = (
    "import torch; print(torch.__version__, torch.version.cuda, "
    "torch.backends.cudnn.version())"
)


def micro_part(out: Path, dry: bool) -> None:
    """Times the operations that a step waits for."""
    import h100_micro

    rows = []
    for micro in h100_micro.micros():
        if dry:
            micro.make(1)  # only its definition: no interpreter runs all of them
            print(f"{micro.name} {micro.size} {micro.unit}: defined")
            continue
        rows.append(h100_micro.measure(micro))
        print(json.dumps(rows[-1]), flush=True)
        h100_targets.write_csv(out / "micro.csv", rows)


def pieces_part(out: Path, dry: bool) -> None:
    """Times inference in more and in fewer pieces of time."""
    import h100_pieces

    h100_pieces.pieces_part(race_shapes(dry), out, dry)


def race_part(dtype: str, out: Path, dry: bool, *, exact: bool = False) -> None:
    """Times ours against the others in one dtype."""
    import jax
    from rich.console import Console

    from flax_lstm.bench.main import race
    from flax_lstm.bench.options import BenchOptions
    from flax_lstm.bench.peers import catalogue

    names = ["ours-pallas", "ours-xla", "torch", "linen-optimized"]
    shapes = race_shapes(dry)
    if dtype == "float32" and not dry:  # JAX asks cuDNN for sizes: only where it is
        names += ["ours-cudnn", "jax-cudnn"]
    if exact:
        forbid_tf32()
        names.remove("ours-pallas")
    if exact or dtype == "float16":
        names.remove("linen-optimized")
        shapes = [s for s in shapes if s.name in ("tutorial-244-1", "stream-16")]
    if not dry and jax.default_backend() != "gpu":
        raise SystemExit(f"needs a CUDA device; JAX runs on {jax.default_backend()}")
    known = catalogue.implementations()
    options = BenchOptions(
        dtypes=(dtype,), rounds=5, budget_s=0.0 if dry else 1.0, out=out, smoke=dry
    )
    race(options, shapes, [known[name] for name in names], Console(width=124))


def forbid_tf32() -> None:
    """Asks JAX, and torch where it is there, for products of whole float32."""
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        import torch
    except ImportError:
        return  # the race lists it as missing
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def interpreted() -> contextlib.AbstractContextManager[Any]:
    """Has the kernels interpreted, as on an H100, wherever this runs."""
    from flax_lstm_kernels import target

    return target.on("cuda", "9.0", interpret=True)


def run_part(name: str, out: Path, dry: bool) -> None:
    """Runs one part in this process."""
    import h100_numbers

    parts: dict[str, Callable[[], None]] = {
        "environment": lambda: environment_part(out, dry),
        "micro": lambda: micro_part(out, dry),
        "pieces": lambda: pieces_part(out, dry),
        "race-exact": lambda: race_part("float32", out / name, dry, exact=True),
    }
    kind, _, which = name.partition("-")
    if kind == "numbers":
        wrong = h100_numbers.numbers_part(which, out, dry)
        if wrong:
            raise SystemExit(f"{len(wrong)} numbers are wrong or were not had")
        return
    parts.get(name, lambda: race_part(which, out / name, dry))()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS}; dry: a new one")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--plot", action="store_true", help="of --out; runs nothing")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.out is None:
        dry = options.dry
        options.out = tempfile.mkdtemp(prefix="h100-dry-") if dry else RESULTS
    out = Path(options.out).resolve()
    if options.plot:
        found = h100_targets.plot_races(out)
        print(*found or [f"no results.json of a race is in {out}"], sep="\n")
        raise SystemExit(not found)
    out.mkdir(parents=True, exist_ok=True)
    if options.child:
        with interpreted() if options.dry else contextlib.nullcontext():
            run_part(options.child, out, options.dry)
        return
    end, failed = time.monotonic() + 60 * options.minutes, []
    for seconds, stage in STAGES:
        names = [name for name in stage if name in options.parts]
        if not names:
            continue
        print("\n==", *names, flush=True)
        limit = seconds * (DRY_LIMITS if options.dry else 1)
        limit = min(limit, end - time.monotonic())
        wrong = run_children(names, out, options.dry, limit)
        print(*wrong, sep="\n", flush=True)
        failed += wrong
        if wrong and "environment" in names:
            break
    if not options.dry:
        h100_targets.tell_targets(out)
    print("\n".join(["", *failed, f"The results are in {out}."]))
    raise SystemExit(bool(failed))


def run_children(names: list[str], out: Path, dry: bool, limit_s: float) -> list[str]:
    """Runs parts at once, each in a process of its own; returns what went wrong."""
    if limit_s <= 0:
        return [f"{name}: no time was left for it" for name in names]
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    if dry:
        environment["JAX_PLATFORMS"] = "cpu"
        # The interpreter runs warpgroups as threads that wait for each other: up to
        # eight of one kernel, and XLA begins kernels that do not need each other at
        # once. With as many threads as that, `cluster` waited for ever.
        environment.setdefault("NPROC", "32")
    end, wrong = time.monotonic() + limit_s, []
    running = {}
    for name in names:
        command = [sys.executable, __file__, "--child", name, "--out", str(out)]
        command += ["--dry"] * dry
        running[name] = subprocess.Popen(command, env=environment)
    for name, child in running.items():
        try:
            code = child.wait(timeout=max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            why = f"was ended after {limit_s:.0f} s; what it had found is on disk"
            wrong.append(f"{name}: {why}")
        else:
            wrong += [f"{name}: ended with exit code {code}"] * (code != 0)
    return wrong


if __name__ == "__main__":
    main()
