"""Which implementation of the sequence runs, and why not the others.

A request that an implementation cannot meet has a reason, a sentence; the first
implementation without one, in the order of `FASTEST_FIRST`, is what None chooses.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax

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


def refusals(backend: str, asked: Any = None) -> dict[str, str]:
    """Returns the reason of every implementation that cannot run.

    The kernel of the CPU, which must be compiled before it can answer, is looked at
    only where it is asked for by name.
    """
    cudnn = "JAX's cuDNN binding is not connected yet"
    if backend not in ("gpu", "cuda"):
        cudnn = f'needs a CUDA device; the default backend is "{backend}"'
    reasons = {"pallas": f'there is no kernel for "{backend}" yet', "cudnn": cudnn}
    if backend != "cpu":
        reasons["cpu"] = f'needs a CPU; the default backend is "{backend}"'
    elif asked != "cpu":
        reasons["cpu"] = "runs only where it is asked for by name"
    else:
        from flax_lstm_kernels import cpu

        if reason := cpu.reason():
            reasons["cpu"] = reason
    return reasons


def explained(asked: Any) -> Explanation:
    """Returns what runs where `asked` is the value of `implementation`.

    Raises:
      ValueError: If that is no implementation.
    """
    if asked is not None and asked not in get_args(Implementation):
        raise ValueError(
            f"implementation must be None or one of {get_args(Implementation)}; "
            f"got {asked!r}."
        )
    refused = refusals(jax.default_backend(), asked)
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


def choose(asked: Any) -> Implementation:
    """Returns the implementation to run.

    Raises:
      ValueError: If `asked` is no implementation.
      NotImplementedError: If it cannot run.
    """
    explanation = explained(asked)
    if explanation.implementation is None:
        raise NotImplementedError(
            f'implementation="{asked}" cannot run: {explanation.reasons[asked]}; '
            'use "xla", "scan" or None.'
        )
    return explanation.implementation
