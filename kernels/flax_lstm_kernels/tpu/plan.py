"""How one run of the TPU kernels is cut up, and whether they can run at all.

What fits a core's vector memory decides most: the recurrent weights stay there for the
whole sequence where they fit, and are streamed through it panel by panel at every step
where they do not.

Axes     T time, B batch, I input size, H hidden size.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp

from flax_lstm_kernels.tpu.orders import ITB, LANES, TBI, TIB, least, up
from flax_lstm_kernels.tpu.vmem import Pass, Plan, Sizes, vmem_bytes, vmem_limit
from flax_lstm_kernels.tuning import Key, find

# Two cores that JAX shows as one device: each takes its share of the batch tiles.
TWO_CORES = {"TPU v4", "TPU v5", "TPU v5p"}
USABLE = 0.85  # the rest is the compiler's: spills, and what it keeps for itself
MAX_STEPS = 32  # the resets of the steps of one iteration are the bits of an int32
MAX_HIDDEN = 2048


def orders(sizes: Sizes) -> tuple[int, int]:
    """Returns the orders of inputs and outputs that take the least memory.

    Not for training: what an embedding makes is `[T, B, I]`, and would be copied.
    """
    if sizes.keep:
        return TBI, TBI
    given, made = (
        least(sizes.steps, sizes.rows, width, itemsize=sizes.itemsize)
        for width in (sizes.inputs, sizes.hidden)
    )
    return given, made


def reordered(plan: Plan, sizes: Sizes, kind: str | None) -> Plan:
    """Returns the plan with inputs and outputs in their orders, or as it is."""
    given, made = orders(sizes)
    if given == made == TBI:
        return plan
    if {TIB, ITB} & {given, made}:
        # A block's lanes are whole ones or all of the array's last axis.
        one = LANES if kind in TWO_CORES else 3 * LANES  # rows of one tile for all
        if plan.rows >= sizes.rows or (sizes.rows % LANES and sizes.rows <= one):
            plan = plan._replace(rows=sizes.rows)
        elif plan.rows % LANES:
            return plan
        if sizes.itemsize == 4 and plan.rows > LANES and kind in (None, "TPU v4"):
            return plan  # the compiler for v4 spills 5 MiB
    # All steps of an iteration are turned at once; some orders want full sublanes.
    steps = min(8, sizes.steps)
    return plan._replace(steps=steps, order=given, hs_order=made)


def plans(which: Pass, sizes: Sizes, kind: str | None) -> list[Plan]:
    """Returns the plans to choose from, the better first, whether or not they fit."""
    hidden = up(sizes.hidden, LANES)
    whole = 32 // sizes.itemsize  # rows of a register of the computation dtype
    count = -(-sizes.rows // 256)
    if kind in TWO_CORES and sizes.rows >= 4 * whole:
        count = up(count, 2)
    rows = sizes.rows
    if rows > whole:
        rows = up(-(-rows // count), whole)
    if {TIB, ITB} & {*orders(sizes)} and rows % LANES and sizes.rows >= LANES:
        rows = LANES  # rather than 192 of 384: blocks have whole lanes
    steps = MAX_STEPS
    while steps > 4 and steps * rows * hidden > 8 * 64 * 512:
        steps //= 2
    # Panels as wide as the widest matrix unit, 256, where that divides H.
    widths = [width for width in (256, LANES) if hidden % width == 0]
    key = Key("tpu", which, kind or "any", hidden, sizes.rows, sizes.itemsize)
    tuned: Any = find(key)
    found = [Plan(**tuned)] if tuned else []
    tiles = [rows] + [r for r in (128, 64, 32, 16) if r < rows and r % whole == 0]
    # Weights that stay are worth more than long tiles, those more than many steps.
    for streamed in (False, True):
        for tile in tiles:
            lengths = (
                [1] if streamed else [s for s in (steps, 8, 4, 2, 1) if s <= steps]
            )
            for length in dict.fromkeys(lengths):
                # Iterations of equal length: 40 steps are 3 times 14, not 16, 16, 8.
                even = -(-sizes.steps // -(-sizes.steps // length))
                for units in widths if streamed else widths[:1]:
                    if which == "forward" and not streamed:
                        fused = Plan(tile, even, units, True, streamed)
                        found += [reordered(fused, sizes, kind), fused]
                    found.append(Plan(tile, even, units, False, streamed))
    return list(dict.fromkeys(found))


def choose(which: Pass, sizes: Sizes, kind: str | None) -> tuple[Plan, int]:
    """Returns the first plan that fits and its VMEM bytes.

    Args:
      which: The pass.
      sizes: What is to be computed.
      kind: `device_kind`; None for a plan that fits every kind.

    Raises:
      NotImplementedError: If none fits, or the kind is not known.
    """
    limit = math.floor(USABLE * vmem_limit(kind))
    needs = []
    for plan in plans(which, sizes, kind):
        needed = vmem_bytes(which, sizes, plan)
        if needed <= limit:
            return plan, needed
        needs.append(needed)
    raise NotImplementedError(
        f"the {which} kernel needs {min(needs) / 2**20:.1f} MiB of vector memory for "
        f"H={sizes.hidden}, I={sizes.inputs}, {sizes.itemsize} bytes; "
        f"{kind or 'the smallest device'} leaves {limit / 2**20:.1f} MiB"
    )


class Support(NamedTuple):
    """Whether the kernels can run.

    Attributes:
      reason: Why not; None where they can.
      vmem_bytes: What the larger of the two passes takes of a core's VMEM; 0 where that
        was not looked at.
    """

    reason: str | None
    vmem_bytes: int


def support(
    kind: str | None,
    dtype: Any,
    hidden: int,
    *,
    steps: int = 1,
    rows: int = 8,
    inputs: int = 1,
) -> Support:
    """Says whether the kernels can run, for training, and why not.

    Args:
      kind: `device_kind` of the device; None for any TPU.
      dtype: Computation dtype.
      hidden: H.
      steps: T. With the next two it decides the estimate, but not the answer: shorter
        tiles and fewer steps are chosen until they fit.
      rows: B.
      inputs: I.

    >>> support("TPU v5e", jnp.float16, 256).reason
    'float32 and bfloat16 only; the computation dtype is float16'
    >>> support("TPU v6e", jnp.bfloat16, 2048).reason is None
    True
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.bfloat16):
        return Support(
            f"float32 and bfloat16 only; the computation dtype is {dtype.name}", 0
        )
    if not 1 <= hidden <= MAX_HIDDEN:
        return Support(f"hidden sizes of 1 to {MAX_HIDDEN} only; got {hidden}", 0)
    if min(steps, rows, inputs) < 1:
        told = f"sizes above 0 only; got T={steps}, B={rows}, I={inputs}"
        return Support(told, 0)
    sizes = Sizes(steps, rows, inputs, hidden, dtype.itemsize, keep=True)
    try:
        needed = [choose(which, sizes, kind)[1] for which in ("forward", "backward")]
    except NotImplementedError as error:
        return Support(str(error), 0)
    return Support(None, max(needed))
