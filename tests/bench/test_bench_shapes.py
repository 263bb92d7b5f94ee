"""Named shapes: their lengths are those of the texts, and the same every time."""

import numpy as np
import pytest

from flax_lstm.bench.shapes import (
    LENGTHS,
    MODES,
    SHAPES,
    SHARES,
    SMOKE_SHAPES,
    Shape,
)

# Of the texts themselves, tokens cut at the shape's T: mean and median.
TEXTS = {"stocktwits": (13.08, 12), "imdb": (230.6, 201)}


@pytest.mark.parametrize("name", TEXTS)
def test_drawn_lengths_have_the_mean_and_median_of_the_texts(name):
    shape = Shape("many", 40_000, SHAPES[name].steps, 1, 1, "", lengths=name)
    lengths = shape.draw_lengths(0)
    mean, median = TEXTS[name]
    # Straight lines between the quantiles: within 2 % of either.
    assert np.mean(lengths) == pytest.approx(mean, rel=0.02)
    assert np.median(lengths) == pytest.approx(median, abs=0.02 * median)
    assert lengths.min() >= 1
    assert lengths.max() <= shape.steps


@pytest.mark.parametrize("name", LENGTHS)
def test_the_quantiles_rise_and_fit_the_shares(name):
    assert len(LENGTHS[name]) == len(SHARES)
    assert list(SHARES) == sorted(SHARES)
    assert list(LENGTHS[name]) == sorted(LENGTHS[name])


def test_draws_depend_on_the_seed_alone():
    shape = SHAPES["stocktwits"]
    np.testing.assert_array_equal(shape.draw_lengths(3), shape.draw_lengths(3))
    assert np.any(shape.draw_lengths(3) != shape.draw_lengths(4))
    resets = SHAPES["rl-256"].draw_resets(0)
    assert resets.shape == (128, 256)
    # 32768 draws at 0.02: the standard deviation of the share is 0.0008.
    assert np.mean(resets) == pytest.approx(0.02, abs=0.004)


def test_shapes_without_lengths_or_resets_have_none():
    assert SHAPES["lm-1024"].draw_lengths(0) is None
    assert SHAPES["lm-1024"].draw_resets(0) is None
    assert SHAPES["rl-256"].one_step().draw_resets(0) is None
    assert SHAPES["imdb"].one_step().steps == 1


@pytest.mark.parametrize("shape", [*SHAPES.values(), *SMOKE_SHAPES.values()])
def test_every_shape_is_timed_in_known_modes(shape):
    assert set(shape.modes) <= set(MODES)
    assert shape.modes
    assert shape.lengths is None or shape.lengths in LENGTHS
