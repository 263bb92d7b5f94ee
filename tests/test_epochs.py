"""Bookkeeping of the loop against NumPy; the loop itself is tested with the runs."""

import types

import numpy as np
import pytest

from flax_lstm import epochs
from flax_lstm.config import Config
from flax_lstm.data import Batch
from flax_lstm.epochs import Trainer
from flax_lstm.history import History
from flax_lstm.progress import Progress
from flax_lstm.startup import Startup
from flax_lstm.train import TrainState


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
            "tokens": 6,
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
        corpus=types.SimpleNamespace(parts={"train": None}, shared={}),
        lengths=(3,),
        batches=batches,
        program=types.SimpleNamespace(
            step=step,
            place_batch=None,
            local_rows=lambda size: None,
            agree=lambda wishes: wishes,
        ),
        checkpoints=nothing,
        history=History(),
        on_event=lambda event: None,
        meta={},
        startup=startup,
        clock=clock,
    )
    progress = Progress()
    trainer._train_epoch(TrainState(0, {}, {}, None), progress)
    done = progress.tally
    assert done.seconds == pytest.approx(batches * (to_make + to_train))
    assert done.waited / done.seconds == pytest.approx(share, rel=1e-9)
    assert startup.seconds == to_make + to_train
