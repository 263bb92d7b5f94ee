"""The loop over epochs: train, validate, save, and know when to stop.

The device is never waited for in the middle of an epoch: the numbers of a step are
read when two more steps have been handed to it. They are all read before a checkpoint
is written, so that no step that met a NaN is ever saved.

A checkpoint may be made after any step. What follows from there is decided by the state
and the progress that it holds: the order of an epoch is a function of the seed and the
epoch, dropout of the key and the step.
"""

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from flax_lstm import data
from flax_lstm.checkpoint import Checkpoints
from flax_lstm.config import Config, TrainConfig
from flax_lstm.distributed import several
from flax_lstm.events import EpochDone, Event, StepDone
from flax_lstm.feeding import Feed
from flax_lstm.finite import NonFiniteLossError, check_finite, nonfinite_leaves
from flax_lstm.history import History
from flax_lstm.progress import Progress, merit
from flax_lstm.startup import Startup
from flax_lstm.stopping import Stop, Stopped
from flax_lstm.train import (
    Program,
    evaluate,
    reset_carry,
)

ARREARS = 2
"""Steps handed to the device before the numbers of an earlier one are read."""
EVENT_INTERVAL_S = 0.1
"""Least time between two `StepDone`."""
ROWS_NAMED = 8
"""Rows of a batch that the message about it names."""


def place_of(progress: Progress, history: History) -> dict[str, Any]:
    """Returns how far a run is, as its checkpoints hold it beside the arrays."""
    return {"progress": dataclasses.asdict(progress), "history": history.known()}


def goes_on(training: TrainConfig, progress: Progress) -> bool:
    """Says whether there is an epoch left to train, and patience for it."""
    patient = not progress.out_of_patience(training.patience)
    return progress.epoch < training.epochs and patient


@dataclasses.dataclass
class Trainer:
    """What the loop needs beside the state that it changes.

    Attributes:
      config: Configuration of the run.
      corpus: The data.
      lengths: Bucket lengths of the batches.
      batches: Training batches of an epoch.
      program: The compiled steps.
      checkpoints: Where to save.
      history: Gets the record of each epoch.
      on_event: Is told of steps and epochs.
      meta: Saved with each checkpoint beside the progress.
      startup: Is told of every step handed over.
      stop: Whether the run is asked to stop.
      clock: Tells the time in seconds.
    """

    config: Config
    corpus: data.Corpus
    lengths: tuple[int, ...]
    batches: int
    program: Program
    checkpoints: Checkpoints
    history: History
    on_event: Callable[[Event], None]
    meta: dict[str, Any]
    startup: Startup
    stop: Stop = dataclasses.field(default_factory=Stop)
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        self._began = self._reported = self._saved = self.clock()
        self._saved_step = -1
        self._tokens = 0
        self._agreed: tuple[int, ...] = (0, 0)
        local = self.program.local_rows(self.config.data.batch_size)
        self._feed = Feed(self.corpus, self.lengths, self.config.data, local)

    def run(self, state: Any, progress: Progress) -> Any:
        """Trains until the last epoch or until patience is out; returns the state.

        Args:
          state: A placed training state, as the newest checkpoint has it; donated.
          progress: Likewise; changed in place.

        Raises:
          NonFiniteLossError: If a loss, a gradient or a parameter is not finite.
            Nothing is saved of what came after the last checkpoint.
          Stopped: If `stop` was asked; all steps taken are saved.
        """
        self._began = self._reported = self._saved = self.clock()
        self._saved_step = self._step(progress)
        while goes_on(self.config.training, progress):
            if not progress.tally.steps:
                state = reset_carry(state)
            state = self._train_epoch(state, progress)
            self._end_epoch(state, progress)
        return state

    def evaluate(self, state: Any, part: str) -> dict[str, float] | None:
        """Evaluates a placed state on a part; None where the part has no rows.

        Raises:
          Stopped: If `stop` was asked; nothing was changed.
        """
        examples = self.corpus.measured.get(part)
        if examples is None or not len(examples):
            return None
        source = self._feed.batches(part, seed=0, epoch=None)
        placed = data.prefetch(source, place=self.program.place_batch)
        carry = reset_carry(state).carry
        with contextlib.closing(placed):
            return evaluate(
                self.program.eval_step,
                state.params,
                self._until_stopped(placed),
                carry=carry,
            )

    def _until_stopped(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            # One of several processes stops with the others, at a step of training.
            if self.stop.reason is not None and not several():
                raise Stopped(self.stop.reason)
            yield batch

    def _train_epoch(self, state: Any, progress: Progress) -> Any:
        """Trains what is left of an epoch; counts in the tally of `progress`."""
        tally = progress.tally
        pending: collections.deque[Any] = collections.deque()
        last = self.clock()
        source = self._feed.batches(
            "train",
            seed=self.config.training.seed,
            epoch=progress.epoch + 1,
            start=tally.steps,
        )
        tally.waited += self.clock() - last  # for rows that another process holds
        prefetched = data.prefetch(source, place=self.program.place_batch)

        def read(left: int) -> None:
            nonlocal last
            while len(pending) > left:
                self._read(jax.device_get(pending.popleft()), progress)
            now = self.clock()
            tally.seconds += now - last
            last = now

        with contextlib.closing(prefetched):
            while True:
                asked = self.clock()
                batch = next(prefetched, None)
                tally.waited += self.clock() - asked
                if batch is None:
                    break
                reason, due = self._agreed if several() else self._wishes()
                step = self._step(progress) + len(pending)
                if reason or self._due(step) or (due and step != self._saved_step):
                    read(0)
                    self._save(state, progress)
                if reason:
                    raise self._stopped(progress, reason)
                wishes = self.program.agree(self._wishes())
                state, metrics = self.program.step(state, batch)
                self.startup.first_step()
                pending.append({**metrics, "wishes": wishes})
                read(ARREARS)
        read(0)
        return state

    def _read(self, metrics: dict[str, Any], progress: Progress) -> None:
        """Counts a step whose numbers have arrived, and tells of it now and then."""
        tally, training = progress.tally, self.config.training
        tally.add(metrics)
        self._tokens += int(metrics["tokens"])
        # The same step is read at the same place of the loop in every process.
        self._agreed = tuple(int(wish) for wish in metrics["wishes"])
        if not (metrics["finite"] or training.skip_nonfinite):
            self.checkpoints.wait()
            check_finite(
                metrics,
                self._step(progress),
                max(self.checkpoints.steps(), default=None),
                self._rows(progress),
            )
        now = self.clock()
        if now - self._reported < EVENT_INTERVAL_S and tally.steps < self.batches:
            return
        self._reported = now
        self.checkpoints.poll()
        self.on_event(
            StepDone(
                epoch=progress.epoch + 1,
                epochs=training.epochs,
                batch=tally.steps,
                batches=self.batches,
                loss=tally.loss,
                accuracy=tally.mean(tally.accuracy_sum),
                learning_rate=tally.learning_rate,
                tokens=self._tokens,
                seconds=now - self._began,
            )
        )

    def _end_epoch(self, state: Any, progress: Progress) -> None:
        """Validates, saves, and tells of an epoch whose steps are all read."""
        tally = progress.tally
        if tally.skipped == tally.steps:
            raise NonFiniteLossError(
                f"all {tally.steps} steps of epoch {progress.epoch + 1} gave a loss or "
                "a gradient that is not finite, and were skipped: nothing is learned. "
                "Try a lower learning_rate, or clip_norm."
            )
        start = self.clock()
        try:
            validation = self.evaluate(state, "validation")
        except Stopped:
            self._save(state, progress)
            assert self.stop.reason is not None
            raise self._stopped(progress, self.stop.reason) from None
        loss = accuracy = None
        if validation is not None:
            loss, accuracy = validation["loss"], validation["accuracy"]
        record = EpochDone(
            epoch=progress.epoch + 1,
            epochs=self.config.training.epochs,
            batch=tally.steps,
            batches=self.batches,
            step=self._step(progress),
            train_loss=tally.loss,
            train_loss_mean=tally.mean(tally.loss_sum),
            train_accuracy=tally.mean(tally.accuracy_sum),
            validation_loss=loss,
            validation_accuracy=accuracy,
            best=progress.note(accuracy, loss),
            learning_rate=tally.learning_rate,
            gradient_norm=tally.gradient_norm,
            tokens=tally.tokens,
            tokens_per_second=tally.tokens / tally.seconds,
            seconds=tally.seconds,
            validation_seconds=self.clock() - start,
            wait_share=tally.waited / tally.seconds,
            skipped=tally.skipped,
        )
        # Before the checkpoint that knows of it.
        self.history.append(dataclasses.asdict(record))
        self._save(state, progress, merit(progress.epoch, accuracy, loss))
        self.on_event(record)

    def _step(self, progress: Progress) -> int:
        """Returns the number of batches done: the number of a checkpoint."""
        return progress.epoch * self.batches + progress.tally.steps

    def _due(self, step: int) -> bool:
        """Says whether a checkpoint is to be made after this step, by its number."""
        every = self.config.training.save_every
        return every is not None and step % every == 0 and step != self._saved_step

    def _wishes(self) -> tuple[int, int]:
        """Returns why this process is to stop, or 0; and whether it is time to save."""
        minutes = self.config.training.save_minutes
        due = minutes is not None and self.clock() - self._saved >= 60 * minutes
        return self.stop.reason or 0, int(due)

    def _save(self, state: Any, progress: Progress, metric: float = math.nan) -> None:
        """Saves a state all of whose steps are read, unless it is on disk already.

        Raises:
          NonFiniteLossError: If a parameter is not finite.
        """
        step = self._step(progress)
        meta = {**self.meta, **place_of(progress, self.history)}
        if step == self._saved_step:
            if not math.isnan(metric):  # saved before the validation, which is done now
                self.checkpoints.amend(step, meta, metric=metric)
            return
        plain = self.program.fetch(state)
        odd = nonfinite_leaves(
            {"params": plain.params, "optimizer_state": plain.optimizer_state}
        )
        if odd:
            raise NonFiniteLossError(
                f"after step {step} there are numbers that are not finite in {odd[0]} "
                f"and {len(odd) - 1} other arrays, though the loss was finite; that "
                "state is not saved. Try a lower learning_rate."
            )
        self.checkpoints.save(step, plain, meta, metric=metric)
        self._saved_step, self._saved = step, self.clock()
        self._agreed = (self._agreed[0], 0)

    def _stopped(self, progress: Progress, reason: int) -> Stopped:
        """Returns what ends the run, once what it has done is on disk."""
        self.checkpoints.wait()
        total = self.config.training.epochs * self.batches
        return Stopped(
            reason,
            f"stopped after step {self._step(progress)} of {total}, which is saved",
        )

    def _rows(self, progress: Progress) -> str:
        """Returns in words which texts were in the batch that was read last."""
        plan = data.batch_plan(
            self.corpus.measured["train"],
            self.lengths,
            self.config.data,
            seed=self.config.training.seed,
            epoch=progress.epoch + 1,
        )
        rows = sorted(int(row) for row in plan[progress.tally.steps - 1].rows)
        named = ", ".join(str(row) for row in rows[:ROWS_NAMED])
        more = f" and {len(rows) - ROWS_NAMED} more" if len(rows) > ROWS_NAMED else ""
        return f"rows {named}{more} of the training part"
