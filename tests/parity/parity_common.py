"""What the comparisons share: drawn cases, our side of them, and the tolerances.

Every side computes the same thing: outputs, final states, and the gradients of their
inner product with drawn cotangents, which are zero in the padding.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_lstm import LSTMState, convert, lstm, scan_cell
from flax_lstm.cell import LSTMParams
from flax_lstm.variants import projected_cell

FLOAT64 = 1e-12
"""Of the largest value: some hundred roundings of 1.1e-16, however they add up."""


def float32(steps: int) -> float:
    """Of the largest value: both sides round each step; errors add up over the steps.

    Eight ulp for the sums over inputs and units, and one more for every step.
    """
    return (8 + steps) * float(np.finfo(np.float32).eps)


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and options of one comparison."""

    steps: int
    batch: int
    input_size: int
    hidden: int
    layers: int
    directions: int
    lengths: bool

    @classmethod
    def draw(cls, seed: int, **fixed: Any) -> "Case":
        rng = np.random.default_rng(seed)
        drawn = {
            "steps": int(rng.integers(1, 13)),
            "batch": int(rng.integers(1, 6)),
            "input_size": int(rng.integers(1, 7)),
            "hidden": int(rng.integers(1, 8)),
            "layers": int(rng.integers(1, 4)),
            "directions": int(rng.integers(1, 3)),
            "lengths": bool(rng.integers(0, 2)),
        }
        return cls(**(drawn | fixed))


class Problem(NamedTuple):
    """Arrays of one comparison; states and their cotangents `[layers * D, B, H]`."""

    x: np.ndarray
    h: np.ndarray
    c: np.ndarray
    lengths: np.ndarray | None
    y_bar: np.ndarray
    h_bar: np.ndarray
    c_bar: np.ndarray


class Result(NamedTuple):
    """Outputs, final states and gradients."""

    y: Any
    h: Any
    c: Any
    x_bar: Any
    h0_bar: Any
    c0_bar: Any
    stack_bar: Any


def draw_problem(
    case: Case, seed: int, dtype: Any, *, width: int | None = None
) -> Problem:
    """Draws the arrays; `width` is the size of h where it is not that of c."""
    rng = np.random.default_rng(1000 + seed)
    width = width or case.hidden
    lengths = None
    if case.lengths:
        lengths = rng.integers(1, case.steps + 1, case.batch).astype(np.int32)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(dtype)

    count = case.layers * case.directions
    y_bar = normal(case.steps, case.batch, case.directions * width)
    if lengths is not None:
        live = np.arange(case.steps)[:, None] < lengths[None]
        y_bar = y_bar * live[..., None].astype(dtype)
    return Problem(
        x=normal(case.steps, case.batch, case.input_size),
        h=normal(count, case.batch, width),
        c=normal(count, case.batch, case.hidden),
        lengths=lengths,
        y_bar=y_bar,
        h_bar=normal(count, case.batch, width),
        c_bar=normal(count, case.batch, case.hidden),
    )


def draw_stack(case: Case, seed: int, dtype: Any) -> convert.Stack:
    """Draws weights large enough to reach the gates' curved parts."""
    rng = np.random.default_rng(2000 + seed)
    widths = [case.input_size] + [case.directions * case.hidden] * (case.layers - 1)

    def direction(width: int) -> LSTMParams:
        columns = 4 * case.hidden
        shapes = ((width, columns), (case.hidden, columns), (columns,))
        draws = (rng.normal(size=shape) / np.sqrt(shape[0]) for shape in shapes[:2])
        kernel, recurrent = draws
        weights = (kernel, recurrent, rng.normal(size=columns))
        return LSTMParams(*(jnp.asarray(w.astype(dtype)) for w in weights))

    return tuple(
        tuple(direction(width) for _ in range(case.directions)) for width in widths
    )


def run_stack(
    stack: convert.Stack,
    x: Any,
    h: Any = None,
    c: Any = None,
    lengths: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs our layers as torch runs its own: time-major, directions concatenated."""
    y = jnp.asarray(x)
    lengths = None if lengths is None else jnp.asarray(lengths)
    finals = []
    for layer in stack:
        both = []
        for n, params in enumerate(layer):
            at = len(finals)
            state = None
            if h is not None:
                state = LSTMState(jnp.asarray(c[at]), jnp.asarray(h[at]))
            options = {"lengths": lengths, "reverse": n == 1, "keep_order": True}
            if isinstance(params, LSTMParams):
                final, outputs = lstm(params, y, state, **options)
            else:
                width, hidden = params.projection.shape[::-1]
                state = state or LSTMState(
                    jnp.zeros((y.shape[1], hidden)), jnp.zeros((y.shape[1], width))
                )
                final, outputs = scan_cell(projected_cell, params, y, state, **options)
            finals.append(final)
            both.append(outputs)
        y = jnp.concatenate(both, -1)
    return y, jnp.stack([s.h for s in finals]), jnp.stack([s.c for s in finals])


def ours(stack: convert.Stack, problem: Problem) -> Result:
    """Returns our outputs, states and gradients."""
    return _ours(stack, jax.tree.map(jnp.asarray, problem))


@jax.jit
def _ours(stack: convert.Stack, problem: Problem) -> Result:
    def forward(stack: Any, x: Any, h: Any, c: Any):
        return run_stack(stack, x, h, c, problem.lengths)

    results, pull = jax.vjp(forward, stack, problem.x, problem.h, problem.c)
    stack_bar, *state_bars = pull((problem.y_bar, problem.h_bar, problem.c_bar))
    return Result(*results, *state_bars, stack_bar)


def assert_close(got: Any, want: Any, tolerance: float) -> None:
    """Compares trees of arrays, each against the largest value of the wanted one."""
    assert jax.tree.structure(got) == jax.tree.structure(want)

    def check(path: Any, got: Any, want: Any) -> None:
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        assert got.shape == want.shape, jax.tree_util.keystr(path)
        scale = max(1.0, float(abs(want).max(initial=0)))
        error = float(abs(got - want).max(initial=0)) / scale
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: {error:.2e}"

    jax.tree_util.tree_map_with_path(check, got, want)
