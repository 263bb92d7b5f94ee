"""`implementation="xla"`: every way to differentiate it, against the plain scan.

The scan is judged against NumPy in test_sequence.py; so is the value of a first
gradient here. Both sides run the same transformation, so that a difference is one of
the derivative rule.
"""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads

import flax_lstm as fl
from flax_lstm.derivative import Options, recurrence
from flax_lstm.loop import chunk_length

T, B, D, H = 5, 3, 2, 3

CALLS = {
    "plain": {},
    "all": {
        "lengths": np.array([3, 0, 5]),
        "resets": np.arange(T * B).reshape(T, B) % 4 == 1,
        "reverse": True,
    },
    "remat": {"lengths": np.array([5, 2, 4]), "remat": 2, "unroll": 2},
}


def draw(seed=0, dtype=jnp.float64, steps=T, batch=(B,), size=D, hidden=H):
    """Draws params, inputs and a state."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    return (
        fl.LSTMParams(
            normal(size, 4 * hidden), normal(hidden, 4 * hidden), normal(4 * hidden)
        ),
        normal(steps, *batch, size),
        fl.LSTMState(normal(*batch, hidden), normal(*batch, hidden)),
    )


def loss_of(implementation, options):
    """Returns a scalar function of (params, inputs, state) that uses every result."""

    def loss(params, inputs, state):
        final, outputs = fl.lstm(
            params, inputs, state, implementation=implementation, **options
        )
        return jnp.sum(jnp.sin(outputs)) + jnp.sum(final.c**2) - jnp.sum(final.h)

    return loss


def of_bias(loss, arguments):
    """Returns the loss as a function of the bias, for derivatives of high order."""
    params, inputs, state = arguments
    return lambda bias: loss(params._replace(bias=bias), inputs, state)


def second(loss, a):
    f = of_bias(loss, a)
    return jax.grad(lambda b: jnp.sum(jnp.sin(jax.grad(f)(b))))(a[0].bias)


def third(loss, a):
    f = of_bias(loss, a)
    v = jnp.arange(4.0 * H)

    def along(b):
        return jax.jvp(jax.grad(f), (b,), (v,))[1]

    return jax.grad(lambda b: jnp.sum(jnp.cos(along(b))))(a[0].bias)


def over_inputs(loss, a):
    many = jnp.stack([a[1], -2 * a[1]])
    return jax.vmap(jax.grad(loss, (0, 1, 2)), (None, 0, None))(a[0], many, a[2])


def over_params(loss, a):
    many = jax.tree.map(lambda p: jnp.stack([p, 0.5 * p]), a[0])
    return jax.vmap(jax.value_and_grad(loss, (0, 1)), (0, None, None))(many, *a[1:])


def tangents(a):
    return jax.tree.map(jnp.cos, a)


MODES = {
    "value": lambda f, a: f(*a),
    "grad": lambda f, a: jax.grad(f, (0, 1, 2))(*a),
    "value and grad": lambda f, a: jax.value_and_grad(f)(*a),
    "vjp": lambda f, a: jax.vjp(f, *a)[1](2.0),
    "jvp": lambda f, a: jax.jvp(f, a, tangents(a)),
    "linearize": lambda f, a: jax.linearize(f, *a)[1](*tangents(a)),
    "jacfwd": lambda f, a: jax.jacfwd(of_bias(f, a))(a[0].bias),
    "jacrev": lambda f, a: jax.jacrev(f, 1)(*a),
    "hessian": lambda f, a: jax.hessian(of_bias(f, a))(a[0].bias),
    "grad of grad": second,
    "third order": third,
    "checkpoint": lambda f, a: jax.grad(jax.checkpoint(f), (0, 1, 2))(*a),
    "vmap over data": over_inputs,
    "vmap over parameters": over_params,
    "grad of jvp": lambda f, a: jax.grad(
        lambda i: jax.jvp(lambda j: f(a[0], j, a[2]), (i,), (i,))[1]
    )(a[1]),
}


def close(got, want, rtol=1e-11):
    """A few hundred roundings of 1e-16, which derivatives of order 3 magnify."""
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol, 1e-11), got, want)


PAIRS = [
    pytest.param(mode, options, id=f"{name}, {call}")
    for call, options in CALLS.items()
    for name, mode in MODES.items()
    if call == "all" or name in ("value and grad", "jvp")
]


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(("mode", "options"), PAIRS)
def test_every_mode_equals_that_of_the_scan(x64, mode, options):
    arguments = draw()
    got, want = (
        jax.jit(lambda a, name=name: mode(loss_of(name, options), a))(arguments)
        for name in ("xla", "scan")
    )
    close(got, want)


@pytest.mark.parametrize("remat", [False, 2, True])
@pytest.mark.parametrize("implementation", ["xla", "scan"])
def test_gradients_equal_numpy(x64, implementation, remat):
    params, inputs, state = draw(1)
    options = CALLS["all"] | {"keep_order": True}
    d_outputs, d_c, d_h = draw(2, hidden=H, size=H)[1:2] + draw(3)[2]

    def flat(params, inputs, state):
        final, outputs = fl.lstm(
            params,
            inputs,
            state,
            implementation=implementation,
            remat=remat,
            **options,
        )
        return outputs, final.c, final.h

    got, pullback = jax.vjp(flat, params, inputs, state)
    want = reference.lstm(params, inputs, state, **options)
    for mine, theirs in zip(got, want[:3], strict=True):
        assert reference.error(mine, theirs) < 1e-13
    gradients = jax.tree.leaves(pullback((d_outputs, d_c, d_h)))
    d_want = reference.backward(want, d_outputs, d_c, d_h)
    for mine, theirs in zip(gradients, d_want.values(), strict=True):
        assert reference.error(mine, theirs) < 1e-12


@hypothesis.settings(max_examples=4)
@hypothesis.given(
    seed=st.integers(0, 2**31),
    steps=st.integers(0, 3),
    batch=st.sampled_from([(), (2,), (1, 2), (0,)]),
    masked=st.booleans(),
    reverse=st.booleans(),
)
def test_derivatives_equal_finite_differences(seed, steps, batch, masked, reverse):
    """Order 1 and 2, forward and reverse; JAX's tolerance for float64 is 1e-5."""
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        params, inputs, state = draw(seed, steps=steps, batch=batch, hidden=2)
        options = {"reverse": reverse}
        if masked:
            options["lengths"] = jnp.asarray(rng.integers(0, steps + 1, batch))
            options["resets"] = jnp.asarray(rng.random((steps, *batch)) < 0.3)
        check_grads(jax.jit(loss_of("xla", options)), (params, inputs, state), order=2)


@pytest.mark.parametrize("hoist", [False, True])
@pytest.mark.parametrize("flatten", [False, True])
def test_the_arrangements_give_the_same_numbers(x64, hoist, flatten):
    """One of them runs on this machine by default; the others run elsewhere."""
    params, inputs, state = draw()
    options = Options(hoist=hoist, flatten=flatten)

    def loss(params, inputs, state):
        final, h = recurrence(options, params, inputs, state, None, None)
        return jnp.sum(jnp.sin(h)) + jnp.sum(final.c**2) - jnp.sum(final.h)

    got = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(params, inputs, state)
    want = jax.value_and_grad(loss_of("scan", {}), (0, 1, 2))(params, inputs, state)
    close(got, want)


@pytest.mark.parametrize("steps", [64, 1024])
@pytest.mark.parametrize(
    ("dtype", "bar"),
    # The rounding of the products' operands alone, 2^-9 and 2^-12 each, in a loop that
    # passes it on; a weight gradient summed over 1024 steps in bf16 is wrong by 3.7e-2.
    [(jnp.bfloat16, 7e-3), (jnp.float16, 9e-4)],
    ids=["bf16", "f16"],
)
def test_low_precision_gradients_do_not_lose_more_with_time(dtype, bar, steps):
    """Nor more than those of the scan, which sums over time in float32."""
    params, inputs, state = draw(5, jnp.float32, steps, (4,), 16, 16)
    params = jax.tree.map(lambda p: p / 4, params)
    weights = jnp.asarray(np.random.default_rng(6).normal(size=(steps, 4, 16)))

    def loss(params, inputs, implementation):
        _, outputs = fl.lstm(
            params, inputs, state, dtype=dtype, implementation=implementation
        )
        assert outputs.dtype == dtype
        return jnp.sum(outputs.astype(jnp.float32) * weights)

    gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
    got, by_scan = (
        jax.tree.leaves(gradient(params, inputs, name)) for name in ("xla", "scan")
    )
    result = reference.lstm(params, inputs, state)
    want = reference.backward(result, weights, np.zeros((4, 16)), np.zeros((4, 16)))
    for mine, scans, name in zip(got, by_scan, list(want)[:4], strict=True):
        assert mine.dtype == jnp.float32
        error = reference.error(mine, want[name])
        assert error < bar, name
        assert error < 1.1 * reference.error(scans, want[name]) + 1e-4, name


def test_weights_in_16_bits_get_gradients_in_16_bits():
    params, inputs, state = draw(5, jnp.bfloat16)
    gradient = jax.jit(jax.grad(loss_of("xla", {})))(params, inputs, state)
    assert {g.dtype for g in gradient} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("shape", [(0, (B,)), (T, (0,)), (0, (0,)), (T, (2, 0, 1))])
def test_empty_axes_give_gradients_of_zero_or_of_the_state(shape):
    params, inputs, state = draw(0, jnp.float32, *shape)
    loss = loss_of("xla", {})
    d_params, d_inputs, d_state = jax.grad(loss, (0, 1, 2))(params, inputs, state)
    assert all(jnp.all(g == 0) for g in d_params)
    assert d_inputs.shape == inputs.shape
    if shape[0] == 0:
        close(d_state.c, 2 * state.c)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_padding_changes_no_bit_of_values_or_gradients(bad, reverse):
    params, inputs, state = draw(0, jnp.float32)
    lengths = jnp.array([3, 0, 5])
    padding = jnp.arange(T)[:, None, None] >= lengths[None, :, None]
    f = jax.jit(
        jax.value_and_grad(
            loss_of("xla", {"lengths": lengths, "reverse": reverse}), (0, 1, 2)
        )
    )
    clean = f(params, jnp.where(padding, 0, inputs), state)
    dirty = f(params, jnp.where(padding, bad, inputs), state)
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    assert jnp.all(jnp.where(padding, dirty[1][1], 0) == 0)


MESH_SPECS = {
    "batch": (PartitionSpec(), PartitionSpec(None, "x"), PartitionSpec("x")),
    "hidden": (PartitionSpec(None, "x"), PartitionSpec(), PartitionSpec(None, "x")),
}


@pytest.mark.parametrize("specs", MESH_SPECS.values(), ids=MESH_SPECS)
def test_sharded_arguments_give_the_same_gradients(x64, specs):
    params, inputs, state = draw(batch=(4,), hidden=4)
    options = {"lengths": jnp.array([5, 1, 0, 3])}
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    of_params, of_inputs, of_state = (NamedSharding(mesh, s) for s in specs)
    of_bias = NamedSharding(mesh, PartitionSpec(*specs[0][1:]))
    placed = (
        fl.LSTMParams(
            *(jax.device_put(p, of_params) for p in params[:2]),
            jax.device_put(params.bias, of_bias),
        ),
        jax.device_put(inputs, of_inputs),
        jax.device_put(state, of_state),
    )
    f = jax.value_and_grad(loss_of("xla", options), (0, 1, 2))
    want = jax.value_and_grad(loss_of("scan", options), (0, 1, 2))
    close(jax.jit(f)(*placed), want(params, inputs, state))


@pytest.mark.parametrize("remat", [False, 2])
def test_shard_map_and_pmap_give_the_same_gradients(x64, remat):
    """With the default check_vma=True of shard_map."""
    params, inputs, _ = draw(batch=(4,))
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    rows = PartitionSpec("x")
    lengths = jnp.array([5, 1, 0, 3])

    def local(params, inputs, lengths):
        def loss(params, inputs):
            _, outputs = fl.lstm(
                params, inputs, lengths=lengths, implementation="xla", remat=remat
            )
            return jnp.sum(outputs**2)

        return jax.grad(loss, (0, 1))(params, inputs)

    want = local(params, inputs, lengths)
    batch = PartitionSpec(None, "x")
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(PartitionSpec(), batch, rows),
        out_specs=(PartitionSpec(), batch),
    )  # fmt: skip
    close(jax.jit(mapped)(params, inputs, lengths), want)
    if not remat:
        by_device = jax.pmap(
            local, in_axes=(None, 1, 0), out_axes=(0, 1), devices=jax.devices()[:2]
        )
        d_params, d_inputs = by_device(
            params, inputs.reshape(T, 2, 2, D), lengths.reshape(2, 2)
        )
        total = jax.tree.map(lambda g: jnp.sum(g, 0), d_params)
        close((total, d_inputs.reshape(inputs.shape)), want)


@pytest.mark.usefixtures("as_installed")  # a symbolic size is no int
def test_export_with_symbolic_batch_and_time_runs_any_shape(x64):
    params, inputs, _ = draw()
    time, batch = jax.export.symbolic_shape("t, b")

    def gradient(params, inputs, lengths):
        options = {"lengths": lengths, "implementation": "xla"}
        return jax.grad(lambda p: jnp.sum(fl.lstm(p, inputs, **options)[1]))(params)

    shapes = (
        jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params),
        jax.ShapeDtypeStruct((time, batch, D), inputs.dtype),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    )
    exported = jax.export.export(jax.jit(gradient))(*shapes)
    called = exported.call
    lengths = jnp.array([2, 5, 0], jnp.int32)
    close(called(params, inputs, lengths), gradient(params, inputs, lengths))


def test_eval_shape_needs_no_values():
    arguments = jax.eval_shape(lambda: draw(0, jnp.float32))
    got = jax.eval_shape(jax.grad(loss_of("xla", {})), *arguments)
    assert got == arguments[0]


def peak_bytes(steps, **options):
    """Returns the scratch memory that XLA plans for value and gradient."""
    params, inputs, state = draw(0, jnp.float32, steps, (8,), 16, 16)

    def loss(params, inputs, state):
        return jnp.sum(fl.lstm(params, inputs, state, **options)[1] ** 2)

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(params, inputs, state).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_stays_within_that_of_the_scan_and_remat_below_a_third():
    scan = peak_bytes(1024, implementation="scan")
    assert peak_bytes(1024, implementation="xla") < 1.3 * scan
    assert peak_bytes(1024, implementation="xla", remat=True) < scan / 3


def test_the_weights_gradients_are_single_products_outside_the_loop():
    """What the rule is for, read from the program that JAX makes of the gradient."""
    params, inputs, state = draw(0, jnp.float32, batch=(7,))
    jaxpr = jax.make_jaxpr(jax.grad(loss_of("xla", {})))(params, inputs, state)

    def shapes_in_loops(jaxpr, inside):
        for equation in jaxpr.eqns:
            loop = inside or equation.primitive.name == "scan"
            for value in jax.tree.leaves(list(equation.params.values())):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from shapes_in_loops(inner, loop)
            if inside and equation.primitive.name in ("dot_general", "add"):
                yield equation.outvars[0].aval.shape

    weights = {p.shape for p in params[:2]} | {p.T.shape for p in params[:2]}
    assert not weights & set(shapes_in_loops(jaxpr.jaxpr, False))
    plain = jax.make_jaxpr(jax.grad(loss_of("scan", {})))(params, inputs, state)
    assert weights & set(shapes_in_loops(plain.jaxpr, False))


def test_explain_says_what_runs_and_why_not_the_others():
    params, inputs, _ = draw(0, jnp.float32)
    told = fl.explain(params, inputs, dtype=jnp.bfloat16)
    assert told.implementation == "xla"
    assert set(told.reasons) == {"pallas", "cudnn", "cpu", "scan"}
    assert "float32 only" in told.reasons["cpu"]
    assert "needs a CUDA device" in told.reasons["cudnn"]
    assert str(told).startswith("xla: runs\n")
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
    assert fl.explain(shapes, inputs, implementation="scan").implementation == "scan"
    refused = fl.explain(params, inputs, implementation="cudnn", unroll=2)
    assert refused.implementation is None


@pytest.mark.usefixtures("as_installed")
def test_explain_checks_its_arguments_as_lstm_does():
    params, inputs, _ = draw(0, jnp.float32)
    with pytest.raises(ValueError, match=r"lengths must be \[\*batch\] = \(3,\)"):
        fl.explain(params, inputs, lengths=jnp.zeros(2, int))


@pytest.mark.parametrize(
    ("implementation", "reason"),
    [("pallas", "there is no kernel for"), ("cudnn", "needs a CUDA device")],
)
def test_a_choice_that_cannot_be_met_says_why(implementation, reason):
    params, inputs, _ = draw(0, jnp.float32)
    with pytest.raises(NotImplementedError, match=f"{implementation}.*{reason}"):
        fl.lstm(params, inputs, implementation=implementation)


def test_remat_names_what_it_takes():
    assert chunk_length(True, 100) == 10
    assert chunk_length(False, 100) is None
    params, inputs, _ = draw(0, jnp.float32)
    with pytest.raises(ValueError, match=r"remat must be True, False or .*got 0"):
        fl.lstm(params, inputs, remat=0)
    (time,) = jax.export.symbolic_shape("t")
    with pytest.raises(NotImplementedError, match=r"steps is symbolic \(t\); got 2"):
        chunk_length(2, time)
