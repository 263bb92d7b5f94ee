"""The LSTM over time on a Hopper GPU, step by step: for sizes that no SM can hold.

Axes     T time, N batch in whole tiles, P hidden size in whole 64s.
Launches One a step forward, two backward (`slab_forward`, `slab_backward`): a launch
         begins when the one before is done, so that blocks need nothing else to agree.
Grid     (units in 16s, tiles of the batch), of any size.
Weights  Pass through shared memory at every step, as they lie, from the level-2 cache
         if that holds them. The gates are computed in the block that has multiplied,
         and never pass through memory before.
State    c, h and the gradients stay in global memory, in place; the gates as in
         `single`. Tiles whose rows have all ended multiply nothing.
Measured Not yet run on hardware.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from flax_lstm_kernels import compat
from flax_lstm_kernels.gpu.arrange import masks, tile_ends
from flax_lstm_kernels.gpu.common import Refs, Registers, as_operand
from flax_lstm_kernels.gpu.flags import Launches
from flax_lstm_kernels.gpu.plan import Plan
from flax_lstm_kernels.gpu.slab_backward import GROUP, Backward, Carry
from flax_lstm_kernels.gpu.slab_forward import Forward
from flax_lstm_kernels.gpu.slabs import UNITS, Block, Cut
from flax_lstm_kernels.gpu.source import Kind, forward_results, opened

NONE = Launches()


def forward_body(*refs: Any, cut: Cut, kind: Kind, cuts: bool, plain: bool) -> None:
    """Runs one block of one step forward; see the module."""
    take = Refs(refs)
    hs, span = kind.taken(take)
    turns, c_state, h_state = take(), take(), take()
    hs, before = take() if kind.keep else hs, take(kind.keep)
    now, weights, ends, lengths, resets = take(), take(), take(), take(), take(cuts)
    block = Block(cut, plain, *take.rest)
    unit, tile = lax.axis_index("unit"), lax.axis_index("tile")
    rows, units = pl.ds(tile * cut.rows, cut.rows), pl.ds(unit * UNITS, UNITS)
    t, turn, held = now[0], now[1], span.rows(tile, cut.rows)
    of = Forward(span, weights, lengths, resets, turns, hs, before)

    @pl.when(t < ends[tile])
    def run() -> None:
        c, h = of.step(
            block,
            NONE,
            t=t,
            turn=turn,
            rows=rows,
            held=held,
            unit=unit,
            flag=0,
            count=0,
            c=block.load(c_state.at[rows, units]),
            h=block.load(h_state.at[rows, units]),
        )
        block.store(c_state.at[rows, units], c)
        block.store(h_state.at[rows, units], h)

    @pl.when(t >= ends[tile])
    def clear() -> None:
        nothing = jnp.zeros_like(block.load(c_state.at[rows, units]))
        block.store(span.place(hs, t, held, span.units(unit, UNITS)), nothing)


def activate_body(*refs: Any, cut: Cut, cuts: bool, plain: bool) -> None:
    """Runs one block of the first phase of a step backward; see the module."""
    d_z, turns, shares, d_c, d_h, own, now, d_hs, gates, before, *rest = refs
    weights, ends, lengths, *rest = rest
    resets, scratch = (rest[0], rest[1:]) if cuts else (None, rest)
    block = Block(cut, plain, *scratch)
    unit, tile = lax.axis_index("unit"), lax.axis_index("tile")
    rows, units = pl.ds(tile * cut.rows, cut.rows), pl.ds(unit * UNITS, UNITS)
    of = Backward(d_hs, gates, before, weights, lengths, resets, turns, shares, d_z)

    @pl.when(now[0] < ends[tile])
    def run() -> None:
        kept = [ref.at[rows, units] for ref in (d_c, d_h, own)]
        carry = of.activate(
            block,
            NONE,
            t=now[0],
            turn=0,
            rows=rows,
            unit=unit,
            group_flag=0,
            group_count=0,
            flag=0,
            carry=Carry(*(block.load(ref) for ref in kept)),
        )
        for ref, value in zip(kept, carry, strict=True):
            block.store(ref, value)


def multiply_body(*refs: Any, cut: Cut, plain: bool) -> None:
    """Runs one block of the second phase of a step backward; see the module."""
    turns, shares, now, weights, ends, *scratch = refs
    block = Block(cut, plain, *scratch)
    tile = lax.axis_index("tile")
    rows = pl.ds(tile * cut.rows, cut.rows)
    of = Backward(None, None, None, weights, None, None, turns, shares, None)

    @pl.when(now[0] < ends[tile])
    def run() -> None:
        of.multiply(
            block,
            NONE,
            turn=0,
            rows=rows,
            unit=lax.axis_index("unit"),
            flag=0,
            count=0,
            group_flag=0,
        )


def launch(
    body: Callable[..., None], name: str, cut: Cut, filled: int, interpret: Any
) -> Callable[..., Any]:
    """Makes the kernel of a body, which writes what it is given in place."""
    return compat.kernel(
        partial(body, cut=cut, plain=Registers.of(interpret).plain),
        out_type=[],
        scratch_types=cut.scratch(),
        interpret=interpret,
        name=f"flax_lstm_step_{name}",
        approx_math=jnp.dtype(cut.dtype).itemsize == 2,
        auto_barriers=False,
        grid=(cut.size // UNITS, filled // cut.rows),
        grid_names=("unit", "tile"),
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
    (filled, size), dtype, kind = c.shape, weights.dtype, Kind.of(source)
    first, steps = (0, len(source)) if kind.keep else (source.now[0], source.count)
    held = weights.shape[0]
    cut = Cut(plan.rows, size, dtype, plan.stages, resident=False, strips=held)
    given = [weights, tile_ends(lengths, plan.rows)]
    given += masks(lengths, resets)
    body = partial(forward_body, kind=kind, cuts=bool(resets.size))
    run = launch(body, "forward", cut, filled, interpret)
    operand = as_operand(h, dtype)
    written = [jnp.stack([operand, operand]), c, h]
    if kind.keep:
        hs, _, _, before = forward_results(source, c, h)
        written += [lax.empty(like.shape, like.dtype) for like in (hs, before)]
    refs = [*opened(source), *(compat.in_place(array) for array in written)]

    def step(k: Any, nothing: None) -> None:
        t = first + (steps - 1 - k if reverse else k)
        run(*refs, jnp.stack([t, k % 2]), *given)

    lax.fori_loop(0, steps, step, None)
    if not kind.keep:
        c, h = refs[-2:]
        return jax.freeze(c), jax.freeze(h)
    gates, _, c, h, hs, before = (jax.freeze(ref) for ref in refs)
    return hs, c, h, gates, before


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
    """Runs the kernel backward; arguments and results as `single.backward_pass`.

    But the weights: they are operands.
    """
    steps, filled, _, size = gates.shape
    dtype = weights.dtype
    cut = Cut(plan.rows, size, dtype, plan.stages, resident=False)
    ends = tile_ends(lengths, plan.rows)
    given = [d_hs, gates, before, weights, ends, *masks(lengths, resets)]
    body = partial(activate_body, cuts=bool(resets.size))
    activate = launch(body, "activate", cut, filled, interpret)
    multiply = launch(multiply_body, "multiply", cut, filled, interpret)
    written = [
        jnp.zeros(gates.shape, dtype),
        jnp.zeros((1, filled, 4, size), dtype),
        jnp.zeros((GROUP, filled, size), jnp.float32),
        d_c,
        d_h,
        jnp.ones((filled, size), jnp.float32),
    ]
    d_z, turns, shares, *state = (compat.in_place(array) for array in written)

    def step(k: Any, nothing: None) -> None:
        now = (k if reverse else steps - 1 - k)[None]
        activate(d_z, turns, shares, *state, now, *given)
        multiply(turns, shares, now, weights, ends)

    lax.fori_loop(0, steps, step, None)
    d_c, d_h, own = (jax.freeze(ref) for ref in state)
    total = jax.freeze(shares).sum(0)
    return jax.freeze(d_z), d_c, jnp.where(own != 0, d_h, total)
