"""Which implementation of the sequence runs, and why not the others.

A request that an implementation cannot meet has a reason, a sentence. None chooses the
first that can, in the order of `FASTEST_FIRST`, and that needs not be asked for by
name: it may be a kernel that has run on no hardware yet, or lack a way to be
differentiated.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax_lstm_kernels.target import current

from flax_lstm.loop import varying_axes

Implementation = Literal["scan", "xla", "cpu", "pallas", "cudnn"]
FASTEST_FIRST: tuple[Implementation, ...] = ("pallas", "cudnn", "cpu", "xla", "scan")
# Kernels that None chooses though none of them has been measured.
UNMEASURED = ("tpu", "single")
# Values of `jax.default_matmul_precision` that let a float32 product be made of tf32.
ALLOW_TF32 = (
    None,
    "default",
    "fastest",
    "high",
    "bfloat16",
    "tensorfloat32",
    "TF32_TF32_F32",
)


class Explanation(NamedTuple):
    """What a call of `lstm` would run; prints as one line for each implementation.

    Attributes:
      implementation: The one that runs; None where the one asked for cannot.
      reasons: Why each of the others does not.
      note: What to know of the one that runs.
    """

    implementation: Implementation | None
    reasons: dict[str, str]
    note: str = ""

    def __str__(self) -> str:
        """Returns the lines."""
        lines = [f"{name}: {reason}" for name, reason in self.reasons.items()]
        if self.implementation is not None:
            runs = f"{self.implementation}: runs"
            lines.insert(0, f"{runs}; {self.note}" if self.note else runs)
        return "\n".join(lines)


class Verdict(NamedTuple):
    """What is to be said of one implementation.

    Attributes:
      reason: Why it cannot run.
      unchosen: Why it does not run unless it is asked for.
      note: What to know where it runs.
    """

    reason: str | None = None
    unchosen: str | None = None
    note: str = ""


class Request(NamedTuple):
    """What is asked of an implementation, of arrays, tracers or their shapes.

    Attributes:
      params: Weights.
      inputs: `[T, *B, I]`, in the computation dtype.
      state: Initial state.
      resets: Whether there are resets.
    """

    params: Any
    inputs: Any
    state: Any
    resets: bool

    def sizes(self) -> tuple[Any, ...]:
        """Returns every size of the inputs, and H."""
        return (*self.inputs.shape, self.params.recurrent_kernel.shape[0])


def of_pallas(target: Any, request: Request) -> Verdict:
    """Judges the kernels of TPU and GPU."""
    if target.platform not in ("tpu", "cuda"):
        return Verdict(f'there is no kernel for "{target.platform}"')
    if refusal := sizes_refusal(request):
        return Verdict(refusal)
    dtype = request.inputs.dtype
    steps, *batch, inputs, hidden = request.sizes()
    rows = 1
    for size in batch:
        rows *= size
    notes = ["not yet run on hardware"]
    if target.platform == "tpu":
        from flax_lstm_kernels import tpu

        support = tpu.support(
            target.kind, dtype, hidden, steps=steps, rows=rows, inputs=inputs
        )
        kernel = "tpu"
        notes.append("on several TPUs inside jax.shard_map only")
    else:
        from flax_lstm_kernels import gpu

        if dtype == jnp.float32:
            if not allows_tf32():
                return Verdict(
                    "it multiplies float32 as tf32, which "
                    f'jax.default_matmul_precision("{default_precision()}") does not '
                    "allow"
                )
            notes.insert(0, "float32 is multiplied as tf32 (11 bits)")
        support = gpu.support(target.kind, dtype, hidden, steps=steps, rows=rows)
        kernel = support.plan.kernel if support.plan else ""
    unchosen = None
    if target.interpret:
        unchosen = "is interpreted, to be tested: runs where it is asked for"
    elif kernel not in UNMEASURED:
        unchosen = (
            f'could run, but the kernel "{kernel}" has not yet run on hardware: '
            "runs where it is asked for"
        )
    return Verdict(support.reason, unchosen, ", ".join(notes))


def default_precision() -> Any:
    """Returns the value of `jax.default_matmul_precision`."""
    config: Any = jax.config
    return config.jax_default_matmul_precision


def allows_tf32() -> bool:
    """Returns whether a float32 product may be made of tf32."""
    return default_precision() in ALLOW_TF32


def of_cudnn(target: Any, request: Request) -> Verdict:
    """Judges JAX's own binding of cuDNN."""
    dtype = request.inputs.dtype
    reason = None
    if target.platform != "cuda":
        reason = f'needs a CUDA device; the device is "{target.platform}"'
    elif dtype != jnp.float32:
        reason = f"float32 only; the computation dtype is {dtype}"
    elif request.resets:
        reason = "cuDNN knows no resets"
    elif in_shard_map(request):
        reason = "not inside jax.shard_map"
    return Verdict(
        reason or sizes_refusal(request),
        "could run, but has no vmap and no forward mode: runs where it is asked for",
        "no vmap, no forward mode",
    )


def of_cpu(target: Any, request: Request) -> Verdict:
    """Judges the kernel of the CPU, but for whether it can be built."""
    dtype = request.inputs.dtype
    if target.platform != "cpu":
        return Verdict(f'needs a CPU; the device is "{target.platform}"')
    if dtype != jnp.float32:
        return Verdict(f"float32 only; the computation dtype is {dtype}")
    return Verdict(sizes_refusal(request))


def built_for_cpu() -> Verdict:
    """Judges whether the kernel of the CPU can be built, by building it."""
    from flax_lstm_kernels import cpu

    return Verdict(cpu.reason())


def sizes_refusal(request: Request) -> str | None:
    """Returns why no kernel takes these sizes; None where one may."""
    if all(isinstance(size, int) and size > 0 for size in request.sizes()):
        return None
    return f"sizes known and above 0 only; inputs are {request.inputs.shape}"


def in_shard_map(request: Request) -> bool:
    """Returns whether an array is known to vary over the axes of a mesh."""
    return any(varying_axes(leaf) for leaf in jax.tree.leaves(request[:3]))


JUDGES = {"pallas": of_pallas, "cudnn": of_cudnn, "cpu": of_cpu}


def explained(asked: Any, request: Request) -> Explanation:
    """Returns what runs where `asked` is the value of `implementation`.

    Raises:
      ValueError: If that is no implementation.
    """
    if asked is not None and asked not in get_args(Implementation):
        raise ValueError(
            f"implementation must be None or one of {get_args(Implementation)}; "
            f"got {asked!r}."
        )
    target = current()
    runs, note = None, ""
    reasons: dict[str, str] = {}
    for name in FASTEST_FIRST:
        verdict = JUDGES[name](target, request) if name in JUDGES else Verdict()
        # The kernel of the CPU is compiled when first looked at: not for a call that
        # has no use for it.
        if name == "cpu" and asked in (None, "cpu") and not verdict.reason:
            verdict = built_for_cpu()
        if verdict.reason:
            reasons[name] = verdict.reason
        elif asked == name or (asked is None and runs is None and not verdict.unchosen):
            runs, note = name, verdict.note
        elif asked is None and verdict.unchosen:
            reasons[name] = verdict.unchosen
        else:
            better = f'"{asked}" was asked for' if asked else f'"{runs}" is faster'
            reasons[name] = f"could run, but {better}"
    return Explanation(runs, reasons, note)


def choose(asked: Any, request: Request) -> Implementation:
    """Returns the implementation to run, of arguments as for `explained`.

    Raises:
      ValueError: If `asked` is no implementation.
      NotImplementedError: If it cannot run.
    """
    explanation = explained(asked, request)
    if explanation.implementation is None:
        able = (
            f'"{name}"'
            for name, reason in explanation.reasons.items()
            if reason.startswith("could run")
        )
        raise NotImplementedError(
            f'implementation="{asked}" cannot run: {explanation.reasons[asked]}; '
            f"use {', '.join(able)} or None."
        )
    return explanation.implementation
