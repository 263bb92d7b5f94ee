"""The NNX modules against Flax's own with the same parameters, and against Linen's.

Tolerances: Flax sums the input and the recurrent product in another order, so float32
results differ by a few roundings (2^-24 = 6e-8) of values near 1, once per step.
"""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx as flax_nnx

from flax_lstm import LSTMState, linen, nnx
from flax_lstm.config import TUTORIAL, ModelConfig
from flax_lstm.dropout import dropout, fold_in
from flax_lstm.pooling import pool

pytestmark = pytest.mark.usefixtures("hurried")

T, B, D, H = 5, 3, 4, 6
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
LENGTHS = np.array([5, 2, 1])
LIVE = np.arange(T)[None, :] < LENGTHS[:, None]


def inputs(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def flax_rnn(**options):
    cell = flax_nnx.OptimizedLSTMCell(D, H, rngs=flax_nnx.Rngs(0))
    return flax_nnx.RNN(cell, **options)


def shapes(state):
    return jax.tree.map(jnp.shape, flax_nnx.to_pure_dict(state))


def with_parameters_of(module, source):
    """Copies the parameters of `source` into `module`, by name."""
    flax_nnx.update(module, flax_nnx.state(source, flax_nnx.Param))
    return module


def assert_trees_close(got, want, **tolerances):
    """Compares leaf by leaf; containers may differ, as (c, h) and LSTMState do."""
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, **(tolerances or CLOSE))


def test_parameters_and_nothing_else_as_in_flax_rnn():
    ours = nnx.LSTM(D, H, rngs=flax_nnx.Rngs(0))
    want = flax_nnx.state(flax_rnn(), flax_nnx.Param)
    shapes = jax.tree.map(jnp.shape, flax_nnx.to_pure_dict(want))
    assert (
        jax.tree.map(jnp.shape, flax_nnx.to_pure_dict(flax_nnx.state(ours))) == shapes
    )
    bias = ours.cell.dense_h.bias[...].reshape(4, H)
    np.testing.assert_array_equal(
        bias, np.repeat([0.0, 1.0, 0.0, 0.0], H).reshape(4, H)
    )
    for recurrent in jnp.split(ours.cell.dense_h.kernel[...], 4, axis=-1):
        np.testing.assert_allclose(recurrent @ recurrent.T, np.eye(H), atol=1e-5)
    same = nnx.LSTM(D, H, rngs=flax_nnx.Rngs(1))
    assert flax_nnx.graphdef(ours) == flax_nnx.graphdef(same)


@pytest.mark.parametrize(
    "options",
    [
        {"time_major": True},
        {"reverse": True, "return_carry": True},
        {"seq_lengths": LENGTHS, "return_carry": True},
        {"seq_lengths": LENGTHS, "reverse": True, "keep_order": True},
        {"initial_carry": (inputs(B, H, seed=1), inputs(B, H, seed=2))},
    ],
    ids=["time-major", "reverse", "lengths", "lengths reverse", "initial carry"],
)
def test_lstm_equals_flax_rnn_with_the_same_parameters(options):
    x = inputs(*((T, B, D) if "time_major" in options else (B, T, D)))
    theirs = flax_rnn()
    ours = with_parameters_of(nnx.LSTM(D, H, rngs=flax_nnx.Rngs(1)), theirs)
    carries, outputs = [], []
    for module in (ours, theirs):
        result = module(x, **options)
        carry, y = result if "return_carry" in options else (None, result)
        # Flax leaves the outputs in the padding as they come.
        y = np.where(LIVE[..., None], y, 0) if "seq_lengths" in options else y
        carries.append(carry)
        outputs.append(y)
    np.testing.assert_allclose(*outputs, **CLOSE)
    assert_trees_close(*carries)


def test_gradients_equal_those_of_flax_rnn():
    x, theirs = inputs(B, T, D), flax_rnn()
    ours = with_parameters_of(nnx.LSTM(D, H, rngs=flax_nnx.Rngs(1)), theirs)

    def gradients(module):
        graph, params, rest = flax_nnx.split(module, flax_nnx.Param, ...)

        def loss(params, x):
            y = flax_nnx.merge(graph, params, rest)(x, rngs=flax_nnx.Rngs(0))
            return jnp.sum(jnp.sin(y))

        params, of_x = jax.jit(jax.grad(loss, (0, 1)))(params, x)
        return flax_nnx.to_pure_dict(params), of_x

    # Gradients are sums over T steps and B rows.
    assert_trees_close(gradients(ours), gradients(theirs), rtol=1e-4, atol=1e-5)


def test_lstm_equals_the_unfused_flax_cell():
    """`nnx.LSTMCell` keeps the gates apart: its leaves are put together by hand."""
    x = inputs(B, T, D)
    cell = flax_nnx.LSTMCell(D, H, rngs=flax_nnx.Rngs(0))
    ours = nnx.LSTM(D, H, rngs=flax_nnx.Rngs(1))
    for kind, names in (
        ("dense_i", ("ii", "if_", "ig", "io")),
        ("dense_h", ("hi", "hf", "hg", "ho")),
    ):
        gates = [getattr(cell, name) for name in names]
        into = getattr(ours.cell, kind)
        into.kernel[...] = jnp.concatenate([g.kernel[...] for g in gates], axis=-1)
        if kind == "dense_h":
            into.bias[...] = jnp.concatenate([g.bias[...] for g in gates])
    np.testing.assert_allclose(ours(x), flax_nnx.RNN(cell)(x), **CLOSE)


def test_cell_works_inside_flax_rnn_and_lstm_in_flax_bidirectional():
    x, theirs = inputs(B, T, D), flax_rnn()
    cell = nnx.LSTMCell(D, H, rngs=flax_nnx.Rngs(1))
    inside = with_parameters_of(flax_nnx.RNN(cell), theirs)
    np.testing.assert_allclose(inside(x), theirs(x), **CLOSE)

    want = flax_nnx.Bidirectional(theirs, flax_rnn(reverse=True), return_carry=True)
    layers = (nnx.LSTM(D, H, rngs=flax_nnx.Rngs(n)) for n in (1, 2))
    ours = with_parameters_of(flax_nnx.Bidirectional(*layers, return_carry=True), want)
    own = nnx.BidirectionalLSTM(D, H, return_carry=True, rngs=flax_nnx.Rngs(1))
    own = with_parameters_of(own, want)
    carry, outputs = want(x, seq_lengths=LENGTHS)
    for module in (ours, own):
        got_carry, got = module(x, seq_lengths=LENGTHS)
        np.testing.assert_allclose(got, np.where(LIVE[..., None], outputs, 0), **CLOSE)
        assert_trees_close(got_carry, carry)


def test_initial_carry_is_zero_or_drawn():
    cell = nnx.LSTMCell(D, H, dtype=jnp.bfloat16, rngs=flax_nnx.Rngs(0))
    state = cell.initialize_carry((B, D))
    assert isinstance(state, LSTMState)
    assert (state.c.dtype, state.h.dtype) == (jnp.float32, jnp.bfloat16)
    drawn = cell.initialize_carry(
        (B, D), flax_nnx.Rngs(carry=3), flax_nnx.initializers.normal(1.0)
    )
    assert 0.3 < float(jnp.std(drawn.c)) < 3  # 18 standard normal values
    with pytest.raises(ValueError, match="rngs must be given to draw a carry"):
        cell.initialize_carry((B, D), carry_init=flax_nnx.initializers.normal(1.0))


def test_a_deep_copy_runs_what_the_module_does():
    """As a target network is made; "xla" knows no other functions."""
    module = nnx.LSTM(D, H, implementation="xla", rngs=flax_nnx.Rngs(0))
    copied, x = copy.deepcopy(module), inputs(B, T, D)
    np.testing.assert_array_equal(copied(x), module(x))


def test_inputs_of_another_size_are_told_in_the_axes_of_the_call():
    stack = nnx.StackedLSTM(D, (H,), rngs=flax_nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"\[\*batch, time, 4\] .*got \(3, 5, 5\)"):
        stack(inputs(B, T, D + 1))


def test_an_order_that_both_directions_do_not_have_is_refused():
    with pytest.raises(ValueError, match="options must not have 'reverse'"):
        nnx.BidirectionalLSTM(D, H, reverse=True, rngs=flax_nnx.Rngs(0))


def test_a_carry_of_zeros_needs_nothing_to_draw_with():
    options = {"carry_init": flax_nnx.initializers.zeros, "rngs": flax_nnx.Rngs(0)}
    got, want = nnx.LSTM(D, H, **options), nnx.LSTM(D, H, rngs=flax_nnx.Rngs(0))
    x = inputs(B, T, D)
    np.testing.assert_array_equal(got(x), want(x))


def test_initialisers_with_a_partitioning_draw_the_same_and_keep_it():
    draws = {
        "kernel_init": flax_nnx.initializers.lecun_normal(),
        "recurrent_kernel_init": flax_nnx.initializers.orthogonal(),
        "bias_init": flax_nnx.initializers.ones,
    }
    boxed = {
        name: flax_nnx.with_metadata(init, of=name) for name, init in draws.items()
    }
    got, want = (nnx.LSTMCell(D, H, rngs=flax_nnx.Rngs(0), **d) for d in (boxed, draws))
    jax.tree.map(np.testing.assert_array_equal, got.fused(), want.fused())
    weights = got.dense_i.kernel, got.dense_h.kernel, got.dense_h.bias
    assert [weight.get_metadata("of") for weight in weights] == list(draws)


def test_bfloat16_and_padding_with_resets_equal_numpy():
    x, resets = inputs(B, T, D), inputs(B, T, seed=3) > 0.5
    x[1, 2:] = np.nan
    layer = nnx.LSTM(D, H, dtype=jnp.bfloat16, return_carry=True, rngs=flax_nnx.Rngs(0))
    carry, outputs = layer(x, seq_lengths=LENGTHS, resets=resets)
    assert (carry.c.dtype, outputs.dtype) == (jnp.float32, jnp.bfloat16)
    want = reference.lstm(
        layer.cell.fused(), x.swapaxes(0, 1), lengths=LENGTHS, resets=resets.T
    )
    # Products of operands rounded to 8 bits (2^-9 = 2e-3 each), over five steps.
    assert reference.error(outputs.swapaxes(0, 1), want.outputs) < 1e-2
    assert reference.error(carry.c, want.c) < 1e-2


def test_train_and_eval_switch_dropout():
    x = inputs(B, T, D)
    stack = nnx.StackedLSTM(D, (8, 8), dropout=0.5, rngs=flax_nnx.Rngs(0))
    off = stack(x)
    assert bool((off != 0).all())
    stack.train()
    assert bool((stack(x, rngs=flax_nnx.Rngs(dropout=1)) == 0).any())
    with pytest.raises(ValueError, match="dropout needs randomness"):
        stack(x)
    stack.eval()
    np.testing.assert_array_equal(stack(x, rngs=flax_nnx.Rngs(dropout=1)), off)


CONFIGS = {
    "tutorial": dataclasses.replace(
        TUTORIAL.model, embedding_size=D, features=(H, 3), dropout=0.3
    ),
    "concat": ModelConfig(embedding_size=D, features=(H, 3), pooling="concat"),
}
TOKENS = np.random.default_rng(0).integers(0, 11, (B, T)).astype(np.int32)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_linen_and_nnx_classifiers_are_one_function(config):
    init, apply = nnx.classifier_functions(config, 11)
    linen_init, linen_apply = linen.classifier_functions(config, 11)
    params = init(jax.random.key(0))
    assert params["embedding"]["embedding"].shape == (11, D)
    converted = linen.from_nnx(params)
    want_shapes = jax.tree.map(jnp.shape, linen_init(jax.random.key(0)))
    assert jax.tree.map(jnp.shape, converted) == want_shapes
    assert_trees_close(linen.to_nnx(converted), params, rtol=0)
    keys = jax.random.split(jax.random.key(1), B)
    state = jax.tree.map(lambda s: s + 0.5, nnx.initial_state(config, B))
    for lengths in (None, jnp.array([5, 0, 2])):
        for key in (None, keys):
            got = apply(params, TOKENS, lengths, state, key)
            want = linen_apply(converted, TOKENS, lengths, state, key)
            assert got[0].dtype == jnp.float32
            assert_trees_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_classifier_equals_numpy_with_the_masks_given(config):
    init, apply = nnx.classifier_functions(config, 11)
    params, key = init(jax.random.key(0)), jax.random.key(1)
    lengths = np.array([5, 3, 2])
    logits, state = jax.jit(apply)(params, TOKENS, lengths, None, key)
    x = np.asarray(params["embedding"]["embedding"])[TOKENS.T]
    for n in range(2):
        cell = nnx.to_fused(params["stack"][f"layer_{n}"]["cell"])
        result = reference.lstm(cell, x, lengths=lengths)
        np.testing.assert_allclose(state[n].c, result.c, **CLOSE)
        ones = jnp.ones(result.outputs.shape)
        x = result.outputs * np.asarray(dropout(ones, fold_in(key, n), config.dropout))
    rows = [x[:n, b] for b, n in enumerate(lengths)]
    parts = {"last": [r[-1] for r in rows]}
    parts |= {"mean": [r.mean(0) for r in rows], "max": [r.max(0) for r in rows]}
    names = tuple(parts) if config.pooling == "concat" else (config.pooling,)
    pooled = np.concatenate([np.stack(parts[name]) for name in names], -1)
    want = pooled @ np.asarray(params["readout"]["kernel"])[:, 0]
    np.testing.assert_allclose(logits, want, **CLOSE)


def test_dropout_of_a_row_does_not_depend_on_how_the_batch_is_split():
    config = CONFIGS["concat"]
    init, apply = nnx.classifier_functions(config, 11)
    params, keys = init(jax.random.key(0)), jax.random.split(jax.random.key(1), B)
    whole, _ = apply(params, TOKENS, jnp.array(LENGTHS), None, keys)
    for row in (slice(0, 1), slice(1, 3)):
        part, _ = apply(params, TOKENS[row], jnp.array(LENGTHS[row]), None, keys[row])
        # The same products over fewer rows; other masks would differ by 0.01 and more.
        np.testing.assert_allclose(part, whole[row], rtol=0, atol=1e-6)
    other, _ = apply(params, TOKENS, jnp.array(LENGTHS), None, keys[::-1])
    assert float(jnp.abs(other - whole).max()) > 1e-4


def test_score_after_every_token_is_the_score_of_the_prefix():
    config = CONFIGS["concat"]
    init, apply = nnx.classifier_functions(config, 11)
    params = init(jax.random.key(0))
    lengths = jnp.array([5, 0, 2])
    trace, _ = apply(params, TOKENS, lengths, per_step=True)
    assert trace.shape == (B, T)
    for t in range(T):
        prefix, _ = apply(params, TOKENS, jnp.minimum(lengths, t + 1))
        np.testing.assert_allclose(trace[:, t], prefix, rtol=0, atol=1e-6)


def test_classifier_takes_fewer_word_vectors_and_shows_unknown_ids():
    """Training passes the rows that a batch uses, with the tokens renumbered."""
    for module in (nnx, linen):
        init, apply = module.classifier_functions(CONFIGS["concat"], 11)
        params = init(jax.random.key(0))
        used, renumbered = np.unique(TOKENS[:, :2], return_inverse=True)
        rows = {"embedding": params["embedding"]["embedding"][used]}
        got, _ = apply(params | {"embedding": rows}, renumbered.reshape(B, 2), None)
        want, _ = apply(params, TOKENS[:, :2], None)
        np.testing.assert_array_equal(got, want)
        bad, _ = apply(params, np.array([[3, 11], [3, 4]], np.int32), None)
        assert np.isnan(bad[0])
        assert np.isfinite(bad[1])


def test_module_gives_scores_between_0_and_1():
    model = nnx.SentimentClassifier(11, D, (H, 3), rngs=flax_nnx.Rngs(0))
    logits, _ = model(TOKENS, LENGTHS, logits=True)
    scores, _ = model(TOKENS, LENGTHS)
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-logits)), rtol=1e-6)


def test_pool_is_independent_of_layout():
    """The readout sees last, mean, max in that order: checkpoints depend on it."""
    outputs = jnp.arange(4.0).reshape(4, 1, 1)
    assert pool(outputs, pooling="concat").tolist() == [[3.0, 1.5, 3.0]]
