"""The LSTM over time as primitives of JAX, which a kernel may stand in for.

A kernel gives numbers; JAX must also know how to differentiate, batch and export what
it computes. Each loop is therefore a primitive with a plain statement in JAX
(`statement`), the one definition of what it means: derivatives are those of the
statement, and so is the loop itself where there is no kernel (`lowering`). The
exceptions are what the kernels are for: the transpose of the linear loop is a loop, and
a kernel, of its own; and a vmap over rows is a larger batch.

Axes, lengths, resets, dtypes and what is kept: as in `statement`. Inside
`jax.shard_map` all arguments of a primitive vary over the same mesh axes.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching
from jaxtyping import Array, Float, Int, UInt8

from flax_lstm import lowering, statement
from flax_lstm.cell import LSTMParams, LSTMState
from flax_lstm.loop import live_steps, select, vary_with


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def recurrence(
    reverse: bool,
    target: Any,
    params: LSTMParams,
    inputs: Float[Array, "T B I"],
    state: LSTMState,
    lengths: Int[Array, " B"],
    resets: UInt8[Array, "T B"] | UInt8[Array, "0 0"],
) -> tuple[LSTMState, Float[Array, "T B H"]]:
    """Runs the LSTM over time by the kernel.

    Args:
      reverse: From the last valid step to the first.
      target: Device that the kernel was chosen for: `flax_lstm_kernels.target.Target`.
      params: Weights, kernel and bias in one dtype; their gradients are summed in
        float32 at least and rounded once to their dtypes.
      inputs: `[T, B, I]`; not read past the lengths.
      state: State before the first step.
      lengths: See `statement`, as for resets.
      resets: Where not 0, the state is zero before the step.

    Returns:
      `(final_state, hs)`, hs in the order of the inputs and 0 past the lengths.
    """
    hs, c, h, _, _ = bind_forward(
        reverse, target, params, inputs, state, lengths, resets, keep=False
    )
    return LSTMState(c, h), hs


def bind_forward(reverse, target, params, inputs, state, lengths, resets, *, keep):
    """Binds the loop forward."""
    return forward_p.bind(
        inputs,
        *params,
        *state,
        lengths,
        resets,
        reverse=reverse,
        keep=keep,
        gates_dtype=lowering.gates_dtype(target, inputs.dtype),
        target=target,
    )


@partial(recurrence.defjvp, symbolic_zeros=True)
def recurrence_jvp(reverse: bool, target: Any, primals: Any, tangents: Any) -> Any:
    """Returns the results and their tangents, linear in the tangents given."""
    params, inputs, state, lengths, resets = primals
    hs, c, h, gates, before = bind_forward(reverse, target, *primals, keep=True)
    if jax.debug_nans.value or jax.debug_infs.value:
        # What is kept has any bits past the lengths, and where only the call is jitted,
        # not its derivative, is a result, which is then looked at.
        live = live_steps(hs.shape[0], lengths)
        gates, before = (select(live, kept, 0) for kept in (gates, before))

    def given(tangent: Any) -> Any:
        if type(tangent) is not SymbolicZero:
            return tangent
        like: Any = tangent.aval
        return jnp.zeros(like.shape, like.dtype)

    absent = type(tangents[1]) is SymbolicZero
    d_inputs = jnp.zeros((0, 0, 0), inputs.dtype) if absent else tangents[1]
    d_others = [given(d) for d in (*tangents[0], *tangents[2])]
    kept = (inputs, *params[:2], state.h, hs, gates, before, lengths, resets)
    arguments = vary_with((d_inputs, *d_others, *kept), ())
    d_hs, d_c, d_h = linear_p.bind(*arguments, reverse=reverse, target=target)
    return (LSTMState(c, h), hs), (LSTMState(d_c, d_h), d_hs)


def primitive(
    name: str, stated: Callable, sizes_of: Callable, rows: Any = None
) -> Primitive:
    """Makes a primitive that means `stated`.

    With `rows`, which axis of each argument and of each result the rows are on (None
    for weights), a vmap that leaves the weights alone is one call over all rows.
    """
    made = Primitive(name)
    made.multiple_results = True

    def plain(target, **options):
        del target  # says where it would run
        return partial(stated, **options)

    def abstract(*avals, **options):
        like = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
        outs = jax.eval_shape(plain(**options), *like)
        return [like_in_mesh(avals[0], out) for out in outs]

    def jvp(primals, tangents, **options):
        tangents = tuple(ad.instantiate_zeros(tangent) for tangent in tangents)
        return jax.jvp(plain(**options), tuple(primals), tangents)

    def batch(args, axes, **options):
        if (
            rows is not None
            and mapped(args, axes)
            and not any(
                axis is not None
                for axis, row in zip(axes, rows[0], strict=True)
                if row is None
            )
        ):
            return folded(partial(made.bind, **options), args, axes, *rows), rows[1]
        outs = jax.vmap(plain(**options), axes)(*args)
        return outs, [0] * len(outs)

    @cache
    def compiled(*options):
        return jax.jit(partial(made.bind, **dict(options)))

    def run(*args, **options):
        # Who wants no jit, or looks for NaN, does not mean this: without jit it would
        # call itself, and what is kept has any bits past the lengths.
        with jax.disable_jit(False), jax.debug_nans(False), jax.debug_infs(False):
            return compiled(*sorted(options.items()))(*args)

    made.def_impl(run)
    made.def_abstract_eval(abstract)
    ad.primitive_jvps[made] = jvp
    batching.primitive_batchers[made] = batch
    lowering.register(made, stated, sizes_of)
    return made


def like_in_mesh(aval: Any, out: Any) -> ShapedArray:
    """Returns the type of a result, which varies over the mesh axes `aval` does."""
    if not aval.manual_axis_type.varying:
        return ShapedArray(out.shape, out.dtype)
    spec = jax.sharding.PartitionSpec(*[None] * len(out.shape))
    return ShapedArray(
        out.shape,
        out.dtype,
        sharding=aval.sharding.update(spec=spec),
        manual_axis_type=aval.manual_axis_type,
    )


def mapped(args: Any, axes: Any) -> int:
    """Returns the size of the mapped axis."""
    pairs = zip(args, axes, strict=True)
    return next(arg.shape[axis] for arg, axis in pairs if axis is not None)


def folded(call: Callable, args: Any, axes: Any, args_rows: Any, outs_rows: Any):
    """Joins the mapped axis with the rows for one call, and parts the results."""
    many = mapped(args, axes)

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
    statement.forward,
    lambda x, kernel, recurrent_kernel, *_: (
        *x.shape,
        recurrent_kernel.shape[0],
        x.dtype,
    ),
    rows=lowering.FORWARD_ROWS,
)
linear_p = primitive(
    "flax_lstm_linear",
    statement.linear,
    lambda *_: (0, 0, 0, 0, None),  # has no kernel
    rows=((1, None, None, None, 0, 0, 1, None, None, 0, 1, 1, 1, 0, 1), (1, 0, 0)),
)
transposed_p = primitive(
    "flax_lstm_transposed",
    statement.transposed,
    lambda d_hs, d_c, d_h, x, *_: (*x.shape, d_h.shape[1], x.dtype),
)


def transpose_linear(cotangents, *args, **options):
    """Binds the transposed loop; what was kept has no cotangents."""
    kept = args[6:]
    d_hs, d_c, d_h = (
        ad.instantiate_zeros(ct) if type(ct) is ad.Zero else ct for ct in cotangents
    )
    wanted = ad.is_undefined_primal(args[0]) and args[0].aval.size > 0
    arguments = vary_with((d_hs, d_c, d_h, *kept), ())
    outs = transposed_p.bind(*arguments, of_inputs=wanted, **options)
    if not wanted:
        outs[0] = None
    return [*outs, *[None] * len(kept)]


ad.primitive_transposes[linear_p] = transpose_linear
