"""The LSTM forward over time on one Hopper SM per tile of the batch.

For t = 0 .. T-1:  z = gates[t] + h R;  c, h = update(squash(z), c)

Axes     T time, N batch in whole tiles, P hidden size in whole 64s.
Grid     One block per tile of `rows` rows; they never talk to each other. Time is a
         loop inside, as long as the tile's longest row.
Threads  One warpgroup per 64 units. It computes z^T `[64, rows]` of its four gates, so
         that all four of a unit meet in one thread.
Resident The recurrent weights and two h (the one read, the one written) in shared
         memory, c in registers. Weights come as they lie, unit they go to last. wgmma
         takes 16 bits so; tf32 it takes with that they come from last, so these are
         turned in place, once.
Step     wgmma on h starts; while it runs, the last step's results go out and later
         steps' gates come in; then the pointwise part, h to shared memory, a barrier.
Barriers None but those written here: 3 of a warpgroup in a step, where Pallas'
         automatic ones would make it 21. What is read of shared memory is overwritten
         only after a `meet`, or for a warpgroup alone a `commit_smem`, which every
         thread reaches when it has read: of h, a step later; of the gates that came in,
         at the next step's fetch. What goes out is overwritten after
         `wait_smem_to_gmem`, where all threads wait.
Pieces   Nothing is kept, and hs is written in place. Where its rows or units are not
         what TMA copies (`Kind.by_eights`), gates and hs of a step go through registers
         alone, the gates a step ahead, as in `cluster`.
Memory   What is kept of the gates takes the place of those before activation.
Masks    Past a row's length c and h stay and hs is 0; at a reset h R and c are taken
         as 0.
Numerics Products take bfloat16, float16, or float32 as tf32 (weights and h are rounded
         to its 11 bits, to nearest; what is carried and given out is not), and sum in
         float32; c is float32. 16-bit kernels use the hardware's tanh, of 11 bits.
Measured Not yet run on hardware.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from flax_lstm_kernels import compat
from flax_lstm_kernels.gpu.arrange import UNITS, kept_dtype, tile_masks
from flax_lstm_kernels.gpu.common import (
    Refs,
    Registers,
    as_operand,
    meet,
    multiplied_turned,
    place_of,
    step_forward,
    tiled,
    widened,
)
from flax_lstm_kernels.gpu.plan import Plan
from flax_lstm_kernels.gpu.source import Kind, forward_results, on_source


def body(*refs, plan: Plan, kind: Kind, reverse: bool, cuts: bool, plain: bool):
    """Runs one tile; see the module."""
    take, keep = Refs(refs), kind.keep
    hs_ref, span = kind.taken(take)
    weights_ref, c_ref, h_ref, ends_ref, lengths_ref = (take() for _ in range(5))
    resets_ref = take(cuts)
    hs_ref = take() if keep else hs_ref
    c_last_ref, h_last_ref, before_ref = take(), take(), take(keep)
    weights, h_pair, c_tile, h_tile = take(), take(), take(), take()
    z_slots, row_tile = take(kind.by_eights), take(kind.held == 1)
    out_gates = take(keep)
    loaded, step_done, z_ready = take(), take(), take(kind.by_eights)

    registers, by_eights = Registers(plain), kind.by_eights
    groups, kept = weights.shape[0], kept_dtype(h_pair.dtype)
    tile, group = lax.axis_index("tile"), lax.axis_index("group")
    rows, units = pl.ds(tile * plan.rows, plan.rows), pl.ds(group * UNITS, UNITS)
    held, own = span.rows(tile, plan.rows), span.units(group, UNITS)
    end = span.end(ends_ref[tile])

    def time(k: Any) -> Any:
        return span.first + (end - 1 - k if reverse else k)

    def given(k: Any) -> tuple[Any, ...]:
        """Loads gates before activation; of a step there is not, those of one."""
        t = jnp.clip(time(k), span.first, span.first + span.count - 1)
        places = [span.gate(t, held, n, own) for n in range(4)]
        if span.held == 1:
            return tuple(registers.per_unit(place, plan.rows) for place in places)
        return tuple(registers.bring(place) for place in places)

    def put(t: Any, out: Any) -> None:
        through = None if row_tile is None else row_tile.at[group]
        registers.put(span.place(hs_ref, t, held, own), out, through)

    def fetch(k: Any) -> None:
        slot = lax.rem(k, plan.stages)
        for n in range(4):
            plgpu.copy_gmem_to_smem(
                span.gate(time(k), held, n, own),
                z_slots.at[slot, group, n],
                z_ready.at[group * plan.stages + slot],
            )

    ready, copied = loaded.at[group], weights_ref.shape[0] % UNITS == 0
    for n in range(4):
        for k in range(groups):
            place, again = place_of(k * UNITS, UNITS, UNITS, weights_ref.shape[0])
            some, here = weights_ref.at[place, n, own], weights.at[group, n, k]
            if copied:
                plgpu.copy_gmem_to_smem(some, here, ready)
            else:
                registers.store(here, registers.without(registers.load(some), 1, again))
    plgpu.copy_gmem_to_smem(h_ref.at[rows, units], h_pair.at[0, group], ready)
    plgpu.copy_gmem_to_smem(c_ref.at[rows, units], c_tile.at[group], ready)
    if by_eights:
        for k in range(plan.stages - 1):
            pl.when(k < end)(partial(fetch, k))
    lengths = registers.per_row(lengths_ref.at[tile])
    plgpu.barrier_wait(ready)
    c_first = registers.load(c_tile.at[group])
    h_first = registers.load(h_pair.at[0, group])
    turned = multiplied_turned(h_pair.dtype)
    if not turned:
        for n in range(4):
            for k in range(groups):
                registers.turn(weights.at[group, n, k])
        registers.store(h_pair.at[0, group], as_operand(h_first, h_pair.dtype))
    if not (turned and copied):
        plgpu.commit_smem()
    meet(step_done, groups)

    def write(k: Any, out: Any, gates: Any, c_old: Any) -> None:
        """Sends off what a step leaves in memory; the tiles are free after `wait`."""
        t = time(k)
        if not by_eights:
            return put(t, out)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        registers.store(h_tile.at[group], out)
        if keep:
            registers.store(c_tile.at[group], c_old)
            for n, gate in enumerate(gates):
                registers.store(out_gates.at[group, n], gate)
        plgpu.commit_smem()
        if keep:
            for n in range(4):
                plgpu.copy_smem_to_gmem(
                    out_gates.at[group, n],
                    span.gate(t, held, n, own),
                    commit_group=False,
                )
            plgpu.copy_smem_to_gmem(
                c_tile.at[group], before_ref.at[t, rows, units], commit_group=False
            )
        plgpu.copy_smem_to_gmem(h_tile.at[group], span.place(hs_ref, t, held, own))

    def step(k: Any, carry: Any) -> Any:
        c_old, h_old, last, ahead = carry
        t, now, slot = time(k), lax.rem(k, 2), lax.rem(k, plan.stages)
        pairs = [
            [(weights.at[group, n, m], h_pair.at[now, m]) for m in range(groups)]
            for n in range(4)
        ]

        def meanwhile() -> tuple[Any, ...]:
            """Does what does not wait for h; returns gates, resets and what is ahead.

            Gates and resets are the step's, ahead are the next one's gates.
            """
            pl.when(k > 0)(lambda: write(k - 1, *last))
            fresh = None if resets_ref is None else resets_ref.at[t, tile]
            fresh = None if fresh is None else registers.per_row(fresh) != 0
            if not by_eights:
                return [widened(z, h_pair.dtype) for z in ahead], fresh, given(k + 1)
            later = k + plan.stages - 1
            pl.when(later < end)(lambda: fetch(later))
            plgpu.barrier_wait(z_ready.at[group * plan.stages + slot])
            slots = [z_slots.at[slot, group, n] for n in range(4)]
            return [registers.load(z, h_pair.dtype) for z in slots], fresh, ahead

        recurrent, (z, fresh, ahead) = registers.sums(pairs, meanwhile, turned=turned)
        approximate = h_pair.dtype.itemsize == 2
        gates, c_start, (c, h) = step_forward(
            z, recurrent, c_old, fresh, approximate=approximate
        )
        live = t < lengths
        c = jnp.where(live, c, c_old)
        h = jnp.where(live, h, h_old)
        registers.store(h_pair.at[1 - now, group], as_operand(h, h_pair.dtype))
        plgpu.commit_smem()
        meet(step_done, groups)
        out = jnp.where(live, h, 0.0).astype(h_pair.dtype)
        gates = tuple(gate.astype(kept) for gate in gates)
        return c, h, (out, gates, c_start), ahead

    # Of the layout of registers that the loop carries; never written out.
    nothing = (
        h_first.astype(h_pair.dtype),
        (c_first.astype(kept),) * 4,
        c_first,
    )
    ahead = None if by_eights else given(0)
    first = c_first, h_first, nothing, ahead
    c, h, last, _ = lax.fori_loop(0, end, step, first)
    pl.when(end > 0)(lambda: write(end - 1, *last))

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    registers.store(h_tile.at[group], h)
    registers.store(c_tile.at[group], c)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(h_tile.at[group], h_last_ref.at[rows, units])
    plgpu.copy_smem_to_gmem(c_tile.at[group], c_last_ref.at[rows, units])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    registers.store(h_tile.at[group], jnp.zeros((UNITS, plan.rows), h_tile.dtype))
    plgpu.commit_smem()

    def clear(k: Any, nothing: None) -> None:
        t = span.first + k
        if by_eights:
            place = span.place(hs_ref, t, held, own)
            plgpu.copy_smem_to_gmem(h_tile.at[group], place)
        else:
            put(t, jnp.zeros((UNITS, plan.rows), h_tile.dtype))

    lax.fori_loop(end, span.count, clear, None)
    plgpu.wait_smem_to_gmem(0)


def forward_pass(
    source: Any,
    weights: Any,
    c: Any,
    h: Any,
    lengths: Any,
    resets: Any,
    *,
    reverse: bool,
    plan: Plan,
    interpret: Any = None,
) -> tuple[Any, ...]:
    """Runs the kernel; arrays filled up, see `flax_lstm_kernels.gpu.forward`.

    Args:
      source: The gates of all steps before activation, `[T, N, 4, P]`, from
        `projected`; or a `Piece`.
      weights: `[W, 4, W]` in the computation dtype, from `recurrent_weights`.
      c: `[N, P]` in float32.
      h: `[N, P]` in the computation dtype.
      lengths: int32 `[N]`.
      resets: `[T, N]`, or empty.
      reverse: From the last valid step to the first.
      plan: How to cut up the work.
      interpret: Runs on any device: True, or the interpreter's parameters.

    Returns:
      `(hs [T, N, P], c, h, gates [T, N, 4, P], before [T, N, P])`, the gates in the
      place of those given; of a piece `(c, h)`.
    """
    kind = Kind.of(source)
    (filled, size), dtype = c.shape, weights.dtype
    groups, kept = size // UNITS, kept_dtype(dtype) if kind.keep else dtype
    place = (plan.rows, UNITS)
    copies = 2 + (0 if len(weights) % UNITS else 4 * groups)
    scratch = [
        tiled((groups, 4, groups, UNITS, UNITS), dtype),
        tiled((2, groups, *place), dtype),
        tiled((groups, *place), jnp.float32),
        tiled((groups, *place), dtype),
    ]
    if kind.by_eights:
        scratch.append(tiled((plan.stages, groups, 4, *place), kept))
    if kind.held == 1:
        scratch.append(plgpu.SMEM((groups, *place), dtype))
    if kind.keep:
        scratch.append(tiled((groups, 4, *place), kept))
    scratch += [
        plgpu.Barrier(num_arrivals=copies, num_barriers=groups),
        plgpu.Barrier(num_arrivals=groups, num_barriers=1),
    ]
    if kind.by_eights:
        scratch.append(plgpu.Barrier(num_arrivals=4, num_barriers=groups * plan.stages))
    operands = [weights, c, h, *tile_masks(lengths, resets, plan.rows)]
    run = compat.kernel(
        partial(
            body,
            plan=plan,
            kind=kind,
            reverse=reverse,
            cuts=bool(resets.size),
            plain=Registers.of(interpret).plain,
        ),
        out_type=forward_results(source, c, h),
        scratch_types=scratch,
        interpret=interpret,
        name="flax_lstm_forward",
        approx_math=dtype.itemsize == 2,
        auto_barriers=False,  # see Barriers above
        grid=(filled // plan.rows,),
        grid_names=("tile",),
        num_threads=groups,
        thread_name="group",
    )
    return on_source(run, source, operands)
