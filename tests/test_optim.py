"""The update rules against the same rules written out in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_lstm.config import TrainConfig
from flax_lstm.optim import (
    CHUNK,
    Optimizer,
    decayed,
    make_optimizer,
    make_schedule,
    update,
    used_rows,
)

V, E = 3 * CHUNK, 3
STEPS = 4


def draw_params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "embedding": {"embedding": rng.normal(size=(V, E))},
        "readout": {"kernel": rng.normal(size=(E, 2)), "bias": rng.normal(size=2)},
    }


def to_jax(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def draw_batches():
    """Yields ids in use and gradients; more ids than one chunk, some every time."""
    rng = np.random.default_rng(1)
    for step in range(STEPS):
        ids = rng.choice(V, size=(CHUNK + 90, 7)[step % 2], replace=False)
        gradients = {
            "embedding": {"embedding": np.zeros((V, E))},
            "readout": {"kernel": rng.normal(size=(E, 2)), "bias": rng.normal(size=2)},
        }
        gradients["embedding"]["embedding"][ids] = rng.normal(size=(len(ids), E))
        yield ids, gradients


class Adadelta:
    """Zeiler 2012, algorithm 1, scaled by a learning rate; epsilon inside the roots."""

    def __init__(self, config):
        self.config, self.slots = config, {}

    def __call__(self, name, w, g, rate, decay, rows):
        a, b = self.slots.setdefault(name, (np.zeros_like(w), np.zeros_like(w)))
        rho, eps = self.config.rho, self.config.epsilon
        a[rows] = rho * a[rows] + (1 - rho) * g[rows] ** 2
        delta = np.sqrt(b[rows] + eps) / np.sqrt(a[rows] + eps) * g[rows]
        b[rows] = rho * b[rows] + (1 - rho) * delta**2
        w[rows] -= rate * delta


class AdamW:
    """Kingma & Ba 2015, algorithm 1, with Loshchilov & Hutter's decoupled decay."""

    def __init__(self, config):
        self.config, self.slots = config, {}

    def __call__(self, name, w, g, rate, decay, rows):
        m, v, t = self.slots.get(name, (np.zeros_like(w), np.zeros_like(w), 0))
        t += 1
        m[rows] = 0.9 * m[rows] + 0.1 * g[rows]
        v[rows] = 0.999 * v[rows] + 0.001 * g[rows] ** 2
        self.slots[name] = (m, v, t)
        m_hat, v_hat = m[rows] / (1 - 0.9**t), v[rows] / (1 - 0.999**t)
        direction = m_hat / (np.sqrt(v_hat) + self.config.epsilon)
        w[rows] -= rate * (direction + decay * w[rows])


RULES = {"adadelta": Adadelta, "adamw": AdamW}


def settings(name, sparse):
    return TrainConfig(
        optimizer=name,
        learning_rate=0.1,
        schedule="cosine",
        warmup_fraction=0.25,
        weight_decay=0.3,
        clip_norm=5.0,  # between the norms of the large and the small batches
        sparse_embedding=sparse,
    )


def run_numpy(config):
    """Returns parameters and slots after the steps, in float64."""
    params, rule = draw_params(), RULES[config.optimizer](config)
    for step, (ids, gradients) in enumerate(draw_batches()):
        # 4 steps, 1 of warm-up: 0, then half a cosine over the 3 that remain.
        rate = 0.1 * (0, 1, 0.75, 0.25)[step]
        flat = jax.tree.leaves(gradients)
        norm = np.sqrt(sum((g**2).sum() for g in flat))
        scale = min(1, config.clip_norm / norm)
        for layer, arrays in params.items():
            for name, w in arrays.items():
                matrix = (layer, name) == ("readout", "kernel")
                rows = slice(None)
                if layer == "embedding" and config.sparse_embedding:
                    rows = ids
                g = gradients[layer][name] * scale
                rule(name, w, g, rate, 0.3 if matrix else 0, rows)
    return params, rule.slots


def as_used(ids, gradients):
    """Returns what the training step hands to a sparse `update`."""
    tokens = jnp.asarray(np.concatenate([ids, ids]), jnp.int32).reshape(2, -1)
    used = used_rows(tokens, jnp.ones(tokens.shape, bool), V)
    matrix = gradients["embedding"]["embedding"]
    padded = np.concatenate([matrix, np.zeros((1, E))])[np.asarray(used.ids)]
    return used, {**gradients, "embedding": {"embedding": padded}}


def run_jax(config):
    optimizer = make_optimizer(config, STEPS)
    params = to_jax(draw_params())
    state = optimizer.init(params)
    step = jax.jit(
        lambda p, s, g, u: update(
            optimizer, p, s, g, u, norm=optax.tree.norm(g), apply_if=jnp.bool(True)
        )
    )
    for ids, gradients in draw_batches():
        used = None
        if config.sparse_embedding:
            used, gradients = as_used(ids, gradients)
        params, state = step(params, state, to_jax(gradients), used)
    return params, state


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("name", RULES)
def test_parameters_and_slots_equal_the_rule_in_numpy(name, sparse):
    """Float32 against float64: 4 steps of some 10 roundings each, of values near 1."""
    config = settings(name, sparse)
    want, slots = run_numpy(config)
    got, state = run_jax(config)
    jax.tree.map(
        lambda w, g: np.testing.assert_allclose(g, w, rtol=0, atol=1e-5), want, got
    )
    inner = (state["rows"] if sparse else state)[0]
    for have, need in zip(
        (inner.e_g, inner.e_x) if name == "adadelta" else (inner.mu, inner.nu),
        slots["embedding"][:2],
        strict=True,
    ):
        have = have["embedding"]["embedding"]
        np.testing.assert_allclose(have, need, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", RULES)
def test_a_word_outside_the_batch_keeps_every_bit(name):
    """Vector and slots, though the slots hold momentum from an earlier step."""
    optimizer = make_optimizer(settings(name, True), STEPS)
    params = to_jax(draw_params())
    state = optimizer.init(params)
    (first, g1), (second, g2), *_ = draw_batches()
    absent = np.setdiff1d(first, second)
    assert len(absent) > CHUNK
    step = jax.jit(
        lambda p, s, g, u: update(
            optimizer, p, s, g, u, norm=jnp.float32(1), apply_if=jnp.bool(True)
        )
    )
    before = after = (params, state)
    for ids, gradients in ((first, g1), (second, g2)):
        used, gradients = as_used(ids, gradients)
        before = after
        after = step(*before, to_jax(gradients), used)

    def check(old, new):
        if old.shape == (V, E):
            np.testing.assert_array_equal(old[absent], new[absent])
            assert not np.array_equal(old[second], new[second])

    jax.tree.map(check, before[0], after[0])
    jax.tree.map(check, before[1], after[1])


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_no_bit_changes_where_apply_if_is_false(sparse):
    optimizer = make_optimizer(settings("adamw", sparse), STEPS)
    params = to_jax(draw_params())
    state = optimizer.init(params)
    ids, gradients = next(draw_batches())
    used = None
    if sparse:
        used, gradients = as_used(ids, gradients)
    gradients = jax.tree.map(lambda g: g * np.nan, to_jax(gradients))
    got = update(
        optimizer,
        params,
        state,
        gradients,
        used,
        norm=jnp.float32(np.nan),
        apply_if=jnp.bool(False),
    )
    jax.tree.map(np.testing.assert_array_equal, got, (params, state))


def test_adadelta_starts_as_the_closed_form_says():
    """From zero averages, the first move is rate sqrt(eps) g / sqrt((1-rho) g² + eps).

    With the tutorial's constants and g = 1: 0.1 * 1e-4 / sqrt(0.05 + 1e-8) = 4.472e-5.
    """
    config = TrainConfig(
        optimizer="adadelta",
        learning_rate=0.1,
        schedule="constant",
        warmup_fraction=0.0,
        clip_norm=None,
        sparse_embedding=False,
    )
    optimizer = make_optimizer(config, 10)
    params = {"readout": {"bias": jnp.zeros(1)}}
    new, _ = update(
        optimizer,
        params,
        optimizer.init(params),
        {"readout": {"bias": jnp.ones(1)}},
        None,
        norm=jnp.float32(1),
        apply_if=jnp.bool(True),
    )
    np.testing.assert_allclose(new["readout"]["bias"], [-4.472135e-5], rtol=1e-5)


@pytest.mark.parametrize("kind", ["constant", "cosine"])
def test_the_schedule_equals_its_formula(kind):
    config = TrainConfig(learning_rate=0.3, schedule=kind, warmup_fraction=0.1)
    schedule = make_schedule(config, 200)
    for step in (0, 5, 19, 20, 21, 110, 199, 200):
        want = 0.3 * step / 20
        if step >= 20:
            want = 0.3
            if kind == "cosine":
                want *= (1 + np.cos(np.pi * (step - 20) / 180)) / 2
        # float32 of pi's multiples
        np.testing.assert_allclose(schedule(step), want, rtol=1e-5, atol=1e-7)


def test_used_rows_are_the_distinct_live_ids():
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, V, size=(30, 40))
    tokens[3], tokens[:, 0] = tokens[4], 7
    live = rng.random(tokens.shape) < 0.8
    live[3:5, :3] = True
    used = used_rows(jnp.asarray(tokens), jnp.asarray(live), V)
    count, ids, slots = int(used.count), np.asarray(used.ids), np.asarray(used.slots)
    np.testing.assert_array_equal(np.sort(ids[:count]), np.unique(tokens[live]))
    assert (ids[count:] == V).all()
    assert len(ids) % CHUNK == 0
    np.testing.assert_array_equal(ids[slots[live]], tokens[live])
    assert (slots[~live] == 0).all()


def test_ids_outside_the_vocabulary_use_no_row_and_find_none():
    tokens = jnp.array([[V, -1, 5, V + 7]])
    used = used_rows(tokens, jnp.ones((1, 4), bool), V)
    assert int(used.count) == 1
    rows = jnp.take(jnp.zeros((len(used.ids), E)), used.slots[0], axis=0)
    assert np.isnan(rows).all(axis=1).tolist() == [True, True, False, True]


def test_a_batch_of_padding_uses_no_row():
    used = used_rows(jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 3), bool), V)
    assert int(used.count) == 0
    assert (np.asarray(used.ids) == V).all()


def test_the_sparse_update_allocates_no_second_embedding():
    """XLA's own account: the donated matrices are reused, and little else is needed."""
    optimizer = make_optimizer(settings("adadelta", True), STEPS)
    words = 40 * CHUNK
    params = to_jax(draw_params())
    params["embedding"] = {"embedding": jnp.zeros((words, E))}
    state = optimizer.init(params)
    ids, gradients = next(draw_batches())
    used, gradients = as_used(ids, gradients)
    compiled = (
        jax.jit(
            lambda p, s, g, u: update(
                optimizer, p, s, g, u, norm=jnp.float32(1), apply_if=u.count > 0
            ),
            donate_argnums=(0, 1),
        )
        .lower(params, state, to_jax(gradients), used)
        .compile()
    )
    memory = compiled.memory_analysis()
    matrix = 4 * words * E
    assert memory.alias_size_in_bytes >= 3 * matrix
    assert memory.temp_size_in_bytes < matrix / 2


def test_biases_and_word_vectors_are_not_decayed():
    assert decayed(to_jax(draw_params())) == {
        "embedding": {"embedding": False},
        "readout": {"kernel": True, "bias": False},
    }


def test_an_optimiser_that_is_not_row_by_row_is_refused():
    optimizer = Optimizer(optax.adafactor(0.1, min_dim_size_to_factor=2), sparse=True)
    with pytest.raises(ValueError, match="sparse update needs an optimiser"):
        optimizer.init(to_jax(draw_params()))
