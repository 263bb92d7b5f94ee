"""The LSTM over time on an NVIDIA Hopper GPU, in Pallas Mosaic GPU.

Forward takes and returns what the kernel of the CPU does, but for two dtypes, named
below; backward ends with d_z, of which `flax_lstm.lowering` makes the rest. Not yet run
on hardware: the tests interpret them on a CPU, and run there what is compiled for an
H100, of which `experiments/compile_kernels.py` counts the costs.

Axes     T time, B batch, I input size, H hidden size, G = 4H in gate order i f g o.
Dtype    That of `inputs`: bfloat16, float16, or float32, of which operands are rounded
         to tf32 (11 bits). c is float32. In the 16-bit kernels the gates that are kept
         are float16, and d_z is in the computation dtype, as the products after it take
         it.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

from flax_lstm_kernels.copied import in_copies
from flax_lstm_kernels.gpu import (
    cluster,
    cluster_backward,
    grid,
    project,
    single,
    single_backward,
    step,
)
from flax_lstm_kernels.gpu.arrange import (
    fill,
    from_groups,
    from_tiles,
    gates_apart,
    gates_joined,
    in_groups,
    in_tiles,
    kept_dtype,
    projected,
    recurrent_weights,
    weights_in_groups,
    wide_weights,
)
from flax_lstm_kernels.gpu.common import as_operand
from flax_lstm_kernels.gpu.pieces import held_sizes, in_pieces, trained_steps
from flax_lstm_kernels.gpu.plan import Plan, Sizes, Support, choose, support
from flax_lstm_kernels.gpu.project_operands import weights_of_inputs

__all__ = ["Plan", "Support", "backward", "forward", "support"]

FORWARD = {
    "single": single.forward_pass,
    "cluster": cluster.forward_pass,
    "grid": grid.forward_pass,
    "step": step.forward_pass,
}
BACKWARD = {
    "single": single_backward.backward_pass,
    "cluster": cluster_backward.backward_pass,
    "grid": grid.backward_pass,
    "step": step.backward_pass,
}


def forward(
    inputs: Float[Array, "T B I"],
    kernel: Float[Array, "I G"],
    recurrent_kernel: Float[Array, "H G"],
    bias: Float[Array, " G"],
    c: Float[Array, "B H"],
    h: Float[Array, "B H"],
    lengths: Int[Array, " B"],
    resets: UInt8[Array, "T B"] | UInt8[Array, "0 0"],
    *,
    reverse: bool,
    keep: bool,
    plan: Plan | None = None,
    interpret: Any = None,
) -> tuple[Array, ...]:
    """Runs the LSTM over time.

    Args:
      inputs: What to run over, in the computation dtype; what stands past the lengths
        changes nothing.
      kernel: Weights of the inputs.
      recurrent_kernel: Weights of the outputs.
      bias: Bias.
      c: Cell before the first step.
      h: Output before the first step.
      lengths: int32, 0 to T.
      resets: Not 0 where a step starts from zeros; `[0, 0]` for nowhere.
      reverse: From the last valid step to the first.
      keep: Also returns what `backward` needs.
      plan: Which kernel, and how to cut up the work; the better one when None.
      interpret: Runs on any device by Pallas' interpreter: True, or its parameters.

    Returns:
      `(hs [T, B, H], c, h, gates [T, B, 4H], before [T, B, H])`: the outputs, the final
      state, the gates after activation and the cell that each step started from. hs
      are 0 past the lengths; the last two are undefined there, and empty without
      `keep`.

    Raises:
      NotImplementedError: If no kernel can run.
    """
    steps, rows, _ = inputs.shape
    hidden, dtype = h.shape[1], inputs.dtype
    if plan is None:
        sizes = Sizes(
            "forward", steps, rows, hidden, dtype.itemsize, keep, bool(resets.size)
        )
        plan = choose(sizes)
    given, (filled, size) = (rows, hidden), plan.filled(rows, hidden)
    held = held_sizes(steps, given, plan) if not keep else (filled, size)
    weights = recurrent_weights(recurrent_kernel.astype(dtype), held[1])
    if plan.kernel == "step" and held[1] * dtype.itemsize % 16:  # which TMA refuses
        weights = weights_in_groups(weights)

    def run(source: Any, *others: Array) -> tuple[Array, ...]:
        return FORWARD[plan.kernel](
            source, weights, *others, reverse=reverse, plan=plan, interpret=interpret
        )

    c, h = c.astype(jnp.float32), h.astype(dtype)
    if not keep:
        of_inputs = weights_of_inputs(kernel, bias, held, dtype)

        def tiles(array: Array, axis: int = 0) -> Array:
            return in_tiles(fill(array, axis, held[0]), axis, plan.rows)

        @partial(jax.jit, static_argnums=3)
        def to_planes(inputs: Array, planes: Any, now: Array, least: int) -> None:
            project.project(
                inputs,
                of_inputs,
                planes,
                now,
                rows=held[0],
                least=least,
                interpret=interpret,
            )

        # Traced once for all pieces, but for `step`, where each is a loop of its own.
        of_piece = run if plan.kernel == "step" else jax.jit(run)
        hs, c, h = in_pieces(
            to_planes,
            of_piece,
            inputs,
            tiles(in_groups(c, 1, held[1])),
            tiles(in_groups(h, 1, held[1], once=True)),  # of an Inf, 0 times is NaN
            tiles(lengths),
            tiles(resets, 1) if resets.size else resets,
            hidden,
            held=held,
            plan=plan,
            reverse=reverse,
        )
        c, h = (
            from_groups(
                from_tiles(array, 0, plan.rows, held[0])[:rows], held[1], hidden
            )
            for array in (c, h)
        )
        gates = jnp.zeros((0, 0, 4 * hidden), kept_dtype(dtype))
        before = jnp.zeros((0, 0, hidden), jnp.float32)
        return hs, c, h, gates, before
    lengths = fill(lengths, 0, filled)
    c, h = (fill(fill(array, 0, filled), 1, size) for array in (c, h))
    of_inputs = wide_weights(kernel, bias, size, dtype)

    def of_steps(sequences: Any, state: Any, *masks: Array) -> Any:
        (x,) = sequences
        if len(x) < steps:
            # Else XLA makes one kernel of the cut and the product, and for some
            # sizes stops: "Couldn't find output tile sizes".
            x = lax.optimization_barrier(x)
        z = fill(projected(x, *of_inputs), 1, filled)
        hs, c, h, gates, before = run(z, *state, *masks)
        gates = gates_joined(gates[:, :rows], hidden)
        return (hs[:, :rows, :hidden], gates, before[:, :rows, :hidden]), (c, h)

    of_sequence = partial(jax.ShapeDtypeStruct, (steps, rows, hidden))
    of_gates = jax.ShapeDtypeStruct((steps, rows, 4 * hidden), kept_dtype(dtype))
    results = [of_sequence(dtype), of_gates, of_sequence(jnp.float32)]
    (hs, gates, before), (c, h) = in_copies(
        of_steps,
        (inputs,),
        (c, h),
        lengths,
        resets,
        results=results,
        size=trained_steps(steps, given, (filled, size), dtype.itemsize),
        reverse=reverse,
    )
    return hs, c[:rows, :hidden], h[:rows, :hidden], gates, before


def backward(
    d_hs: Float[Array, "T B H"],
    d_c: Float[Array, "B H"],
    d_h: Float[Array, "B H"],
    gates: Float[Array, "T B G"],
    before: Float[Array, "T B H"],
    recurrent_kernel: Float[Array, "H G"],
    lengths: Int[Array, " B"],
    resets: UInt8[Array, "T B"] | UInt8[Array, "0 0"],
    *,
    reverse: bool,
    plan: Plan | None = None,
    interpret: Any = None,
) -> tuple[Array, ...]:
    """Carries gradients back through time.

    Args:
      d_hs: Gradient of the outputs; what stands past the lengths changes nothing.
      d_c: Gradient of the final cell.
      d_h: Gradient of the final output.
      gates: As `forward` returned them.
      before: As `forward` returned it.
      recurrent_kernel: As in `forward`; its dtype is the computation dtype.
      lengths: As in `forward`.
      resets: As in `forward`.
      reverse: As in `forward`.
      plan: As in `forward`.
      interpret: As in `forward`.

    Returns:
      `(d_z [T, B, 4H], d_c, d_h)`: the gradients of the gates before activation (0 past
      the lengths) in the computation dtype, and of the initial state in float32.

    Raises:
      NotImplementedError: If no kernel can run.
    """
    steps, rows, hidden = d_hs.shape
    dtype = recurrent_kernel.dtype
    if plan is None:
        sizes = Sizes("backward", steps, rows, hidden, dtype.itemsize)
        plan = choose(sizes._replace(resets=bool(resets.size)))
    given, (filled, size) = (rows, hidden), plan.filled(rows, hidden)
    weights = recurrent_weights(recurrent_kernel, size)
    if plan.kernel == "step":
        weights = as_operand(weights, dtype)  # once; others do where they stay

    def tiles(array: Array, axis: int) -> Array:
        return fill(fill(array, axis, filled), -1, size)

    def of_steps(sequences: Any, state: Any, lengths: Any, resets: Any) -> Any:
        (d_hs, gates, before), (d_c, d_h) = sequences, state
        d_z, d_c, d_h = BACKWARD[plan.kernel](
            tiles(d_hs.astype(dtype), 1),
            d_c,
            d_h,
            fill(gates_apart(gates, size), 1, filled),
            tiles(before, 1),
            weights,
            lengths,
            resets,
            reverse=reverse,
            plan=plan,
            interpret=interpret,
        )
        return (gates_joined(d_z[:, :rows], hidden),), (d_c, d_h)

    (d_z,), (d_c, d_h) = in_copies(
        of_steps,
        (d_hs, gates, before),
        (tiles(d_c.astype(jnp.float32), 0), tiles(d_h.astype(jnp.float32), 0)),
        fill(lengths, 0, filled),
        resets,
        results=[jax.ShapeDtypeStruct(gates.shape, dtype)],
        size=trained_steps(steps, given, (filled, size), dtype.itemsize),
        reverse=not reverse,
    )
    return d_z, d_c[:rows, :hidden], d_h[:rows, :hidden]
