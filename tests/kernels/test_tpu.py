"""The TPU kernels, without a TPU: interpreted on this CPU, and lowered for one.

Values and gradients are held against NumPy float64 (`reference.py`). The interpreter
fills all memory that is not written with NaN and looks for races, or, where that takes
too long, only computes.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax_lstm_kernels import tpu
from flax_lstm_kernels.tpu import plan as planning
from flax_lstm_kernels.tpu.plan import Plan, Sizes
from jax.experimental.pallas import tpu as pltpu

pytestmark = pytest.mark.kernels

POISONED = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)

# name: (T, B, I, H), and the plans (rows, steps, units, fused, streamed) of both passes.
# A tile of all rows, of fewer than a register's; two tiles, the second half empty, and
# lanes to fill up, the inputs multiplied inside; the same by XLA, in two panels;
# streamed in two panels.
CASES = {
    "few rows": ((5, 3, 2, 7), Plan(3, 2, 128, False, False)),
    "fused": ((7, 20, 3, 130), Plan(16, 3, 256, True, False)),
    "panels": ((6, 16, 3, 256), Plan(16, 2, 128, False, False)),
    "streamed": ((3, 20, 3, 130), Plan(16, 1, 128, False, True)),
}
# Relative error ‖got - want‖ / ‖want‖ of outputs and gradients: a few roundings of
# float32 on sums of at most 256 terms; of bfloat16, half of what other libraries reach
# at T 64 (5e-3, 6e-3), for here only the operands are rounded.
BARS = {"float32": (4.4e-7, 8e-7), "bfloat16": (3e-3, 4e-3)}


class Problem(NamedTuple):
    """Arguments of `forward`, and the cotangents of its first three results."""

    arguments: tuple
    masks: dict
    d_results: tuple


def problem(shape, dtype, *, lengths=True, resets=True):
    steps, rows, size, hidden = shape
    keys = jax.random.split(jax.random.key(3), 10)
    normal = jax.random.normal
    kernel = normal(keys[0], (size, 4 * hidden)) / size**0.5
    recurrent = normal(keys[1], (hidden, 4 * hidden)) / hidden**0.5
    bias = normal(keys[2], (4 * hidden,))
    x = normal(keys[3], (steps, rows, size))
    c, h = normal(keys[4], (2, rows, hidden))
    counts = jnp.full(rows, steps, jnp.int32)
    if lengths:
        counts = jax.random.randint(keys[5], (rows,), 0, steps + 1, jnp.int32)
        counts = counts.at[0].set(steps).at[-1].set(0)
    cuts = jnp.zeros((0, 0), jnp.uint8)
    if resets:
        cuts = jax.random.bernoulli(keys[6], 0.3, (steps, rows)).astype(jnp.uint8)
    d_hs = normal(keys[7], (steps, rows, hidden))
    d_c, d_h = normal(keys[8], (2, rows, hidden))
    weights = (leaf.astype(dtype) for leaf in (kernel, recurrent, bias))
    return Problem(
        (x.astype(dtype), *weights, c, h.astype(dtype), counts, cuts),
        {"lengths": counts, "resets": cuts if resets else None},
        (d_hs.astype(dtype), d_c, d_h),
    )


def run(given, plan, *, reverse, interpret=True):
    """Returns the results of both kernels, `(forward's, backward's)`."""

    @jax.jit
    def both(arguments, d_results):
        results = tpu.forward(
            *arguments, reverse=reverse, keep=True, plan=plan, interpret=interpret
        )
        gradients = tpu.backward(
            *d_results,
            *results[3:],
            arguments[2],
            *arguments[6:],
            reverse=reverse,
            dtype=arguments[0].dtype,
            plan=plan._replace(fused=False),
            interpret=interpret,
        )
        return results, gradients

    return both(given.arguments, given.d_results)


def judge(given, got, *, reverse, bars):
    """Compares values and gradients, those of the weights formed from d_z in float64."""
    x, kernel, recurrent, bias, c, h = given.arguments[:6]
    want = reference.lstm(
        (kernel, recurrent, bias),
        x,
        (c, h),
        **given.masks,
        reverse=reverse,
        keep_order=True,
    )
    wanted = reference.backward(want, *given.d_results)
    (hs, c_last, h_last, _, _), (d_z, d_c, d_h) = got
    values = {"hs": (hs, want.outputs), "c": (c_last, want.c), "h": (h_last, want.h)}
    for name, (value, true) in values.items():
        assert reference.error(value, true) < bars[0], name
    d_z = np.asarray(d_z, np.float64)
    gradients = {
        "inputs": d_z @ reference.f64(kernel).T,
        "bias": d_z.sum((0, 1)),
        "kernel": np.einsum("tbi,tbg->ig", reference.f64(x), d_z),
        "c": d_c,
        "h": d_h,
    }
    for name, value in gradients.items():
        assert reference.error(value, wanted[name]) < bars[1], name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize(("shape", "plan"), CASES.values(), ids=CASES)
def test_values_and_gradients_are_those_of_numpy(shape, plan, reverse, dtype):
    given = problem(shape, dtype)
    got = run(given, plan, reverse=reverse)
    judge(given, got, reverse=reverse, bars=BARS[dtype])
