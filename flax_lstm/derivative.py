"""The sequence with a derivative of its own: `implementation="xla"`.

Plain autodiff of the scan adds each step's share of the weight gradients inside the
loop: T small products, T reads and writes of the weights. Here the loop emits the
gradient dz of the gate pre-activations, and the gradients of kernel, recurrent kernel,
bias and inputs are one product (or sum) each over all T steps, after it.

Rule     The tangent is written so that everything linear in the weights stands outside
         the loop:  dz = dx W + x dW + h dR + db,  one product each. JAX transposes it
         into the above by itself, so that one rule serves forward and reverse mode,
         any order, vmap and all else that JAX does with a linear function.
Kept     For reverse mode: inputs, gates after activation, c and h of every step. What
         the rule computes from them elementwise is computed anew when needed, for
         which the two `jax.checkpoint` are here.

Axes     T time, *B any number of batch axes, I input size, H hidden size, G = 4H.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from flax_lstm.cell import (
    LSTMParams,
    LSTMState,
    activate,
    project,
    update,
    update_tangent,
)
from flax_lstm.loop import select, vary_with


class Options(NamedTuple):
    """What is fixed when a recurrence is traced.

    Attributes:
      reverse: Goes from the last step to the first.
      unroll: Steps in one iteration of the loop.
      hoist: Multiplies all inputs with the kernel before the loop, in one product,
        not step by step inside it.
      flatten: Joins time and batch to one axis for the products after the loop.
    """

    reverse: bool = False
    unroll: int = 1
    hoist: bool = True
    flatten: bool = False

    @classmethod
    def for_backend(cls, *, reverse: bool = False, unroll: int = 1) -> "Options":
        """Chooses what is faster on the default backend.

        On a CPU multiplying all inputs first takes more memory, and more time where
        rows are many (they fall out of the cache before they are used); it is up to an
        eighth faster with 8 or 16 rows. And XLA:CPU copies the larger operand of a
        product over two axes, which takes longer than the product itself. Elsewhere
        joining the axes would undo a sharding over the batch.
        See experiments/results/derivative_cost.csv.
        """
        cpu = jax.default_backend() == "cpu"
        return cls(reverse, unroll, hoist=not cpu, flatten=cpu)


class Kept(NamedTuple):
    """What the derivative needs of every step: the gates and the states around it.

    Attributes:
      gates: i, f, g, o, each `[T, *B, H]`, after activation.
      c: `[T, *B, H]`, the cell that the step started from, after a reset.
      h: `[T, *B, H]`, the output that the step ended with.
    """

    gates: Any
    c: Float[Array, "T *B H"]
    h: Float[Array, "T *B H"]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def recurrence(
    options: Options,
    params: LSTMParams,
    inputs: Float[Array, "T *B I"],
    state: LSTMState,
    live: Bool[Array, "T *B"] | None,
    resets: Bool[Array, "T *B"] | None,
) -> tuple[LSTMState, Float[Array, "T *B H"]]:
    """Runs the LSTM over time; h of steps that do not count is that of the step before.

    Args:
      options: See `Options`.
      params: Weights.
      inputs: `[T, *B, I]` in the computation dtype; finite where not live.
      state: State before the first step.
      live: Where false, the step leaves the state as it is; None for true everywhere.
      resets: Where true, the state is zero before the step.

    Returns:
      `(final_state, h)`, h `[T, *B, H]` in the order of the inputs.
    """
    final, h, _ = forward(options, params, inputs, state, live, resets, keep=False)
    return final, h


def forward(
    options: Options,
    params: LSTMParams,
    inputs: Array,
    state: LSTMState,
    live: Array | None,
    resets: Array | None,
    *,
    keep: bool,
) -> tuple[LSTMState, Array, Kept | None]:
    """Returns the final state, h of every step, and what the derivative needs."""
    params = LSTMParams(*(p.astype(inputs.dtype) for p in params))
    z_x = project(inputs, params.kernel) if options.hoist else inputs

    def step(state: LSTMState, at: Any) -> tuple[LSTMState, Any]:
        x, live, reset = at
        if reset is not None:
            state = select(~reset, state, 0)
        z = x if options.hoist else project(x, params.kernel)
        z = z + project(state.h, params.recurrent_kernel)
        z = z + jnp.broadcast_to(params.bias.astype(z.dtype), z.shape)
        gates = activate(z)
        c, h = update(*gates, state.c)
        new = LSTMState(c, h.astype(state.h.dtype))
        if live is not None:
            new = select(live, new, state)
        return new, (new.h, (gates, state.c) if keep else None)

    state = vary_with(state, (params, inputs, live, resets))
    final, (h, kept) = lax.scan(
        step,
        state,
        (z_x, live, resets),
        reverse=options.reverse,
        unroll=options.unroll,
    )
    if not keep:
        return final, h, None
    gates, c = kept
    return final, h, Kept(gates, c, h)


@recurrence.defjvp
def recurrence_jvp(options: Options, primals: Any, tangents: Any) -> tuple[Any, Any]:
    """Returns the results and their tangents; linear in the tangents given."""
    params, inputs, state, live, resets = primals
    final, h, kept = forward(options, *primals, keep=True)
    fixed = params, inputs, state, live, resets, kept
    linear = jax.checkpoint(partial(tangent, options), prevent_cse=False)
    return (final, h), linear(fixed, tangents[:3])


def tangent(options: Options, fixed: Any, tangents: Any) -> tuple[LSTMState, Array]:
    """Returns the tangents of the final state and of h, given those of the arguments.

    Args:
      options: As in the recurrence.
      fixed: The arguments, and what was kept of the steps; not differentiated in
        reverse mode of first order.
      tangents: Of params, inputs and the initial state; the result is linear in them.
    """
    params, inputs, state, live, resets, kept = fixed
    d_params, d_inputs, d_state = tangents
    wide = kept.c.dtype
    h_before = shift(kept.h, state.h, reverse=options.reverse)
    if resets is not None:
        h_before = select(~resets, h_before, 0)

    def product(x: Array, kernel: Array) -> Array:
        known = all(isinstance(size, int) for size in x.shape)
        if not (options.flatten and known):  # of symbolic sizes no product can be told
            return project(x, kernel)
        flat = project(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), kernel)
        return flat.reshape(*x.shape[:-1], kernel.shape[-1])

    # The weights' side in float32: transposed, these are the products over all T.
    d_z = (
        product(d_inputs, params.kernel)
        + product(inputs.astype(wide), d_params.kernel)
        + product(h_before.astype(wide), d_params.recurrent_kernel)
    )
    d_z = d_z + jnp.broadcast_to(d_params.bias.astype(wide), d_z.shape)
    # Turned here, once: transposed, the loop multiplies with it as it lies in memory.
    turned = params.recurrent_kernel.astype(inputs.dtype).astype(wide).T

    @partial(jax.checkpoint, prevent_cse=False)
    def step(d_state: LSTMState, at: Any) -> tuple[LSTMState, Array]:
        d_z, gates, c, live, reset = at
        if reset is not None:
            d_state = select(~reset, d_state, 0)
        d_z = d_z + jnp.matmul(d_state.h, turned.T)
        new = LSTMState(*update_tangent(gates, c, d_z, d_state.c))
        if live is not None:
            new = select(live, new, d_state)
        return new, new.h

    d_state = LSTMState(d_state.c, d_state.h.astype(wide))
    d_state = vary_with(d_state, (d_z, kept, turned, live, resets))
    d_final, d_h = lax.scan(
        step,
        d_state,
        (d_z, kept.gates, kept.c, live, resets),
        reverse=options.reverse,
        unroll=options.unroll,
    )
    dtype = state.h.dtype
    return LSTMState(d_final.c, d_final.h.astype(dtype)), d_h.astype(dtype)


def shift(
    sequence: Float[Array, "T *B H"], first: Float[Array, "*B H"], *, reverse: bool
) -> Float[Array, "T *B H"]:
    """Returns the value before each step, `first` before the first to be processed.

    >>> shift(jnp.array([[1.0], [2.0]]), jnp.array([9.0]), reverse=False)[:, 0]
    Array([9., 1.], dtype=float32)
    """
    if reverse:
        return jnp.concatenate([sequence, first[None]])[1:]
    return jnp.concatenate([first[None], sequence])[:-1]
