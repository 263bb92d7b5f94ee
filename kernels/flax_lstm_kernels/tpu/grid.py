"""The grid that both TPU kernels run over, and where its places stand in the arrays.

Axes     T time, B batch, P hidden size in whole lanes of 128.
Grid     (tiles of the batch, iterations of `steps` steps, panels of the weights). The
         tiles are independent and shared out over the cores; the others go in order.
Offsets  Blocks are addressed by their number along each axis; the product of the axes
         is nowhere computed here, so that it may pass 2^31.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flax_lstm_kernels.tpu.orders import ORDERS
from flax_lstm_kernels.tpu.vmem import Plan


def product(left: Any, right: Any) -> Any:
    """Multiplies with float32 sums; float32 operands are not rounded to bfloat16."""
    exact = left.dtype == jnp.float32
    return jnp.dot(
        left,
        right,
        precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


class Here(NamedTuple):
    """One place of the grid, inside a kernel.

    Attributes:
      panel: Number of the panel; 0 unless they are streamed.
      panels: Their number in the grid.
      start: The step at which the iteration's block begins.
      running: Whether a row of the tile has a step in the block.
      first: Whether this is the tile's first place.
      last: Whether this is the tile's last place.
    """

    panel: Any
    panels: Any
    start: Any
    running: Any
    first: Any
    last: Any


class Grid(NamedTuple):
    """The shape of the grid, the plan, and the direction in which time is processed."""

    shape: tuple[int, int, int]
    plan: Plan
    size: int
    descending: bool

    @classmethod
    def of(cls, steps: int, rows: int, size: int, plan: Plan, *, descending: bool):
        """Makes the grid for T steps, B rows and P hidden units."""
        outer = size // plan.units if plan.streamed else 1
        shape = (pl.cdiv(rows, plan.rows), pl.cdiv(steps, plan.steps), outer)
        return cls(shape, plan, size, descending)

    def number(self, iteration: Any) -> Any:
        """Returns which block of time an iteration processes."""
        return self.shape[1] - 1 - iteration if self.descending else iteration

    def here(self, ends_ref: Any) -> Here:
        """Returns the present place, given the blocks after which each tile ends."""
        tile, iteration, panel = (pl.program_id(axis) for axis in range(3))
        number = self.number(iteration)
        return Here(
            panel=panel,
            panels=self.shape[2],
            start=number * self.plan.steps,
            running=number < ends_ref[tile],
            first=(iteration == 0) & (panel == 0),
            last=(iteration == self.shape[1] - 1) & (panel == self.shape[2] - 1),
        )

    def _read(self, tile, iteration, panel, ends):
        """Stays, after a tile's end, at its last block: nothing more is fetched."""
        number = self.number(iteration)
        return jnp.minimum(number, jnp.maximum(ends[tile] - 1, 0)), tile, 0

    def sequence(self, width: int, *, read: bool = False) -> pl.BlockSpec:
        """Blocks of an array `[T, B, width]`."""

        def written(tile, iteration, panel, ends):
            return self.number(iteration), tile, 0

        shape = (self.plan.steps, self.plan.rows, width)
        return pl.BlockSpec(shape, self._read if read else written)

    def ordered(self, width: int, order: int, read: bool = False) -> pl.BlockSpec:
        """Blocks of an array `[T, B, width]` in another order."""
        plain: Any = self.sequence(width, read=read)

        def place(*here):
            return tuple(plain.index_map(*here)[axis] for axis in ORDERS[order])

        shape = tuple(plain.block_shape[axis] for axis in ORDERS[order])
        return pl.BlockSpec(shape, place)

    def bits(self) -> pl.BlockSpec:
        """Blocks of the packed resets `[iterations, B, 1]`."""
        return pl.BlockSpec((1, self.plan.rows, 1), self._read)

    def column(self) -> pl.BlockSpec:
        """Blocks of an array `[B, 1]`."""
        return pl.BlockSpec((self.plan.rows, 1), self._by_tile)

    def state(self) -> pl.BlockSpec:
        """Blocks of an array `[B, P]`."""
        return pl.BlockSpec((self.plan.rows, self.size), self._by_tile)

    def _by_tile(self, tile, iteration, panel, ends):
        return tile, 0

    def whole(self, shape: tuple[int, ...]) -> pl.BlockSpec:
        """An array that stays in VMEM, once."""

        def origin(tile, iteration, panel, ends):
            return (0,) * len(shape)

        return pl.BlockSpec(shape, origin, pipeline_mode=pl.Buffered(1))

    def weights(self, gate: int) -> pl.BlockSpec:
        """A gate's columns of the recurrent weights `[P, 4P]`: of a panel, or all."""
        if not self.plan.streamed:
            shape = self.size, self.size
            return pl.BlockSpec(
                shape, lambda *_: (0, gate), pipeline_mode=pl.Buffered(1)
            )

        def panel_of(tile, iteration, panel, ends):
            return 0, gate * self.shape[2] + panel

        return pl.BlockSpec((self.size, self.plan.units), panel_of)

    def weights_back(self) -> pl.BlockSpec:
        """The recurrent weights in panels, transposed `[4P, P]`: a panel, or all."""
        if not self.plan.streamed:
            return self.whole((4 * self.size, self.size))

        def panel_of(tile, iteration, panel, ends):
            return panel, 0

        return pl.BlockSpec((4 * self.plan.units, self.size), panel_of)

    def compiler_params(self, vmem_limit_bytes: int) -> pltpu.CompilerParams:
        """Returns what the compiler is told: which axes are independent, its limit.

        Under a lower limit it would keep arrays of the program in the rest, the gates
        among them where they fit: less device memory, but it also copies there, whole,
        what the kernel would fetch block by block. Which is faster is not known.
        """
        return pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem_limit_bytes,
        )
