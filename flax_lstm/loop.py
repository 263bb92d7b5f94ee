"""What every loop over time shares: masks, order, memory, and mesh axes.

Axes     T time, *B any number of batch axes, H the sizes of one value.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

Given = Array | np.ndarray  # what a caller may hand over


def live_steps(steps: Any, lengths: Int[Given, "*B"]) -> Bool[Array, "T *B"]:
    """Returns where steps count: true before each row's length."""
    return count_steps(steps, lengths) < in_int32(lengths)[None]


def count_steps(steps: Any, lengths: Int[Given, "*B"]) -> Int[Array, "T ..."]:
    """Returns 0 … T-1 along time, with axes of size 1 for those of the lengths."""
    return jnp.arange(steps, dtype=jnp.int32).reshape(steps, *[1] * lengths.ndim)


def in_int32(lengths: Int[Given, "*B"]) -> Int[Array, "*B"]:
    """Returns lengths in one dtype, so that no promotion is needed to compare them."""
    return jnp.asarray(lengths).astype(jnp.int32)


def expand(mask: Any, like: Any) -> Any:
    """Appends axes of size 1 to `mask` until it has as many as `like`."""
    return mask.reshape(*mask.shape, *[1] * (like.ndim - mask.ndim))


def select(mask: Any, yes: Any, no: Any) -> Any:
    """Takes each leaf of `yes` where the mask `[*B]` is true, else of `no`.

    `no` may be 0, for zeros of each leaf's dtype everywhere. Keys of random numbers,
    which know no zero, then stay.
    """

    def pick(yes: Array, no: Any) -> Array:
        return jnp.where(expand(mask, yes), yes, no)

    def zeroed(leaf: Array) -> Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            return leaf
        return pick(leaf, jnp.zeros((), leaf.dtype))

    if isinstance(no, int):
        return jax.tree.map(zeroed, yes)
    return jax.tree.map(pick, yes, no)


def flip(
    sequence: Float[Array, "T *B H"], lengths: Int[Given, "*B"] | None = None
) -> Float[Array, "T *B H"]:
    """Reverses the valid part of each time-major sequence; the padding stays behind.

    A length above T is T.

    >>> flip(jnp.array([[1.0], [2.0], [0.0]])[..., None], jnp.array([2]))[:, 0, 0]
    Array([2., 1., 0.], dtype=float32)
    """
    if lengths is None:
        return jnp.flip(sequence, 0)
    steps = sequence.shape[0]
    t = count_steps(steps, lengths)
    ends = jnp.minimum(in_int32(lengths), steps)[None]
    source = jnp.where(t < ends, ends - 1 - t, t)
    return jnp.take_along_axis(sequence, expand(source, sequence), axis=0)


def chunk_length(remat: bool | int, steps: Any) -> int | None:
    """Returns how many steps to keep at a time; None for all of them.

    The states between the chunks and the inside of one chunk are kept together, so
    that for `remat=True` both are about the square root of the steps.

    Raises:
      ValueError: If `remat` is below 1.
      NotImplementedError: If the number of steps is symbolic.
    """
    if isinstance(remat, np.bool_):
        remat = bool(remat)
    if remat is False:
        return None
    if not isinstance(steps, int):
        raise NotImplementedError(
            f"remat must be False where the number of steps is symbolic ({steps}); "
            f"got {remat}."
        )
    if remat is True:
        return max(1, math.isqrt(steps))
    if not isinstance(remat, int | np.integer) or remat < 1:
        raise ValueError(
            f"remat must be True, False or a number of steps, at least 1; got {remat}."
        )
    return int(remat)


def in_chunks(
    run: Callable[[Any, Any], tuple[Any, Any]],
    state: Any,
    xs: Any,
    *,
    length: int | None,
    reverse: bool,
) -> tuple[Any, Any]:
    """Calls `state, ys = run(state, xs)` on pieces of time, keeping only the states.

    What the derivative of a piece needs is computed anew from its inputs when its turn
    comes, so that it is held for one piece at a time.

    Args:
      run: The loop over one piece.
      state: State before the first piece.
      xs: Pytree of arrays `[T, ...]`.
      length: Steps of a piece; None for a single piece, with everything kept.
      reverse: Goes from the last piece to the first.

    Returns:
      `(state, ys)`, as from a single call of `run`.
    """
    if length is None:
        return run(state, xs)
    steps = jax.tree.leaves(xs)[0].shape[0]
    count = steps // length
    whole = count * length
    run = jax.checkpoint(run)

    def pieces(leaf: Array) -> Array:
        return leaf[:whole].reshape(count, length, *leaf.shape[1:])

    def chunks(state: Any) -> tuple[Any, Any]:
        state, ys = lax.scan(run, state, jax.tree.map(pieces, xs), reverse=reverse)
        return state, jax.tree.map(lambda y: y.reshape(whole, *y.shape[2:]), ys)

    def remainder(state: Any) -> tuple[Any, Any]:
        return run(state, jax.tree.map(lambda leaf: leaf[whole:], xs))

    if whole == steps and count:
        return chunks(state)
    if reverse:
        state, last = remainder(state)
        state, first = chunks(state)
    else:
        state, first = chunks(state)
        state, last = remainder(state)
    return state, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, last)


def vary_with(tree: Any, others: Any) -> Any:
    """Marks a scan's initial state as varying over the mesh axes its inputs vary over.

    Inside `jax.shard_map` with `check_vma=True` a carry must start with the varying
    axes it ends with, and zeros made inside start with none.
    """
    axes = frozenset().union(
        *(varying_axes(leaf) for leaf in jax.tree.leaves((tree, others)))
    )

    def cast(leaf: Array) -> Array:
        missing = axes - varying_axes(leaf)
        return lax.pcast(leaf, tuple(missing), to="varying") if missing else leaf

    return jax.tree.map(cast, tree) if axes else tree


def spread_as(state: Any, inputs: Float[Array, "T *B I"]) -> Any:
    """Spreads `[*B, H]` over the mesh as the rows of the inputs, where types tell.

    They do on axes of the type Explicit: there a carry must start as it will be spread.
    """
    sharding = typed_sharding(inputs)
    if sharding is None:
        return state
    spec = jax.sharding.PartitionSpec(*sharding.spec[1:-1], None)
    return jax.sharding.reshard(state, sharding.update(spec=spec))


def typed_sharding(array: Any) -> Any:
    """Returns how the type says that an array is spread; None where it says nothing."""
    sharding = jax.typeof(array).sharding
    return sharding if any(axes is not None for axes in sharding.spec) else None


def varying_axes(leaf: Any) -> frozenset[Any]:
    """Returns the mesh axes over which `leaf` is known to differ inside shard_map."""
    aval: Any = jax.typeof(leaf)
    return aval.manual_axis_type.varying
