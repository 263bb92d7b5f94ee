"""What do pieces of time cost an inference on Hopper, and what do they spare?

The more steps have memory of their own for their gates, the fewer pieces there are
(`flax_lstm_kernels.gpu.pieces`), down to one. How many is best only time can tell: it
was chosen by memory. Each shape is timed with some, all in alternating rounds, and its
scratch memory is that of the compiler's plan.

`python experiments/h100.py` runs this as its part `pieces`.
"""

import contextlib
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax_lstm_kernels.gpu import pieces
from h100_targets import write_csv

from flax_lstm import LSTMParams, lstm
from flax_lstm.bench.shapes import Shape
from flax_lstm.bench.timing import alternate

APART = (None, 64, 1 << 20)
"""Steps with memory of their own; None: as chosen. The last is one piece of all."""
ODD = (
    Shape("units-100", 250, 244, 128, 100, "rows and units of no whole tile"),
    Shape("units-50", 256, 244, 128, 50, "units filled up, in copies"),
    Shape("row-128", 1, 244, 300, 128, "one row, H 128"),
)


@contextlib.contextmanager
def apart(steps: int | None) -> Iterator[None]:
    """Cuts up what is traced meanwhile with so many steps apart, in copies, too."""
    if steps is None:
        yield
        return
    wanted = {
        "LAST": steps,
        "LAST_BYTES": 1 << 60,
        "ODD_LAST": steps,
        "ROW_LAST": steps,
        "LEAST": steps,
        "PIECES": 1,
        "PROJECTED": 0,
    }
    before = {name: getattr(pieces, name) for name in wanted}
    try:
        for name, value in wanted.items():
            setattr(pieces, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(pieces, name, value)


def compiled(arguments: tuple[Any, ...], steps: int | None) -> Any:
    """Compiles an inference with so many steps apart."""
    with apart(steps):
        run = jax.jit(lambda *arrays: lstm(*arrays, implementation="pallas"))
        return run.lower(*arguments).compile()


def rows_of(shape: Shape, dtype: str, *, rounds: int, budget_s: float) -> list[dict]:
    """Returns a row for each number of steps apart, the one chosen first."""
    rng = np.random.default_rng(0)

    def array(*sizes: int) -> jax.Array:
        return jnp.asarray(shape.hidden**-0.5 * rng.standard_normal(sizes), dtype)

    gates = 4 * shape.hidden
    params = LSTMParams(
        array(shape.inputs, gates), array(shape.hidden, gates), array(gates)
    )
    arguments = params, array(shape.steps, shape.batch, shape.inputs)
    found, calls = {}, {}
    for steps in dict.fromkeys(steps and min(steps, shape.steps) for steps in APART):
        name = "as chosen" if steps is None else str(steps)
        found[name] = run = compiled(arguments, steps)
        calls[name] = functools.partial(
            lambda run: jax.block_until_ready(run(*arguments)), run
        )
    times = alternate(calls, rounds=rounds, budget_s=budget_s)
    first = times["as chosen"].quartiles[1]
    return [
        {
            "shape": shape.name,
            "dtype": dtype,
            "T": shape.steps,
            "B": shape.batch,
            "I": shape.inputs,
            "H": shape.hidden,
            "steps_apart": name,
            "median_ms": 1e3 * times[name].quartiles[1],
            "low_ms": 1e3 * times[name].quartiles[0],
            "high_ms": 1e3 * times[name].quartiles[2],
            "over_chosen": times[name].quartiles[1] / first,
            "scratch_mib": run.memory_analysis().temp_size_in_bytes / 2**20,
        }
        for name, run in found.items()
    ]


def pieces_part(shapes: Sequence[Shape], out: Path, dry: bool) -> None:
    """Writes `pieces.csv`: every shape, in bfloat16."""
    shapes = shapes[:1] if dry else (*shapes, *ODD)
    options = {"rounds": 1, "budget_s": 0.0} if dry else {"rounds": 5, "budget_s": 1.0}
    rows = []
    for shape in shapes:
        rows += (new := rows_of(shape, "bfloat16", **options))
        write_csv(out / "pieces.csv", rows)
        for row in new:
            print(json.dumps(row), flush=True)
