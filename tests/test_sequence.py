"""`lstm` over time against the NumPy float64 reference, and what its words promise."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import flax_lstm as fl
from flax_lstm import foreign
from flax_lstm.loop import flip

NAMES = ("kernel", "recurrent_kernel", "bias", "inputs", "c", "h")


def draw_case(seed, steps, batch, size, hidden, *, lengths, resets, state, dtype):
    """Draws the arguments of one call; None where a choice is off."""
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return jnp.asarray(rng.normal(size=shape) * scale, dtype)

    params = fl.LSTMParams(
        normal(size, 4 * hidden, scale=size**-0.5),
        normal(hidden, 4 * hidden, scale=hidden**-0.5),
        normal(4 * hidden),
    )
    given = fl.LSTMState(normal(*batch, hidden), normal(*batch, hidden))
    options = {}
    if lengths:
        options["lengths"] = jnp.asarray(rng.integers(0, steps + 1, batch))
    if resets:
        options["resets"] = jnp.asarray(rng.random((steps, *batch)) < 0.3)
    return params, normal(steps, *batch, size), given if state else None, options


def run_both(params, inputs, state, options):
    """Returns (results, gradients) of ours and of the reference for random cotangents.

    Gradients by name; c and h only where a state is given.
    """
    rng = np.random.default_rng(0)

    def flat(params, inputs, state):
        final, outputs = fl.lstm(params, inputs, state, **options)
        return outputs, final.c, final.h

    got, pullback = jax.vjp(flat, params, inputs, state)
    cotangents = [rng.normal(size=r.shape) for r in got]
    d_params, d_inputs, d_state = pullback(
        tuple(jnp.asarray(k, r.dtype) for k, r in zip(cotangents, got, strict=True))
    )
    want = reference.lstm(params, inputs, state, **options)
    d_want = reference.backward(want, *cotangents)
    d_got = dict(zip(NAMES, (*d_params, d_inputs, *(d_state or ())), strict=False))
    return got, want[:3], d_got, d_want


@hypothesis.settings(max_examples=20)
@hypothesis.given(
    seed=st.integers(0, 2**31),
    steps=st.integers(0, 5),
    batch=st.lists(st.integers(0, 3), max_size=2).map(tuple),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    lengths=st.booleans(),
    resets=st.booleans(),
    state=st.booleans(),
    reverse=st.booleans(),
    keep_order=st.booleans(),
)
def test_results_and_gradients_equal_the_reference_in_float64(
    seed, steps, batch, sizes, lengths, resets, state, **options
):
    with jax.enable_x64(True):
        params, inputs, state, more = draw_case(
            seed,
            steps,
            batch,
            *sizes,
            lengths=lengths,
            resets=resets,
            state=state,
            dtype=jnp.float64,
        )
        got, want, d_got, d_want = run_both(params, inputs, state, options | more)
    for mine, theirs in zip(got, want, strict=True):
        # ten roundings of 1e-16 per step, five steps, with room to spare
        assert reference.error(mine, theirs) < 1e-13
    for name, gradient in d_got.items():
        assert reference.error(gradient, d_want[name]) < 1e-12, name


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_results_and_gradients_equal_the_reference_in_float32(reverse, masked):
    """Bars: 2 to 3 times the rounding that other libraries show at 64 steps."""
    params, inputs, state, more = draw_case(
        7, 64, (16,), 24, 32, lengths=masked, resets=False, state=True, dtype="float32"
    )
    got, want, d_got, d_want = run_both(
        params, inputs, state, {"reverse": reverse} | more
    )
    for mine, theirs in zip(got, want, strict=True):
        assert reference.error(mine, theirs) < 4.4e-7
    for name, gradient in d_got.items():
        assert reference.error(gradient, d_want[name]) < 8e-7, name


@pytest.mark.parametrize(
    ("dtype", "steps", "bars"),
    [
        # Outputs, inputs' gradient, recurrent kernel's gradient. About 1.5 times what
        # was measured (bf16 2.1e-3, 3.5e-3, 3.3e-3; f16 2.7e-4, 5.0e-4, 4.1e-4): the
        # rounding of the products' operands alone, the sums and the cell being
        # float32, so that it does not grow with the steps.
        (jnp.bfloat16, 64, (3e-3, 5e-3, 5e-3)),
        (jnp.bfloat16, 512, (3e-3, 5e-3, 5e-3)),
        (jnp.float16, 64, (4e-4, 8e-4, 6e-4)),
    ],
    ids=["bf16-64", "bf16-512", "f16-64"],
)
def test_sixteen_bit_runs_stay_near_float64(dtype, steps, bars):
    params, inputs, state, _ = draw_case(
        5, steps, (8,), 32, 32, lengths=False, resets=False, state=True, dtype="float32"
    )
    inputs = inputs.astype(dtype).astype(jnp.float32)  # the same numbers on both sides
    rng = np.random.default_rng(1)
    weights = rng.normal(size=(steps, 8, 32))

    def loss(params, inputs):
        _, outputs = fl.lstm(params, inputs, state, dtype=dtype)
        return jnp.sum(outputs.astype(jnp.float32) * weights)

    final, outputs = fl.lstm(params, inputs, state, dtype=dtype)
    assert (final.c.dtype, final.h.dtype) == (jnp.float32, dtype)
    assert outputs.dtype == dtype
    d_params, d_inputs = jax.jit(jax.grad(loss, (0, 1)))(params, inputs)
    want = reference.lstm(params, inputs, state)
    d_want = reference.backward(want, weights, *np.zeros((2, 8, 32)))
    errors = (
        reference.error(outputs, want.outputs),
        reference.error(d_inputs, d_want["inputs"]),
        reference.error(d_params.recurrent_kernel, d_want["recurrent_kernel"]),
    )
    assert all(e < bar for e, bar in zip(errors, bars, strict=True)), errors


@pytest.fixture
def small():
    """A masked case with resets: 6 steps, lengths 6, 0, 3, 1."""
    params, inputs, state, options = draw_case(
        1, 6, (4,), 3, 5, lengths=False, resets=True, state=True, dtype="float32"
    )
    return params, inputs, state, options | {"lengths": jnp.array([6, 0, 3, 1])}


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("rubbish", [jnp.nan, jnp.inf, 1e30])
def test_padding_changes_no_bit_of_outputs_or_gradients(small, reverse, rubbish):
    params, inputs, state, options = small
    live = jnp.arange(6)[:, None] < options["lengths"][None, :]

    def loss(params, inputs, state):
        final, outputs = fl.lstm(params, inputs, state, reverse=reverse, **options)
        return jnp.sum(outputs**2) + jnp.sum(final.c * final.h), (final, outputs)

    results = [
        jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(
            params, jnp.where(live[..., None], inputs, filler), state
        )
        for filler in (0.0, rubbish)
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)
    outputs = results[1][0][1][1]
    assert jnp.all(jnp.where(live[..., None], 0, outputs) == 0)


def test_a_length_of_zero_returns_the_initial_state_and_zero_outputs(small):
    params, inputs, state, options = small
    final, outputs = fl.lstm(params, inputs, state, **options)
    np.testing.assert_array_equal(final.c[1], state.c[1])
    np.testing.assert_array_equal(final.h[1], state.h[1])
    np.testing.assert_array_equal(outputs[:, 1], 0)


def test_gradients_do_not_cross_a_reset():
    params, inputs, state, _ = draw_case(
        2, 5, (2,), 3, 4, lengths=False, resets=False, state=True, dtype="float32"
    )
    resets = jnp.zeros((5, 2), bool).at[2, 0].set(True)

    def last(inputs, state):
        return jnp.sum(fl.lstm(params, inputs, state, resets=resets)[1][-1])

    d_inputs, d_state = jax.grad(last, (0, 1))(inputs, state)
    assert jnp.all(d_inputs[:2, 0] == 0)
    assert jnp.all(d_state.c[0] == 0)
    assert jnp.all(d_inputs[:2, 1] != 0)
    assert jnp.all(d_state.c[1] != 0)


def test_a_sequence_fed_in_pieces_gives_the_bits_of_the_whole():
    params, inputs, state, _ = draw_case(
        4, 9, (3,), 4, 5, lengths=False, resets=False, state=True, dtype="float32"
    )
    final, outputs = fl.lstm(params, inputs, state)
    pieces = []
    for piece in (inputs[:2], inputs[2:2], inputs[2:8], inputs[8:]):
        state, y = fl.lstm(params, piece, state)
        pieces.append(y)
    np.testing.assert_array_equal(jnp.concatenate(pieces), outputs)
    np.testing.assert_array_equal(state.c, final.c)


def test_a_row_gives_the_same_bits_wherever_it_stands_in_the_batch(small):
    params, inputs, state, options = small
    order = jnp.array([2, 0, 3, 1])
    _, outputs = fl.lstm(params, inputs, state, **options)
    permuted = {k: v[..., order] for k, v in options.items()}
    _, moved = fl.lstm(
        params, inputs[:, order], jax.tree.map(lambda s: s[order], state), **permuted
    )
    np.testing.assert_array_equal(moved, outputs[:, order])


def test_jit_and_unroll_agree_with_eager(small):
    """To rounding only: XLA fuses the step differently."""
    params, inputs, state, options = small
    want = fl.lstm(params, inputs, state, **options)

    def close(got, want):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)

    for got in (
        jax.jit(fl.lstm)(params, inputs, state, **options),
        fl.lstm(params, inputs, state, unroll=4, **options),
        fl.lstm(params, inputs, state, implementation="scan", **options),
    ):
        jax.tree.map(
            lambda g, w: np.testing.assert_allclose(g, w, 1e-6, 1e-6), got, want
        )


def test_vmap_over_layers_equals_one_at_a_time(small):
    params, inputs, _, options = small
    many = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    _, got = jax.vmap(lambda p: fl.lstm(p, inputs, **options))(many)
    for index in range(2):
        layer = jax.tree.map(lambda p, i=index: p[i], many)
        _, want = fl.lstm(layer, inputs, **options)
        np.testing.assert_allclose(got[index], want, rtol=1e-5, atol=1e-6)


def test_jvp_equals_the_reference_gradient(x64, small):
    """⟨gradient, direction⟩: forward mode checked by the reference's backward."""
    params, inputs, state, options = jax.tree.map(
        lambda a: a.astype(jnp.float64) if a.dtype == jnp.float32 else a, small
    )
    rng = np.random.default_rng(8)
    direction = jax.tree.map(
        lambda a: jnp.asarray(rng.normal(size=a.shape)), (params, inputs, state)
    )

    def flat(params, inputs, state):
        return jnp.sum(fl.lstm(params, inputs, state, **options)[1])

    _, got = jax.jvp(flat, (params, inputs, state), direction)
    result = reference.lstm(params, inputs, state, **options)
    ones, zero = np.ones((6, 4, 5)), np.zeros((4, 5))
    gradients = reference.backward(result, ones, zero, zero)
    want = sum(
        np.sum(g * d)
        for g, d in zip(gradients.values(), jax.tree.leaves(direction), strict=True)
    )
    np.testing.assert_allclose(got, want, rtol=1e-11)


@pytest.mark.parametrize("given_state", [False, True], ids=["zero", "given"])
def test_shard_map_over_the_batch_changes_nothing(given_state):
    """With the default check_vma=True, whose typing of the carry is the trap here."""
    params, inputs, state, _ = draw_case(
        6, 4, (8,), 3, 4, lengths=False, resets=False, state=True, dtype="float32"
    )
    state = state if given_state else None
    lengths = jnp.array([4, 0, 1, 2, 3, 4, 4, 2])
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows, batch = PartitionSpec("data"), PartitionSpec(None, "data")

    def local(params, inputs, state, lengths):
        def loss(params):
            _, outputs = fl.lstm(params, inputs, state, lengths=lengths)
            return jnp.sum(outputs**2)

        return jax.grad(loss)(params), fl.lstm(params, inputs, state, lengths=lengths)

    got = jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(PartitionSpec(), batch, rows, rows),
            out_specs=(PartitionSpec(), (rows, batch)),
        )
    )(params, inputs, state, lengths)
    want = jax.jit(local)(params, inputs, state, lengths)
    # The gradient is summed over the devices in another order.
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, 1e-5, 1e-6), got, want)


@pytest.mark.parametrize("scale", [1e4, 1e18, 1e30])
def test_extreme_inputs_give_finite_values_and_gradients(scale):
    params, inputs, state, _ = draw_case(
        9, 4, (3,), 3, 4, lengths=False, resets=False, state=True, dtype="float32"
    )
    inputs = inputs * scale

    def loss(params, inputs):
        return jnp.sum(fl.lstm(params, inputs, state)[1])

    value, gradients = jax.value_and_grad(loss, (0, 1))(params, inputs)
    assert jnp.isfinite(value)
    assert all(jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(gradients))
    _, outputs = fl.lstm(params, inputs, state)
    assert reference.error(outputs, reference.lstm(params, inputs, state)[0]) < 1e-5


def test_nan_stays_in_its_row_and_future(small):
    params, inputs, state, _ = small
    _, clean = fl.lstm(params, inputs, state)
    _, outputs = fl.lstm(params, inputs.at[3, 2, 0].set(jnp.nan), state)
    np.testing.assert_array_equal(outputs[:3], clean[:3])
    np.testing.assert_array_equal(outputs[:, [0, 1, 3]], clean[:, [0, 1, 3]])
    assert jnp.all(jnp.isnan(outputs[3:, 2]))


def test_ten_thousand_steps_stay_near_float64():
    params, inputs, state, _ = draw_case(
        3, 10_000, (1,), 4, 8, lengths=False, resets=False, state=True, dtype="float32"
    )
    _, outputs = fl.lstm(params, inputs, state)
    want = reference.lstm(params, inputs, state)
    assert reference.error(outputs, want.outputs) < 5e-6


def test_numpy_arguments_give_the_bits_of_jax_arguments(small):
    params, inputs, state, options = small
    given = jax.tree.map(np.asarray, small[:3])
    more = {k: np.asarray(v) for k, v in options.items()}
    got, want = fl.lstm(*given, **more), fl.lstm(params, inputs, state, **options)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_flip_equals_row_by_row_reversal():
    sequence = np.arange(24.0).reshape(4, 2, 3, 1)
    lengths = np.array([[4, 0, 1], [2, 3, 4]])
    want = sequence.copy()
    for row in np.ndindex(2, 3):
        n = lengths[row]
        want[:n, *row] = sequence[:n, *row][::-1]
    got = flip(jnp.asarray(sequence), jnp.asarray(lengths))
    np.testing.assert_array_equal(got, want)


def test_a_plain_pair_is_a_state(small):
    params, xs, state, _ = small
    for run in (fl.lstm, fl.lstm_internals):
        got, want = run(params, xs, tuple(state)), run(params, xs, state)
        jax.tree.map(np.testing.assert_array_equal, got, want)
    got, want = (fl.lstm_cell(params, s, xs[0]) for s in (tuple(state), state))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert "runs" in str(fl.explain(params, xs, tuple(state)))


@pytest.mark.parametrize("implementation", ["scan", "xla", None])
def test_a_length_above_the_steps_that_only_jit_sees_is_that_of_all(
    small, implementation
):
    params, xs, _, _ = small

    @jax.jit
    def run(lengths):
        return fl.lstm(
            params, xs, lengths=lengths, reverse=True, implementation=implementation
        )

    got, want = (run(jnp.array([6, 2, last, 0])) for last in (9, 6))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("implementation", ["scan", "xla", None])
def test_tools_that_look_for_errors_find_none(small, implementation):
    """NaN in what is kept past the lengths is nobody's; without jit it runs as well."""
    params, xs, _, _ = small
    lengths = jnp.array([6, 2, 5, 0])

    def loss(params):
        options = {"lengths": lengths, "implementation": implementation}
        return jnp.sum(fl.lstm(params, xs, **options)[1] ** 2)

    want = jax.grad(loss)(params)
    with jax.debug_nans(True):
        seen = jax.grad(loss)(params)
    with jax.disable_jit():
        slow = jax.grad(loss)(params)
    for got in (seen, slow):
        jax.tree.map(
            lambda g, w: np.testing.assert_allclose(g, w, 1e-5, 1e-6), got, want
        )


def test_what_is_kept_past_the_lengths_is_no_error_where_the_call_alone_is_jitted(
    small, monkeypatch
):
    """It is then a result of the jitted function, in whose bits there may be NaN."""
    params, xs, _, _ = small
    lengths, bind = jnp.array([6, 2, 5, 0]), foreign.bind_forward
    found = []

    def with_nan(*arguments, keep):
        hs, c, h, gates, before = bind(*arguments, keep=keep)
        found.append(keep)
        if keep:
            live = (jnp.arange(6)[:, None] < lengths[None])[..., None]
            gates, before = (jnp.where(live, kept, jnp.nan) for kept in (gates, before))
        return hs, c, h, gates, before

    monkeypatch.setattr(foreign, "bind_forward", with_nan)

    def gradient():
        @jax.jit
        def loss(params):
            return jnp.sum(fl.lstm(params, xs, lengths=lengths)[1] ** 2)

        return jax.grad(loss)(params)

    want = gradient()
    if not found:
        pytest.skip("no kernel for this machine")
    with jax.debug_nans(True):
        got = gradient()
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("wide", [False, True], ids=["x32", "x64"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_promoted_unasked(small, wide, dtype):
    """With `jax_numpy_dtype_promotion="strict"`, which raises where something is."""
    params, xs, _, _ = small
    params, xs = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, xs))
    resets = jnp.zeros(xs.shape[:2], bool)
    with jax.enable_x64(wide), jax.numpy_dtype_promotion("strict"):
        for lengths in (
            None,
            *(np.array([6, 2, 5, 0], d) for d in (np.int8, np.int64)),
        ):
            options = {"lengths": lengths, "resets": resets, "reverse": True}
            for implementation in ("scan", "xla", None):
                fl.lstm(params, xs, implementation=implementation, **options)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("implementation", ["scan", "xla", None])
def test_rows_may_be_spread_over_a_mesh_of_explicit_axes(implementation, reverse):
    """Where the type of an array says how it is spread, a loop must not change it.

    In reverse the outputs are put into their order by `take_along_axis`.
    """
    params = fl.init_lstm_params(jax.random.key(0), 3, 4)
    xs = jax.random.normal(jax.random.key(1), (6, 8, 3))
    lengths = jnp.array([6, 5, 0, 3, 1, 2, 6, 4])

    def run(params, xs, lengths):
        def loss(params):
            options = {"lengths": lengths, "implementation": implementation}
            return jnp.sum(fl.lstm(params, xs, reverse=reverse, **options)[1] ** 2)

        return jax.value_and_grad(loss)(params)

    want = jax.jit(run)(params, xs, lengths)
    axes = (jax.sharding.AxisType.Explicit,)
    mesh = jax.make_mesh((8,), ("data",), axis_types=axes)
    with jax.set_mesh(mesh):
        specs = PartitionSpec(), PartitionSpec(None, "data"), PartitionSpec("data")
        given = (
            jax.device_put(value, NamedSharding(mesh, spec))
            for value, spec in zip((params, xs, lengths), specs, strict=True)
        )
        got = jax.jit(run)(*given)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, 1e-5, 1e-6), got, want)
