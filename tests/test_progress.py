"""How far a run is: means against NumPy, and which epoch is the best."""

import dataclasses
import json

import numpy as np

from flax_lstm.progress import Progress, Tally, merit


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
                "tokens": 7 * len(loss),
                "loss": loss.mean(),
                "accuracy": hit.mean(),
                "learning_rate": 0.5,
                "grad_norm": 2.0,
                "finite": True,
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
    assert tally.tokens == 7 * sum(sizes)


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


def test_a_skipped_step_counts_as_a_step_and_in_no_mean():
    good = dict(count=4.0, loss=0.5, accuracy=0.75, learning_rate=0.1, grad_norm=1.0)
    good["tokens"] = 9
    bad = dict(good, loss=np.nan, accuracy=np.nan, grad_norm=np.inf)
    tally = Tally()
    for metrics, finite in ((good, True), (bad, False), (good, True)):
        tally.add({**metrics, "finite": finite})
    assert (tally.steps, tally.skipped, tally.count) == (3, 1, 8.0)
    assert tally.tokens == 27
    assert (tally.mean(tally.loss_sum), tally.mean(tally.accuracy_sum)) == (0.5, 0.75)
    assert (tally.loss, tally.gradient_norm) == (0.5, 1.0)
    assert np.isnan(Tally().mean(0.0))


def test_progress_comes_back_from_json_as_it_was():
    """To the bit: a third and a tenth have no end in binary."""
    progress = Progress(epoch=2, best_epoch=1, best_accuracy=1 / 3, best_loss=0.1)
    progress.tally.add(
        dict(count=3, loss=0.1, accuracy=1 / 3, learning_rate=0.1, grad_norm=7.0)
        | {"finite": True, "tokens": 5}
    )
    kept = json.loads(json.dumps(dataclasses.asdict(progress)))
    assert Progress.from_dict(kept) == progress
    del kept["tally"]  # as in the first format, which knew no place within an epoch
    assert Progress.from_dict(kept) == dataclasses.replace(progress, tally=Tally())
    assert progress.note(0.2, 0.3) is False
    assert progress.tally.steps == 0
