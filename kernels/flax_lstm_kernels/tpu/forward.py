"""The LSTM forward over time on a TPU, in Pallas.

For t = 0 .. T-1:  z = x[t] W + b + h R;  c, h = update(activate(z), c)

Axes     T time, B batch, I input size, H hidden size, P the same in whole lanes of 128.
Grid     (tiles of the batch, iterations of `steps` steps, panels of the weights), with
         c and h in VMEM from one iteration to the next.
Weights  Stay in VMEM for the whole run, with their panels in a loop inside; or are
         streamed, a panel in each place of the grid, twice buffered. A block for each
         gate, so that they are read as they lie.
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
    filled,
    gate_lanes,
    in_names,
    in_order,
    lanes,
    live_iterations,
    reset_bits,
    turned,
    turned_back,
)
from flax_lstm_kernels.tpu.grid import Grid, product
from flax_lstm_kernels.tpu.orders import LANES, TBI, up
from flax_lstm_kernels.tpu.vmem import Plan


def project(x: Any, kernel: Any, bias: Any) -> Any:
    """Multiplies the inputs `[t, b, I]` of an iteration: `[t, b, 4P]`, in one product.

    Rows are filled up to whole sublanes first, so that the reshapes move nothing.
    """
    steps, rows, inputs = x.shape
    whole = up(rows, 32 // x.dtype.itemsize)
    if whole != rows:
        x = jnp.pad(x, ((0, 0), (0, whole - rows), (0, 0)))
    z = product(x.reshape(steps * whole, inputs), kernel)
    z = z + jnp.broadcast_to(bias, z.shape)
    return z.reshape(steps, whole, z.shape[-1])[:, :rows]


def body(ends_ref, *refs, plan: Plan, grid: Grid, visible: int, keep: bool, cuts: bool):
    """Runs one place of the grid; see the module."""
    ahead: list[Any] = list(refs)

    def take(present: bool = True) -> Any:
        return ahead.pop(0) if present else None

    lengths_ref, resets_ref, source_ref = take(), take(cuts), take()  # x, else z
    kernel_ref, bias_ref = take(plan.fused), take(plan.fused)
    weights_refs = [take() for _ in range(4)]  # of each gate
    c_first_ref, h_first_ref = take(), take()
    hs_ref, c_last_ref, h_last_ref = take(), take(), take()
    gates_ref, before_ref = take(keep), take(keep)
    c_ref, h_ref, operand_ref = take(), take(), take()
    out_ref = hs_ref if plan.hs_order == TBI else take()
    z_ref = source_ref
    if plan.fused:
        z_ref = gates_ref if keep else take()

    here = grid.here(ends_ref)
    size, wide = c_ref.shape[1], z_ref.shape[-1] // 4
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
                columns = slice(begin, begin + plan.units)
                weights = jnp.concatenate([ref[:, columns] for ref in weights_refs], -1)
                # The last panel's may be less.
                seen, read = (min(plan.units, n - begin) for n in (visible, wide))
                if plan.streamed:
                    begin = pl.multiple_of(here.panel * plan.units, LANES)
                units = pl.ds(begin, plan.units)
                places = [pl.ds(n * wide + begin, read) for n in range(4)]
                z = jnp.concatenate(
                    [lanes(z_ref[at, :, place]) for place in places], -1
                )
                gates = activate(z + product(operand_ref[...], weights))
                c_old, h_old = c_ref[:, units], h_ref[:, units]
                c_start = c_old if fresh is None else jnp.where(fresh, 0.0, c_old)
                c, h = update(*gates, c_start)
                h = h.astype(out_ref.dtype).astype(jnp.float32)
                c_ref[:, units] = jnp.where(live, c, c_old)
                h_ref[:, units] = jnp.where(live, h, h_old)
                out = jnp.where(live, h, 0.0)[:, :seen]
                out_ref[at, :, pl.ds(begin, seen)] = out.astype(out_ref.dtype)
                if keep:
                    out = jnp.where(live, c_start, 0.0)[:, :seen]
                    before_ref[at, :, pl.ds(begin, seen)] = out
                    for place, gate in zip(places, gates, strict=True):
                        gates_ref[at, :, place] = jnp.where(live, gate, 0.0)[:, :seen]
            return carry

        lax.fori_loop(0, plan.steps, step, 0)
        if plan.hs_order != TBI:
            hs_ref[...] = turned(out_ref[...], plan.hs_order)

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
    weights = filled(recurrent_kernel.astype(dtype))
    size = weights.shape[0]
    grid = Grid.of(steps, rows, size, plan, descending=reverse)
    visible = size if plan.streamed else hidden
    # What is kept is as wide as the arrays; z, which is in its place, is too.
    wide = visible if keep else size
    kernel, bias = kernel.astype(dtype), bias.astype(jnp.float32)[None]
    if wide != hidden:
        kernel, bias = gate_lanes(kernel), gate_lanes(bias)

    operands = [(lengths[:, None], grid.column())]
    if resets.size:
        operands.append((reset_bits(resets, plan.steps), grid.bits()))
    aliases = {}
    if plan.fused:
        operands += [
            (in_order(inputs, plan.order), grid.ordered(size_in, plan.order, True)),
            (kernel, grid.whole(kernel.shape)),
            (bias, grid.whole(bias.shape)),
        ]
    else:
        if keep:
            aliases = {1 + len(operands): 3}  # z's memory becomes the gates'
        z = product(inputs, kernel)
        z = z + jnp.broadcast_to(bias[None], z.shape)
        operands.append((z, grid.sequence(4 * wide, read=True)))
    operands += [
        *((weights, grid.weights(gate)) for gate in range(4)),
        (lanes(c.astype(jnp.float32)), grid.state()),
        (lanes(h.astype(dtype)), grid.state()),
    ]
    like = jax.eval_shape(
        partial(in_order, order=plan.hs_order),
        jax.ShapeDtypeStruct((steps, rows, visible), dtype),
    )
    outputs = [
        ((like.shape, dtype), grid.ordered(visible, plan.hs_order)),
        (((rows, size), jnp.float32), grid.state()),
        (((rows, size), dtype), grid.state()),
    ]
    if keep:
        outputs += [
            (((steps, rows, 4 * visible), jnp.float32), grid.sequence(4 * visible)),
            (((steps, rows, visible), jnp.float32), grid.sequence(visible)),
        ]
    scratch = [
        pltpu.VMEM((plan.rows, size), jnp.float32),
        pltpu.VMEM((plan.rows, size), jnp.float32),
        pltpu.VMEM((plan.rows, size), dtype),
    ]
    if plan.hs_order != TBI:
        scratch.append(pltpu.VMEM((plan.steps, plan.rows, visible), dtype))
    if plan.fused and not keep:
        scratch.append(pltpu.VMEM((plan.steps, plan.rows, 4 * size), jnp.float32))
    results = pl.pallas_call(
        partial(
            body,
            plan=plan,
            grid=grid,
            visible=visible,
            keep=keep,
            cuts=bool(resets.size),
        ),
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
    hs = in_names(results[0], plan.hs_order)[..., :hidden]
    c, h = results[1][:, :hidden], results[2][:, :hidden]
    if not keep:
        empty = jnp.zeros((0, 0, 4 * hidden), jnp.float32)
        return hs, c, h, empty, empty[..., :hidden]
    gates, before = results[3:]
    return hs, c, h, cut_gates(gates, hidden), before[..., :hidden]
