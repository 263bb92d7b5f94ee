"""The gradient of the LSTM carried back through time on a cluster of Hopper SMs.

Against the order of the forward pass, with dh and dc those of the state after a step:

    dh += dhs[t];  dz[t], dc = transposed update and activations;  dh = dz[t] R^T

Axes     T time, N batch in whole tiles, P hidden size in whole 64s.
Grid     As the forward: one cluster of `blocks` blocks per tile of `rows` rows.
Threads  One warpgroup per 32 units, and for a share of the product: of 64 rows each.
Resident The rows of R^T that take in the block's units, all P of what they give out, in
         shared memory; dc and the own part of dh in registers.
Step     The pointwise part makes dz of the block's units, which wgmma turns into what
         they contribute to dh of all P units; that goes, in float32, to the blocks that
         own them (`cluster_exchange`), which add up what comes from each.
Masks    Past a row's length dz is 0, and dh and dc stay; behind a reset both are 0.
Numerics As `single`; what the blocks contribute is added in float32, in their order.
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
from flax_lstm_kernels.gpu.arrange import state_like, tile_masks
from flax_lstm_kernels.gpu.cluster_exchange import (
    SLOTS,
    Copy,
    Exchange,
    Team,
    owners,
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
from flax_lstm_kernels.gpu.common import Refs, Registers, Slopes, as_operand, meet
from flax_lstm_kernels.gpu.plan import Plan


def body(*refs, team: Team, rows: int, reverse: bool, cuts: bool, plain: bool):
    """Runs one warpgroup; see the module."""
    take = Refs(refs)
    d_hs_ref, d_c_last_ref, d_h_last_ref, gates_ref, before_ref, weights_ref = (
        take() for _ in range(6)
    )
    ends_ref, lengths_ref, resets_ref = take(), take(), take(cuts)
    d_z_ref, d_c_ref, d_h_ref = take(), take(), take()
    weights, d_z_tiles, outbox, inbox, loaded, stored, barriers = (
        take() for _ in range(7)
    )

    tile, (rank, group) = lax.axis_index("tile"), team.place()
    batch = pl.ds(tile * rows, rows)
    units = pl.ds((rank * team.groups + group) * WIDTH, WIDTH)
    steps, end = d_hs_ref.shape[0], ends_ref[tile]
    registers, values = Registers(plain), Tiles(plain)
    exchange = Exchange(team, barriers, rank, transforms(jnp.float32))
    here = exchange.here
    # The products of 64 rows that this warpgroup makes.
    products = range(weights.shape[1] // team.groups)
    products = [share * team.groups + group for share in products]

    def time(k: Any) -> Any:
        return k if reverse else end - 1 - k

    def given(k: Any) -> tuple[Any, ...]:
        """Loads what a step needs; of one that there is not, something."""
        t = jnp.clip(time(k), 0, steps - 1)
        gates = tuple(values.load(gates_ref.at[t, batch, n, units]) for n in range(4))
        before = values.load(before_ref.at[t, batch, units])
        return gates, before, values.load(d_hs_ref.at[t, batch, units])

    ready = loaded.at[here]
    # Of each product, the gates of the block's units in 32s, as d_z_tiles has them.
    shares = [
        (weights.at[here, product, n], product, *divmod(n, 4))
        for product in products
        for n in range(4 * team.groups)
    ]
    for share, product, mate, n in shares:
        theirs = pl.ds((rank * team.groups + mate) * WIDTH, WIDTH)
        place = weights_ref.at[pl.ds(product * PAIR, PAIR), n, theirs]
        plgpu.copy_gmem_to_smem(place, share, ready)
    exchange.start()
    d_c_last = values.load(d_c_last_ref.at[batch, units])
    d_h_last = values.load(d_h_last_ref.at[batch, units])
    lengths = values.per_row(lengths_ref.at[tile])
    first = given(0)
    plgpu.barrier_wait(ready)
    if weights.dtype == jnp.float32:
        for share, *_ in shares:
            values.round(share)  # and committed by the first step

    def letters(slot: Any) -> list[Copy]:
        """Returns the copies of a round: of each product, to the two it is for."""
        return [
            Copy(
                (slot, product, eight, pl.ds(half * WIDTH, WIDTH)),
                (slot, mate, rank, eight),
                member,
                EIGHT * WIDTH * 4,
            )
            for product in products
            for half, (member, mate) in enumerate(owners(product, team.groups))
            for eight in (pl.ds(row, EIGHT) for row in range(0, rows, EIGHT))
        ]

    def step(k: Any, carry: Any) -> Any:
        d_h_old, d_c_old, (gates, before, d_hs) = carry
        t, slot = time(k), slot_of(k)
        live = t < lengths
        d_z, d_c = Slopes.of(gates, before).apply(d_h_old + d_hs, d_c_old)
        d_z = [jnp.where(live, part, 0.0) for part in d_z]
        for n, part in enumerate(d_z):
            place = d_z_tiles.at[here, group * 4 + n]
            values.store(place, as_operand(part, place.dtype))
        plgpu.commit_smem()
        meet(stored.at[here], team.groups)
        pairs = [
            [
                (weights.at[here, product, n], d_z_tiles.at[here, n])
                for n in range(4 * team.groups)
            ]
            for product in products
        ]

        def meanwhile() -> tuple[Any, ...]:
            """Does what does not wait for the product."""
            for n, part in enumerate(d_z):
                values.store(d_z_ref.at[t, batch, n, units], part)
            fresh = None if resets_ref is None else resets_ref.at[t, tile]
            fresh = None if fresh is None else values.per_row(fresh)
            return fresh, given(k + 1)

        sums, (fresh, following) = registers.sums(pairs, meanwhile)
        for product, total in zip(products, sums, strict=True):
            registers.store(outbox.at[here, slot, product], total)
        plgpu.commit_smem()
        size = team.members * rows * WIDTH * 4
        exchange.publish(k, outbox, inbox, letters(slot), size)
        exchange.wait(k)
        parts = [inbox.at[here, slot, group, member] for member in range(team.members)]
        d_h = values.load(parts[0])
        for part in parts[1:]:
            d_h = d_h + values.load(part)
        if fresh is not None:
            d_h, d_c = (jnp.where(fresh != 0, 0.0, part) for part in (d_h, d_c))
        d_h = jnp.where(live, d_h, d_h_old)
        return d_h, jnp.where(live, d_c, d_c_old), following

    d_h, d_c, _ = lax.fori_loop(0, end, step, (d_h_last, d_c_last, first))
    values.store(d_h_ref.at[batch, units], d_h)
    values.store(d_c_ref.at[batch, units], d_c)

    def clear(t: Any, nothing: None) -> None:
        for n in range(4):
            values.store(d_z_ref.at[t, batch, n, units], jnp.zeros_like(d_h))

    lax.fori_loop(end, steps, clear, None)
    exchange.finish()


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
      d_hs: `[T, N, P]`.
      d_c: `[N, P]` in float32.
      d_h: `[N, P]` in float32.
      gates: `[T, N, 4, P]`.
      before: `[T, N, P]` in float32.
      weights: `[P, 4, P]` in the computation dtype, from `recurrent_weights`.
      lengths: int32 `[N]`.
      resets: `[T, N]`, or empty.
      reverse: From the last valid step to the first.
      plan: How to cut up the work.
      interpret: Runs on any device: True, or the interpreter's parameters.

    Returns:
      `(d_z [T, N, 4, P], d_c, d_h)`.
    """
    _, filled, _, size = gates.shape
    dtype, rows = weights.dtype, plan.rows
    team = Team(plan.blocks, size // (WIDTH * plan.blocks), together=bool(interpret))
    state = state_like(filled, size)
    products, in_block = size // PAIR, team.in_block
    scratch = [
        tiles((in_block, products, 4 * team.groups, PAIR, WIDTH), dtype),
        tiles((in_block, 4 * team.groups, rows, WIDTH), dtype),
        tiles((in_block, SLOTS, products, rows, PAIR), jnp.float32),
        tiles((in_block, SLOTS, team.groups, team.members, rows, WIDTH), jnp.float32),
        plgpu.Barrier(num_arrivals=4 * team.groups * products, num_barriers=in_block),
        plgpu.Barrier(num_arrivals=team.groups, num_barriers=in_block),
        team.barriers(team.members * team.groups * rows // EIGHT),
    ]
    operands = [weights, *tile_masks(lengths, resets, rows)]
    run = compat.kernel(
        partial(
            body,
            team=team,
            rows=rows,
            reverse=reverse,
            cuts=bool(resets.size),
            plain=Registers.of(interpret).plain,
        ),
        out_type=[jax.ShapeDtypeStruct(gates.shape, dtype), state, state],
        scratch_types=scratch,
        interpret=interpret,
        name="flax_lstm_backward",
        approx_math=dtype.itemsize == 2,
        auto_barriers=False,
        **team.mesh(filled // rows),
    )
    return tuple(run(d_hs, d_c, d_h, gates, before, *operands))
