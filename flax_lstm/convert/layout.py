"""What every converter shares: reading one array, and putting gates in order.

Gates are named by letter, i f g o: input, forget, candidate, output. Others write the
candidate as c, j or z.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from flax_lstm.cell import LSTMParams
from flax_lstm.variants import PeepholeParams, ProjectedParams

GATES = "ifgo"

Params = LSTMParams | PeepholeParams | ProjectedParams
Layer = tuple[Params, ...]
"""One layer: its forward direction, then the backward one where there is one."""
Stack = tuple[Layer, ...]
"""Layers in the order in which data passes through them."""


def as_array(value: Any, name: str) -> np.ndarray:
    """Returns `value` as a floating NumPy array.

    Raises:
      TypeError: If it is no array of floating numbers.
    """
    array = np.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be a floating array; got dtype {array.dtype}.")
    return array


def read(
    values: Mapping[str, Any], key: str, shape: tuple[int | str, ...], *, name: str
) -> np.ndarray:
    """Returns the array at `key`, whose shape must be `shape`.

    Args:
      values: The mapping to read.
      key: Its key.
      shape: Expected shape; a string is the name of an axis of any size.
      name: What messages call the mapping.

    Raises:
      ValueError: If the key is missing or the shape differs.
      TypeError: If the value is no floating array.
    """
    if key not in values:
        raise ValueError(
            f"{name} must have the key {key!r}; its keys are {sorted(values)}."
        )
    array = as_array(values[key], f"{name}[{key!r}]")
    check_shape(array, shape, f"{name}[{key!r}]")
    return array


def check_shape(array: np.ndarray, shape: tuple[int | str, ...], name: str) -> None:
    """Raises ValueError unless `array` has the shape; strings match any size.

    >>> check_shape(np.zeros((2, 3)), ("4H", 3), "weight")
    >>> check_shape(np.zeros((2, 3)), ("4H", 4), "weight")
    Traceback (most recent call last):
    ValueError: weight must have the shape (4H, 4); got (2, 3).
    """
    fits = len(shape) == array.ndim and all(
        isinstance(want, str) or want == got
        for want, got in zip(shape, array.shape, strict=True)
    )
    if not fits:
        want = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{name} must have the shape ({want}); got {array.shape}.")


def check_keys(values: Mapping[str, Any], known: Sequence[str], *, name: str) -> None:
    """Raises ValueError if `values` has a key that is not in `known`."""
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(
            f"{name} has keys that are no part of an LSTM: {unknown}; "
            f"expected {sorted(known)}."
        )


def reorder(array: np.ndarray, order: str, to: str, axis: int = -1) -> np.ndarray:
    """Brings the four gate blocks of `array` from one order into another.

    >>> reorder(np.array([1.0, 2.0, 3.0, 4.0]), "iofg", "ifgo").tolist()
    [1.0, 3.0, 4.0, 2.0]
    """
    blocks = dict(zip(order, np.split(array, 4, axis), strict=True))
    return np.concatenate([blocks[gate] for gate in to], axis)


def pack(kernel: np.ndarray, recurrent: np.ndarray, bias: np.ndarray) -> LSTMParams:
    """Returns `LSTMParams` of JAX arrays; float64 stays so where JAX has it enabled."""
    return LSTMParams(jnp.asarray(kernel), jnp.asarray(recurrent), jnp.asarray(bias))


class Unpacked(NamedTuple):
    """The fields of `LSTMParams` as NumPy arrays."""

    kernel: np.ndarray
    recurrent_kernel: np.ndarray
    bias: np.ndarray


def unpack(params: Any, name: str) -> Unpacked:
    """Returns the three NumPy arrays of plain `LSTMParams`.

    Raises:
      TypeError: If the parameters are those of a variant that the target cannot hold.
    """
    if not isinstance(params, LSTMParams):
        raise TypeError(
            f"{name} holds plain LSTM layers only, as LSTMParams; "
            f"got {type(params).__name__}."
        )
    return Unpacked(*(np.asarray(leaf) for leaf in params))


def layer_name(index: int, direction: int) -> str:
    """Names one direction of one layer in messages."""
    return f"layer {index}, {('forward', 'backward')[direction]} direction"


def check_layers(layers: Sequence[Sequence[Any]], *, directions: int = 2) -> None:
    """Raises ValueError unless all layers have the same number of directions.

    Args:
      layers: A stack.
      directions: The most directions that the target can hold.
    """
    counts = [
        len(layer) if isinstance(layer, tuple) and not hasattr(layer, "_fields") else 0
        for layer in layers
    ]
    if not counts or len(set(counts)) > 1 or not 1 <= counts[0] <= directions:
        allowed = "1" if directions == 1 else "1 or 2"
        raise ValueError(
            f"layers must be a non-empty sequence of tuples of {allowed} directions "
            f"each, all alike, such as ((params,), (params,)); got {counts} directions."
        )
