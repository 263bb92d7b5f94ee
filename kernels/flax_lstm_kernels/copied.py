"""Pieces of time that are alike, in a loop, with inputs and outputs copied.

For inference, whose projected inputs or filled-up outputs are then those of a piece.

Axes     T time, B rows of the batch, I input size; N and H what the kernel has of the
         rows and of the hidden size, which may be more.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped


def in_copies(
    run: Callable[..., tuple[Array, ...]],
    inputs: Float[Array, "T B I"],
    c: Float[Array, "N H"],
    h: Float[Array, "N H"],
    lengths: Int[Array, " N"],
    resets: Shaped[Array, "T B"] | Shaped[Array, "0 0"],
    *,
    size: int,
    reverse: bool,
) -> tuple[Array, Array, Array]:
    """Calls `run(inputs, c, h, lengths, resets) -> (hs, c, h, ...)` for pieces alike.

    Args:
      run: Runs over a piece; its hs are `[size, B, H]`.
      inputs: All of them.
      c: Cell before the first step.
      h: Output before the first step.
      lengths: 0 to T.
      resets: Of all steps, or empty.
      size: Steps of a piece.
      reverse: The last piece comes first.

    Returns:
      `(hs [T, B, H], c, h)`.
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

    carry = lax.empty((*inputs.shape[:2], h.shape[1]), h.dtype), c, h
    if rest and reverse:
        carry = piece(carry, whole * size, rest)
    carry = lax.fori_loop(0, whole, step, carry)
    if rest and not reverse:
        carry = piece(carry, whole * size, rest)
    return carry
