"""Other cells in the form of `lstm_cell`, with their parameters.

Each runs over time with `scan_cell`, and so has lengths, resets, both directions and
every mode of differentiation:

    params = init_peephole_params(key, input_size, hidden_size)
    final, outputs = scan_cell(peephole_cell, params, inputs, zero_state((B,), H))

Axes     *B any number of batch axes, I input size, H hidden size, P size of the
         projected output, G = 4H in gate order i f g o.
Numerics As in `flax_lstm.cell`: products in the dtype of x, gates and c in float32 at
         least.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from flax_lstm.cell import (
    LSTMParams,
    LSTMState,
    activate,
    draw,
    glorot,
    init_lstm_params,
    preactivate,
    project,
    state_dtype,
    update,
)


class PeepholeParams(NamedTuple):
    """Weights of one layer whose gates see the cell.

    Attributes:
      kernel: `[I, 4H]`.
      recurrent_kernel: `[H, 4H]`.
      bias: `[4H]`.
      peephole: `[3, H]`, diagonal weights from the cell to i, f and o.
    """

    kernel: Any
    recurrent_kernel: Any
    bias: Any
    peephole: Any


class ProjectedParams(NamedTuple):
    """Weights of one layer whose output is projected from H to P values.

    Attributes:
      kernel: `[I, 4H]`.
      recurrent_kernel: `[P, 4H]`.
      bias: `[4H]`.
      projection: `[H, P]`.
    """

    kernel: Any
    recurrent_kernel: Any
    bias: Any
    projection: Any


class LayerNormParams(NamedTuple):
    """Weights of one layer with layer normalisation.

    Attributes:
      kernel: `[I, 4H]`.
      recurrent_kernel: `[H, 4H]`.
      bias: `[4H]`; the shifts of both normalised products are part of it.
      kernel_scale: `[4H]`, the gain of the normalised `x W`.
      recurrent_scale: `[4H]`, the gain of the normalised `h R`.
      cell_scale: `[H]`, the gain of the normalised cell.
      cell_bias: `[H]`, the shift of the normalised cell.
    """

    kernel: Any
    recurrent_kernel: Any
    bias: Any
    kernel_scale: Any
    recurrent_scale: Any
    cell_scale: Any
    cell_bias: Any


class CoupledParams(NamedTuple):
    """Weights of one layer with a single gate to forget and to write; order f g o.

    Attributes:
      kernel: `[I, 3H]`.
      recurrent_kernel: `[H, 3H]`.
      bias: `[3H]`.
    """

    kernel: Any
    recurrent_kernel: Any
    bias: Any


def peephole_cell(
    params: PeepholeParams, state: LSTMState, x: Float[Array, "*B I"]
) -> tuple[LSTMState, Float[Array, "*B H"]]:
    """Advances by one step: i and f see the old cell, o the new one.

    Gers, Schraudolph & Schmidhuber (2002). With peepholes 0 this is `lstm_cell`.
    """
    z = preactivate(params, state.h, x)
    z_i, z_f, z_g, z_o = jnp.split(z, 4, axis=-1)
    p_i, p_f, p_o = (jnp.broadcast_to(p.astype(z.dtype), z_i.shape) for p in params[3])
    old = state.c.astype(z.dtype)
    i = jax.nn.sigmoid(z_i + p_i * old)
    f = jax.nn.sigmoid(z_f + p_f * old)
    c = f * old + i * jnp.tanh(z_g)
    h = (jax.nn.sigmoid(z_o + p_o * c) * jnp.tanh(c)).astype(x.dtype)
    return LSTMState(c, h), h


def projected_cell(
    params: ProjectedParams, state: LSTMState, x: Float[Array, "*B I"]
) -> tuple[LSTMState, Float[Array, "*B P"]]:
    """Advances by one step: the output, and what recurs, is `(o tanh c) projection`.

    Sak, Senior & Beaufays (2014), without their separate non-recurrent projection; as
    `torch.nn.LSTM(proj_size=P)`.
    """
    z = preactivate(params, state.h, x)
    c, full = update(*activate(z), state.c.astype(z.dtype))
    h = project(full.astype(x.dtype), params.projection).astype(x.dtype)
    return LSTMState(c, h), h


def layer_norm_cell(
    params: LayerNormParams, state: LSTMState, x: Float[Array, "*B I"]
) -> tuple[LSTMState, Float[Array, "*B H"]]:
    """Advances by one step, both products and the cell normalised.

    Ba, Kiros & Hinton (2016), equations 20 to 22: each product is normalised over its
    4H values, the cell over its H values on its way to the output only.
    """
    scaled_x = normalize(project(x, params.kernel)) * row(params.kernel_scale, x)
    scaled_h = normalize(
        project(state.h.astype(x.dtype), params.recurrent_kernel)
    ) * row(params.recurrent_scale, x)
    z = scaled_x + scaled_h + row(params.bias, x)
    i, f, g, o = activate(z)
    c = f * state.c.astype(z.dtype) + i * g
    seen = normalize(c) * row(params.cell_scale, x) + row(params.cell_bias, x)
    h = (o * jnp.tanh(seen)).astype(x.dtype)
    return LSTMState(c, h), h


def coupled_cell(
    params: CoupledParams, state: LSTMState, x: Float[Array, "*B I"]
) -> tuple[LSTMState, Float[Array, "*B H"]]:
    """Advances by one step with i = 1 - f: what is forgotten makes room.

    "CIFG" of Greff et al. (2017).
    """
    z = preactivate(params, state.h, x)
    z_f, z_g, z_o = jnp.split(z, 3, axis=-1)
    f = jax.nn.sigmoid(z_f)
    c, h = update(1 - f, f, jnp.tanh(z_g), jax.nn.sigmoid(z_o), state.c.astype(z.dtype))
    h = h.astype(x.dtype)
    return LSTMState(c, h), h


def clipped_cell(limit: float) -> Callable[..., tuple[LSTMState, Array]]:
    """Returns `lstm_cell` with c kept within -limit … limit.

    The output is made of the clipped cell, as with TensorFlow's `cell_clip`; where it
    is clipped, no gradient passes.

    Raises:
      ValueError: If the limit is not above 0.
    """
    if not limit > 0:
        raise ValueError(f"limit must be above 0; got {limit}.")

    def cell(params: LSTMParams, state: LSTMState, x: Array) -> tuple[LSTMState, Array]:
        z = preactivate(params, state.h, x)
        i, f, g, o = activate(z)
        c = jnp.clip(f * state.c.astype(z.dtype) + i * g, -limit, limit)
        h = (o * jnp.tanh(c)).astype(x.dtype)
        return LSTMState(c, h), h

    return cell


def normalize(values: Float[Array, "*B D"], epsilon: float = 1e-5) -> Array:
    """Shifts and scales the last axis to mean 0 and variance 1."""
    centred = values - jnp.mean(values, axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + epsilon)


def row(vector: Float[Array, " D"], x: Float[Array, "*B I"]) -> Array:
    """Gives a vector the batch axes of x, and the dtype that gates have."""
    wide = vector.astype(state_dtype(x.dtype))
    return jnp.broadcast_to(wide, (*x.shape[:-1], *vector.shape))


def init_peephole_params(
    key: PRNGKeyArray, input_size: int, hidden_size: int, **options: Any
) -> PeepholeParams:
    """Draws one layer as `init_lstm_params` does, with peepholes 0.

    Args:
      key: PRNG key; consumed.
      input_size: I, the size of one input vector.
      hidden_size: H, the number of units.
      **options: As in `init_lstm_params`.

    Returns:
      The parameters.
    """
    plain = init_lstm_params(key, input_size, hidden_size, **options)
    return PeepholeParams(*plain, jnp.zeros((3, hidden_size), plain.bias.dtype))


def init_projected_params(
    key: PRNGKeyArray,
    input_size: int,
    hidden_size: int,
    projection_size: int,
    **options: Any,
) -> ProjectedParams:
    """Draws one layer as `init_lstm_params` does, with a Glorot-uniform projection.

    Args:
      key: PRNG key; consumed.
      input_size: I, the size of one input vector.
      hidden_size: H, the number of units.
      projection_size: P, the size of the output; 1 to H.
      **options: As in `init_lstm_params`.

    Returns:
      The parameters; the first P rows of an `[H, 4H]` recurrent kernel.

    Raises:
      ValueError: If the projection size is outside 1 … H.
    """
    if not 1 <= projection_size <= hidden_size:
        raise ValueError(
            f"projection_size must be within 1 … {hidden_size}, the hidden size; "
            f"got {projection_size}."
        )
    key, key_p = jax.random.split(key)
    plain = init_lstm_params(key, input_size, hidden_size, **options)
    shape = (hidden_size, projection_size)
    return ProjectedParams(
        plain.kernel,
        plain.recurrent_kernel[:projection_size],
        plain.bias,
        draw(glorot, key_p, shape, plain.bias.dtype),
    )


def init_layer_norm_params(
    key: PRNGKeyArray, input_size: int, hidden_size: int, **options: Any
) -> LayerNormParams:
    """Draws one layer as `init_lstm_params` does, with gains 1 and shift 0.

    Args:
      key: PRNG key; consumed.
      input_size: I, the size of one input vector.
      hidden_size: H, the number of units.
      **options: As in `init_lstm_params`.

    Returns:
      The parameters.
    """
    plain = init_lstm_params(key, input_size, hidden_size, **options)
    dtype = plain.bias.dtype
    gates, units = jnp.ones(4 * hidden_size, dtype), jnp.ones(hidden_size, dtype)
    return LayerNormParams(*plain, gates, gates, units, jnp.zeros_like(units))


def init_coupled_params(
    key: PRNGKeyArray, input_size: int, hidden_size: int, **options: Any
) -> CoupledParams:
    """Draws the gates f, g and o as `init_lstm_params` does.

    Args:
      key: PRNG key; consumed.
      input_size: I, the size of one input vector.
      hidden_size: H, the number of units.
      **options: As in `init_lstm_params`.

    Returns:
      The parameters.
    """
    plain = init_lstm_params(key, input_size, hidden_size, **options)
    return CoupledParams(*(p[..., hidden_size:] for p in plain))


def zero_projected_state(
    batch_shape: tuple[int, ...],
    hidden_size: int,
    projection_size: int,
    dtype: Any = jnp.float32,
) -> LSTMState:
    """Returns the state of a projected layer before its first step, all zero."""
    return LSTMState(
        jnp.zeros((*batch_shape, hidden_size), state_dtype(dtype)),
        jnp.zeros((*batch_shape, projection_size), dtype),
    )
