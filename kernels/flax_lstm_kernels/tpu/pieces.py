"""Inference over a few steps at a time, where the inputs are projected before.

x W + b is in float32 and four times as wide as the outputs. Nothing of it is kept, so
that it need not be there for all steps at once: it is made for one piece of time after
the other, and the state goes from piece to piece.

A piece is a few launches, and fetches weights that stay anew, which may take as long as
one or two steps (an estimate, not measured): the steps of a piece are chosen so that
this is little beside them. A step that streams its weights takes the longest.

Axes     T time, B batch, I input size, H hidden size.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from flax_lstm_kernels.tpu.plan import Plan


def piece_steps(plan: Plan) -> int:
    """Returns the steps of a piece."""
    return 8 if plan.streamed else 16


def in_pieces(
    run: Callable[..., tuple[Array, ...]],
    inputs: Float[Array, "T B I"],
    c: Float[Array, "B H"],
    h: Float[Array, "B H"],
    lengths: Int[Array, " B"],
    resets: Shaped[Array, "T B"] | Shaped[Array, "0 0"],
    *,
    size: int,
    reverse: bool,
) -> tuple[Array, Array, Array]:
    """Calls `run(inputs, c, h, lengths, resets) -> (hs, c, h, ...)` for each piece.

    Args:
      run: Runs over a piece; returns c and h as it takes them.
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

    carry = jnp.zeros((steps, *h.shape), h.dtype), c, h
    if rest and reverse:
        carry = piece(carry, whole * size, rest)
    carry = lax.fori_loop(0, whole, step, carry)
    if rest and not reverse:
        carry = piece(carry, whole * size, rest)
    return carry
