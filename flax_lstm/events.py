"""What a run says while it goes on: one frozen dataclass for each kind of event.

A run calls `on_event` with these, in order: `RunStarted`, then for each epoch some
`StepDone` and one `EpochDone`, then `Finished`. An exception raised by `on_event` stops
the run; what was saved until then stays.
"""

import dataclasses
from pathlib import Path
from typing import Any

from flax_lstm.config import Config


@dataclasses.dataclass(frozen=True)
class RunStarted:
    """The data is read and the model drawn or restored; the first step comes next.

    Attributes:
      folder: The run's folder.
      config: The effective configuration.
      data: Summary of the data.
      epochs: Epochs of the run.
      batches: Training batches of an epoch.
      parameters: Number of trained numbers.
      devices: Names of the devices used.
      first_epoch: 1, or the epoch that is gone on with.
      first_batch: 1, or the batch of it that is gone on with.
    """

    folder: Path
    config: Config
    data: dict[str, Any]
    epochs: int
    batches: int
    parameters: int
    devices: tuple[str, ...]
    first_epoch: int
    first_batch: int = 1


@dataclasses.dataclass(frozen=True)
class StepDone:
    """A training step whose numbers have arrived; not every step has an event.

    Attributes:
      epoch: Counted from 1.
      epochs: Epochs of the run.
      batch: Counted from 1, within the epoch.
      batches: Training batches of an epoch.
      loss: Of this batch.
      accuracy: Mean over the rows of this epoch so far.
      learning_rate: Of this step.
      tokens: Tokens read since the run, or its resumption, began.
      seconds: Since the run, or its resumption, began to train.
    """

    epoch: int
    epochs: int
    batch: int
    batches: int
    loss: float
    accuracy: float
    learning_rate: float
    tokens: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class EpochDone:
    """An epoch is trained and validated; the fields of the tutorial's line, and more.

    Attributes:
      epoch: Counted from 1.
      epochs: Epochs of the run.
      batch: Batches trained in this epoch; equal to `batches`.
      batches: Training batches of an epoch.
      step: Training steps since the beginning of the run.
      train_loss: Of the last batch.
      train_loss_mean: Mean over the rows of the epoch.
      train_accuracy: Mean over the rows of the epoch.
      validation_loss: Of the validation part; None where it has no rows.
      validation_accuracy: Likewise.
      best: Whether this is the best epoch until now.
      learning_rate: Of the last step.
      gradient_norm: Of the last step, before clipping.
      tokens: Tokens trained on in this epoch.
      tokens_per_second: Of training, without validation.
      seconds: Training, without validation.
      validation_seconds: Validation.
      wait_share: Share of the training time spent waiting for the next batch.
      skipped: Steps that were left out, their numbers not being finite.
    """

    epoch: int
    epochs: int
    batch: int
    batches: int
    step: int
    train_loss: float
    train_loss_mean: float
    train_accuracy: float
    validation_loss: float | None
    validation_accuracy: float | None
    best: bool
    learning_rate: float
    gradient_norm: float
    tokens: int
    tokens_per_second: float
    seconds: float
    validation_seconds: float
    wait_share: float
    skipped: int = 0


@dataclasses.dataclass(frozen=True)
class Finished:
    """Training is over and the saved checkpoint was tested.

    Attributes:
      folder: The run's folder.
      test: Metrics of the test part; None where it has no rows.
      tested_epoch: Epoch of the checkpoint that was restored and tested.
      best_epoch: Epoch of the best validation accuracy; None without validation.
      epochs_done: Epochs trained.
      stopped_early: Whether `patience` ended training.
      seconds: Since the run, or its resumption, began to train.
      startup_seconds: From the start of the command, or of the call, to the first
        step; None where no step was left to take.
      startup_compile_seconds: What of that it took to compile, or to read compiled
        programs from disk; None likewise.
      startup_import_seconds: What of it went by before the run was asked for.
      startup_data_seconds: What of it the data took.
      wait_share: Share of the training time spent waiting for the next batch.
      skipped_steps: Steps that were left out, their numbers not being finite.
    """

    folder: Path
    test: dict[str, float] | None
    tested_epoch: int
    best_epoch: int | None
    epochs_done: int
    stopped_early: bool
    seconds: float
    startup_seconds: float | None
    startup_compile_seconds: float | None
    startup_import_seconds: float
    startup_data_seconds: float
    wait_share: float
    skipped_steps: int = 0


Event = RunStarted | StepDone | EpochDone | Finished
