"""The cell over time: lengths, resets, direction, and the choice of implementation.

Axes     T time, *B any number of batch axes, I input size, H hidden size.
Order    Functions are time-major, `[T, *B, I]`, and return `(final_state, outputs)`
         as `jax.lax.scan` does.
Lengths  Steps at or past a row's length leave its state as it is and output 0.
         Whatever stands in the padding, NaN included, changes no output and no
         gradient.
Resets   Where true, the state is set to zero before the step; gradients do not cross.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from flax_lstm.cell import LSTMParams, LSTMState, lstm_cell, state_dtype, zero_state

Implementation = Literal["scan", "xla", "pallas", "cudnn"]
Cell = Callable[[Any, Any, Array], tuple[Any, Array]]
Given = Array | np.ndarray  # what a caller may hand over


def lstm(
    params: LSTMParams,
    inputs: Float[Given, "T *B I"],
    state: LSTMState | None = None,
    *,
    lengths: Int[Given, "*B"] | None = None,
    resets: Bool[Given, "T *B"] | None = None,
    reverse: bool = False,
    keep_order: bool = False,
    dtype: Any = None,
    implementation: Implementation | None = None,
    unroll: int = 1,
) -> tuple[LSTMState, Float[Array, "T *B H"]]:
    """Runs one LSTM layer over time-major sequences.

    Args:
      params: Weights of the layer.
      inputs: `[T, *B, I]`; T may be 0, and so may any batch axis.
      state: State before the first step; zero when None.
      lengths: Number of valid steps of each row, 0 to T; T when None. A length of 0
        returns the initial state.
      resets: Where true, the state is zero before that step (in the direction of
        processing); ignored in the padding.
      reverse: Processes each row from its last valid step to its first.
      keep_order: With `reverse`, returns the outputs in the order of the inputs
        instead of the order of processing. As in `flax.linen.RNN`.
      dtype: Computation dtype; the promotion of inputs and weights when None. The
        cell state is carried in float32 at least.
      implementation: "scan" is `jax.lax.scan` differentiated by JAX, the reference.
        None chooses the fastest that can do what was asked.
      unroll: Steps of the scan unrolled into one loop iteration.

    Returns:
      `(final_state, outputs)`, outputs `[T, *B, H]` in the computation dtype.

    Raises:
      TypeError: If inputs are not floating, lengths not integers, resets not booleans.
      ValueError: If a shape does not fit, or a concrete length is outside 0 … T.
      NotImplementedError: If the implementation asked for cannot run.
    """
    if implementation is not None and implementation not in get_args(Implementation):
        raise ValueError(
            f"implementation must be None or one of {get_args(Implementation)}; "
            f"got {implementation!r}."
        )
    if implementation not in (None, "scan"):
        raise NotImplementedError(
            f'implementation="{implementation}" does not exist yet; use "scan" or None.'
        )
    check_params(params)
    params = LSTMParams(*(jnp.asarray(p) for p in params))
    check_sequence(inputs, lengths, resets, input_size=params.kernel.shape[0])
    dtype = jnp.dtype(dtype or jnp.result_type(inputs, params.kernel))
    hidden_size = params.recurrent_kernel.shape[0]
    batch_shape = inputs.shape[1:-1]
    if state is None:
        state = zero_state(batch_shape, hidden_size, dtype)
    check_state(state, (*batch_shape, hidden_size))
    state = LSTMState(state.c.astype(state_dtype(dtype)), state.h.astype(dtype))
    return scan_cell(
        lstm_cell,
        params,
        inputs.astype(dtype),
        state,
        lengths=lengths,
        resets=resets,
        reverse=reverse,
        keep_order=keep_order,
        unroll=unroll,
    )


def scan_cell(
    cell: Cell,
    params: Any,
    inputs: Float[Given, "T *B I"],
    state: Any,
    *,
    lengths: Int[Given, "*B"] | None = None,
    resets: Bool[Given, "T *B"] | None = None,
    reverse: bool = False,
    keep_order: bool = False,
    unroll: int = 1,
) -> tuple[Any, Float[Array, "T *B H"]]:
    """Runs any cell of the form of `lstm_cell` over time with `jax.lax.scan`.

    Args:
      cell: `new_state, y = cell(params, state, x)`; state any pytree of arrays with
        the batch axes in front.
      params: Handed to the cell as they are.
      inputs: `[T, *B, I]`.
      state: State before the first step; its dtypes are kept by the cell.
      lengths: As in `lstm`.
      resets: As in `lstm`.
      reverse: As in `lstm`.
      keep_order: As in `lstm`.
      unroll: As in `lstm`.

    Returns:
      `(final_state, outputs)`.
    """
    inputs = jnp.asarray(inputs)
    resets = None if resets is None else jnp.asarray(resets)
    steps = inputs.shape[0]
    live = None
    if lengths is not None:
        live = jnp.arange(steps).reshape(steps, *[1] * lengths.ndim) < lengths[None]
        # Zeroed before the cell: 0 times NaN in the padding would reach a gradient.
        inputs = jnp.where(live[..., None], inputs, 0)
    if resets is not None and live is not None:
        resets = resets & live

    def step(state: Any, at: tuple[Array, Array | None, Array | None]):
        x, live, reset = at
        if reset is not None:
            state = jax.tree.map(lambda s: jnp.where(expand(reset, s), 0, s), state)
        new, y = cell(params, state, x)
        if live is not None:
            new = jax.tree.map(
                lambda n, s: jnp.where(expand(live, n), n, s), new, state
            )
            y = jnp.where(expand(live, y), y, 0)
        return new, y

    state = vary_with(state, (params, inputs, lengths, resets))
    final, outputs = lax.scan(
        step, state, (inputs, live, resets), reverse=reverse, unroll=unroll
    )
    if reverse and not keep_order:
        outputs = flip(outputs, lengths)
    return final, outputs


def expand(mask: Array, like: Array) -> Array:
    """Appends axes of size 1 to `mask` until it has as many as `like`."""
    return mask.reshape(*mask.shape, *[1] * (like.ndim - mask.ndim))


def flip(
    sequence: Float[Array, "T *B H"], lengths: Int[Given, "*B"] | None = None
) -> Float[Array, "T *B H"]:
    """Reverses the valid part of each time-major sequence; the padding stays behind.

    >>> flip(jnp.array([[1.0], [2.0], [0.0]])[..., None], jnp.array([2]))[:, 0, 0]
    Array([2., 1., 0.], dtype=float32)
    """
    if lengths is None:
        return jnp.flip(sequence, 0)
    steps = sequence.shape[0]
    t = jnp.arange(steps).reshape(steps, *[1] * lengths.ndim)
    source = jnp.where(t < lengths[None], lengths[None] - 1 - t, t)
    return jnp.take_along_axis(sequence, expand(source, sequence), axis=0)


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


def varying_axes(leaf: Any) -> frozenset[Any]:
    """Returns the mesh axes over which `leaf` is known to differ inside shard_map."""
    aval: Any = jax.typeof(leaf)
    return aval.manual_axis_type.varying


def check_params(params: LSTMParams) -> None:
    """Raises ValueError unless the three shapes are `[I, 4H]`, `[H, 4H]`, `[4H]`."""
    kernel, recurrent, bias = (jnp.shape(p) for p in params)
    hidden = recurrent[0] if recurrent else 0
    want = (len(kernel) == 2 and kernel[1] == 4 * hidden, bias == (4 * hidden,))
    if not all(want) or recurrent != (hidden, 4 * hidden):
        raise ValueError(
            "params must be kernel [I, 4H], recurrent_kernel [H, 4H] and bias [4H]; "
            f"got kernel {kernel}, recurrent_kernel {recurrent}, bias {bias}."
        )


def check_state(state: LSTMState, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless c and h have the shape `[*B, H]`."""
    for name, value in zip(("c", "h"), state, strict=True):
        if jnp.shape(value) != shape:
            raise ValueError(
                f"state.{name} must be [*batch, hidden] = {shape} to match inputs and "
                f"params; got {jnp.shape(value)}."
            )


def check_sequence(
    inputs: Any,
    lengths: Any,
    resets: Any,
    *,
    input_size: int,
) -> None:
    """Raises TypeError or ValueError where a sequence argument does not fit."""
    given = {"inputs": inputs, "lengths": lengths, "resets": resets}
    for name, value in given.items():
        if value is not None and not isinstance(value, Array | np.ndarray):
            raise TypeError(
                f"{name} must be a JAX or NumPy array; got {type(value).__name__}."
            )
    if inputs.ndim < 2 or inputs.shape[-1] != input_size:
        raise ValueError(
            f"inputs must be [time, *batch, {input_size}] to match params.kernel; "
            f"got {inputs.shape}."
        )
    if not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise TypeError(f"inputs must be floating; got {inputs.dtype}.")
    if lengths is not None:
        check_lengths(lengths, inputs.shape)
    if resets is not None:
        if resets.dtype != jnp.bool_:
            raise TypeError(f"resets must be booleans; got {resets.dtype}.")
        if resets.shape != inputs.shape[:-1]:
            raise ValueError(
                f"resets must be [time, *batch] = {inputs.shape[:-1]} to match inputs; "
                f"got {resets.shape}."
            )


def check_lengths(lengths: Given, inputs_shape: tuple[int, ...]) -> None:
    """Raises unless lengths are integers `[*B]`, within 0 … T where they are known."""
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"lengths must be integers; got {lengths.dtype}.")
    if lengths.shape != inputs_shape[1:-1]:
        raise ValueError(
            f"lengths must be [*batch] = {inputs_shape[1:-1]} to match inputs; "
            f"got {lengths.shape}."
        )
    if isinstance(lengths, Tracer):
        return  # values are unknown while tracing
    values = np.asarray(lengths)
    if values.size and not (values.min() >= 0 and values.max() <= inputs_shape[0]):
        raise ValueError(
            f"lengths must be within 0 … {inputs_shape[0]}, the number of steps; "
            f"got values from {values.min()} to {values.max()}."
        )
