"""How much work a case is: what is counted as useful, and what the machine allows.

Axes     S valid steps of all rows together (T·B without lengths), B rows, I input size,
         H hidden size.
Flops    The matrix products alone, a multiplication and an addition as two:
         2 (I+H) 4H a valid step forward, and three times that for the gradient (its
         backward half has a product for the weights and one for inputs and states).
Bytes    The least that must move, each array once, in the dtype of the case: inputs,
         weights, first and final states, outputs. The gradient moves besides: the
         gradients of the same arrays, and the kept values, gates and c (5H numbers a
         valid step). A kernel that recomputes may keep less; no cell is counted twice
         because it did not fit a cache.
"""

import dataclasses

import numpy as np

from flax_lstm.bench.shapes import Shape

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True)
class Work:
    """What one call has to do at the least.

    Attributes:
      tokens: Valid steps.
      flops: Of the matrix products.
      bytes: See the module.
    """

    tokens: int
    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """Flops for each byte."""
        return self.flops / self.bytes


def work_of(
    shape: Shape, mode: str, dtype: str, lengths: np.ndarray | None = None
) -> Work:
    """Returns the work of one call.

    Args:
      shape: Sizes; with mode "step", those of the step alone count.
      mode: "forward", "gradient" or "step".
      dtype: Of weights, inputs and outputs.
      lengths: Valid steps of each row.

    >>> work_of(Shape("tiny", 2, 3, 4, 5, ""), "forward", "float32").flops
    2160.0
    """
    rows, inputs, hidden = shape.batch, shape.inputs, shape.hidden
    tokens = rows * shape.steps if lengths is None else int(np.sum(lengths))
    flops = 2.0 * (inputs + hidden) * 4 * hidden * tokens
    weights = (inputs + hidden + 1) * 4 * hidden
    numbers = tokens * (inputs + hidden) + weights + 4 * rows * hidden
    if mode == "gradient":
        flops *= 3
        numbers = 2 * numbers + tokens * 5 * hidden
    return Work(tokens, flops, float(numbers * ITEMSIZE[dtype]))
