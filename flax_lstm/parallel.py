"""One training step on one device, by `jax.pmap`, or by `jax.jit` over a mesh.

Axes     D devices, B rows of a batch.
Rows     A batch, and the LSTM state carried between batches, are split over the
         devices row by row; all else is on each of them.
Forms    "jit": arrays as they are, on the first device. "sharded": the same arrays
         over a mesh. "pmap": a leading axis D on every array.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "batch"
"""Name of the axis of devices."""


class Program(NamedTuple):
    """Training and evaluation compiled for some devices.

    Attributes:
      step: `step(state, batch) -> (state, metrics)`. The state given is donated: its
        arrays are gone afterwards. Metrics are scalars in every mode.
      eval_step: `eval_step(params, batch, carry) -> (sums, carry)`, params and carry
        out of a placed state.
      place_state: Copies a state onto the devices.
      place_batch: Puts a batch onto the devices, filled up with rows of weight 0 to a
        multiple of their number. `step` and `eval_step` do so with NumPy batches;
        calling it ahead of them overlaps the copy with the step before.
      fetch: Returns a placed state as plain arrays, one copy of each, as it was given
        to `place_state`: the form to save.
      devices: The devices used.
    """

    step: Callable[[Any, Any], tuple[Any, Any]]
    eval_step: Callable[[Any, Any, Any], tuple[Any, Any]]
    place_state: Callable[[Any], Any]
    place_batch: Callable[[Any], Any]
    fetch: Callable[[Any], Any]
    devices: tuple[Any, ...]


def pad_batch(batch: Any, multiple: int) -> Any:
    """Appends rows of weight 0 until the number of rows is a multiple of `multiple`.

    Args:
      batch: Pytree of NumPy arrays `[B, ...]` with `labels` among its fields. The rows
        appended are all zeros: weight 0, length 0.
      multiple: At least 1.
    """
    missing = -len(batch.labels) % multiple
    if not missing:
        return batch
    return jax.tree.map(
        lambda x: np.pad(x, [(0, missing)] + [(0, 0)] * (np.ndim(x) - 1)), batch
    )


def compile_steps(
    make_train_step: Callable[[str | None], Callable],
    make_eval_step: Callable[[str | None], Callable],
    by_rows: Any,
    mode: str,
    devices: tuple[Any, ...],
) -> Program:
    """Compiles a training and an evaluation step for some devices.

    Args:
      make_train_step: Returns `step(state, batch) -> (state, metrics)` for the name of
        a `jax.pmap` axis, or for None.
      make_eval_step: Returns `step(params, batch, carry) -> (sums, carry)`, likewise.
      by_rows: Prefix of the state: True where arrays have the rows of the batch.
      mode: "jit", "pmap" or "sharded".
      devices: At least one; "jit" uses the first.

    Raises:
      ValueError: If the mode is unknown or there is no device.
    """
    if mode not in ("jit", "pmap", "sharded") or not devices:
        raise ValueError(
            'mode must be "jit", "pmap" or "sharded", on at least one device; got '
            f"{mode!r} on {len(devices)} devices."
        )
    if mode == "jit":
        devices = devices[:1]
    mesh = Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec(AXIS))
    stacked = mode == "pmap"
    if stacked:
        train_step = jax.pmap(
            make_train_step(AXIS), AXIS, out_axes=(0, None), devices=devices,
            donate_argnums=0,
        )  # fmt: skip
        eval_step = jax.pmap(
            make_eval_step(AXIS), AXIS, out_axes=(None, 0), devices=devices
        )
    else:
        shardings = jax.tree.map(lambda split: rows if split else whole, by_rows)
        train_step = jax.jit(
            make_train_step(None), donate_argnums=0, out_shardings=(shardings, whole)
        )
        eval_step = jax.jit(make_eval_step(None), out_shardings=(whole, rows))

    def place(x: Any, split: bool) -> jax.Array:
        if split:
            check_rows(x.shape[0], "the LSTM state carried between batches")
        if stacked:
            # On the host, where nothing has to be compiled for each shape.
            x = x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray(x)
            if split:
                x = x.reshape(len(devices), -1, *x.shape[1:])
            else:
                namespace = np if isinstance(x, np.ndarray) else jnp
                x = namespace.broadcast_to(x, (len(devices), *x.shape))
        # Never the caller's own buffers: the step donates them.
        return jax.device_put(x, rows if stacked or split else whole, may_alias=False)

    def fetch_array(x: jax.Array, split: bool) -> jax.Array:
        if not stacked:
            return x
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x[0]
        if split:
            return jnp.asarray(np.asarray(x).reshape(-1, *x.shape[2:]))
        return jnp.asarray(np.asarray(x.addressable_shards[0].data)[0])

    def over_state(function: Callable[[Any, bool], Any], state: Any) -> Any:
        return jax.tree.map(
            lambda split, part: jax.tree.map(lambda x: function(x, split), part),
            by_rows,
            state,
        )

    def check_rows(count: int, name: str) -> None:
        if count % len(devices):
            raise ValueError(
                f"{name} has {count} rows, which {len(devices)} devices cannot share "
                "evenly; make batch_size a multiple of the number of devices, or pad "
                "the batch with place_batch."
            )

    def place_batch(batch: Any) -> Any:
        batch = pad_batch(batch, len(devices))
        if stacked:
            batch = jax.tree.map(
                lambda x: x.reshape(len(devices), -1, *x.shape[1:]), batch
            )
        return jax.device_put(batch, rows)

    def ready(batch: Any) -> Any:
        if not isinstance(batch.labels, jax.Array):
            return place_batch(batch)
        check_rows(batch.labels.size, "the batch")
        return batch

    return Program(
        step=lambda state, batch: train_step(state, ready(batch)),
        eval_step=lambda params, batch, carry: eval_step(params, ready(batch), carry),
        place_state=lambda state: over_state(place, state),
        place_batch=place_batch,
        fetch=lambda state: over_state(fetch_array, state),
        devices=devices,
    )
