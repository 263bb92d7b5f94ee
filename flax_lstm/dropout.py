"""Dropout masks, drawn outside the loop from few random bits.

Axes     T time, *B any number of batch axes, H hidden size.
Bits     A mask of rate r needs k bits for each value, k the smallest of 1, 2, 4, 8, 16
         for which r 2^k is a whole number (one bit for r = 1/2), else 16 with r rounded
         to a multiple of 2^-16. They are cut out of 32-bit words, so the generator is
         called k/32 as often as for 32-bit floats.
Keys     One key for the whole batch, or one for each row. With a key for each row, the
         mask of a row depends on its own key alone: however the batch is split over
         devices, every row sees the same mask.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

WIDTHS = (1, 2, 4, 8, 16)


def threshold(rate: float) -> tuple[int, int]:
    """Returns `(n, k)`: a value is dropped where its k random bits are below n.

    >>> threshold(0.5), threshold(0.25), threshold(0.1)
    ((1, 1), (1, 2), (6554, 16))
    """
    if not 0 <= rate < 1:
        raise ValueError(f"dropout must be at least 0 and below 1; got {rate}.")
    for width in WIDTHS:
        if (rate * 2**width).is_integer():
            return int(rate * 2**width), width
    return min(round(rate * 2**16), 2**16 - 1), 16


def typed_key(key: Array) -> Key[Array, "*B"]:
    """Returns a typed key; wraps the raw uint32 ones of `jax.random.PRNGKey`."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)


def fold_in(key: Array, number: int) -> Key[Array, "*B"]:
    """Derives a key, or one key for each of an array of keys."""
    key = typed_key(key)
    if key.shape == ():
        return jax.random.fold_in(key, number)
    rows = jax.vmap(lambda k: jax.random.fold_in(k, number))(key.reshape(-1))
    return rows.reshape(key.shape)


def keep_mask(key: Array, shape: tuple[int, ...], rate: float) -> Bool[Array, "T *B H"]:
    """Draws where values are kept: `[T, *B, H]`, true with probability 1 - rate.

    Args:
      key: One key, or keys of shape `[*B]`, one for each row.
      shape: `(T, *B, H)`. The mask of a step does not depend on how many follow.
      rate: Probability to drop; its resolution is 2^-16 (see the top of this file).

    Returns:
      The mask.

    Raises:
      ValueError: If the rate is outside [0, 1), or the keys do not fit the batch.
    """
    steps, *batch, hidden = shape
    below, width = threshold(rate)
    words_shape = (math.ceil(hidden * width / 32),)
    key = typed_key(key)
    if key.shape == ():
        words = jax.random.bits(key, (steps, *batch, *words_shape), jnp.uint32)
    elif key.shape == tuple(batch):
        words = jax.vmap(
            lambda k: jax.random.bits(k, (steps, *words_shape), jnp.uint32), out_axes=1
        )(key.reshape(-1)).reshape(steps, *batch, *words_shape)
    else:
        raise ValueError(
            f"key must be one key or one for each row, shape {tuple(batch)}; "
            f"got keys of shape {key.shape}."
        )
    shifts = jnp.arange(0, 32, width, dtype=jnp.uint32)
    bits = words[..., None] >> shifts.reshape(*[1] * words.ndim, -1)
    bits = (bits & jnp.uint32(2**width - 1)).reshape(steps, *batch, -1)
    return bits[..., :hidden] >= below


def dropout(
    values: Float[Array, "T *B H"],
    key: Array,
    rate: float,
    *,
    variational: bool = False,
) -> Float[Array, "T *B H"]:
    """Sets a share of the values to zero and scales the others up to the same mean.

    Args:
      values: `[T, *B, H]`.
      key: One key, or one for each row.
      rate: Share to drop, in [0, 1).
      variational: One mask for all steps (Gal & Ghahramani 2016), not a fresh one.

    Returns:
      `[T, *B, H]` in the dtype of the values.
    """
    below, width = threshold(rate)
    if below == 0:
        return values
    steps = min(1, values.shape[0]) if variational else values.shape[0]
    keep = keep_mask(key, (steps, *values.shape[1:]), rate)
    # The rate that the bits realise, not the one asked for: the mean stays exact.
    kept = 1 - below / 2**width
    return jnp.where(keep, values / kept, 0)
