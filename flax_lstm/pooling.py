"""How the outputs over time become one vector: last, mean, max, or all three.

Axes     T time, B batch, H hidden size, F pooled size (H, or 3H for "concat").
Lengths  Steps at or past a row's length take no part, whatever stands there. A row of
         length 0 pools to zeros.
"""

from typing import Literal, get_args

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

Pooling = Literal["last", "mean", "max", "concat"]


def check_pooling(pooling: str) -> None:
    """Raises ValueError for an unknown name."""
    if pooling not in get_args(Pooling):
        raise ValueError(
            f"pooling must be one of {get_args(Pooling)}; got {pooling!r}."
        )


def pooled_size(pooling: Pooling, hidden_size: int) -> int:
    """Returns F, the size of one pooled vector.

    >>> pooled_size("concat", 64)
    192
    """
    return 3 * hidden_size if pooling == "concat" else hidden_size


def pool(
    outputs: Float[Array, "T B H"],
    lengths: Int[Array, " B"] | None = None,
    *,
    pooling: Pooling,
    per_step: bool = False,
) -> Float[Array, "B F"] | Float[Array, "T B F"]:
    """Pools outputs over time, in float32 at least.

    Args:
      outputs: `[T, B, H]`, T may be 0.
      lengths: Valid steps of each row; T when None.
      pooling: "last" output, "mean" or "max" over the steps, "concat" all three.
      per_step: Pools over every prefix instead: at step t over the steps 0 … t. In
        the padding this stays at the value of the last valid step.

    Returns:
      `[B, F]`, or `[T, B, F]` with `per_step`.

    Raises:
      ValueError: If `pooling` is unknown.
    """
    check_pooling(pooling)
    outputs = outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))
    steps, batch, hidden = outputs.shape
    if steps == 0:
        shape = (batch, pooled_size(pooling, hidden))
        return jnp.zeros((0, *shape) if per_step else shape, outputs.dtype)
    live = None
    if lengths is not None:
        live = (jnp.arange(steps)[:, None] < lengths[None, :])[..., None]
        # Zeros in the padding are not taken on trust: NaN there must not reach a sum.
        outputs = jnp.where(live, outputs, 0)
    parts = ("last", "mean", "max") if pooling == "concat" else (pooling,)
    by_name = _per_step if per_step else _whole
    pooled = [by_name(part, outputs, live, lengths) for part in parts]
    return jnp.concatenate(pooled, axis=-1) if len(pooled) > 1 else pooled[0]


def _whole(
    part: str, outputs: Array, live: Array | None, lengths: Array | None
) -> Array:
    """Pools `[T, B, H]` to `[B, H]`."""
    if part == "last":
        if lengths is None:
            return outputs[-1]
        # Of a row of length 0 this reads step 0, which is zero.
        at = jnp.maximum(lengths - 1, 0)[None, :, None]
        return jnp.take_along_axis(outputs, at, axis=0)[0]
    if part == "mean":
        if lengths is None:
            return outputs.mean(0)
        count = jnp.maximum(lengths, 1).astype(outputs.dtype)
        return outputs.sum(0) / count[:, None]
    if live is None or lengths is None:
        return outputs.max(0)
    lowest = jnp.finfo(outputs.dtype).min
    highest = jnp.where(live, outputs, lowest).max(0)
    return jnp.where((lengths > 0)[:, None], highest, 0)


def _per_step(
    part: str, outputs: Array, live: Array | None, lengths: Array | None
) -> Array:
    """Pools every prefix of `[T, B, H]`: returns `[T, B, H]`."""
    steps, batch, _ = outputs.shape
    t = jnp.arange(steps)[:, None, None]
    if lengths is None:
        last = jnp.broadcast_to(t, (steps, batch, 1))
    else:
        last = jnp.clip(lengths[None, :, None] - 1, 0, t)
    if part == "last":
        return jnp.take_along_axis(outputs, last, axis=0)
    if part == "mean":
        return jnp.cumsum(outputs, axis=0) / (last + 1).astype(outputs.dtype)
    if live is None or lengths is None:
        return lax.cummax(outputs, axis=0)
    lowest = jnp.finfo(outputs.dtype).min
    highest = lax.cummax(jnp.where(live, outputs, lowest), axis=0)
    return jnp.where((lengths > 0)[None, :, None], highest, 0)
