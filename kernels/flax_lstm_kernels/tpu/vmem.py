"""What a run of the TPU kernels, cut up in one way, takes of a core's vector memory.

A core multiplies only what lies in its vector memory (VMEM). The estimate is held
against what the compiler was seen to take, `kernels/budgets.csv`.

Axes     T time, B batch, I input size, H hidden size, here rounded up to 128 lanes.
Panel    The columns of the four gates of `units` units, side by side.
"""

from typing import Literal, NamedTuple

from flax_lstm_kernels.tpu.orders import LANES, ORDERS, TBI, up

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

Pass = Literal["forward", "backward"]


class Plan(NamedTuple):
    """How the work is cut up.

    Attributes:
      rows: Rows of the batch in one tile.
      steps: Time steps in one iteration of the grid; 1 where streamed.
      units: Hidden units in one panel.
      fused: The inputs are multiplied inside the kernel, not by XLA before it; never
        where streamed.
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

    def piece_steps(self, rows: int) -> int:
        """Returns the steps of a piece of inference that is projected before.

        A piece is a few launches and fetches weights that stay anew, which may take as
        long as one or two steps of 128 rows (an estimate, not measured). A step that
        streams its weights takes longer, as does one of more rows, whose projection
        would also fill the memory.

        Args:
          rows: B.
        """
        return max(1, min(8 if self.streamed else 16, 2048 // rows))


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
