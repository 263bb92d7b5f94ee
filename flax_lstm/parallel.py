"""One training step on one device, by `jax.pmap`, or over a mesh of devices.

Axes     D shares of the rows of a batch, one for each device that has rows of its own.
Rows     A batch, and the LSTM state carried between batches, are split row by row.
Forms    "jit": arrays as they are, on the first device. "sharded": the same arrays over
         a mesh, whose devices may belong to several processes. "pmap": a leading axis D
         on every array.
Sharded  Each device runs the step on its rows (`jax.shard_map`), so that nothing of the
         rows is exchanged but what the step asks for: sums, and the tokens of the batch
         for a sparse update. Along `model` the compiler partitions the step.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from flax_lstm.config import TrainConfig, UserError
from flax_lstm.mesh import DATA, MODEL, make_mesh, sharding, share_of_rows


class Program(NamedTuple):
    """Training and evaluation compiled for some devices.

    Attributes:
      step: `step(state, batch) -> (state, metrics)`. The state given is donated: its
        arrays are gone afterwards. Metrics are scalars in every mode.
      eval_step: `eval_step(params, batch, carry) -> (sums, carry)`, params and carry
        out of a placed state.
      place_state: Copies a state onto the devices.
      place_batch: Puts a batch onto the devices, filled up with rows of weight 0 to a
        multiple of `multiple`. `step` and `eval_step` do so with NumPy batches;
        calling it ahead of them overlaps the copy with the step before. With several
        processes each gives its part of the batch.
      fetch: Returns a placed state as plain arrays, one copy of each, as it was given
        to `place_state`: the form to save. Over a mesh they stay where they are.
      devices: The devices used.
      local_rows: Returns which rows of a batch of this size this process gives; None
        for all.
      agree: Returns the greatest of the numbers that each process gives, as an array
        that is computed behind the steps handed over until now. Several processes must
        call it alike; of one, the numbers come back as they are.
    """

    step: Callable[[Any, Any], tuple[Any, Any]]
    eval_step: Callable[[Any, Any, Any], tuple[Any, Any]]
    place_state: Callable[[Any], Any]
    place_batch: Callable[[Any], Any]
    fetch: Callable[[Any], Any]
    devices: tuple[Any, ...]
    local_rows: Callable[[int], slice | None]
    agree: Callable[[tuple[int, ...]], Any]


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
    config: TrainConfig,
    devices: tuple[Any, ...],
) -> Program:
    """Compiles a training and an evaluation step for some devices.

    Args:
      make_train_step: Returns `step(state, batch) -> (state, metrics)` for the name of
        an axis of devices, or for None.
      make_eval_step: Returns `step(params, batch, carry) -> (sums, carry)`, likewise.
      by_rows: Prefix of the state: True where arrays have the rows of the batch.
      config: `parallel`, `mesh` and `gradient_accumulation` are used.
      devices: At least one.

    Raises:
      UserError: If the settings do not go together.
      ValueError: If the mode is unknown or there is no device.
    """
    mode, processes = config.parallel, {d.process_index for d in devices}
    if mode not in ("jit", "pmap", "sharded") or not devices:
        raise ValueError(
            'mode must be "jit", "pmap" or "sharded", on at least one device; got '
            f"{mode!r} on {len(devices)} devices."
        )
    spread = config.mesh is not None or len(processes) > 1
    if mode == "pmap" and spread:
        raise UserError(
            "parallel = 'pmap' runs on the devices of one process, without a mesh; got "
            f"mesh {config.mesh} and {len(processes)} processes. Give --parallel "
            "sharded."
        )
    steps = (make_train_step, make_eval_step, by_rows)
    if mode == "pmap":
        return _by_pmap(*steps, config.gradient_accumulation, devices)
    if mode == "jit" and not spread:
        devices = devices[:1]
    return _over_mesh(*steps, config, devices)


def _over_mesh(
    make_train_step: Callable,
    make_eval_step: Callable,
    by_rows: Any,
    config: TrainConfig,
    devices: tuple[Any, ...],
) -> Program:
    """Compiles for a mesh, which may be of one device."""
    mesh = make_mesh(config.mesh, devices)
    shares = mesh.shape[DATA]
    whole = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec(DATA))
    part, parts = share_of_rows(mesh, jax.process_index())
    multiple = shares * config.gradient_accumulation
    specs = jax.tree.map(lambda x: rows.spec if x else whole.spec, by_rows)

    def layout(state: Any) -> Any:
        return jax.tree.map(
            lambda split, below: jax.tree.map_with_path(
                lambda path, x: sharding(mesh, _name(path), x, by_rows=split), below
            ),
            by_rows,
            state,
        )

    if shares == 1:  # nobody to share the rows with
        train_step, eval_step = make_train_step(None), make_eval_step(None)
    else:
        # Not checked for values that vary over devices: a loop of a kernel, which
        # knows nothing of devices, could not pass.
        mapped = partial(jax.shard_map, mesh=mesh, axis_names={DATA}, check_vma=False)
        train_step = mapped(
            make_train_step(DATA),
            in_specs=(specs, rows.spec),
            out_specs=(specs, whole.spec),
        )
        eval_step = mapped(
            make_eval_step(DATA),
            in_specs=(whole.spec, rows.spec, rows.spec),
            out_specs=(whole.spec, rows.spec),
        )

    @partial(jax.jit, donate_argnums=0)
    def jitted_step(state: Any, batch: Any) -> tuple[Any, Any]:
        state, metrics = train_step(state, batch)
        placed = lax.with_sharding_constraint(state, layout(state))
        return placed, lax.with_sharding_constraint(metrics, whole)

    @jax.jit
    def jitted_eval_step(params: Any, batch: Any, carry: Any) -> tuple[Any, Any]:
        sums, carry = eval_step(params, batch, carry)
        return lax.with_sharding_constraint(sums, whole), carry

    def place(x: Any, split: bool, where: NamedSharding) -> jax.Array:
        if split:
            _check_rows(x.shape[0], multiple, CARRIED)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = place(jax.random.key_data(x), False, whole)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        if mesh.is_multi_process:
            x = np.asarray(x)
            return jax.make_array_from_callback(x.shape, where, lambda at: x[at])
        # Never the caller's own buffers: the step donates them.
        return jax.device_put(x, where, may_alias=False)

    def place_state(state: Any) -> Any:
        return jax.tree.map(
            lambda split, below, wheres: jax.tree.map(
                lambda x, where: place(x, split, where), below, wheres
            ),
            by_rows,
            state,
            layout(state),
        )

    def place_batch(batch: Any) -> Any:
        batch = pad_batch(batch, multiple // parts)
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(
                rows, x, (len(x) * parts, *x.shape[1:])
            ),
            batch,
        )

    def local_rows(size: int) -> slice | None:
        if parts == 1:
            return None
        share = -(-size // multiple) * multiple // parts
        return slice(part * share, (part + 1) * share)

    by_device = NamedSharding(mesh, PartitionSpec((DATA, MODEL)))
    greatest = jax.jit(lambda x: x.max(0), out_shardings=whole)

    def agree(numbers: tuple[int, ...]) -> Any:
        if not mesh.is_multi_process:
            return numbers
        mine = np.tile(np.asarray(numbers, np.int32), (len(mesh.local_devices), 1))
        shape = (mesh.size, len(numbers))
        return greatest(jax.make_array_from_process_local_data(by_device, mine, shape))

    ready = partial(_ready, multiple, place_batch)
    return Program(
        step=lambda state, batch: jitted_step(state, ready(batch)),
        eval_step=lambda params, batch, carry: jitted_eval_step(
            params, ready(batch), carry
        ),
        place_state=place_state,
        place_batch=place_batch,
        fetch=lambda state: state,
        devices=tuple(mesh.devices.flat),
        local_rows=local_rows,
        agree=agree,
    )


def _by_pmap(
    make_train_step: Callable,
    make_eval_step: Callable,
    by_rows: Any,
    accumulation: int,
    devices: tuple[Any, ...],
) -> Program:
    """Compiles by `jax.pmap`."""
    # The mesh of a pmap has one axis.
    stacked = NamedSharding(
        jax.sharding.Mesh(np.array(devices), (DATA,)), PartitionSpec(DATA)
    )
    multiple = len(devices) * accumulation
    train_step = jax.pmap(
        make_train_step(DATA), DATA, out_axes=(0, None), devices=devices,
        donate_argnums=0,
    )  # fmt: skip
    eval_step = jax.pmap(
        make_eval_step(DATA), DATA, out_axes=(None, 0), devices=devices
    )

    def place(x: Any, split: bool) -> jax.Array:
        # On the host, where nothing has to be compiled for each shape.
        x = x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray(x)
        if split:
            _check_rows(x.shape[0], multiple, CARRIED)
            x = x.reshape(len(devices), -1, *x.shape[1:])
        else:
            namespace = np if isinstance(x, np.ndarray) else jnp
            x = namespace.broadcast_to(x, (len(devices), *x.shape))
        # Never the caller's own buffers: the step donates them.
        return jax.device_put(x, stacked, may_alias=False)

    def fetch_array(x: jax.Array, split: bool) -> jax.Array:
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

    def place_batch(batch: Any) -> Any:
        batch = jax.tree.map(
            lambda x: x.reshape(len(devices), -1, *x.shape[1:]),
            pad_batch(batch, multiple),
        )
        return jax.device_put(batch, stacked)

    ready = partial(_ready, multiple, place_batch)
    return Program(
        step=lambda state, batch: train_step(state, ready(batch)),
        eval_step=lambda params, batch, carry: eval_step(params, ready(batch), carry),
        place_state=lambda state: over_state(place, state),
        place_batch=place_batch,
        fetch=lambda state: over_state(fetch_array, state),
        devices=devices,
        local_rows=lambda size: None,
        agree=lambda numbers: numbers,
    )


CARRIED = "the LSTM state carried between batches"


def _check_rows(count: int, multiple: int, name: str) -> None:
    if count % multiple:
        raise UserError(
            f"{name} has {count} rows, which {multiple} devices and steps of "
            "accumulation cannot share evenly; make batch_size a multiple of "
            f"{multiple}, or pad the batch with place_batch."
        )


def _ready(multiple: int, place_batch: Callable[[Any], Any], batch: Any) -> Any:
    """Returns a batch on the devices, where it may be already."""
    if not isinstance(batch.labels, jax.Array):
        return place_batch(batch)
    _check_rows(batch.labels.size, multiple, "the batch")
    return batch


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
