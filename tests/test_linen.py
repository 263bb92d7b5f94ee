"""The Linen modules against Flax's own with the same parameters, and against NumPy.

Tolerances: Flax sums the input and the recurrent product in another order, so float32
results differ by a few roundings (2^-24 = 6e-8) of values near 1, once per step.
"""

import copy
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import linen as nn

from flax_lstm import LSTMState, linen

pytestmark = pytest.mark.usefixtures("hurried")

T, B, D, H = 5, 3, 4, 6
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
LENGTHS = np.array([5, 2, 1])
LIVE = np.arange(T)[None, :] < LENGTHS[:, None]
lecun = nn.initializers.lecun_normal()


def inputs(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_trees_close(got, want, **tolerances):
    """Compares leaf by leaf; containers may differ, as (c, h) and LSTMState do."""
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, **(tolerances or CLOSE))


@pytest.mark.parametrize("cell", [nn.OptimizedLSTMCell, nn.LSTMCell])
def test_parameters_are_drawn_as_flax_draws_them(cell):
    """Same tree, same names, and from the same key the very same numbers."""
    x = inputs(B, T, D)
    want = nn.RNN(cell(H)).init(jax.random.key(7), x)
    ours = linen.LSTM(H, kernel_init=lecun, forget_bias=0.0)
    got = ours.init(jax.random.key(7), x)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(g, w)


OPTIONS = {
    "plain": {},
    "time-major": {"time_major": True},
    "reverse": {"reverse": True},
    "reverse keep order": {"reverse": True, "keep_order": True},
    "carry": {"return_carry": True},
    "lengths": {"seq_lengths": LENGTHS, "return_carry": True},
    "lengths reverse": {
        "seq_lengths": LENGTHS,
        "return_carry": True,
        "reverse": True,
        "keep_order": True,
    },
    "lengths reverse time-major": {
        "seq_lengths": LENGTHS,
        "return_carry": True,
        "reverse": True,
        "time_major": True,
    },
    "initial carry": {
        "initial_carry": (inputs(B, H, seed=1), inputs(B, H, seed=2)),
        "return_carry": True,
    },
}


def valid_only(result, *, lengths, time_major):
    """Sets the outputs in the padding to zero: Flax leaves them as they come."""
    carry, outputs = result if isinstance(result, tuple) else (None, result)
    if lengths is not None:
        live = np.arange(T)[None, :] < lengths[:, None]
        live = live.T if time_major else live
        outputs = jnp.where(live[..., None], outputs, 0)
    return carry, outputs


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_lstm_equals_flax_rnn_with_the_same_parameters(options):
    x = inputs(*((T, B, D) if options.get("time_major") else (B, T, D)))
    theirs, ours = nn.RNN(nn.OptimizedLSTMCell(H)), linen.LSTM(H)
    variables = ours.init(jax.random.key(0), x)
    kept = partial(
        valid_only,
        lengths=options.get("seq_lengths"),
        time_major=options.get("time_major", False),
    )
    got = kept(ours.apply(variables, x, **options))
    assert_trees_close(got, kept(theirs.apply(variables, x, **options)))
    # Given to the constructor, the options mean the same.
    arrays = {k: options[k] for k in ("seq_lengths", "initial_carry") if k in options}
    flags = {k: v for k, v in options.items() if k not in arrays}
    made_so = linen.LSTM(H, **flags)
    assert_trees_close(kept(made_so.apply(variables, x, **arrays)), got)


@pytest.mark.parametrize("name", ["carry", "lengths reverse"])
def test_gradients_equal_those_of_flax_rnn(name):
    x, options = inputs(B, T, D), OPTIONS[name]
    theirs, ours = nn.RNN(nn.OptimizedLSTMCell(H)), linen.LSTM(H)
    variables = theirs.init(jax.random.key(0), x)

    def loss(module, variables, x):
        result = module.apply(variables, x, **options)
        lengths = options.get("seq_lengths")
        leaves = jax.tree.leaves(valid_only(result, lengths=lengths, time_major=False))
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in leaves)

    got = jax.jit(jax.grad(partial(loss, ours), (0, 1)))(variables, x)
    want = jax.jit(jax.grad(partial(loss, theirs), (0, 1)))(variables, x)
    # Gradients are sums over T steps and B rows.
    assert_trees_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cell", [nn.OptimizedLSTMCell, nn.LSTMCell])
def test_cell_inside_flax_rnn_equals_flax_cell(cell):
    x = inputs(B, T, D)
    theirs = nn.RNN(cell(H), return_carry=True)
    ours = nn.RNN(linen.LSTMCell(H), return_carry=True)
    variables = theirs.init(jax.random.key(0), x)
    assert_trees_close(ours.apply(variables, x), theirs.apply(variables, x))
    assert linen.LSTMCell(H).num_feature_axes == 1


def test_cell_returns_the_container_and_dtypes_of_its_carry():
    """A `lax.scan` written by hand over a plain pair goes on working."""
    cell = linen.LSTMCell(H, dtype=jnp.bfloat16)
    x = inputs(B, T, D)
    carry = (jnp.zeros((B, H)), jnp.zeros((B, H)))
    variables = cell.init(jax.random.key(0), carry, x[:, 0])
    (c, h), y = cell.apply(variables, carry, x[:, 0])
    new, _ = cell.apply(variables, carry, x[:, 0])
    assert type(new) is tuple
    assert (c.dtype, h.dtype, y.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)
    state = cell.initialize_carry(jax.random.key(0), (B, D))
    assert isinstance(state, LSTMState)
    assert (state.c.dtype, state.h.dtype) == (jnp.float32, jnp.bfloat16)


def test_works_in_flax_bidirectional():
    x = inputs(B, T, D)

    def both(layer):
        return nn.Bidirectional(layer(), layer(), return_carry=True)

    theirs = both(lambda: nn.RNN(nn.OptimizedLSTMCell(H)))
    ours = both(lambda: linen.LSTM(H))
    variables = theirs.init(jax.random.key(0), x)
    call = {"seq_lengths": LENGTHS}
    carry, outputs = ours.apply(variables, x, **call)
    want_carry, want = theirs.apply(variables, x, **call)
    assert_trees_close(carry, want_carry)
    live = (np.arange(T)[None, :] < LENGTHS[:, None])[..., None]
    np.testing.assert_allclose(outputs, np.where(live, want, 0), **CLOSE)
    # Our own takes the same parameters, and resets besides.
    own = linen.BidirectionalLSTM(H, return_carry=True)
    assert_trees_close(own.apply(variables, x, **call), (carry, outputs))


def test_padding_and_length_zero_are_as_documented():
    x = inputs(B, T, D)
    x[0], x[1, 3:] = np.nan, np.inf
    lengths, start = jnp.array([0, 3, 5]), LSTMState(jnp.ones((B, H)), jnp.ones((B, H)))
    layer = linen.LSTM(H, return_carry=True)
    variables = layer.init(jax.random.key(0), inputs(B, T, D))

    def run(variables):
        return layer.apply(variables, x, seq_lengths=lengths, initial_carry=start)

    carry, outputs = run(variables)
    np.testing.assert_array_equal(carry.c[0], 1)
    np.testing.assert_array_equal(outputs[0], 0)
    np.testing.assert_array_equal(outputs[1, 3:], 0)
    grads = jax.grad(lambda v: jnp.sum(run(v)[1] ** 2))(variables)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=["none", "one", "two"])
@pytest.mark.parametrize("time_major", [False, True])
def test_any_batch_axes_equal_numpy(batch, time_major):
    x, resets = inputs(T, *batch, D), inputs(T, *batch, seed=3) > 0.8
    lengths = np.full(batch, 3)
    layer = linen.LSTM(H, return_carry=True, time_major=time_major)

    def axes(array, n=0):
        return array if time_major else np.moveaxis(array, 0, len(batch))

    variables = layer.init(jax.random.key(0), axes(x))
    carry, outputs = layer.apply(
        variables, axes(x), seq_lengths=lengths, resets=axes(resets)
    )
    params = linen.to_fused(variables["params"]["cell"])
    want = reference.lstm(params, x, lengths=lengths, resets=resets)
    np.testing.assert_allclose(outputs, axes(want.outputs), **CLOSE)
    np.testing.assert_allclose(carry.c, want.c, **CLOSE)
    np.testing.assert_allclose(carry.h, want.h, **CLOSE)


def test_bfloat16_computes_in_bfloat16_and_carries_c_in_float32():
    x = inputs(B, T, D)
    layer = linen.LSTM(H, dtype=jnp.bfloat16, return_carry=True)
    variables = layer.init(jax.random.key(0), x)
    carry, outputs = layer.apply(variables, x)
    assert outputs.dtype == carry.h.dtype == jnp.bfloat16
    assert carry.c.dtype == variables["params"]["cell"]["ii"]["kernel"].dtype
    want = reference.lstm(linen.to_fused(variables["params"]["cell"]), x.swapaxes(0, 1))
    # Products of operands rounded to 8 bits (2^-9 = 2e-3 each), over five steps.
    assert reference.error(outputs.swapaxes(0, 1), want.outputs) < 1e-2
    inside = nn.RNN(linen.LSTMCell(H, dtype=jnp.bfloat16))
    assert inside.apply(variables, x).dtype == jnp.bfloat16


@pytest.mark.parametrize("param_dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_parameters_can_be_drawn(param_dtype):
    """LAPACK has no 16-bit types: the orthogonal matrices are drawn in float32."""
    layer = linen.LSTM(H, param_dtype=param_dtype)
    cell = layer.init(jax.random.key(0), inputs(B, T, D))["params"]["cell"]
    recurrent = np.asarray(cell["hi"]["kernel"], np.float64)
    assert cell["hi"]["kernel"].dtype == param_dtype
    # Each entry is rounded once, to 8 bits at the least.
    np.testing.assert_allclose(recurrent @ recurrent.T, np.eye(H), atol=2e-2)
    np.testing.assert_array_equal(cell["hf"]["bias"], 1)
    np.testing.assert_array_equal(cell["hi"]["bias"], 0)


def test_other_activations_equal_flax_and_refuse_kernels():
    x = inputs(B, T, D)
    functions = {"gate_fn": jax.nn.hard_sigmoid, "activation_fn": jax.nn.relu}
    theirs = nn.RNN(nn.OptimizedLSTMCell(H, **functions))
    variables = theirs.init(jax.random.key(0), x)
    got = linen.LSTM(H, **functions).apply(variables, x)
    np.testing.assert_allclose(got, theirs.apply(variables, x), **CLOSE)
    with pytest.raises(NotImplementedError, match="sigmoid and tanh only"):
        linen.LSTM(H, implementation="xla", **functions).apply(variables, x)


def test_a_deep_copy_runs_what_the_module_does():
    """Also of functions that were given, though a copy of them is another object."""
    x, functions = inputs(B, T, D), {"gate_fn": nn.sigmoid, "activation_fn": nn.tanh}
    module = linen.LSTM(H, implementation="xla", **functions)
    variables = module.init(jax.random.key(0), x)
    copied = copy.deepcopy(module)
    assert copied.gate_fn is not module.gate_fn
    got, want = (layer.apply(variables, x) for layer in (copied, module))
    np.testing.assert_array_equal(got, want)
    others = copy.deepcopy(module.clone(activation_fn=nn.relu))
    with pytest.raises(NotImplementedError, match="sigmoid and tanh only"):
        others.apply(variables, x)


def test_random_initial_carry_comes_from_init_key():
    x = inputs(B, T, D)
    init = nn.initializers.normal(1.0)
    theirs = nn.RNN(nn.OptimizedLSTMCell(H, carry_init=init), return_carry=True)
    ours = linen.LSTM(H, carry_init=init, return_carry=True)
    variables = theirs.init(jax.random.key(0), x)
    call = {"init_key": jax.random.key(5)}
    assert_trees_close(
        ours.apply(variables, x, **call), theirs.apply(variables, x, **call)
    )


def test_initial_carries_are_drawn_apart_as_in_flax_bidirectional():
    x, init = inputs(B, T, D), nn.initializers.normal(1.0)
    ours = linen.BidirectionalLSTM(H, options={"carry_init": init})
    theirs = nn.Bidirectional(*(linen.LSTM(H, carry_init=init) for _ in range(2)))
    variables = ours.init(jax.random.key(0), x)
    for call in ({}, {"init_key": jax.random.key(5)}):
        got, want = (layer.apply(variables, x, **call) for layer in (ours, theirs))
        np.testing.assert_allclose(got, want, **CLOSE)
    stack = linen.StackedLSTM((H, H), options={"carry_init": init}, return_carry=True)
    variables = stack.init(jax.random.key(0), x)
    # With nothing to run over, the final carries are the initial ones.
    call = {"init_key": jax.random.key(5), "seq_lengths": jnp.zeros(B, int)}
    (first, second), _ = stack.apply(variables, x, **call)
    assert np.abs(np.asarray(first.h - second.h)).min() > 1e-4


def test_partitioned_initialisers_keep_their_names():
    layer = linen.LSTM(
        H,
        kernel_init=nn.with_partitioning(lecun, (None, "model")),
        bias_init=nn.with_partitioning(nn.initializers.zeros, ("model",)),
    )
    variables = layer.init(jax.random.key(0), inputs(B, T, D))
    spec = nn.get_partition_spec(variables)["params"]["cell"]
    assert tuple(spec["ii"]["kernel"]) == (None, "model")
    assert tuple(spec["hf"]["bias"]) == ("model",)
    assert layer.apply(variables, inputs(B, T, D)).shape == (B, T, H)


@pytest.mark.parametrize(
    ("module", "call", "message"),
    [
        (linen.LSTM(H), {"resets": np.zeros((T, B), bool)}, r"time\] = \(3, 5\)"),
        (linen.LSTM(H), {"seq_lengths": np.array([9, 1, 1])}, "within 0 … 5"),
        (
            linen.LSTM(H),
            {"initial_carry": (np.zeros((B, H)), np.zeros((H, B)))},
            r"initial_carry.h must be .* = \(3, 6\) .*got \(6, 3\)",
        ),
        (
            linen.StackedLSTM((H,)),
            {"resets": np.zeros((T, B), bool)},
            r"time\] = \(3, 5\) .*got \(5, 3\)",
        ),
        (linen.StackedLSTM((H,)), {"resets": True}, r"time\] = \(3, 5\) .*got \(\)"),
        (linen.BidirectionalLSTM(H), {"resets": True}, r"time\] = \(3, 5\) .*got \(\)"),
        (linen.LSTM(H), {"initial_carry": np.zeros((B, H))}, r"another pair \(c, h\)"),
        (
            linen.StackedLSTM((H,)),
            {"initial_carry": {}},
            "each of the 1 layers; got dict",
        ),
    ],
)
@pytest.mark.usefixtures("as_installed")
def test_what_does_not_fit_is_named_in_the_axes_of_the_call(module, call, message):
    """Values of lengths, too, under jit, where they are known all the same."""
    x = inputs(B, T, D)
    with pytest.raises((ValueError, TypeError), match=message):
        jax.jit(lambda x: module.init(jax.random.key(0), x, **call))(x)


def test_inputs_without_time_are_refused():
    with pytest.raises(ValueError, match=r"inputs must be \[\*batch, time, 4\]"):
        linen.LSTM(H).init(jax.random.key(0), inputs(D))


def test_padding_does_not_pass_by_residual_layers():
    x = inputs(B, T, D)
    dead = np.where(LIVE[..., None], x, np.nan)
    stack = linen.StackedLSTM((D, D), residual=True)
    variables = stack.init(jax.random.key(0), x)
    got, want = (stack.apply(variables, x, seq_lengths=LENGTHS) for x in (dead, x))
    np.testing.assert_array_equal(got, want)
    assert (np.asarray(got)[~LIVE] == 0).all()


@pytest.mark.parametrize(
    "stack",
    [
        linen.StackedLSTM((D, D), residual=True),
        linen.StackedLSTM((H,), bidirectional=True),
    ],
    ids=["residual", "bidirectional"],
)
@pytest.mark.usefixtures("as_installed")  # a symbolic size is no int
def test_stacks_are_exported_with_any_batch_and_time(stack):
    x, resets = inputs(B, T, D), np.zeros((B, T), bool)
    variables = stack.init(jax.random.key(0), x)

    def run(x, lengths, resets):
        return stack.apply(variables, x, seq_lengths=lengths, resets=resets)

    time, batch = jax.export.symbolic_shape("t, b")
    shapes = (
        jax.ShapeDtypeStruct((batch, time, D), x.dtype),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
        jax.ShapeDtypeStruct((batch, time), bool),
    )
    call = jax.export.export(jax.jit(run))(*shapes).call
    given = x, LENGTHS.astype(jnp.int32), resets
    np.testing.assert_allclose(call(*given), run(*given), **CLOSE)


@pytest.mark.parametrize("module", [linen.BidirectionalLSTM, linen.StackedLSTM])
def test_modules_with_options_are_values(module):
    """They compare and hash, as the static argument of a jit must."""
    size = H if module is linen.BidirectionalLSTM else (H,)
    one, same, other = (module(size, options={"unroll": n}) for n in (2, 2, 3))
    assert one == same != other
    assert hash(one) == hash(same)
    with pytest.raises(ValueError, match="options must not have 'time_major'"):
        module(size, options={"time_major": True})


def test_both_directions_of_a_stack_keep_the_order():
    x = inputs(B, T, D)
    stack = linen.StackedLSTM((H, H), bidirectional=True)
    variables = stack.init(jax.random.key(0), x)
    got, want = (
        stack.apply(variables, x, seq_lengths=LENGTHS, reverse=reverse)
        for reverse in (True, False)
    )
    np.testing.assert_array_equal(got, want)


def numpy_stack(params, x, *, bidirectional=False, residual=False, lengths=None):
    """Runs the layers in NumPy, time-major, in float64."""
    for n in range(len(params)):
        layer = params[f"layer_{n}"]
        if bidirectional:
            ahead, behind = (
                reference.lstm(
                    linen.to_fused(layer[name]["cell"]),
                    x,
                    lengths=lengths,
                    reverse=name == "backward_rnn",
                    keep_order=True,
                ).outputs
                for name in ("forward_rnn", "backward_rnn")
            )
            y = np.concatenate([ahead, behind], -1)
        else:
            y = reference.lstm(
                linen.to_fused(layer["cell"]), x, lengths=lengths
            ).outputs
        x = y + x if residual and y.shape == x.shape else y
    return x


@pytest.mark.parametrize(
    "options",
    [{}, {"bidirectional": True}, {"residual": True}],
    ids=["plain", "bidirectional", "residual"],
)
def test_stack_equals_numpy_layer_by_layer(options):
    x, lengths = inputs(B, T, D), np.array([5, 0, 2])
    stack = linen.StackedLSTM((6, 6, 3), **options)
    variables = stack.init(jax.random.key(0), x)
    got = stack.apply(variables, x, seq_lengths=lengths)
    want = numpy_stack(
        variables["params"], x.swapaxes(0, 1), lengths=lengths, **options
    )
    live = np.arange(T)[:, None] < lengths[None, :]
    want = np.where(live[..., None], want, 0).swapaxes(0, 1)
    got = np.where(live.T[..., None], got, 0)
    np.testing.assert_allclose(got, want, **CLOSE)


def test_stack_in_pieces_gives_the_whole():
    x = inputs(B, T, D)
    stack = linen.StackedLSTM((6, 3), return_carry=True)
    variables = stack.init(jax.random.key(0), x)
    carry, want = stack.apply(variables, x)
    first, a = stack.apply(variables, x[:, :2])
    last, b = stack.apply(variables, x[:, 2:], initial_carry=first)
    # The same steps in the same order; only the loop's length differs.
    np.testing.assert_allclose(np.concatenate([a, b], 1), want, rtol=1e-6, atol=1e-7)
    assert_trees_close(last, carry, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="one carry for each of the 2 layers; got 1"):
        stack.apply(variables, x, initial_carry=first[:1])


def test_stack_reversed_equals_the_flipped_stack():
    x = inputs(B, T, D)
    stack = linen.StackedLSTM((6, 3))
    variables = stack.init(jax.random.key(0), x)
    want = stack.apply(variables, x[:, ::-1])
    got = stack.apply(variables, x, reverse=True)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
    kept = stack.apply(variables, x, reverse=True, keep_order=True)
    np.testing.assert_array_equal(kept, got[:, ::-1])


def test_stack_dropout_needs_asking_for_and_draws_from_the_dropout_rng():
    x = inputs(B, 50, D)
    stack = linen.StackedLSTM((6, 40), dropout=0.25)
    variables = stack.init(jax.random.key(0), x)
    off = stack.apply(variables, x)
    rngs = {"dropout": jax.random.key(1)}
    on = stack.apply(variables, x, deterministic=False, rngs=rngs)
    np.testing.assert_array_equal(off, stack.apply(variables, x, rngs=rngs))
    # 6000 values: the share dropped is within 6 standard deviations of 1/4.
    assert abs(float(jnp.mean(on == 0)) - 0.25) < 6 * (0.25 * 0.75 / 6000) ** 0.5
    with pytest.raises(Exception, match="dropout"):
        stack.apply(variables, x, deterministic=False)


def test_tutorial_initialiser_is_glorot_over_the_stacked_matrix():
    stack = linen.StackedLSTM((16,), initializer="glorot")
    cell = stack.init(jax.random.key(0), inputs(1, 1, 48))["params"]["layer_0"]["cell"]
    limit = (6 / (48 + 16 + 64)) ** 0.5
    for name in ("ii", "if", "ig", "io", "hi", "hf", "hg", "ho"):
        kernel = np.abs(cell[name]["kernel"])
        assert kernel.max() <= limit
        # Of n uniform values none above 95 % of the limit: at most 0.95^256 = 2e-6.
        assert kernel.max() > 0.95 * limit
