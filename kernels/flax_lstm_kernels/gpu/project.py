"""The projection of inputs on Hopper tensor cores, into planes of a larger buffer.

For n = 0 .. 3, k = 0 .. steps-1:
    planes[plane + n steps + k] = (x[first + k] W + b)[n]

What a product of XLA cannot do: it reads the inputs of a piece of time where they are,
and writes where there is room, here, in place, and in the order i f g o of gates.

Axes     T time, M rows of a step in inputs and planes, a row of all steps after the
         other; I input size; W units of a plane, and P the same in whole 64s; S planes.
Grid     (units in 64s, blocks that stay). A tile is `rows` rows of all; each block has
         every so-manyth. The last one ends at the last row, the last 64 units at the
         last unit. What they then have of those before is written twice, and the same;
         whole eights of rows are not.
Threads  One warpgroup, which computes z^T `[64, rows]` of four gates.
Chunks   Of 32 inputs. The last ends at the last input; what the one before has had of
         it is set to 0, as are the weights for it (of an Inf, 0 times is NaN).
Inputs   Go through registers, to be rounded to tf32, and as TMA wants rows of whole
         16 bytes; by loads no wider than what divides a row. `AHEAD` chunks are
         on their way while a product runs.
Weights  Come by TMA as they lie, chunks of four gates in a ring that goes on over
         tiles: `STAGES` of 16 bits, which wgmma takes so; `TO_TURN` of float32, which
         it does not. Those are turned in registers into one of two other places, while
         the products of the chunk before run. Where W is no whole 64s or the weights no
         whole chunks, as TMA would want them, they go through registers as the inputs
         do, and float32 is turned on its way from global memory.
Barriers One a chunk, `commit_smem`, and one a tile. A thread reaches that of a chunk
         when its products of two chunks before are done (`wgmma_wait`): so after it the
         weights of two before may be overwritten, and what went through registers
         before the next one (`TURNS`, three places). Of float32 those of one before are
         done: the other place of turned weights may be written, and what they were
         turned from is read.
         What is read of `z_tile` is overwritten at the next tile, a chunk's barrier
         later.
Numerics As `single`: operands as tf32; sums and bias in float32, rounded once.
Measured Not yet run on hardware.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from flax_lstm_kernels import compat
from flax_lstm_kernels.gpu.arrange import UNITS
from flax_lstm_kernels.gpu.cluster_tiles import WIDTH, tiles
from flax_lstm_kernels.gpu.common import (
    Registers,
    as_operand,
    multiplied_turned,
    place_of,
    plain_product,
    tiled,
)
from flax_lstm_kernels.gpu.plan import BLOCKS
from flax_lstm_kernels.gpu.project_operands import (
    EIGHT,
    GATES,
    Weights,
    cut_inputs,
    inputs_to_project,
)

MOST_ROWS = 64  # of a tile: of four gates its sums are 128 registers
STAGES = 4  # chunks of weights
TO_TURN = 2  # the same, where they are turned
TURNS = 3  # chunks of inputs in shared memory
AHEAD = 2  # chunks of inputs in registers


class Cut(NamedTuple):
    """How the inputs are cut up.

    Attributes:
      inner: I.
      rows: Of a tile.
      vector: Inputs that a thread loads at once.
    """

    inner: int
    rows: int
    vector: int

    @classmethod
    def of(cls, least: int, inner: int, itemsize: int) -> "Cut":
        """Chooses for `least` rows or more, 8 at least, of I inputs.

        >>> Cut.of(1024, 300, 2), Cut.of(17, 33, 4)
        (Cut(inner=300, rows=64, vector=4), Cut(inner=33, rows=16, vector=1))
        """
        rows = min(MOST_ROWS, least // EIGHT * EIGHT)
        # A load of 16 bytes at the most, aligned in every row; four warps' rows.
        fits = (
            vector
            for vector in (8, 4, 2)
            if vector * itemsize <= 16 and inner % vector == 0 == rows % (4 * vector)
        )
        return cls(inner, rows, next(fits, 1))


def layout(width: int, vector: int) -> Any:
    """Returns how `[rows, width]` lies in registers, adjacent threads along columns.

    Of one column a thread, half a row: layouts have two rows of a warp at least.
    """
    width = min(width, 16 * vector)
    tall = 32 * vector // width  # rows of a warp at once
    tiling = plgpu.Tiling(((4 * tall, width), (tall, width), (vector,)))
    return plgpu.Layout.TILED(
        tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
    )


class Block(NamedTuple):
    """What a block is given, its scratch, and what it does with it.

    It has the tiles from number `first` on that are `apart`. `now` is the first row,
    how many there are, and where the first of gate i goes.
    """

    cut: Cut
    registers: Registers
    group: Any
    first: Any
    apart: int
    now: tuple[Any, Any, Any]
    planes: Any
    inputs: Any
    kernel: Any
    bias: Any
    x_turns: Any
    z_tile: Any
    stages: Any = None
    arrived: Any = None
    turns: Any = None

    def load(self, ref: Any, vector: int) -> Any:
        """Loads rows, in the layout of their width and `vector`."""
        if self.registers.plain:
            return ref[...]
        return compat.load(ref, layout(ref.shape[-1], vector))

    def row(self, m: Any) -> tuple[Any, Any]:
        """Returns the first row of the block's m-th tile, and what need not be written.

        Those are the rows that the tile before has, too.
        """
        wanted = (self.first + m * self.apart) * self.cut.rows
        row = jnp.minimum(wanted, self.now[1] - self.cut.rows)
        return row, wanted - row

    @property
    def as_they_lie(self) -> bool:
        """Says whether weights are multiplied as they lie."""
        return multiplied_turned(self.kernel.dtype)

    @property
    def by_copies(self) -> bool:
        """Says whether weights come by TMA."""
        return self.arrived is not None

    def in_memory(self, chunk: Any, units: int) -> tuple[list[Any], Any]:
        """Returns where the weights of a chunk lie, by registers.

        And how many of its inputs the chunk before has, too.

        Args:
          chunk: Its number.
          units: How many at a time; there are as many places of each gate as it takes.
        """
        rows, again = place_of(chunk * WIDTH, WIDTH, WIDTH, self.cut.inner)
        own, _ = place_of(self.group * UNITS, UNITS, UNITS, self.kernel.shape[-1])
        places = [
            self.kernel.at[rows, n, pl.ds(own.start + first, units)]
            for n in range(GATES)
            for first in range(0, UNITS, units)
        ]
        return places, again

    def brought(self, chunk: Any) -> list[Any]:
        """Loads the weights of a chunk as they lie, 32 units at a time."""
        places, again = self.in_memory(chunk, WIDTH)
        width = self.kernel.shape[-1]
        vector = next(vector for vector in (8, 4, 2) if width % vector == 0)
        without = partial(self.registers.without, layout=layout(WIDTH, vector))
        return [without(self.load(place, vector), 0, again) for place in places]

    def keep(self, weights: list[Any], slot: Any) -> None:
        """Stores what was `brought`, if it was."""
        for number, value in enumerate(weights):
            n, half = divmod(number, UNITS // WIDTH)
            units = pl.ds(half * WIDTH, WIDTH)
            compat.store(self.stages.at[slot, n, :, units], value)

    def given(self, m: Any, chunk: Any) -> Any:
        """Loads a chunk of the inputs of the m-th tile."""
        row, _ = self.row(m)
        rows = pl.ds(self.now[0] + row, self.cut.rows)
        start = jnp.minimum(chunk * WIDTH, self.cut.inner - WIDTH)
        return self.load(self.inputs.at[rows, pl.ds(start, WIDTH)], self.cut.vector)

    def operand(self, x: Any, chunk: Any) -> Any:
        """Turns a chunk as loaded into one to multiply."""
        chunks, shared = cut_inputs(self.cut.inner)
        if shared:
            again = jnp.where(chunk == chunks - 1, shared, 0)
            given = layout(WIDTH, self.cut.vector)
            x = self.registers.without(x, 1, again, given)
        return as_operand(x, x.dtype)

    def run(self) -> None:
        """Projects all tiles of the block."""
        chunks, _ = cut_inputs(self.cut.inner)
        tiles = lax.div(self.now[1] + self.cut.rows - 1, self.cut.rows)
        left = jnp.maximum(tiles - self.first, 0)
        mine = lax.div(left + self.apart - 1, self.apart)
        total = mine * chunks

        by_copies = self.by_copies
        stages = self.stages.shape[0] if by_copies else TURNS

        def fetch(count: Any, nothing: None = None) -> None:
            """Asks for weights; counts chunks of all tiles."""
            slot, chunk = lax.rem(count, stages), lax.rem(count, chunks)
            rows = pl.ds(chunk * WIDTH, WIDTH)
            units = pl.ds(self.group * UNITS, UNITS)
            for n in range(GATES):
                place = self.kernel.at[rows, n, units]
                to = self.stages.at[slot, n]
                plgpu.copy_gmem_to_smem(place, to, self.arrived.at[slot])

        def turn(count: Any) -> None:
            """Waits for weights, and turns them."""
            slot, again = lax.rem(count, stages), 0
            if by_copies:
                plgpu.barrier_wait(self.arrived.at[slot])
                places = [self.stages.at[slot, n] for n in range(GATES)]
            else:
                places, again = self.in_memory(lax.rem(count, chunks), UNITS)
            for n, place in enumerate(places):
                weights = self.registers.without(self.registers.load(place), 1, again)
                here = self.turns.at[lax.rem(count, 2), n]
                compat.store(here, as_operand(weights, here.dtype))

        def given(count: Any) -> Any:
            """Loads a chunk of the inputs; of those that there are not, the last."""
            count = jnp.minimum(count, total - 1)
            return self.given(lax.div(count, chunks), lax.rem(count, chunks))

        def brought(count: Any) -> list[Any]:
            """Loads a chunk of the weights, where they go through registers."""
            if by_copies or not self.as_they_lie:
                return []
            return self.brought(lax.rem(count, chunks))

        def multiply(ahead: Any, m: Any, k: Any, products: Any) -> Any:
            """Runs `products(weights, x)` of a chunk; returns those ahead, and sums."""
            count = m * chunks + k
            inputs, weights = ahead
            x, slot = self.x_turns.at[lax.rem(count, TURNS)], lax.rem(count, stages)
            compat.store(x, self.operand(inputs[0], k))
            self.keep(weights, slot)
            plgpu.commit_smem()
            if self.as_they_lie:
                if by_copies:
                    later = count - 2 + stages
                    pl.when((count >= 2) & (later < total))(partial(fetch, later))
                    plgpu.barrier_wait(self.arrived.at[slot])
                found = products(self.stages.at[slot], x)
            else:
                later = count + stages
                if by_copies:
                    pl.when(later < total)(partial(fetch, later))
                found = products(self.turns.at[lax.rem(count, 2)], x)
                pl.when(count + 1 < total)(partial(turn, count + 1))
            return ((*inputs[1:], given(count + AHEAD)), brought(count + 1)), found

        def sums(ahead: Any, m: Any) -> tuple[Any, Any]:
            """Returns the next tile's first chunks, and z^T of this one's gates."""
            gates = range(GATES)
            if self.registers.plain:

                def turned(weights: Any) -> Any:
                    return weights.T if self.as_they_lie else weights

                def add(k: Any, carry: Any) -> Any:
                    def products(weights: Any, tile: Any) -> Any:
                        return tuple(
                            carry[1][n] + plain_product(turned(weights[n]), tile[...])
                            for n in gates
                        )

                    return multiply(carry[0], m, k, products)

                nothing = jnp.zeros((UNITS, self.cut.rows), jnp.float32)
                return lax.fori_loop(0, chunks, add, (ahead, (nothing,) * GATES))

            def accumulate(*totals: Any) -> Any:
                def products(weights: Any, tile: Any) -> None:
                    for n in gates:
                        of_gate = weights.at[n]
                        if self.as_they_lie:
                            of_gate = compat.transposed(of_gate)
                        plgpu.wgmma(totals[n], of_gate, compat.transposed(tile))

                def add(k: Any, ahead: Any) -> Any:
                    ahead, _ = multiply(ahead, m, k, products)
                    # For those of the chunk before, or all.
                    plgpu.wgmma_wait(GATES if self.as_they_lie else 0)
                    return ahead

                left = lax.fori_loop(0, chunks, add, ahead)
                return left, tuple(total[...] for total in totals)

            shape = (UNITS, self.cut.rows)
            total = plgpu.WGMMAAccumulatorRef(shape, jnp.float32)
            return pl.run_scoped(accumulate, *(total for _ in gates))

        def tile(m: Any, ahead: Any, bias: list[Any]) -> Any:
            ahead, z = sums(ahead, m)
            for n in range(GATES):
                self.registers.store(self.z_tile.at[n], z[n] + bias[n])
            plgpu.commit_smem()
            row, twice = self.row(m)
            width = self.planes.shape[-1]
            units, _ = place_of(self.group * UNITS, UNITS, UNITS, width)
            vector = math.gcd(4, width)
            for eight in range(0, self.cut.rows, EIGHT):

                @pl.when(eight + EIGHT > twice)
                def write(eight: int = eight) -> None:
                    for n in range(GATES):
                        first = self.now[2] + n * self.now[1] + row + eight
                        some = self.z_tile.at[n, pl.ds(eight, EIGHT)]
                        value = self.load(some, vector)
                        place = self.planes.at[pl.ds(first, EIGHT), units]
                        compat.store(place, value)

            return ahead

        @pl.when(mine > 0)
        def some() -> None:
            if by_copies:
                lax.fori_loop(0, jnp.minimum(stages, total), fetch, None)
            bias = [
                self.registers.per_unit(self.bias.at[self.group, n], self.cut.rows)
                for n in range(GATES)
            ]
            ahead = tuple(given(count) for count in range(AHEAD)), brought(0)
            if not self.as_they_lie:
                turn(0)
            lax.fori_loop(0, mine, partial(tile, bias=bias), ahead)


def body(
    *refs: Any, cut: Cut, blocks: int, rows: int, plain: bool, names: tuple[str, ...]
) -> None:
    """Runs one block; see the module. `names` are those of its last references."""
    now, *rest = refs
    place = lax.axis_index("group"), lax.axis_index("block"), blocks
    in_rows = now[0] * rows, now[1] * rows, now[2] * rows
    given, scratch = rest[: -len(names)], rest[-len(names) :]
    named = dict(zip(names, scratch, strict=True))
    Block(cut, Registers(plain), *place, in_rows, *given, **named).run()


def project(
    inputs: Float[Array, "T B I"],
    weights: Weights,
    planes: Any,
    now: Int[Array, "3"],
    *,
    rows: int,
    least: int,
    interpret: Any = None,
) -> None:
    """Writes the projection of some steps, and nothing else, into some planes.

    Args:
      inputs: In the computation dtype. Copied only as `inputs_to_project` does, which
        a loop may have done before.
      weights: From `weights_of_inputs`.
      planes: `compat.in_place` of `[S M, W]` in the computation dtype.
      now: First step, number of steps, first plane. Gate n of step k, from the first,
        goes to plane `n steps + k`, from the first.
      rows: M, at least B.
      least: The number of steps is never less, unless it is 0. They have eight rows.
      interpret: Runs on any device: True, or the interpreter's parameters.
    """
    inputs = inputs_to_project(inputs, rows)
    steps, _, inner = inputs.shape
    dtype, groups = inputs.dtype, len(weights.bias)
    cut = Cut.of(least * rows, inner, dtype.itemsize)
    given, _, units = weights.kernel.shape
    by_copies = given % WIDTH == units % UNITS == 0
    as_they_lie = multiplied_turned(dtype)
    stages = (STAGES if as_they_lie else TO_TURN) if by_copies else TURNS
    scratch = {
        "x_turns": tiles((TURNS, cut.rows, WIDTH), dtype),
        "z_tile": tiled((GATES, cut.rows, UNITS), dtype),
    }
    if by_copies or as_they_lie:
        scratch["stages"] = tiles((stages, GATES, WIDTH, UNITS), dtype)
    if by_copies:
        scratch["arrived"] = plgpu.Barrier(num_arrivals=GATES, num_barriers=stages)
    if not as_they_lie:
        scratch["turns"] = tiles((2, GATES, UNITS, WIDTH), dtype)
    # Of 16 bits, a multiprocessor has room for two.
    at_once = BLOCKS * (2 if dtype.itemsize == 2 else 1)
    blocks = min(max(1, at_once // groups), -(-steps * rows // cut.rows))
    run = compat.kernel(
        partial(
            body,
            cut=cut,
            blocks=blocks,
            rows=rows,
            plain=Registers.of(interpret).plain,
            names=tuple(scratch),
        ),
        out_type=[],
        scratch_types=list(scratch.values()),
        interpret=interpret,
        name="flax_lstm_project",
        auto_barriers=False,  # see Barriers above
        grid=(groups, blocks),
        grid_names=("group", "block"),
    )
    joined = inputs.reshape(steps * rows, inner)
    run(now, planes, joined, weights.kernel, weights.bias)
