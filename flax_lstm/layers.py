"""What the Flax modules of both APIs share: one layer, two directions, a stack.

The modules hold parameters and options; everything they compute is here and in
`flax_lstm.sequence`.

Axes     T time, *B any number of batch axes, I input size, H hidden size. Inputs are
         `[*B, T, I]`, or `[T, *B, I]` where time_major.
Names    Those of Flax's `RNN`: a carry is an `LSTMState`, or any pair (c, h).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from flax_lstm.cell import (
    Initializer,
    LSTMParams,
    LSTMState,
    lstm_cell,
    preactivate,
    state_dtype,
    zero_state,
)
from flax_lstm.checks import check_floating, check_state
from flax_lstm.choice import Implementation
from flax_lstm.config import ModelConfig
from flax_lstm.directions import Merge, backward_resets, merge_function
from flax_lstm.dropout import dropout, fold_in
from flax_lstm.loop import Given, flip, live_steps, select
from flax_lstm.over_time import Cell, scan_cell
from flax_lstm.sequence import lstm

Activation = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Activations:
    """The functions of the gates i, f, o and of the candidate g and the output.

    Called as `lstm_cell` is; with the defaults it is `lstm_cell` to the last bit.
    """

    gate_fn: Activation = jax.nn.sigmoid
    activation_fn: Activation = jnp.tanh

    @property
    def standard(self) -> bool:
        """Whether these are the logistic sigmoid and tanh, which kernels know."""
        both = same(self.gate_fn, jax.nn.sigmoid), same(self.activation_fn, jnp.tanh)
        return all(both)

    def __call__(
        self, params: LSTMParams, state: LSTMState, x: Array
    ) -> tuple[LSTMState, Array]:
        """Advances by one step; see `flax_lstm.cell.lstm_cell`."""
        z = preactivate(params, state.h, x)
        i, f, g, o = jnp.split(z, 4, axis=-1)
        c = self.gate_fn(f) * state.c.astype(z.dtype)
        c = c + self.gate_fn(i) * self.activation_fn(g)
        h = (self.gate_fn(o) * self.activation_fn(c)).astype(x.dtype)
        return LSTMState(c, h), h


def same(function: Activation, known: Any) -> bool:
    """Says whether a function is a jitted one of JAX, or a deep copy of it.

    A copy is another object; what they have in common is the function within, which
    that of a copy does not tell but as what it would be pickled with.
    """
    if function is known or type(function) is not type(known):
        return function is known
    state: Any = function.__getstate__()
    return isinstance(state, dict) and state.get("fun") is known.__wrapped__


def step(
    params: LSTMParams, carry: Any, x: Any, *, dtype: Any, activations: Activations
) -> tuple[Any, Array]:
    """Advances a module's carry by one step, inside Flax's own `RNN` or alone.

    The new carry has the container and the dtypes of the old one, as a scan demands.
    """
    c, h = carry
    dtype = jnp.dtype(dtype or jnp.result_type(x, params.kernel))
    cell: Cell = lstm_cell if activations.standard else activations
    new, y = cell(params, LSTMState(c, h), jnp.asarray(x, dtype))
    return like(carry, LSTMState(new.c.astype(c.dtype), new.h.astype(h.dtype))), y


def like(carry: Any, state: LSTMState) -> Any:
    """Puts a state into the container of `carry`: a plain pair stays a plain pair."""
    return jax.tree.unflatten(jax.tree.structure(carry), tuple(state))


def initial_carry(
    keys: tuple[Array, Array] | None,
    batch_shape: tuple[int, ...],
    hidden_size: int,
    *,
    carry_init: Initializer | None,
    dtype: Any,
) -> LSTMState:
    """Draws the state before the first step; zero where no keys are given."""
    if carry_init is None or keys is None:
        return zero_state(batch_shape, hidden_size, dtype)
    shape = (*batch_shape, hidden_size)
    c = carry_init(keys[0], shape, state_dtype(dtype))
    return LSTMState(c, carry_init(keys[1], shape, dtype))


# What the module around several layers decides, for all of them.
OWN = ("time_major", "return_carry", "reverse", "keep_order")


def check_options(options: Mapping[str, Any]) -> None:
    """Raises ValueError for options of a layer that the module around it decides."""
    if decided := [name for name in OWN if name in options]:
        raise ValueError(
            f"options must not have {decided[0]!r}, which would be overruled; give it "
            "to the module itself, or to its call."
        )


def as_array(given: Any) -> Any:
    """Makes an array of a list; what is one stays, for its values to be known."""
    if given is None or isinstance(given, Given):
        return given
    return jnp.asarray(given)


def check_call(
    inputs: Any, resets: Any, time_major: bool, *, input_size: int | None = None
) -> None:
    """Raises ValueError where a shape does not fit, in the axes of the caller.

    Without `input_size` any will do.
    """
    axes = "[time, *batch" if time_major else "[*batch, time"
    wanted = "features" if input_size is None else input_size
    if inputs.ndim < 2 or input_size not in (None, inputs.shape[-1]):
        raise ValueError(
            f"inputs must be {axes}, {wanted}] to match the layer; got {inputs.shape}."
        )
    if resets is not None and resets.shape != inputs.shape[:-1]:
        raise ValueError(
            f"resets must be {axes}] = {inputs.shape[:-1]} to match inputs; "
            f"got {resets.shape}."
        )


def run_layer(
    params: LSTMParams,
    inputs: Any,
    carry: Any,
    *,
    seq_lengths: Any,
    resets: Any,
    time_major: bool,
    reverse: bool,
    keep_order: bool,
    dtype: Any,
    implementation: Implementation | None,
    unroll: int,
    activations: Activations,
) -> tuple[Any, Array]:
    """Runs one layer over inputs in a module's axes: returns `(carry, outputs)`.

    Raises:
      TypeError: As `lstm`, or if the carry is no pair.
      ValueError: As `lstm`.
      NotImplementedError: If `implementation` cannot run, or has no such activations.
    """
    inputs = jnp.asarray(inputs)
    lengths, resets = as_array(seq_lengths), as_array(resets)
    check_call(inputs, resets, time_major, input_size=params.kernel.shape[0])
    if not time_major:
        inputs = jnp.moveaxis(inputs, -2, 0)
        resets = None if resets is None else jnp.moveaxis(resets, -1, 0)
    hidden = params.recurrent_kernel.shape[0]
    check_state("initial_carry", carry, (*inputs.shape[1:-1], hidden))
    dtype = jnp.dtype(dtype or jnp.result_type(inputs, params.kernel))
    c, h = carry
    state = LSTMState(c.astype(state_dtype(dtype)), h.astype(dtype))
    options = {
        "lengths": lengths,
        "resets": resets,
        "reverse": reverse,
        "keep_order": keep_order,
        "unroll": unroll,
    }
    if activations.standard:
        new, outputs = lstm(
            params, inputs, state, dtype=dtype, implementation=implementation, **options
        )
    elif implementation in (None, "scan"):
        cell: Cell = activations
        check_floating("dtype", dtype)
        new, outputs = scan_cell(cell, params, inputs.astype(dtype), state, **options)
    else:
        raise NotImplementedError(
            f'implementation="{implementation}" knows sigmoid and tanh only; use '
            '"scan" or None with another gate_fn or activation_fn.'
        )
    if not time_major:
        outputs = jnp.moveaxis(outputs, 0, -2)
    return like(carry, new), outputs


def run_both(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    inputs: Any,
    carry: Any,
    *,
    merge: Merge,
    resets: Any,
    time_major: bool,
    **options: Any,
) -> tuple[tuple[Any, Any], Array]:
    """Runs two layers, the second from the end, and merges their outputs.

    Resets mark the first steps of episodes: nothing crosses them in either direction.
    """
    from_behind = resets = as_array(resets)
    inputs = jnp.asarray(inputs)
    check_call(inputs, resets, time_major)
    if resets is not None:
        marks = resets if time_major else jnp.moveaxis(resets, -1, 0)
        from_behind = backward_resets(marks, as_array(options["seq_lengths"]))
        from_behind = from_behind if time_major else jnp.moveaxis(from_behind, 0, -1)
    carries = (None, None) if carry is None else carry
    directions = zip(
        (forward, backward),
        carries,
        (False, True),
        (resets, from_behind),
        strict=True,
    )
    (first, ahead), (second, behind) = (
        layer(
            inputs,
            initial_carry=start,
            reverse=reverse,
            keep_order=True,
            return_carry=True,
            resets=cuts,
            time_major=time_major,
            **options,
        )
        for layer, start, reverse, cuts in directions
    )
    return (first, second), merge_function(merge)(ahead, behind)


def run_stack(
    layers: Sequence[Callable[..., Any]],
    inputs: Any,
    carries: Any,
    *,
    input_size: int | None = None,
    rate: float,
    key: Array | None,
    variational: bool,
    residual: bool,
    time_major: bool,
    reverse: bool,
    keep_order: bool,
    seq_lengths: Any,
    resets: Any,
    **options: Any,
) -> tuple[tuple[Any, ...], Array]:
    """Runs layers one after another, each with dropout on its outputs.

    Args:
      layers: Modules with the call signature of `LSTM`.
      inputs: `[*B, T, I]`, or `[T, *B, I]` where time_major.
      carries: One carry for each layer; all initial when None.
      input_size: I, where the layers know it; else that of the inputs.
      rate: Dropout rate of the outputs of every layer.
      key: Key of the masks, or one for each row; None for no dropout.
      variational: One mask per sequence in place of one per step.
      residual: Adds a layer's inputs to its outputs where the sizes are equal.
      time_major: Axes of the inputs and of the outputs.
      reverse: Direction of all layers.
      keep_order: With reverse, return the outputs in the order of the inputs.
      seq_lengths: Valid steps of each row.
      resets: Steps before which the state is set to zero, in every layer.
      **options: Further call arguments of every layer.

    Returns:
      `(carries, outputs)`, a tuple with one carry per layer.

    Raises:
      ValueError: If the number of carries is not that of the layers, or a shape does
        not fit.
    """
    if carries is None:
        carries = (None,) * len(layers)
    pairs = isinstance(carries, tuple | list)
    if not pairs or len(carries) != len(layers) or isinstance(carries, LSTMState):
        many = len(carries) if pairs else type(carries).__name__
        raise ValueError(
            f"initial_carry must hold one carry for each of the {len(layers)} layers; "
            f"got {'one LSTMState' if isinstance(carries, LSTMState) else many}."
        )
    values = jnp.asarray(inputs)
    lengths, resets = as_array(seq_lengths), as_array(resets)
    check_call(values, resets, time_major, input_size=input_size)
    if not time_major:
        values = jnp.moveaxis(values, -2, 0)
        resets = None if resets is None else jnp.moveaxis(resets, -1, 0)
    new = []
    for number, (layer, carry) in enumerate(zip(layers, carries, strict=True)):
        carry, outputs = layer(
            values,
            initial_carry=carry,
            seq_lengths=lengths,
            resets=resets,
            reverse=reverse,
            keep_order=True,
            return_carry=True,
            time_major=True,
            **options,
        )
        new.append(carry)
        if key is not None:
            layer_key = fold_in(key, number)
            outputs = dropout(outputs, layer_key, rate, variational=variational)
        if residual and outputs.shape == values.shape:
            if lengths is not None:
                live = live_steps(values.shape[0], lengths)
                values = select(live, values, 0)
            outputs = outputs + values.astype(outputs.dtype)
        values = outputs
    if reverse and not keep_order:
        values = flip(values, lengths)
    return tuple(new), values if time_major else jnp.moveaxis(values, 0, -2)


def embed(table: Array, tokens: Array, dtype: Any) -> Array:
    """Looks word vectors up: tokens of any shape to `[*tokens.shape, E]`.

    Rows are cast after the look-up, so that the table is never copied. An id outside
    the table gives NaN, as in `flax.linen.Embed`.
    """
    return jnp.take(table, tokens, axis=0).astype(dtype)


def initial_state(config: ModelConfig, batch_size: int) -> tuple[LSTMState, ...]:
    """Returns the zero state of every layer of a classifier, `[B, H]` each."""
    dtype = jnp.dtype(config.dtype)
    return tuple(zero_state((batch_size,), size, dtype) for size in config.features)
