"""Bookkeeping of the loop against NumPy; the loop itself is tested with the runs."""

import collections

import numpy as np

from flax_lstm.data import Batch
from flax_lstm.epochs import Progress, Tally, counted


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
        best.append(progress.note(accuracy))
    assert best == [True, True, False, False]
    assert (progress.best_epoch, progress.best_accuracy) == (2, 0.7)
    assert [progress.out_of_patience(n) for n in (None, 3, 2, 1)] == [
        False,
        False,
        True,
        True,
    ]


def test_tokens_are_those_of_the_texts_where_lengths_are_known():
    tokens, ones = np.zeros((2, 5), np.int32), np.ones(2, np.float32)
    with_lengths = Batch(tokens, np.array([5, 2], np.int32), ones, ones)
    without = Batch(tokens, None, ones, ones)
    sizes = collections.deque()
    assert len(list(counted(iter([with_lengths, without]), sizes))) == 2
    assert list(sizes) == [7, 10]
