"""Which implementation of the sequence runs, and why not the others.

A request that an implementation cannot meet has a reason, a sentence; the first
implementation without one, in the order of `FASTEST_FIRST`, is what None chooses.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from flax_lstm.loop import varying_axes

Implementation = Literal["scan", "xla", "cpu", "pallas", "cudnn"]
FASTEST_FIRST: tuple[Implementation, ...] = ("pallas", "cudnn", "cpu", "xla", "scan")


class Explanation(NamedTuple):
    """What a call of `lstm` would run; prints as one line for each implementation.

    Attributes:
      implementation: The one that runs; None where the one asked for cannot.
      reasons: Why each of the others does not.
    """

    implementation: Implementation | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        """Returns the lines."""
        lines = [f"{name}: {reason}" for name, reason in self.reasons.items()]
        if self.implementation is not None:
            lines.insert(0, f"{self.implementation}: runs")
        return "\n".join(lines)


def refusals(backend: str, asked: Any, call: Any) -> dict[str, str]:
    """Returns the reason of every implementation that cannot run.

    Args:
      backend: Where it would run, as `jax.default_backend` names it.
      asked: The implementation asked for, None for the fastest.
      call: Params, inputs and initial state that it would run with, arrays or tracers.
    """
    cudnn = "JAX's cuDNN binding is not connected yet"
    if backend not in ("gpu", "cuda"):
        cudnn = f'needs a CUDA device; the default backend is "{backend}"'
    reasons = {"pallas": f'there is no kernel for "{backend}" yet', "cudnn": cudnn}
    # The kernel of the CPU is compiled when first looked at: not for a call that has
    # no use for it.
    if asked in (None, "cpu") and (reason := cpu_refusal(backend, call)):
        reasons["cpu"] = reason
    return reasons


def cpu_refusal(backend: str, call: Any) -> str | None:
    """Returns why the kernel of the CPU cannot run; None where it can."""
    inputs = call[1]
    if backend != "cpu":
        return f'needs a CPU; the default backend is "{backend}"'
    if inputs.dtype != jnp.float32:
        return f"float32 only; the computation dtype is {inputs.dtype}"
    if not all(isinstance(size, int) and size > 0 for size in inputs.shape):
        return f"sizes known and above 0 only; inputs are {inputs.shape}"
    if any(varying_axes(leaf) for leaf in jax.tree.leaves(call)):
        return "not inside jax.shard_map"
    from flax_lstm_kernels import cpu

    return cpu.reason()


def explained(asked: Any, call: Any) -> Explanation:
    """Returns what runs where `asked` is the value of `implementation`.

    Args:
      asked: See `flax_lstm.lstm`.
      call: Params, inputs and initial state that it would run with.

    Raises:
      ValueError: If that is no implementation.
    """
    if asked is not None and asked not in get_args(Implementation):
        raise ValueError(
            f"implementation must be None or one of {get_args(Implementation)}; "
            f"got {asked!r}."
        )
    refused = refusals(jax.default_backend(), asked, call)
    able: list[Implementation] = [name for name in FASTEST_FIRST if name not in refused]
    runs: Implementation | None = next(
        (name for name in able if asked in (None, name)), None
    )
    reasons = {}
    for name in FASTEST_FIRST:
        if name in refused:
            reasons[name] = refused[name]
        elif name != runs:
            better = f'"{asked}" was asked for' if asked else f'"{runs}" is faster'
            reasons[name] = f"could run, but {better}"
    return Explanation(runs, reasons)


def choose(asked: Any, call: Any) -> Implementation:
    """Returns the implementation to run, of arguments as for `explained`.

    Raises:
      ValueError: If `asked` is no implementation.
      NotImplementedError: If it cannot run.
    """
    explanation = explained(asked, call)
    if explanation.implementation is None:
        raise NotImplementedError(
            f'implementation="{asked}" cannot run: {explanation.reasons[asked]}; '
            'use "xla", "scan" or None.'
        )
    return explanation.implementation
