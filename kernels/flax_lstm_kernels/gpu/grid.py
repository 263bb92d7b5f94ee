"""The LSTM over time on all SMs of a Hopper GPU, weights and all, in one launch.

Axes     T time, N batch in whole tiles, P hidden size in whole 64s.
Grid     (units in 16s, tiles at once). The recurrent weights are spread over the blocks
         and stay in their shared memory; every step the blocks of a tile exchange h,
         backward dz and dh, through the level-2 cache (`slab_forward`, `slab_backward`,
         `flags`). More tiles than fit at once are run one after another.
Resident No launch promises that all blocks run at once, and a block that waits for one
         that has not begun waits for ever. So there are no more of them than
         SMs, and no more than 128; nothing else may hold an SM for good.
Time     Each tile runs as long as its longest row.
Memory   As `single`.
Measured Not yet run on hardware. The interpreter runs all blocks of a tile at once,
         with `Slots` for flags: it shows that the results are right if flags and fences
         do what they should, which it cannot show.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from flax_lstm_kernels import compat
from flax_lstm_kernels.gpu.arrange import masks, state_like, tile_ends
from flax_lstm_kernels.gpu.common import Refs, Registers, as_operand
from flax_lstm_kernels.gpu.flags import Flags, Slots
from flax_lstm_kernels.gpu.plan import Plan, blocks_at_once, tiles_at_once
from flax_lstm_kernels.gpu.slab_backward import GROUP, Backward, Carry
from flax_lstm_kernels.gpu.slab_forward import Forward
from flax_lstm_kernels.gpu.slabs import UNITS, Block, Cut
from flax_lstm_kernels.gpu.source import Kind, forward_results, on_source


def each_tile(
    ends: Any,
    at_once: int,
    tile: Callable[[Any, Any, Any], Any],
    of: Callable[[Any], Any] = lambda end: end,
) -> None:
    """Runs `tile(number, end, passed)` for each of this block's tiles.

    Args:
      ends: When each tile has ended.
      at_once: Tiles that run at once.
      tile: Given the steps of the tiles that this block has run before as `passed`.
      of: Makes of a tile's end the steps that it has here.
    """
    first = lax.axis_index("tile")
    mine = (ends.shape[0] - first + at_once - 1) // at_once

    def one(n: Any, passed: Any) -> Any:
        number = n * at_once + first
        end = of(ends[number])
        tile(number, end, passed)
        return passed + end

    lax.fori_loop(0, mine, one, jnp.int32(0))


def forward_body(
    *refs: Any,
    cut: Cut,
    at_once: int,
    kind: Kind,
    reverse: bool,
    cuts: bool,
    plain: bool,
    make_flags: Callable[[], Any],
) -> None:
    """Runs one block forward; see the module."""
    take = Refs(refs)
    hs, span = kind.taken(take)
    turns, weights, c_first, ends, lengths = (take() for _ in range(5))
    resets = take(cuts)
    hs = take() if kind.keep else hs
    c_last, h_last, before = take(), take(), take(kind.keep)
    block, flags = Block(cut, plain, *take.rest), make_flags()
    of = Forward(span, None, lengths, resets, turns, hs, before)
    unit, flag = lax.axis_index("unit"), lax.axis_index("tile")
    units, members = pl.ds(unit * UNITS, UNITS), cut.size // UNITS
    block.keep_turned(weights, span.units(unit, UNITS))

    def tile(number: Any, end: Any, passed: Any) -> None:
        rows = pl.ds(number * cut.rows, cut.rows)
        held = span.rows(number, cut.rows)

        def step(k: Any, carry: Any) -> Any:
            c, h = carry
            return of.step(
                block,
                flags,
                t=span.first + (end - 1 - k if reverse else k),
                turn=lax.rem(k, 2),
                rows=rows,
                held=held,
                unit=unit,
                flag=flag,
                count=(passed + k) * members,
                c=c,
                h=h,
            )

        # The half of `turns` that is not yet in use has h as it is, not as an operand.
        first = (
            block.load(c_first.at[rows, units]),
            block.load(turns.at[1, rows, units]),
        )
        c, h = lax.fori_loop(0, end, step, first)
        block.store(c_last.at[rows, units], c)
        block.store(h_last.at[rows, units], h)

        def clear(k: Any, nothing: None) -> None:
            place = span.place(hs, span.first + k, held, span.units(unit, UNITS))
            block.store(place, jnp.zeros_like(c))

        lax.fori_loop(end, span.count, clear, None)

    each_tile(ends, at_once, tile, of=span.end)


def backward_body(
    *refs: Any,
    cut: Cut,
    at_once: int,
    reverse: bool,
    cuts: bool,
    plain: bool,
    make_flags: Callable[[], Any],
) -> None:
    """Runs one block backward; see the module."""
    take = Refs(refs)
    d_hs, gates, before, weights, d_c_last, d_h_last = (take() for _ in range(6))
    ends, lengths, resets = take(), take(), take(cuts)
    d_z, d_c_first, d_h_first, turns, shares = (take() for _ in range(5))
    block, flags = Block(cut, plain, *take.rest), make_flags()
    of = Backward(d_hs, gates, before, weights, lengths, resets, turns, shares, d_z)
    unit, place = lax.axis_index("unit"), lax.axis_index("tile")
    units, members = pl.ds(unit * UNITS, UNITS), cut.size // UNITS
    groups = members // GROUP
    group_flag = at_once + place * groups + lax.div(unit, GROUP)
    block.keep_weights(of.slab(unit))

    def tile(number: Any, end: Any, passed: Any) -> None:
        rows = pl.ds(number * cut.rows, cut.rows)

        def step(k: Any, carry: Any) -> Any:
            turn = lax.rem(k, 2)
            carry = of.activate(
                block,
                flags,
                t=k if reverse else end - 1 - k,
                turn=turn,
                rows=rows,
                unit=unit,
                group_flag=group_flag,
                group_count=(passed + k) * GROUP,
                flag=place,
                carry=carry,
            )
            of.multiply(
                block,
                flags,
                turn=turn,
                rows=rows,
                unit=unit,
                flag=place,
                count=(passed + k + 1) * members,
                group_flag=group_flag,
            )
            return carry

        d_c, d_h = (block.load(ref.at[rows, units]) for ref in (d_c_last, d_h_last))
        own = jnp.where(block.per_row(lengths.at[rows]) >= 0, 1, 0)  # all, in registers
        carry = Carry(d_c, d_h, own)
        carry = lax.fori_loop(0, end, step, carry)
        flags.wait(group_flag, (passed + end) * GROUP)
        block.store(d_h_first.at[rows, units], of.arrived(block, rows, unit, carry))
        block.store(d_c_first.at[rows, units], carry.d_c)

        def clear(t: Any, nothing: None) -> None:
            for gate in range(4):
                block.store(d_z.at[t, rows, gate, units], jnp.zeros_like(d_c))

        lax.fori_loop(end, d_z.shape[0], clear, None)

    each_tile(ends, at_once, tile)


def launch(
    body: Callable[..., None],
    cut: Cut,
    filled: int,
    out_type: list[Any],
    interpret: Any,
) -> Callable[..., Any]:
    """Makes the kernel of a body, for `filled` rows.

    Raises:
      NotImplementedError: If the device cannot run all blocks of a tile at once.
    """
    units, at_once = cut.size // UNITS, tiles_at_once(cut.size)
    if not at_once:
        raise NotImplementedError(
            f"grid: {cut.size} units take {units} blocks; no more than "
            f"{blocks_at_once()} are sure to run at once"
        )
    at_once = min(filled // cut.rows, at_once)
    # One for each tile, and backward then one for each of its groups.
    number = at_once * (1 + units // GROUP)
    make_flags: Callable[[], Any] = partial(Flags.of, number)
    if interpret:
        counts = compat.in_place(jnp.zeros((number, units), jnp.int32))
        make_flags = partial(Slots, counts)
    # The interpreter runs the places of a grid one by one, those of a cluster at once.
    axes: dict[str, Any] = {"grid": (units, at_once), "grid_names": ("unit", "tile")}
    if interpret:
        axes = {"grid": (at_once,), "grid_names": ("tile",)}
        axes |= {"cluster": (units,), "cluster_names": ("unit",)}
    return compat.kernel(
        partial(
            body,
            cut=cut,
            at_once=at_once,
            plain=Registers.of(interpret).plain,
            make_flags=make_flags,
        ),
        out_type=out_type,
        scratch_types=cut.scratch(),
        interpret=interpret,
        name="flax_lstm_grid",
        approx_math=jnp.dtype(cut.dtype).itemsize == 2,
        auto_barriers=False,
        **axes,
    )


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
    """Runs the kernel forward; arguments and results as `single.forward_pass`."""
    (filled, size), dtype = c.shape, weights.dtype
    cut = Cut(plan.rows, size, dtype, plan.stages, resident=True)
    turns = compat.in_place(jnp.stack([as_operand(h, dtype), h]))
    operands = [turns, weights, c, tile_ends(lengths, plan.rows)]
    operands += masks(lengths, resets)
    body = partial(forward_body, kind=Kind.of(source), reverse=reverse)
    run = launch(
        partial(body, cuts=bool(resets.size)),
        cut,
        filled,
        forward_results(source, c, h),
        interpret,
    )
    return on_source(run, source, operands)


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
    """Runs the kernel backward; arguments and results as `single.backward_pass`."""
    _, filled, _, size = gates.shape
    dtype = weights.dtype
    cut = Cut(plan.rows, size, dtype, plan.stages, resident=True)
    state = state_like(filled, size)
    out_type = [
        jax.ShapeDtypeStruct(gates.shape, dtype),
        state,
        state,
        jax.ShapeDtypeStruct((2, filled, 4, size), dtype),
        jax.ShapeDtypeStruct((GROUP, filled, size), jnp.float32),
    ]
    operands = [d_hs, gates, before, weights, d_c, d_h]
    operands += [tile_ends(lengths, plan.rows), *masks(lengths, resets)]
    run = launch(
        partial(backward_body, reverse=reverse, cuts=bool(resets.size)),
        cut,
        filled,
        out_type,
        interpret,
    )
    return tuple(run(*operands)[:3])
