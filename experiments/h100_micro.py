"""What a step of a fused LSTM waits for on Hopper: five small kernels, timed.

Each repeats one operation in a loop, every round depending on the one before, and is
timed at two numbers of rounds: the difference is the operation alone.

    wgmma      one warpgroup's product of 64 x 128 with 128 x N, bfloat16
    exchange   a tile of 64 x 16 bfloat16 stored into the next block of a cluster, which
               waits for it on its barrier and reads it
    cluster    arrival and wait at a barrier of a whole cluster
    semaphore  a signal to, and a wait for, all blocks of a grid, through L2
    copy       16 KiB of weights, by all blocks at once, four copies under way in each:
               64 rows of 256 bytes, or four strips of 128 rows of 32 bytes, as `step`
               reads the weights where they lie

`python experiments/h100.py` runs them; `main` here runs them alone.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax_lstm_kernels import compat
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

ROUNDS = 4096
"""Of the shorter loop: milliseconds, so that launching is nothing beside it."""
DEPTH = 128
UNITS, WIDTH, STAGES = 2048, 16, 4
"""Of the copies: units of a layer, units of a block, places."""
TILE = (64, 16)
LAYOUT = plgpu.Layout.WGMMA


class Micro(NamedTuple):
    """A kernel that repeats one operation.

    Attributes:
      name: What is repeated.
      size: What it is measured for.
      unit: What the size counts.
      make: Returns the kernel for a number of rounds, a function of `arguments`.
      arguments: Shapes and dtypes of what it is called with.
    """

    name: str
    size: int
    unit: str
    make: Callable[[int], Callable[..., Any]]
    arguments: tuple[jax.ShapeDtypeStruct, ...]


def micros() -> Iterator[Micro]:
    """Yields every kernel at every size."""
    for columns in (8, 16, 32, 64, 128):
        shapes = (
            jax.ShapeDtypeStruct((64, DEPTH), jnp.bfloat16),
            jax.ShapeDtypeStruct((columns, DEPTH), jnp.bfloat16),
        )
        make = functools.partial(wgmma, columns)
        yield Micro("wgmma", columns, "columns", make, shapes)
    tile = (jax.ShapeDtypeStruct(TILE, jnp.float32),)
    for blocks in (2, 4, 8):
        make = functools.partial(exchange, blocks)
        yield Micro("exchange", blocks, "blocks", make, tile)
    for blocks in (2, 4, 8):
        make = functools.partial(cluster_barrier, blocks)
        yield Micro("cluster", blocks, "blocks", make, tile)
    for blocks in (2, 16, 64, 128):
        make = functools.partial(semaphore, blocks)
        yield Micro("semaphore", blocks, "blocks", make, tile)
    for row, shape in ((32, (UNITS, 4, UNITS)), (256, (4 * UNITS, UNITS))):
        weights = (jax.ShapeDtypeStruct(shape, jnp.bfloat16), *tile)
        make = functools.partial(copies, row == 32)
        yield Micro("copy", row, "bytes a row", make, weights)


def swizzled(columns: int) -> tuple[Any, ...]:
    """Returns the transforms of bfloat16 shared memory that wgmma reads."""
    swizzle = plgpu.find_swizzle(columns * 16)
    return (
        plgpu.TilingTransform((8, swizzle // 2)),
        plgpu.SwizzleTransform(swizzle),
    )


def wgmma(columns: int, rounds: int) -> Callable[..., Any]:
    """Repeats a product, each adding to the sums of the one before."""

    def body(a_hbm, b_hbm, out, a, b, loaded):
        plgpu.copy_gmem_to_smem(a_hbm, a, loaded)
        plgpu.copy_gmem_to_smem(b_hbm, b, loaded)
        plgpu.barrier_wait(loaded)

        def summed(sums):
            def step(_, carry):
                plgpu.wgmma(sums, a, compat.transposed(b))
                plgpu.wgmma_wait(0)
                return carry

            lax.fori_loop(0, rounds, step, ())
            return sums[...]

        out[...] = pl.run_scoped(
            summed, plgpu.WGMMAAccumulatorRef((64, columns), jnp.float32)
        )

    return compat.kernel(
        body,
        name="flax_lstm_micro",
        out_type=[jax.ShapeDtypeStruct((64, columns), jnp.float32)],
        scratch_types=[
            plgpu.SMEM((64, DEPTH), jnp.bfloat16, transforms=swizzled(DEPTH)),
            plgpu.SMEM((columns, DEPTH), jnp.bfloat16, transforms=swizzled(DEPTH)),
            plgpu.Barrier(num_arrivals=2),
        ],
    )


def exchange(blocks: int, rounds: int) -> Callable[..., Any]:
    """Passes a tile around a cluster, every block sending and receiving each round.

    Two places take turns: who has received round n has also been received in round
    n - 1, so that nobody writes where another still reads.
    """

    def body(tile, out, places, arrived, ready):
        mine = lax.axis_index("block")
        following = lax.rem(mine + 1, blocks)
        plgpu.barrier_arrive(ready)
        plgpu.barrier_wait(ready)

        def step(n, value):
            place = lax.rem(n, 2)
            plgpu.async_store_smem(
                value,
                places.at[place],
                arrived.at[place],
                cluster_idx=following,
                cluster_dim="block",
                optimized=False,
            )
            plgpu.barrier_wait(arrived.at[place])
            return compat.load(places.at[place], LAYOUT)

        value = lax.fori_loop(
            0, rounds, step, compat.load(tile, LAYOUT).astype(jnp.bfloat16)
        )
        plgpu.barrier_arrive(ready)
        plgpu.barrier_wait(ready)
        out[mine] = value.astype(jnp.float32)

    return compat.kernel(
        body,
        name="flax_lstm_micro",
        out_type=[jax.ShapeDtypeStruct((blocks, *TILE), jnp.float32)],
        grid=(1,),
        grid_names=("one",),
        cluster=(blocks,),
        cluster_names=("block",),
        scratch_types=[
            plgpu.SMEM((2, *TILE), jnp.bfloat16, transforms=swizzled(TILE[1])),
            plgpu.Barrier(num_barriers=2),
            plgpu.ClusterBarrier(collective_axes=("block",)),
        ],
    )


def cluster_barrier(blocks: int, rounds: int) -> Callable[..., Any]:
    """Meets all blocks of a cluster again and again."""

    def body(tile, out, ready):
        def step(_, carry):
            plgpu.barrier_arrive(ready)
            plgpu.barrier_wait(ready)
            return carry

        lax.fori_loop(0, rounds, step, ())
        out[lax.axis_index("block")] = compat.load(tile, LAYOUT)

    return compat.kernel(
        body,
        name="flax_lstm_micro",
        out_type=[jax.ShapeDtypeStruct((blocks, *TILE), jnp.float32)],
        grid=(1,),
        grid_names=("one",),
        cluster=(blocks,),
        cluster_names=("block",),
        scratch_types=[plgpu.ClusterBarrier(collective_axes=("block",))],
    )


def semaphore(blocks: int, rounds: int) -> Callable[..., Any]:
    """Meets all blocks of a grid again and again; all must be resident."""

    def body(tile, out):
        met = pl.get_global(plgpu.SemaphoreType.REGULAR)

        def step(n, carry):
            plgpu.semaphore_signal(met, memory_scope="gpu")
            plgpu.semaphore_wait(
                met, (n + 1) * blocks, decrement=False, memory_scope="gpu"
            )
            return carry

        lax.fori_loop(0, rounds, step, ())
        out[lax.axis_index("block")] = compat.load(tile, LAYOUT)

    return compat.kernel(
        body,
        name="flax_lstm_micro",
        out_type=[jax.ShapeDtypeStruct((blocks, *TILE), jnp.float32)],
        scratch_types=[],
        grid=(blocks,),
        grid_names=("block",),
    )


def copies(strips: bool, rounds: int) -> Callable[..., Any]:
    """Has every block fetch its weights, again and again, chunk by chunk."""
    shape = (4, DEPTH, WIDTH) if strips else (4 * WIDTH, DEPTH)

    def body(weights, tile, out, places, arrived):
        unit = lax.axis_index("block")

        def fetch(n, _=None):
            chunk = pl.ds(lax.rem(n, UNITS // DEPTH) * DEPTH, DEPTH)
            place, here = places.at[lax.rem(n, STAGES)], arrived.at[lax.rem(n, STAGES)]
            if not strips:
                rows = pl.ds(unit * 4 * WIDTH, 4 * WIDTH)
                plgpu.copy_gmem_to_smem(weights.at[rows, chunk], place, here)
                return
            for gate in range(4):
                strip = weights.at[chunk, gate, pl.ds(unit * WIDTH, WIDTH)]
                plgpu.copy_gmem_to_smem(strip, place.at[gate], here)

        def step(n, carry):
            plgpu.barrier_wait(arrived.at[lax.rem(n, STAGES)])
            plgpu.commit_smem()
            pl.when(n + STAGES < rounds)(lambda: fetch(n + STAGES))
            return carry

        lax.fori_loop(0, min(STAGES, rounds), fetch, None)
        lax.fori_loop(0, rounds, step, ())
        out[unit] = compat.load(tile, LAYOUT)

    blocks = UNITS // WIDTH
    return compat.kernel(
        body,
        name="flax_lstm_micro",
        out_type=[jax.ShapeDtypeStruct((blocks, *TILE), jnp.float32)],
        scratch_types=[
            plgpu.SMEM(
                (STAGES, *shape),
                jnp.bfloat16,
                transforms=() if strips else swizzled(DEPTH),
            ),
            plgpu.Barrier(num_arrivals=4 if strips else 1, num_barriers=STAGES),
        ],
        auto_barriers=False,
        grid=(blocks,),
        grid_names=("block",),
    )


def measure(micro: Micro, repeats: int = 7) -> dict[str, Any]:
    """Returns nanoseconds of one round: the median and its extremes over repeats."""
    arguments = [jnp.zeros(a.shape, a.dtype) for a in micro.arguments]
    short, long = (jax.jit(micro.make(n * ROUNDS)) for n in (1, 2))

    def seconds(run: Callable[..., Any]) -> float:
        begun = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        return time.perf_counter() - begun

    for run in (short, long):  # compiles
        seconds(run)
    taken = sorted(
        1e9 * (seconds(long) - seconds(short)) / ROUNDS for _ in range(repeats)
    )
    return {
        "operation": micro.name,
        "size": micro.size,
        "unit": micro.unit,
        "least_ns": taken[0],
        "median_ns": statistics.median(taken),
        "most_ns": taken[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.parse_args()
    for micro in micros():
        print(json.dumps(measure(micro)), flush=True)


if __name__ == "__main__":
    main()
