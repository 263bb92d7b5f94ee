"""Weights and inputs in the form in which `project` reads them.

Axes     T time, B batch, I input size, G = 4H in gate order i f g o, W and P units as
         in `arrange`.
Chunks   Of 32 inputs. The last ends at the last input; for what the one before has had
         of it the weights are 0.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from flax_lstm_kernels.gpu.arrange import (
    UNITS,
    fill,
    gates_apart,
    in_groups,
    in_tiles,
)
from flax_lstm_kernels.gpu.cluster_tiles import WIDTH

GATES = 4
EIGHT = 8  # the least rows of a matrix instruction, in which they also come


class Weights(NamedTuple):
    """Weights of the inputs as the kernel reads them.

    Attributes:
      kernel: `[32 chunks, 4, W]`, or `[I, 4, W]`.
      bias: `[P / 64, 4, 64]` in float32.
    """

    kernel: Array
    bias: Array


def weights_of_inputs(
    kernel: Float[Array, "I G"],
    bias: Float[Array, " G"],
    held: tuple[int, int],
    dtype: Any,
) -> Weights:
    """Arranges the weights; copies none but to whole chunks, which TMA wants.

    Not to have them there twice, those for one row are left as they are, and those of
    units of no whole 64, which TMA would not take.

    Args:
      kernel: Weights of the inputs.
      bias: Bias.
      held: M and W.
      dtype: Computation dtype.
    """
    rows, units = held
    bias = in_groups(gates_apart(bias.astype(jnp.float32)), 1, units)
    bias = bias.reshape(GATES, -1, UNITS).swapaxes(0, 1)
    kernel = gates_apart(kernel.astype(dtype), units)
    if rows == 1 or units % UNITS:
        return Weights(fill(kernel, 0, max(WIDTH, len(kernel))), bias)
    return Weights(in_tiles(kernel, 0, WIDTH, once=True), bias)


def copies(inputs: Float[Array, "T B I"], rows: int) -> bool:
    """Says whether `inputs_to_project` fills anything up."""
    _, batch, inner = inputs.shape
    return batch < rows or inner < WIDTH


def inputs_to_project(
    inputs: Float[Array, "T B I"], rows: int
) -> Float[Array, "T M J"]:
    """Fills up to M rows and 32 inputs, where there are fewer; else copies nothing."""
    return fill(fill(inputs, 1, rows), 2, max(inputs.shape[2], WIDTH))


def cut_inputs(inner: int) -> tuple[int, int]:
    """Returns the number of chunks, and how many inputs the last two have both.

    >>> cut_inputs(300), cut_inputs(32)
    ((10, 20), (1, 0))
    """
    chunks = -(-inner // WIDTH)
    return chunks, chunks * WIDTH - inner
