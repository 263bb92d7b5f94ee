"""What a sequence function demands of its arguments, told before anything is traced.

TypeError for a wrong dtype or type, ValueError for a wrong shape or value; each names
the argument, what was expected and what came.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from flax_lstm.cell import LSTMParams, LSTMState
from flax_lstm.loop import Given


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
