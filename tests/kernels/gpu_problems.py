"""Problems for the GPU kernels, and what their results are judged by.

Results are held against NumPy float64 (`reference.py`). The interpreter fills all
memory that is not written with NaN, and looks for races.
"""

import csv
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import reference
from flax_lstm_kernels import compat, gpu
from flax_lstm_kernels.gpu.plan import Sizes

# Relative error ‖got - want‖ / ‖want‖ of outputs and gradients. float32: the roundings
# that other libraries show at T 64; for products of float32, see `whole_float32` of
# `conftest.py`. bfloat16: half of what they show (6e-3, 8e-3). float16: an eighth of
# that, for its three bits more. tf32 has as many as float16.
BARS = {
    "float32": (4.4e-7, 8e-7),
    "bfloat16": (3e-3, 4e-3),
    "float16": (4e-4, 1e-3),
    "tf32": (4e-4, 1e-3),
}


class Problem(NamedTuple):
    """Arguments of `forward`, and the cotangents of its first three results."""

    arguments: tuple
    d_results: tuple


def problem(shape, dtype):
    steps, rows, size, hidden = shape
    keys = jax.random.split(jax.random.key(3), 9)
    normal = jax.random.normal
    kernel = normal(keys[0], (size, 4 * hidden)) / size**0.5
    recurrent = normal(keys[1], (hidden, 4 * hidden)) / hidden**0.5
    bias = normal(keys[2], (4 * hidden,))
    x = normal(keys[3], (steps, rows, size))
    c, h = normal(keys[4], (2, rows, hidden))
    # One row to the end, one that is empty, a whole tile that ends before it.
    lengths = jax.random.randint(keys[5], (rows,), 1, steps, jnp.int32)
    lengths = lengths.at[0].set(steps).at[1].set(0)
    resets = jax.random.bernoulli(keys[6], 0.3, (steps, rows)).astype(jnp.uint8)
    d_hs = normal(keys[7], (steps, rows, hidden))
    d_c, d_h = normal(keys[8], (2, rows, hidden))
    weights = (leaf.astype(dtype) for leaf in (kernel, recurrent, bias))
    return Problem(
        (x.astype(dtype), *weights, c, h.astype(dtype), lengths, resets),
        (d_hs.astype(dtype), d_c, d_h),
    )


class Got(NamedTuple):
    """Results of both kernels, and whether either had a race."""

    values: tuple
    gradients: tuple
    raced: bool


def run(given, plan, *, reverse, keep=True, interpret=None):
    """Runs both kernels; in the padding they are given NaN.

    By the interpreter, with its parameters `interpret`, unless that is False.
    """
    x, *weights, lengths, resets = given.arguments
    dead = (jnp.arange(len(x))[:, None] >= lengths[None, :])[..., None]
    interpret = compat.watched() if interpret is None else interpret
    options = {"reverse": reverse, "plan": plan, "interpret": interpret}

    def forward(*arguments):
        return gpu.forward(*arguments, keep=keep, **options)

    def backward(*arguments):
        return gpu.backward(*arguments, **options)

    x = jnp.where(dead, jnp.nan, x)
    values = jax.block_until_ready(jax.jit(forward)(x, *weights, lengths, resets))
    watches = bool(interpret) and interpret.detect_races
    raced = watches and compat.races_found()
    if not keep:
        return Got(values, (), raced)
    d_hs, *d_state = given.d_results
    d_hs = jnp.where(dead, jnp.nan, d_hs)
    gradients = jax.jit(backward)(
        d_hs, *d_state, *values[3:], weights[1], lengths, resets
    )
    jax.block_until_ready(gradients)
    raced |= watches and compat.races_found()
    return Got(values, gradients, raced)


def judge(given, got, *, reverse, bars):
    """Compares values and gradients; those of the weights are formed here from d_z."""
    x, kernel, recurrent, bias, c, h, lengths, resets = given.arguments
    want = reference.lstm(
        (kernel, recurrent, bias),
        x,
        (c, h),
        lengths=lengths,
        resets=resets if resets.size else None,
        reverse=reverse,
        keep_order=True,
    )
    wanted = reference.backward(want, *given.d_results)
    (hs, c_last, h_last, _, _), (d_z, d_c, d_h), _ = got
    values = {"hs": (hs, want.outputs), "c": (c_last, want.c), "h": (h_last, want.h)}
    for name, (value, true) in values.items():
        assert reference.error(value, true) < bars[0], name
    d_z = reference.f64(d_z)
    gradients = {
        "inputs": d_z @ reference.f64(kernel).T,
        "bias": d_z.sum((0, 1)),
        "kernel": np.einsum("tbi,tbg->ig", reference.f64(x), d_z),
        "c": d_c,
        "h": d_h,
    }
    for name, value in gradients.items():
        assert reference.error(value, wanted[name]) < bars[1], name


def compiled(kernel):
    """Returns sizes, plan and bytes of shared memory of what was compiled of a kernel.

    The figures of `kernels/budgets.csv`: with barriers, and in whole KiB.
    """
    path = Path(__file__).parents[2] / "kernels" / "budgets.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if kernel in row["kernel"]]
    assert rows
    found = []
    for row in rows:
        computes = row["kernel"].split()[-1]
        sizes = Sizes(
            "backward" if computes == "backward" else "forward",
            *(int(row[axis]) for axis in "TBH"),
            jnp.dtype(row["dtype"]).itemsize,
            keep=computes != "inference",
        )
        plan = [field.split("=") for field in row["plan"].split()[1:]]
        taken = 1024 * int(row["smem_kib"])
        found.append((sizes, {name: int(value) for name, value in plan}, taken))
    return found


def lowered(shape, dtype, plan=None):
    """Returns the modules of both passes, lowered for a GPU by a plan, or the best."""
    steps, rows, size, hidden = shape

    def like(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    def forward(*arguments):
        return gpu.forward(*arguments, reverse=True, keep=True, plan=plan)

    def backward(*arguments):
        return gpu.backward(*arguments, reverse=True, plan=plan)

    state = like(rows, hidden, dtype=jnp.float32)
    masks = like(rows, dtype=jnp.int32), like(steps, rows, dtype=jnp.uint8)
    kernel, recurrent = like(size, 4 * hidden), like(hidden, 4 * hidden)
    x, bias, h = like(steps, rows, size), like(4 * hidden), like(rows, hidden)
    arguments = x, kernel, recurrent, bias, state, h, *masks
    kept = jax.eval_shape(forward, *arguments)[3:]
    hs = like(steps, rows, hidden)
    modules = []
    for function, given in (
        (forward, arguments),
        (backward, (hs, state, state, *kept, recurrent, *masks)),
    ):
        exported = jax.export.export(
            jax.jit(function),
            platforms=["cuda"],
            disabled_checks=[
                jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
            ],
        )
        modules.append(exported(*given).mlir_module())
    return modules
