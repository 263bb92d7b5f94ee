"""The GPU kernels, without a GPU: interpreted on this CPU, and lowered for one.

Values and gradients are held against NumPy float64 (`reference.py`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
import reference
from flax_lstm_kernels import compat, gpu
from flax_lstm_kernels.gpu import Plan

pytestmark = pytest.mark.kernels

# Relative error ‖got - want‖ / ‖want‖ of the outputs. float32: the roundings that other
# libraries show at T 64 (the interpreter multiplies in float32, not tf32).
BARS = {"float32": 4.4e-7}


class Problem(NamedTuple):
    """Arguments of `forward`."""

    arguments: tuple


def problem(shape, dtype):
    steps, rows, size, hidden = shape
    keys = jax.random.split(jax.random.key(3), 7)
    normal = jax.random.normal
    kernel = normal(keys[0], (size, 4 * hidden)) / size**0.5
    recurrent = normal(keys[1], (hidden, 4 * hidden)) / hidden**0.5
    bias = normal(keys[2], (4 * hidden,))
    x = normal(keys[3], (steps, rows, size))
    c, h = normal(keys[4], (2, rows, hidden))
    lengths = jax.random.randint(keys[5], (rows,), 0, steps + 1, jnp.int32)
    lengths = lengths.at[0].set(steps)
    resets = jax.random.bernoulli(keys[6], 0.3, (steps, rows)).astype(jnp.uint8)
    weights = (leaf.astype(dtype) for leaf in (kernel, recurrent, bias))
    return Problem(
        (x.astype(dtype), *weights, c, h.astype(dtype), lengths, resets),
    )


@pytest.mark.parametrize("reverse", [False, True])
def test_values_are_those_of_numpy(reverse):
    given = problem((4, 11, 2, 7), "float32")
    x, *weights, c, h, lengths, resets = given.arguments
    dead = (jnp.arange(len(x))[:, None] >= lengths[None, :])[..., None]

    def forward(*arguments):
        return gpu.forward(
            *arguments,
            reverse=reverse,
            keep=True,
            plan=Plan("single", 8, 2),
            interpret=compat.InterpretGPUParams(detect_races=True),
        )

    got = jax.jit(forward)(jnp.where(dead, jnp.nan, x), *weights, c, h, lengths, resets)
    want = reference.lstm(
        weights,
        x,
        (c, h),
        lengths=lengths,
        resets=resets,
        reverse=reverse,
        keep_order=True,
    )
    for value, true in zip(got, (want.outputs, want.c, want.h), strict=False):
        assert reference.error(value, true) < BARS["float32"]
    assert not compat.races_found()
