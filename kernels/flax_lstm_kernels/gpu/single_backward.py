"""The gradient of the LSTM carried back through time on one Hopper SM per batch tile.

Against the order of the forward pass, with dh and dc those of the state after a step:

    dh += dhs[t];  dz[t], dc = transposed update and activations;  dh = dz[t] R^T

The gradients of weights and inputs are products of dz over all steps, made after it.

Axes     T time, N batch in whole tiles, P hidden size in whole 64s.
Grid     As in `single`: one block per tile, time is a loop inside.
Threads  One warpgroup per 64 units; it computes their dh^T `[64, rows]`.
Resident The recurrent weights and two dz (the one read, the one written) in shared
         memory, dh and dc in registers.
Step     wgmma on the last step's dz starts; while it runs, that dz goes out, later
         steps' gates come in, and all is made ready that does not need dh.
Barriers As in `single`, with dz in the place of h; dz also goes out from where it is
         multiplied, and TMA has read it before it is overwritten two steps later.
Masks    Past a row's length dh and dc stay and dz is 0; no gradient passes a reset.
Numerics dz is rounded to the computation dtype, of float32 to tf32, as operand and as
         result; sums, dh and dc are float32.
Measured Not yet run on hardware.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from flax_lstm_kernels import compat
from flax_lstm_kernels.gpu.arrange import UNITS, state_like, tile_masks
from flax_lstm_kernels.gpu.common import (
    Refs,
    Registers,
    Slopes,
    as_operand,
    meet,
    tiled,
)
from flax_lstm_kernels.gpu.plan import Plan


def body(*refs, plan: Plan, reverse: bool, cuts: bool, plain: bool):
    """Runs one tile; see the module."""
    take = Refs(refs)
    d_hs_ref, d_c_ref, d_h_ref, gates_ref, before_ref, weights_ref = (
        take() for _ in range(6)
    )
    ends_ref, lengths_ref, resets_ref = take(), take(), take(cuts)
    d_z_ref, d_c_first_ref, d_h_first_ref = take(), take(), take()
    weights, d_z_pair, gates_slots, before_slots, d_hs_slots, states = (
        take() for _ in range(6)
    )
    loaded, ready, step_done = take(), take(), take()

    registers = Registers(plain)
    groups = weights.shape[0]
    tile, group = lax.axis_index("tile"), lax.axis_index("group")
    rows, units = pl.ds(tile * plan.rows, plan.rows), pl.ds(group * UNITS, UNITS)
    steps, end = d_hs_ref.shape[0], ends_ref[tile]

    def time(j: Any) -> Any:
        """Returns the step that is processed j-th, the last of the forward first."""
        return j if reverse else end - 1 - j

    def fetch(j: Any) -> None:
        t, slot = time(j), lax.rem(j, plan.stages)
        arrives = ready.at[group * plan.stages + slot]
        for n in range(4):
            plgpu.copy_gmem_to_smem(
                gates_ref.at[t, rows, n, units], gates_slots.at[slot, group, n], arrives
            )
        for source, slots in ((before_ref, before_slots), (d_hs_ref, d_hs_slots)):
            plgpu.copy_gmem_to_smem(
                source.at[t, rows, units], slots.at[slot, group], arrives
            )

    arrives = loaded.at[group]
    for n in range(4):
        for m in range(groups):
            columns = pl.ds(m * UNITS, UNITS)
            plgpu.copy_gmem_to_smem(
                weights_ref.at[units, n, columns], weights.at[group, n, m], arrives
            )
    for n, source in enumerate((d_c_ref, d_h_ref)):
        plgpu.copy_gmem_to_smem(source.at[rows, units], states.at[n, group], arrives)
    for j in range(plan.stages - 1):
        pl.when(j < end)(partial(fetch, j))
    lengths = registers.per_row(lengths_ref.at[tile])
    zeros = jnp.zeros((UNITS, plan.rows), d_z_pair.dtype)
    for n in range(4):
        registers.store(d_z_pair.at[1, n, group], zeros)
    plgpu.barrier_wait(arrives)
    if weights.dtype == jnp.float32:
        for n in range(4):
            for m in range(groups):
                registers.round(weights.at[group, n, m])
    plgpu.commit_smem()
    d_c_last = registers.load(states.at[0, group])
    d_h_last = registers.load(states.at[1, group])
    meet(step_done, groups)

    def write(j: Any) -> None:
        """Sends off the dz of a step."""
        for n in range(4):
            plgpu.copy_smem_to_gmem(
                d_z_pair.at[lax.rem(j, 2), n, group],
                d_z_ref.at[time(j), rows, n, units],
                commit_group=n == 3,
            )

    def through(j: Any, waiting: Any, meanwhile: Any) -> tuple[Any, Any]:
        """Returns dh before the j-th step, and what `meanwhile` returned.

        `waiting` is the part of dh that passes by a step that does not count.
        """
        pairs = [
            [
                (weights.at[group, n, m], d_z_pair.at[lax.rem(j + 2, 2), n, m])
                for m in range(groups)
            ]
            for n in range(4)
        ]

        def also() -> Any:
            pl.when(j >= 0)(lambda: write(j))
            fresh = None
            if resets_ref is not None:
                t = jnp.clip(time(j), 0, steps - 1)
                fresh = registers.per_row(resets_ref.at[t, tile]) != 0
            return fresh, meanwhile()

        parts, (fresh, found) = registers.sums(pairs, also)
        d_h = (parts[0] + parts[1]) + (parts[2] + parts[3])
        if fresh is not None:
            d_h = jnp.where(fresh, 0.0, d_h)
        return d_h + waiting, found

    def step(j: Any, carry: Any) -> Any:
        d_c_old, waiting = carry
        t, slot = time(j), lax.rem(j, plan.stages)
        live = t < lengths

        def meanwhile() -> Any:
            """Makes ready what does not need dh."""
            later = j + plan.stages - 1
            pl.when(later < end)(lambda: fetch(later))
            fresh = None
            if resets_ref is not None:
                fresh = registers.per_row(resets_ref.at[t, tile]) != 0
            plgpu.barrier_wait(ready.at[group * plan.stages + slot])
            gates = tuple(
                registers.load(gates_slots.at[slot, group, n]) for n in range(4)
            )
            before = registers.load(before_slots.at[slot, group])
            d_hs = registers.load(d_hs_slots.at[slot, group])
            d_hs = jnp.where(live, d_hs, 0.0)
            return d_hs, Slopes.of(gates, before), fresh

        d_h, (d_hs, slopes, fresh) = through(j - 1, waiting, meanwhile)
        d_z, d_c = slopes.apply(d_h + d_hs, d_c_old)
        # The last dz but one, in this place, has been read by TMA.
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        for n, part in enumerate(d_z):
            part = as_operand(jnp.where(live, part, 0.0), d_z_pair.dtype)
            registers.store(d_z_pair.at[lax.rem(j, 2), n, group], part)
        plgpu.commit_smem()
        meet(step_done, groups)
        if fresh is not None:
            d_c = jnp.where(fresh, 0.0, d_c)
        return jnp.where(live, d_c, d_c_old), jnp.where(live, 0.0, d_h)

    d_c, waiting = lax.fori_loop(0, end, step, (d_c_last, d_h_last))
    d_h, _ = through(end - 1, waiting, lambda: ())

    for n, (value, place) in enumerate(((d_c, d_c_first_ref), (d_h, d_h_first_ref))):
        registers.store(states.at[n, group], value)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(states.at[n, group], place.at[rows, units])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    meet(step_done, groups)
    registers.store(d_z_pair.at[0, 0, group], zeros)
    plgpu.commit_smem()

    def clear(t: Any, nothing: None) -> None:
        for n in range(4):
            plgpu.copy_smem_to_gmem(
                d_z_pair.at[0, 0, group], d_z_ref.at[t, rows, n, units]
            )

    lax.fori_loop(end, steps, clear, None)
    plgpu.wait_smem_to_gmem(0)


def backward_pass(
    d_hs: Any,
    d_c: Any,
    d_h: Any,
    gates: Any,
    before: Any,
    weights: Any,
    lengths: Any,
    resets: Any,
    *,
    reverse: bool,
    plan: Plan,
    interpret: Any = None,
) -> tuple[Any, ...]:
    """Runs the kernel; arrays filled up, see `flax_lstm_kernels.gpu.backward`.

    Args:
      d_hs: `[T, N, P]` in the computation dtype.
      d_c: `[N, P]` in float32.
      d_h: `[N, P]` in float32.
      gates: `[T, N, 4, P]` as `forward_pass` returned them.
      before: `[T, N, P]` as `forward_pass` returned it.
      weights: `[P, 4, P]` in the computation dtype, from `recurrent_weights`.
      lengths: int32 `[N]`.
      resets: `[T, N]`, or empty.
      reverse: As in the forward pass.
      plan: How to cut up the work.
      interpret: Runs on any device: True, or the interpreter's parameters.

    Returns:
      `(d_z [T, N, 4, P]` in the computation dtype, `d_c, d_h)` in float32.
    """
    _, filled, _, size = gates.shape
    groups, dtype = size // UNITS, weights.dtype
    state = state_like(filled, size)
    place = (plan.rows, UNITS)
    operands = [d_hs, d_c, d_h, gates, before, weights]
    operands += tile_masks(lengths, resets, plan.rows)
    run = compat.kernel(
        partial(
            body,
            plan=plan,
            reverse=reverse,
            cuts=bool(resets.size),
            plain=Registers.of(interpret).plain,
        ),
        out_type=[jax.ShapeDtypeStruct(gates.shape, dtype), state, state],
        scratch_types=[
            tiled((groups, 4, groups, UNITS, UNITS), dtype),
            tiled((2, 4, groups, *place), dtype),
            tiled((plan.stages, groups, 4, *place), gates.dtype),
            tiled((plan.stages, groups, *place), jnp.float32),
            tiled((plan.stages, groups, *place), dtype),
            tiled((2, groups, *place), jnp.float32),
            plgpu.Barrier(num_arrivals=4 * groups + 2, num_barriers=groups),
            plgpu.Barrier(num_arrivals=6, num_barriers=groups * plan.stages),
            plgpu.Barrier(num_arrivals=groups, num_barriers=1),
        ],
        interpret=interpret,
        name="flax_lstm_backward",
        approx_math=dtype.itemsize == 2,
        auto_barriers=False,  # see Barriers above
        grid=(filled // plan.rows,),
        grid_names=("tile",),
        num_threads=groups,
        thread_name="group",
    )
    return tuple(run(*operands))
