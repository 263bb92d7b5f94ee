"""Runs one case after another: prepare, check, time, and make rows of it."""

from collections.abc import Sequence
from typing import Any

import jax

from flax_lstm.bench.peers.base import Implementation, Prepared
from flax_lstm.bench.problem import (
    Numbers,
    Problem,
    draw_problem,
    largest_error,
    reference,
    tolerance,
)
from flax_lstm.bench.results import Row, timed
from flax_lstm.bench.shapes import Shape
from flax_lstm.bench.timing import alternate
from flax_lstm.bench.work import work_of
from flax_lstm.environment import installed


def run_case(
    shape: Shape,
    mode: str,
    dtype: str,
    implementations: Sequence[Implementation],
    *,
    seed: int,
    common: Row,
    **timing: Any,
) -> list[Row]:
    """Returns a row for each implementation at one shape, mode and dtype.

    Args:
      shape: The shape.
      mode: "forward", "gradient" or "step".
      dtype: Name of the dtype.
      implementations: What to race.
      seed: Draws the arrays.
      common: What every row says: `machine.provenance`.
      **timing: See `flax_lstm.bench.timing.alternate`.
    """
    problem = draw_problem(shape, mode, dtype, seed)
    work = work_of(problem.shape, mode, dtype, problem.lengths)
    rows: dict[str, Row] = {}
    ready: dict[str, Prepared] = {}
    wanted: dict[bool, Numbers] = {}
    for one in implementations:
        row = common | {
            "implementation": one.name,
            "family": one.family,
            "shape": shape.name,
            "mode": mode,
            "dtype": dtype,
            "batch": problem.shape.batch,
            "steps": problem.shape.steps,
            "inputs": problem.shape.inputs,
            "hidden": problem.shape.hidden,
            "tokens": work.tokens,
            "packages": " ".join(f"{n} {installed(n)}" for n in one.packages),
        }
        found, prepared = prepare(one, problem, wanted)
        rows[one.name] = row | found
        if prepared is not None:
            ready[one.name] = prepared
    samples = alternate({name: one.call for name, one in ready.items()}, **timing)
    for name, taken in samples.items():
        rows[name] = timed(rows[name], taken, work)
    return list(rows.values())


def prepare(
    one: Implementation, problem: Problem, wanted: dict[bool, Numbers]
) -> tuple[Row, Prepared | None]:
    """Sets an implementation up and checks its numbers.

    Args:
      one: The implementation.
      problem: The case.
      wanted: The right numbers with and without resets; filled where needed.

    Returns:
      What its row says, and what to time: None where it is not to be timed.
    """
    if reason := one.missing():
        return {"status": "missing", "reason": reason}, None
    try:
        # Some libraries add vectors to matrices, which a caller may have forbidden.
        with jax.numpy_rank_promotion("allow"):
            prepared = one.prepare(problem)
            got = prepared.numbers(prepared.call())
    except NotImplementedError as error:
        return {"status": "unable", "reason": first_line(error)}, None
    except Exception as error:  # another library's failure must not end the run
        reason = f"{type(error).__name__}: {first_line(error)}"
        return {"status": "failed", "reason": reason}, None
    heeds = prepared.resets == "yes"
    if heeds not in wanted:
        wanted[heeds] = reference(problem, resets=heeds)
    error, where = largest_error(problem, got, wanted[heeds])
    row = {
        "lengths": prepared.lengths,
        "resets": prepared.resets,
        "compile_s": prepared.compile_s,
        "reason": prepared.note,
        "error": error if error == error else None,
    }
    allowed = tolerance(problem.dtype, jax.default_backend())
    if not error <= allowed:
        reason = f"{where} is off by {error:.1e} of its norm; {allowed:g} is allowed"
        return row | {"status": "wrong", "reason": reason}, None
    return row, prepared


def first_line(error: Exception) -> str:
    """Returns the beginning of a message, which may be pages long."""
    return (str(error).strip().splitlines() or [""])[0][:300]
