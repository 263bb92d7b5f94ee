"""`lstm(implementation="pallas")` from end to end, its kernels interpreted on this CPU.

Values and gradients are held against NumPy float64 (`reference.py`).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax_lstm_kernels.target import on

from flax_lstm import LSTMParams, LSTMState, lstm

pytestmark = pytest.mark.kernels

KINDS = {"tpu": "TPU v5e", "cuda": "9.0"}
# Relative error ‖got - want‖ / ‖want‖ of outputs, and of gradients. float32: the
# roundings that other libraries show at T 64. bfloat16: half of what they show (6e-3,
# 8e-3); float16: less than any of them does (6.3e-4, 8e-4), and the same for tf32, of
# as many bits. Only operands and outputs are rounded here.
BARS = {"float32": (4.4e-7, 8e-7), "bfloat16": (3e-3, 4e-3), "float16": (6e-4, 8e-4)}
TF32 = BARS["float16"]


def problem(dtype):
    """Odd sizes; a row that ends before it starts; numbers that the dtype holds."""
    steps, rows, size, hidden = 5, 11, 3, 21
    keys = jax.random.split(jax.random.key(5), 6)
    normal = jax.random.normal
    params = LSTMParams(
        normal(keys[0], (size, 4 * hidden)) / size**0.5,
        normal(keys[1], (hidden, 4 * hidden)) / hidden**0.5,
        normal(keys[2], (4 * hidden,)),
    )
    c, h = normal(keys[3], (2, rows, hidden))
    x = normal(keys[4], (steps, rows, size))
    lengths = jnp.array([5, 0, 1, 5, 3, 2, 4, 0, 5, 1, 2])
    resets = jax.random.bernoulli(keys[5], 0.3, (steps, rows))
    rounded = jax.tree.map(lambda leaf: leaf.astype(dtype).astype("float32"), params)
    return rounded, x.astype(dtype), LSTMState(c, h.astype(dtype)), lengths, resets


@pytest.mark.parametrize(
    ("platform", "dtype", "reverse"),
    [
        ("tpu", "float32", True),
        ("tpu", "bfloat16", False),
        ("cuda", "float32", False),
        ("cuda", "bfloat16", True),
        ("cuda", "float16", False),
    ],
)
@pytest.mark.kernels("interpreted")
def test_values_and_gradients_are_those_of_numpy(platform, dtype, reverse):
    params, x, state, lengths, resets = problem(dtype)
    options = {
        "lengths": lengths,
        "resets": resets,
        "reverse": reverse,
        "keep_order": True,
    }
    want = reference.lstm(params, x, state, **options)
    keys = jax.random.split(jax.random.key(1), 2)
    d_y = jax.random.normal(keys[0], want.outputs.shape).astype(dtype)
    d_c, d_h = jax.random.normal(keys[1], (2, *want.c.shape))
    d_h = d_h.astype(dtype)
    dead = (jnp.arange(len(x))[:, None] >= lengths[None, :])[..., None]

    def run(params, x, state):
        def call(params, x, state):
            return lstm(
                params, x, state, implementation="pallas", dtype=x.dtype, **options
            )

        results, transpose = jax.vjp(call, params, x, state)
        return results, transpose((LSTMState(d_c, d_h), d_y))

    given = params, jnp.where(dead, jnp.nan, x), state
    with on(platform, KINDS[platform], interpret=True):
        ((c, h), y), gradients = jax.jit(run)(*given)
    as_tf32 = platform == "cuda" and dtype == "float32"
    values, derivatives = TF32 if as_tf32 else BARS[dtype]
    assert y.dtype == h.dtype == jnp.dtype(dtype)
    for value, true in ((y, want.outputs), (c, want.c), (h, want.h)):
        assert reference.error(value, true) < values
    wanted = reference.backward(want, d_y, d_c, d_h)
    d_params, d_x, d_state = gradients
    assert {leaf.dtype for leaf in d_params} == {jnp.dtype("float32")}
    for name, got in {
        **d_params._asdict(),
        "inputs": d_x,
        **d_state._asdict(),
    }.items():
        assert reference.error(got, wanted[name]) < derivatives, name


@pytest.mark.parametrize("platform", KINDS)
@pytest.mark.kernels("interpreted")
def test_x64_changes_nothing_inside(platform):
    """Integers of Python would have 64 bits there, which no kernel knows."""
    params, x, state, lengths, resets = problem("bfloat16")

    def run():
        def loss(params):
            options = {"lengths": lengths, "resets": resets, "dtype": x.dtype}
            _, y = lstm(params, x, state, implementation="pallas", **options)
            return jnp.sum(y.astype("float32") ** 2)

        with on(platform, KINDS[platform], interpret=True):
            return jax.jit(jax.value_and_grad(loss))(params)

    want = run()
    with jax.enable_x64(True):
        got = run()
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("platform", KINDS)
@pytest.mark.kernels("lowered")
def test_kernels_lower_with_x64(platform):
    params, x, *_ = problem("bfloat16")
    with jax.enable_x64(True), on(platform, KINDS[platform]):

        def loss(params):
            _, y = lstm(params, x, implementation="pallas", dtype=x.dtype)
            return jnp.sum(y.astype("float32"))

        check = jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
        made = jax.export.export(
            jax.jit(jax.value_and_grad(loss)),
            platforms=[platform],
            disabled_checks=[check],
        )(params)
    assert {"tpu": "tpu_custom_call", "cuda": "mosaic_gpu"}[platform] in (
        made.mlir_module()
    )
