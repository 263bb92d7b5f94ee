"""One step and the initialiser: closed forms, published rules, the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import flax_lstm as fl
from flax_lstm.cell import draw, state_dtype


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)], ids=str)
def test_one_step_equals_the_reference(x64, batch):
    rng = np.random.default_rng(0)
    params = fl.LSTMParams(*(rng.normal(size=s) for s in ((3, 20), (5, 20), (20,))))
    state = fl.LSTMState(*rng.normal(size=(2, *batch, 5)))
    x = rng.normal(size=(*batch, 3))
    params, state, x = jax.tree.map(jnp.asarray, (params, state, x))
    new, y = fl.lstm_cell(params, state, x)
    want = reference.lstm(params, x[None], state)
    assert reference.error(new.c, want.c) < 1e-14  # about ten roundings of 1e-16
    assert reference.error(new.h, want.h) < 1e-14
    np.testing.assert_array_equal(y, new.h)


def test_gates_stand_in_the_order_input_forget_candidate_output():
    """Each bias alone, driven to saturation, does what its gate is for."""

    def after(i, f, g, o, c=0.5):
        params = fl.LSTMParams(
            jnp.zeros((1, 4)), jnp.zeros((1, 4)), 100.0 * jnp.array([i, f, g, o])
        )
        state = fl.LSTMState(jnp.full((1, 1), c), jnp.zeros((1, 1)))
        new, _ = fl.lstm_cell(params, state, jnp.zeros((1, 1)))
        return new.c.item(), new.h.item()

    tanh = np.tanh
    assert after(-1, 1, 1, 1) == pytest.approx((0.5, tanh(0.5)))  # input shut
    assert after(1, -1, 1, 1) == pytest.approx((1.0, tanh(1.0)))  # old cell forgotten
    assert after(1, 1, -1, 1) == pytest.approx((-0.5, tanh(-0.5)))  # writes -1
    assert after(1, 1, 1, -1) == pytest.approx((1.5, 0.0))  # output shut


@pytest.mark.parametrize(
    ("dtype", "carried"),
    [
        (jnp.float16, jnp.float32),
        (jnp.bfloat16, jnp.float32),
        (jnp.float32, jnp.float32),
        (jnp.float64, jnp.float64),
    ],
)
def test_c_is_carried_in_float32_at_least(x64, dtype, carried):
    assert state_dtype(dtype) == carried
    params = fl.init_lstm_params(jax.random.key(0), 3, 4)
    state = fl.zero_state((2,), 4, dtype)
    assert (state.c.dtype, state.h.dtype) == (carried, dtype)
    new, y = fl.lstm_cell(params, state, jnp.ones((2, 3), dtype))
    assert (new.c.dtype, new.h.dtype, y.dtype) == (carried, dtype, dtype)


def test_zero_state_is_zero_with_the_batch_axes_in_front():
    state = fl.zero_state((2, 3), 4)
    assert state.c.shape == state.h.shape == (2, 3, 4)
    assert not state.c.any()
    assert not state.h.any()


def test_recurrent_blocks_are_orthogonal():
    params = fl.init_lstm_params(jax.random.key(1), 7, 16)
    for block in np.split(np.asarray(params.recurrent_kernel), 4, axis=1):
        np.testing.assert_allclose(block @ block.T, np.eye(16), atol=1e-5)


def test_input_blocks_are_glorot_uniform_gate_by_gate():
    """Bound sqrt(6 / (I + H)), variance its square / 3 (Glorot & Bengio 2010)."""
    params = fl.init_lstm_params(jax.random.key(2), 200, 100)
    bound = np.sqrt(6 / 300)
    for block in np.split(np.asarray(params.kernel), 4, axis=1):
        assert bound * 0.99 < np.abs(block).max() <= bound
        # 20,000 draws: the relative standard error of the variance is 0.0063
        assert np.var(block) == pytest.approx(bound**2 / 3, rel=0.03)


def test_gates_are_drawn_independently():
    params = fl.init_lstm_params(jax.random.key(3), 50, 50)
    flat = np.stack(np.split(np.asarray(params.kernel), 4, axis=1)).reshape(4, -1)
    correlation = np.corrcoef(
        np.vstack([flat, params.recurrent_kernel[:, :50].ravel()])
    )
    # 2,500 draws each: standard error 0.02
    assert np.abs(correlation - np.eye(5)).max() < 0.1


@pytest.mark.parametrize("forget_bias", [0.0, 1.0, 2.5])
def test_forget_bias_is_stored_in_the_forget_part_alone(forget_bias):
    bias = fl.init_lstm_params(jax.random.key(0), 2, 3, forget_bias=forget_bias).bias
    assert bias.reshape(4, 3).tolist() == [[0] * 3, [forget_bias] * 3, [0] * 3, [0] * 3]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sixteen_bit_parameters_are_float32_draws_rounded(dtype):
    low = fl.init_lstm_params(jax.random.key(4), 5, 6, dtype=dtype)
    full = fl.init_lstm_params(jax.random.key(4), 5, 6)
    for a, b in zip(low, full, strict=True):
        assert a.dtype == dtype
        np.testing.assert_array_equal(a, b.astype(dtype))


def test_draw_hands_the_initialiser_at_least_float32():
    seen = []

    def initializer(key, shape, dtype):
        seen.append(jnp.dtype(dtype))
        return jnp.zeros(shape, dtype)

    assert draw(initializer, jax.random.key(0), (2,), jnp.bfloat16).dtype == "bfloat16"
    assert seen == [jnp.float32]


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (-1, 3)], ids=str)
def test_a_size_below_one_is_refused(sizes):
    message = f"must be at least 1; got input_size={sizes[0]}, hidden_size={sizes[1]}"
    with pytest.raises(ValueError, match=message):
        fl.init_lstm_params(jax.random.key(0), *sizes)
