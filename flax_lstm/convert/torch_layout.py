"""PyTorch's, JAX's cuDNN's and Equinox's weights: one row per gate unit, i f g o.

Axes     I input size, H hidden size, P output size (H, or torch's `proj_size`).
torch    `weight_ih_l{k}{_reverse} [4H, I]`, `weight_hh_… [4H, P]`, `bias_ih_… [4H]`,
         `bias_hh_… [4H]`, `weight_hr_… [P, H]` with `proj_size`.
cuDNN    the four arrays of torch, flat and end to end: every pseudo-layer's two
         matrices, then every pseudo-layer's two biases; l0 forward, l0 backward, l1 …
Biases   Two are summed on the way in; on the way out the second is zero.
State    torch and cuDNN: (h, c), each `[layers * directions, B, H]`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from flax_lstm.cell import LSTMParams
from flax_lstm.convert.layout import (
    Layer,
    Params,
    Stack,
    as_array,
    check_keys,
    check_layers,
    check_shape,
    layer_name,
    pack,
    read,
    unpack,
)
from flax_lstm.variants import ProjectedParams

SUFFIXES = ("", "_reverse")


def from_torch(state_dict: Mapping[str, Any], *, prefix: str = "") -> Stack:
    """Reads the state dict of `torch.nn.LSTM` (or, with one layer, of the same keys).

    Stacked, bidirectional, without biases, and with `proj_size`.

    Args:
      state_dict: Name to array; CPU tensors are arrays too.
      prefix: The part of the names before `weight_ih_l0`, such as `"encoder.lstm."`;
        keys that do not begin with it are left alone.

    Returns:
      Layers of one or two directions, `LSTMParams`, or `ProjectedParams` with
      `proj_size`.

    Raises:
      ValueError: If a key is missing or unknown, or a shape does not fit.
      TypeError: If a value is no floating array.
    """
    values = {
        key.removeprefix(prefix): value
        for key, value in state_dict.items()
        if key.startswith(prefix)
    }
    name = f"state_dict with prefix {prefix!r}" if prefix else "state_dict"
    suffixes = SUFFIXES[: 1 + ("weight_ih_l0_reverse" in values)]
    count = 1
    while f"weight_ih_l{count}" in values:
        count += 1
    known = [
        f"{part}_l{layer}{suffix}"
        for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        for layer in range(count)
        for suffix in suffixes
    ]
    check_keys(values, known, name=name)
    layers: list[Layer] = []
    width: int | str = "I"
    for layer in range(count):
        both = tuple(
            _read_torch(values, f"_l{layer}{suffix}", width, name)
            for suffix in suffixes
        )
        layers.append(both)
        width = len(both) * both[0].recurrent_kernel.shape[0]
    return tuple(layers)


def _read_torch(
    values: Mapping[str, Any], end: str, width: int | str, name: str
) -> Params:
    """Returns one direction of one layer, whose keys end in `end`."""
    recurrent = read(values, f"weight_hh{end}", ("4H", "H"), name=name)
    rows, size = recurrent.shape
    hidden = size
    if f"weight_hr{end}" in values:
        projection = read(values, f"weight_hr{end}", (size, "H"), name=name)
        hidden = projection.shape[1]
    check_shape(recurrent, (4 * hidden, size), f"{name}['weight_hh{end}']")
    kernel = read(values, f"weight_ih{end}", (rows, width), name=name)
    bias = np.zeros(rows, kernel.dtype)
    if f"bias_ih{end}" in values or f"bias_hh{end}" in values:
        bias = read(values, f"bias_ih{end}", (rows,), name=name) + read(
            values, f"bias_hh{end}", (rows,), name=name
        )
    plain = pack(kernel.T, recurrent.T, bias)
    if f"weight_hr{end}" not in values:
        return plain
    return ProjectedParams(*plain, projection=jnp.asarray(projection.T))


def to_torch(
    layers: Sequence[Layer], *, prefix: str = "", bias: bool = True
) -> dict[str, np.ndarray]:
    """Writes the state dict of a `torch.nn.LSTM`; the inverse of `from_torch`.

    Args:
      layers: Layers of one or two directions, all with the same number of units.
      prefix: Put before every name.
      bias: False for a module built with `bias=False`; the biases must then be zero.

    Returns:
      Name to NumPy array; `bias_ih` holds the whole bias and `bias_hh` zeros.

    Raises:
      ValueError: If a layer's input is not the width of the layer below, the numbers
        of units differ (torch has one for all layers), or a bias would be lost.
      TypeError: If a layer is of a variant that torch does not have.
    """
    check_layers(layers)
    values: dict[str, np.ndarray] = {}
    width: int | str = "I"
    for index, layer in enumerate(layers):
        for direction, params in enumerate(layer):
            name = layer_name(index, direction)
            projected = isinstance(params, ProjectedParams)
            plain = LSTMParams(*params[:3]) if projected else params
            kernel, recurrent, both = unpack(plain, "torch.nn.LSTM")
            first = layers[0][0].recurrent_kernel.shape
            check_shape(recurrent, first, f"recurrent_kernel of {name}")
            check_shape(kernel, (width, kernel.shape[1]), f"kernel of {name}")
            end = f"_l{index}{SUFFIXES[direction]}"
            values[f"weight_ih{end}"] = kernel.T
            values[f"weight_hh{end}"] = recurrent.T
            if bias:
                values[f"bias_ih{end}"] = both
                values[f"bias_hh{end}"] = np.zeros_like(both)
            elif both.any():
                raise ValueError(f"bias=False needs zero biases; {name} has others.")
            if isinstance(params, ProjectedParams):
                values[f"weight_hr{end}"] = np.asarray(params.projection).T
        width = len(layer) * layer[0].recurrent_kernel.shape[0]
    return {prefix + key: np.ascontiguousarray(v) for key, v in values.items()}


def from_cudnn(
    weights: Any,
    *,
    input_size: int,
    hidden_size: int,
    num_layers: int = 1,
    bidirectional: bool = False,
) -> Stack:
    """Reads the flat weights of `jax.experimental.rnn.lstm`.

    Args:
      weights: `[N]`, as `jax.experimental.rnn.init_lstm_weight` makes them.
      input_size: I of the first layer.
      hidden_size: H of every layer.
      num_layers: Number of layers.
      bidirectional: Whether each layer has two directions.

    Returns:
      Layers of one or two directions.

    Raises:
      ValueError: If the number of weights is not the one these sizes need.
      TypeError: If weights are not floating.
    """
    shapes = _cudnn_shapes(input_size, hidden_size, num_layers, 1 + bidirectional)
    flat = as_array(weights, "weights")
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    check_shape(flat, (sum(sizes),), "weights")
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    return from_torch(
        {
            key: part.reshape(shape)
            for (key, shape), part in zip(shapes.items(), parts, strict=True)
        }
    )


def to_cudnn(layers: Sequence[Layer]) -> np.ndarray:
    """Writes the flat weights of `jax.experimental.rnn.lstm`.

    Args:
      layers: Layers of one or two directions, all with the same number of units.

    Returns:
      `[N]`; the second bias of each pseudo-layer is zero.

    Raises:
      ValueError: As `to_torch`.
      TypeError: If a layer is of a variant, projection included.
    """
    check_layers(layers)
    for layer in layers:
        for params in layer:
            unpack(params, "jax.experimental.rnn")
    values = to_torch(layers)
    input_size = values["weight_ih_l0"].shape[1]
    hidden_size = values["weight_hh_l0"].shape[1]
    shapes = _cudnn_shapes(input_size, hidden_size, len(layers), len(layers[0]))
    return np.concatenate([values[key].reshape(-1) for key in shapes])


def _cudnn_shapes(
    input_size: int, hidden_size: int, num_layers: int, directions: int
) -> dict[str, tuple[int, ...]]:
    """Returns torch's name and shape of each part of the flat weights, in order."""
    ends = [f"_l{k}{s}" for k in range(num_layers) for s in SUFFIXES[:directions]]
    rows = 4 * hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    for end in ends:
        width = input_size if end.startswith("_l0") else directions * hidden_size
        shapes[f"weight_ih{end}"] = (rows, width)
        shapes[f"weight_hh{end}"] = (rows, hidden_size)
    for end in ends:
        shapes[f"bias_ih{end}"] = (rows,)
        shapes[f"bias_hh{end}"] = (rows,)
    return shapes


def from_equinox(cell: Mapping[str, Any]) -> LSTMParams:
    """Reads `weight_ih`, `weight_hh` and `bias` of `equinox.nn.LSTMCell`.

    Args:
      cell: The three fields by name, such as `vars(cell)`; `bias` may be absent or
        None, and the cell's settings are left alone.

    Raises:
      ValueError: If a field is missing or its shape does not fit.
      TypeError: If a value is no floating array.
    """
    recurrent = read(cell, "weight_hh", ("4H", "H"), name="cell")
    rows, hidden = recurrent.shape
    check_shape(recurrent, (4 * hidden, hidden), "cell['weight_hh']")
    kernel = read(cell, "weight_ih", (rows, "I"), name="cell")
    bias = np.zeros(rows, kernel.dtype)
    if cell.get("bias") is not None:
        bias = read(cell, "bias", (rows,), name="cell")
    return pack(kernel.T, recurrent.T, bias)


def to_equinox(params: LSTMParams) -> dict[str, np.ndarray]:
    """Writes the three arrays of `equinox.nn.LSTMCell`, by field name.

    Raises:
      TypeError: If the parameters are those of a variant.
    """
    kernel, recurrent, bias = unpack(params, "equinox.nn.LSTMCell")
    return {
        "weight_ih": np.ascontiguousarray(kernel.T),
        "weight_hh": np.ascontiguousarray(recurrent.T),
        "bias": bias,
    }
