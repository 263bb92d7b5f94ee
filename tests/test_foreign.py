"""The C++ loops of the CPU, and the primitives around them.

Values and gradients are held against NumPy float64 (`reference.py`). Where no C++
compiler is to be found, all but the refusals skip.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax_lstm_kernels import cpu

from flax_lstm import LSTMState, explain, init_lstm_params, lstm

needs_kernel = pytest.mark.skipif(
    cpu.compiler() is None, reason="the kernel of the CPU needs a C++ compiler"
)

# (T, B, I, H): one unit; units past a vector; the rows shared out over the threads; few
# rows, the panels shared out, in two chunks of projected inputs; panels deeper than a
# block; so few steps that the weights are not packed; so many rows that the backward
# pass takes few steps at a time; so many units that it takes panels together, also
# where there are eight threads.
SHAPES = {
    "one": (7, 3, 1, 1),
    "odd": (6, 5, 3, 21),
    "rows": (4, 211, 10, 20),
    "panels": (130, 5, 4, 40),
    "deep": (3, 25, 1030, 8),
    "deep backward": (2, 4, 6, 260),
    "step": (1, 1, 70, 70),
    "few": (2, 2, 5, 37),
    "many rows": (5, 520, 3, 70),
    "wide": (3, 4, 7, 1030),
}


def inputs_of(shape, *, lengths, resets):
    steps, rows, size, hidden = shape
    keys = jax.random.split(jax.random.key(7), 6)
    params = init_lstm_params(keys[0], size, hidden)
    x = jax.random.normal(keys[1], (steps, rows, size))
    state = LSTMState(*jax.random.normal(keys[2], (2, rows, hidden)))
    masks = {}
    if lengths:
        drawn = jax.random.randint(keys[3], (rows,), 0, steps + 1)
        masks["lengths"] = drawn.at[0].set(steps).at[-1].set(0 if rows > 1 else steps)
    if resets:
        masks["resets"] = jax.random.bernoulli(keys[4], 0.3, (steps, rows))
    return params, x, state, masks


def relative(got, want):
    want = np.asarray(want, np.float64)
    return np.linalg.norm(np.asarray(got) - want) / max(np.linalg.norm(want), 1e-6)


@needs_kernel
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("masks", ["none", "both"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_are_those_of_numpy(shape, masks, reverse):
    params, x, state, masks = inputs_of(
        shape,
        lengths=masks in ("lengths", "both"),
        resets=masks in ("resets", "both"),
    )
    options = {**masks, "reverse": reverse, "keep_order": True}
    want = reference.lstm(params, x, state, **options)
    keys = jax.random.split(jax.random.key(1), 3)
    d_y = jax.random.normal(keys[0], want.outputs.shape)
    d_c, d_h = jax.random.normal(keys[1], (2, *want.c.shape))

    @jax.jit
    def run(params, x, state):
        def call(params, x, state):
            return lstm(params, x, state, implementation="cpu", **options)

        results, transpose = jax.vjp(call, params, x, state)
        return results, transpose((LSTMState(d_c, d_h), d_y))

    ((c, h), y), gradients = run(params, x, state)
    # A few roundings of float32 on sums of at most 4120 terms, over 130 steps.
    assert relative(y, want.outputs) < 1e-6
    assert relative(c, want.c) < 1e-6
    assert relative(h, want.h) < 1e-6
    wanted = reference.backward(want, d_y, d_c, d_h)
    d_params, d_x, d_state = gradients
    for name, got in {**d_params._asdict(), "inputs": d_x, **d_state._asdict()}.items():
        assert relative(got, wanted[name]) < 3e-6, name


@needs_kernel
def test_padding_changes_no_bit():
    params, x, state, masks = inputs_of(SHAPES["odd"], lengths=True, resets=False)
    live = jnp.arange(len(x))[:, None] < masks["lengths"][None, :]

    @jax.jit
    def run(params, x):
        def loss(params, x):
            (c, _), y = lstm(params, x, state, implementation="cpu", **masks)
            return jnp.sum(jnp.sin(y)) + jnp.sum(c)

        return jax.value_and_grad(loss, (0, 1))(params, x)

    clean = run(params, jnp.where(live[..., None], x, 0))
    for rubbish in (jnp.nan, jnp.inf, 1e30):
        dirty = run(params, jnp.where(live[..., None], x, rubbish))
        for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
            np.testing.assert_array_equal(a, b)


@needs_kernel
@pytest.mark.parametrize("shape", ["rows", "panels"])
def test_a_row_has_the_same_bits_wherever_it_stands(shape):
    params, x, state, masks = inputs_of(SHAPES[shape], lengths=True, resets=True)
    # Rows of one length are taken in the order in which they stand: here many are.
    masks["lengths"] = jnp.minimum(masks["lengths"], len(x) // 2)
    run = jax.jit(
        lambda x, state, lengths, resets: lstm(
            params, x, state, lengths=lengths, resets=resets, implementation="cpu"
        )
    )
    order = np.random.default_rng(0).permutation(x.shape[1])
    (c, _), y = run(x, state, masks["lengths"], masks["resets"])
    (c_moved, _), y_moved = run(
        x[:, order],
        LSTMState(state.c[order], state.h[order]),
        masks["lengths"][order],
        masks["resets"][:, order],
    )
    np.testing.assert_array_equal(y[:, order], y_moved)
    np.testing.assert_array_equal(c[order], c_moved)


@needs_kernel
def test_saturated_and_undefined_gates():
    """The closed forms: gates at 0 or 1, and NaN that stays in its row."""
    params, x, state, _ = inputs_of((2, 3, 3, 5), lengths=False, resets=False)
    x = jnp.zeros_like(x).at[0, 1, 0].set(jnp.nan)
    state = jax.tree.map(jnp.ones_like, state)
    far = jnp.array([90.0, 100.0, 130.0, 200.0, 1e5])  # e^x is infinite in float32
    opened = jnp.concatenate([far, -far, far, far])
    params = params._replace(recurrent_kernel=params.recurrent_kernel * 0, bias=opened)
    (c, h), y = lstm(params, x, state, implementation="cpu")
    # i = o = g = 1 and f = 0: c is 1 at every step.
    np.testing.assert_allclose(c[jnp.array([0, 2])], 1.0, rtol=1e-6)
    np.testing.assert_allclose(h[0], np.tanh(1.0), rtol=1e-6)
    assert np.isnan(y[:, 1]).all()
    assert np.isfinite(y[:, jnp.array([0, 2])]).all()


@needs_kernel
def test_every_mode_of_differentiation_agrees_with_the_scan():
    params, x, state, masks = inputs_of(SHAPES["odd"], lengths=True, resets=True)

    def loss(implementation):
        def of_bias(bias):
            final, y = lstm(
                params._replace(bias=bias),
                x,
                state,
                implementation=implementation,
                **masks,
            )
            return jnp.sum(jnp.sin(y)) + 2 * jnp.sum(final.c)

        return of_bias

    bias, tangent = params.bias, jnp.cos(params.bias)
    modes = {
        "jvp": lambda f: jax.jvp(f, (bias,), (tangent,)),
        "linearize": lambda f: jax.linearize(f, bias)[1](tangent),
        "hessian product": lambda f: jax.jvp(jax.grad(f), (bias,), (tangent,)),
        "grad of grad": lambda f: jax.grad(lambda b: jnp.sum(jax.grad(f)(b)))(bias),
        "vmap": lambda f: jax.vmap(jax.grad(f))(jnp.stack([bias, tangent])),
        "remat": lambda f: jax.grad(jax.checkpoint(f))(bias),
    }
    for name, mode in modes.items():
        got, want = mode(loss("cpu")), mode(loss("scan"))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            # Two float32 programs of the same maths.
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5, err_msg=name)


@needs_kernel
def test_pieces_of_time_and_batch_axes():
    params, x, _, _ = inputs_of((12, 6, 3, 5), lengths=False, resets=False)
    whole = lstm(params, x, implementation="cpu")[1]
    pieces = lstm(params, x, implementation="cpu", remat=5)[1]
    np.testing.assert_allclose(pieces, whole, rtol=1e-6, atol=1e-7)
    folded = lstm(params, x.reshape(12, 2, 3, 3), implementation="cpu")[1]
    np.testing.assert_array_equal(folded.reshape(whole.shape), whole)


@needs_kernel
@pytest.mark.parametrize("resets", [False, True], ids=["no resets", "resets"])
def test_a_vmap_that_leaves_the_weights_alone_is_one_larger_batch(resets):
    params, x, state, masks = inputs_of((4, 6, 3, 5), lengths=True, resets=resets)

    def loss(params, x, state, masks):
        final, y = lstm(params, x, state, implementation="cpu", **masks)
        return jnp.sum(jnp.sin(y)) + jnp.sum(final.c**2)

    def mapped(params, x, state, masks):
        rows = {name: m.ndim - 1 for name, m in masks.items()}
        one_row = jax.vmap(loss, (None, 1, 0, rows))
        grown = jax.tree.map(lambda leaf: leaf[:, None], (state, masks["lengths"]))
        masks = {**masks, "lengths": grown[1]}
        if "resets" in masks:
            masks["resets"] = masks["resets"][..., None]
        rows["lengths"] = 0
        return jnp.sum(one_row(params, x[:, :, None], grown[0], masks))

    program = jax.make_jaxpr(jax.grad(mapped, (0, 1)))(params, x, state, masks)
    assert "flax_lstm_forward" in str(program)
    assert "flax_lstm_transposed" in str(program)
    got = jax.grad(mapped, (0, 1, 2))(params, x, state, masks)
    want = jax.grad(loss, (0, 1, 2))(params, x, state, masks)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@needs_kernel
def test_a_vmap_over_nothing_has_nothing():
    params, x, _, _ = inputs_of((4, 6, 3, 5), lengths=False, resets=False)
    nothing = jnp.zeros((0, *x.shape))

    def run(x):
        return lstm(params, x, implementation="cpu")[1]

    assert jax.vmap(run)(nothing).shape == (0, *run(x).shape)
    d_x = jax.vmap(jax.grad(lambda x: jnp.sum(run(x))))(nothing)
    assert d_x.shape == nothing.shape


@needs_kernel
def test_gradients_of_what_is_not_asked_for_are_not_computed():
    params, x, _, _ = inputs_of(SHAPES["odd"], lengths=False, resets=False)

    def loss(params):
        return jnp.sum(lstm(params, x, implementation="cpu")[1])

    assert "of_inputs=False" in str(jax.make_jaxpr(jax.grad(loss))(params))
    forward = jax.make_jaxpr(lambda params: jax.jvp(loss, (params,), (params,)))(params)
    (linear,) = [
        call for call in forward.eqns if call.primitive.name == "flax_lstm_linear"
    ]
    assert linear.invars[0].aval.size == 0  # the tangent of the inputs


@needs_kernel
def test_an_exported_module_runs_without_it():
    params, x, _, _ = inputs_of(SHAPES["odd"], lengths=False, resets=False)

    def gradient(params, x):
        def loss(params, x):
            return jnp.sum(lstm(params, x, implementation="cpu")[1] ** 2)

        return jax.grad(loss, (0, 1))(params, x)

    exported = jax.export.export(jax.jit(gradient))(params, x)
    assert "flax_lstm_cpu" not in exported.mlir_module()
    assert "flax_lstm_cpu" in jax.jit(gradient).lower(params, x).as_text()
    got, want = exported.call(params, x), gradient(params, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@needs_kernel
@pytest.mark.parametrize("narrow", ["kernel", "recurrent_kernel", "bias"])
def test_gradients_have_the_dtypes_of_their_weights(narrow):
    """Each weight in a dtype of its own, as JAX and every optimiser demand."""
    params, x, _, _ = inputs_of(SHAPES["odd"], lengths=False, resets=False)
    params = params._replace(**{narrow: getattr(params, narrow).astype("bfloat16")})

    def gradients(implementation):
        def loss(params):
            return jnp.sum(lstm(params, x, implementation=implementation)[1] ** 2)

        return jax.grad(loss)(params)

    for got, want, weight in zip(*map(gradients, ("cpu", "scan")), params, strict=True):
        assert got.dtype == weight.dtype
        # One rounding to bfloat16, 2^-9; the scan rounds its sums at every step.
        assert relative(got.astype("float32"), want) < (
            0.02 if weight.dtype == jnp.bfloat16 else 1e-5
        )


@needs_kernel
def test_a_second_eager_call_compiles_nothing():
    params, x, _, _ = inputs_of(SHAPES["odd"], lengths=False, resets=False)
    run = jax.value_and_grad(lambda params: jnp.sum(lstm(params, x)[1]))
    run(params)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event)
    )
    run(params)
    assert not [event for event in compiled if "backend_compile" in event]


@needs_kernel
def test_none_chooses_it_where_it_can_run():
    params, x, _, _ = inputs_of(SHAPES["odd"], lengths=False, resets=False)
    assert explain(params, x).implementation == "cpu"
    assert explain(params, x, dtype=jnp.bfloat16).implementation == "xla"
    assert explain(params, x[:0]).implementation == "xla"
    refused = explain(params, x, dtype=jnp.bfloat16, implementation="cpu")
    assert refused.implementation is None


@needs_kernel
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": jnp.bfloat16}, "float32 only"),
        ({"dtype": jnp.float64}, "float32 only"),
        ({"dtype": jnp.float32, "steps": 0}, "above 0 only"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_reason(x64, arguments, message):
    params, x, _, _ = inputs_of(SHAPES["odd"], lengths=False, resets=False)
    x = x[: arguments.pop("steps", None)]
    with pytest.raises(NotImplementedError, match=message):
        lstm(params, x, implementation="cpu", **arguments)


def test_without_a_compiler_it_is_absent_and_says_why(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert "C++ compiler" in cpu.reason.__wrapped__()


def test_a_compiler_by_name_is_taken_or_missed(monkeypatch, tmp_path):
    """With its options; no other takes its place."""
    monkeypatch.setenv("CXX", "g++ -DNOTHING")
    assert [Path(cpu.compiler()[0]).name, *cpu.compiler()[1:]] == ["g++", "-DNOTHING"]
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert "there is no such compiler" in cpu.reason.__wrapped__()


def test_a_compiler_that_fails_is_a_reason_too(monkeypatch, tmp_path):
    broken = tmp_path / "broken-compiler"
    broken.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "no such flag" in cpu.reason.__wrapped__()
