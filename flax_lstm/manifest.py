"""What a checkpoint says of itself: the record that lies beside its arrays.

The record holds the shape, dtype and SHA-256 of every leaf, the step, the metric and
the caller's data, and the SHA-256 of all that. What is read back is believed only
where it agrees.
"""

import dataclasses
import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from flax_lstm.config import UserError, read_limited
from flax_lstm.host_memory import machine_bytes
from flax_lstm.leaves import Leaf, digest_json

FORMAT = 3
"""Version of what is written; a newer one is refused, an older one is read.

1 had no configuration in the data of a run, and no place within an epoch. 2 had one
digest for each leaf, never one for each of its parts, and the records of all epochs.
"""


UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    RecursionError,
)
"""What reading JSON of any content may raise."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none could be read back intact."""


class CheckpointMismatchError(UserError):
    """An intact checkpoint does not have the form that was asked for."""


class DamagedCheckpointError(CheckpointError):
    """What is on disk is not what was saved."""


class CheckpointWarning(UserWarning):
    """A step was skipped."""


def make_record(
    step: int, leaves: dict[str, Leaf], meta: dict[str, Any], metric: float
) -> dict[str, Any]:
    """Returns the record of a checkpoint, as plain JSON data.

    Args:
      step: Its number.
      leaves: Its leaves by name, with their digests.
      meta: The caller's plain JSON data.
      metric: The larger the better; None is recorded where it is not finite.
    """
    record = {
        "format": FORMAT,
        "step": step,
        "metric": float(metric) if math.isfinite(metric) else None,
        "leaves": {name: dataclasses.asdict(leaf) for name, leaf in leaves.items()},
        "versions": {p: version(p) for p in ("jax", "flax", "orbax-checkpoint")},
        "meta": meta,
    }
    record = json.loads(json.dumps(record))
    return {**record, "sha256": digest_json(record)}


def read_record(path: Path, checkpoint: Path) -> dict[str, Any]:
    """Reads a record and verifies it.

    Args:
      path: The file.
      checkpoint: Of which checkpoint, for messages.

    Raises:
      DamagedCheckpointError: If it cannot be read, or does not agree with its digest.
      CheckpointMismatchError: If a newer version of this package wrote it.
    """
    try:
        record = json.loads(read_limited(path))
        claimed = record.pop("sha256")
    except UNREADABLE as error:
        raise DamagedCheckpointError(
            f"checkpoint {checkpoint} is damaged: its meta cannot be read "
            f"({first(error)})."
        ) from error
    if digest_json(record) != claimed:
        raise DamagedCheckpointError(
            f"checkpoint {checkpoint} is damaged: the SHA-256 of its meta does not "
            "match."
        )
    if record["format"] > FORMAT:
        raise CheckpointMismatchError(
            f"checkpoint {checkpoint} has format {record['format']}; this version "
            f"reads up to {FORMAT}. Install a newer flax-lstm."
        )
    return record


def recorded_leaves(record: dict[str, Any]) -> dict[str, Leaf]:
    """Returns the leaves that a record tells of, by name."""
    return {
        name: Leaf(**{**leaf, "shape": tuple(leaf["shape"])})
        for name, leaf in record["leaves"].items()
    }


def compare(
    checkpoint: Path,
    saved: dict[str, Leaf],
    wanted: dict[str, Leaf],
    cast_dtype: bool = False,
) -> None:
    """Raises unless the saved leaves have the form of those that are wanted.

    Args:
      checkpoint: For messages.
      saved: Leaves on disk.
      wanted: Leaves asked for.
      cast_dtype: Takes one floating dtype for another.

    Raises:
      CheckpointMismatchError: Names the leaf and both forms.
    """
    for name in sorted(saved.keys() | wanted.keys()):
        if name not in saved or name not in wanted:
            has, asks = ("has", "not") if name in saved else ("lacks", "but")
            raise CheckpointMismatchError(
                f"checkpoint {checkpoint} {has} {name}, {asks} the configuration asked "
                "for; restore it with the configuration it was made with."
            )
        one, other = saved[name], wanted[name]
        if cast_dtype and floating(one) and floating(other):
            other = dataclasses.replace(other, dtype=one.dtype)
        if one.form() == other.form():
            continue
        advice = ""
        if one.shape == other.shape and floating(one) and floating(other):
            advice = ", or convert it with --cast-dtype"
        raise CheckpointMismatchError(
            f"checkpoint {checkpoint} has {name} {one.form()}, the configuration asks "
            f"for {wanted[name].form()}; restore it with the configuration it was made "
            f"with{advice}."
        )


def check_memory(checkpoint: Path, leaves: dict[str, Leaf]) -> None:
    """Refuses, before any of it is allocated, more than this machine holds."""
    claimed = sum(
        math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
        for leaf in leaves.values()
    )
    there_is = machine_bytes()
    if there_is is not None and claimed > there_is:
        raise CheckpointMismatchError(
            f"checkpoint {checkpoint} claims to hold arrays of "
            f"{claimed / 2**30:,.0f} GiB; this machine has "
            f"{there_is / 2**30:,.0f} GiB. Restore it where there is more memory."
        )


def floating(leaf: Leaf) -> bool:
    """Says whether a leaf holds real numbers: keys and counts are integers."""
    return jnp.issubdtype(jnp.dtype(leaf.dtype), jnp.floating)


def first(error: BaseException, width: int = 200) -> str:
    """Returns the first line of an error's text, shortened."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= width else lines[0][:width] + "…"
