"""Weights and inputs in the form in which `project` reads them.

Axes     T time, B batch, I input size, G = 4H in gate order i f g o, P hidden size in
         whole 64s.
Chunks   Of 32 inputs. The last ends at the last input; for what the one before has had
         of it the weights are 0.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from flax_lstm_kernels.gpu.arrange import UNITS, fill, gates_apart
from flax_lstm_kernels.gpu.cluster_tiles import WIDTH

GATES = 4
EIGHT = 8  # the least rows of a matrix instruction, in which they also come


class Weights(NamedTuple):
    """Weights of the inputs as the kernel reads them.

    Attributes:
      kernel: `[32 chunks, 4, P]`.
      bias: `[P / 64, 4, 64]` in float32.
    """

    kernel: Array
    bias: Array


def weights_of_inputs(
    kernel: Float[Array, "I G"], bias: Float[Array, " G"], size: int, dtype: Any
) -> Weights:
    """Arranges the weights; copies none in whole chunks and groups.

    Args:
      kernel: Weights of the inputs.
      bias: Bias.
      size: P; units are filled up with zeros.
      dtype: Computation dtype.
    """
    bias = gates_apart(bias.astype(jnp.float32), size)
    bias = bias.reshape(GATES, size // UNITS, UNITS).swapaxes(0, 1)
    wide = gates_apart(kernel.astype(dtype), size)
    wide = fill(wide, 0, max(WIDTH, wide.shape[0]))
    inner = wide.shape[0]
    _, shared = cut_inputs(inner)
    if shared:
        new = inner - WIDTH + shared  # where the last chunk goes on
        nothing = jnp.zeros((shared, *wide.shape[1:]), wide.dtype)
        wide = jnp.concatenate([wide[:new], nothing, wide[new:]])
    return Weights(wide, bias)


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
