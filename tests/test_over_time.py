"""Any cell over time by the scan; test_sequence holds the LSTM to NumPy."""

import jax.numpy as jnp

import flax_lstm as fl


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
