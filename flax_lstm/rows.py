"""What a step computes of the rows of a batch, and how it goes through them in parts.

Axes     B rows of a batch (of this device's part of it, under an axis name), T tokens.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray


@runtime_checkable
class Batch(Protocol):
    """What a step reads of a batch.

    Attributes:
      tokens: int32 `[B, T]`.
      lengths: int32 `[B]`, or None where every token counts.
      labels: float32 `[B]`, 0 or 1.
      weights: float32 `[B]`, 1 for a row and 0 for a filler.
    """

    tokens: Any
    lengths: Any
    labels: Any
    weights: Any


def row_losses(
    loss: str, logits: Float[Array, " B"], labels: Float[Array, " B"]
) -> Float[Array, " B"]:
    """Returns the loss of each row, "mse" of the scores or "bce" of the logits.

    >>> row_losses("mse", jnp.zeros(2), jnp.array([0.0, 1.0])).tolist()
    [0.25, 0.25]
    """
    if loss == "mse":
        return jnp.square(jax.nn.sigmoid(logits) - labels)
    if loss == "bce":
        return optax.sigmoid_binary_cross_entropy(logits, labels)
    raise ValueError(f'loss must be "mse" or "bce"; got {loss!r}.')


def correct(logits: Float[Array, " B"], labels: Float[Array, " B"]):
    """Marks with 1.0 the rows whose rounded score is the label."""
    return (jnp.round(jax.nn.sigmoid(logits)) == labels).astype(jnp.float32)


def weighted_sum(values: Array, weights: Array) -> Array:
    """Returns the weighted sum; what a weight of 0 stands beside is not looked at."""
    return jnp.sum(jnp.where(weights > 0, values * weights, 0.0))


def row_keys(
    key: PRNGKeyArray, first: int | Int[Array, ""], rows: int
) -> Key[Array, " B"]:
    """Returns the keys of rows `first`, `first + 1`, … of a batch."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(first + jnp.arange(rows))


def live_tokens(batch: Batch) -> Bool[Array, "B T"]:
    """Marks the tokens that can have a gradient: in a real row, within its length."""
    shape = batch.tokens.shape
    live = jnp.broadcast_to((batch.weights > 0)[:, None], shape)
    if batch.lengths is not None:
        live &= jnp.arange(shape[1])[None, :] < batch.lengths[:, None]
    return live


def count_tokens(batch: Batch) -> Int[Array, ""]:
    """Counts the tokens of the rows that have a weight."""
    lengths = batch.tokens.shape[1] if batch.lengths is None else batch.lengths
    return jnp.sum(jnp.where(batch.weights > 0, lengths, 0))


def in_parts(
    function: Callable[[Any], tuple[Any, Any]], rows: Any, parts: int
) -> tuple[Any, Any]:
    """Calls a function on equal parts of the rows, one after the other.

    >>> rows = jnp.arange(6.0)
    >>> total, each = in_parts(lambda part: (part.sum(), 2 * part), rows, 3)
    >>> float(total), each.tolist()
    (15.0, [0.0, 2.0, 4.0, 6.0, 8.0, 10.0])

    Args:
      function: `function(part) -> (sums, each)`; `each` has a value for each row, or is
        None.
      rows: Pytree of arrays `[B, ...]`.
      parts: A divisor of B.

    Returns:
      The sums added up, and `each` for all rows.
    """
    if parts == 1:
        return function(rows)
    count = len(jax.tree.leaves(rows)[0])
    if count % parts:
        raise ValueError(
            f"{count} rows cannot be computed in gradient_accumulation = {parts} equal "
            "parts; make batch_size a multiple of it on each device, or pad the batch."
        )
    split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), rows)
    like = jax.eval_shape(function, jax.tree.map(lambda x: x[0], split))[0]
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

    def step(total: Any, part: Any) -> tuple[Any, Any]:
        sums, each = function(part)
        return jax.tree.map(jnp.add, total, sums), each

    total, each = lax.scan(step, zero, split)
    return total, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), each)
