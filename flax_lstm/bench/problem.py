"""The arrays of one case, and the numbers that every implementation must return.

Axes     T time, B batch, I input size, H hidden size; time-major, gate order i f g o.
Dtype    Weights, inputs and states are drawn, rounded to the dtype of the case, and
         kept in float32; what is judged is thus the computation, not the rounding of
         what it was given.
Gradient Of the inner product of the outputs with drawn cotangents, zero in the padding:
         with respect to weights, inputs and initial state.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_lstm.bench.shapes import Shape
from flax_lstm.cell import LSTMParams, LSTMState
from flax_lstm.sequence import lstm

TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Of the norm. Roundings (6e-8, 5e-4, 4e-3) pile up over the steps, most where the
gradient of the weights is summed in the dtype itself; a gate in the wrong place gives
errors of order 1."""
TF32_TOLERANCE = 2e-2
"""The same for float32 where products may round their operands to 10 bits."""


class Numbers(NamedTuple):
    """What a call returned, in our layout; the gradients are None forward.

    All are NumPy arrays, those of the weights in `LSTMParams`.
    """

    y: np.ndarray
    params_bar: Any = None
    x_bar: Any = None
    h_bar: Any = None
    c_bar: Any = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """One case's arrays, NumPy float32, already rounded to the dtype.

    Attributes:
      shape: Sizes.
      mode: "forward", "gradient" or "step".
      dtype: Name of the dtype to compute in.
      params: Weights.
      x: Inputs `[T, B, I]`.
      h: First output `[B, H]`.
      c: First cell state `[B, H]`.
      lengths: int32 `[B]`, or None.
      resets: bool `[T, B]`, or None.
      y_bar: Cotangent of the outputs `[T, B, H]`.
    """

    shape: Shape
    mode: str
    dtype: str
    params: LSTMParams
    x: np.ndarray
    h: np.ndarray
    c: np.ndarray
    lengths: np.ndarray | None
    resets: np.ndarray | None
    y_bar: np.ndarray

    @property
    def live(self) -> np.ndarray:
        """Where a step is valid, bool `[T, B]`."""
        if self.lengths is None:
            return np.ones(self.x.shape[:2], bool)
        return np.arange(len(self.x))[:, None] < self.lengths[None]


def draw_problem(shape: Shape, mode: str, dtype: str, seed: int) -> Problem:
    """Draws the arrays of a case; weights uniform within 1/sqrt(H), as torch's are."""
    if mode == "step":
        shape = shape.one_step()
    rng = np.random.default_rng([seed, 0])
    rounding = jnp.dtype(dtype)
    bound = shape.hidden**-0.5

    def rounded(values: np.ndarray) -> np.ndarray:
        return values.astype(np.float32).astype(rounding).astype(np.float32)

    def normal(*sizes: int) -> np.ndarray:
        return rounded(rng.standard_normal(sizes, np.float32))

    def weight(*sizes: int) -> Any:
        return rounded(rng.uniform(-bound, bound, sizes))

    gates, cells = 4 * shape.hidden, (shape.batch, shape.hidden)
    problem = Problem(
        shape=shape,
        mode=mode,
        dtype=dtype,
        params=LSTMParams(
            weight(shape.inputs, gates), weight(shape.hidden, gates), weight(gates)
        ),
        x=normal(shape.steps, shape.batch, shape.inputs),
        h=np.tanh(normal(*cells)).astype(rounding).astype(np.float32),
        c=normal(*cells),
        lengths=shape.draw_lengths(seed),
        resets=shape.draw_resets(seed),
        y_bar=normal(shape.steps, *cells),
    )
    masked = problem.y_bar * problem.live[..., None]
    return dataclasses.replace(problem, y_bar=masked)


def reference(problem: Problem, *, resets: bool) -> Numbers:
    """Returns what is right: our scan in float32, without a kernel or a fast product.

    Args:
      problem: The case.
      resets: Whether its resets are heeded.
    """
    kept = problem.resets if resets else None
    with jax.default_matmul_precision("highest"):
        return jax.tree.map(np.asarray, _reference(problem, kept))


def _reference(problem: Problem, resets: Any) -> Numbers:
    *inputs, lengths, resets = jax.tree.map(
        jnp.asarray,
        (problem.params, problem.x, problem.h, problem.c, problem.lengths, resets),
    )
    if problem.mode != "gradient":
        return Numbers(_outputs(*inputs, lengths, resets))
    return Numbers(*_gradients(tuple(inputs), problem.y_bar, lengths, resets))


# Out here, so that all contenders of a shape share one compiled program.
@jax.jit
def _outputs(params: Any, x: Any, h: Any, c: Any, lengths: Any, resets: Any) -> Any:
    state = LSTMState(c, h)
    options = {"lengths": lengths, "resets": resets, "implementation": "scan"}
    return lstm(params, x, state, **options)[1]


@jax.jit
def _gradients(inputs: Any, y_bar: Any, lengths: Any, resets: Any) -> Any:
    y, pull = jax.vjp(lambda *given: _outputs(*given, lengths, resets), *inputs)
    return y, *pull(y_bar)


def largest_error(problem: Problem, got: Numbers, want: Numbers) -> tuple[float, str]:
    """Returns the largest error of any array, relative to its norm, and its name.

    Outputs and gradients of the inputs count at valid steps only.
    """
    errors = {}
    for name, one, other in zip(Numbers._fields, got, want, strict=True):
        if other is None:
            continue
        pairs = zip(LSTMParams._fields, one, other, strict=True)
        if name != "params_bar":
            pairs = iter([(name, one, other)])
        for label, a, b in pairs:
            a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
            if name in ("y", "x_bar"):
                a, b = a[problem.live], b[problem.live]
            # Not over the norm alone: a gradient may be zero, and is then met exactly.
            scale = max(float(np.linalg.norm(b)), 1e-30)
            errors[label] = float(np.linalg.norm(a - b)) / scale
    name = max(errors, key=lambda key: np.nan_to_num(errors[key], nan=np.inf))
    return errors[name], name


def tolerance(dtype: str, platform: str) -> float:
    """Returns the error that an implementation may have."""
    if dtype == "float32" and platform != "cpu":
        return TF32_TOLERANCE
    return TOLERANCES[dtype]
