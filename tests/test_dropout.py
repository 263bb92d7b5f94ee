"""Dropout masks: their frequencies, their keys, and the mean that they keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_lstm.dropout import dropout, fold_in, keep_mask, threshold


@pytest.mark.parametrize("rate", [0.5, 0.25, 0.1, 0.9])
def test_share_dropped_is_the_rate_and_values_are_independent(rate):
    mask = np.asarray(keep_mask(jax.random.key(0), (40, 50, 37), rate))
    assert mask.shape == (40, 50, 37)
    n = mask.size
    # Six standard deviations of a mean of n independent values.
    bound = 6 * (rate * (1 - rate) / n) ** 0.5
    assert abs((1 - mask.mean()) - rate) < bound
    centred = mask - (1 - rate)
    for axis in range(3):
        ahead, behind = np.moveaxis(centred, axis, 0)[1:], np.moveaxis(centred, axis, 0)
        product = (ahead * behind[:-1]).mean()
        assert abs(product) < 6 * rate * (1 - rate) / ahead.size**0.5
    # Every place within a word is as likely as any other.
    share = 1 - mask.mean((0, 1))
    assert np.abs(share - rate).max() < 6 * (rate * (1 - rate) / 2000) ** 0.5


def test_kept_values_are_scaled_by_the_rate_that_the_bits_realise():
    values = jnp.ones((30, 20, 10))
    below, width = threshold(0.1)
    assert abs(below / 2**width - 0.1) < 2**-17
    out = np.unique(np.asarray(dropout(values, jax.random.key(0), 0.1)))
    np.testing.assert_allclose(out, [0, 1 / (1 - 6554 / 65536)], rtol=1e-6)
    same = dropout(values, jax.random.key(0), 0.0)
    np.testing.assert_array_equal(same, values)
    half = dropout(values.astype(jnp.bfloat16), jax.random.key(0), 0.5)
    assert half.dtype == jnp.bfloat16
    assert set(np.unique(half.astype(np.float32))) == {0.0, 2.0}


def test_mask_of_a_row_depends_on_its_own_key_alone():
    keys = jax.random.split(jax.random.key(0), 6).reshape(2, 3)
    whole = keep_mask(keys, (7, 2, 3, 5), 0.3)
    one = keep_mask(keys[1, 2], (7, 5), 0.3)
    np.testing.assert_array_equal(whole[:, 1, 2], one)
    part = keep_mask(keys[1:], (7, 1, 3, 5), 0.3)
    np.testing.assert_array_equal(whole[:, 1:], part)


@pytest.mark.parametrize("by_row", [False, True])
def test_mask_of_a_step_does_not_depend_on_the_steps_after_it(by_row):
    key = jax.random.key(0)
    key = jax.random.split(key, 4) if by_row else key
    long, short = (keep_mask(key, (t, 4, 5), 0.5) for t in (9, 3))
    np.testing.assert_array_equal(long[:3], short)


def test_variational_mask_is_the_same_at_every_step():
    out = dropout(jnp.ones((9, 4, 50)), jax.random.key(0), 0.5, variational=True)
    np.testing.assert_array_equal(out, jnp.broadcast_to(out[:1], out.shape))
    assert bool((out == 0).any())


def test_raw_keys_are_taken():
    mask = keep_mask(jax.random.PRNGKey(3), (2, 3, 4), 0.5)
    np.testing.assert_array_equal(mask, keep_mask(jax.random.key(3), (2, 3, 4), 0.5))
    rows = jax.random.split(jax.random.PRNGKey(3), 3)
    typed = jax.random.split(jax.random.key(3), 3)
    np.testing.assert_array_equal(
        keep_mask(fold_in(rows, 1), (2, 3, 4), 0.5),
        keep_mask(fold_in(typed, 1), (2, 3, 4), 0.5),
    )


def test_bad_rates_and_keys_are_refused():
    with pytest.raises(ValueError, match=r"at least 0 and below 1; got 1\.0"):
        threshold(1.0)
    keys = jax.random.split(jax.random.key(0), 2)
    with pytest.raises(ValueError, match=r"shape \(3,\); got keys of shape \(2,\)"):
        keep_mask(keys, (1, 3, 4), 0.5)


def test_derived_keys_differ_by_number_and_by_row():
    keys = jax.random.split(jax.random.key(0), 2)
    drawn = [jax.random.key_data(fold_in(keys, n)) for n in (0, 1)]
    assert len(np.unique(np.concatenate(drawn), axis=0)) == 4
