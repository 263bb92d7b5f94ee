"""One step forward of one block, for `step` and `grid` alike.

    z = x[t] W + b + h R;  c, h = update(squash(z), c)

Axes     T time, N rows of the tile, P hidden size in 64s.
Exchange h of the step lies in one half of `turns [2, rows, P]`, that of the next in the
         other: whoever has seen all parts of one half may overwrite the other.
Masks    A reset row takes no part of the product (rows do not mix). A row past its
         length keeps its state.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from flax_lstm_kernels.gpu.common import as_operand, place_of, step_forward
from flax_lstm_kernels.gpu.slabs import SLAB, UNITS
from flax_lstm_kernels.gpu.source import Span


class Forward(NamedTuple):
    """What the forward pass reads and writes, in global memory.

    Attributes:
      span: The steps, and where their pre-activations lie, in the bits of the
        computation dtype; with what is kept the gates take their place.
      weights: `[W, 4, W]`, from `recurrent_weights`; None where the block keeps its
        slab.
      lengths: `[rows]`.
      resets: `[T, rows]`, or None.
      turns: `[2, rows, P]`, see the file's head.
      hs: `[T, rows, P]`, or as in a `Piece`.
      before: `[T, rows, P]`, or None for nothing kept.
    """

    span: Span
    weights: Any
    lengths: Any
    resets: Any
    turns: Any
    hs: Any
    before: Any

    def slab(self, unit: Any) -> Any:
        """Returns the weights of a block of units."""
        if self.weights is None:
            return None
        # As wide as gates are, or, where TMA refused that, filled up.
        units, _ = place_of(unit * UNITS, UNITS, SLAB, self.weights.shape[-1])
        return self.weights.at[:, :, units]

    def step(
        self,
        block: Any,
        flags: Any,
        *,
        t: Any,
        turn: Any,
        rows: Any,
        held: Any,
        unit: Any,
        flag: Any,
        count: Any,
        c: Any,
        h: Any,
    ) -> tuple[Any, Any]:
        """Returns c and h `[N, 16]` after step t.

        Args:
          block: The `Block`.
          flags: `Flags`, or `Launches`.
          t: The step.
          turn: Which half of `turns` h is in.
          rows: The rows of the tile.
          held: The same in gates and hs, see `Span.rows`.
          unit: The number of the block's units.
          flag: The tile's flag.
          count: Its count when h is complete.
          c: The cell before the step, float32.
          h: The output before the step, float32.
        """
        units, own = pl.ds(unit * UNITS, UNITS), self.span.units(unit, UNITS)
        # Nothing here depends on the other blocks: it is read ahead of the wait.
        dtype = self.hs.dtype
        places = [self.span.gate(t, held, n, own) for n in range(4)]
        z = [block.load(place, dtype) for place in places]
        live = block.per_row(self.lengths.at[rows]) > t
        fresh = None
        if self.resets is not None:
            fresh = block.per_row(self.resets.at[t, rows]) != 0
        flags.wait(flag, count)
        product = block.product(self.turns.at[turn, rows], self.slab(unit))
        shares = block.turned(product)
        gates, start, (new_c, new_h) = step_forward(
            z, shares, c, fresh, approximate=dtype.itemsize == 2
        )
        new_h = new_h.astype(dtype).astype(jnp.float32)
        h = jnp.where(live, new_h, h)
        block.store(self.turns.at[1 - turn, rows, units], as_operand(h, dtype))
        flags.signal(flag)
        place = self.span.place(self.hs, t, held, own)
        block.store(place, jnp.where(live, new_h, 0.0))
        if self.before is not None:
            block.store(self.before.at[t, rows, units], start)
            for place, gate in zip(places, gates, strict=True):
                block.store(place, gate)
        return jnp.where(live, new_c, c), h
