"""One step backward of one block, for `step` and `grid` alike.

    dh += dhs[t];  dz[t], dc = transposed update and activations;  dh = R dz[t]

The last product is cut in two ways: a block makes 64 units of dh, and of those the
share of one gate. Four blocks make one group, which owns 64 units: each makes a share
of all of them, and owns 16. So every block holds as many weights as in the forward
pass, and needs one gate of dz, as much as h. A step has two phases, each ended by an
exchange.

Axes     T time, N rows of the tile, P hidden size in 64s.
Exchange dz in the computation dtype in one half of `turns [2, rows, 4, P]`, that of the
         next step in the other. The shares of dh, float32, in `shares [4, rows, P]`:
         the next dz of a block, which everyone waits for before sharing again, comes
         after it has read them; so one copy is enough.
Numerics dz is rounded to the computation dtype, of float32 to tf32, as operand of the
         product, and only there; all else is float32.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from flax_lstm_kernels.gpu.common import Slopes, as_operand
from flax_lstm_kernels.gpu.slabs import SLAB, UNITS

GROUP = 4  # blocks: as many as there are gates


class Carry(NamedTuple):
    """What a block keeps of its units from one step to the next, each `[N, 16]`.

    Attributes:
      d_c: Gradient of the cell before the step.
      d_h: Gradient of the output before the step, where `own`.
      own: Not 0 where d_h counts, not the product: past the length, and behind a reset.
    """

    d_c: Any
    d_h: Any
    own: Any


class Backward(NamedTuple):
    """What the backward pass reads and writes, in global memory.

    Attributes:
      d_hs: `[T, rows, P]`.
      gates: `[T, rows, 4, P]`.
      before: `[T, rows, P]`.
      weights: `[P, 4, P]`, from `recurrent_weights`.
      lengths: `[rows]`.
      resets: `[T, rows]`, or None.
      turns: `[2, rows, 4, P]`, see the file's head.
      shares: `[4, rows, P]`, see the file's head.
      d_z: `[T, rows, 4, P]`.
    """

    d_hs: Any
    gates: Any
    before: Any
    weights: Any
    lengths: Any
    resets: Any
    turns: Any
    shares: Any
    d_z: Any

    def slab(self, unit: Any) -> Any:
        """Returns the weights of a block of units: those of its group, of one gate."""
        group, gate = lax.div(unit, GROUP), lax.rem(unit, GROUP)
        return self.weights.at[pl.ds(group * SLAB, SLAB), gate, :]

    def arrived(self, block: Any, rows: Any, unit: Any, carry: Carry) -> Any:
        """Returns dh `[N, 16]`, when the group has multiplied."""
        units = pl.ds(unit * UNITS, UNITS)
        parts = [block.load(self.shares.at[gate, rows, units]) for gate in range(GROUP)]
        return jnp.where(carry.own != 0, carry.d_h, sum(parts[1:], parts[0]))

    def activate(
        self,
        block: Any,
        flags: Any,
        *,
        t: Any,
        turn: Any,
        rows: Any,
        unit: Any,
        group_flag: Any,
        group_count: Any,
        flag: Any,
        carry: Carry,
    ) -> Carry:
        """Makes dz of step t, the first phase.

        Args:
          block: The `Block`.
          flags: `Flags`, or `Launches`.
          t: The step.
          turn: The half of `turns` to use.
          rows: The rows of the tile.
          unit: The number of the block's units.
          group_flag: The flag of the tile and the block's group.
          group_count: Its count when the shares are complete.
          flag: The tile's flag.
          carry: What the block keeps.
        """
        units = pl.ds(unit * UNITS, UNITS)
        d_hs = block.load(self.d_hs.at[t, rows, units])
        gates = tuple(
            block.load(self.gates.at[t, rows, gate, units]) for gate in range(4)
        )
        slopes = Slopes.of(gates, block.load(self.before.at[t, rows, units]))
        live = block.per_row(self.lengths.at[rows]) > t
        flags.wait(group_flag, group_count)
        d_h = self.arrived(block, rows, unit, carry)
        d_z, d_c = slopes.apply(d_h + d_hs, carry.d_c)
        d_z = [jnp.where(live, part, 0.0) for part in d_z]
        for gate, part in enumerate(d_z):
            place = self.turns.at[turn, rows, gate, units]
            block.store(place, as_operand(part, place.dtype))
        flags.signal(flag)
        for gate, part in enumerate(d_z):
            block.store(self.d_z.at[t, rows, gate, units], part)
        d_h = jnp.where(live, 0.0, d_h)
        own = jnp.where(live, 0, 1)
        if self.resets is not None:
            fresh = block.per_row(self.resets.at[t, rows]) != 0
            d_c = jnp.where(fresh, 0.0, d_c)
            own = jnp.where(fresh, 1, own)
        return Carry(jnp.where(live, d_c, carry.d_c), d_h, own)

    def multiply(
        self,
        block: Any,
        flags: Any,
        *,
        turn: Any,
        rows: Any,
        unit: Any,
        flag: Any,
        count: Any,
        group_flag: Any,
    ) -> None:
        """Makes the block's share of the dh of its group, the second phase."""
        group, gate = lax.div(unit, GROUP), lax.rem(unit, GROUP)
        flags.wait(flag, count)
        product = block.product(self.turns.at[turn, rows, gate], self.slab(unit))
        for n, part in enumerate(block.turned(product)):
            units = pl.ds(group * SLAB + n * UNITS, UNITS)
            block.store(self.shares.at[gate, rows, units], part)
        flags.signal(group_flag)
