"""Inference piece by piece, so that the projected inputs of a piece are all there are.

x W + b of all steps is four times as wide as the outputs, and nothing of it is kept: a
scan has it of one step only. The state goes from one piece to the next.

A piece costs eight launches: a copy of its inputs, the product, masks, the kernel,
which fetches its weights, hs, c and h put in their places, a counter. An estimate, not
measured: 16 microseconds, as long as 16 steps of `single`. Pieces of 5 steps would take
no more memory than a scan in the tutorial's first layer, 22 MiB less, and three times
as long; so a piece has many.

Axes     T time, N batch in whole tiles, P hidden size in whole groups of units.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

# Steps that a piece has at least: its launches are a quarter of them, by estimate.
LEAST = 60
# Bytes that the projected inputs of a piece take at least, where there are as many:
# less is not worth a launch.
PROJECTED = 4 << 20


def piece_steps(steps: int, rows: int, size: int, itemsize: int) -> int:
    """Returns the steps of a piece; all have as many, but for the last.

    Args:
      steps: T.
      rows: N.
      size: P.
      itemsize: Bytes of the computation dtype.

    >>> piece_steps(244, 256, 128, 2), piece_steps(1024, 16, 256, 2)
    (61, 128)
    """
    least = max(LEAST, PROJECTED // (rows * 4 * size * itemsize))
    return -(-steps // max(1, steps // least))


def in_pieces(
    run: Callable[..., tuple[Array, ...]],
    inputs: Float[Array, "T B I"],
    c: Float[Array, "N P"],
    h: Float[Array, "N P"],
    lengths: Int[Array, " N"],
    resets: Shaped[Array, "T B"] | Shaped[Array, "0 0"],
    *,
    size: int,
    reverse: bool,
) -> tuple[Array, Array, Array]:
    """Calls `run(inputs, c, h, lengths, resets) -> (hs, c, h, ...)` for each piece.

    Args:
      run: Runs over a piece.
      inputs: All of them.
      c: Cell before the first step.
      h: Output before the first step.
      lengths: 0 to T.
      resets: Of all steps, or empty.
      size: Steps of a piece.
      reverse: The last piece comes first.

    Returns:
      `(hs [T, N, P], c, h)`.
    """
    steps = inputs.shape[0]
    whole, rest = divmod(steps, size)

    def piece(carry: Any, start: Any, size: int) -> Any:
        hs, c, h = carry

        def cut(array: Array) -> Array:
            return lax.dynamic_slice_in_dim(array, start, size)

        left = jnp.clip(lengths - start, 0, size)
        some = cut(resets) if resets.size else resets
        part, c, h, *_ = run(cut(inputs), c, h, left, some)
        return lax.dynamic_update_slice_in_dim(hs, part, start, 0), c, h

    def step(n: Any, carry: Any) -> Any:
        return piece(carry, (whole - 1 - n if reverse else n) * size, size)

    carry = jnp.zeros((steps, *h.shape), h.dtype), c, h
    if rest and reverse:
        carry = piece(carry, whole * size, rest)
    carry = lax.fori_loop(0, whole, step, carry)
    if rest and not reverse:
        carry = piece(carry, whole * size, rest)
    return carry
