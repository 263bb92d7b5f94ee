"""The mesh of devices that a run is spread over, and what lies where on it.

Axes  data: the rows of a batch. model: the features of the word vectors and the units
      of the LSTMs, or the last axis of any parameter and of its optimiser slots.
Order Devices are taken in JAX's order, process by process, model fastest.
"""

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flax_lstm.config import ModelConfig, UserError

DATA, MODEL = "data", "model"
IN_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
"""Of XLA_FLAGS: exchanges of CPUs that wait for nothing come in one order everywhere.

As an option of one program it is forgotten when that is read from the compilation
cache (seen with jaxlib 0.10.2), so that it must be there when the process starts."""
FORM = re.compile(r"data=([1-9]\d*)(?:,model=([1-9]\d*))?")


def mesh_sizes(text: str | None, devices: int) -> tuple[int, int]:
    """Returns the sizes of the axes `data` and `model`.

    >>> mesh_sizes("data=2,model=4", 8)
    (2, 4)
    >>> mesh_sizes(None, 8)  # all devices share the rows
    (8, 1)

    Raises:
      UserError: If the text is no mesh, or one of more devices than there are.
    """
    if text is None:
        return devices, 1
    found = FORM.fullmatch(text)
    if not found:
        raise UserError(
            "mesh must be data=N or data=N,model=M with whole numbers above 0; got "
            f"{text!r}."
        )
    data, model = int(found[1]), int(found[2] or 1)
    if data * model > devices:
        raise UserError(
            f"mesh {text} needs {data * model} devices, and there are {devices}; make "
            "it smaller, or start more processes."
        )
    return data, model


def check_mesh(text: str | None, devices: Sequence[Any]) -> None:
    """Refuses a mesh that these devices cannot train on.

    Raises:
      UserError: As `mesh_sizes`, or if CPUs would share `model`. Of several processes:
        Gloo gave one exchange the data of another that was under way at once, and
        ended the run, or it hung. Of one process without `IN_ORDER`: its devices began
        different exchanges, each holding a thread that the others needed, until XLA
        ended the process after a minute. Both were seen with jaxlib 0.10.2.
    """
    _, model = mesh_sizes(text, len(devices))
    processes = {device.process_index for device in devices}
    if model > 1 and len(processes) > 1 and devices[0].platform == "cpu":
        raise UserError(
            f"mesh {text} would spread units and word vectors over devices of "
            f"{len(processes)} processes on CPUs, whose library, Gloo, mixes up "
            "exchanges that are under way at once; give data=N alone, or one process, "
            "or use GPUs or TPUs."
        )
    flags = os.environ.get("XLA_FLAGS", "")
    if model > 1 and devices[0].platform == "cpu" and IN_ORDER not in flags.split():
        raise UserError(
            f"mesh {text} would spread units and word vectors over devices of a CPU, "
            "which may then wait for each other for ever; start again with "
            f"XLA_FLAGS='{' '.join([*flags.split(), IN_ORDER])}', or give data=N alone."
        )


def make_mesh(text: str | None, devices: Sequence[Any]) -> Mesh:
    """Returns the mesh of the first devices that `text` needs.

    Raises:
      UserError: As `mesh_sizes`, or if a process would have no device in it.
    """
    data, model = mesh_sizes(text, len(devices))
    used = devices[: data * model]
    idle = {d.process_index for d in devices} - {d.process_index for d in used}
    if idle:
        raise UserError(
            f"mesh {text} needs {len(used)} devices, and so leaves nothing to do to "
            f"the processes {sorted(idle)}; start fewer processes, or let the mesh "
            f"have all {len(devices)} devices."
        )
    return Mesh(
        np.array(used).reshape(data, model),
        (DATA, MODEL),
        axis_types=(AxisType.Auto, AxisType.Auto),
    )


def share_of_rows(mesh: Mesh, process: int) -> tuple[int, int]:
    """Returns (k, n): a process feeds the k-th of n equal parts of each batch.

    Processes that share their rows, because `model` goes across them, feed the same
    part.

    Raises:
      UserError: If the rows of the process do not lie together.
    """
    of_process = np.array([d.process_index == process for d in mesh.devices.flat])
    (mine,) = np.nonzero(of_process.reshape(mesh.devices.shape).any(axis=1))
    first, count = int(mine[0]), len(mine)
    together = count == mine[-1] - first + 1
    if not together or first % count or mesh.shape[DATA] % count:
        raise UserError(
            f"the mesh {dict(mesh.shape)} gives process {process} the parts "
            f"{mine.tolist()} of each batch, which do not lie together; make model a "
            "divisor or a multiple of the devices of each process."
        )
    return first // count, mesh.shape[DATA] // count


def sharding(mesh: Mesh, name: str, x: Any, *, by_rows: bool) -> NamedSharding:
    """Returns where an array of the training state lies.

    Args:
      mesh: The mesh.
      name: Of the array, for the message.
      x: Array, or its shape and dtype.
      by_rows: Whether its first axis is the rows of a batch.

    Raises:
      UserError: If its last axis cannot be shared by `model`.
    """
    axes: list[str | None] = [None] * len(x.shape)
    if by_rows:
        axes[0] = DATA
    size = mesh.shape[MODEL]
    # A last axis of 1 is the readout's: there is nothing to share.
    if size > 1 and len(x.shape) > int(by_rows) and x.shape[-1] > 1:
        if x.shape[-1] % size:
            raise UserError(
                f"{name} has {x.shape[-1]} columns, which the {size} devices of the "
                "mesh's model axis cannot share evenly; make embedding_size and "
                "features multiples of it."
            )
        axes[-1] = MODEL
    return NamedSharding(mesh, PartitionSpec(*axes))


def model_over_mesh(config: ModelConfig, mesh: str | None) -> ModelConfig:
    """Returns the model with an implementation that can be spread over `model`.

    Kernels work on whole arrays of one device; plain XLA is partitioned by the
    compiler.

    Raises:
      UserError: If a kernel was asked for.
    """
    if mesh is None or mesh_sizes(mesh, len(jax.devices()))[1] == 1:
        return config
    if config.implementation is None:
        return dataclasses.replace(config, implementation="xla")
    if config.implementation not in ("scan", "xla"):
        raise UserError(
            f"implementation {config.implementation!r} runs on whole arrays, and mesh "
            f"{mesh} spreads the units over devices; give --implementation xla, or a "
            "mesh without model."
        )
    return config
