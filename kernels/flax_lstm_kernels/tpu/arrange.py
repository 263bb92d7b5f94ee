"""Weights, states and masks in the form in which the TPU kernels read them.

Axes     T time, B batch, H hidden size, P the same in whole lanes of 128; K any.
Panels   The four gates of some units side by side: columns i f g o of units 0 to U-1,
         then of units U to 2U-1, and so on.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from flax_lstm_kernels.tpu.orders import BTI, ITB, LANES, ORDERS, TBI, TIB, up
from flax_lstm_kernels.tpu.vmem import Plan

# Neighbouring axes that are swapped to come from `[T, B, K]` to an order.
SWAPS = {TBI: (), TIB: ((1, 2),), ITB: ((1, 2), (0, 1)), BTI: ((0, 1),)}


def lanes(array: Shaped[Array, "*K H"]) -> Shaped[Array, "*K P"]:
    """Fills the last axis up with zeros."""
    missing = up(array.shape[-1], LANES) - array.shape[-1]
    if not missing:
        return array
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)])


def gate_lanes(array: Shaped[Array, "*K G"]) -> Shaped[Array, "*K _"]:
    """Fills each of the four gates up with zeros.

    A unit of zeros stays at c = h = 0: its candidate is tanh(0).
    """
    *lead, width = array.shape
    filled = lanes(array.reshape(*lead, 4, width // 4))
    return filled.reshape(*lead, 4 * filled.shape[-1])


def cut_gates(array: Shaped[Array, "*K _"], hidden: int) -> Shaped[Array, "*K G"]:
    """Undoes `gate_lanes`."""
    *lead, width = array.shape
    if width == 4 * hidden:
        return array
    cut = array.reshape(*lead, 4, width // 4)[..., :hidden]
    return cut.reshape(*lead, 4 * hidden)


def filled(recurrent_kernel: Float[Array, "H G"]) -> Float[Array, "P _"]:
    """Fills up the recurrent weights, columns and rows."""
    wide = gate_lanes(recurrent_kernel)
    return jnp.pad(wide, ((0, wide.shape[1] // 4 - wide.shape[0]), (0, 0)))


def panels(recurrent_kernel: Float[Array, "H G"], units: int) -> Float[Array, "P _"]:
    """Fills up the recurrent weights and puts their columns in the order of panels."""
    wide = filled(recurrent_kernel)
    size = wide.shape[0]
    if units == size:
        return wide
    apart = wide.reshape(size, 4, size // units, units)
    return apart.swapaxes(1, 2).reshape(size, 4 * size)


def in_order(array: Shaped[Array, "T B K"], order: int) -> Shaped[Array, "_ _ _"]:
    """Gives an array another order; a change of names where it lies so."""
    return array.transpose(ORDERS[order])


def in_names(array: Shaped[Array, "_ _ _"], order: int) -> Shaped[Array, "T B K"]:
    """Undoes `in_order`."""
    return array.transpose([ORDERS[order].index(axis) for axis in range(3)])


def turned(block: Shaped[Array, "T B K"], order: int) -> Shaped[Array, "_ _ _"]:
    """Does as `in_order`, inside a kernel: one swap after the other, as Mosaic can."""
    for swap in SWAPS[order]:
        block = jnp.swapaxes(block, *swap)
    return block


def turned_back(block: Shaped[Array, "_ _ _"], order: int) -> Shaped[Array, "T B K"]:
    """Undoes `turned`."""
    for swap in reversed(SWAPS[order]):
        block = jnp.swapaxes(block, *swap)
    return block


def reset_bits(
    resets: Shaped[Array, "T B"], steps: int
) -> Int[Array, "iterations B 1"]:
    """Packs the resets of each `steps` steps into the bits of one int32 of the row."""
    missing = up(resets.shape[0], steps) - resets.shape[0]
    bits = jnp.pad((resets != 0).astype(jnp.int32), ((0, missing), (0, 0)))
    bits = bits.reshape(-1, steps, resets.shape[1])
    shifts = jnp.arange(steps, dtype=jnp.int32)[None, :, None]
    return (bits << shifts).sum(1, dtype=jnp.int32)[..., None]


def live_iterations(lengths: Int[Array, " B"], plan: Plan) -> Int[Array, " tiles"]:
    """Returns the number of iterations after which each tile of the batch has ended."""
    missing = up(lengths.shape[0], plan.rows) - lengths.shape[0]
    longest = jnp.pad(lengths, (0, missing)).reshape(-1, plan.rows).max(1)
    return (longest + plan.steps - 1) // plan.steps
