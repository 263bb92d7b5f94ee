"""How much memory of a TPU or GPU does a layer take, next to the plain loops?

    python experiments/compile_memory.py                 all targets
    python experiments/compile_memory.py --targets h100  its rows alone; others stay
    python experiments/compile_memory.py --targets v4 --shape 64 128 1024 1024
        any shape T B I H; also --dtype, --precision; recorded with --write

Compiles `lstm` ahead of time, as `compile_kernels.py` does, and asks the compiler for
its plan: the peak of inputs, results and scratch, all together. `forward` keeps nothing
for a derivative, `gradient` is that of weights and inputs. The plan is the same at
every run.

The peak has in it what a TPU's compiler keeps, or copies to, on the chip while it fits:
in common memory on v4, 128 MiB, else in the vector memory that kernels leave. Of a
`--shape` there is also `hbm_mib`, inputs, results and scratch that are not there.

Writes results/compile_memory.csv, of a `--shape` results/compile_memory_shapes.csv.
"""

import argparse
import csv
import datetime
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compile_kernels import TARGETS, default_cache

RESULTS = Path(__file__).parent / "results" / "compile_memory.csv"
OF_SHAPES = RESULTS.with_name("compile_memory_shapes.csv")
# T, B, I, H: the first layer of the tutorial, whose inputs fill no whole lanes of a
# TPU; one whose inputs do; one of many steps and few rows.
SHAPES = ((244, 256, 300, 128), (244, 256, 256, 128), (1024, 16, 256, 256))
# The second layer of the tutorial, whose outputs fill no whole lanes; fewer rows than a
# register of bfloat16 has.
MORE = {
    "v5e": ((244, 256, 128, 64), (1024, 4, 256, 256)),
    "h100": ((244, 256, 128, 64),),
}
# One row; rows of no whole tile, even and odd; units of no whole 64, and both.
ODD = {
    "h100": (
        (2048, 1, 1024, 1024),
        (244, 100, 300, 128),
        (243, 101, 300, 128),
        (64, 64, 256, 200),
        (64, 250, 128, 100),
    )
}
KINDS = {
    "v4": ("tpu", "TPU v4"),
    "v5e": ("tpu", "TPU v5e"),
    "v5p": ("tpu", "TPU v5p"),
    "v6e": ("tpu", "TPU v6e"),
    "v7x": ("tpu", "TPU7x"),
    "h100": ("cuda", "9.0"),
}
RECORDED = ("v5e", "h100")
IMPLEMENTATIONS = ("pallas", "scan", "xla")


def shapes_of(target: str) -> list[tuple[int, ...]]:
    """Returns the shapes of a target that are recorded."""
    return [*SHAPES, *MORE[target], *ODD.get(target, ())]


def rows_of(
    target: str, shapes: list[tuple[int, ...]], dtype: str, precision: str | None
) -> None:
    """Compiles in this process for one target; prints a row for each program."""
    import jax

    place = TARGETS[target][0].sharding(target)
    for shape in shapes:
        for lengths in (False, True):
            for mode in ("forward", "gradient"):
                for name in IMPLEMENTATIONS:
                    row = {"target": target, "dtype": dtype}
                    row |= dict(zip("TBIH", shape, strict=True))
                    row |= {"lengths": lengths, "mode": mode, "implementation": name}
                    with jax.default_matmul_precision(precision):
                        plan = planned(target, shape, name, mode, place, lengths, dtype)
                    # What is not on the chip: the peak counts that, too.
                    hbm = plan.argument_size_in_bytes + plan.output_size_in_bytes
                    hbm += plan.temp_size_in_bytes - plan.alias_size_in_bytes
                    row["peak_mib"] = f"{plan.peak_memory_in_bytes / 2**20:.1f}"
                    print(json.dumps(row | {"hbm_mib": f"{hbm / 2**20:.1f}"}))


def planned(
    target: str,
    shape: tuple[int, ...],
    name: str,
    mode: str,
    place: Any,
    lengths: bool,
    dtype: str = "bfloat16",
) -> Any:
    """Compiles in this process; returns the compiler's plan of the memory."""
    import jax
    from flax_lstm_kernels.target import on

    function, arguments = program(shape, name, mode, place, dtype)
    given = arguments if lengths else arguments[:2]
    with on(*KINDS[target]):
        compiled: Any = jax.jit(function).lower(*given).compile()
    return compiled.memory_analysis()


def program(
    shape: tuple[int, ...], name: Any, mode: str, place: Any, dtype: Any
) -> Any:
    """Returns a function, and the types of its weights, inputs and lengths."""
    import jax
    import jax.numpy as jnp

    from flax_lstm import LSTMParams, lstm

    steps, rows, size, hidden = shape
    dtype = jnp.dtype(dtype)

    def like(*shape: int, dtype: Any = dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def forward(params: Any, x: Any, lengths: Any = None) -> Any:
        return lstm(params, x, lengths=lengths, implementation=name)

    def gradient(params: Any, x: Any, lengths: Any = None) -> Any:
        def loss(params: Any, x: Any) -> Any:
            state, y = forward(params, x, lengths)
            return jnp.sum(y.astype(jnp.float32)) + jnp.sum(state.c)

        return jax.grad(loss, (0, 1))(params, x)

    params = LSTMParams(
        like(size, 4 * hidden), like(hidden, 4 * hidden), like(4 * hidden)
    )
    arguments = params, like(steps, rows, size), like(rows, dtype=jnp.int32)
    return {"forward": forward, "gradient": gradient}[mode], arguments


def child_of(cache: Path, target: str, *asked: Any) -> list[dict[str, Any]]:
    """Compiles for one target in a process of its own, for it loads a compiler once."""
    with tempfile.TemporaryDirectory() as dump:
        compiler = TARGETS[target][0].environment(cache, dump)
        done = subprocess.run(
            [sys.executable, __file__, "--child", json.dumps([target, *asked])],
            env=os.environ | compiler,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
    made = {"jax": version("jax"), "date": datetime.date.today().isoformat()}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return [json.loads(line) | made for line in lines]


def record(found: list[dict[str, Any]]) -> None:
    """Writes rows of a shape, in the place of those of the same programs."""
    measured = {"peak_mib", "hbm_mib", "jax", "date"}

    def program_of(row: dict[str, Any]) -> list[str]:
        return [str(row[name]) for name in found[0] if name not in measured]

    rows: list[dict[str, Any]] = []
    if OF_SHAPES.exists():
        with OF_SHAPES.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    new = [program_of(row) for row in found]
    rows = [row for row in rows if program_of(row) not in new] + found
    with OF_SHAPES.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, found[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=program_of))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--targets", choices=KINDS, nargs="+", default=[*RECORDED])
    parser.add_argument("--shape", type=int, nargs=4, metavar=tuple("TBIH"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--precision", help='"highest": the scan rounds no operand')
    parser.add_argument("--write", action="store_true", help="records a --shape")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        rows_of(*json.loads(options.child))
        return
    how = options.dtype, options.precision
    if options.shape:
        for target in options.targets:
            found = child_of(options.cache, target, [options.shape], *how)
            print(*found, sep="\n")
            if options.write:
                record([{"precision": options.precision or ""} | row for row in found])
        return
    if how != ("bfloat16", None) or not {*options.targets} <= {*RECORDED}:
        parser.error(f"only {RECORDED} in bfloat16 are recorded; give a --shape")
    with RESULTS.open(newline="", encoding="utf-8") as file:
        recorded = list(csv.DictReader(file))
    rows = []
    for target in RECORDED:
        if target in options.targets:
            found = child_of(options.cache, target, shapes_of(target), *how)
            print(*found, sep="\n")
        else:
            found = [row for row in recorded if row["target"] == target]
        rows += found
    with RESULTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(
            file, recorded[0], lineterminator="\n", extrasaction="ignore"
        )
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
