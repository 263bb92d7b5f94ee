"""How far a run is: what its checkpoints hold beside the arrays."""

import dataclasses
import math
from typing import Any


@dataclasses.dataclass
class Tally:
    """Sums over the steps of an epoch, in float64, and the numbers of the last one.

    Attributes:
      steps: Batches trained on, those that were skipped included.
      skipped: Batches whose update was not finite and was left out, with their rows.
      count: Rows.
      loss_sum: Losses of the rows.
      accuracy_sum: Rows that were right.
      loss: Of the last batch, as are the next two.
      learning_rate: Likewise.
      gradient_norm: Likewise.
      tokens: Tokens trained on.
      seconds: Time taken, without that between a stop and the resumption.
      waited: Seconds of it that were spent waiting for input.
    """

    steps: int = 0
    skipped: int = 0
    count: float = 0.0
    loss_sum: float = 0.0
    accuracy_sum: float = 0.0
    loss: float = math.nan
    learning_rate: float = math.nan
    gradient_norm: float = math.nan
    tokens: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def add(self, metrics: dict[str, Any]) -> None:
        """Adds the metrics of one step, on the host."""
        self.steps += 1
        self.tokens += int(metrics["tokens"])
        if not metrics["finite"]:
            self.skipped += 1
            return
        count = float(metrics["count"])
        self.count += count
        self.loss = float(metrics["loss"])
        self.loss_sum += self.loss * count
        self.accuracy_sum += float(metrics["accuracy"]) * count
        self.learning_rate = float(metrics["learning_rate"])
        self.gradient_norm = float(metrics["grad_norm"])

    def mean(self, total: float) -> float:
        """Returns a mean over the rows until now; NaN where all were skipped."""
        return total / self.count if self.count else math.nan


@dataclasses.dataclass
class Progress:
    """How far a run is.

    Attributes:
      epoch: Epochs done, validation included.
      best_epoch: Epoch of the best validation accuracy; None before the first.
      best_accuracy: That accuracy; None likewise.
      best_loss: Its validation loss, which decides between equal accuracies.
      tally: The epoch that is under way; its `steps` is the place in the data.
    """

    epoch: int = 0
    best_epoch: int | None = None
    best_accuracy: float | None = None
    best_loss: float | None = None
    tally: Tally = dataclasses.field(default_factory=Tally)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Progress":
        """Returns what `dataclasses.asdict` was given; checks nothing.

        The first format of checkpoints had no tally, being made between epochs alone;
        until the third they held the records of the epochs, which are left out.
        """
        values = {name: value for name, value in values.items() if name != "history"}
        return cls(**{**values, "tally": Tally(**values.get("tally", {}))})

    def note(self, accuracy: float | None, loss: float | None) -> bool:
        """Counts one more epoch; says whether it is the best until now.

        The best has the highest validation accuracy, of equals the lowest validation
        loss, of equals again it is the first.
        """
        self.epoch += 1
        self.tally = Tally()
        if accuracy is None or loss is None:
            return True
        best = (self.best_accuracy, -(self.best_loss or 0.0))
        if best[0] is not None and (accuracy, -loss) <= best:
            return False
        self.best_epoch, self.best_accuracy = self.epoch, accuracy
        self.best_loss = loss
        return True

    def out_of_patience(self, patience: int | None) -> bool:
        """Says whether `patience` epochs have passed since the best one."""
        if patience is None or self.best_epoch is None:
            return False
        return self.epoch - self.best_epoch >= patience


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
