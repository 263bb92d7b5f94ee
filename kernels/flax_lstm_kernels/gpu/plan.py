"""Which GPU kernel runs, how it is cut up, and what that takes of shared memory.

A kernel is a function `plan_...(sizes) -> Plan | str`: how it would run, or why it
cannot. The first that can is chosen.

Axes     T time, B batch, H hidden size; rows and units in whole tiles are N and P.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from flax_lstm_kernels import compat
from flax_lstm_kernels.gpu.arrange import UNITS, up
from flax_lstm_kernels.tuning import Key, find

Kernel = Literal["single", "cluster", "grid", "step"]
Pass = Literal["forward", "backward"]

HOPPER = "9.0"  # the compute capability that the kernels are for
# Of an H100; CUDA C++ Programming Guide, "Technical Specifications", 9.0.
BLOCKS = 132  # streaming multiprocessors
SHARED_MEMORY = 227 << 10  # bytes of one block
# What Mosaic keeps for itself beside what it is asked for, and what alignment takes.
SPARE = 4 << 10
ROWS = 8  # the least of a tile: columns of the matrix instruction


# Of `grid` and `step`, see `slabs`.
SLAB_UNITS = 16  # of a block: four gates of them are the 64 rows of wgmma
SLAB_ROWS = (8, 16, 32, 64)
PADDED = 4 * SLAB_UNITS + 8  # so that turned rows begin in different banks
MOST_BLOCKS = 128  # of `grid`, all of which have to run at once


def chunk_of(size: int, itemsize: int) -> int:
    """Returns the columns of a slab in one copy: 256 bytes where they divide it.

    >>> chunk_of(1024, 2), chunk_of(1024 + 64, 2), chunk_of(1024, 4)
    (128, 64, 64)
    """
    chunk = 256 // itemsize
    return chunk if size % chunk == 0 else 64


def blocks_at_once() -> int:
    """Returns how many blocks are sure to run at once on the default device.

    Where that is no GPU, as when a kernel is compiled for one that is not there: on an
    H100 with all of its multiprocessors.
    """
    device = jax.devices()[0]
    present = device.core_count if device.platform == "gpu" else BLOCKS
    return min(MOST_BLOCKS, present)


def tiles_at_once(size: int) -> int:
    """Returns how many tiles of `grid` run at once, for P units; 0 if not even one.

    >>> tiles_at_once(1024), tiles_at_once(1280), tiles_at_once(2112)
    (2, 1, 0)
    """
    return blocks_at_once() // (size // SLAB_UNITS)


class Plan(NamedTuple):
    """How the work is cut up.

    Attributes:
      kernel: Which kernel.
      rows: Rows of the batch in one tile; a multiple of 8.
      stages: Steps whose inputs are in shared memory, or on their way; of `grid` and
        `step`, chunks of the operand.
      blocks: Blocks over which the units of one tile are spread.
    """

    kernel: Kernel
    rows: int
    stages: int
    blocks: int = 1

    def size(self, hidden: int) -> int:
        """Returns P, which the hidden size is filled up to.

        >>> Plan("cluster", rows=8, stages=2, blocks=8).size(200)
        256
        """
        # A block of a cluster may own fewer units than a warpgroup computes at once.
        return up(hidden, UNITS * (1 if self.kernel == "cluster" else self.blocks))

    def filled(self, rows: int, hidden: int) -> tuple[int, int]:
        """Returns N and P, which B and H are filled up to."""
        return up(rows, self.rows), self.size(hidden)


class Sizes(NamedTuple):
    """What is to be computed.

    Attributes:
      which: The pass.
      steps: T.
      rows: B.
      hidden: H, as the caller has it.
      itemsize: Bytes of the computation dtype, 2 or 4.
      keep: The forward pass also writes what the backward pass needs.
      resets: Steps may start from zeros.
    """

    which: Pass
    steps: int
    rows: int
    hidden: int
    itemsize: int
    keep: bool = True
    resets: bool = True


def single_bytes(sizes: Sizes, rows: int, stages: int) -> int:
    """Returns the shared memory that `single` asks for: the sum of its scratch.

    Or more: it has no `stages` where gates go through registers (`Kind.by_eights`).
    """
    size, item = up(sizes.hidden, UNITS), sizes.itemsize
    weights, tile = 4 * size * size * item, rows * size
    if sizes.which == "forward":
        state, gates = 4 + item, 4 * item
        kept = gates if sizes.keep else 0
        return weights + tile * (2 * item + stages * gates + state + kept)
    return weights + tile * (2 * 4 * item + stages * (4 * item + 4 + item) + 2 * 4)


def plan_single(sizes: Sizes) -> Plan | str:
    """Plans `single`: a block per tile, with all weights in its shared memory."""
    # The smallest tiles that the device holds all at once: a step's time hardly
    # depends on their rows, so long as these are few.
    most = min(32, up(-(-sizes.rows // BLOCKS), ROWS))
    for rows in range(most, 0, -ROWS):
        for stages in (4, 3, 2):
            needed = single_bytes(sizes, rows, stages)
            if needed <= SHARED_MEMORY - SPARE:
                return Plan("single", rows, stages)
    return (
        f"single: {sizes.hidden} units of {sizes.itemsize} bytes need "
        f"{needed / 1024:.0f} KiB of shared memory; a block has "
        f"{(SHARED_MEMORY - SPARE) / 1024:.0f}"
    )


def cluster_bytes(sizes: Sizes, rows: int, blocks: int) -> int:
    """Returns the shared memory that a block of `cluster` asks for; see its scratch."""
    size, item = up(sizes.hidden, UNITS), sizes.itemsize
    owned = size // blocks
    weights = 4 * owned * size * item
    if sizes.which == "forward":
        return weights + 2 * rows * size * item + 4 * rows * owned * 4
    return weights + 4 * rows * owned * item + 2 * 2 * rows * size * 4


def cluster_clocks(sizes: Sizes, rows: int, blocks: int) -> int:
    """Estimates the clocks of one step for all tiles of the batch."""
    size = up(sizes.hidden, UNITS)
    products = 4 * size // blocks // 64 * (size * sizes.itemsize // 32)
    # Blocks of a cluster are in one GPC, of which there are eight with 16 or 18.
    at_once = 8 * (16 // blocks)
    waves = -(-sizes.rows // (rows * at_once))
    # A product of 64 rows: max(16, columns / 2) clocks. The pointwise part, barriers
    # and the exchange: 1000, an estimate.
    return waves * (products * max(16, rows // 2) + 1000)


def plan_cluster(sizes: Sizes, largest: int = compat.MAX_CLUSTER) -> Plan | str:
    """Plans `cluster`: weights and units spread over the blocks of one cluster.

    Args:
      sizes: What is to be computed.
      largest: Blocks that a cluster may have.

    >>> plan_cluster(Sizes("forward", 64, 64, 512, 2), largest=16)
    Plan(kernel='cluster', rows=8, stages=2, blocks=16)
    """
    groups = up(sizes.hidden, UNITS) // 32  # warpgroups in a cluster
    found = []
    for blocks in range(2, min(largest, groups) + 1, 2):
        # More than two warpgroups of a block would have too few registers each.
        if groups % blocks or groups // blocks > 2:
            continue
        for rows in (8, 16, 32):
            if cluster_bytes(sizes, rows, blocks) <= SHARED_MEMORY - SPARE:
                clocks = cluster_clocks(sizes, rows, blocks)
                found.append((clocks, Plan("cluster", rows, 2, blocks)))
    if found:
        return min(found)[1]
    return (
        f"cluster: {sizes.hidden} units of {sizes.itemsize} bytes are too many for "
        f"clusters of up to {largest} blocks with {(SHARED_MEMORY - SPARE) >> 10} KiB "
        "of shared memory each, or cannot be shared out evenly"
    )


def slab_bytes(sizes: Sizes, rows: int, stages: int, *, resident: bool) -> int:
    """Returns the shared memory that `grid` and `step` ask for; see `slabs`."""
    size, item = up(sizes.hidden, UNITS), sizes.itemsize
    chunk = chunk_of(size, item)
    streamed = stages + (2 if sizes.which == "forward" else 0)  # slabs that are turned
    weights = 64 * (size if resident else streamed * chunk)
    return (weights + stages * rows * chunk) * item + rows * PADDED * 4


def slab_rows(sizes: Sizes, at_once: int) -> list[int]:
    """Returns rows of a tile for `slabs`, the better first.

    That is the fewest that make all tiles run at once: a step's time depends on them
    only from 32 up. More than 64 would leave no room for the weights.
    """
    enough = [rows for rows in SLAB_ROWS if rows * at_once >= sizes.rows]
    best = enough[0] if enough else SLAB_ROWS[-1]
    return [rows for rows in reversed(SLAB_ROWS) if rows <= best]


def plan_grid(sizes: Sizes) -> Plan | str:
    """Plans `grid`: the weights stay in the shared memory of many blocks."""
    size = up(sizes.hidden, UNITS)
    at_once = tiles_at_once(size)
    if not at_once:
        return (
            f"grid: {sizes.hidden} units take {size // SLAB_UNITS} blocks; no more "
            f"than {blocks_at_once()} are sure to run at once"
        )
    limit, chunks = SHARED_MEMORY - SPARE, size // chunk_of(size, sizes.itemsize)
    for rows in slab_rows(sizes, at_once):
        for stages in (16, 8, 4, 2):
            stages = min(stages, chunks)
            needed = slab_bytes(sizes, rows, stages, resident=True)
            if needed <= limit:
                return Plan("grid", rows, stages)
    return (
        f"grid: {sizes.hidden} units of {sizes.itemsize} bytes need "
        f"{needed / 1024:.0f} KiB of shared memory; a block has {limit / 1024:.0f}"
    )


def plan_step(sizes: Sizes) -> Plan | str:
    """Plans `step`, which can run at any size."""
    return Plan("step", slab_rows(sizes, 1)[0], 4)


PLANNERS: dict[Kernel, Callable[[Sizes], Plan | str]] = {
    "single": plan_single,
    "cluster": plan_cluster,
    "grid": plan_grid,
    "step": plan_step,
}


def choose(sizes: Sizes) -> Plan:
    """Returns the plan of the first kernel that can run.

    Raises:
      NotImplementedError: If none can; says why of each.
    """
    reasons = []
    for planner in PLANNERS.values():
        found = planner(sizes)
        if isinstance(found, Plan):
            return tuned(found, sizes)
        reasons.append(found)
    raise NotImplementedError("; ".join(reasons))


def tuned(plan: Plan, sizes: Sizes) -> Plan:
    """Returns the plan that was measured to be better, if one was, in place of one."""
    better: Any = find(
        Key(
            plan.kernel,
            sizes.which,
            HOPPER,
            sizes.hidden,
            sizes.rows,
            sizes.itemsize,
        )
    )
    return plan._replace(**better)


class Support(NamedTuple):
    """Whether the kernels can run.

    Attributes:
      reason: Why not; None where they can.
      plan: Of the forward pass; None where they cannot run.
    """

    reason: str | None
    plan: Plan | None


def support(
    kind: str | None, dtype: Any, hidden: int, *, steps: int = 1, rows: int = 8
) -> Support:
    """Says whether the kernels can run, for training, and why not.

    Args:
      kind: Compute capability of the device, as JAX gives it; None for any.
      dtype: Computation dtype; float32 is multiplied as tf32.
      hidden: H.
      steps: T.
      rows: B.

    >>> support("8.0", jnp.bfloat16, 128).reason
    'the kernels are for compute capability 9.0 (Hopper); this is 8.0'
    >>> support("9.0", jnp.bfloat16, 128).plan
    Plan(kernel='single', rows=8, stages=4, blocks=1)
    """
    dtype = jnp.dtype(dtype)
    if kind not in (None, HOPPER):
        return Support(
            f"the kernels are for compute capability 9.0 (Hopper); this is {kind}", None
        )
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return Support(
            "float32 (multiplied as tf32), bfloat16 and float16 only; the computation "
            f"dtype is {dtype.name}",
            None,
        )
    if min(hidden, steps, rows) < 1:
        return Support(f"sizes above 0 only; got T={steps}, B={rows}, H={hidden}", None)
    passes: tuple[Pass, Pass] = ("backward", "forward")
    try:
        for which in passes:
            plan = choose(Sizes(which, steps, rows, hidden, dtype.itemsize))
    except NotImplementedError as error:
        return Support(str(error), None)
    return Support(None, plan)
