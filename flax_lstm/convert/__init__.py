"""Weights to and from everyone else's LSTM, as dictionaries and lists of arrays.

None of the packages named here is needed. A stack is a tuple of layers, a layer a
tuple of one or two directions (forward, backward), a direction `LSTMParams` (or
`ProjectedParams`, `PeepholeParams` where the other side has them):

    ((forward, backward), (forward, backward)) = from_torch(module.state_dict())

`from_x(to_x(stack))` is the stack, bit for bit where no forget bias is folded in. The
leaves read are JAX arrays, so float64 stays float64 only where JAX has it enabled;
those written are NumPy arrays. Forms are checked: an error names the key or position,
the shape expected and the one found.
"""

from flax_lstm.convert.flax_cells import from_linen, from_nnx, to_linen, to_nnx
from flax_lstm.convert.layout import Layer, Stack
from flax_lstm.convert.onnx_operator import from_onnx, to_onnx
from flax_lstm.convert.packed_layout import (
    from_haiku,
    from_keras,
    from_tf1,
    to_haiku,
    to_keras,
    to_tf1,
)
from flax_lstm.convert.torch_layout import (
    from_cudnn,
    from_equinox,
    from_torch,
    to_cudnn,
    to_equinox,
    to_torch,
)

__all__ = [
    "Layer",
    "Stack",
    "from_cudnn",
    "from_equinox",
    "from_haiku",
    "from_keras",
    "from_linen",
    "from_nnx",
    "from_onnx",
    "from_tf1",
    "from_torch",
    "to_cudnn",
    "to_equinox",
    "to_haiku",
    "to_keras",
    "to_linen",
    "to_nnx",
    "to_onnx",
    "to_tf1",
    "to_torch",
]
