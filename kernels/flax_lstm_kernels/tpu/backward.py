"""The gradient of the LSTM carried back through time on a TPU, in Pallas.

Against the order of the forward pass, with dh and dc those of the state after a step:

    dh += dhs[t];  dz[t], dc = transposed update and activations;  dh = dz[t] R^T

The gradients of weights and inputs are products of dz over all steps, made after it.

Axes     T time, B batch, H hidden size, P the same in whole lanes of 128.
Grid     As in `forward`: (tiles of the batch, iterations, panels of the weights).
Memory   dz takes the place of the gates, block by block.
Numerics dz is rounded to the computation dtype as operand of the product, and only
         there; all else is float32.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flax_lstm.cell import update
from flax_lstm_kernels.tpu.arrange import (
    cut_gates,
    gate_lanes,
    lanes,
    live_iterations,
    panels,
    reset_bits,
)
from flax_lstm_kernels.tpu.grid import Grid, product
from flax_lstm_kernels.tpu.orders import LANES
from flax_lstm_kernels.tpu.vmem import Plan


def transposed_step(
    d_h: Any, d_c: Any, gates: tuple[Any, ...], c: Any
) -> tuple[list[Any], Any]:
    """Returns `([dz_i, dz_f, dz_g, dz_o], dc)`, dc that of the cell before the step.

    Args:
      d_h: Gradient of the step's output.
      d_c: Gradient of the step's cell, as far as it does not come from the output.
      gates: i, f, g, o after activation.
      c: The cell before the step.
    """
    _, transpose = jax.vjp(update, *gates, c)
    *d_gates, d_c = transpose((d_c, d_h))
    i, f, g, o = gates
    slopes = i * (1 - i), f * (1 - f), 1 - g * g, o * (1 - o)
    return [d * slope for d, slope in zip(d_gates, slopes, strict=True)], d_c


def body(ends_ref, *refs, plan: Plan, grid: Grid, cuts: bool):
    """Runs one place of the grid; see the module."""
    refs = list(refs)
    lengths_ref = refs.pop(0)
    resets_ref = refs.pop(0) if cuts else None
    gates_ref, before_ref, d_hs_ref, weights_ref, d_c_last_ref, d_h_last_ref = refs[:6]
    d_z_ref, d_c_first_ref, d_h_first_ref, d_c_ref, d_h_ref, *sum_ref = refs[6:]

    here = grid.here(ends_ref)
    size, visible = d_c_ref.shape[1], before_ref.shape[-1]
    inner_panels = 1 if plan.streamed else size // plan.units

    @pl.when(here.first)
    def first():
        d_c_ref[...] = d_c_last_ref[...]
        d_h_ref[...] = d_h_last_ref[...]

    @pl.when(~here.running & (here.panel == 0))
    def skip():
        d_z_ref[...] = jnp.zeros_like(d_z_ref)

    @pl.when(here.running)
    def run():
        lengths = lengths_ref[...]
        bits = None if resets_ref is None else resets_ref[0]

        def step(count, carry):
            at = plan.steps - 1 - count if grid.descending else count
            live = here.start + at < lengths
            fresh = None if bits is None else ((bits >> at) & 1) == 1
            d_h = None
            for inner in range(inner_panels):
                begin = inner * plan.units
                weights = weights_ref[4 * begin : 4 * (begin + plan.units), :]
                seen = min(plan.units, visible - begin)  # the last panel's may be less
                if plan.streamed:
                    begin = pl.multiple_of(here.panel * plan.units, LANES)
                units, real = pl.ds(begin, plan.units), pl.ds(begin, seen)
                places = [pl.ds(n * visible + begin, seen) for n in range(4)]
                d_c_old = d_c_ref[:, units]
                d_z, d_c = transposed_step(
                    d_h_ref[:, units]
                    + lanes(d_hs_ref[at, :, real]).astype(jnp.float32),
                    d_c_old,
                    tuple(lanes(gates_ref[at, :, place]) for place in places),
                    lanes(before_ref[at, :, real]),
                )
                d_z = [jnp.where(live, part, 0.0) for part in d_z]
                for place, part in zip(places, d_z, strict=True):
                    d_z_ref[at, :, place] = part[:, :seen]
                if fresh is not None:
                    d_c = jnp.where(fresh, 0.0, d_c)
                d_c_ref[:, units] = jnp.where(live, d_c, d_c_old)
                operand = jnp.concatenate(d_z, axis=-1).astype(weights.dtype)
                share = product(operand, weights)
                d_h = share if d_h is None else d_h + share

            def close(d_h):
                if fresh is not None:
                    d_h = jnp.where(fresh, 0.0, d_h)
                d_h_ref[...] = jnp.where(live, d_h, d_h_ref[...])

            if not plan.streamed:
                close(d_h)
                return carry
            (total_ref,) = sum_ref

            @pl.when(here.panel == 0)
            def begin_sum():
                total_ref[...] = d_h

            @pl.when(here.panel != 0)
            def add():
                total_ref[...] += d_h

            @pl.when(here.panel == here.panels - 1)
            def end():
                close(total_ref[...])

            return carry

        lax.fori_loop(0, plan.steps, step, 0)

    @pl.when(here.last)
    def final():
        d_c_first_ref[...] = d_c_ref[...]
        d_h_first_ref[...] = d_h_ref[...]


def backward_pass(
    d_hs: Any,
    d_c: Any,
    d_h: Any,
    gates: Any,
    before: Any,
    recurrent_kernel: Any,
    lengths: Any,
    resets: Any,
    *,
    reverse: bool,
    plan: Plan,
    vmem_limit_bytes: int,
    interpret: Any = False,
) -> tuple[Any, ...]:
    """Runs the kernel as `plan` says; see `flax_lstm_kernels.tpu.backward`."""
    hidden = d_h.shape[1]
    weights = panels(recurrent_kernel, plan.units).T
    size = weights.shape[1]
    grid = Grid.of(gates.shape[0], d_h.shape[0], size, plan, descending=not reverse)
    operands = [(lengths[:, None], grid.column())]
    if resets.size:
        operands.append((reset_bits(resets, plan.steps), grid.bits()))
    if plan.streamed:
        gates, before, d_hs = gate_lanes(gates), lanes(before), lanes(d_hs)
    visible = before.shape[-1]
    operands += [
        (gates, grid.sequence(4 * visible, read=True)),
        (before, grid.sequence(visible, read=True)),
        (d_hs, grid.sequence(visible, read=True)),
        (weights, grid.weights_back()),
        (lanes(d_c.astype(jnp.float32)), grid.state()),
        (lanes(d_h.astype(jnp.float32)), grid.state()),
    ]
    place_of_gates = 1 + len(operands) - 6
    state = jax.ShapeDtypeStruct((d_h.shape[0], size), jnp.float32)
    scratch = pltpu.VMEM((plan.rows, size), jnp.float32)
    d_z, d_c, d_h = pl.pallas_call(
        partial(body, plan=plan, grid=grid, cuts=bool(resets.size)),
        out_shape=[
            jax.ShapeDtypeStruct(gates.shape, jnp.float32),
            state,
            state,
        ],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid.shape,
            in_specs=[spec for _, spec in operands],
            out_specs=[grid.sequence(4 * visible), grid.state(), grid.state()],
            scratch_shapes=[scratch] * (3 if plan.streamed else 2),
        ),
        input_output_aliases={place_of_gates: 0},
        compiler_params=grid.compiler_params(vmem_limit_bytes),
        interpret=interpret,
        name="flax_lstm_backward",
    )(live_iterations(lengths, plan), *(array for array, _ in operands))
    return cut_gates(d_z, hidden), d_c[:, :hidden], d_h[:, :hidden]
