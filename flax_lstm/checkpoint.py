"""Checkpoints that are either right or refused: a thin, careful layer over Orbax.

Orbax writes a step atomically, and checks little when it reads one back: a flipped bit
is restored in silence, another dtype is cast in silence, and a failed asynchronous
save is reported once or never. So each step carries, beside its arrays, the shape,
dtype and SHA-256 of every leaf, and nothing is returned that does not match them.

On disk  FOLDER/STEP/state (the leaves of the pytree under their dotted names) and
         FOLDER/STEP/meta (JSON: the table of leaves, the metric, the caller's data).
Kept     The best step by its metric, and the last two: one to fall back to.
"""

import dataclasses
import json
import math
import shutil
import warnings
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from flax_lstm.config import MOST_JSON_BYTES, UserError
from flax_lstm.host_memory import machine_bytes
from flax_lstm.leaves import Leaf, describe, digest, digest_json, place, to_host

FORMAT = 1
"""Version of the layout above; a newer one is refused."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none could be read back intact."""


class CheckpointMismatchError(UserError):
    """An intact checkpoint does not have the form that was asked for."""


class DamagedCheckpointError(CheckpointError):
    """What is on disk is not what was saved."""


class CheckpointWarning(UserWarning):
    """A step was skipped."""


class Checkpoints:
    """The checkpoints of one run, as a context manager.

    Saving is asynchronous: `save` copies the state to the host and returns. An error
    of a save surfaces at the next call, at the latest when the context ends.

    Args:
      folder: Where the steps are; created unless `read_only`.
      read_only: Only restores, changes nothing on disk, and may look on while
        another process writes. A writer must hold the lock of the run's folder.
      keep_last: Newest steps kept besides the best.

    Raises:
      UserError: If `read_only` and the folder does not exist.
    """

    def __init__(
        self, folder: str | Path, *, read_only: bool = False, keep_last: int = 2
    ):
        self.folder = Path(folder).resolve()
        self.read_only = read_only
        self.keep_last = keep_last
        self._failure: Exception | None = None
        self._pending: int | None = None
        self._warned: set[str] = set()
        if read_only and not self.folder.is_dir():
            raise UserError(
                f"no checkpoints: {self.folder} does not exist; train first, or give "
                "the folder of a finished run."
            )
        if not read_only:
            self.folder.mkdir(parents=True, exist_ok=True)
        handlers = {
            "state": ocp.StandardCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        # Steps are deleted here and not by Orbax, whose best_fn lets NaN win, and only
        # once a newer one is complete.
        # Nor is it told to only read: it would log three warnings, and `save` would
        # return False in silence.
        options = ocp.CheckpointManagerOptions(
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            max_to_keep=None,
        )
        self._manager = ocp.CheckpointManager(
            self.folder, options=options, item_handlers=handlers
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._settle()
        finally:
            self._manager.close()
        if self._failure is None:
            return
        if error is None:
            raise self._failure
        error.add_note(str(self._failure))

    def steps(self) -> tuple[int, ...]:
        """Returns the complete steps on disk, ascending; foreign folders left out."""
        found = []
        for entry in self.folder.iterdir():
            if not (entry.name.isdecimal() and entry.is_dir()):
                continue
            whole = (entry / "state").is_dir() and (entry / "meta").is_dir()
            if whole and not entry.is_symlink():  # nothing outside is ever pruned
                found.append(int(entry.name))
            elif int(entry.name) != self._pending:
                self._warn(f"{entry} is not a complete checkpoint; it was skipped.")
        return tuple(sorted(found))

    def save(
        self, step: int, state: Any, meta: dict[str, Any], *, metric: float
    ) -> None:
        """Saves a pytree of arrays and JSON data as one step.

        Args:
          step: Number of the step, above every step on disk.
          state: Pytree of arrays; typed PRNG keys and None are allowed. Its buffers
            may be donated as soon as this returns.
          meta: Plain JSON data, returned by `restore_last` and `restore_best`.
          metric: The larger the better; NaN is never the best.

        Raises:
          CheckpointError: If this save, or the one before it, failed.
          ValueError: If the step is not above every step on disk, or this reads only.
        """
        if self.read_only:
            raise ValueError(f"{self.folder} was opened to be read only; open it anew.")
        self.wait()
        taken = [int(p.name) for p in self.folder.iterdir() if p.name.isdecimal()]
        if step < 0 or step in taken or step <= max(self.steps(), default=-1):
            raise ValueError(
                f"step must be above the steps in {self.folder}, {sorted(taken)}; "
                f"got {step}."
            )
        arrays, leaves = to_host(state)
        record = {
            "format": FORMAT,
            "step": step,
            "metric": float(metric) if math.isfinite(metric) else None,
            "leaves": {name: dataclasses.asdict(leaf) for name, leaf in leaves.items()},
            "versions": {p: version(p) for p in ("jax", "flax", "orbax-checkpoint")},
            "meta": meta,
        }
        record = json.loads(json.dumps(record))
        record["sha256"] = digest_json(record)
        stored = {name: array for name, array in arrays.items() if array.size}
        self._pending = step
        try:
            # force: Orbax otherwise declines, by returning False, where a foreign
            # folder has a higher number.
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(stored),
                    meta=ocp.args.JsonSave(record),
                ),
                force=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise self._fail(error) from error
        if saved is not True:
            raise self._fail(RuntimeError(f"save returned {saved!r}"))

    def poll(self) -> None:
        """Raises the error of a save that failed in the background, if there is one."""
        if self._failure is not None:
            raise self._failure
        try:
            self._manager.check_for_errors()
        except Exception as error:  # Orbax raises whatever its thread met
            raise self._fail(error) from error

    def wait(self) -> None:
        """Blocks until the last save is on disk.

        Raises:
          CheckpointError: If it failed.
        """
        self._settle()
        if self._failure is not None:
            raise self._failure

    def restore_last(self, template: Any) -> tuple[Any, dict[str, Any]]:
        """Restores the newest step that verifies; warns of those it skipped.

        Args:
          template: Pytree of arrays or `jax.ShapeDtypeStruct` of the saved structure;
            a leaf with a NamedSharding is placed accordingly.

        Returns:
          `(state, meta)`, equal to what was saved bit for bit.

        Raises:
          CheckpointMismatchError: If the newest step has another structure, shape or
            dtype; names the leaf and both.
          CheckpointError: If no step is left that verifies.
        """
        self.wait()
        return self._first_good(tuple(reversed(self.steps())), template)

    def restore_best(self, template: Any) -> tuple[Any, dict[str, Any]]:
        """Restores the step with the highest metric that verifies, as `restore_last`.

        The earliest of equals is the best.
        """
        self.wait()
        return self._first_good(self._ranking(), template)

    def _ranking(self) -> tuple[int, ...]:
        """Returns the steps with a readable meta, best metric first."""
        metrics = {}
        for step in self.steps():
            try:
                metric = self._record(step)["metric"]
            except DamagedCheckpointError as error:
                self._warn(f"{error} It was skipped.")
                continue
            metrics[step] = -math.inf if metric is None else metric
        return tuple(sorted(metrics, key=lambda step: (-metrics[step], step)))

    def _first_good(self, steps: tuple[int, ...], template: Any) -> tuple[Any, dict]:
        damaged = []
        for step in steps:
            try:
                result = self._restore(step, template)
            except DamagedCheckpointError as error:
                # A reader may also lose a race with the writer that prunes the step.
                self._warn(f"{error} It was skipped.")
                damaged.append(step)
                continue
            if not self.read_only:
                self._set_aside(damaged)
            return result
        raise CheckpointError(
            f"no intact checkpoint in {self.folder} (steps found: {sorted(steps)}); "
            "train again in another folder."
        )

    def _record(self, step: int) -> dict[str, Any]:
        """Reads and verifies the meta of a step."""
        self._check_sizes(step)
        try:
            record = self._manager.restore(
                step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
            )["meta"]
            claimed = record.pop("sha256")
        except Exception as error:  # Orbax raises bare Exception for damaged files
            raise self._damaged(
                step, f"its meta cannot be read ({first(error)})"
            ) from (error)
        if digest_json(record) != claimed:
            raise self._damaged(step, "the SHA-256 of its meta does not match")
        if record["format"] > FORMAT:
            raise CheckpointMismatchError(
                f"checkpoint {self.folder / str(step)} has format {record['format']}; "
                f"this version reads up to {FORMAT}. Install a newer flax-lstm."
            )
        return record

    def _restore(self, step: int, template: Any) -> tuple[Any, dict[str, Any]]:
        record = self._record(step)
        leaves = {
            name: Leaf(**{**leaf, "shape": tuple(leaf["shape"])})
            for name, leaf in record["leaves"].items()
        }
        wanted, structure = describe(template)
        self._compare(step, leaves, wanted)
        stored = {name: leaf for name, leaf in leaves.items() if 0 not in leaf.shape}
        self._check_memory(step, stored)
        target = {
            name: np.empty(leaf.shape, jnp.dtype(leaf.dtype))
            for name, leaf in stored.items()
        }
        try:
            found = self._manager.item_metadata(step).state.tree
            forms = {name: (m.shape, m.dtype) for name, m in found.items()}
            if forms != {name: (a.shape, a.dtype) for name, a in target.items()}:
                raise ValueError(f"its arrays have other shapes or dtypes, {forms}")
            for name, m in found.items():  # a chunk is decoded as a whole
                if math.prod(m.storage.chunk_shape) > math.prod(m.shape):
                    raise ValueError(f"the chunks of {name} are larger than it is")
            arrays = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
            )["state"]
        except Exception as error:  # Orbax raises bare Exception for damaged files
            raise self._damaged(step, f"it cannot be read ({first(error)})") from error
        for name, leaf in stored.items():
            if digest(arrays[name]) != leaf.sha256:
                raise self._damaged(step, f"the SHA-256 of {name} does not match")
        values = [
            place(arrays.get(name, np.empty(leaf.shape, leaf.dtype)), leaf, like)
            for (name, like), leaf in zip(
                structure[0], map(leaves.__getitem__, wanted), strict=True
            )
        ]
        return jax.tree.unflatten(structure[1], values), record["meta"]

    def _check_sizes(self, step: int) -> None:
        """Refuses JSON files that are too large to be what was saved, unread."""
        entry = self.folder / str(step)
        for name in ("_CHECKPOINT_METADATA", "state/_METADATA", "meta/metadata"):
            path = entry / name
            if path.exists() and path.stat().st_size > MOST_JSON_BYTES:
                most = MOST_JSON_BYTES // 2**20
                raise self._damaged(step, f"its {name} is larger than {most} MiB")

    def _check_memory(self, step: int, leaves: dict[str, Leaf]) -> None:
        """Refuses, before any of it is allocated, more than this machine holds."""
        claimed = sum(
            math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
            for leaf in leaves.values()
        )
        there_is = machine_bytes()
        if there_is is not None and claimed > there_is:
            raise CheckpointMismatchError(
                f"checkpoint {self.folder / str(step)} claims to hold arrays of "
                f"{claimed / 2**30:,.0f} GiB; this machine has "
                f"{there_is / 2**30:,.0f} GiB. Restore it where there is more memory."
            )

    def _compare(
        self, step: int, saved: dict[str, Leaf], wanted: dict[str, Leaf]
    ) -> None:
        """Raises unless the saved leaves have the form of the template's."""
        where = f"checkpoint {self.folder / str(step)}"
        for name in saved.keys() | wanted.keys():
            if name not in saved or name not in wanted:
                has, asks = ("has", "not") if name in saved else ("lacks", "but")
                raise CheckpointMismatchError(
                    f"{where} {has} {name}, {asks} the configuration asked for; "
                    "restore it with the configuration it was made with."
                )
            one, other = saved[name], wanted[name]
            if one.form() != other.form():
                raise CheckpointMismatchError(
                    f"{where} has {name} {one.form()}, the configuration asks for "
                    f"{other.form()}; restore it with the configuration it was made "
                    "with."
                )

    def _settle(self) -> None:
        """Waits for the save under way; then deletes what need not be kept."""
        if self._pending is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # Orbax raises whatever its thread met
            self._fail(error)
            return
        if self._pending not in self.steps():
            self._fail(RuntimeError("the step is not on disk"))
            return
        self._pending = None
        keep = {*self.steps()[-self.keep_last :], *self._ranking()[:1]}
        for step in self.steps():
            if step not in keep:
                self._manager.delete(step)

    def _set_aside(self, steps: list[int]) -> None:
        """Renames damaged steps, so that their numbers are free to be saved again."""
        for step in steps:
            source, n = self.folder / str(step), 0
            while (target := self.folder / f"damaged-{step}-{n}").exists():
                n += 1
            source.rename(target)
        if steps:
            self._manager.reload()

    def _fail(self, error: Exception) -> CheckpointError:
        """Keeps the first failure of a save, in words that say what is left."""
        if self._failure is None:
            step, self._pending = self._pending, None
            intact = [s for s in self.steps() if s != step]
            left = f"step {intact[-1]} is intact" if intact else "no step was saved yet"
            free = shutil.disk_usage(self.folder).free // 2**20
            self._failure = CheckpointError(
                f"saving step {step} to {self.folder} failed: {first(error)} "
                f"({free} MiB are free there); {left}. Resume when there is room and "
                "permission to write."
            )
        assert isinstance(self._failure, CheckpointError)
        return self._failure

    def _damaged(self, step: int, why: str) -> DamagedCheckpointError:
        return DamagedCheckpointError(
            f"checkpoint {self.folder / str(step)} is damaged: {why}."
        )

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, CheckpointWarning, stacklevel=4)


def first(error: BaseException, width: int = 200) -> str:
    """Returns the first line of an error's text, shortened."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= width else lines[0][:width] + "…"
