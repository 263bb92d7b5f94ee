"""Any cell over time by the scan; test_sequence holds the LSTM to NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_lstm as fl

T, B, D, H = 5, 3, 2, 4
FULL = jnp.full(B, T)


def arguments():
    params = fl.init_lstm_params(jax.random.key(0), D, H)
    return (
        params,
        jax.random.normal(jax.random.key(1), (T, B, D)),
        fl.zero_state((B,), H),
    )


def test_scan_cell_runs_any_cell_of_the_same_form():
    """A running sum with a reset has a closed form."""

    def add(params, state, x):
        new = state + params * x
        return new, new

    xs = jnp.arange(1.0, 6.0)[:, None, None]
    resets = jnp.array([[False], [False], [True], [False], [False]])
    final, outputs = fl.scan_cell(
        add, 2.0, xs, jnp.full((1, 1), 100.0), lengths=jnp.array([4]), resets=resets
    )
    assert outputs[:, 0, 0].tolist() == [102, 106, 6, 14, 0]
    assert final.tolist() == [[14]]


def test_lengths_of_all_steps_change_neither_values_nor_dtypes_of_the_inputs():
    """Masks stay booleans, `~` of which is not that of integers; keys stay keys."""
    params, xs, state = arguments()
    update = jax.random.bernoulli(jax.random.key(2), 0.5, (T, B, 1))
    keys = jax.random.split(jax.random.key(3), (T, B))

    def cell(params, state, at):
        x, update, keys = at
        (c, h), _ = fl.lstm_cell(params, state, x)
        noise = jax.vmap(jax.random.normal)(keys)[:, None]
        return fl.LSTMState(c, jnp.where(~update, state.h, h + noise)), ~update

    given = params, (xs, update, keys), state
    (want, held), (got, masked) = (
        fl.scan_cell(cell, *given, lengths=lengths) for lengths in (None, FULL)
    )
    assert masked.dtype == held.dtype == jnp.bool_
    np.testing.assert_array_equal(masked, held)
    np.testing.assert_allclose(got.h, want.h, atol=1e-6)  # one program is not the other


def test_a_reset_clears_flags_and_leaves_keys():
    """A state with more in it than numbers: whether something was seen, and a key."""
    key = jax.random.split(jax.random.key(0), 1)

    def cell(params, state, x):
        seen, key = state
        return (seen | (x[:, 0] > 0), key), seen

    xs = jnp.array([1.0, -1.0, -1.0])[:, None, None]
    resets = jnp.array([False, False, True])[:, None]
    state = jnp.zeros(1, bool), key
    (seen, kept), _ = fl.scan_cell(cell, None, xs, state, resets=resets)
    assert seen.tolist() == [False]
    assert (kept == key).all()


WRONG = {
    "resets dtype": (TypeError, {"resets": np.ones((T, B), int)}, "must be booleans"),
    "resets shape": (ValueError, {"resets": np.ones((T, 1), bool)}, r"got \(5, 1\)"),
    "lengths dtype": (TypeError, {"lengths": np.ones(B)}, "must be integers"),
    "lengths shape": (ValueError, {"lengths": np.ones(1, int)}, r"got \(1,\)"),
    "lengths type": (TypeError, {"lengths": [1, 2, 3]}, "must be a JAX or NumPy array"),
    "lengths": (ValueError, {"lengths": np.full(B, 9)}, "must be within 0 … 5"),
}


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize(("kind", "wrong", "message"), WRONG.values(), ids=WRONG)
def test_masks_are_checked_as_those_of_the_lstm(kind, wrong, message):
    for run in (
        fl.lstm,
        lambda *given, **masks: fl.scan_cell(fl.lstm_cell, *given, **masks),
    ):
        with pytest.raises(kind, match=message):
            run(*arguments(), **wrong)
