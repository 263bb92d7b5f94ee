"""The way to JAX's cuDNN binding and back, with JAX's own reference in its place.

`jax.experimental.rnn.lstm_ref` reads the weights from the same vector as cuDNN does, by
`unpack_lstm_weights`. What cuDNN itself computes needs a GPU.
"""

import jax
import jax.numpy as jnp
import pytest
import reference
from flax_lstm_kernels.target import on
from jax.experimental import rnn

from flax_lstm import LSTMState, cudnn, init_lstm_params, lstm

pytestmark = pytest.mark.usefixtures("hurried")


def stand_in(x, h, c, weights, lengths, size, hidden, layers, dropout, both, precision):
    """Runs the reference where `rnn.lstm` is called; lengths of 0 it must not see."""
    assert precision in (jax.lax.Precision.HIGH, jax.lax.Precision.HIGHEST)
    unpacked = rnn.unpack_lstm_weights(weights, size, hidden, layers, both)
    y, h, c = rnn.lstm_ref(
        x, h, c, *unpacked, lengths, size, hidden, layers, dropout, both
    )
    return jnp.where(jnp.all(lengths > 0), y, jnp.nan), h, c


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_values_and_gradients_are_those_of_numpy(reverse):
    keys = jax.random.split(jax.random.key(0), 5)
    params = init_lstm_params(keys[0], 3, 5)
    x = jax.random.normal(keys[1], (6, 4, 3))
    state = LSTMState(*jax.random.normal(keys[2], (2, 4, 5)))
    lengths = jnp.array([6, 0, 1, 4], jnp.int32)
    live = jnp.arange(6)[:, None] < lengths[None]

    def run(params, x, state):
        none = jnp.zeros((0, 0), jnp.uint8)
        return cudnn.recurrence(reverse, params, x, state, lengths, none, run=stand_in)

    given = jnp.where(live[..., None], x, jnp.nan)
    ((c, h), y), transpose = jax.vjp(run, params, given, state)
    options = {"lengths": lengths, "reverse": reverse, "keep_order": True}
    want = reference.lstm(params, x, state, **options)
    d_y = jax.random.normal(keys[3], y.shape)
    d_c, d_h = jax.random.normal(keys[4], (2, *c.shape))
    wanted = reference.backward(want, d_y, d_c, d_h)
    d_params, d_x, d_state = transpose((LSTMState(d_c, d_h), d_y))
    got = {**d_params._asdict(), "inputs": d_x, **d_state._asdict()}
    # A few roundings of float32 over 6 steps.
    for value, true in ((y, want.outputs), (c, want.c), (h, want.h)):
        assert reference.error(value, true) < 1e-6
    for name, value in got.items():
        assert reference.error(value, wanted[name]) < 1e-6, name


@pytest.mark.parametrize(
    ("allowed", "precision"),
    [
        (None, jax.lax.Precision.HIGH),
        ("tensorfloat32", jax.lax.Precision.HIGH),
        ("float32", jax.lax.Precision.HIGHEST),
    ],
)
def test_tf32_is_used_where_it_is_allowed(allowed, precision):
    given = []

    def told(x, h, c, *others):
        given.append(others[-1])
        return jnp.zeros((*x.shape[:2], 2)), h, c

    params, zeros = init_lstm_params(jax.random.key(0), 1, 2), jnp.zeros((1, 2))
    with jax.default_matmul_precision(allowed):
        cudnn.recurrence(
            False,
            params,
            jnp.zeros((1, 1, 1)),
            LSTMState(zeros, zeros),
            jnp.ones(1, jnp.int32),
            jnp.zeros((0, 0), jnp.uint8),
            run=told,
        )
    assert given == [precision]


@pytest.fixture
def sizes_told(monkeypatch):
    """Lets the binding be traced, which asks cuDNN for the size of its memory."""
    name = "compute_rnn_workspace_reserve_space_sizes"
    monkeypatch.setattr(rnn.gpu_rnn, name, lambda *_: (0, 64), raising=False)
    with on("cuda", "8.0"):
        yield


def loss(x):
    params = init_lstm_params(jax.random.key(0), 3, 5)
    lengths = jnp.arange(8) % 7
    return jnp.sum(lstm(params, x, lengths=lengths, implementation="cudnn")[1] ** 2)


def test_it_is_called_forward_and_backward(sizes_told):
    program = str(jax.make_jaxpr(jax.grad(loss))(jnp.ones((6, 8, 3))))
    assert program.count("rnn_fwd[") == program.count("rnn_bwd[") == 1


def test_a_vmap_which_the_binding_cannot_do_raises(sizes_told):
    with pytest.raises(NotImplementedError, match="Batching rule"):
        jax.eval_shape(jax.vmap(loss), jnp.ones((1, 6, 8, 3)))
