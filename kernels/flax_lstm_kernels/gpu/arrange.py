"""Weights, states and masks in the form in which the GPU kernels read them.

Axes     T time, B batch, H hidden size; N and P the same in whole tiles of the batch
         and whole groups of units; W units of what is read and written where it lies, H
         or P; K any.
Layout   Gates `[T, N, 4, P]` in gate order i f g o, states `[N, P]`, units last.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

UNITS = 64  # of one warpgroup: the rows of its matrix instruction


def up(size: int, multiple: int) -> int:
    """Rounds up to a multiple.

    >>> up(100, 64)
    128
    """
    return -(-size // multiple) * multiple


def fill(array: Shaped[Array, "..."], axis: int, size: int) -> Shaped[Array, "..."]:
    """Fills an axis up with zeros; a unit of zeros stays at c = h = 0, as g = tanh(0).

    >>> fill(jnp.ones((2, 1)), 1, 3).tolist()
    [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    """
    if array.shape[axis] == size:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, widths)


def in_tiles(
    array: Shaped[Array, "..."], axis: int, tile: int, *, once: bool = False
) -> Shaped[Array, "..."]:
    """Puts an axis into whole tiles, of which the last one ends where the axis does.

    It has some of the tile before it again; with `once`, zeros instead. Less than a
    tile is filled up.

    >>> in_tiles(jnp.arange(5), 0, 2).tolist(), in_tiles(jnp.arange(1), 0, 2).tolist()
    ([0, 1, 2, 3, 3, 4], [0, 0])
    >>> in_tiles(jnp.arange(5), 0, 2, once=True).tolist()
    [0, 1, 2, 3, 0, 4]
    """
    given = array.shape[axis]
    left = given % tile
    if given < tile:
        return fill(array, axis, tile)
    if not left:
        return array

    def cut(first: int, end: int) -> Array:
        return lax.slice_in_dim(array, first, end, axis=axis)

    again = cut(given - tile, given - left)
    again = jnp.zeros_like(again) if once else again
    return lax.concatenate(
        [cut(0, given - left), again, cut(given - left, given)], axis
    )


def from_tiles(
    array: Shaped[Array, "..."], axis: int, tile: int, given: int
) -> Shaped[Array, "..."]:
    """Undoes `in_tiles` of what was `given`.

    >>> from_tiles(jnp.array([0, 1, 2, 3, 3, 4]), 0, 2, 5).tolist()
    [0, 1, 2, 3, 4]
    """

    def cut(first: int, end: int) -> Array:
        return lax.slice_in_dim(array, first, end, axis=axis)

    left, size = given % tile, array.shape[axis]
    if given < tile or not left:
        return cut(0, given)
    return lax.concatenate([cut(0, given - left), cut(size - left, size)], axis)


def in_groups(
    array: Shaped[Array, "..."], axis: int, held: int, *, once: bool = False
) -> Shaped[Array, "..."]:
    """Makes P of an axis of H units: `in_tiles` of what is filled up to W first."""
    return in_tiles(fill(array, axis, held), axis, UNITS, once=once)


def from_groups(
    array: Shaped[Array, "N P"], held: int, hidden: int
) -> Shaped[Array, "N H"]:
    """Undoes `in_groups` of the last axis."""
    return from_tiles(array, 1, UNITS, held)[:, :hidden]


def gates_apart(
    array: Shaped[Array, "*K G"], size: int | None = None
) -> Shaped[Array, "*K 4 P"]:
    """Splits the last axis into gates and units, which are filled up to a size."""
    *lead, width = array.shape
    units = width // 4
    return fill(array.reshape(*lead, 4, units), -1, size or units)


def gates_joined(array: Shaped[Array, "*K 4 P"], hidden: int) -> Shaped[Array, "*K G"]:
    """Undoes `gates_apart`."""
    *lead, _, _ = array.shape
    return array[..., :hidden].reshape(*lead, 4 * hidden)


def kept_dtype(dtype: Any) -> jnp.dtype:
    """Returns the dtype in which gates after activation pass through memory.

    They lie in [-1, 1], where float16 has three bits more than bfloat16.

    >>> kept_dtype(jnp.bfloat16)
    dtype('float16')
    """
    return jnp.dtype(jnp.float16 if jnp.dtype(dtype).itemsize == 2 else jnp.float32)


def wide_weights(
    kernel: Float[Array, "I G"], bias: Float[Array, " G"], size: int, dtype: Any
) -> tuple[Float[Array, "I W"], Float[Array, " W"]]:
    """Returns weights and bias for `projected`, filled up to W = 4P."""
    wide = gates_apart(kernel.astype(dtype), size)
    bias = gates_apart(bias.astype(dtype), size)
    return wide.reshape(len(kernel), 4 * size), bias.reshape(4 * size)


def projected(
    inputs: Float[Array, "T B I"], kernel: Float[Array, "I W"], bias: Float[Array, " W"]
) -> Float[Array, "T B 4 P"]:
    """Returns `x W + b` of some steps, one product of XLA, as the kernels read it.

    It is rounded to the computation dtype, which adds to the error of the outputs in 16
    bits, and spares a copy in float32. The bits are then called those of `kept_dtype`,
    so that the gates can take their place in memory.
    """
    steps, rows, inner = inputs.shape
    z = inputs.reshape(steps * rows, inner) @ kernel
    z = (z + jnp.broadcast_to(bias, z.shape)).reshape(steps, rows, 4, -1)
    return lax.bitcast_convert_type(z, kept_dtype(z.dtype))


def recurrent_weights(
    recurrent_kernel: Float[Array, "H G"], held: int
) -> Float[Array, "W 4 W"]:
    """Returns the weights by (unit they come from, gate, unit they go to).

    That is how they lie in memory: where W is H, nothing is copied.
    """
    return fill(gates_apart(recurrent_kernel, held), 0, held)


def weights_in_groups(weights: Float[Array, "W 4 W"]) -> Float[Array, "P 4 P"]:
    """Puts units into groups; what comes from one that is there again is 0."""
    held = len(weights)
    return in_groups(in_groups(weights, 2, held), 0, held, once=True)


def tile_ends(lengths: Int[Array, " N"], rows: int) -> Int[Array, " tiles"]:
    """Returns the number of steps after which each tile of the batch has ended."""
    return lengths.reshape(-1, rows).max(1)


def masks(
    lengths: Int[Array, " N"], resets: Shaped[Array, "T B"] | Shaped[Array, "0 0"]
) -> list[Array]:
    """Returns the lengths, and where there are resets, those `[T, N]`.

    In int32, what registers compare best.
    """
    if not resets.size:
        return [lengths]
    return [lengths, fill((resets != 0).astype(jnp.int32), 1, lengths.size)]


def tile_masks(
    lengths: Int[Array, " N"],
    resets: Shaped[Array, "T B"] | Shaped[Array, "0 0"],
    rows: int,
) -> list[Array]:
    """Returns `tile_ends`, and `masks` with their last axis in tiles."""
    by_tile = [
        mask.reshape(*mask.shape[:-1], -1, rows) for mask in masks(lengths, resets)
    ]
    return [tile_ends(lengths, rows), *by_tile]


def state_like(rows: int, size: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """Returns the type of a state `[N, P]`."""
    return jax.ShapeDtypeStruct((rows, size), dtype)
