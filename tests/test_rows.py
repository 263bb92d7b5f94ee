"""What a step computes of rows: losses, keys of dropout, counts of tokens."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_lstm import rows


class Batch(NamedTuple):
    tokens: Any
    lengths: Any
    labels: Any
    weights: Any


def test_an_unknown_loss_is_named():
    with pytest.raises(ValueError, match='"mse" or "bce"; got \'hinge\''):
        rows.row_losses("hinge", jnp.zeros(1), jnp.zeros(1))


def test_dropout_differs_by_row_and_step_and_not_by_the_batch_around_it():
    key = jax.random.key(0)
    keys = jax.random.key_data(rows.row_keys(key, 0, 8))
    assert len({tuple(k) for k in np.asarray(keys).tolist()}) == 8
    later = jax.random.key_data(rows.row_keys(key, 4, 4))
    np.testing.assert_array_equal(later, keys[4:])


def test_tokens_are_those_of_the_texts_where_lengths_are_known():
    ones = np.array([1, 1, 0], np.float32)
    batch = Batch(np.zeros((3, 5), np.int32), np.array([5, 2, 4]), ones, ones)
    assert int(rows.count_tokens(batch)) == 7
    assert int(rows.count_tokens(batch._replace(lengths=None))) == 10
