"""Checkpoints that are either right or refused: a thin, careful layer over Orbax.

Each step carries, beside its arrays, the record of `flax_lstm.manifest`, and nothing is
returned that does not match it. Of Orbax the plain `Checkpointer` is used, in
`flax_lstm.storage`; its manager finds steps by their names alone, declines to save by
returning False, and lets NaN be the best.

On disk  FOLDER/STEP/state (the leaves of the pytree under their dotted names) and
         FOLDER/STEP/meta (the record). Both appear at once, when Orbax renames STEP.
Kept     The best step by its metric, and the last two: one to fall back to. What is
         not kept is deleted once a newer one is complete.
"""

import contextlib
import math
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from flax_lstm import distributed
from flax_lstm.config import UserError
from flax_lstm.folder import write_json
from flax_lstm.leaves import Leaf, describe, place, to_save
from flax_lstm.manifest import (
    CheckpointError,
    CheckpointMismatchError,
    CheckpointWarning,
    DamagedCheckpointError,
    compare,
    first,
    make_record,
    read_record,
    recorded_leaves,
)
from flax_lstm.storage import RECORD, Storage, with_digests

__all__ = [
    "CheckpointError",
    "CheckpointMismatchError",
    "CheckpointWarning",
    "Checkpoints",
    "DamagedCheckpointError",
]

UNFINISHED = ".orbax-checkpoint-tmp"
"""What Orbax puts behind the name of a step until it is complete."""
DAMAGED_KEPT = 2
"""Damaged steps that stay on disk to be looked at, so that the folder is bounded."""

Check = Callable[[dict[str, Any]], None]


class Checkpoints:
    """The checkpoints of one run, as a context manager.

    Saving goes on in the background: `save` copies the state to the host and returns.
    An error of a save surfaces at the next call, at the latest when the context ends.
    Several processes save together, and `save` returns when the step is on disk.

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
        self._failure: CheckpointError | None = None
        self._saving: tuple[int, Future] | None = None
        self._needed = 0
        self._warned: set[str] = set()
        if read_only and not self.folder.is_dir():
            raise UserError(
                f"no checkpoints: {self.folder} does not exist; train first, or give "
                "the folder of a finished run."
            )
        if not read_only:
            self.folder.mkdir(parents=True, exist_ok=True)
            if distributed.is_first():
                for orphan in self.folder.glob(f"*{UNFINISHED}*"):
                    remove(orphan)
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._storage = Storage()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except CheckpointError as failure:
            if error is None:
                raise
            error.add_note(str(failure))
        finally:
            self._background.shutdown()
            self._storage.close()

    def steps(self) -> tuple[int, ...]:
        """Returns the complete steps on disk, ascending; foreign folders left out."""
        found = []
        for entry in self.folder.iterdir():
            if not (entry.name.isdecimal() and str(int(entry.name)) == entry.name):
                continue
            whole = (entry / "state").is_dir() and (entry / "meta").is_dir()
            if whole and not entry.is_symlink():  # nothing outside is ever pruned
                found.append(int(entry.name))
            elif entry.exists():  # and was not deleted in this moment
                self._warn(f"{entry} is not a complete checkpoint; it was skipped.")
        return tuple(sorted(found))

    def save(
        self, step: int, state: Any, meta: dict[str, Any], *, metric: float = math.nan
    ) -> None:
        """Saves a pytree of arrays and JSON data as one step.

        Args:
          step: Number of the step, above every step on disk.
          state: Pytree of arrays; typed PRNG keys and None are allowed. Its buffers
            may be donated as soon as this returns.
          meta: Plain JSON data, returned by `restore_last` and `restore_best`.
          metric: The larger the better; NaN is never the best.

        Raises:
          CheckpointError: If the save before it failed.
          ValueError: If the step is not above every step on disk, or this reads only.
        """
        self._begin_writing()
        steps = self.steps()
        if step < 0 or step <= max(steps, default=-1):
            raise ValueError(
                f"step must be above the steps in {self.folder}, {list(steps)}; "
                f"got {step}."
            )
        self._set_aside(step, "foreign")
        arrays, leaves = to_save(state)
        self._needed = sum(array.nbytes for array in arrays.values())
        self._start(step, self._write, step, arrays, leaves, meta, metric)

    def amend(self, step: int, meta: dict[str, Any], *, metric: float) -> None:
        """Gives a complete step other JSON data and another metric; the arrays stay.

        Raises:
          CheckpointError: If a save before it failed.
          DamagedCheckpointError: If its present record is not intact.
        """
        self._begin_writing()
        record = make_record(
            step, recorded_leaves(self._record(step)), meta, metric
        )  # raises before anything is written
        self._start(step, self._rewrite, step, record)

    def poll(self) -> None:
        """Raises the error of a save that failed in the background, if there is one."""
        if self._failure is not None or (self._saving and self._saving[1].done()):
            self.wait()

    def wait(self) -> None:
        """Blocks until the last save is on disk.

        Raises:
          CheckpointError: If it failed.
        """
        if self._saving is not None:
            step, saving = self._saving
            try:
                saving.result()
            except Exception as error:  # Orbax raises whatever it met
                if self._failure is None:
                    self._failure = self._failed(step, error)
                    self._failure.__cause__ = error
            self._saving = None
        if self._failure is not None:
            raise self._failure

    def restore_last(
        self, template: Any, *, check: Check | None = None, cast_dtype: bool = False
    ) -> tuple[Any, dict[str, Any]]:
        """Restores the newest step that verifies; warns of those it skipped.

        Args:
          template: Pytree of arrays or `jax.ShapeDtypeStruct` of the saved structure;
            a leaf with a NamedSharding is placed accordingly.
          check: Is given the meta before the arrays are looked at, and raises where
            it is not the one that is wanted.
          cast_dtype: Converts saved floating numbers to the template's dtypes, which
            otherwise must be the same.

        Returns:
          `(state, meta)`, equal to what was saved bit for bit.

        Raises:
          CheckpointMismatchError: If the newest step has another structure, shape or
            dtype; names the leaf and both.
          CheckpointError: If no step is left that verifies.
        """
        self.wait()
        return self._first_good(lambda: self.steps()[::-1], template, check, cast_dtype)

    def restore_best(
        self, template: Any, *, check: Check | None = None, cast_dtype: bool = False
    ) -> tuple[Any, dict[str, Any]]:
        """Restores the step with the highest metric that verifies, as `restore_last`.

        The earliest of equals is the best; where no step has a metric, the last.
        """
        self.wait()
        return self._first_good(self._ranking, template, check, cast_dtype)

    def _ranking(self) -> tuple[int, ...]:
        """Returns the steps with a readable record, best metric first."""
        ranks = {}
        for step in self.steps():
            try:
                metric = self._record(step)["metric"]
            except DamagedCheckpointError as error:
                self._skip(step, error)
                continue
            ranks[step] = (math.inf, -step) if metric is None else (-metric, step)
        return tuple(sorted(ranks, key=ranks.__getitem__))

    def _first_good(
        self,
        order: Callable[[], tuple[int, ...]],
        template: Any,
        check: Check | None,
        cast_dtype: bool,
    ) -> tuple[Any, dict[str, Any]]:
        damaged: list[int] = []
        # Listed anew after each failure: a writer may meanwhile have pruned the step.
        while steps := [step for step in order() if step not in damaged]:
            step = steps[0]
            try:
                result = self._restore(step, template, check, cast_dtype)
            except DamagedCheckpointError as error:
                if self._skip(step, error):
                    damaged.append(step)
                continue
            if not self.read_only:
                for step in damaged:  # so that its number is free to be saved again
                    self._set_aside(step, "damaged")
            return result
        raise CheckpointError(
            f"no intact checkpoint in {self.folder} (steps found: "
            f"{list(self.steps())}); train again in another folder."
        )

    def _record(self, step: int) -> dict[str, Any]:
        """Reads and verifies the record of a step."""
        return read_record(self._record_path(step), self.folder / str(step))

    def _record_path(self, step: int) -> Path:
        return self.folder / str(step) / RECORD

    def _restore(
        self, step: int, template: Any, check: Check | None, cast_dtype: bool
    ) -> tuple[Any, dict[str, Any]]:
        path = self.folder / str(step)
        record = self._record(step)
        if check is not None:
            check(record["meta"])
        leaves = recorded_leaves(record)
        wanted, structure = describe(template)
        compare(path, leaves, wanted, cast_dtype)
        arrays = self._storage.read(path, leaves)
        values = [
            place(arrays[name], leaves[name], like, wanted[name].dtype)
            for name, like in structure[0]
        ]
        return jax.tree.unflatten(structure[1], values), record["meta"]

    def _begin_writing(self) -> None:
        if self.read_only:
            raise ValueError(f"{self.folder} was opened to be read only; open it anew.")
        self.wait()

    def _start(self, step: int, work: Callable[..., None], *args: Any) -> None:
        self._saving = (step, self._background.submit(work, *args))
        if jax.process_count() > 1:
            # Orbax's barriers are collectives, which cannot run beside a step's.
            self.wait()
            distributed.barrier("saved")  # what is seen next is the same everywhere

    def _write(
        self,
        step: int,
        arrays: dict[str, np.ndarray | jax.Array],
        leaves: dict[str, Leaf],
        meta: dict[str, Any],
        metric: float,
    ) -> None:
        record = make_record(step, with_digests(arrays, leaves), meta, metric)
        self._storage.write(self.folder / str(step), arrays, record)
        if step not in self.steps():
            raise RuntimeError("the step is not on disk")
        self._prune()

    def _rewrite(self, step: int, record: dict[str, Any]) -> None:
        if not distributed.is_first():
            return
        write_json(self._record_path(step), record)
        self._prune()

    def _prune(self) -> None:
        """Deletes what need not be kept."""
        if not distributed.is_first():
            return
        steps = self.steps()
        keep = {*steps[-self.keep_last :], *self._ranking()[:1]}
        for step in steps:
            if step not in keep:
                path = self.folder / str(step)
                # Gone at once for whoever looks, and an orphan if this is killed.
                remove(path.rename(path.with_name(f"{step}{UNFINISHED}-old")))

    def _set_aside(self, step: int, why: str) -> None:
        """Renames what lies where a step is to be saved; nothing of it is deleted."""
        source, n = self.folder / str(step), 0
        if not source.exists() or not distributed.is_first():
            return
        while (target := self.folder / f"{why}-{step}-{n}").exists():
            n += 1
        source.rename(target)
        old = sorted(self.folder.glob("damaged-*"), key=lambda p: p.stat().st_mtime)
        for path in old[:-DAMAGED_KEPT]:
            remove(path)

    def _failed(self, step: int, error: Exception) -> CheckpointError:
        """Returns the failure of a save in words that say what is left."""
        intact = [s for s in self.steps() if s != step]
        left = f"step {intact[-1]} is intact" if intact else "no step was saved yet"
        free = shutil.disk_usage(self.folder).free / 2**20
        return CheckpointError(
            f"saving step {step} to {self.folder} failed: {first(error)} (it needs "
            f"about {self._needed / 2**20:.1f} MiB, {free:.1f} MiB are free there); "
            f"{left}. Resume when there is room and permission to write."
        )

    def _skip(self, step: int, error: DamagedCheckpointError) -> bool:
        """Warns that a step is skipped; says whether it still is there."""
        there = (self.folder / str(step)).exists()
        if there:
            self._warn(f"{error} It was skipped.")
        return there

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, CheckpointWarning, stacklevel=4)


def remove(path: Path) -> None:
    """Deletes a folder, or a link to one but not what it leads to."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path)
