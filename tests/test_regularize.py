"""Noise in the recurrence against NumPy loops that are given the same masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import flax_lstm as fl
from flax_lstm.regularize import (
    drop_connect,
    recurrent_dropout,
    recurrent_mask,
    zoneout,
    zoneout_masks,
    zoneout_mean,
)

pytestmark = pytest.mark.usefixtures("hurried")

T, B, D, H = 5, 3, 2, 4


@pytest.fixture
def call(x64):
    """Parameters, inputs and a state in float64."""
    rng = np.random.default_rng(0)
    shapes = ((D, 4 * H), (H, 4 * H), (4 * H,))
    params = fl.LSTMParams(*(jnp.asarray(rng.normal(size=s)) for s in shapes))
    state = fl.LSTMState(*jnp.asarray(rng.normal(size=(2, B, H))))
    return params, jnp.asarray(rng.normal(size=(T, B, D))), state


def one_step(params, c, h, x):
    """Returns new c and h by the NumPy reference."""
    result = reference.lstm(params, x[None], (c, h))
    return result.c, result.h


def loop(call, change_h, combine):
    """Steps the reference, its input h and its results changed as told."""
    params, xs, (c, h) = call
    c, h, outputs = np.asarray(c), np.asarray(h), []
    for t in range(T):
        new = one_step(params, c, change_h(h), xs[t])
        c, h = combine(t, (c, h), new)
        outputs.append(h)
    return c, h, np.stack(outputs)


def close(got, want):
    final, outputs = got
    for mine, theirs in zip((*final, outputs), want, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-13)


def test_recurrent_dropout_masks_what_recurs_and_nothing_else(call):
    mask = recurrent_mask(jax.random.key(1), (B, H), 0.5, jnp.float64)
    assert set(np.unique(mask)) == {0.0, 2.0}
    got = fl.scan_cell(recurrent_dropout(fl.lstm_cell, mask), *call)
    close(got, loop(call, lambda h: h * np.asarray(mask), lambda t, old, new: new))


def test_zoneout_holds_values(call):
    hold = zoneout_masks(jax.random.key(2), (T, B, H), c=0.5, h=0.25)
    assert hold.c.any()
    assert not hold.c.all()
    assert jnp.any(hold.c != hold.h)
    params, xs, state = call
    got = fl.scan_cell(zoneout(fl.lstm_cell), params, (xs, hold), state)

    def combine(t, old, new):
        return tuple(
            np.where(m[t], o, n) for m, o, n in zip(hold, old, new, strict=True)
        )

    close(got, loop(call, lambda h: h, combine))


def test_zoneout_in_evaluation_mixes_old_and_new(call):
    got = fl.scan_cell(zoneout_mean(fl.lstm_cell, c=0.5, h=0.25), *call)

    def combine(t, old, new):
        return (old[0] + new[0]) / 2, old[1] / 4 + 3 * new[1] / 4

    close(got, loop(call, lambda h: h, combine))


def test_the_noises_go_together_with_lengths_resets_and_gradients(call):
    params, xs, state = call
    mask = recurrent_mask(jax.random.key(1), (B, H), 0.25, jnp.float64)
    hold = zoneout_masks(jax.random.key(2), (T, B, H), c=0.5)
    cell = zoneout(recurrent_dropout(fl.lstm_cell, mask))
    lengths, resets = jnp.array([5, 0, 3]), jnp.zeros((T, B), bool).at[2].set(True)

    def loss(params, xs):
        _, outputs = fl.scan_cell(
            cell, params, (xs, hold), state, lengths=lengths, resets=resets
        )
        return jnp.sum(outputs**2)

    value, (d_params, d_xs) = jax.value_and_grad(loss, (0, 1))(params, xs)
    assert np.isfinite(value)
    np.testing.assert_array_equal(d_xs[:, 1], 0)
    np.testing.assert_array_equal(d_xs[3:, 2], 0)
    step = 1e-6
    moved = params._replace(bias=params.bias + step * jnp.arange(4 * H))
    # A one-sided difference: its error is about the step.
    slope = (loss(moved, xs) - value) / step
    np.testing.assert_allclose(slope, d_params.bias @ jnp.arange(4 * H), rtol=1e-4)


def test_drop_connect_drops_recurrent_weights_and_scales_the_rest(call):
    params, xs, state = call
    dropped = drop_connect(params, jax.random.key(3), 0.75)
    ratio = np.asarray(dropped.recurrent_kernel / params.recurrent_kernel)
    assert set(np.unique(ratio.round(12))) == {0.0, 4.0}
    # 64 draws of probability 1/4: six standard deviations are 21.
    assert abs((ratio > 0).sum() - 16) < 21
    np.testing.assert_array_equal(dropped.kernel, params.kernel)
    want = reference.lstm(dropped, xs, state)
    close(fl.lstm(dropped, xs, state), (want.c, want.h, want.outputs))


def test_masks_depend_on_the_keys_of_their_row_alone():
    keys = jax.random.split(jax.random.key(0), B)
    whole = zoneout_masks(keys, (T, B, H), c=0.5, h=0.5)
    part = zoneout_masks(keys[1:], (T, B - 1, H), c=0.5, h=0.5)
    jax.tree.map(lambda w, p: np.testing.assert_array_equal(w[:, 1:], p), whole, part)
    np.testing.assert_array_equal(
        recurrent_mask(keys, (B, H), 0.5)[1:], recurrent_mask(keys[1:], (B - 1, H), 0.5)
    )


def test_rates_of_zero_change_nothing(call):
    params, xs, state = call
    want = fl.scan_cell(fl.lstm_cell, *call)
    hold = zoneout_masks(jax.random.key(2), (T, B, H))
    mask = recurrent_mask(jax.random.key(1), (B, H), 0.0, jnp.float64)
    cell = zoneout(recurrent_dropout(fl.lstm_cell, mask))
    for got in (
        fl.scan_cell(cell, params, (xs, hold), state),
        fl.scan_cell(zoneout_mean(fl.lstm_cell), *call),
        fl.scan_cell(
            fl.lstm_cell, drop_connect(params, jax.random.key(0), 0.0), xs, state
        ),
    ):
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, 1e-12), got, want)


def test_rates_outside_their_range_are_refused(call):
    key = jax.random.key(0)
    for wrong in (-0.1, 1.0):
        message = f"at least 0 and below 1; got {wrong}"
        with pytest.raises(ValueError, match=message):
            drop_connect(call[0], key, wrong)
        with pytest.raises(ValueError, match=message):
            recurrent_mask(key, (B, H), wrong)
        with pytest.raises(ValueError, match=message):
            zoneout_masks(key, (T, B, H), c=wrong)
        with pytest.raises(ValueError, match=f"h must be {message}"):
            zoneout_mean(fl.lstm_cell, h=wrong)
