"""The step of the LSTM backward, as kernels on every kind of machine compute it."""

from typing import Any

import jax

from flax_lstm.cell import update


def transposed_step(
    d_h: Any, d_c: Any, gates: tuple[Any, ...], c: Any
) -> tuple[list[Any], Any]:
    """Returns `([dz_i, dz_f, dz_g, dz_o], dc)`, dc that of the cell before the step.

    Args:
      d_h: Gradient of the step's output.
      d_c: Gradient of the step's cell, as far as it does not come from the output.
      gates: i, f, g, o after activation.
      c: The cell before the step.
    """
    _, transpose = jax.vjp(update, *gates, c)
    *d_gates, d_c = transpose((d_c, d_h))
    i, f, g, o = gates
    slopes = i * (1 - i), f * (1 - f), 1 - g * g, o * (1 - o)
    return [d * slope for d, slope in zip(d_gates, slopes, strict=True)], d_c
