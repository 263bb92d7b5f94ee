"""The LSTM over time in plain JAX: what the primitives of `foreign` mean.

Axes     T time, B batch, I input size, H hidden size, G = 4H in gate order i f g o.
Lengths  int32 `[B]`: steps past them do not count, and are 0 in hs.
Resets   uint8 `[T, B]`, or `[0, 0]` for none.
Kept     Of every step, for the derivative: hs `[T, B, H]` outputs, gates `[T, B, 4H]`
         after activation, before `[T, B, H]` the cell that the step started from. Past
         the lengths the last two are undefined.
Dtype    That of the inputs is the computation dtype, in which operands of products, h
         and hs are; c, before and tangents inside are float32 (float64 where that is
         the computation dtype), weights and their gradients in a dtype of their own.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from flax_lstm.cell import (
    LSTMParams,
    LSTMState,
    activate,
    preactivate,
    update,
    update_tangent,
)
from flax_lstm.loop import live_steps, select, vary_with


def stated(steps: Callable, state: Any, xs: Any, lengths: Any, resets: Any, reverse):
    """Scans `steps(state, x) -> (state, y)` where steps count, with resets."""
    live = live_steps(jax.tree.leaves(xs)[0].shape[0], lengths)
    resets = resets.astype(bool) if resets.size else None

    def step(state: Any, at: Any) -> tuple[Any, Any]:
        x, live, reset = at
        start = state if reset is None else select(~reset, state, 0)
        new, y = steps(start, x)
        return select(live, new, state), select(live, y, 0)

    xs = xs, live, resets
    return lax.scan(step, vary_with(state, xs), xs, reverse=reverse)


def forward(
    x,
    kernel,
    recurrent_kernel,
    bias,
    c,
    h,
    lengths,
    resets,
    *,
    reverse,
    keep,
    gates_dtype,
):
    """States the loop forward: see `flax_lstm_kernels.cpu.forward`."""
    params = LSTMParams(kernel, recurrent_kernel, bias)

    def steps(state: LSTMState, x: Any) -> tuple[LSTMState, Any]:
        gates = activate(preactivate(params, state.h, x))
        new_c, new_h = update(*gates, state.c)
        new = LSTMState(new_c, new_h.astype(x.dtype))
        kept = jnp.concatenate(gates, -1).astype(gates_dtype), state.c
        return new, (new.h, *kept)

    x = select(live_steps(x.shape[0], lengths), x, 0)
    final, (hs, gates, before) = stated(
        steps, LSTMState(c, h), x, lengths, resets, reverse
    )
    if not keep:
        gates, before = gates[:0, :0], before[:0, :0]
    return [hs, final.c, final.h, gates, before]


def linear(
    d_x,
    d_kernel,
    d_recurrent_kernel,
    d_bias,
    d_c,
    d_h,
    x,
    kernel,
    recurrent_kernel,
    h,
    hs,
    gates,
    before,
    lengths,
    resets,
    *,
    reverse,
):
    """States the tangent of the loop, linear in the first six arguments.

    Args:
      d_x: Tangent of the inputs; `[0, 0, 0]` for none.
      d_kernel: Tangents of the weights, as the next two.
      d_recurrent_kernel: See `d_kernel`.
      d_bias: See `d_kernel`.
      d_c: Tangent of the initial state, as the next.
      d_h: See `d_c`.
      x: Arguments of `forward`, as the next three.
      kernel: See `x`.
      recurrent_kernel: See `x`.
      h: See `x`.
      hs: What `forward` kept, as the next two.
      gates: See `hs`.
      before: See `hs`.
      lengths: See the file's head.
      resets: See the file's head.
      reverse: See `forward`.

    Returns:
      The tangents of the outputs, of the final cell and of the final output.
    """
    dtype, wide = x.dtype, before.dtype
    live = live_steps(x.shape[0], lengths)
    gates, before = select(live, (gates.astype(wide), before), 0)
    h_before = previous(hs, h, lengths, resets, reverse=reverse)

    def product(left: Array, right: Array) -> Array:
        return left.astype(wide) @ right.astype(wide)

    # The weights' side in float32: transposed, these are the products over all T.
    d_z = product(select(live, x, 0), d_kernel) + product(h_before, d_recurrent_kernel)
    d_z = d_z + jnp.broadcast_to(d_bias.astype(wide), d_z.shape)
    if d_x.size:
        d_z = d_z + product(select(live, d_x, 0), kernel.astype(dtype))
    rounded = recurrent_kernel.astype(dtype)

    def steps(state: LSTMState, at: Any) -> tuple[LSTMState, Any]:
        d_z, gates, c = at
        d_z = d_z + product(state.h, rounded)
        new = LSTMState(*update_tangent(jnp.split(gates, 4, -1), c, d_z, state.c))
        return new, new.h

    state = LSTMState(d_c, d_h.astype(wide))
    final, d_hs = stated(steps, state, (d_z, gates, before), lengths, resets, reverse)
    return [d_hs.astype(dtype), final.c, final.h.astype(dtype)]


def previous(hs: Array, h: Array, lengths: Array, resets: Array, *, reverse: bool):
    """Returns the output that each step started from, `[T, B, H]`, after resets."""
    steps = jnp.arange(hs.shape[0])[:, None]
    first = steps == (lengths[None] - 1 if reverse else 0)
    shifted = jnp.roll(hs, -1 if reverse else 1, 0)
    started = select(first, jnp.broadcast_to(h, hs.shape), shifted)
    started = select(live_steps(hs.shape[0], lengths), started, 0)
    return select(resets == 0, started, 0) if resets.size else started


def transposed(d_hs, d_c, d_h, *kept, reverse, of_inputs):
    """States the transpose of `linear`: see `flax_lstm_kernels.cpu.backward`."""
    x, kernel, recurrent_kernel, h = kept[:4]
    like = (
        x if of_inputs else jnp.zeros((0, 0, 0), x.dtype),
        kernel,
        recurrent_kernel,
        kernel[0],
        d_c,
        h,
    )

    def of_tangents(*tangents):
        return linear(*tangents, *kept, reverse=reverse)

    return list(jax.linear_transpose(of_tangents, *like)([d_hs, d_c, d_h]))
