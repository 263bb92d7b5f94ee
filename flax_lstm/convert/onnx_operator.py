"""The `LSTM` operator of ONNX: one layer of one or two directions.

Axes     D directions, I input size, H hidden size.
Weights  `W [D, 4H, I]`, `R [D, 4H, H]`, gate order i o f c; `B [D, 8H]`, the input
         biases before the recurrent ones; `P [D, 3H]`, peepholes in order i o f.
Forward  `direction="forward"` and `"reverse"` have D = 1 and the same weights: which of
         the two a node is stands in its attributes.
State    `initial_h` and `initial_c`, each `[D, B, H]`.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from flax_lstm.cell import LSTMParams
from flax_lstm.convert.layout import (
    GATES,
    Layer,
    as_array,
    check_layers,
    check_shape,
    pack,
    reorder,
    unpack,
)
from flax_lstm.variants import PeepholeParams

ORDER = "iofg"


def from_onnx(W: Any, R: Any, B: Any = None, P: Any = None) -> Layer:
    """Reads the weights of an ONNX `LSTM` node, named as the operator names them.

    Args:
      W: Input weights `[D, 4H, I]`.
      R: Recurrent weights `[D, 4H, H]`.
      B: Both biases `[D, 8H]`, which are summed; zero when None.
      P: Peepholes `[D, 3H]`; the layer has none when None.

    Returns:
      One or two directions, `LSTMParams`, or `PeepholeParams` with peepholes.

    Raises:
      ValueError: If a shape does not fit.
      TypeError: If a value is no floating array.
    """
    recurrent = as_array(R, "R")
    check_shape(recurrent, ("D", "4H", "H"), "R")
    count, rows, hidden = recurrent.shape
    check_shape(recurrent, (count, 4 * hidden, hidden), "R")
    if count not in (1, 2):
        raise ValueError(f"R must have 1 or 2 directions in front; got {count}.")
    kernel = as_array(W, "W")
    check_shape(kernel, (count, rows, "I"), "W")
    both = np.zeros((count, 2 * rows), kernel.dtype) if B is None else as_array(B, "B")
    check_shape(both, (count, 2 * rows), "B")
    peepholes = None
    if P is not None:
        peepholes = as_array(P, "P")
        check_shape(peepholes, (count, 3 * hidden), "P")
    layer = []
    for n in range(count):
        bias = both[n, :rows] + both[n, rows:]
        plain = pack(
            reorder(kernel[n], ORDER, GATES, 0).T,
            reorder(recurrent[n], ORDER, GATES, 0).T,
            reorder(bias, ORDER, GATES),
        )
        if peepholes is None:
            layer.append(plain)
            continue
        i, o, f = peepholes[n].reshape(3, hidden)
        layer.append(PeepholeParams(*plain, peephole=jnp.asarray(np.stack([i, f, o]))))
    return tuple(layer)


def to_onnx(layer: Layer) -> dict[str, np.ndarray]:
    """Writes the inputs W, R, B and, with peepholes, P of an ONNX `LSTM` node.

    Args:
      layer: One or two directions of the same sizes.

    Returns:
      Name of the operator's input to NumPy array; the second half of B is zero.

    Raises:
      ValueError: If the directions' sizes differ or there are more than two.
      TypeError: If a direction is of a variant other than the peephole cell.
    """
    check_layers((layer,))
    parts: dict[str, list[np.ndarray]] = {"W": [], "R": [], "B": [], "P": []}
    for params in layer:
        if isinstance(params, PeepholeParams):
            i, f, o = np.asarray(params.peephole)
            parts["P"].append(np.concatenate([i, o, f]))
            params = LSTMParams(*params[:3])
        kernel, recurrent, bias = unpack(params, "ONNX")
        bias = reorder(bias, GATES, ORDER)
        parts["W"].append(reorder(kernel, GATES, ORDER).T)
        parts["R"].append(reorder(recurrent, GATES, ORDER).T)
        parts["B"].append(np.concatenate([bias, np.zeros_like(bias)]))
    inputs = {}
    for name, arrays in parts.items():
        if not arrays:
            continue
        if len(arrays) != len(layer) or len({array.shape for array in arrays}) > 1:
            raise ValueError(
                "both directions of an ONNX LSTM must have the same sizes and both or "
                f"neither peepholes; got {[a.shape for a in arrays]} for {name}."
            )
        inputs[name] = np.ascontiguousarray(np.stack(arrays))
    return inputs
