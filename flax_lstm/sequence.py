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

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from flax_lstm import cudnn, foreign
from flax_lstm.cell import (
    LSTMParams,
    LSTMState,
    activate,
    lstm_cell,
    preactivate,
    state_dtype,
    update,
    zero_state,
)
from flax_lstm.checks import check_params, check_sequence, check_state
from flax_lstm.choice import (
    Explanation,
    Implementation,
    Request,
    choose,
    explained,
)
from flax_lstm.derivative import Options, recurrence
from flax_lstm.loop import (
    Given,
    chunk_length,
    flip,
    in_chunks,
    live_steps,
    select,
    vary_with,
)

Cell = Callable[[Any, Any, Any], tuple[Any, Any]]


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
    state: LSTMState | None = None,
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
      state: State before the first step; zero when None.
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
      TypeError: If inputs are not floating, lengths not integers, resets not booleans.
      ValueError: If a shape does not fit, or a concrete length is outside 0 … T.
      NotImplementedError: If the implementation asked for cannot run, or with `remat`
        where time is symbolic.
    """
    call = prepared(params, inputs, state, lengths, resets, dtype)
    over_time = OVER_TIME[choose(implementation, Request(*call, resets is not None))]
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

    >>> params = LSTMParams(jnp.zeros((2, 4)), jnp.zeros((1, 4)), jnp.zeros(4))
    >>> told = explain(params, jnp.zeros((5, 3, 2)), implementation="scan")
    >>> print(told.reasons["xla"])
    could run, but "scan" was asked for
    """
    told = []

    def call(arrays: Any) -> Any:
        params, inputs, state, lengths, resets = arrays
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
    state: LSTMState | None = None,
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
    state: LSTMState | None,
    lengths: Any,
    resets: Any,
    dtype: Any,
) -> tuple[LSTMParams, Array, LSTMState]:
    """Checks the arguments of `lstm`; returns params, inputs and state to run with."""
    check_params(params)
    params = LSTMParams(*(jnp.asarray(p) for p in params))
    check_sequence(inputs, lengths, resets, input_size=params.kernel.shape[0])
    dtype = jnp.dtype(dtype or jnp.result_type(inputs, params.kernel))
    shape = (*inputs.shape[1:-1], params.recurrent_kernel.shape[0])
    if state is None:
        state = zero_state(shape[:-1], shape[-1], dtype)
    check_state(state, shape)
    state = LSTMState(state.c.astype(state_dtype(dtype)), state.h.astype(dtype))
    return params, jnp.asarray(inputs, dtype), state


def lstm_by_scan(
    params: LSTMParams, inputs: Array, state: LSTMState, **options: Any
) -> tuple[LSTMState, Array]:
    """Runs arguments that `prepared` returned by plain scan and plain autodiff."""
    return scan_cell(lstm_cell, params, inputs, state, **options)


def lstm_by_xla(
    params: LSTMParams,
    inputs: Array,
    state: LSTMState,
    *,
    lengths: Any,
    resets: Any,
    reverse: bool,
    keep_order: bool,
    unroll: int,
    remat: bool | int,
) -> tuple[LSTMState, Array]:
    """Runs arguments that `prepared` returned with the derivative of our own."""
    inputs, live, resets = masked(inputs, lengths, resets)
    options = Options.for_backend(reverse=reverse, unroll=unroll)

    def run(state: LSTMState, xs: Any) -> tuple[LSTMState, Array]:
        return recurrence(options, params, xs[0], state, *xs[1:])

    final, h = in_chunks(
        run,
        vary_with(state, (params, inputs, live, resets)),
        (inputs, live, resets),
        length=chunk_length(remat, inputs.shape[0]),
        reverse=reverse,
    )
    outputs = h if live is None else select(live, h, 0)
    return final, flip(outputs, lengths) if reverse and not keep_order else outputs


def lstm_by_kernel(
    params: LSTMParams, inputs: Array, state: LSTMState, **options: Any
) -> tuple[LSTMState, Array]:
    """Runs arguments that `prepared` returned by the kernel of the device."""
    from flax_lstm_kernels import target

    device = target.current()

    def loop(reverse: bool, *arguments: Any) -> tuple[LSTMState, Array]:
        # Inside shard_map the transpose of this sums the weights' gradients.
        return foreign.recurrence(reverse, device, *vary_with(arguments, ()))

    return by_loop(loop, params, inputs, state, **options)


def lstm_by_cudnn(
    params: LSTMParams, inputs: Array, state: LSTMState, **options: Any
) -> tuple[LSTMState, Array]:
    """Runs arguments that `prepared` returned by cuDNN."""
    params = LSTMParams(*(leaf.astype(inputs.dtype) for leaf in params))
    return by_loop(cudnn.recurrence, params, inputs, state, **options)


def by_loop(
    loop: Callable[..., tuple[LSTMState, Array]],
    params: LSTMParams,
    inputs: Array,
    state: LSTMState,
    *,
    lengths: Any,
    resets: Any,
    reverse: bool,
    keep_order: bool,
    unroll: int,
    remat: bool | int,
) -> tuple[LSTMState, Array]:
    """Runs a whole loop over time, which is called as `foreign.recurrence` is."""
    del unroll  # there is no scan
    steps, *batch, _ = inputs.shape

    def run(state: LSTMState, xs: Any) -> tuple[LSTMState, Array]:
        x, live, resets = xs
        steps, rows = x.shape[:2]
        lengths = (
            jnp.full(rows, steps, jnp.int32)
            if live is None
            else live.sum(0, dtype=jnp.int32)
        )
        resets = jnp.zeros((0, 0), jnp.uint8) if resets is None else resets
        return loop(reverse, params, x, state, lengths, resets)

    def one_axis(array: Given, first: int) -> Given:
        return array.reshape(
            *array.shape[:first], math.prod(batch), *array.shape[first + len(batch) :]
        )

    live = None if lengths is None else live_steps(steps, jnp.asarray(lengths))
    resets = None if resets is None else jnp.asarray(resets).astype(jnp.uint8)
    masks = (None if mask is None else one_axis(mask, 1) for mask in (live, resets))
    xs = one_axis(inputs, 1), *masks
    state = jax.tree.map(lambda leaf: one_axis(leaf, 0), state)
    final, outputs = in_chunks(
        run,
        vary_with(state, (params, xs)),
        xs,
        length=chunk_length(remat, steps),
        reverse=reverse,
    )
    final = jax.tree.map(lambda leaf: leaf.reshape(*batch, leaf.shape[-1]), final)
    outputs = outputs.reshape(steps, *batch, outputs.shape[-1])
    return final, flip(outputs, lengths) if reverse and not keep_order else outputs


OVER_TIME = {
    "scan": lstm_by_scan,
    "xla": lstm_by_xla,
    "cpu": lstm_by_kernel,
    "pallas": lstm_by_kernel,
    "cudnn": lstm_by_cudnn,
}


def scan_cell(
    cell: Cell,
    params: Any,
    inputs: Any,
    state: Any,
    *,
    lengths: Int[Given, "*B"] | None = None,
    resets: Bool[Given, "T *B"] | None = None,
    reverse: bool = False,
    keep_order: bool = False,
    unroll: int = 1,
    remat: bool | int = False,
) -> tuple[Any, Any]:
    """Runs any cell of the form of `lstm_cell` over time with `jax.lax.scan`.

    Args:
      cell: `new_state, y = cell(params, state, x)`; state, x and y any pytrees of
        arrays with the batch axes in front.
      params: Handed to the cell as they are.
      inputs: `[T, *B, I]`, or any pytree of arrays `[T, *B, ...]`: masks for each step
        of zoneout, for instance. In the padding the cell sees zeros.
      state: State before the first step; its dtypes are kept by the cell.
      lengths: As in `lstm`.
      resets: As in `lstm`.
      reverse: As in `lstm`.
      keep_order: As in `lstm`.
      unroll: As in `lstm`.
      remat: As in `lstm`.

    Returns:
      `(final_state, outputs)`, outputs a pytree of arrays `[T, *B, ...]` as y is.
    """
    inputs = jax.tree.map(jnp.asarray, inputs)
    inputs, live, resets = masked(inputs, lengths, resets)

    def step(state: Any, at: tuple[Any, Array | None, Array | None]):
        x, live, reset = at
        if reset is not None:
            state = select(~reset, state, 0)
        new, y = cell(params, state, x)
        if live is not None:
            new, y = select(live, new, state), select(live, y, 0)
        return new, y

    def run(state: Any, xs: Any) -> tuple[Any, Any]:
        return lax.scan(step, state, xs, reverse=reverse, unroll=unroll)

    xs = (inputs, live, resets)
    final, outputs = in_chunks(
        run,
        vary_with(state, (params, xs)),
        xs,
        length=chunk_length(remat, jax.tree.leaves(inputs)[0].shape[0]),
        reverse=reverse,
    )
    if reverse and not keep_order:
        outputs = jax.tree.map(lambda y: flip(y, lengths), outputs)
    return final, outputs


def masked(inputs: Any, lengths: Any, resets: Any) -> tuple[Any, Any, Any]:
    """Returns `(inputs, live, resets)`: zero in the padding, and true only outside it.

    The inputs are zeroed before the cell sees them: 0 times NaN in the padding would
    reach a gradient.
    """
    resets = None if resets is None else jnp.asarray(resets)
    if lengths is None:
        return inputs, None, resets
    live = live_steps(jax.tree.leaves(inputs)[0].shape[0], lengths)
    resets = None if resets is None else resets & live
    return select(live, inputs, 0), live, resets
