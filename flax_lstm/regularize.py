"""Noise inside the recurrence, drawn outside the loop.

Recurrent dropout and zoneout turn a cell into another cell; DropConnect turns
parameters into others. All go together, with any cell, over `scan_cell`:

    params = drop_connect(params, key_1, 0.5)
    cell = recurrent_dropout(lstm_cell, recurrent_mask(key_2, (B, H), 0.25))
    hold = zoneout_masks(key_3, (T, B, H), c=0.5, h=0.05)
    final, outputs = scan_cell(zoneout(cell), params, (inputs, hold), state)

DropConnect alone needs no cell of its own: `lstm(drop_connect(...), ...)`. Dropout of
the outputs is `flax_lstm.dropout.dropout`.

Axes     T time, *B any number of batch axes, H hidden size.
Keys     One key, or one for each row, as in `flax_lstm.dropout`.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from flax_lstm.cell import LSTMState
from flax_lstm.dropout import dropout, fold_in, keep_mask
from flax_lstm.over_time import Cell


def drop_connect(params: Any, key: Array, rate: float) -> Any:
    """Sets a share of the recurrent weights to zero and scales the others up.

    Wan et al. (2013) on the recurrent kernel, as in Merity, Keskar & Socher (2018): one
    draw for the whole batch and all its steps.

    Args:
      params: Any NamedTuple of parameters with a `recurrent_kernel`.
      key: One key.
      rate: Share to drop, in [0, 1).

    Returns:
      The parameters with another recurrent kernel.

    Raises:
      ValueError: If the rate is outside [0, 1).
    """
    return params._replace(recurrent_kernel=dropout(params.recurrent_kernel, key, rate))


def recurrent_mask(
    key: Array, shape: tuple[int, ...], rate: float, dtype: Any = jnp.float32
) -> Float[Array, "*B H"]:
    """Draws what `recurrent_dropout` multiplies with: 0, or 1 / (1 - rate).

    Args:
      key: One key, or one for each row.
      shape: `(*B, H)`.
      rate: Share to drop, in [0, 1).
      dtype: Computation dtype.

    Returns:
      The mask, `[*B, H]`, one for all steps of a sequence.

    Raises:
      ValueError: If the rate is outside [0, 1).
    """
    return dropout(jnp.ones((1, *shape), dtype), key, rate)[0]


def recurrent_dropout(cell: Cell, mask: Float[Array, "*B H"]) -> Cell:
    """Returns a cell whose recurrent input is `h * mask`; Gal & Ghahramani (2016).

    Args:
      cell: A cell with a state that has `h`.
      mask: From `recurrent_mask`. The state and the outputs are not masked.
    """

    def dropped(params: Any, state: Any, x: Any) -> tuple[Any, Any]:
        masked = state._replace(h=state.h * mask.astype(state.h.dtype))
        return cell(params, masked, x)

    return dropped


def zoneout_masks(
    key: Array, shape: tuple[int, ...], *, c: float = 0.0, h: float = 0.0
) -> LSTMState:
    """Draws where `zoneout` holds c and h as they were before the step.

    Args:
      key: One key, or one for each row.
      shape: `(T, *B, H)`.
      c: Probability to hold a value of the cell, in [0, 1).
      h: Probability to hold a value of the output, in [0, 1).

    Returns:
      Boolean masks in the form of a state, each `[T, *B, H]`, true to hold.

    Raises:
      ValueError: If a probability is outside [0, 1).
    """
    check_rates(c=c, h=h)
    return LSTMState(
        c=~keep_mask(fold_in(key, 0), shape, c),
        h=~keep_mask(fold_in(key, 1), shape, h),
    )


def zoneout(cell: Cell) -> Cell:
    """Returns a cell some of whose values stay as they were; Krueger et al. (2017).

    Its input is `(x, hold)`: that of the cell, and one step of `zoneout_masks`.

    Args:
      cell: A cell with a state (c, h) whose output is h.
    """

    def zoned(params: Any, state: Any, at: tuple[Any, LSTMState]) -> tuple[Any, Any]:
        x, hold = at
        new, _ = cell(params, state, x)
        c = jnp.where(hold.c, state.c, new.c)
        h = jnp.where(hold.h, state.h, new.h)
        return new._replace(c=c, h=h), h

    return zoned


def zoneout_mean(cell: Cell, *, c: float = 0.0, h: float = 0.0) -> Cell:
    """Returns the cell for evaluation: old and new values mixed as in the mean.

    Args:
      cell: A cell with a state (c, h) whose output is h.
      c: The probability that the cell was trained with; h likewise.
      h: See c.

    Raises:
      ValueError: If a probability is outside [0, 1).
    """
    check_rates(c=c, h=h)

    def mixed(params: Any, state: Any, x: Any) -> tuple[Any, Any]:
        new, _ = cell(params, state, x)
        new_c = c * state.c + (1 - c) * new.c
        new_h = h * state.h + (1 - h) * new.h
        return new._replace(c=new_c, h=new_h), new_h

    return mixed


def check_rates(**rates: float) -> None:
    """Raises ValueError for a probability outside [0, 1)."""
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise ValueError(f"{name} must be at least 0 and below 1; got {rate}.")
