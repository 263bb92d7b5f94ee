"""The cell over time: lengths, resets, direction, and the choice of implementation.

Axes     T time, *B any number of batch axes, I input size, H hidden size.
Order    Functions are time-major, `[T, *B, I]`, and return `(final_state, outputs)`
         as `jax.lax.scan` does.
Lengths  Steps at or past a row's length leave its state as it is and output 0.
         Whatever stands in the padding, NaN included, changes no output and no
         gradient.
Resets   Where true, the state is set to zero before the step; gradients do not cross.
Pieces   A sequence may be fed piece by piece, each starting from the final state of the
         one before: the numbers are those of the whole.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flax_lstm.cell import (
    LSTMParams,
    LSTMState,
    Pair,
    activate,
    preactivate,
    state_dtype,
    update,
    zero_state,
)
from flax_lstm.checks import (
    check_floating,
    check_params,
    check_sequence,
    check_state,
    check_switches,
)
from flax_lstm.choice import (
    Explanation,
    Implementation,
    Request,
    choose,
    explained,
)
from flax_lstm.loop import Given, spread_as
from flax_lstm.over_time import OVER_TIME, lstm_by_kernel, scan_cell


class Internals(NamedTuple):
    """What happens inside the LSTM at every step: each `[T, *B, H]`, 0 in the padding.

    Attributes:
      i: Input gate, after its sigmoid; f and o likewise.
      f: Forget gate.
      g: Candidate, after its tanh.
      o: Output gate.
      c: Cell state after the step.
      h: Output of the step.
    """

    i: Array
    f: Array
    g: Array
    o: Array
    c: Array
    h: Array


def lstm(
    params: LSTMParams,
    inputs: Float[Given, "T *B I"],
    state: Pair | None = None,
    *,
    lengths: Int[Given, "*B"] | None = None,
    resets: Bool[Given, "T *B"] | None = None,
    reverse: bool = False,
    keep_order: bool = False,
    dtype: Any = None,
    implementation: Implementation | None = None,
    unroll: int = 1,
    remat: bool | int = False,
) -> tuple[LSTMState, Float[Array, "T *B H"]]:
    """Runs one LSTM layer over time-major sequences.

    Args:
      params: Weights of the layer.
      inputs: `[T, *B, I]`; T may be 0, and so may any batch axis.
      state: State before the first step, `LSTMState` or any pair (c, h); zero when
        None.
      lengths: Number of valid steps of each row, 0 to T; T when None. A length of 0
        returns the initial state.
      resets: Where true, the state is zero before that step (in the direction of
        processing); ignored in the padding.
      reverse: Processes each row from its last valid step to its first.
      keep_order: With `reverse`, returns the outputs in the order of the inputs
        instead of the order of processing. As in `flax.linen.RNN`.
      dtype: Computation dtype; the promotion of inputs and weights when None. The
        cell state is carried in float32 at least.
      implementation: "scan" is `jax.lax.scan` differentiated by JAX, the reference.
        "xla" has a derivative arranged for speed (`flax_lstm.derivative`). "cpu" is a
        kernel in C++ (`flax_lstm_kernels.cpu`), "pallas" the kernel of the TPU or GPU
        (`flax_lstm_kernels.tpu`, `.gpu`), "cudnn" JAX's binding of NVIDIA's. None
        chooses the fastest that can do what was asked; see `explain`.
      unroll: Steps of the scan unrolled into one loop iteration.
      remat: Saves memory in reverse mode for one more run forward: what the derivative
        needs is kept for that many steps at a time; True for the square root of T.

    Returns:
      `(final_state, outputs)`, outputs `[T, *B, H]` in the computation dtype.

    Raises:
      TypeError: If weights, inputs, state or `dtype` are not floating, lengths not
        integers, resets not booleans, `reverse` or `keep_order` neither True nor False.
      ValueError: If a shape does not fit, a concrete length is outside 0 … T, `remat`
        is below 1, or `implementation` is no name of one.
      NotImplementedError: If the implementation asked for cannot run, or with `remat`
        where time is symbolic.
    """
    check_switches(reverse=reverse, keep_order=keep_order)
    call = prepared(params, inputs, state, lengths, resets, dtype)
    over_time = OVER_TIME[choose(implementation, Request(*call, resets is not None))]
    if over_time is lstm_by_kernel:
        over_time = partial(lstm_by_kernel, asked=implementation is not None)
    return over_time(
        *call,
        lengths=lengths,
        resets=resets,
        reverse=reverse,
        keep_order=keep_order,
        unroll=unroll,
        remat=remat,
    )


def explain(
    params: Any,
    inputs: Any,
    state: Any = None,
    *,
    lengths: Any = None,
    resets: Any = None,
    dtype: Any = None,
    implementation: Implementation | None = None,
    **options: Any,
) -> Explanation:
    """Says which implementation `lstm` would run for these arguments.

    Args:
      params: As all the arguments, what `lstm` would be called with. Shapes suffice,
        `jax.ShapeDtypeStruct`, in place of arrays.
      inputs: See `lstm`.
      state: See `lstm`.
      lengths: See `lstm`.
      resets: See `lstm`.
      dtype: See `lstm`.
      implementation: See `lstm`.
      **options: See `lstm`.

    Returns:
      The implementation, None where the one asked for cannot run, and why each of the
      others does not; prints as a few lines.

    Raises:
      TypeError: As `lstm`.
      ValueError: As `lstm`.
      NotImplementedError: As `lstm`, with `remat`.

    >>> params = LSTMParams(jnp.zeros((2, 4)), jnp.zeros((1, 4)), jnp.zeros(4))
    >>> told = explain(params, jnp.zeros((5, 3, 2)), implementation="scan")
    >>> print(told.reasons["xla"])
    could run, but "scan" was asked for
    """
    told = []
    known = lengths if isinstance(lengths, Given) else None

    def call(arrays: Any) -> Any:
        params, inputs, state, lengths, resets = arrays
        lengths = lengths if known is None else known  # its values are checked
        arguments = prepared(params, inputs, state, lengths, resets, dtype)
        request = Request(*arguments, resets is not None)
        told.append(explained(implementation, request))
        return lstm(
            params,
            inputs,
            state,
            lengths=lengths,
            resets=resets,
            dtype=dtype,
            implementation=told[0].implementation,
            **options,
        )

    jax.eval_shape(call, (params, inputs, state, lengths, resets))
    return told[0]


def lstm_internals(
    params: LSTMParams,
    inputs: Float[Given, "T *B I"],
    state: Pair | None = None,
    *,
    lengths: Int[Given, "*B"] | None = None,
    resets: Bool[Given, "T *B"] | None = None,
    reverse: bool = False,
    keep_order: bool = False,
    dtype: Any = None,
    unroll: int = 1,
    remat: bool | int = False,
) -> tuple[LSTMState, Internals]:
    """Runs `lstm` by the scan and returns gates, c and h of every step.

    Args:
      params: As all the arguments, see `lstm`.
      inputs: See `lstm`.
      state: See `lstm`.
      lengths: See `lstm`.
      resets: See `lstm`.
      reverse: See `lstm`.
      keep_order: See `lstm`.
      dtype: See `lstm`.
      unroll: See `lstm`.
      remat: See `lstm`.

    Returns:
      `(final_state, internals)`; gates and c in float32 at least.

    Raises:
      TypeError: As `lstm`.
      ValueError: As `lstm`.
      NotImplementedError: As `lstm`, with `remat`.
    """

    def cell(params: LSTMParams, state: LSTMState, x: Array) -> Any:
        gates = activate(preactivate(params, state.h, x))
        c, h = update(*gates, state.c)
        new = LSTMState(c, h.astype(x.dtype))
        return new, Internals(*gates, *new)

    return scan_cell(
        cell,
        *prepared(params, inputs, state, lengths, resets, dtype),
        lengths=lengths,
        resets=resets,
        reverse=reverse,
        keep_order=keep_order,
        unroll=unroll,
        remat=remat,
    )


def prepared(
    params: LSTMParams,
    inputs: Any,
    state: Pair | None,
    lengths: Any,
    resets: Any,
    dtype: Any,
) -> tuple[LSTMParams, Array, LSTMState]:
    """Checks the arguments of `lstm`; returns params, inputs and state to run with."""
    check_params(params)
    params = LSTMParams(*(jnp.asarray(p) for p in params))
    check_sequence(inputs, lengths, resets, input_size=params.kernel.shape[0])
    dtype = jnp.dtype(dtype or jnp.result_type(inputs, params.kernel))
    check_floating("dtype", dtype)
    shape = (*inputs.shape[1:-1], params.recurrent_kernel.shape[0])
    if state is None:
        state = zero_state(shape[:-1], shape[-1], dtype)
    check_state("state", state, shape)
    c, h = state
    state = LSTMState(c.astype(state_dtype(dtype)), h.astype(dtype))
    inputs = jnp.asarray(inputs, dtype)
    return params, inputs, spread_as(state, inputs)
