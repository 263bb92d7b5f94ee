"""What a sequence function demands of its arguments, told before anything is traced.

TypeError for a wrong dtype or type, ValueError for a wrong shape or value; each names
the argument, what was expected and what came.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from flax_lstm.cell import LSTMParams
from flax_lstm.loop import Given


def check_params(params: LSTMParams) -> None:
    """Raises unless three floating arrays are `[I, 4H]`, `[H, 4H]`, `[4H]`."""
    if not isinstance(params, tuple | list) or len(params) != len(LSTMParams._fields):
        raise TypeError(
            "params must be LSTMParams(kernel, recurrent_kernel, bias); got "
            f"{type(params).__name__}. Parameters of another cell go to "
            "flax_lstm.scan_cell, with the cell."
        )
    for name, value in zip(LSTMParams._fields, params, strict=True):
        check_floating(f"params.{name}", dtype_of(f"params.{name}", value))
    kernel, recurrent, bias = (jnp.shape(p) for p in params)
    hidden = recurrent[0] if recurrent else 0
    want = (len(kernel) == 2 and kernel[1] == 4 * hidden, bias == (4 * hidden,))
    if not all(want) or recurrent != (hidden, 4 * hidden):
        raise ValueError(
            "params must be kernel [I, 4H], recurrent_kernel [H, 4H] and bias [4H]; "
            f"got kernel {kernel}, recurrent_kernel {recurrent}, bias {bias}."
        )


def dtype_of(name: str, value: Any) -> Any:
    """Returns an array's dtype; raises TypeError for what is none."""
    if not hasattr(value, "dtype"):
        raise TypeError(
            f"{name} must be a JAX or NumPy array; got {type(value).__name__}."
        )
    return value.dtype


def check_floating(name: str, dtype: Any) -> None:
    """Raises TypeError unless the dtype is one of floating numbers."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{name} must be floating; got {jnp.dtype(dtype)}.")


def check_pair(name: str, state: Any) -> None:
    """Raises TypeError unless the state is an `LSTMState` or another pair (c, h)."""
    if not isinstance(state, tuple | list) or len(state) != 2:
        many = f" of {len(state)}" if isinstance(state, tuple | list) else ""
        raise TypeError(
            f"{name} must be LSTMState(c, h) or another pair (c, h); got "
            f"{type(state).__name__}{many}."
        )


def check_state(name: str, state: Any, shape: tuple[int, ...]) -> None:
    """Raises unless the state is a pair of floating arrays `[*B, H]`, c and h."""
    check_pair(name, state)
    for part, value in zip(("c", "h"), state, strict=True):
        check_floating(f"{name}.{part}", dtype_of(f"{name}.{part}", value))
        if value.shape != shape:
            raise ValueError(
                f"{name}.{part} must be [*batch, hidden] = {shape} to match inputs and "
                f"params; got {value.shape}."
            )


def check_switches(**given: Any) -> None:
    """Raises TypeError for what is neither True nor False."""
    for name, value in given.items():
        if not isinstance(value, bool | np.bool_):
            raise TypeError(
                f"{name} must be True or False, known when the call is traced; got "
                f"{type(value).__name__}."
            )


def check_sequence(
    inputs: Any,
    lengths: Any,
    resets: Any,
    *,
    input_size: int,
) -> None:
    """Raises TypeError or ValueError where a sequence argument does not fit."""
    check_arrays(inputs=inputs)
    if inputs.ndim < 2 or inputs.shape[-1] != input_size:
        raise ValueError(
            f"inputs must be [time, *batch, {input_size}] to match params.kernel; "
            f"got {inputs.shape}."
        )
    check_floating("inputs", inputs.dtype)
    check_masks(lengths, resets, inputs.shape[:-1])


def check_arrays(**given: Any) -> None:
    """Raises TypeError for what is neither an array nor None."""
    for name, value in given.items():
        if value is not None and not isinstance(value, Array | np.ndarray):
            raise TypeError(
                f"{name} must be a JAX or NumPy array; got {type(value).__name__}."
            )


def check_masks(lengths: Any, resets: Any, shape: tuple[int, ...]) -> None:
    """Raises unless lengths and resets, where given, fit the axes `[T, *B]`.

    Lengths are integers `[*B]`, within 0 … T where they are known; resets booleans
    `[T, *B]`.
    """
    check_arrays(lengths=lengths, resets=resets)
    if lengths is not None:
        check_lengths(lengths, shape)
    if resets is not None:
        if resets.dtype != jnp.bool_:
            raise TypeError(f"resets must be booleans; got {resets.dtype}.")
        if resets.shape != shape:
            raise ValueError(
                f"resets must be [time, *batch] = {shape} to match inputs; "
                f"got {resets.shape}."
            )


def check_lengths(lengths: Given, shape: tuple[int, ...]) -> None:
    """Raises unless lengths are as `check_masks` says."""
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"lengths must be integers; got {lengths.dtype}.")
    if lengths.shape != shape[1:]:
        raise ValueError(
            f"lengths must be [*batch] = {shape[1:]} to match inputs; "
            f"got {lengths.shape}."
        )
    if isinstance(lengths, Tracer):
        return  # values are unknown while tracing
    values = np.asarray(lengths)
    if values.size and not (values.min() >= 0 and values.max() <= shape[0]):
        raise ValueError(
            f"lengths must be within 0 … {shape[0]}, the number of steps; "
            f"got values from {values.min()} to {values.max()}."
        )
