"""Against Keras 3, on its torch backend: `LSTM`, `StackedRNNCells`, `Bidirectional`.

The behaviours are those that Keras tests of its own LSTM; the numbers are what Keras
computes here from drawn weights. In float64 only without masks and stacked cells: with
them a float64 layer of Keras 3.15 has float32 accuracy on every backend tried.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity_common import (
    FLOAT64,
    Case,
    Result,
    assert_close,
    draw_problem,
    draw_stack,
    float32,
    ours,
    run_stack,
)

from flax_lstm import LSTMState, convert, lstm

torch = pytest.importorskip("torch", reason="Keras computes on it here")
os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras", reason="compares with keras.layers.LSTM")

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("x64")]

SIZES = {"layers": 1, "directions": 1}
CASE = Case(7, 4, 3, 5, lengths=False, **SIZES)


@pytest.fixture(autouse=True)
def _torch_backend():
    assert keras.backend.backend() == "torch", "KERAS_BACKEND must be torch here"


def layer(stack: convert.Stack, *, dtype: str = "float64", **options: Any) -> Any:
    """Returns a built Keras LSTM that holds our weights of one direction."""
    kernel = stack[0][0].kernel
    module = keras.layers.LSTM(kernel.shape[1] // 4, dtype=dtype, **options)
    module.build((2, 3, kernel.shape[0]))
    module.set_weights(convert.to_keras(stack))
    return module


def tensors(*arrays: Any) -> list:
    return [torch.tensor(np.asarray(v), requires_grad=True) for v in arrays]


def major(y: Any) -> np.ndarray:
    """Returns NumPy, batch-major as Keras has it turned to time-major."""
    return np.swapaxes(y.detach().numpy(), 0, 1)


def mask_of(lengths: np.ndarray, steps: int) -> Any:
    return torch.tensor(np.arange(steps)[None] < lengths[:, None])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_outputs_states_and_gradients_equal_keras(dtype, seed):
    masked = dtype == "float32" and seed % 2 == 0
    case = Case.draw(seed, **SIZES, lengths=masked)
    stack = draw_stack(case, seed, dtype)
    problem = draw_problem(case, seed, dtype)
    module = layer(
        stack,
        dtype=dtype,
        return_sequences=True,
        return_state=True,
        zero_output_for_mask=True,
    )
    x, h, c = tensors(problem.x.swapaxes(0, 1), problem.h[0], problem.c[0])
    mask = None if problem.lengths is None else mask_of(problem.lengths, case.steps)
    y, h_n, c_n = module(x, initial_state=[h, c], mask=mask)
    weights = [v.value for v in module.trainable_weights]
    grads = torch.autograd.grad(
        (y, h_n, c_n),
        [x, h, c, *weights],
        grad_outputs=tensors(
            problem.y_bar.swapaxes(0, 1), problem.h_bar[0], problem.c_bar[0]
        ),
    )
    want = Result(
        major(y),
        h_n.detach().numpy()[None],
        c_n.detach().numpy()[None],
        major(grads[0]),
        grads[1].numpy()[None],
        grads[2].numpy()[None],
        convert.from_keras([g.numpy() for g in grads[3:]]),
    )
    tolerance = FLOAT64 if dtype == "float64" else float32(case.steps)
    assert_close(ours(stack, problem), want, tolerance)


@pytest.mark.parametrize("merge", ["concat", "sum", "ave", "mul"])
def test_bidirectional_equals_keras_with_every_merge(merge):
    case = Case(6, 4, 3, 5, 1, 2, True)
    stack = draw_stack(case, 0, np.float32)
    problem = draw_problem(case, 0, np.float32)
    module = keras.layers.Bidirectional(
        keras.layers.LSTM(
            5,
            return_sequences=True,
            zero_output_for_mask=True,
        ),
        merge_mode=merge,
    )
    module.build((4, 6, 3))
    module.set_weights(convert.to_keras(stack))
    x = torch.tensor(problem.x.swapaxes(0, 1))
    want = major(module(x, mask=mask_of(problem.lengths, 6)))
    y, _, _ = run_stack(stack, problem.x, lengths=problem.lengths)
    ahead, back = jnp.split(y, 2, -1)
    merged = {
        "concat": y,
        "sum": ahead + back,
        "ave": (ahead + back) / 2,
        "mul": ahead * back,
    }
    assert_close(merged[merge], want, float32(6))
    read = convert.from_keras(module.get_weights(), bidirectional=True)
    assert_close(read, stack, 0.0)


def test_stacked_cells_equal_keras():
    """Three cells of unequal sizes in one RNN, initialised by Keras."""
    cells = [keras.layers.LSTMCell(n) for n in (4, 6, 5)]
    module = keras.layers.RNN(
        keras.layers.StackedRNNCells(cells),
        return_sequences=True,
        return_state=True,
    )
    x = np.random.default_rng(0).normal(size=(3, 7, 2)).astype(np.float32)
    y, *states = module(torch.tensor(x))
    stack = convert.from_keras(module.get_weights())
    outputs = jnp.asarray(x.swapaxes(0, 1))
    finals = []
    for (params,) in stack:
        final, outputs = lstm(params, outputs)
        finals.append((final.h, final.c))
    assert_close(outputs, major(y), float32(3 * 7))
    want = [tuple(v.detach().numpy() for v in pair) for pair in states]
    assert_close(finals, want, float32(3 * 7))


def test_the_forget_bias_is_set_to_one_in_both():
    module = keras.layers.LSTM(4)
    module.build((2, 3, 5))
    ((params,),) = convert.from_keras(module.get_weights())
    np.testing.assert_array_equal(params.bias, np.repeat([0, 1, 0, 0], 4))


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("unroll", [True, False])
def test_the_last_output_equals_keras(use_bias, unroll):
    module = keras.layers.LSTM(5, use_bias=use_bias, unroll=unroll, dtype="float64")
    x = np.random.default_rng(1).normal(size=(3, 6, 4))
    want = module(torch.tensor(x)).detach().numpy()
    y, _, _ = run_stack(convert.from_keras(module.get_weights()), x.swapaxes(0, 1))
    assert_close(y[-1], want, FLOAT64)


def test_going_backwards_keeps_the_order_of_processing_as_keras():
    stack = draw_stack(CASE, 0, np.float64)
    problem = draw_problem(CASE, 0, np.float64)
    module = layer(stack, go_backwards=True, return_sequences=True, return_state=True)
    y, h, c = module(torch.tensor(problem.x.swapaxes(0, 1)))
    state, outputs = lstm(stack[0][0], jnp.asarray(problem.x), reverse=True)
    want = (h.detach().numpy(), c.detach().numpy(), major(y))
    assert_close((state.h, state.c, outputs), want, FLOAT64)


def test_a_stateful_layer_equals_handing_the_state_on():
    stack = draw_stack(CASE, 0, np.float64)
    problem = draw_problem(CASE, 0, np.float64)
    module = keras.layers.LSTM(5, stateful=True, dtype="float64")
    module.build((4, 7, 3))
    module.set_weights(convert.to_keras(stack))
    x = torch.tensor(problem.x.swapaxes(0, 1))
    state = None
    for _ in range(3):
        want = module(x).detach().numpy()
        state, _ = lstm(stack[0][0], jnp.asarray(problem.x), state)
        assert_close(state.h, want, FLOAT64)
    module.reset_state()
    state, _ = lstm(stack[0][0], jnp.asarray(problem.x))
    assert_close(state.h, module(x).detach().numpy(), FLOAT64)


def test_a_mask_at_the_end_repeats_the_last_output_in_keras_and_zeros_in_ours():
    """A documented difference: Keras can be told to zero, we always do."""
    stack = draw_stack(CASE, 0, np.float32)
    problem = draw_problem(CASE, 0, np.float32)
    lengths = np.array([7, 1, 4, 0])
    module = layer(stack, dtype="float32", return_sequences=True, return_state=True)
    x, h, c = tensors(problem.x.swapaxes(0, 1), problem.h[0], problem.c[0])
    y, h_n, c_n = module(x, initial_state=[h, c], mask=mask_of(lengths, 7))
    state = LSTMState(jnp.asarray(problem.c[0]), jnp.asarray(problem.h[0]))
    state, got = lstm(
        stack[0][0], jnp.asarray(problem.x), state, lengths=jnp.asarray(lengths)
    )
    live = np.arange(7)[:, None] < lengths[None]
    assert_close(np.asarray(got)[live], major(y)[live], float32(7))
    np.testing.assert_array_equal(got[~live], 0)
    assert_close(major(y)[3:, 1], np.repeat(major(y)[:1, 1], 4, 0), 0.0)
    # A length of 0 gives the initial state in both.
    assert_close(
        (state.h, state.c), (h_n.detach().numpy(), c_n.detach().numpy()), float32(7)
    )


def test_left_padding_equals_resets_at_the_first_step():
    """Keras skips masked steps at the start; a reset forgets them."""
    stack = draw_stack(CASE, 0, np.float32)
    problem = draw_problem(CASE, 0, np.float32)
    first = np.array([0, 3, 6, 1])
    steps = np.arange(7)[:, None]
    module = layer(stack, dtype="float32", return_sequences=True)
    mask = torch.tensor((steps >= first[None]).T)
    want = major(module(torch.tensor(problem.x.swapaxes(0, 1)), mask=mask))
    resets = jnp.asarray(steps == first[None])
    _, got = lstm(stack[0][0], jnp.asarray(problem.x), resets=resets)
    live = steps >= first[None]
    assert_close(np.asarray(got)[live], want[live], float32(7))


def test_trained_by_gradient_descent_it_stays_equal_to_keras():
    """Ten steps of plain descent on the same loss, each on its own gradients."""
    stack = draw_stack(CASE, 0, np.float64)
    problem = draw_problem(CASE, 0, np.float64)
    module = layer(stack)
    x = torch.tensor(problem.x.swapaxes(0, 1))
    target = torch.tensor(problem.h_bar[0])
    variables = [v.value for v in module.trainable_weights]

    def loss(stack: convert.Stack) -> jax.Array:
        state, _ = lstm(stack[0][0], jnp.asarray(problem.x))
        return ((state.h - jnp.asarray(problem.h_bar[0])) ** 2).mean()

    descend = jax.jit(
        lambda s: jax.tree.map(lambda p, g: p - 0.5 * g, s, jax.grad(loss)(s))
    )
    for _ in range(10):
        theirs = ((module(x) - target) ** 2).mean()
        grads = torch.autograd.grad(theirs, variables)
        with torch.no_grad():
            for variable, grad in zip(variables, grads, strict=True):
                variable -= 0.5 * grad
        stack = descend(stack)
    assert_close(stack, convert.from_keras(module.get_weights()), FLOAT64)
