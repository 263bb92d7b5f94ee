"""The loop over epochs: train, validate, save, and know when to stop.

The device is never waited for in the middle of an epoch: the numbers of a step are
read when two more steps have been handed to it. They are all read before a checkpoint
is written, so that no step that met a NaN is ever saved.
"""

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import jax
import numpy as np

from flax_lstm import data
from flax_lstm.checkpoint import Checkpoints
from flax_lstm.config import Config
from flax_lstm.events import EpochDone, Event, StepDone
from flax_lstm.folder import write_line
from flax_lstm.startup import Startup
from flax_lstm.train import Program, check_finite, evaluate, reset_carry

ARREARS = 2
"""Steps handed to the device before the numbers of an earlier one are read."""
EVENT_INTERVAL_S = 0.1
"""Least time between two `StepDone`."""


@dataclasses.dataclass
class Progress:
    """How far a run is: what its checkpoints hold beside the arrays.

    Attributes:
      epoch: Epochs done.
      best_epoch: Epoch of the best validation accuracy; None before the first.
      best_accuracy: That accuracy; None likewise.
      best_loss: Its validation loss, which decides between equal accuracies.
      history: The record of each epoch, as in `metrics.jsonl`.
    """

    epoch: int = 0
    best_epoch: int | None = None
    best_accuracy: float | None = None
    best_loss: float | None = None
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def note(self, accuracy: float | None, loss: float | None) -> bool:
        """Counts one more epoch; says whether it is the best until now.

        The best has the highest validation accuracy, of equals the lowest validation
        loss, of equals again it is the first.
        """
        self.epoch += 1
        if accuracy is None or loss is None:
            return True
        best = (self.best_accuracy, -(self.best_loss or 0.0))
        if best[0] is not None and (accuracy, -loss) <= best:
            return False
        self.best_epoch, self.best_accuracy = self.epoch, accuracy
        self.best_loss = loss
        return True

    def wait_share(self) -> float:
        """Returns the share of all training time that was spent waiting for input."""
        seconds = sum(record["seconds"] for record in self.history)
        waited = sum(one["wait_share"] * one["seconds"] for one in self.history)
        return waited / seconds if seconds else 0.0

    def out_of_patience(self, patience: int | None) -> bool:
        """Says whether `patience` epochs have passed since the best one."""
        if patience is None or self.best_epoch is None:
            return False
        return self.epoch - self.best_epoch >= patience


@dataclasses.dataclass(frozen=True)
class Trainer:
    """What the loop needs beside the state that it changes.

    Attributes:
      config: Configuration of the run.
      corpus: The data.
      lengths: Bucket lengths of the batches.
      batches: Training batches of an epoch.
      program: The compiled steps.
      checkpoints: Where to save.
      metrics_file: Gets a line for each epoch.
      on_event: Is told of steps and epochs.
      meta: Saved with each checkpoint beside the progress.
      startup: Is told of every step handed over.
      clock: Tells the time in seconds.
    """

    config: Config
    corpus: data.Corpus
    lengths: tuple[int, ...]
    batches: int
    program: Program
    checkpoints: Checkpoints
    metrics_file: TextIO
    on_event: Callable[[Event], None]
    meta: dict[str, Any]
    startup: Startup
    clock: Callable[[], float] = time.perf_counter

    def run(self, state: Any, progress: Progress) -> Any:
        """Trains until the last epoch or until patience is out; returns the state.

        Args:
          state: A placed training state; donated.
          progress: Changed in place.

        Raises:
          NonFiniteLossError: If a loss or a gradient is not finite. Nothing is saved
            of that epoch.
        """
        training = self.config.training
        began, tokens = self.clock(), 0
        while progress.epoch < training.epochs and not progress.out_of_patience(
            training.patience
        ):
            state, done = self._train_epoch(
                reset_carry(state), progress.epoch + 1, began, tokens
            )
            tokens += done["tokens"]
            start = self.clock()
            validation = self.evaluate(state, "validation")
            loss = accuracy = None
            if validation is not None:
                loss, accuracy = validation["loss"], validation["accuracy"]
            record = EpochDone(
                **done,
                validation_loss=loss,
                validation_accuracy=accuracy,
                best=progress.note(accuracy, loss),
                validation_seconds=self.clock() - start,
            )
            progress.history.append(dataclasses.asdict(record))
            self.checkpoints.save(
                record.step,
                self.program.fetch(state),
                {**self.meta, "progress": dataclasses.asdict(progress)},
                metric=merit(progress.epoch, accuracy, loss),
            )
            write_line(self.metrics_file, progress.history[-1])
            self.on_event(record)
        return state

    def evaluate(self, state: Any, part: str) -> dict[str, float] | None:
        """Evaluates a placed state on a part; None where the part has no rows."""
        examples = self.corpus.parts.get(part)
        if examples is None or not len(examples):
            return None
        source = data.batches(
            examples, self.lengths, self.config.data, seed=0, epoch=None
        )
        placed = data.prefetch(source, place=self.program.place_batch)
        carry = reset_carry(state).carry
        return evaluate(self.program.eval_step, state.params, placed, carry=carry)

    def _train_epoch(
        self, state: Any, epoch: int, began: float, tokens_before: int
    ) -> tuple[Any, dict[str, Any]]:
        """Trains one epoch; returns the state and the training fields of EpochDone."""
        training = self.config.training
        sizes: collections.deque[int] = collections.deque()
        source = data.batches(
            self.corpus.parts["train"],
            self.lengths,
            self.config.data,
            seed=training.seed,
            epoch=epoch,
        )
        prefetched = data.prefetch(
            counted(source, sizes), place=self.program.place_batch
        )
        tally = Tally()
        pending: collections.deque[Any] = collections.deque()
        start = last_event = self.clock()
        waited, tokens, handed = 0.0, 0, 0

        def read() -> None:
            nonlocal last_event
            metrics = jax.device_get(pending.popleft())
            step = (epoch - 1) * self.batches + tally.steps + 1
            if not metrics["finite"]:
                self.checkpoints.wait()
                check_finite(metrics, step, max(self.checkpoints.steps(), default=None))
            tally.add(metrics)
            now = self.clock()
            if now - last_event >= EVENT_INTERVAL_S or tally.steps == self.batches:
                last_event = now
                self.checkpoints.poll()
                self.on_event(
                    StepDone(
                        epoch,
                        training.epochs,
                        tally.steps,
                        self.batches,
                        tally.loss,
                        tally.accuracy_sum / tally.count,
                        tally.learning_rate,
                        tokens_before + tokens,
                        now - began,
                    )
                )

        with contextlib.closing(prefetched):
            while True:
                asked = self.clock()
                batch = next(prefetched, None)
                waited += self.clock() - asked
                if batch is None:
                    break
                tokens += sizes.popleft()
                state, metrics = self.program.step(state, batch)
                self.startup.first_step()
                handed += 1
                pending.append(metrics)
                if len(pending) > ARREARS:
                    read()
        while pending:
            read()
        seconds = self.clock() - start
        return state, {
            "epoch": epoch,
            "epochs": training.epochs,
            "batch": handed,
            "batches": self.batches,
            "step": epoch * self.batches,
            "train_loss": tally.loss,
            "train_loss_mean": tally.loss_sum / tally.count,
            "train_accuracy": tally.accuracy_sum / tally.count,
            "learning_rate": tally.learning_rate,
            "gradient_norm": tally.gradient_norm,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            "wait_share": waited / seconds,
        }


def merit(epoch: int, accuracy: float | None, loss: float | None) -> float:
    """Returns one number by which `Progress.note` and checkpoints order epochs alike.

    The loss takes off less than 1e-9, and so decides between equal accuracies only:
    others differ by one row of the validation part at least. Without validation the
    last epoch is the best.

    >>> merit(1, 0.75, 0.2) < merit(2, 0.75, 0.1) < merit(3, 0.7501, 9.0)
    True
    """
    if accuracy is None or loss is None:
        return float(epoch)
    return accuracy - 1e-9 * loss / (1 + loss)


@dataclasses.dataclass
class Tally:
    """Sums over the steps of an epoch, in float64, and the numbers of the last one."""

    steps: int = 0
    count: float = 0.0
    loss_sum: float = 0.0
    accuracy_sum: float = 0.0
    loss: float = math.nan
    learning_rate: float = math.nan
    gradient_norm: float = math.nan

    def add(self, metrics: dict[str, Any]) -> None:
        """Adds the metrics of one step, on the host."""
        count = float(metrics["count"])
        self.steps += 1
        self.count += count
        self.loss = float(metrics["loss"])
        self.loss_sum += self.loss * count
        self.accuracy_sum += float(metrics["accuracy"]) * count
        self.learning_rate = float(metrics["learning_rate"])
        self.gradient_norm = float(metrics["grad_norm"])


def counted(source: Iterator[Any], sizes: collections.deque[int]) -> Iterator[Any]:
    """Passes batches on, and notes the number of tokens of each.

    Without lengths the padding is text like any other, and counts.
    """
    for batch in source:
        lengths = batch.lengths
        sizes.append(int(batch.tokens.size if lengths is None else np.sum(lengths)))
        yield batch
