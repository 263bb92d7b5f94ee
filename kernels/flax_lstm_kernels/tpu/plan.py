"""How one run of the TPU kernels is cut up, and what that takes of a core's memory.

What fits decides most. A core multiplies only what lies in its vector memory (VMEM):
the recurrent weights stay there for the whole sequence where they fit, and are streamed
through it panel by panel at every step where they do not.

Axes     T time, B batch, I input size, H hidden size, here rounded up to 128 lanes.
Panel    The columns of the four gates of `units` units, side by side.
"""

import math
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

from flax_lstm_kernels.tuning import Key, find

LANES = 128
# Orders of an array `[T, B, K]` in memory, and the axes in each.
TBI, TIB, ITB, BTI = range(4)
ORDERS = {TBI: (0, 1, 2), TIB: (0, 2, 1), ITB: (2, 0, 1), BTI: (1, 0, 2)}
# VMEM bytes of one core, by `device_kind`; jax.experimental.pallas.tpu.TpuInfo.
VMEM = {
    "TPU v4": 16 << 20,
    "TPU v5 lite": 128 << 20,
    "TPU v5e": 128 << 20,
    "TPU v5": 64 << 20,
    "TPU v5p": 64 << 20,
    "TPU v6 lite": 128 << 20,
    "TPU v6e": 128 << 20,
    "TPU7x": 64 << 20,
}
# Two cores that JAX shows as one device: each takes its share of the batch tiles.
TWO_CORES = {"TPU v4", "TPU v5", "TPU v5p"}
USABLE = 0.85  # the rest is the compiler's: spills, and what it keeps for itself
MAX_STEPS = 32  # the resets of the steps of one iteration are the bits of an int32
MAX_HIDDEN = 2048

Pass = Literal["forward", "backward"]


class Plan(NamedTuple):
    """How the work is cut up.

    Attributes:
      rows: Rows of the batch in one tile.
      steps: Time steps in one iteration of the grid; 1 where streamed.
      units: Hidden units in one panel.
      fused: The inputs are multiplied inside the kernel, not by XLA before it.
      streamed: The recurrent weights pass through VMEM at every step.
      order: How the inputs lie in memory: as `[T, B, I]` (0), or, fused only and turned
        inside, as `[T, I, B]` (1), `[I, T, B]` (2) or `[B, T, I]` (3).
      hs_order: How the outputs lie in memory, likewise.
    """

    rows: int
    steps: int
    units: int
    fused: bool
    streamed: bool
    order: int = TBI
    hs_order: int = TBI

    def piece_steps(self) -> int:
        """Returns the steps of a piece of inference that is projected before.

        A piece is a few launches and fetches weights that stay anew, which may take as
        long as one or two steps (an estimate, not measured). A step that streams its
        weights takes the longest.
        """
        return 8 if self.streamed else 16


class Sizes(NamedTuple):
    """What is to be computed.

    Attributes:
      steps: T.
      rows: B.
      inputs: I; 0 in the backward pass.
      hidden: H, as the caller has it.
      itemsize: Bytes of the computation dtype, 2 or 4.
      keep: The forward pass also writes what the backward pass needs.
    """

    steps: int
    rows: int
    inputs: int
    hidden: int
    itemsize: int
    keep: bool


def up(size: int, multiple: int) -> int:
    """Rounds up to a multiple.

    >>> up(300, 128)
    384
    """
    return -(-size // multiple) * multiple


def block(plan: Plan, width: int, order: int, itemsize: int) -> int:
    """Returns the bytes of a block of an array `[T, B, width]` in VMEM.

    Its last axis takes whole lanes, the one before it whole sublanes.
    """
    shape = plan.steps, plan.rows, width
    outer, inner, last = (shape[axis] for axis in ORDERS[order])
    return outer * up(inner, 32 // itemsize) * up(last, LANES) * itemsize


def vmem_bytes(which: Pass, sizes: Sizes, plan: Plan) -> int:
    """Estimates the VMEM of one core: blocks, of which the grid keeps two; scratch."""
    hidden, item = up(sizes.hidden, LANES), sizes.itemsize
    rows = up(plan.rows, 32 // item)
    cells = plan.steps * rows * hidden
    gates = 4 * hidden if plan.streamed else up(4 * sizes.hidden, LANES)
    kept = plan.steps * rows * gates * 4  # of z, gates or dz
    weights = 4 * hidden * item * (2 * plan.units if plan.streamed else hidden)
    if item == 4 and not plan.streamed:
        # Exact products split the weights, and the compiler spills most of the parts:
        # 43 MiB beside weights of 64 MiB for v6e.
        weights += 3 * weights // 4
    masks = 2 * 2 * rows * LANES * 4
    state = rows * hidden * (2 * 4 * 4 + 2 * 4 + item)  # in and out twice, scratch
    panel = 3 * rows * 4 * plan.units * 4  # pre-activations on their way
    if which == "backward":
        blocks = 2 * (2 * kept + cells * (item + 4))  # gates, dz; dh and c
        return weights + masks + state + panel + blocks
    blocks = 2 * cells * item
    if plan.hs_order != TBI:
        blocks += 2 * block(plan, sizes.hidden, plan.hs_order, item)
    if sizes.keep:
        blocks += 2 * (kept + cells * 4)
    if plan.fused:
        weights += (up(sizes.inputs, 32 // item) * item + 8 * 4) * 4 * hidden
        blocks += 2 * block(plan, sizes.inputs, plan.order, item)
        if not sizes.keep:
            blocks += cells * 4 * 4
    else:
        blocks += 2 * cells * 4 * 4
    return weights + masks + state + panel + blocks


def sublanes(size: int, itemsize: int) -> int:
    """Rounds up as the compiler does an axis next to the last: small ones not to 8."""
    least = 4 // itemsize
    while least < min(size, 8):
        least *= 2
    return up(size, least)


def least(*shape: int, itemsize: int) -> int:
    """Returns the order in which an array `[T, B, K]` takes the least memory.

    The compiler has arguments and results of the program so, and would copy all of them
    for a kernel that wants another.

    >>> least(244, 256, 300, itemsize=2) == TIB, least(64, 256, 300, itemsize=2) == ITB
    (True, True)
    """

    def elements(order: int) -> int:
        outer, inner, last = (shape[axis] for axis in ORDERS[order])
        return outer * sublanes(inner, itemsize) * up(last, LANES)

    return min(ORDERS, key=elements)


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


def turned(plan: Plan, sizes: Sizes, kind: str | None) -> Plan:
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
    if {TIB, ITB} & {*orders(sizes)} and rows % LANES and sizes.rows % LANES == 0:
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
                        found += [turned(fused, sizes, kind), fused]
                    found.append(Plan(tile, even, units, False, streamed))
    return found


def vmem_limit(kind: str | None) -> int:
    """Returns the VMEM bytes of one core of a kind; of the smallest where it is None.

    Raises:
      NotImplementedError: If the kind is not known.
    """
    if kind is None:
        return min(VMEM.values())
    if kind not in VMEM:
        raise NotImplementedError(
            f"the kernel knows the devices {', '.join(VMEM)}; this is {kind!r}"
        )
    return VMEM[kind]


def choose(
    which: Pass, sizes: Sizes, kind: str | None, memory: int | None = None
) -> tuple[Plan, int]:
    """Returns the first plan that fits and its VMEM bytes.

    Args:
      which: The pass.
      sizes: What is to be computed.
      kind: `device_kind`; None for a plan that fits every kind.
      memory: VMEM bytes of one core; those of the kind when None.

    Raises:
      NotImplementedError: If none fits, or the kind is not known.
    """
    limit = math.floor(USABLE * (vmem_limit(kind) if memory is None else memory))
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
    memory: int | None = None,
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
      memory: VMEM bytes of one core; those of the kind when None.
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
        return Support(
            f"sizes above 0 only; got T={steps}, B={rows}, I={inputs}",
            0,
        )
    sizes = Sizes(steps, rows, inputs, hidden, dtype.itemsize, keep=True)
    try:
        needed = [
            choose(which, sizes, kind, memory)[1] for which in ("forward", "backward")
        ]
    except NotImplementedError as error:
        return Support(str(error), 0)
    return Support(None, max(needed))
