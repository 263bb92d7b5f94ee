"""The training step: its gradient, its invariances, and evaluation."""

import dataclasses
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_lstm import nnx, train
from flax_lstm.config import ModelConfig, TrainConfig
from flax_lstm.finite import NonFiniteLossError, check_finite
from flax_lstm.optim import Optimizer

V, E, B, T = 50, 4, 6, 5
MODEL = ModelConfig(embedding_size=E, features=(6,), dropout=0.5, pooling="last")


class Batch(NamedTuple):
    tokens: Any
    lengths: Any
    labels: Any
    weights: Any


def draw_batch(seed, *, lengths=True, fillers=1, rows=B, weights=None):
    rng = np.random.default_rng(seed)
    if weights is None:
        weights = np.repeat([1, 0], [rows - fillers, fillers])
    counts = rng.integers(1, T + 1, rows).astype(np.int32)
    tokens = rng.integers(1, V, (rows, T)).astype(np.int32)
    padding = np.arange(T)[None, :] >= counts[:, None]
    tokens[padding if lengths else padding[:, ::-1]] = 0
    return Batch(
        tokens,
        counts if lengths else None,
        rng.integers(0, 2, rows).astype(np.float32),
        np.asarray(weights, np.float32),
    )


def settings(**changes):
    return TrainConfig(
        **{
            "learning_rate": 0.05,
            "schedule": "constant",
            "warmup_fraction": 0.0,
            "clip_norm": None,
            **changes,
        }
    )


def begin(config, *, optimizer=None, rows=B):
    """Returns apply, the optimiser and the first state of the real classifier."""
    init, apply = nnx.classifier_functions(MODEL, V)
    optimizer = optimizer or train.make_optimizer(config, 100)
    carry = nnx.initial_state(MODEL, rows) if config.carry_state else None
    state = train.init_train_state(init, optimizer, jax.random.key(3), carry=carry)
    return apply, optimizer, state


@functools.cache
def compiled(config):
    """Returns the jitted step and its first state; tests share the compilations."""
    apply, optimizer, state = begin(config)
    return jax.jit(train.make_train_step(apply, optimizer, config)), state


def sgd(*, sparse=False, rate=1.0):
    return Optimizer(optax.sgd(rate), sparse=sparse)


def copy(tree):
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def assert_same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


# ---------------------------------------------------------------- loss and gradient


def bag(params, tokens, lengths, state=None, key=None):
    """Logits of a mean of word vectors: a model whose gradient fits on a line."""
    vectors = jnp.take(params["embedding"]["embedding"], tokens, axis=0)
    return vectors.mean(1) @ params["readout"]["kernel"].reshape(-1)[:E], state


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_loss_accuracy_and_gradient_equal_numpy(loss, sparse):
    """One step of gradient descent at rate 1 moves by the gradient, here by hand."""
    rng = np.random.default_rng(0)
    words, w = rng.normal(size=(V, E)), rng.normal(size=E)
    batch = draw_batch(1, lengths=False, weights=[1, 0.5, 2, 1, 0, 3])
    params = {"embedding": {"embedding": words}, "readout": {"kernel": w}}
    optimizer = sgd(sparse=sparse)
    state = train.init_train_state(
        lambda key: jax.tree.map(jnp.float32, params), optimizer, jax.random.key(0)
    )
    step = train.make_train_step(bag, optimizer, settings(loss=loss))
    new, metrics = jax.jit(step)(state, batch)

    mean = words[batch.tokens].mean(1)
    score, y = 1 / (1 + np.exp(-mean @ w)), batch.labels
    if loss == "mse":
        losses, slope = (score - y) ** 2, 2 * (score - y) * score * (1 - score)
    else:
        losses = -y * np.log(score) - (1 - y) * np.log(1 - score)
        slope = score - y
    share = batch.weights / batch.weights.sum()
    d_w = mean.T @ (slope * share)
    d_words = np.zeros_like(words)
    each = np.broadcast_to((slope * share)[:, None, None] * w / T, (B, T, E))
    np.add.at(d_words, batch.tokens, each)

    close = {"rtol": 1e-5, "atol": 1e-6}  # float32: some ten roundings
    np.testing.assert_allclose(metrics["loss"], losses @ share, **close)
    np.testing.assert_allclose(
        metrics["accuracy"], ((score > 0.5) == y) @ share, **close
    )
    np.testing.assert_allclose(metrics["count"], batch.weights.sum())
    norm = np.sqrt((d_w**2).sum() + (d_words**2).sum())
    np.testing.assert_allclose(metrics["grad_norm"], norm, **close)
    np.testing.assert_allclose(new.params["readout"]["kernel"], w - d_w, **close)
    np.testing.assert_allclose(
        new.params["embedding"]["embedding"], words - d_words, **close
    )
    assert int(new.step) == 1


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("junk", [0, 7])
def test_filler_rows_change_nothing(junk):
    """Whatever they hold, and though their words have momentum from a step before."""
    step, state = compiled(settings())
    first = draw_batch(4, fillers=0)
    first.tokens[:2, 0] = 0, 7
    state, _ = step(copy(state), first)
    alone = draw_batch(5, rows=B - 2, fillers=0)
    alone.tokens[alone.tokens == 7] = 8
    filled = train.pad_batch(alone, B)
    filled.tokens[-2:], filled.labels[-2:], filled.lengths[-2:] = junk, junk, 3
    want, want_metrics = step(copy(state), alone)
    got, got_metrics = step(copy(state), filled)
    for name, value in want_metrics.items():
        np.testing.assert_allclose(got_metrics[name], value, rtol=1e-5)
    # Adam's first step has the size of the learning rate whatever the gradient, so a
    # rounding of a gradient near 0 weighs more than float32's own.
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, atol=1e-5, rtol=0),
        got.params,
        want.params,
    )
    used = np.unique(alone.tokens[np.arange(T)[None, :] < alone.lengths[:, None]])
    unused = np.setdiff1d(np.arange(V), used)
    assert {0, 7} <= set(unused)
    assert_same(
        got.params["embedding"]["embedding"][unused],
        state.params["embedding"]["embedding"][unused],
    )


def test_padding_is_used_without_lengths_only():
    """Not even moved by the momentum it has from a batch that used it."""
    step, state = compiled(settings())
    used, _ = step(copy(state), draw_batch(2, lengths=False))
    after, _ = step(used, draw_batch(2, lengths=True))
    start, used, after = (
        s.params["embedding"]["embedding"][0] for s in (state, used, after)
    )
    assert not np.array_equal(used, start)
    np.testing.assert_array_equal(after, used)


def test_sparse_and_dense_agree_under_gradient_descent():
    """Without slots a row with no gradient stays put either way."""
    config = settings()
    results = []
    for sparse in (False, True):
        optimizer = sgd(sparse=sparse)
        apply, _, state = begin(config, optimizer=optimizer)
        step = jax.jit(train.make_train_step(apply, optimizer, config))
        for seed in range(3):
            state, _ = step(state, draw_batch(seed))
        results.append(state.params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6), *results
    )


# ------------------------------------------------------------------ many devices


def run(config, devices, *, model, lengths):
    """Three steps and an evaluation, of the real classifier where model is None."""
    apply, optimizer, state = begin(config, rows=8)
    apply = model or apply
    program = train.parallelize(apply, optimizer, config, devices)
    state = program.place_state(state)
    history = []
    for seed in range(3):
        rows = 8 if config.carry_state else 7 - seed  # 7, 6, 5: padded to 8 on 8
        batch = draw_batch(seed, lengths=lengths, rows=rows)
        state, metrics = program.step(state, batch)
        history.append(jax.device_get(metrics))
    carry = train.reset_carry(state).carry
    batch = draw_batch(9, lengths=lengths, rows=8, fillers=3)
    sums, _ = program.eval_step(state.params, batch, carry)
    return program.fetch(state), history, jax.device_get(sums)


WAYS = {
    "adamw-sparse": [("pmap", 8), ("sharded", 8), ("data=2,model=2", 4)],
    "adadelta-sparse-carry": [("pmap", 2), ("sharded", 2), ("data=1,model=2", 2)],
    "bag-adamw-dense": [("pmap", 8), ("sharded", 2)],
}


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("case", WAYS)
def test_every_way_of_going_parallel_gives_the_same_parameters(case):
    """Dropout, clipping, weights, carried state and lazy rows included."""
    config = settings(
        optimizer="adadelta" if "adadelta" in case else "adamw",
        sparse_embedding="dense" not in case,
        carry_state="carry" in case,
        clip_norm=0.05,
    )
    run_steps = functools.partial(
        run, model=bag if "bag" in case else None, lengths="carry" not in case
    )
    devices = jax.devices()
    want, want_metrics, want_sums = run_steps(config, devices[:1])
    assert int(want.step) == 3
    for mode, count in WAYS[case]:
        change = {"mesh" if "=" in mode else "parallel": mode}
        other = dataclasses.replace(config, **change)
        got, metrics, sums = run_steps(other, devices[:count])

        def close(a, b, atol):
            if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
                a, b = jax.random.key_data(a), jax.random.key_data(b)
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol)

        # Sums in another order, through three steps whose size is 0.05 a weight.
        jax.tree.map(lambda a, b: close(a, b, 2e-5), got, want)
        jax.tree.map(lambda a, b: close(a, b, 1e-6), metrics, want_metrics)
        jax.tree.map(lambda a, b: close(a, b, 1e-5), sums, want_sums)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_devices_exchange_sums_and_tokens_and_nothing_else_of_the_rows(sparse):
    """Read in the compiled program; a kernel with no rule would gather its inputs."""
    config = settings(sparse_embedding=sparse, parallel="sharded")
    apply, optimizer, state = begin(config, rows=8)
    program = train.parallelize(apply, optimizer, config, jax.devices()[:4])
    placed = program.place_state(state), program.place_batch(draw_batch(0, rows=8))
    compiled = jax.jit(program.step).lower(*placed).compile().as_text()
    names = "all-gather|all-to-all|collective-permute|reduce-scatter|all-reduce"
    found = re.findall(rf"= (.*?) ({names})(?:-start)?\(", compiled)
    assert any(name == "all-reduce" for _, name in found)
    gathered = sorted(shape.split("{")[0] for shape, n in found if n != "all-reduce")
    assert gathered == ([f"pred[8,{T}]", f"s32[8,{T}]"] if sparse else [])


def test_rows_that_devices_cannot_share_are_refused():
    config = settings(carry_state=True, parallel="sharded")
    apply, optimizer, state = begin(config)
    program = train.parallelize(apply, optimizer, config, jax.devices()[:4])
    with pytest.raises(ValueError, match="has 6 rows, which 4 devices"):
        program.place_state(state)
    with pytest.raises(ValueError, match="the batch has 6 rows, which 4 devices"):
        program.step(state, jax.tree.map(jnp.asarray, draw_batch(0)))


@pytest.mark.usefixtures("as_installed")
def test_an_unknown_mode_is_refused():
    config = settings(parallel="threads")
    with pytest.raises(ValueError, match=r"mode must be .*; got 'threads' on 8 dev"):
        train.parallelize(bag, sgd(), config)


def test_the_state_is_donated_and_the_callers_own_is_not():
    params = {
        "embedding": {"embedding": jnp.ones((V, E))},
        "readout": {"kernel": jnp.ones(E)},
    }
    optimizer = sgd()
    state = train.init_train_state(lambda key: params, optimizer, jax.random.key(0))
    program = train.parallelize(bag, optimizer, settings())
    placed = program.place_state(state)
    program.step(placed, draw_batch(0))
    gone = [x.is_deleted() for x in jax.tree.leaves(placed.params)]
    assert all(gone)
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))


# ------------------------------------------------------------ gradient accumulation


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(
    ("case", "mode"),
    [("adamw-sparse", "jit"), ("adadelta-carry", "sharded"), ("adamw-dense", "pmap")],
)
def test_a_batch_in_parts_gives_the_step_of_the_whole(case, mode):
    """Partial batches, dropout, lazy word vectors, and a norm that clips every step.

    A mean over means of parts would weigh the rows of the last, short part more.
    """
    config = settings(
        optimizer="adadelta" if "adadelta" in case else "adamw",
        sparse_embedding="dense" not in case,
        carry_state="carry" in case,
        clip_norm=0.05,
    )
    devices = jax.devices()[: 1 if mode == "jit" else 2]
    run_steps = functools.partial(run, model=None, lengths="carry" not in case)
    want, want_metrics, want_sums = run_steps(config, devices[:1])
    in_parts = dataclasses.replace(config, gradient_accumulation=4, parallel=mode)
    got, metrics, sums = run_steps(in_parts, devices)

    def close(a, b, atol):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol)

    # Sums in another order, through three steps whose size is 0.05 a weight.
    jax.tree.map(lambda a, b: close(a, b, 2e-5), got, want)
    jax.tree.map(lambda a, b: close(a, b, 1e-6), metrics, want_metrics)
    jax.tree.map(lambda a, b: close(a, b, 1e-5), sums, want_sums)
    assert metrics[0]["grad_norm"] > config.clip_norm


def test_parts_bound_the_memory_of_a_step():
    """XLA's own account of temporary buffers, of 64 rows at once and in 16 parts."""

    def temporary(parts):
        config = settings(gradient_accumulation=parts)
        apply, optimizer, state = begin(config)
        step = jax.jit(train.make_train_step(apply, optimizer, config))
        batch = draw_batch(0, rows=64)
        wide = batch._replace(tokens=np.tile(batch.tokens, (1, 20)))
        return step.lower(state, wide).compile().memory_analysis().temp_size_in_bytes

    # What depends on the rows is nearly all of it; a sixteenth, and what does not.
    assert temporary(16) < temporary(1) / 4


def test_rows_that_do_not_make_equal_parts_are_refused():
    config = settings(gradient_accumulation=4)
    apply, optimizer, state = begin(config)
    step = train.make_train_step(apply, optimizer, config)
    with pytest.raises(ValueError, match=r"6 rows cannot be computed in .* = 4 equal"):
        step(state, draw_batch(0))


# ------------------------------------------------------- carry, non-finite numbers


def test_the_carried_state_is_the_final_state_of_the_batch_before():
    config = settings(carry_state=True)
    apply, _, _ = begin(config)
    step, state = compiled(config)
    first = draw_batch(0, lengths=False, fillers=0)
    second = draw_batch(1, lengths=False, fillers=0)
    middle, _ = step(state, first)

    @jax.jit
    def replay(state, batch):
        keys = jax.random.fold_in(state.key, state.step)
        keys = jax.vmap(lambda row: jax.random.fold_in(keys, row))(jnp.arange(B))
        return apply(state.params, batch.tokens, None, state.carry, keys)[1]

    def close(got, want):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            got,
            want,
        )

    close(middle.carry, replay(state, first))
    assert np.abs(middle.carry[0].c).max() > 0.01
    last, _ = step(middle, second)
    close(last.carry, replay(middle, second))
    for leaf in jax.tree.leaves(train.reset_carry(last).carry):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_a_non_finite_step_changes_no_bit_of_the_state(sparse, bad):
    config = settings(sparse_embedding=sparse, carry_state=True, clip_norm=1.0)
    step, state = compiled(config)
    state, _ = step(state, draw_batch(0))  # slots and carry are not zero
    bias = {**state.params["readout"], "bias": jnp.array([bad])}
    state = state._replace(params={**state.params, "readout": bias})
    batch = draw_batch(1)
    batch.labels[0] = 0.3 if bad == np.nan else bad
    new, metrics = step(copy(state), batch)
    assert not metrics["finite"]
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b),
        new._replace(key=None),
        state._replace(key=None),
    )
    with pytest.raises(NonFiniteLossError, match=r"step 7, .* that of step 5\."):
        check_finite(metrics, 7, 5)


def test_a_finite_step_passes_the_check():
    step, state = compiled(settings())
    _, metrics = step(state, draw_batch(0))
    assert check_finite(metrics, 0, None) is None
    np.testing.assert_allclose(metrics["learning_rate"], 0.05, rtol=1e-6)


# ----------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("carried", [False, True], ids=["fresh", "carried"])
def test_evaluation_counts_every_row_once(carried):
    """Against NumPy over the scores of one row at a time, filler rows left out."""
    config = settings(carry_state=carried, loss="bce")
    apply, _, state = begin(config)
    batches = [draw_batch(s, fillers=f) for s, f in ((0, 0), (1, 0), (2, 4))]
    carry, forward = state.carry, jax.jit(apply)
    logits, labels = [], []
    for batch in batches:
        device = jax.tree.map(jnp.asarray, batch)
        scores, new = forward(state.params, device.tokens, device.lengths, carry)
        carry = new if carried else None
        real = batch.weights > 0
        logits.append(np.asarray(scores, np.float64)[real])
        labels.append(batch.labels[real])
    logits, y = np.concatenate(logits), np.concatenate(labels)
    score = 1 / (1 + np.exp(-logits))
    step = jax.jit(train.make_eval_step(apply, config))
    got = train.evaluate(step, state.params, iter(batches), carry=state.carry)
    assert got["count"] == len(y) == 14
    # Scores come from the same float32 model; their sums are float32 within a batch.
    want = np.mean(-y * np.log(score) - (1 - y) * np.log(1 - score))
    np.testing.assert_allclose(got["loss"], want, rtol=1e-6)
    assert got["accuracy"] == np.mean((score > 0.5) == y)
    counts = [
        got[f"{truth}_{kind}"]
        for kind, truth in (
            ("negatives", "true"),
            ("positives", "false"),
            ("negatives", "false"),
            ("positives", "true"),
        )
    ]
    assert counts == [
        np.sum(((score > 0.5) == guess) & (y == label))
        for label, guess in ((0, False), (0, True), (1, False), (1, True))
    ]


def test_evaluation_of_nothing_is_refused():
    config = settings()
    apply, _, state = begin(config)
    step = train.make_eval_step(apply, config)
    with pytest.raises(ValueError, match="got 0 batches with none"):
        train.evaluate(step, state.params, [])
    with pytest.raises(ValueError, match="got 1 batches with none"):
        train.evaluate(step, state.params, [draw_batch(0, fillers=B)])
