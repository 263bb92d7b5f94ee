"""Numbers that are not finite: found, and told with what to do about them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


class NonFiniteLossError(FloatingPointError):
    """The loss or a gradient is NaN or infinite."""


def nonfinite_leaves(tree: Any) -> list[str]:
    """Returns the names of the floating arrays that hold a NaN or an infinity.

    >>> nonfinite_leaves({"a": jnp.ones(2), "b": {"c": jnp.array([1.0, jnp.inf])}})
    ['b.c']
    """
    finite = jax.device_get(_all_finite(tree))
    return [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, ok in jax.tree.leaves_with_path(finite)
        if not ok
    ]


@jax.jit
def _all_finite(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), tree)


def check_finite(
    metrics: Mapping[str, Any],
    step: int,
    last_checkpoint: int | None,
    rows: str = "its batch",
) -> None:
    """Raises where a step met a number that is not finite.

    Args:
      metrics: Of one step. Reading them waits for the step to end.
      step: Its number, for the message.
      last_checkpoint: Step of the last checkpoint saved, None where there is none.
      rows: What was in the batch, in words.

    Raises:
      NonFiniteLossError: If `metrics["finite"]` is False.
    """
    if bool(metrics["finite"]):
        return
    saved = (
        "no checkpoint has been saved yet"
        if last_checkpoint is None
        else f"the last good checkpoint is that of step {last_checkpoint}"
    )
    raise NonFiniteLossError(
        f"step {step}, with learning rate {float(metrics['learning_rate']):.3g}, gave "
        f"loss {float(metrics['loss'])} and gradient norm "
        f"{float(metrics['grad_norm'])} on {rows}; both must be finite. Its update was "
        f"not applied; {saved}. Try a lower learning_rate, or clip_norm; "
        "--skip-nonfinite leaves such steps out."
    )
