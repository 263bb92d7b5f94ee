"""The LSTM over time by cuDNN, through JAX's own binding of it.

What the binding leaves to the caller is done here. A length of 0, which cuDNN does not
take, runs one step that nothing sees. It goes forward only, so that for the other
direction the valid steps are turned around before and after. It adds two biases, of
which the second is 0. It takes rows before time.

Axes     T time, B batch, I input size, H hidden size, G = 4H in gate order i f g o,
         which is cuDNN's.
Dtype    float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import rnn
from jaxtyping import Array, Float, Int, UInt8

from flax_lstm.cell import LSTMParams, LSTMState
from flax_lstm.choice import allows_tf32
from flax_lstm.loop import flip, live_steps, select


def recurrence(
    reverse: bool,
    params: LSTMParams,
    inputs: Float[Array, "T B I"],
    state: LSTMState,
    lengths: Int[Array, " B"],
    resets: UInt8[Array, "0 0"],
    *,
    run: Any = rnn.lstm,
) -> tuple[LSTMState, Float[Array, "T B H"]]:
    """Runs the LSTM over time; results as those of `foreign.recurrence`.

    Args:
      reverse: From the last valid step to the first.
      params: Weights.
      inputs: `[T, B, I]`; not read past the lengths.
      state: State before the first step.
      lengths: int32, 0 to T.
      resets: None, in the form that the kernels take.
      run: `jax.experimental.rnn.lstm`, or a function that stands in for it.
    """
    del resets
    steps, _, size = inputs.shape
    hidden = state.h.shape[1]
    live = live_steps(steps, lengths)
    inputs = select(live, inputs, 0)
    if reverse:
        inputs = flip(inputs, lengths)
    outputs, h, c = run(
        inputs.swapaxes(0, 1),
        state.h[None],
        state.c[None],
        packed(params),
        jnp.maximum(lengths, 1),
        size,
        hidden,
        1,
        0.0,
        False,
        jax.lax.Precision.HIGH if allows_tf32() else jax.lax.Precision.HIGHEST,
    )
    hs = select(live, outputs.swapaxes(0, 1), 0)
    final = select(lengths > 0, LSTMState(c[0], h[0]), state)
    return final, flip(hs, lengths) if reverse else hs


def packed(params: LSTMParams) -> Float[Array, " _"]:
    """Returns the weights as cuDNN reads them: one after another, gates as rows."""
    parts = (
        params.kernel.T,
        params.recurrent_kernel.T,
        params.bias,
        jnp.zeros_like(params.bias),
    )
    return jnp.concatenate([part.reshape(-1) for part in parts])
