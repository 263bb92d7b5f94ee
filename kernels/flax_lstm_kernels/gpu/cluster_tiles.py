"""Tiles of 32 units, of which a warpgroup of the cluster kernels owns one.

The matrix instruction gives 64 rows by the tile's N batch rows, and so two gates of the
32 units at once, in different threads. They go through shared memory, turned, into the
layout in which all else is done: `[N, 32]`, units last as in memory, two neighbours to
a thread, all gates of a unit in the same one.

Axes     N rows of the tile.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from flax_lstm_kernels import compat
from flax_lstm_kernels.gpu.common import as_operand, widened

WIDTH = 32  # units of one warpgroup
EIGHT = 8  # rows of a tile that are contiguous in shared memory
PAIR = 2 * WIDTH  # rows of the matrix instruction
# Eight rows of the tile at a time: a warp has two of them, a thread two units.
LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((EIGHT, WIDTH), (2, WIDTH), (2,))),
    warp_dims=(-5,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)


def transforms(dtype: Any) -> tuple[Any, ...]:
    """Returns how shared memory is laid out: tiles of eight rows and 32 columns.

    Such a tile is contiguous, and of 64 or 128 bytes a row, as swizzles are.
    """
    swizzle = WIDTH * jnp.dtype(dtype).itemsize
    return plgpu.TilingTransform((EIGHT, WIDTH)), plgpu.SwizzleTransform(swizzle)


def tiles(shape: tuple[int, ...], dtype: Any) -> Any:
    """Returns shared memory of which the last two axes are rows and 32s of columns."""
    return plgpu.SMEM(shape, dtype, transforms=transforms(dtype))


class Tiles(NamedTuple):
    """How values come into registers, and leave them; `plain` as in `Registers`."""

    plain: bool

    def load(self, ref: Any, dtype: Any = None) -> Any:
        """Loads `[N, 32]` as float32.

        Args:
          ref: The tile.
          dtype: What its bits are, where that is not what it is called.
        """
        value = ref[...] if self.plain else compat.load(ref, LAYOUT)
        return widened(value, dtype)

    def store(self, ref: Any, value: Any) -> None:
        """Stores `[N, 32]` in the reference's dtype."""
        value = value.astype(ref.dtype)
        if self.plain:
            ref[...] = value
        else:
            compat.store(ref, plgpu.layout_cast(value, LAYOUT))  # also zeros

    def round(self, ref: Any) -> None:
        """Makes an operand of a tile, in place; each thread what it has read itself."""
        self.store(ref, as_operand(self.load(ref), ref.dtype))

    def per_row(self, ref: Any) -> Any:
        """Loads `[N]` of global memory, one for each row, as `[N, 32]`."""
        value = ref[...] if self.plain else compat.load(ref, LAYOUT.reduce(1))
        wide = lax.broadcast_in_dim(value, (*value.shape, WIDTH), (0,))
        return wide if self.plain else plgpu.layout_cast(wide, LAYOUT)
