"""The LSTM forward over time on a TPU, in Pallas.

For t = 0 .. T-1:  z = x[t] W + b + h R;  c, h = update(activate(z), c)

Axes     T time, B batch, I input size, H hidden size, P the same in whole lanes of 128.
Grid     (tiles of the batch, iterations of `steps` steps, panels of the weights), with
         c and h in VMEM from one iteration to the next.
Weights  Stay in VMEM for the whole run and are one block, with its panels in a loop
         inside; or are streamed, a panel in each place of the grid, twice buffered.
Inputs   Multiplied inside, all steps of an iteration in one product, where W fits too:
         what passes through memory is then x, not the four times wider z. Else by XLA
         before; the gates then take the place of z in memory.
         Kept in the order that the plan says, and turned inside: the compiler has those
         of no whole lanes with the rows in its lanes, and would make a copy of them.
Ends     Nothing is filled up along T and B: blocks may stand over, rows do not mix, and
         steps past a row's length are masked. Tiles that have ended are skipped.
Numerics Operands of the products in the computation dtype (float32 in full precision,
         not the TPU's default), results, gates and c in float32.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flax_lstm.cell import activate, update
from flax_lstm_kernels.tpu.arrange import (
    cut_gates,
    gate_lanes,
    lanes,
    live_iterations,
    panels,
    reset_bits,
)
from flax_lstm_kernels.tpu.grid import Grid, product
from flax_lstm_kernels.tpu.plan import ITB, LANES, TBI, TIB, Plan


def project(x: Any, kernel: Any, bias: Any) -> Any:
    """Multiplies the inputs `[t, b, I]` of an iteration: `[t, b, 4P]`, in one product.

    b is a multiple of the sublanes, so that the reshapes move nothing.
    """
    steps, rows, inputs = x.shape
    z = product(x.reshape(steps * rows, inputs), kernel)
    return (z + jnp.broadcast_to(bias, z.shape)).reshape(steps, rows, z.shape[-1])


def in_order(x: Any, order: int) -> Any:
    """Gives `[T, B, I]` another order; a change of names where it lies so."""
    return x.transpose({TBI: (0, 1, 2), TIB: (0, 2, 1), ITB: (2, 0, 1)}[order])


def turned_back(x: Any, order: int) -> Any:
    """Undoes `in_order`, of a block and in two steps: Mosaic swaps neighbours."""
    if order == ITB:
        x = jnp.swapaxes(x, 0, 1)
    return x if order == TBI else jnp.swapaxes(x, 1, 2)


def body(ends_ref, *refs, plan: Plan, grid: Grid, keep: bool, cuts: bool):
    """Runs one place of the grid; see the module."""
    ahead: list[Any] = list(refs)

    def take(present: bool = True) -> Any:
        return ahead.pop(0) if present else None

    lengths_ref, resets_ref, source_ref = take(), take(cuts), take()  # x, else z
    kernel_ref, bias_ref = take(plan.fused), take(plan.fused)
    weights_ref, c_first_ref, h_first_ref = take(), take(), take()
    hs_ref, c_last_ref, h_last_ref = take(), take(), take()
    gates_ref, before_ref = take(keep), take(keep)
    c_ref, h_ref, operand_ref = take(), take(), take()
    z_ref = source_ref
    if plan.fused:
        z_ref = gates_ref if keep else take()

    here = grid.here(ends_ref)
    size, visible = c_ref.shape[1], hs_ref.shape[-1]
    inner_panels = 1 if plan.streamed else size // plan.units

    @pl.when(here.first)
    def first():
        c_ref[...] = c_first_ref[...]
        h_ref[...] = h_first_ref[...].astype(jnp.float32)

    @pl.when(~here.running & (here.panel == 0))
    def skip():
        for ref in (hs_ref, gates_ref, before_ref):
            if ref is not None:
                ref[...] = jnp.zeros_like(ref)

    @pl.when(here.running)
    def run():
        if plan.fused:
            x = turned_back(source_ref[...], plan.order)
            z_ref[...] = project(x, kernel_ref[...], bias_ref[...])
        lengths = lengths_ref[...]
        bits = None if resets_ref is None else resets_ref[0]

        def step(count, carry):
            at = plan.steps - 1 - count if grid.descending else count
            live = here.start + at < lengths
            fresh = None if bits is None else ((bits >> at) & 1) == 1

            # The panels overwrite h one by one; each multiplies with all of the old.
            @pl.when(here.panel == 0)
            def begin_step():
                h = h_ref[...]
                if fresh is not None:
                    h = jnp.where(fresh, 0.0, h)
                operand_ref[...] = h.astype(operand_ref.dtype)

            for inner in range(inner_panels):
                begin = inner * plan.units
                weights = weights_ref[:, 4 * begin : 4 * (begin + plan.units)]
                seen = min(plan.units, visible - begin)  # the last panel's may be less
                if plan.streamed:
                    begin = pl.multiple_of(here.panel * plan.units, LANES)
                units = pl.ds(begin, plan.units)
                places = [pl.ds(n * size + begin, plan.units) for n in range(4)]
                z = jnp.concatenate([z_ref[at, :, place] for place in places], -1)
                gates = activate(z + product(operand_ref[...], weights))
                c_old, h_old = c_ref[:, units], h_ref[:, units]
                c_start = c_old if fresh is None else jnp.where(fresh, 0.0, c_old)
                c, h = update(*gates, c_start)
                h = h.astype(hs_ref.dtype).astype(jnp.float32)
                c_ref[:, units] = jnp.where(live, c, c_old)
                h_ref[:, units] = jnp.where(live, h, h_old)
                out = jnp.where(live, h, 0.0)[:, :seen]
                hs_ref[at, :, pl.ds(begin, seen)] = out.astype(hs_ref.dtype)
                if keep:
                    out = jnp.where(live, c_start, 0.0)[:, :seen]
                    before_ref[at, :, pl.ds(begin, seen)] = out
                    for place, gate in zip(places, gates, strict=True):
                        gates_ref[at, :, place] = jnp.where(live, gate, 0.0)
            return carry

        lax.fori_loop(0, plan.steps, step, 0)

    @pl.when(here.last)
    def final():
        c_last_ref[...] = c_ref[...]
        h_last_ref[...] = h_ref[...].astype(h_last_ref.dtype)


def forward_pass(
    inputs: Any,
    kernel: Any,
    recurrent_kernel: Any,
    bias: Any,
    c: Any,
    h: Any,
    lengths: Any,
    resets: Any,
    *,
    reverse: bool,
    keep: bool,
    plan: Plan,
    vmem_limit_bytes: int,
    interpret: Any = False,
) -> tuple[Any, ...]:
    """Runs the kernel as `plan` says; see `flax_lstm_kernels.tpu.forward`."""
    dtype = inputs.dtype
    steps, rows, size_in = inputs.shape
    hidden = h.shape[1]
    weights = panels(recurrent_kernel.astype(dtype), plan.units)
    wide_kernel = gate_lanes(kernel.astype(dtype))
    wide_bias = gate_lanes(bias.astype(jnp.float32))[None]
    size = weights.shape[0]
    grid = Grid.of(steps, rows, size, plan, descending=reverse)
    visible = size if plan.streamed else hidden

    operands = [(lengths[:, None], grid.column())]
    if resets.size:
        operands.append((reset_bits(resets, plan.steps), grid.bits()))
    aliases = {}
    if plan.fused:
        operands += [
            (in_order(inputs, plan.order), grid.inputs(size_in)),
            (wide_kernel, grid.whole(wide_kernel.shape)),
            (wide_bias, grid.whole(wide_bias.shape)),
        ]
    else:
        if keep:
            aliases = {1 + len(operands): 3}  # z's memory becomes the gates'
        z = product(inputs, wide_kernel)
        z = z + jnp.broadcast_to(wide_bias[None], z.shape)
        operands.append((z, grid.sequence(4 * size, read=True)))
    operands += [
        (weights, grid.weights(4 * plan.units, axis=1)),
        (lanes(c.astype(jnp.float32)), grid.state()),
        (lanes(h.astype(dtype)), grid.state()),
    ]
    outputs = [
        (((steps, rows, visible), dtype), grid.sequence(visible)),
        (((rows, size), jnp.float32), grid.state()),
        (((rows, size), dtype), grid.state()),
    ]
    if keep:
        outputs += [
            (((steps, rows, 4 * size), jnp.float32), grid.sequence(4 * size)),
            (((steps, rows, visible), jnp.float32), grid.sequence(visible)),
        ]
    scratch = [
        pltpu.VMEM((plan.rows, size), jnp.float32),
        pltpu.VMEM((plan.rows, size), jnp.float32),
        pltpu.VMEM((plan.rows, size), dtype),
    ]
    if plan.fused and not keep:
        scratch.append(pltpu.VMEM((plan.steps, plan.rows, 4 * size), jnp.float32))
    results = pl.pallas_call(
        partial(body, plan=plan, grid=grid, keep=keep, cuts=bool(resets.size)),
        out_shape=[jax.ShapeDtypeStruct(*like) for like, _ in outputs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid.shape,
            in_specs=[spec for _, spec in operands],
            out_specs=[spec for _, spec in outputs],
            scratch_shapes=scratch,
        ),
        input_output_aliases=aliases,
        compiler_params=grid.compiler_params(vmem_limit_bytes),
        interpret=interpret,
        name="flax_lstm_forward",
    )(live_iterations(lengths, plan), *(array for array, _ in operands))
    hs, c, h = results[0][..., :hidden], results[1][:, :hidden], results[2][:, :hidden]
    if not keep:
        empty = jnp.zeros((0, 0, 4 * hidden), jnp.float32)
        return hs, c, h, empty, empty[..., :hidden]
    gates, before = results[3:]
    return hs, c, h, cut_gates(gates, hidden), before[..., :hidden]
