"""How each implementation runs over time; and any other cell, by the scan.

Axes     T time, *B any number of batch axes, I input size, H hidden size.
Called   with what `flax_lstm.sequence` has checked and given a dtype. Lengths, resets
         and direction mean what they mean there.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax_lstm_kernels import target
from jax import lax
from jaxtyping import Array, Bool, Int

from flax_lstm import cudnn, foreign
from flax_lstm.cell import LSTMParams, LSTMState, lstm_cell
from flax_lstm.checks import check_arrays, check_masks, check_switches
from flax_lstm.derivative import Options, recurrence
from flax_lstm.loop import (
    Given,
    chunk_length,
    flip,
    in_chunks,
    live_steps,
    select,
    typed_sharding,
    vary_with,
)

Cell = Callable[[Any, Any, Any], tuple[Any, Any]]


def scan_cell(
    cell: Cell,
    params: Any,
    inputs: Any,
    state: Any,
    *,
    lengths: Int[Given, "*B"] | None = None,
    resets: Bool[Given, "T *B"] | None = None,
    reverse: bool = False,
    keep_order: bool = False,
    unroll: int = 1,
    remat: bool | int = False,
) -> tuple[Any, Any]:
    """Runs any cell of the form of `lstm_cell` over time with `jax.lax.scan`.

    Args:
      cell: `new_state, y = cell(params, state, x)`; state, x and y any pytrees of
        arrays with the batch axes in front.
      params: Handed to the cell as they are.
      inputs: `[T, *B, I]`, or any pytree of arrays `[T, *B, ...]`: masks for each step
        of zoneout, for instance. In the padding the cell sees zeros, or False; keys of
        random numbers stay.
      state: State before the first step; its dtypes are kept by the cell. A reset
        leaves keys of random numbers in it as they are.
      lengths: As in `lstm`.
      resets: As in `lstm`.
      reverse: As in `lstm`.
      keep_order: As in `lstm`.
      unroll: As in `lstm`.
      remat: As in `lstm`.

    Returns:
      `(final_state, outputs)`, outputs a pytree of arrays `[T, *B, ...]` as y is.

    Raises:
      TypeError: If lengths are not integers, resets not booleans, `reverse` or
        `keep_order` neither True nor False.
      ValueError: If their shapes do not fit, a concrete length is outside 0 … T, or
        `remat` is below 1.
      NotImplementedError: With `remat`, where time is symbolic.
    """
    inputs = jax.tree.map(jnp.asarray, inputs)
    check_arrays(lengths=lengths, resets=resets)
    check_switches(reverse=reverse, keep_order=keep_order)
    axes = 0 if resets is None else resets.ndim
    axes = axes if lengths is None else 1 + lengths.ndim
    for shape in {leaf.shape[:axes] for leaf in jax.tree.leaves(inputs)}:
        check_masks(lengths, resets, shape)  # once, where all fit: it reads the lengths
    inputs, live, resets = masked(inputs, lengths, resets)

    def step(state: Any, at: tuple[Any, Array | None, Array | None]):
        x, live, reset = at
        if reset is not None:
            state = select(~reset, state, 0)
        new, y = cell(params, state, x)
        if live is not None:
            new, y = select(live, new, state), select(live, y, 0)
        return new, y

    def run(state: Any, xs: Any) -> tuple[Any, Any]:
        return lax.scan(step, state, xs, reverse=reverse, unroll=unroll)

    xs = (inputs, live, resets)
    final, outputs = in_chunks(
        run,
        vary_with(state, (params, xs)),
        xs,
        length=chunk_length(remat, jax.tree.leaves(inputs)[0].shape[0]),
        reverse=reverse,
    )
    if reverse and not keep_order:
        outputs = jax.tree.map(lambda y: flip(y, lengths), outputs)
    return final, outputs


def masked(inputs: Any, lengths: Any, resets: Any) -> tuple[Any, Any, Any]:
    """Returns `(inputs, live, resets)`: zero in the padding, and true only outside it.

    The inputs are zeroed before the cell sees them: 0 times NaN in the padding would
    reach a gradient.
    """
    resets = None if resets is None else jnp.asarray(resets)
    if lengths is None:
        return inputs, None, resets
    live = live_steps(jax.tree.leaves(inputs)[0].shape[0], lengths)
    resets = None if resets is None else resets & live
    return select(live, inputs, 0), live, resets


def lstm_by_scan(
    params: LSTMParams, inputs: Array, state: LSTMState, **options: Any
) -> tuple[LSTMState, Array]:
    """Runs prepared arguments by plain scan and plain autodiff."""
    return scan_cell(lstm_cell, params, inputs, state, **options)


def lstm_by_xla(
    params: LSTMParams,
    inputs: Array,
    state: LSTMState,
    *,
    lengths: Any,
    resets: Any,
    reverse: bool,
    keep_order: bool,
    unroll: int,
    remat: bool | int,
) -> tuple[LSTMState, Array]:
    """Runs prepared arguments with the derivative of our own."""
    inputs, live, resets = masked(inputs, lengths, resets)
    options = Options.for_backend(reverse=reverse, unroll=unroll)
    if typed_sharding(inputs) is not None:
        options = options._replace(flatten=False)  # rows are not joined with time

    def run(state: LSTMState, xs: Any) -> tuple[LSTMState, Array]:
        return recurrence(options, params, xs[0], state, *xs[1:])

    final, h = in_chunks(
        run,
        vary_with(state, (params, inputs, live, resets)),
        (inputs, live, resets),
        length=chunk_length(remat, inputs.shape[0]),
        reverse=reverse,
    )
    outputs = h if live is None else select(live, h, 0)
    return final, flip(outputs, lengths) if reverse and not keep_order else outputs


def lstm_by_kernel(
    params: LSTMParams, inputs: Array, state: LSTMState, *, asked: bool, **options: Any
) -> tuple[LSTMState, Array]:
    """Runs prepared arguments by the kernel of the device.

    With `asked`, for it by name, it raises where another loop would have to do.
    """
    device = target.current()._replace(asked=asked)
    if params.kernel.dtype != params.bias.dtype:
        # The loop wants one dtype, and gives both gradients in it.
        wide = jnp.promote_types(params.kernel.dtype, params.bias.dtype)
        params = params._replace(
            kernel=params.kernel.astype(wide), bias=params.bias.astype(wide)
        )

    def loop(reverse: bool, *arguments: Any) -> tuple[LSTMState, Array]:
        # Inside shard_map the transpose of this sums the weights' gradients.
        return foreign.recurrence(reverse, device, *vary_with(arguments, ()))

    return by_loop(loop, params, inputs, state, **options)


def lstm_by_cudnn(
    params: LSTMParams, inputs: Array, state: LSTMState, **options: Any
) -> tuple[LSTMState, Array]:
    """Runs prepared arguments by cuDNN."""
    params = LSTMParams(*(leaf.astype(inputs.dtype) for leaf in params))
    return by_loop(cudnn.recurrence, params, inputs, state, **options)


def by_loop(
    loop: Callable[..., tuple[LSTMState, Array]],
    params: LSTMParams,
    inputs: Array,
    state: LSTMState,
    *,
    lengths: Any,
    resets: Any,
    reverse: bool,
    keep_order: bool,
    unroll: int,
    remat: bool | int,
) -> tuple[LSTMState, Array]:
    """Runs a whole loop over time, which is called as `foreign.recurrence` is."""
    del unroll  # there is no scan
    steps, *batch, _ = inputs.shape

    def run(state: LSTMState, xs: Any) -> tuple[LSTMState, Array]:
        x, live, resets = xs
        steps, rows = x.shape[:2]
        lengths = (
            jnp.full(rows, steps, jnp.int32)
            if live is None
            else live.sum(0, dtype=jnp.int32)
        )
        resets = jnp.zeros((0, 0), jnp.uint8) if resets is None else resets
        return loop(reverse, params, x, state, lengths, resets)

    def one_axis(array: Given, first: int) -> Given:
        return array.reshape(
            *array.shape[:first], math.prod(batch), *array.shape[first + len(batch) :]
        )

    live = None if lengths is None else live_steps(steps, jnp.asarray(lengths))
    resets = None if resets is None else jnp.asarray(resets).astype(jnp.uint8)
    masks = (None if mask is None else one_axis(mask, 1) for mask in (live, resets))
    xs = one_axis(inputs, 1), *masks
    state = jax.tree.map(lambda leaf: one_axis(leaf, 0), state)
    final, outputs = in_chunks(
        run,
        vary_with(state, (params, xs)),
        xs,
        length=chunk_length(remat, steps),
        reverse=reverse,
    )
    final = jax.tree.map(lambda leaf: leaf.reshape(*batch, leaf.shape[-1]), final)
    outputs = outputs.reshape(steps, *batch, outputs.shape[-1])
    return final, flip(outputs, lengths) if reverse and not keep_order else outputs


OVER_TIME = {
    "scan": lstm_by_scan,
    "xla": lstm_by_xla,
    "cpu": lstm_by_kernel,
    "pallas": lstm_by_kernel,
    "cudnn": lstm_by_cudnn,
}
