"""The maths of one LSTM step, shared by every implementation.

Axes     *B any number of batch axes, I input size, H hidden size, G = 4H gate
         pre-activations in the order i f g o (input, forget, candidate, output).
Equation z = x W + h R + b;  i, f, o = sigmoid(z_i, z_f, z_o);  g = tanh(z_g);
         c' = f c + i g;  h' = o tanh(c').  Hochreiter & Schmidhuber (1997) with the
         forget gate of Gers, Schmidhuber & Cummins (2000).
Numerics The products take their operands in the computation dtype; the gates and c
         are kept in float32 (float64 when that is the computation dtype).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

Initializer = Callable[..., Array]

glorot = jax.nn.initializers.glorot_uniform()
orthogonal = jax.nn.initializers.orthogonal()


class LSTMParams(NamedTuple):
    """Weights of one layer, gate order i f g o: Keras' layout, PyTorch's transposed.

    Attributes:
      kernel: `[I, 4H]`, multiplies the input.
      recurrent_kernel: `[H, 4H]`, multiplies the previous output.
      bias: `[4H]`. The forget bias is part of it; nothing is added at run time.
    """

    kernel: Float[Array, "I G"]
    recurrent_kernel: Float[Array, "H G"]
    bias: Float[Array, " G"]


class LSTMState(NamedTuple):
    """What one step hands to the next, in Flax's order (c, h).

    Attributes:
      c: cell state `[*B, H]`, float32 or float64 whatever the computation dtype.
      h: output `[*B, H]`, in the computation dtype.
    """

    c: Float[Array, "*B H"]
    h: Float[Array, "*B H"]


Pair = LSTMState | tuple[Any, Any]  # what a caller may hand over as a state


def state_dtype(dtype: Any) -> jnp.dtype:
    """Returns the dtype that carries c: float64 for float64, else float32.

    >>> state_dtype(jnp.bfloat16)
    dtype('float32')
    """
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def draw(init: Initializer, key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any):
    """Draws from `init` in at least float32, then casts.

    LAPACK has no 16-bit types, so Flax's orthogonal initialiser fails for them.
    """
    return init(key, shape, state_dtype(dtype)).astype(dtype)


def draw_gates(
    init: Initializer, key: PRNGKeyArray, shape: tuple[int, int], dtype: Any
) -> Float[Array, "D G"]:
    """Draws a `[D, 4H]` matrix, the `[D, H]` of each gate on its own."""
    rows, hidden = shape[0], shape[1] // 4
    gates = [draw(init, k, (rows, hidden), dtype) for k in jax.random.split(key, 4)]
    return jnp.concatenate(gates, axis=-1)


def init_lstm_params(
    key: PRNGKeyArray,
    input_size: int,
    hidden_size: int,
    *,
    kernel_init: Initializer = glorot,
    recurrent_kernel_init: Initializer = orthogonal,
    forget_bias: float = 1.0,
    dtype: Any = jnp.float32,
) -> LSTMParams:
    """Draws one layer: Glorot-uniform input, orthogonal recurrent, forget bias 1.

    Each gate is drawn on its own, as a `[I, H]` and a `[H, H]` matrix, so that the
    fan-out of the initialisers is that of one gate.

    Args:
      key: PRNG key; consumed.
      input_size: I, the size of one input vector.
      hidden_size: H, the number of units.
      kernel_init: Initialiser of the four `[I, H]` input matrices.
      recurrent_kernel_init: Initialiser of the four `[H, H]` recurrent matrices.
      forget_bias: Stored in the forget part of `bias` (Jozefowicz, Zaremba &
        Sutskever 2015 recommend 1); the other biases are 0.
      dtype: Floating dtype of all three arrays.

    Returns:
      `LSTMParams` with `kernel [I, 4H]`, `recurrent_kernel [H, 4H]`, `bias [4H]`.

    Raises:
      ValueError: If a size is below 1.
    """
    if input_size < 1 or hidden_size < 1:
        raise ValueError(
            "input_size and hidden_size must be at least 1; got "
            f"input_size={input_size}, hidden_size={hidden_size}."
        )

    wide = 4 * hidden_size
    key_x, key_h = jax.random.split(key)
    bias = jnp.zeros((4, hidden_size), dtype).at[1].set(forget_bias)
    return LSTMParams(
        kernel=draw_gates(kernel_init, key_x, (input_size, wide), dtype),
        recurrent_kernel=draw_gates(
            recurrent_kernel_init, key_h, (hidden_size, wide), dtype
        ),
        bias=bias.reshape(wide),
    )


def zero_state(
    batch_shape: tuple[int, ...], hidden_size: int, dtype: Any = jnp.float32
) -> LSTMState:
    """Returns the state before the first step: c and h zero, shape `[*B, H]`."""
    shape = (*batch_shape, hidden_size)
    return LSTMState(jnp.zeros(shape, state_dtype(dtype)), jnp.zeros(shape, dtype))


def squash(
    i: Array, f: Array, g: Array, o: Array, sigmoid: Callable = jax.nn.sigmoid
) -> tuple[Array, Array, Array, Array]:
    """Turns four pre-activations into the gates i, f, g, o, each of its own shape."""
    return sigmoid(i), sigmoid(f), jnp.tanh(g), sigmoid(o)


def activate(
    z: Float[Array, "*B G"],
) -> tuple[Array, Array, Array, Array]:
    """Turns gate pre-activations into the gates i, f, g, o, each `[*B, H]`."""
    i, f, g, o = jnp.split(z, 4, axis=-1)
    return squash(i, f, g, o)


def update(i: Array, f: Array, g: Array, o: Array, c: Array) -> tuple[Array, Array]:
    """Applies the gates to the old cell: returns the new c and h, each `[*B, H]`."""
    c = f * c + i * g
    return c, o * jnp.tanh(c)


def update_tangent(
    gates: Sequence[Array], c: Array, d_z: Float[Array, "*B G"], d_c: Array
) -> tuple[Array, Array]:
    """Returns the tangents of the new c and h, each `[*B, H]`.

    Args:
      gates: i, f, g, o of the step, after activation.
      c: The old cell.
      d_z: Tangent of the gate pre-activations.
      d_c: Tangent of the old cell.

    >>> one = jnp.ones((1, 1))
    >>> d_c, _ = update_tangent([one / 2] * 4, one, jnp.zeros((1, 4)), one)
    >>> d_c.tolist()  # f = 1/2 halves that of the cell
    [[0.5]]
    """
    i, f, g, o = gates
    z_i, z_f, z_g, z_o = jnp.split(d_z, 4, axis=-1)
    d_c = (
        f * d_c + g * i * (1 - i) * z_i + c * f * (1 - f) * z_f + i * (1 - g * g) * z_g
    )
    tanh_c = jnp.tanh(f * c + i * g)
    return d_c, tanh_c * o * (1 - o) * z_o + o * (1 - tanh_c * tanh_c) * d_c


def advance(z: Float[Array, "*B G"], c: Float[Array, "*B H"]) -> LSTMState:
    """Turns gate pre-activations and the old cell into the new state.

    Elementwise, so it is also legal inside a Pallas kernel body.

    >>> new = advance(jnp.zeros((2, 4)), jnp.ones((2, 1)))
    >>> new.c.tolist()  # f = 1/2 halves the cell; g = 0 writes nothing
    [[0.5], [0.5]]
    """
    return LSTMState(*update(*activate(z), c))


def project(x: Float[Array, "*B D"], kernel: Float[Array, "D G"]) -> Array:
    """Returns `x @ kernel`: operands in x's dtype, result at least float32."""
    return jnp.matmul(
        x, kernel.astype(x.dtype), preferred_element_type=state_dtype(x.dtype)
    )


def preactivate(params: Any, h: Array, x: Array) -> Float[Array, "*B G"]:
    """Returns `x W + h R + b`, in float32 at least.

    Args:
      params: Anything with `kernel`, `recurrent_kernel` and `bias`; cast to x's dtype,
        which is the computation dtype. The cast is made here, inside any loop, so that
        the gradient of the weights is summed over time in the dtype of the weights.
      h: The previous output `[*B, H]`.
      x: Input `[*B, I]`.
    """
    z = project(x, params.kernel) + project(h.astype(x.dtype), params.recurrent_kernel)
    return z + jnp.broadcast_to(params.bias.astype(z.dtype), z.shape)


def lstm_cell(
    params: LSTMParams, state: Pair, x: Float[Array, "*B I"]
) -> tuple[LSTMState, Float[Array, "*B H"]]:
    """Advances the LSTM by one step; results in Flax's order.

    Args:
      params: Weights.
      state: The state before the step, or any pair (c, h).
      x: Input `[*B, I]`.

    Returns:
      `(new_state, y)` where y `[*B, H]` is `new_state.h`, in x's dtype.
    """
    c, h = state
    z = preactivate(params, h, x)
    new = advance(z, c.astype(z.dtype))
    h = new.h.astype(x.dtype)
    return LSTMState(new.c, h), h
