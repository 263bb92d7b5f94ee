"""The LSTM forward over time on a cluster of Hopper SMs per tile of the batch.

For t = 0 .. T-1:  z = gates[t] + h R;  c, h = update(squash(z), c)

Axes     T time, N batch in whole tiles, P hidden size in whole 64s.
Grid     One cluster of `blocks` blocks per tile of `rows` rows; clusters never talk to
         each other. Time is a loop inside, as long as the tile's longest row.
Threads  One warpgroup per 32 units; a block has as many as its share of P asks for.
Resident The block's share of the recurrent weights, all four gates of its units, and
         two h of all units (the one read, the one written) in shared memory; c and the
         own part of h in registers. Weights come through registers, which turn them:
         TMA wants a contiguous place, and one gate's 32 of the 64 rows are none.
Step     wgmma on h starts, and the next step's gates are asked for; z comes through
         shared memory into the layout of `cluster_tiles`; the pointwise part; the own
         part of h goes to all other blocks (`cluster_exchange`); while it is under
         way, the results go out to memory.
Memory   As `single`.
Masks    Past a row's length c and h stay and hs is 0; at a reset h R and c are taken
         as 0.
Numerics As `single`.
Measured Not yet run on hardware.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from flax_lstm_kernels import compat
from flax_lstm_kernels.gpu.arrange import UNITS, tile_masks
from flax_lstm_kernels.gpu.cluster_exchange import (
    SLOTS,
    Copy,
    Exchange,
    Team,
    others,
    slot_of,
)
from flax_lstm_kernels.gpu.cluster_tiles import (
    EIGHT,
    PAIR,
    WIDTH,
    Tiles,
    tiles,
    transforms,
)
from flax_lstm_kernels.gpu.common import (
    Refs,
    Registers,
    as_operand,
    place_of,
    step_forward,
)
from flax_lstm_kernels.gpu.plan import Plan
from flax_lstm_kernels.gpu.source import Kind, forward_results, on_source


def body(
    *refs, team: Team, rows: int, kind: Kind, reverse: bool, cuts: bool, plain: bool
):
    """Runs one warpgroup; see the module."""
    take, keep = Refs(refs), kind.keep
    hs_ref, span = kind.taken(take)
    weights_ref, c_ref, h_ref, operand_ref, ends_ref, lengths_ref = (
        take() for _ in range(6)
    )
    resets_ref = take(cuts)
    hs_ref = take() if keep else hs_ref
    c_last_ref, h_last_ref, before_ref = take(), take(), take(keep)
    weights, h_pair, z_tile, loaded, barriers = (take() for _ in range(5))

    tile, (rank, group) = lax.axis_index("tile"), team.place()
    batch = pl.ds(tile * rows, rows)
    number = rank * team.groups + group
    units, own = pl.ds(number * WIDTH, WIDTH), span.units(number, WIDTH)
    held = span.rows(tile, rows)
    end = span.end(ends_ref[tile])
    dtype = h_pair.dtype
    registers, values = Registers(plain), Tiles(plain)
    exchange = Exchange(team, barriers, rank, transforms(dtype))
    here, peers = exchange.here, others(rank, team.members)

    def time(k: Any) -> Any:
        return span.first + (end - 1 - k if reverse else k)

    def given(k: Any) -> tuple[Any, ...]:
        """Loads the gates before activation; of a step there is not, those of one."""
        t = jnp.clip(time(k), span.first, span.first + span.count - 1)
        places = [span.gate(t, held, n, own) for n in range(4)]
        return tuple(values.load(place, dtype) for place in places)

    def weights_from(k: Any, nothing: None) -> None:
        """Brings the weights for 64 units that they come from."""
        columns = pl.ds(k * UNITS, UNITS)
        place, again = place_of(k * UNITS, UNITS, UNITS, weights_ref.shape[0])
        parts = [
            (
                weights_ref.at[place, n, own],
                weights.at[here, group, n // 2, pl.ds(n % 2 * WIDTH, WIDTH), columns],
                again,
            )
            for n in range(4)
        ]
        registers.bring_turned(parts)

    @pl.when(group == 0)
    def all_of_h() -> None:
        plgpu.copy_gmem_to_smem(
            operand_ref.at[batch], h_pair.at[here, 0], loaded.at[here]
        )

    exchange.start()
    c_first = values.load(c_ref.at[batch, units])
    h_first = values.load(h_ref.at[batch, units])
    lengths = values.per_row(lengths_ref.at[tile])
    z_first = given(0)
    lax.fori_loop(0, h_ref.shape[1] // UNITS, weights_from, None)
    plgpu.commit_smem()
    plgpu.barrier_wait(loaded.at[here])

    def step(k: Any, carry: Any) -> Any:
        c_old, h_old, z = carry
        t, now, later = time(k), slot_of(k), slot_of(k + 1)
        pairs = [
            [(weights.at[here, group, pair], h_pair.at[here, now])] for pair in range(2)
        ]

        def meanwhile() -> tuple[Any, ...]:
            """Does what does not wait for the product."""
            fresh = None if resets_ref is None else resets_ref.at[t, tile]
            fresh = None if fresh is None else values.per_row(fresh) != 0
            return fresh, given(k + 1)

        sums, (fresh, z_next) = registers.sums(pairs, meanwhile)
        for pair, total in enumerate(sums):
            place = z_tile.at[here, group, :, pl.ds(pair * PAIR, PAIR)]
            registers.store(place, total)
        plgpu.commit_smem()
        recurrent = [
            values.load(z_tile.at[here, group, :, pl.ds(n * WIDTH, WIDTH)])
            for n in range(4)
        ]
        gates, c_start, (c, h) = step_forward(
            z, recurrent, c_old, fresh, approximate=dtype.itemsize == 2
        )
        live = t < lengths
        c = jnp.where(live, c, c_old)
        h = jnp.where(live, h, h_old)

        values.store(h_pair.at[here, later, :, units], as_operand(h, dtype))
        plgpu.commit_smem()
        places = [(later, pl.ds(row, EIGHT), units) for row in range(0, rows, EIGHT)]
        part = EIGHT * WIDTH * dtype.itemsize
        copies = [Copy(at, at, other, part) for other in peers for at in places]
        exchange.publish(k, h_pair, h_pair, copies, part * len(copies))
        place = span.place(hs_ref, t, held, own)
        values.store(place, jnp.where(live, h, 0.0))
        if keep:
            values.store(before_ref.at[t, batch, units], c_start)
            for n, gate in enumerate(gates):
                values.store(span.gate(t, held, n, own), gate)
        # Of the last step too: a branch here would cost more, in every step.
        exchange.wait(k)
        return c, h, z_next

    c, h, _ = lax.fori_loop(0, end, step, (c_first, h_first, z_first))
    values.store(c_last_ref.at[batch, units], c)
    values.store(h_last_ref.at[batch, units], h)

    def clear(k: Any, nothing: None) -> None:
        t = span.first + k
        values.store(span.place(hs_ref, t, held, own), jnp.zeros_like(h))

    lax.fori_loop(end, span.count, clear, None)
    exchange.finish()


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
    """Runs the kernel; arguments and results are those of `single.forward_pass`."""
    (filled, size), dtype, rows = c.shape, weights.dtype, plan.rows
    team = Team(plan.blocks, size // (WIDTH * plan.blocks), together=bool(interpret))
    copies = (team.members - 1) * team.groups * rows // EIGHT
    scratch = [
        tiles((team.in_block, team.groups, 2, PAIR, size), dtype),
        tiles((team.in_block, SLOTS, rows, size), dtype),
        tiles((team.in_block, team.groups, rows, 2 * PAIR), jnp.float32),
        plgpu.Barrier(num_arrivals=1, num_barriers=team.in_block),
        team.barriers(copies),
    ]
    operands = [weights, c, h, as_operand(h, dtype)]
    operands += tile_masks(lengths, resets, rows)
    run = compat.kernel(
        partial(
            body,
            team=team,
            rows=rows,
            kind=Kind.of(source),
            reverse=reverse,
            cuts=bool(resets.size),
            plain=Registers.of(interpret).plain,
        ),
        out_type=forward_results(source, c, h),
        scratch_types=scratch,
        interpret=interpret,
        name="flax_lstm_forward",
        approx_math=dtype.itemsize == 2,
        auto_barriers=False,
        **team.mesh(filled // rows),
    )
    return on_source(run, source, operands)
