"""Two layers, one from each end, as one function.

Axes     T time, *B any number of batch axes, I input size, H hidden size.
Resets   Mark the first step of an episode, in the order of the inputs. Nothing crosses
         the boundary before it, in either direction.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flax_lstm.cell import LSTMParams, LSTMState, Pair
from flax_lstm.choice import Implementation
from flax_lstm.loop import Given, live_steps
from flax_lstm.sequence import lstm

MergeName = Literal["concat", "sum", "mean", "mul"]
Merge = MergeName | Callable[[Array, Array], Array]

MERGES: dict[str, Callable[[Array, Array], Array]] = {
    "concat": lambda a, b: jnp.concatenate([a, b], axis=-1),
    "sum": lambda a, b: a + b,
    "mean": lambda a, b: (a + b) / 2,
    "mul": lambda a, b: a * b,
}


def bidirectional(
    forward: LSTMParams,
    backward: LSTMParams,
    inputs: Float[Given, "T *B I"],
    states: tuple[Pair | None, Pair | None] = (None, None),
    *,
    merge: Merge = "concat",
    lengths: Int[Given, "*B"] | None = None,
    resets: Bool[Given, "T *B"] | None = None,
    dtype: Any = None,
    implementation: Implementation | None = None,
    unroll: int = 1,
    remat: bool | int = False,
) -> tuple[tuple[LSTMState, LSTMState], Array]:
    """Runs one layer from the first step, another from the last, and merges them.

    Args:
      forward: Weights of the layer that starts at the first step.
      backward: Weights of the layer that starts at each row's last valid step.
      inputs: `[T, *B, I]`.
      states: Initial state of either layer; zero where None.
      merge: "concat" `[.., 2H]`, "sum", "mean", "mul", or a function of the outputs of
        both layers, in the order of the inputs.
      lengths: As in `lstm`.
      resets: True at the first step of an episode.
      dtype: As in `lstm`.
      implementation: As in `lstm`.
      unroll: As in `lstm`.
      remat: As in `lstm`.

    Returns:
      `((forward_state, backward_state), outputs)`, outputs in the order of the inputs.

    Raises:
      TypeError: As `lstm`.
      ValueError: As `lstm`, or if `merge` is not known.
      NotImplementedError: As `lstm`.
    """
    merged = merge_function(merge)
    options = {
        "lengths": lengths,
        "dtype": dtype,
        "implementation": implementation,
        "unroll": unroll,
        "remat": remat,
    }
    first, ahead = lstm(forward, inputs, states[0], resets=resets, **options)
    second, behind = lstm(
        backward,
        inputs,
        states[1],
        resets=None if resets is None else backward_resets(resets, lengths),
        reverse=True,
        keep_order=True,
        **options,
    )
    return (first, second), merged(ahead, behind)


def merge_function(merge: Merge) -> Callable[[Array, Array], Array]:
    """Returns the function that merges the outputs of two directions.

    Raises:
      ValueError: If `merge` is a name that is not known.
    """
    if callable(merge):
        return merge
    if merge not in MERGES:
        raise ValueError(
            f"merge must be a function or one of {tuple(MERGES)}; got {merge!r}."
        )
    return MERGES[merge]


def backward_resets(
    resets: Bool[Given, "T *B"], lengths: Int[Given, "*B"] | None = None
) -> Bool[Array, "T *B"]:
    """Moves marks at first steps of episodes to the last steps of those before.

    Marks in the padding are left out: they are no first steps of anything.

    >>> backward_resets(jnp.array([True, False, True, False])).tolist()
    [False, True, False, False]
    """
    resets = jnp.asarray(resets)
    if lengths is not None:
        resets = resets & live_steps(resets.shape[0], lengths)
    return jnp.concatenate([resets[1:], jnp.zeros_like(resets[:1])])
