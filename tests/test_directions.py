"""Both directions against the NumPy reference; internals and pieces of a sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx

import flax_lstm as fl
from flax_lstm import nnx as modules
from flax_lstm.directions import backward_resets, bidirectional

T, B, D, H = 6, 3, 2, 4
LENGTHS = np.array([6, 0, 4])
MERGED = {
    "concat": lambda a, b: np.concatenate([a, b], -1),
    "sum": np.add,
    "mean": lambda a, b: (a + b) / 2,
    "mul": np.multiply,
}


def draw(seed, dtype=np.float64):
    rng = np.random.default_rng(seed)
    shapes = ((D, 4 * H), (H, 4 * H), (4 * H,))
    params = fl.LSTMParams(*(jnp.asarray(rng.normal(size=s), dtype) for s in shapes))
    state = fl.LSTMState(*jnp.asarray(rng.normal(size=(2, B, H)), dtype))
    return params, jnp.asarray(rng.normal(size=(T, B, D)), dtype), state


@pytest.mark.parametrize("merge", [*MERGED, jnp.maximum])
def test_both_directions_equal_numpy(x64, merge):
    (forward, xs, first), (backward, _, second) = draw(0), draw(1)
    states, outputs = bidirectional(
        forward, backward, xs, (first, second), merge=merge, lengths=LENGTHS
    )
    ahead = reference.lstm(forward, xs, first, lengths=LENGTHS)
    behind = reference.lstm(
        backward, xs, second, lengths=LENGTHS, reverse=True, keep_order=True
    )
    merged = MERGED.get(merge, np.maximum) if isinstance(merge, str) else np.maximum
    want = merged(ahead.outputs, behind.outputs)
    np.testing.assert_allclose(outputs, want, rtol=1e-12, atol=1e-13)
    for got, wanted in zip(states, (ahead, behind), strict=True):
        np.testing.assert_allclose(got.c, wanted.c, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(got.h, wanted.h, rtol=1e-12, atol=1e-13)


def test_nothing_crosses_a_reset_in_either_direction(x64):
    """An episode alone gives what it gives in the middle of a batch."""
    (forward, xs, _), (backward, _, _) = draw(0), draw(1)
    resets = jnp.zeros((T, B), bool).at[jnp.array([2, 5])].set(True)
    _, outputs = bidirectional(forward, backward, xs, resets=resets)
    alone = bidirectional(forward, backward, xs[2:5])[1]
    np.testing.assert_allclose(outputs[2:5], alone, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("time_major", [False, True])
def test_the_module_is_the_function(time_major):
    """Whose resets, too, stop both directions."""
    module = modules.BidirectionalLSTM(
        D, H, time_major=time_major, rngs=nnx.Rngs(params=0)
    )
    xs = draw(0, np.float32)[1]
    resets = jnp.zeros((T, B), bool).at[jnp.array([2, 5])].set(True)
    layers = (module.forward_rnn.cell.fused(), module.backward_rnn.cell.fused())
    _, want = bidirectional(*layers, xs, resets=resets, lengths=jnp.asarray(LENGTHS))
    if time_major:
        got = module(xs, resets=resets, seq_lengths=LENGTHS)
    else:
        got = module(jnp.moveaxis(xs, 0, 1), resets=resets.T, seq_lengths=LENGTHS)
        got = jnp.moveaxis(got, 1, 0)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_marks_move_to_the_last_step_before():
    marks = np.random.default_rng(0).random((5, 3)) < 0.5
    want = np.concatenate([marks[1:], np.zeros((1, 3), bool)])
    np.testing.assert_array_equal(backward_resets(marks), want)
    assert backward_resets(marks[:0]).shape == (0, 3)


@pytest.mark.parametrize(
    "time_major", [True, False, None], ids=["TB", "BT", "function"]
)
def test_a_mark_in_the_padding_changes_nothing(time_major):
    """At the first step past the end it would stand at the last one, moved."""
    params, xs, state = draw(0, np.float32)
    module = modules.BidirectionalLSTM(D, H, rngs=nnx.Rngs(0))
    lengths, marks = jnp.array([6, 2, 4]), jnp.zeros((T, B), bool)

    def run(resets):
        options = {"resets": resets, "time_major": time_major, "seq_lengths": lengths}
        if time_major is None:
            states = state, state
            return bidirectional(
                params, params, xs, states, lengths=lengths, resets=resets
            )
        if not time_major:
            options["resets"] = resets.T
        given = xs if time_major else xs.swapaxes(0, 1)
        return module(given, initial_carry=(state, state), return_carry=True, **options)

    past = marks.at[jnp.array([2, 4]), jnp.array([1, 2])].set(True)
    jax.tree.map(np.testing.assert_array_equal, run(past), run(marks))


@pytest.mark.usefixtures("as_installed")
def test_an_unknown_merge_is_named():
    (forward, xs, _), (backward, _, _) = draw(0, np.float32), draw(1, np.float32)
    with pytest.raises(ValueError, match=r"merge must be .*'mul'\); got 'max'"):
        bidirectional(forward, backward, xs, merge="max")


@pytest.mark.parametrize("reverse", [False, True])
def test_internals_are_those_of_numpy(x64, reverse):
    params, xs, state = draw(0)
    options = {"lengths": LENGTHS, "reverse": reverse}
    final, inside = fl.lstm_internals(params, xs, state, **options)
    want = reference.lstm(params, xs, state, **options)
    tapes = want.tape[3]
    for row, tape in enumerate(tapes):
        for step in tape:
            for name in "ifgoc":
                value = step.new_c if name == "c" else getattr(step, name)
                got = getattr(inside, name)[step.write, row]
                np.testing.assert_allclose(got, value, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(inside.h, want.outputs, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(final.c, want.c, rtol=1e-12, atol=1e-13)
    np.testing.assert_array_equal(inside.i[:, 1], 0)


@pytest.mark.parametrize("implementation", ["scan", "xla"])
@pytest.mark.parametrize("cuts", [(1, 2, 3, 4, 5), (2, 2), (5,)], ids=str)
def test_pieces_of_a_sequence_give_the_bits_of_the_whole(implementation, cuts):
    params, xs, state = draw(0, np.float32)
    run = jax.jit(
        lambda xs, state: fl.lstm(params, xs, state, implementation=implementation)
    )
    final, outputs = run(xs, state)
    pieces = []
    for piece in jnp.split(xs, cuts):
        state, y = run(piece, state)
        pieces.append(y)
    np.testing.assert_array_equal(jnp.concatenate(pieces), outputs)
    jax.tree.map(np.testing.assert_array_equal, state, final)
