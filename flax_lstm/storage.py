"""Arrays and their record on disk, by Orbax: written from all processes, and verified.

Orbax writes a step atomically, and checks little when it reads one back: a flipped bit
is restored in silence. So each array has digests in the record, and none is returned
that does not agree with them.

Several  An array that lies in parts in several processes is gathered nowhere: each
         process writes and digests its own parts. Of one that all have whole, each
         takes a part where it can be cut evenly; process 0 writes what is left. Orbax's
         own sharing out among replicas is off: a part is digested by its writer, so
         that replicas which differ in a bit do not make a step that nobody can read.
Reading  Every process reads every array whole, however it was written, so that the
         devices that it then goes to may be others than those it was saved from.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from flax_lstm import distributed
from flax_lstm.config import MOST_JSON_BYTES
from flax_lstm.leaves import Leaf, agrees, digest, own_digests
from flax_lstm.manifest import DamagedCheckpointError, check_memory, first

RECORD = "meta/metadata"
"""The record of a step, under the name that Orbax's JsonCheckpointHandler gives."""


def with_digests(
    arrays: dict[str, np.ndarray | jax.Array], leaves: dict[str, Leaf]
) -> dict[str, Leaf]:
    """Returns leaves with the digests of their arrays; all processes must call it.

    Those of arrays of one process are of process 0, which writes them.
    """
    digests: dict[str, dict[str, str]] = {name: {} for name in arrays}
    for of_process in distributed.gather(
        {n: own_digests(a) for n, a in arrays.items() if isinstance(a, jax.Array)}
    ):
        for name, parts in of_process.items():
            digests[name].update(parts)
    described = {}
    for name, leaf in leaves.items():
        parts, array = digests[name], arrays[name]
        sha256: str | dict[str, str] = parts
        if len(parts) == 1:
            (sha256,) = parts.values()
        elif isinstance(array, np.ndarray):
            sha256 = digest(array) if distributed.is_first() else ""
        described[name] = dataclasses.replace(leaf, sha256=sha256)
    return described


class Storage:
    """Writes and reads the arrays and the record of one step in a folder of its own."""

    def __init__(self) -> None:
        kinds = ocp.type_handlers
        handlers = kinds.create_type_handler_registry(
            # They are copies already.
            (np.ndarray, kinds.NumpyHandler(deepcopy_host_arrays=False)),
            (jax.Array, kinds.ArrayHandler(use_replica_parallel=False)),
        )
        self._orbax = ocp.Checkpointer(
            ocp.CompositeCheckpointHandler(
                state=ocp.PyTreeCheckpointHandler(type_handler_registry=handlers),
                meta=ocp.JsonCheckpointHandler(),
            )
        )

    def close(self) -> None:
        """Ends the threads of Orbax."""
        self._orbax.close()

    def write(
        self,
        path: Path,
        arrays: dict[str, np.ndarray | jax.Array],
        record: dict[str, Any],
    ) -> None:
        """Writes a step, which appears whole or not at all; all processes must call it.

        Args:
          path: A folder that does not exist.
          arrays: By name. NumPy arrays, and the record, are those of process 0.
          record: Plain JSON data.
        """
        stored = {name: array for name, array in arrays.items() if array.size}
        self._orbax.save(
            path,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(stored), meta=ocp.args.JsonSave(record)
            ),
        )

    def read(self, path: Path, leaves: dict[str, Leaf]) -> dict[str, np.ndarray]:
        """Reads the arrays of a step and verifies them against their digests.

        Args:
          path: The folder.
          leaves: What its record tells of, by name.

        Raises:
          DamagedCheckpointError: If they are not what was saved.
          CheckpointMismatchError: If they are more than this machine holds.
        """
        check_memory(path, leaves)
        target = {
            name: np.empty(leaf.shape, jnp.dtype(leaf.dtype))
            for name, leaf in leaves.items()
        }
        stored = {name: array for name, array in target.items() if array.size}
        try:
            self._check_claims(path, stored)
            with distributed.watching():
                arrays = self._orbax.restore(
                    path,
                    args=ocp.args.Composite(
                        state=ocp.args.PyTreeRestore(
                            stored,
                            restore_args=ocp.checkpoint_utils.construct_restore_args(
                                stored
                            ),
                        )
                    ),
                )["state"]
        except distributed.LostProcessError:
            raise
        except Exception as error:  # Orbax raises bare Exception for damaged files
            raise DamagedCheckpointError(
                f"checkpoint {path} is damaged: it cannot be read ({first(error)})."
            ) from error
        for name in stored:
            if not agrees(arrays[name], leaves[name]):
                raise DamagedCheckpointError(
                    f"checkpoint {path} is damaged: the SHA-256 of {name} does not "
                    "match."
                )
        return {**target, **arrays}

    def _check_claims(self, path: Path, stored: dict[str, np.ndarray]) -> None:
        """Refuses what files claim to hold before anything is allocated for it."""
        for name in ("_CHECKPOINT_METADATA", "state/_METADATA"):
            size = (path / name).stat().st_size if (path / name).exists() else 0
            if size > MOST_JSON_BYTES:
                most = MOST_JSON_BYTES // 2**20
                raise ValueError(f"its {name} is larger than {most} MiB")
        metadata: Any = self._orbax.metadata(path).item_metadata
        found = metadata.state.tree
        forms = {name: (m.shape, m.dtype) for name, m in found.items()}
        if forms != {name: (a.shape, a.dtype) for name, a in stored.items()}:
            raise ValueError(f"its arrays have other shapes or dtypes, {forms}")
        for name, m in found.items():  # a chunk is decoded as a whole
            if math.prod(m.storage.chunk_shape) > math.prod(m.shape):
                raise ValueError(f"the chunks of {name} are larger than it is")
