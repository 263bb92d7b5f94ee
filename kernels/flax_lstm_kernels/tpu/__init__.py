"""The LSTM over time on a TPU, in Pallas: forward and backward.

Forward takes and returns what the kernel of the CPU does; backward ends with d_z, of
which `flax_lstm.lowering` makes the rest. Not yet run on hardware: they are interpreted
on a CPU by the tests, and compiled ahead of time for every kind of TPU by
`experiments/compile_kernels.py`.

Axes     T time, B batch, I input size, H hidden size, G = 4H in gate order i f g o.
Dtype    float32 or bfloat16 (that of `inputs`); c, gates and dz always float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from flax_lstm_kernels.copied import in_copies
from flax_lstm_kernels.tpu.backward import backward_pass
from flax_lstm_kernels.tpu.forward import forward_pass
from flax_lstm_kernels.tpu.plan import Support, choose, support
from flax_lstm_kernels.tpu.vmem import Plan, Sizes, vmem_limit

__all__ = ["Plan", "Support", "backward", "forward", "support"]


def forward(
    inputs: Float[Array, "T B I"],
    kernel: Float[Array, "I G"],
    recurrent_kernel: Float[Array, "H G"],
    bias: Float[Array, " G"],
    c: Float[Array, "B H"],
    h: Float[Array, "B H"],
    lengths: Int[Array, " B"],
    resets: UInt8[Array, "T B"] | UInt8[Array, "0 0"],
    *,
    reverse: bool,
    keep: bool,
    kind: str | None = None,
    plan: Plan | None = None,
    interpret: Any = False,
) -> tuple[Array, ...]:
    """Runs the LSTM over time.

    Args:
      inputs: What to run over, in the computation dtype; what stands past the lengths
        changes nothing.
      kernel: Weights of the inputs.
      recurrent_kernel: Weights of the outputs.
      bias: Bias.
      c: Cell before the first step.
      h: Output before the first step.
      lengths: int32, 0 to T.
      resets: Not 0 where a step starts from zeros; `[0, 0]` for nowhere.
      reverse: From the last valid step to the first.
      keep: Also returns what `backward` needs.
      kind: `device_kind` to plan for; None for one that fits every kind of TPU.
      plan: How to cut up the work; the better one for the kind when None.
      interpret: Runs on any device by Pallas' interpreter: True, or its parameters.

    Returns:
      `(hs [T, B, H], c, h, gates [T, B, 4H], before [T, B, H])`: the outputs, the final
      state, the gates after activation and the cell that each step started from. hs
      and h are in the computation dtype, the others float32. All but the state are 0
      past the lengths; the last two are empty without `keep`.

    Raises:
      NotImplementedError: If no plan fits.
    """
    steps, rows, size = inputs.shape
    sizes = Sizes(steps, rows, size, h.shape[1], inputs.dtype.itemsize, keep)
    plan = plan or choose("forward", sizes, kind)[0]

    def run(inputs: Any, *state_and_masks: Any) -> tuple[Array, ...]:
        return forward_pass(
            inputs,
            kernel,
            recurrent_kernel,
            bias,
            *state_and_masks,
            reverse=reverse,
            keep=keep,
            plan=plan._replace(steps=min(plan.steps, inputs.shape[0])),
            vmem_limit_bytes=vmem_limit(kind),
            interpret=interpret,
        )

    size = plan.piece_steps(rows)
    if keep or plan.fused or steps <= size:
        return run(inputs, c, h, lengths, resets)

    def of_piece(sequences: Any, state: Any, *masks: Any) -> Any:
        hs, c, h, _, _ = run(*sequences, *state, *masks)
        return (hs,), (c, h)

    dtype, hidden = inputs.dtype, h.shape[1]
    (hs,), (c, h) = in_copies(
        of_piece,
        (inputs,),
        (c.astype(jnp.float32), h.astype(dtype)),
        lengths,
        resets,
        results=[jax.ShapeDtypeStruct((steps, rows, hidden), dtype)],
        size=size,
        reverse=reverse,
    )
    empty = jnp.zeros((0, 0, 4 * hidden), jnp.float32)
    return hs, c, h, empty, empty[..., :hidden]


def backward(
    d_hs: Float[Array, "T B H"],
    d_c: Float[Array, "B H"],
    d_h: Float[Array, "B H"],
    gates: Float[Array, "T B G"],
    before: Float[Array, "T B H"],
    recurrent_kernel: Float[Array, "H G"],
    lengths: Int[Array, " B"],
    resets: UInt8[Array, "T B"] | UInt8[Array, "0 0"],
    *,
    reverse: bool,
    kind: str | None = None,
    plan: Plan | None = None,
    interpret: Any = False,
) -> tuple[Array, ...]:
    """Carries gradients back through time.

    Args:
      d_hs: Gradient of the outputs; what stands past the lengths changes nothing.
      d_c: Gradient of the final cell.
      d_h: Gradient of the final output.
      gates: As `forward` returned them.
      before: As `forward` returned it.
      recurrent_kernel: As in `forward`; its dtype is the computation dtype.
      lengths: As in `forward`.
      resets: As in `forward`.
      reverse: As in `forward`.
      kind: As in `forward`.
      plan: As in `forward`; never fused.
      interpret: As in `forward`.

    Returns:
      `(d_z [T, B, 4H], d_c, d_h)`, float32: gradients of the gates before activation (0
      past the lengths) and of the initial state.

    Raises:
      NotImplementedError: If no plan fits.
    """
    itemsize = recurrent_kernel.dtype.itemsize
    steps, rows, hidden = d_hs.shape
    sizes = Sizes(steps, rows, 0, hidden, itemsize, keep=True)
    return backward_pass(
        d_hs,
        d_c,
        d_h,
        gates,
        before,
        recurrent_kernel,
        lengths,
        resets,
        reverse=reverse,
        plan=plan or choose("backward", sizes, kind)[0],
        vmem_limit_bytes=vmem_limit(kind),
        interpret=interpret,
    )
