"""The loops of the LSTM as primitives of JAX, which a kernel may stand in for.

A kernel gives numbers; JAX must also know how to differentiate, batch and export what
it computes. Each loop is therefore a primitive with a plain statement in JAX, the one
definition of what it means. Derivatives and batches are those of the statement, and so
is the loop itself on any platform but the CPU. The one exception is what the kernels
are for: the transpose of the linear loop is a loop, and a kernel, of its own.

Axes     T time, B batch, I input size, H hidden size, G = 4H in gate order i f g o.
Lengths  int32 `[B]`: steps past them do not count, and are 0 in every result.
Resets   uint8 `[T, B]`, or `[0, 0]` for none.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from flax_lstm.cell import LSTMState, activate, update
from flax_lstm.loop import live_steps, select


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

    x = jnp.where(live_steps(x.shape[0], lengths)[..., None], x, 0)
    final, (hs, gates, before) = stated(
        steps, LSTMState(c, h), x, lengths, resets, reverse
    )
    if not keep:
        gates, before = gates[:0, :0], before[:0, :0]
    return [hs, final.c, final.h, gates, before]


def linear(d_z, d_c, d_h, gates, before, recurrent_kernel, lengths, resets, *, reverse):
    """States the tangent of the loop, linear in the first three arguments.

    Returns the tangents of the outputs, of the final cell and of the final output.
    """

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

    final, d_hs = stated(
        steps, LSTMState(d_c, d_h), (d_z, gates, before), lengths, resets, reverse
    )
    return [d_hs, final.c, final.h]


def transposed(d_hs, d_c, d_h, *kept, reverse):
    """States the transpose of `linear`: see `flax_lstm_kernels.cpu.backward`."""
    gates, before = kept[:2]
    like = (gates, before[0], before[0])

    def of_tangents(*tangents):
        return linear(*tangents, *kept, reverse=reverse)

    return list(jax.linear_transpose(of_tangents, *like)([d_hs, d_c, d_h]))


def on_cpu(name: str) -> Callable:
    """Returns a function of the kernel package, imported when it is first called."""

    def call(*arrays, **options):
        from flax_lstm_kernels import cpu

        return list(getattr(cpu, name)(*arrays, **options))

    return call


def primitive(name: str, statement: Callable, kernel: Callable) -> Primitive:
    """Makes a primitive that means `statement`, and on a CPU runs `kernel`."""
    made = Primitive(name)
    made.multiple_results = True

    def abstract(*avals, **options):
        like = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
        outs = jax.eval_shape(partial(statement, **options), *like)
        return [ShapedArray(out.shape, out.dtype) for out in outs]

    def jvp(primals, tangents, **options):
        tangents = tuple(ad.instantiate_zeros(tangent) for tangent in tangents)
        return jax.jvp(partial(statement, **options), tuple(primals), tangents)

    def batch(args, axes, **options):
        outs = jax.vmap(partial(statement, **options), axes)(*args)
        return outs, [0] * len(outs)

    made.def_impl(
        lambda *args, **options: jax.jit(partial(made.bind, **options))(*args)
    )
    made.def_abstract_eval(abstract)
    ad.primitive_jvps[made] = jvp
    batching.primitive_batchers[made] = batch
    mlir.register_lowering(made, mlir.lower_fun(statement, multiple_results=True))
    mlir.register_lowering(
        made, mlir.lower_fun(kernel, multiple_results=True), platform="cpu"
    )
    return made


forward_p = primitive("flax_lstm_forward", forward, on_cpu("forward"))
transposed_p = primitive("flax_lstm_transposed", transposed, on_cpu("backward"))
linear_p = primitive("flax_lstm_linear", linear, linear)


def transpose_linear(cotangents, *args, reverse):
    """Binds the transposed loop; the fixed arguments have no cotangents."""
    fixed = args[3:]
    like = (*args[:3], *cotangents)
    d_hs, d_c, d_h = (
        ad.instantiate_zeros(ct) if isinstance(ct, ad.Zero) else ct for ct in like[3:]
    )
    return [
        *transposed_p.bind(d_hs, d_c, d_h, *fixed, reverse=reverse),
        *[None] * len(fixed),
    ]


ad.primitive_transposes[linear_p] = transpose_linear
