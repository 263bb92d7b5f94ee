"""Against the LSTMs of Flax, Haiku and Equinox and JAX's reference of cuDNN's.

Their sides are differentiated by JAX without our derivative rules, through their own
loops. They promote ranks, which our tests otherwise forbid.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.experimental import rnn
from parity_common import (
    FLOAT64,
    Case,
    Problem,
    Result,
    assert_close,
    draw_problem,
    draw_stack,
    float32,
    ours,
)

from flax_lstm import LSTMState, convert, lstm

pytestmark = pytest.mark.parity

FIRST = {"layers": 1, "directions": 1, "lengths": False}
LEAVES = (("kernel", "w"), ("bias", "b"))  # TF1's name and Haiku's
FLAX_CELLS = ["linen plain", "linen optimized", "nnx plain", "nnx optimized"]


def theirs(
    forward: Callable[..., Any],
    weights: Any,
    read_bar: Callable[[Any], convert.Stack],
    problem: Problem,
) -> Result:
    """Returns `forward(weights, x, h, c)`'s outputs, states and gradients.

    `read_bar` brings the gradient of the weights into our form.
    """
    arrays = [jnp.asarray(v) for v in problem[:3]]
    with jax.numpy_rank_promotion("allow"):
        results, pull = jax.vjp(forward, weights, *arrays)
        bars = (problem.y_bar, problem.h_bar, problem.c_bar)
        weights_bar, *bars = pull(tuple(map(jnp.asarray, bars)))
    return Result(*results, *bars, stack_bar=read_bar(weights_bar))


def flax_weights(kind: str, stack: convert.Stack) -> list:
    """Returns our weights as the cell stores them, direction by direction."""
    write = {
        "linen plain": convert.to_linen,
        "linen optimized": convert.to_linen,
        "nnx plain": lambda params: convert.to_nnx(params, cell="plain"),
        "nnx optimized": convert.to_nnx,
    }[kind]
    return [[write(params) for params in layer] for layer in stack]


def flax_stack(kind: str, weights: list) -> convert.Stack:
    """Reads what `flax_weights` wrote."""
    read = convert.from_linen if kind.startswith("linen") else convert.from_nnx
    return tuple(tuple(read(cell) for cell in layer) for layer in weights)


def flax_rnn(
    kind: str, weights: Any, x: Any, carry: Any, lengths: Any, **options: Any
) -> Any:
    """Returns `(carry, outputs)` of Flax's RNN over one of its cells, time-major."""
    api, which = kind.split()
    options |= {"time_major": True, "return_carry": True}
    hidden = carry[0].shape[-1]
    call = {"initial_carry": carry, "seq_lengths": lengths}
    if api == "linen":
        cells = {"plain": linen.LSTMCell, "optimized": linen.OptimizedLSTMCell}
        module = linen.RNN(cells[which](hidden), **options)
        return module.apply({"params": {"cell": weights}}, x, **call)
    cells = {"plain": nnx.LSTMCell, "optimized": nnx.OptimizedLSTMCell}
    cell = cells[which](x.shape[-1], hidden, rngs=nnx.Rngs(0))
    graph, state = nnx.split(cell)
    nnx.replace_by_pure_dict(state, weights)
    return nnx.RNN(nnx.merge(graph, state), **options)(x, **call)


def run_flax(kind: str, problem: Problem) -> Callable[..., Any]:
    """Returns `forward` for `theirs`: Flax's RNNs, stacked and in both directions."""
    lengths = None if problem.lengths is None else jnp.asarray(problem.lengths)

    def forward(weights: Any, x: Any, h: Any, c: Any) -> Any:
        y, carries = x, []
        for layer in weights:
            outputs = []
            for n, cell in enumerate(layer):
                at = len(carries)
                carry, out = flax_rnn(
                    kind,
                    cell,
                    y,
                    (c[at], h[at]),
                    lengths,
                    reverse=n == 1,
                    keep_order=True,
                )
                carries.append(carry)
                outputs.append(out)
            y = jnp.concatenate(outputs, -1)
        if lengths is not None:  # Flax leaves values past the length
            live = jnp.arange(len(y))[:, None] < lengths[None]
            y = jnp.where(live[..., None], y, 0)
        c, h = (jnp.stack(leaves) for leaves in zip(*carries, strict=True))
        return y, h, c

    return forward


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", FLAX_CELLS)
def test_outputs_states_and_gradients_equal_flax_in_float64(kind, seed):
    case = Case.draw(seed)
    stack = draw_stack(case, seed, np.float64)
    problem = draw_problem(case, seed, np.float64)
    weights = flax_weights(kind, stack)
    want = theirs(run_flax(kind, problem), weights, partial(flax_stack, kind), problem)
    assert_close(ours(stack, problem), want, FLOAT64)


@pytest.mark.parametrize("kind", FLAX_CELLS)
def test_outputs_states_and_gradients_equal_flax_in_float32(kind):
    case = Case(9, 3, 4, 5, 2, 2, True)
    stack = draw_stack(case, 0, np.float32)
    problem = draw_problem(case, 0, np.float32)
    want = theirs(
        run_flax(kind, problem),
        flax_weights(kind, stack),
        partial(flax_stack, kind),
        problem,
    )
    assert_close(ours(stack, problem), want, float32(case.layers * case.steps))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("seed", range(4))
def test_outputs_states_and_gradients_equal_haiku_in_float64(seed):
    haiku = pytest.importorskip("haiku", reason="compares with haiku.LSTM")
    case = Case.draw(seed, directions=1, lengths=False)
    stack = draw_stack(case, seed, np.float64)
    problem = draw_problem(case, seed, np.float64)

    def network(x: Any, states: Any) -> Any:
        core = haiku.DeepRNN([haiku.LSTM(case.hidden) for _ in range(case.layers)])
        return haiku.dynamic_unroll(core, x, states)

    apply = haiku.without_apply_rng(haiku.transform(network)).apply

    def forward(weights: Any, x: Any, h: Any, c: Any) -> Any:
        states = [haiku.LSTMState(*pair) for pair in zip(h, c, strict=True)]
        y, states = apply(weights, x, tuple(states))
        return y, *(jnp.stack(s) for s in zip(*states, strict=True))

    def read(bar: Any) -> convert.Stack:
        # A gradient has no forget bias to fold in; TF1's layout is the same otherwise.
        return convert.from_tf1(
            {f"{k}/{n}": v[m] for k, v in bar.items() for n, m in LEAVES},
            forget_bias=0.0,
        )

    want = theirs(forward, convert.to_haiku(stack), read, problem)
    assert_close(ours(stack, problem), want, FLOAT64)


@pytest.mark.usefixtures("x64")
def test_haikus_own_parameters_are_read():
    """Initialised by Haiku, named by Haiku."""
    haiku = pytest.importorskip("haiku", reason="compares with haiku.LSTM")
    x = np.random.default_rng(0).normal(size=(6, 2, 3))

    def network(x: Any) -> Any:
        core = haiku.DeepRNN([haiku.LSTM(4), haiku.LSTM(5)])
        return haiku.dynamic_unroll(core, x, core.initial_state(x.shape[1]))[0]

    network = haiku.without_apply_rng(haiku.transform(network))
    with jax.numpy_rank_promotion("allow"):
        weights = network.init(jax.random.key(0), x)
        want = network.apply(weights, x)
    y = jnp.asarray(x)
    for (params,) in convert.from_haiku(weights):
        _, y = lstm(params, y)
    assert_close(y, want, FLOAT64)


@pytest.mark.usefixtures("x64")
def test_resets_equal_haikus_reset_core():
    """Outputs, final state and the gradient of the inputs, episodes cut anywhere."""
    haiku = pytest.importorskip("haiku", reason="compares with haiku.ResetCore")
    case = Case(9, 4, 3, 5, **FIRST)
    stack = draw_stack(case, 3, np.float64)
    problem = draw_problem(case, 3, np.float64)
    resets = np.random.default_rng(0).random((9, 4)) < 0.3

    def network(x: Any, resets: Any, state: Any) -> Any:
        core = haiku.ResetCore(haiku.LSTM(case.hidden))
        return haiku.dynamic_unroll(core, (x, resets), state)

    apply = haiku.without_apply_rng(haiku.transform(network)).apply
    ((params,),) = stack
    weights = convert.to_haiku(stack)

    def by_haiku(x: Any) -> Any:
        state = haiku.LSTMState(jnp.asarray(problem.h[0]), jnp.asarray(problem.c[0]))
        y, state = apply(weights, x, jnp.asarray(resets), state)
        return y, state.hidden, state.cell

    def by_us(x: Any) -> Any:
        state = LSTMState(jnp.asarray(problem.c[0]), jnp.asarray(problem.h[0]))
        state, y = lstm(params, x, state, resets=jnp.asarray(resets))
        return y, state.h, state.c

    bars = (problem.y_bar, problem.h_bar[0], problem.c_bar[0])
    bars = tuple(map(jnp.asarray, bars))
    with jax.numpy_rank_promotion("allow"):
        want, pull = jax.vjp(by_haiku, jnp.asarray(problem.x))
        want_bar = pull(bars)
    got, pull = jax.vjp(by_us, jnp.asarray(problem.x))
    assert_close((got, pull(bars)), (want, want_bar), FLOAT64)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("seed", range(3))
def test_outputs_states_and_gradients_equal_equinox_in_float64(seed):
    equinox = pytest.importorskip("equinox", reason="compares with equinox.nn.LSTMCell")
    case = Case.draw(seed, **FIRST)
    stack = draw_stack(case, seed, np.float64)
    problem = draw_problem(case, seed, np.float64)
    drawn = equinox.nn.LSTMCell(case.input_size, case.hidden, key=jax.random.key(0))

    def forward(weights: Any, x: Any, h: Any, c: Any) -> Any:
        fields = tuple(weights)
        cell = equinox.tree_at(
            lambda cell: [getattr(cell, name) for name in fields],
            drawn,
            [weights[name] for name in fields],
        )

        def step(state: Any, x: Any) -> Any:
            state = jax.vmap(cell)(x, state)
            return state, state[0]

        (h, c), y = jax.lax.scan(step, (h[0], c[0]), x)
        return y, h[None], c[None]

    weights = jax.tree.map(jnp.asarray, convert.to_equinox(stack[0][0]))
    want = theirs(
        forward, weights, lambda bar: ((convert.from_equinox(bar),),), problem
    )
    assert_close(ours(stack, problem), want, FLOAT64)


def test_equinox_cells_are_read_by_their_fields():
    equinox = pytest.importorskip("equinox", reason="compares with equinox.nn.LSTMCell")
    cell = equinox.nn.LSTMCell(3, 4, use_bias=False, key=jax.random.key(0))
    params = convert.from_equinox(vars(cell))
    np.testing.assert_array_equal(params.kernel, cell.weight_ih.T)
    np.testing.assert_array_equal(params.bias, 0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("seed", range(6))
def test_outputs_states_and_gradients_equal_jaxs_cudnn_reference(seed):
    """`jax.experimental.rnn.lstm_ref` on weights packed for cuDNN."""
    case = Case.draw(seed, lengths=True)
    stack = draw_stack(case, seed, np.float64)
    problem = draw_problem(case, seed, np.float64)
    sizes = {
        "input_size": case.input_size,
        "hidden_size": case.hidden,
        "num_layers": case.layers,
        "bidirectional": case.directions == 2,
    }
    settings = (case.input_size, case.hidden, case.layers, 0.0, case.directions == 2)
    lengths = jnp.asarray(problem.lengths)

    def forward(weights: Any, x: Any, h: Any, c: Any) -> Any:
        parts = rnn.unpack_lstm_weights(weights, **sizes)
        y, h, c = rnn.lstm_ref(x.swapaxes(0, 1), h, c, *parts, lengths, *settings)
        return y.swapaxes(0, 1), h, c

    def read(bar: Any) -> convert.Stack:
        # The gradient of the sum of two biases reaches both of them.
        stack = convert.from_cudnn(bar, **sizes)
        return jax.tree.map(lambda v: v / 2 if v.ndim == 1 else v, stack)

    weights = jnp.asarray(convert.to_cudnn(stack))
    assert len(weights) == rnn.get_num_params_in_lstm(**sizes)
    want = theirs(forward, weights, read, problem)
    assert_close(ours(stack, problem), want, FLOAT64)
