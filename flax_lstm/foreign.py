"""The LSTM over time as primitives of JAX, which a kernel may stand in for.

A kernel gives numbers; JAX must also know how to differentiate, batch and export what
it computes. Each loop is therefore a primitive with a plain statement in JAX, the one
definition of what it means: derivatives are those of the statement, and so is the loop
itself on any platform but the CPU, and in a module exported for other machines. The
exceptions are what the kernels are for: the transpose of the linear loop is a loop, and
a kernel, of its own; and a vmap over rows is a larger batch.

Axes     T time, B batch, I input size, H hidden size, G = 4H in gate order i f g o.
Lengths  int32 `[B]`: steps past them do not count, and are 0 in every result.
Resets   uint8 `[T, B]`, or `[0, 0]` for none.
Kept     Of every step, for the derivative: hs `[T, B, H]` outputs, gates `[T, B, 4H]`
         after activation, before `[T, B, H]` the cell that the step started from. Past
         the lengths the last two are undefined.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, Int, UInt8

from flax_lstm.cell import LSTMParams, LSTMState, activate, update
from flax_lstm.loop import live_steps, select


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def recurrence(
    reverse: bool,
    params: LSTMParams,
    inputs: Float[Array, "T B I"],
    state: LSTMState,
    lengths: Int[Array, " B"],
    resets: UInt8[Array, "T B"] | UInt8[Array, "0 0"],
) -> tuple[LSTMState, Float[Array, "T B H"]]:
    """Runs the LSTM over time by the kernel; float32 throughout.

    Args:
      reverse: From the last valid step to the first.
      params: Weights.
      inputs: `[T, B, I]`; not read past the lengths.
      state: State before the first step.
      lengths: See the file's head, as for resets.
      resets: Where not 0, the state is zero before the step.

    Returns:
      `(final_state, hs)`, hs in the order of the inputs and 0 past the lengths.
    """
    hs, c, h, _, _ = forward_p.bind(
        inputs, *params, *state, lengths, resets, reverse=reverse, keep=False
    )
    return LSTMState(c, h), hs


@partial(recurrence.defjvp, symbolic_zeros=True)
def recurrence_jvp(reverse: bool, primals: Any, tangents: Any) -> tuple[Any, Any]:
    """Returns the results and their tangents, linear in the tangents given."""
    params, inputs, state, lengths, resets = primals
    hs, c, h, gates, before = forward_p.bind(
        inputs, *params, *state, lengths, resets, reverse=reverse, keep=True
    )

    def given(tangent: Any) -> Any:
        absent = type(tangent) is SymbolicZero
        return jnp.zeros(tangent.shape, inputs.dtype) if absent else tangent

    absent = type(tangents[1]) is SymbolicZero
    d_inputs = jnp.zeros((0, 0, 0), inputs.dtype) if absent else tangents[1]
    d_others = [given(d) for d in (*tangents[0], *tangents[2])]
    kept = (inputs, *params[:2], state.h, hs, gates, before, lengths, resets)
    d_hs, d_c, d_h = linear_p.bind(d_inputs, *d_others, *kept, reverse=reverse)
    return (LSTMState(c, h), hs), (LSTMState(d_c, d_h), d_hs)


def stated(steps: Callable, state: Any, xs: Any, lengths: Any, resets: Any, reverse):
    """Scans `steps(state, x) -> (state, y)` where steps count, with resets."""
    live = live_steps(jax.tree.leaves(xs)[0].shape[0], lengths)
    resets = resets.astype(bool) if resets.size else None

    def step(state: Any, at: Any) -> tuple[Any, Any]:
        x, live, reset = at
        start = state if reset is None else select(~reset, state, 0)
        new, y = steps(start, x)
        return select(live, new, state), select(live, y, 0)

    return lax.scan(step, state, (xs, live, resets), reverse=reverse)


def forward(x, kernel, recurrent_kernel, bias, c, h, lengths, resets, *, reverse, keep):
    """States the loop forward: see `flax_lstm_kernels.cpu.forward`."""

    def steps(state: LSTMState, x: Any) -> tuple[LSTMState, Any]:
        z = x @ kernel + state.h @ recurrent_kernel
        gates = activate(z + jnp.broadcast_to(bias, z.shape))
        new = LSTMState(*update(*gates, state.c))
        return new, (new.h, jnp.concatenate(gates, -1), state.c)

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
    live = live_steps(x.shape[0], lengths)
    gates, before = select(live, (gates, before), 0)
    h_before = previous(hs, h, lengths, resets, reverse=reverse)
    d_z = select(live, x, 0) @ d_kernel + h_before @ d_recurrent_kernel
    d_z = d_z + jnp.broadcast_to(d_bias, d_z.shape)
    if d_x.size:
        d_z = d_z + select(live, d_x, 0) @ kernel

    def steps(state: LSTMState, at: Any) -> tuple[LSTMState, Any]:
        d_z, gates, c = at
        i, f, g, o = jnp.split(gates, 4, -1)
        z_i, z_f, z_g, z_o = jnp.split(d_z + state.h @ recurrent_kernel, 4, -1)
        d_c = (
            f * state.c
            + g * i * (1 - i) * z_i
            + c * f * (1 - f) * z_f
            + i * (1 - g * g) * z_g
        )
        tanh_c = jnp.tanh(f * c + i * g)
        d_h = tanh_c * o * (1 - o) * z_o + o * (1 - tanh_c * tanh_c) * d_c
        return LSTMState(d_c, d_h), d_h

    state = LSTMState(d_c, d_h)
    final, d_hs = stated(steps, state, (d_z, gates, before), lengths, resets, reverse)
    return [d_hs, final.c, final.h]


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
        h,
        h,
    )

    def of_tangents(*tangents):
        return linear(*tangents, *kept, reverse=reverse)

    return list(jax.linear_transpose(of_tangents, *like)([d_hs, d_c, d_h]))


def on_cpu(name: str) -> Callable:
    """Returns a function of the kernel package, imported when it is first called."""

    def call(*arrays, **options):
        from flax_lstm_kernels import cpu

        return list(getattr(cpu, name)(*arrays, **options))

    return call


def primitive(
    name: str, statement: Callable, kernel: Callable, rows: Any = None
) -> Primitive:
    """Makes a primitive that means `statement`, and on a CPU runs `kernel`.

    With `rows`, which axis of each argument and of each result the rows are on (None
    for weights), a vmap that leaves the weights alone is one call over all rows.
    """
    made = Primitive(name)
    made.multiple_results = True

    def abstract(*avals, **options):
        like = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
        outs = jax.eval_shape(partial(statement, **options), *like)
        return [ShapedArray(out.shape, out.dtype) for out in outs]

    def jvp(primals, tangents, **options):
        tangents = tuple(ad.instantiate_zeros(tangent) for tangent in tangents)
        return jax.jvp(partial(statement, **options), tuple(primals), tangents)

    def lower_on_cpu(context, *args, **options):
        # An exported module may run where the kernel is not.
        exported = context.module_context.lowering_parameters.for_export
        runs = mlir.lower_fun(statement if exported else kernel, multiple_results=True)
        return runs(context, *args, **options)

    def batch(args, axes, **options):
        if rows is not None and not any(
            axis is not None
            for axis, row in zip(axes, rows[0], strict=True)
            if row is None
        ):
            return folded(partial(made.bind, **options), args, axes, *rows), rows[1]
        outs = jax.vmap(partial(statement, **options), axes)(*args)
        return outs, [0] * len(outs)

    made.def_impl(
        lambda *args, **options: jax.jit(partial(made.bind, **options))(*args)
    )
    made.def_abstract_eval(abstract)
    ad.primitive_jvps[made] = jvp
    batching.primitive_batchers[made] = batch
    mlir.register_lowering(made, mlir.lower_fun(statement, multiple_results=True))
    mlir.register_lowering(made, lower_on_cpu, platform="cpu")
    return made


def folded(call: Callable, args: Any, axes: Any, args_rows: Any, outs_rows: Any):
    """Joins the mapped axis with the rows for one call, and parts the results."""
    many = next(
        arg.shape[axis]
        for arg, axis in zip(args, axes, strict=True)
        if axis is not None
    )

    def join(arg: Any, axis: Any, rows: int | None) -> Any:
        if rows is None or (axis is None and not arg.size):
            return arg
        if axis is None:
            shape = (*arg.shape[:rows], many, *arg.shape[rows:])
            arg = jnp.broadcast_to(jnp.expand_dims(arg, rows), shape)
        else:
            arg = jnp.moveaxis(arg, axis, rows)
        shape = arg.shape
        return arg.reshape(*shape[:rows], many * shape[rows + 1], *shape[rows + 2 :])

    def part(out: Any, rows: int) -> Any:
        each = out.shape[rows] // many
        return out.reshape(*out.shape[:rows], many, each, *out.shape[rows + 1 :])

    outs = call(*map(join, args, axes, args_rows))
    return [part(out, rows) for out, rows in zip(outs, outs_rows, strict=True)]


forward_p = primitive(
    "flax_lstm_forward",
    forward,
    on_cpu("forward"),
    rows=((1, None, None, None, 0, 0, 0, 1), (1, 0, 0, 1, 1)),
)
linear_p = primitive(
    "flax_lstm_linear",
    linear,
    linear,
    rows=((1, None, None, None, 0, 0, 1, None, None, 0, 1, 1, 1, 0, 1), (1, 0, 0)),
)
transposed_p = primitive("flax_lstm_transposed", transposed, on_cpu("backward"))


def transpose_linear(cotangents, *args, reverse):
    """Binds the transposed loop; what was kept has no cotangents."""
    kept = args[6:]
    d_hs, d_c, d_h = (
        ad.instantiate_zeros(ct) if type(ct) is ad.Zero else ct for ct in cotangents
    )
    wanted = ad.is_undefined_primal(args[0]) and args[0].aval.size > 0
    outs = transposed_p.bind(d_hs, d_c, d_h, *kept, reverse=reverse, of_inputs=wanted)
    if not wanted:
        outs[0] = None
    return [*outs, *[None] * len(kept)]


ad.primitive_transposes[linear_p] = transpose_linear
