"""Bookkeeping of the loop against NumPy; the loop itself is tested with the runs."""

import collections
import io
import types

import numpy as np
import pytest

from flax_lstm import epochs
from flax_lstm.config import Config
from flax_lstm.data import Batch
from flax_lstm.epochs import Progress, Tally, Trainer, counted, merit
from flax_lstm.startup import Startup
from flax_lstm.train import TrainState


def test_the_tally_is_the_mean_over_rows_not_over_batches():
    rng = np.random.default_rng(0)
    sizes = [16, 16, 3]
    losses = [rng.random(n) for n in sizes]
    right = [rng.random(n) < 0.5 for n in sizes]
    tally = Tally()
    for loss, hit in zip(losses, right, strict=True):
        tally.add(
            {
                "count": float(len(loss)),
                "loss": loss.mean(),
                "accuracy": hit.mean(),
                "learning_rate": 0.5,
                "grad_norm": 2.0,
            }
        )
    assert tally.steps == 3
    np.testing.assert_allclose(
        tally.loss_sum / tally.count, np.concatenate(losses).mean(), rtol=1e-12
    )
    np.testing.assert_allclose(
        tally.accuracy_sum / tally.count, np.concatenate(right).mean(), rtol=1e-12
    )
    assert tally.loss == losses[-1].mean()


def test_patience_counts_from_the_first_of_equals():
    progress, best = Progress(), []
    for accuracy in (0.5, 0.7, 0.7, 0.6):
        best.append(progress.note(accuracy, 0.2))
    assert best == [True, True, False, False]
    assert (progress.best_epoch, progress.best_accuracy) == (2, 0.7)
    assert [progress.out_of_patience(n) for n in (None, 3, 2, 1)] == [
        False,
        False,
        True,
        True,
    ]


def test_the_lower_loss_decides_between_equal_accuracies():
    """And so do the checkpoints, which know one number of each epoch."""
    epochs_done = [(0.7, 0.3), (0.7, 0.2), (0.7, 0.2), (0.8, 5.0), (0.7, 0.0)]
    progress = Progress()
    got = [progress.note(accuracy, loss) for accuracy, loss in epochs_done]
    assert got == [True, True, False, True, False]
    assert (progress.best_epoch, progress.best_loss) == (4, 5.0)
    merits = [merit(n, *done) for n, done in enumerate(epochs_done)]
    assert merits[0] < merits[1] == merits[2] < merits[4] < merits[3]
    million = 1_000_000  # rows, of which one more is right, with the worst of losses
    assert merit(1, 1 / million, 1e30) > merit(2, 0.0, 0.0)
    assert merit(7, None, None) == 7.0


def test_tokens_are_those_of_the_texts_where_lengths_are_known():
    tokens, ones = np.zeros((2, 5), np.int32), np.ones(2, np.float32)
    with_lengths = Batch(tokens, np.array([5, 2], np.int32), ones, ones)
    without = Batch(tokens, None, ones, ones)
    sizes = collections.deque()
    assert len(list(counted(iter([with_lengths, without]), sizes))) == 2
    assert list(sizes) == [7, 10]


class Clock:
    """Stands still until it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("to_make", "to_train", "share"),
    [(3.0, 1.0, 0.75), (0.0, 1.0, 0.0), (1e-6, 1.0, 1e-6 / (1 + 1e-6))],
    ids=["slow source", "ready source", "fast source"],
)
def test_the_wait_for_input_is_the_share_of_the_epoch(
    monkeypatch, as_installed, to_make, to_train, share
):
    """A source and a step that take known times, by a clock that only they move."""
    clock, batches = Clock(), 5
    ones = np.ones(2, np.float32)
    batch = Batch(np.zeros((2, 3), np.int32), None, ones, ones)

    def source(*_, **__):
        for _ in range(batches):
            clock.now += to_make
            yield batch

    def step(state, batch):
        clock.now += to_train
        return state, {
            "finite": True,
            "count": 2.0,
            "loss": 0.25,
            "accuracy": 0.5,
            "learning_rate": 0.1,
            "grad_norm": 1.0,
        }

    # Without its thread, which would move the clock at moments of its own.
    monkeypatch.setattr(epochs.data, "prefetch", lambda items, place: items)
    monkeypatch.setattr(epochs.data, "batches", source)
    startup = Startup(0.0, clock=clock, compiled=lambda: 0.0)
    nothing = types.SimpleNamespace(poll=lambda: None)
    trainer = Trainer(
        config=Config(),
        corpus=types.SimpleNamespace(parts={"train": None}),
        lengths=(3,),
        batches=batches,
        program=types.SimpleNamespace(step=step, place_batch=None),
        checkpoints=nothing,
        metrics_file=io.StringIO(),
        on_event=lambda event: None,
        meta={},
        startup=startup,
        clock=clock,
    )
    _, done = trainer._train_epoch(TrainState(0, {}, {}, None), 1, 0.0, 0)
    assert done["seconds"] == pytest.approx(batches * (to_make + to_train))
    assert done["wait_share"] == pytest.approx(share, rel=1e-9)
    assert startup.seconds == to_make + to_train


def test_the_wait_of_a_run_is_that_of_its_epochs_together():
    """Half of one second and none of three: an eighth of four."""
    history = [
        {"seconds": 1.0, "wait_share": 0.5},
        {"seconds": 3.0, "wait_share": 0.0},
    ]
    assert Progress(history=history).wait_share() == 0.125
    assert Progress().wait_share() == 0.0
