"""Keras', Haiku's and TensorFlow 1's weights: one column per gate unit.

Keras    `kernel [I, 4H]`, `recurrent [H, 4H]`, `bias [4H]`: our layout, i f c o.
Haiku    `w [I+H, 4H]`, `b [4H]`, order i g f o; 1 is added to f at run time.
TF1      `kernel [I+H, 4H]`, `bias [4H]`, order i j f o; `forget_bias` is added to f
         at run time. Peepholes and projections are not read.
State    Keras (h, c); Haiku (hidden, cell); TF1 (c, h).
Forget   What the others add at run time is part of our bias: added on the way in,
         subtracted on the way out.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flax_lstm.cell import LSTMParams
from flax_lstm.convert.layout import (
    GATES,
    Layer,
    Stack,
    Unpacked,
    as_array,
    check_keys,
    check_layers,
    check_shape,
    pack,
    read,
    reorder,
    unpack,
)

STACKED_ORDER = "igfo"


def from_keras(weights: Sequence[Any], *, bidirectional: bool = False) -> Stack:
    """Reads `get_weights()` of Keras' `LSTM`, `StackedRNNCells` or `Bidirectional`.

    Several layers' weights may be put end to end.

    Args:
      weights: For each layer and direction kernel, recurrent kernel and, unless it was
        built with `use_bias=False`, bias.
      bidirectional: Whether each layer is a `Bidirectional`: forward, then backward.

    Returns:
      Layers of one or two directions.

    Raises:
      ValueError: If the arrays are not those of LSTM layers.
      TypeError: If one is no floating array.
    """
    arrays = [as_array(value, f"weights[{n}]") for n, value in enumerate(weights)]
    cells: list[LSTMParams] = []
    at = 0
    while at < len(arrays):
        if at + 1 == len(arrays):
            raise ValueError(
                f"weights[{at}] of shape {arrays[at].shape} is left over: a layer has "
                "kernel [I, 4H], recurrent kernel [H, 4H] and bias [4H]."
            )
        kernel, recurrent = arrays[at : at + 2]
        check_shape(recurrent, ("H", "4H"), f"weights[{at + 1}], a recurrent kernel,")
        hidden = recurrent.shape[0]
        rows = 4 * hidden
        check_shape(recurrent, (hidden, rows), f"weights[{at + 1}]")
        check_shape(kernel, ("I", rows), f"weights[{at}]")
        bias = np.zeros(rows, kernel.dtype)
        at += 2
        if at < len(arrays) and arrays[at].ndim == 1:
            check_shape(arrays[at], (rows,), f"weights[{at}]")
            bias = arrays[at]
            at += 1
        cells.append(pack(kernel, recurrent, bias))
    directions = 1 + bidirectional
    if not cells or len(cells) % directions:
        raise ValueError(
            "weights must hold at least one layer, and two directions for each where "
            f"bidirectional=True; got {len(cells)}."
        )
    return tuple(
        tuple(cells[n : n + directions]) for n in range(0, len(cells), directions)
    )


def to_keras(layers: Sequence[Layer]) -> list[np.ndarray]:
    """Writes the list that `set_weights` of the same Keras layers takes.

    Raises:
      ValueError: If the layers do not have the same number of directions.
      TypeError: If a layer is of a variant.
    """
    check_layers(layers)
    return [
        leaf for layer in layers for params in layer for leaf in unpack(params, "Keras")
    ]


def from_haiku(modules: Mapping[str, Mapping[str, Any]]) -> Stack:
    """Reads the parameters of `haiku.LSTM` modules, one layer each.

    Args:
      modules: The part of Haiku's parameters that belongs to the layers, such as
        `{"lstm/linear": {"w", "b"}, "lstm_1/linear": {"w", "b"}}`; layers are taken
        in the order of the numbers in their names.

    Returns:
      Layers of one direction.

    Raises:
      ValueError: If a module is not that of an LSTM or a shape does not fit.
      TypeError: If a value is no floating array.
    """
    if not modules:
        raise ValueError("modules must hold at least one LSTM; got none.")
    layers = []
    for key in sorted(modules, key=_natural):
        name = f"modules[{key!r}]"
        check_keys(modules[key], ("w", "b"), name=name)
        bias = read(modules[key], "b", ("4H",), name=name)
        stacked = read(modules[key], "w", ("I+H", bias.shape[0]), name=name)
        layers.append((_split(stacked, bias, 1.0, name),))
    return tuple(layers)


def to_haiku(layers: Sequence[Layer]) -> dict[str, dict[str, np.ndarray]]:
    """Writes `{"lstm/linear": {"w", "b"}, "lstm_1/linear": …}` for Haiku.

    Raises:
      ValueError: If a layer has two directions, which `haiku.LSTM` does not have.
      TypeError: If a layer is of a variant.
    """
    check_layers(layers, directions=1)
    modules = {}
    for index, (params,) in enumerate(layers):
        stacked, bias = _stack(unpack(params, "haiku.LSTM"), 1.0)
        suffix = f"_{index}" if index else ""
        modules[f"lstm{suffix}/linear"] = {"w": stacked, "b": bias}
    return modules


def from_tf1(variables: Mapping[str, Any], *, forget_bias: float = 1.0) -> Stack:
    """Reads the variables of TensorFlow 1's LSTM cells.

    Args:
      variables: Name to array, the cells' variables alone: `…/kernel` and `…/bias`
        of `BasicLSTMCell`, `LSTMCell` or `LSTMBlockCell`, for example
        `rnn/multi_rnn_cell/cell_0/lstm_cell/kernel`. A scope `fw` or `bw` in the name
        is the direction of a bidirectional network.
      forget_bias: The cells' own setting, which they add at run time.

    Returns:
      Layers of one or two directions, in the order of the numbers in their names.

    Raises:
      ValueError: If a name or a shape does not fit.
      TypeError: If a value is no floating array.
    """
    cells: dict[str, dict[str, Any]] = {}
    for name, value in variables.items():
        scope, _, leaf = name.removesuffix(":0").rpartition("/")
        cells.setdefault(scope, {})[leaf] = value
    layers: dict[str, list[tuple[bool, LSTMParams]]] = {}
    for scope in sorted(cells, key=_natural):
        name = f"variables in {scope!r}"
        check_keys(cells[scope], ("kernel", "bias"), name=name)
        bias = read(cells[scope], "bias", ("4H",), name=name)
        stacked = read(cells[scope], "kernel", ("I+H", bias.shape[0]), name=name)
        params = _split(stacked, bias, forget_bias, name)
        parts = scope.split("/")
        layer = "/".join(part for part in parts if part not in ("fw", "bw"))
        layers.setdefault(layer, []).append(("bw" in parts, params))
    if not layers:
        raise ValueError("variables must hold at least one LSTM cell; got none.")
    stack = tuple(
        tuple(params for _, params in sorted(both, key=lambda pair: pair[0]))
        for both in layers.values()
    )
    check_layers(stack)
    return stack


def to_tf1(
    layers: Sequence[Layer], *, forget_bias: float = 1.0, cell: str = "basic_lstm_cell"
) -> dict[str, np.ndarray]:
    """Writes variables named as `tf.nn.dynamic_rnn` of a `MultiRNNCell` names them.

    Args:
      layers: Layers of one or two directions.
      forget_bias: What the cells add at run time.
      cell: Last scope of the names.

    Returns:
      Name to array. One layer: `rnn/CELL/kernel`. Several:
      `rnn/multi_rnn_cell/cell_0/CELL/kernel`. Two directions: `bidirectional_rnn/fw/…`.

    Raises:
      ValueError: If the layers do not have the same number of directions.
      TypeError: If a layer is of a variant.
    """
    check_layers(layers)
    variables = {}
    for index, layer in enumerate(layers):
        for direction, params in enumerate(layer):
            stacked, bias = _stack(unpack(params, "TensorFlow 1"), forget_bias)
            both = len(layer) == 2
            scopes = ["bidirectional_rnn", ("fw", "bw")[direction]] if both else ["rnn"]
            if len(layers) > 1:
                scopes += ["multi_rnn_cell", f"cell_{index}"]
            scope = "/".join([*scopes, cell])
            variables[f"{scope}/kernel"] = stacked
            variables[f"{scope}/bias"] = bias
    return variables


def _split(
    stacked: np.ndarray, bias: np.ndarray, forget_bias: float, name: str
) -> LSTMParams:
    """Returns the parameters of `[I+H, 4H]`, input rows first, in order i g f o."""
    hidden = bias.shape[0] // 4
    if bias.shape[0] != 4 * hidden or stacked.shape[0] <= hidden:
        raise ValueError(
            f"{name} must be a matrix [I+H, 4H] and a bias [4H] with I and H at least "
            f"1; got {stacked.shape} and {bias.shape}."
        )
    bias = reorder(bias, STACKED_ORDER, GATES)
    bias[hidden : 2 * hidden] += np.asarray(forget_bias, bias.dtype)
    kernel, recurrent = np.split(reorder(stacked, STACKED_ORDER, GATES), [-hidden])
    return pack(kernel, recurrent, bias)


def _stack(params: Unpacked, forget_bias: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns `[I+H, 4H]` and `[4H]` in order i g f o, the inverse of `_split`."""
    hidden = params.recurrent_kernel.shape[0]
    bias = np.array(params.bias)
    bias[hidden : 2 * hidden] -= np.asarray(forget_bias, bias.dtype)
    stacked = np.concatenate([params.kernel, params.recurrent_kernel])
    return reorder(stacked, GATES, STACKED_ORDER), reorder(bias, GATES, STACKED_ORDER)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorting key under which `lstm_2` comes before `lstm_10`.

    >>> sorted(["lstm_10", "lstm_2", "lstm"], key=_natural)
    ['lstm', 'lstm_2', 'lstm_10']
    """
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
