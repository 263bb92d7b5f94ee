"""The share of one block in a step of the LSTM: what `step` and `grid` have in common.

A block of one warpgroup owns 16 units of a tile of the batch. In both passes its matrix
product is `slab [64, P] @ operand^T [P, N]`, with a slab of the recurrent weights that
stays in shared memory (`grid`) or passes through it chunk by chunk (`step`). The
operand, which all blocks need and each makes a part of, passes through it in any case.

Axes     N rows of the tile, P hidden size in 64s; 64 = 4 gates of 16 units, or units.
Ring     Chunks `[N, chunk]` of the operand, and of a streamed slab, in `stages` slots,
         each with its barrier.
Weights  Are read as they lie, `[P, 4, P]`, of inference `[W, 4, W]`. Backward a slab is
         rows of it. Forward it is four strips of 16 columns, turned in registers on
         their way: of a slab that stays once, of a streamed one chunk by chunk, while
         the product of the chunk before runs. By estimate that costs no time, for
         chunks come more slowly.
Turn     wgmma gives `[64, N]`; the block works on `[N, 16]`, as memory lies. The sums
         are turned in shared memory.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from flax_lstm_kernels import compat
from flax_lstm_kernels.gpu.common import (
    Registers,
    place_of,
    plain_product,
    tiled,
    widened,
)
from flax_lstm_kernels.gpu.plan import PADDED, SLAB_UNITS, chunk_of

UNITS, SLAB = SLAB_UNITS, 4 * SLAB_UNITS
STRIPS = 4  # of weights as they lie, one for each gate


class Cut(NamedTuple):
    """How the product of a block is cut up.

    Attributes:
      rows: N, rows of the batch in one tile: 8, or a multiple of 16.
      size: P.
      dtype: Of the operands.
      stages: Chunks under way at once.
      resident: The slab stays in shared memory.
      strips: It does not, and comes as four strips of the weights `[W, 4, W]`, to be
        turned: this is W. 0 for a slab that comes whole.
    """

    rows: int
    size: int
    dtype: Any
    stages: int
    resident: bool
    strips: int = 0

    @property
    def chunk(self) -> int:
        """Returns the columns of a slab in one copy."""
        return chunk_of(self.size, jnp.dtype(self.dtype).itemsize)

    @property
    def chunks(self) -> int:
        """Returns the number of copies that a slab takes."""
        return self.size // self.chunk

    @property
    def strip(self) -> int:
        """Returns the rows of a strip in one copy: a chunk, or the 64 of a group."""
        return SLAB if self.strips % SLAB else self.chunk

    def layout(self) -> Any:
        """Returns how `[N, 16]` lies in registers: adjacent threads, adjacent units."""
        tall, vector = (8, 1) if self.rows == 8 else (16, 2)
        tiling = plgpu.Tiling(((tall, UNITS), (tall // 4, UNITS), (vector,)))
        return plgpu.Layout.TILED(
            tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
        )

    def scratch(self) -> list[Any]:
        """Returns the shared memory and barriers of a `Block`, in its order."""
        slabs = self.chunks if self.resident else self.stages
        copies = 1 if self.resident else 2
        strips = []
        if self.strips:  # one slab is written while the other is multiplied
            slabs, copies = 2, 1 + STRIPS * (self.chunk // self.strip)
            strips = [plgpu.SMEM((self.stages, STRIPS, self.chunk, UNITS), self.dtype)]
        return [
            tiled((slabs, SLAB, self.chunk), self.dtype),
            tiled((self.stages, self.rows, self.chunk), self.dtype),
            plgpu.SMEM((self.rows, PADDED), jnp.float32),
            plgpu.Barrier(num_arrivals=self.chunks),
            plgpu.Barrier(num_arrivals=copies, num_barriers=self.stages),
            *strips,
        ]


class Block(NamedTuple):
    """The scratch of a block, and what it does with it."""

    cut: Cut
    plain: bool  # the interpreter at hand knows no layouts: see `common.Registers`
    weights: Any
    operands: Any
    sums: Any
    weights_here: Any
    arrived: Any
    strips: Any = None

    def load(self, ref: Any, bits: Any = None) -> Any:
        """Loads `[N, 16]` as float32; the bits may be those of another dtype.

        Of `[16]`, which is one row, N.
        """
        layout = self.cut.layout()
        if len(ref.shape) == 1:
            value = ref[...] if self.plain else compat.load(ref, layout.reduce(0))
            value = lax.broadcast_in_dim(value, (self.cut.rows, UNITS), (1,))
            value = value if self.plain else plgpu.layout_cast(value, layout)
        else:
            value = ref[...] if self.plain else compat.load(ref, layout)
        return widened(value, bits)

    def store(self, ref: Any, value: Any) -> None:
        """Stores `[N, 16]` into any memory, in its dtype; into `[16]` the first row."""
        if len(ref.shape) == 1:
            here = self.sums.at[:, pl.ds(0, UNITS)]
            plgpu.commit_smem()  # by all warps: each has read its sums
            self.store(here, value)
            plgpu.commit_smem()
            row, layout = here.at[0], self.cut.layout().reduce(0)
            value = row[...] if self.plain else compat.load(row, layout)
            compat.store(ref, value.astype(ref.dtype))
            return
        value = value.astype(ref.dtype)
        if not self.plain:
            value = plgpu.layout_cast(value, self.cut.layout())  # also of zeros
        compat.store(ref, value)

    def per_row(self, ref: Any) -> Any:
        """Loads `[N]` of global memory, one for each row, as `[N, 16]`."""
        layout = self.cut.layout()
        value = ref[...] if self.plain else compat.load(ref, layout.reduce(1))
        wide = lax.broadcast_in_dim(value, (self.cut.rows, UNITS), (0,))
        return wide if self.plain else plgpu.layout_cast(wide, layout)

    def keep_weights(self, slab: Any) -> None:
        """Fetches the slab `[64, P]` to stay."""
        registers = Registers(self.plain)
        for k in range(self.cut.chunks):
            columns = pl.ds(k * self.cut.chunk, self.cut.chunk)
            plgpu.copy_gmem_to_smem(
                slab.at[:, columns], self.weights.at[k], self.weights_here
            )
        plgpu.barrier_wait(self.weights_here)
        if self.weights.dtype == jnp.float32:
            lax.fori_loop(
                0,
                self.cut.chunks,
                lambda k, nothing: registers.round(self.weights.at[k]),
                None,
            )
            plgpu.commit_smem()

    def keep_turned(self, weights: Any, units: Any) -> None:
        """Fetches the slab of a block's units to stay, of weights `[W, 4, W]`."""

        def some(k: Any, nothing: None) -> None:
            def strip(first: int, n: int) -> tuple[Any, Any]:
                rows, again = self.lying(k, first, SLAB, weights.shape[0])
                return weights.at[rows, n, units], again

            self.turn(strip, self.weights.at[k])

        lax.fori_loop(0, self.cut.chunks, some, None)
        plgpu.commit_smem()

    def lying(self, k: Any, first: int, size: int, held: int) -> tuple[Any, Any]:
        """Returns `place_of` some of the k-th chunk, from the first, in W weights."""
        return place_of(k * self.cut.chunk + first, size, SLAB, held)

    def turn(self, strip: Callable[[int, int], tuple[Any, Any]], slab: Any) -> None:
        """Makes `[64, chunk]` of strips.

        Args:
          strip: Given the first row and a gate, returns `[64, 16]`, and how many of the
            64 are to be 0, see `Registers.without`.
          slab: In shared memory.
        """
        tiles = [
            (place, slab.at[pl.ds(n * UNITS, UNITS), pl.ds(first, SLAB)], again)
            for first in range(0, self.cut.chunk, SLAB)
            for n in range(STRIPS)
            for place, again in [strip(first, n)]
        ]
        Registers(self.plain).bring_turned(tiles)

    def product(self, operand: Any, slab: Any) -> Any:
        """Returns `slab @ operand^T` as `[64, N]`.

        Args:
          operand: `[N, P]` in global memory.
          slab: `[64, P]` in global memory, of strips `[W, 4, 16]`; None where it stays.
        """
        chunk, chunks, stages = self.cut.chunk, self.cut.chunks, self.cut.stages

        # Loops, not unrolled: else the addresses of all chunks are kept in registers.
        def fetch(k: Any, nothing: None = None) -> None:
            columns, slot = pl.ds(k * chunk, chunk), lax.rem(k, stages)
            pairs = [(operand.at[:, columns], self.operands.at[slot])]
            if self.cut.strips:
                for first in range(0, chunk, self.cut.strip):
                    rows, _ = self.lying(k, first, self.cut.strip, self.cut.strips)
                    here = pl.ds(first, self.cut.strip)
                    pairs += [
                        (slab.at[rows, n, :], self.strips.at[slot, n, here, :])
                        for n in range(STRIPS)
                    ]
            elif not self.cut.resident:
                pairs.append((slab.at[:, columns], self.weights.at[slot]))
            for place, here in pairs:
                plgpu.copy_gmem_to_smem(place, here, self.arrived.at[slot])

        def refill(k: Any) -> None:
            """Fetches into the slot that chunk k - 1 has left."""
            if self.cut.strips:
                plgpu.commit_smem()  # by all warps: its slab may be written, too
            elif stages >= chunks:
                return

            @pl.when((k > 0) & (k <= chunks - stages))
            def left() -> None:
                if not self.cut.strips:
                    plgpu.commit_smem()  # by all warps
                fetch(k - 1 + stages)

        def arrival(k: Any) -> tuple[Any, Any]:
            """Waits for a chunk; returns its slab and operand."""
            slot = lax.rem(k, stages)
            plgpu.barrier_wait(self.arrived.at[slot])
            if not self.cut.strips:
                own = k if self.cut.resident else slot
                return self.weights.at[own], self.operands.at[slot]
            slab = self.weights.at[lax.rem(k, 2)]

            def strip(first: int, n: int) -> tuple[Any, Any]:
                _, again = self.lying(k, first, SLAB, self.cut.strips)
                return self.strips.at[slot, n, pl.ds(first, SLAB), :], again

            self.turn(strip, slab)
            plgpu.commit_smem()
            return slab, self.operands.at[slot]

        lax.fori_loop(0, min(stages, chunks), fetch, None)
        if self.plain:

            def add(k: Any, total: Any) -> Any:
                slab, operand = arrival(k)
                part = plain_product(slab[...], operand[...])
                refill(k)
                return total + part

            nothing = jnp.zeros((SLAB, self.cut.rows), jnp.float32)
            return lax.fori_loop(0, chunks, add, nothing)

        def accumulate(total: Any) -> Any:
            def add(k: Any, nothing: None) -> None:
                slab, operand = arrival(k)
                plgpu.wgmma(total, slab, compat.transposed(operand))
                plgpu.wgmma_wait(1)
                refill(k)

            lax.fori_loop(0, chunks, add, None)
            return total[...]

        shape = (SLAB, self.cut.rows)
        return pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))

    def turned(self, total: Any) -> list[Any]:
        """Returns a `[64, N]` product as four `[N, 16]`."""
        here = self.sums.at[:, pl.ds(0, SLAB)]
        if self.plain:
            here[...] = total.T
        else:
            turned = plgpu.layout_cast(total, plgpu.Layout.WGMMA_TRANSPOSED)
            compat.store(compat.transposed(here), turned)
        plgpu.commit_smem()
        return [
            self.load(self.sums.at[:, pl.ds(n, UNITS)]) for n in range(0, SLAB, UNITS)
        ]
