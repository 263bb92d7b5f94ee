"""Pieces of time that are alike, in a loop, with arguments and results copied.

For kernels that want more of a step than they are given or give: projected inputs, or
rows and units filled up. That is then in memory for a piece.

Axes     T time, B rows of the batch; N what the kernel has of the rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Shaped

Arrays = tuple[Array, ...]


def in_copies(
    run: Callable[..., tuple[Arrays, Arrays]],
    sequences: Arrays,
    state: Arrays,
    lengths: Int[Array, " N"],
    resets: Shaped[Array, "T B"] | Shaped[Array, "0 0"],
    *,
    results: Sequence[jax.ShapeDtypeStruct],
    size: int,
    reverse: bool,
) -> tuple[Arrays, Arrays]:
    """Calls `run(sequences, state, lengths, resets)` for piece after piece.

    Args:
      run: Runs over a piece; returns its results, of as many steps, and the state.
      sequences: All of them, each `[T, ...]`.
      state: Before the first piece, as the one after it will be.
      lengths: 0 to T; a piece is given those that it has of them.
      resets: Of all steps, or empty.
      results: The results of all steps, `[T, ...]`.
      size: Steps of a piece.
      reverse: The last piece comes first.

    Returns:
      `(results, state)`.
    """
    steps = len(sequences[0])
    if steps <= size:
        return run(sequences, state, lengths, resets)
    whole, rest = divmod(steps, size)

    def piece(carry: Any, start: Any, size: int) -> Any:
        results, state = carry

        def cut(array: Array) -> Array:
            return lax.dynamic_slice_in_dim(array, start, size)

        left = jnp.clip(lengths - start, 0, size)
        some = cut(resets) if resets.size else resets
        parts, state = run(tuple(map(cut, sequences)), state, left, some)
        placed = (
            lax.dynamic_update_slice_in_dim(result, part, start, 0)
            for result, part in zip(results, parts, strict=True)
        )
        return tuple(placed), state

    def step(n: Any, carry: Any) -> Any:
        return piece(carry, (whole - 1 - n if reverse else n) * size, size)

    carry = tuple(lax.empty(like.shape, like.dtype) for like in results), state
    if rest and reverse:
        carry = piece(carry, whole * size, rest)
    carry = lax.fori_loop(0, whole, step, carry)
    if rest and not reverse:
        carry = piece(carry, whole * size, rest)
    return carry
