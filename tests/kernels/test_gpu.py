"""The GPU kernels, without a GPU: interpreted on this CPU, and lowered for one.

Values and gradients are held against NumPy float64 (`reference.py`). The interpreter
fills all memory that is not written with NaN, and looks for races.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax_lstm_kernels import compat, gpu
from flax_lstm_kernels.gpu import Plan, single, single_backward
from flax_lstm_kernels.gpu.common import Slopes
from flax_lstm_kernels.gpu.plan import SHARED_MEMORY, SPARE, Sizes, choose, single_bytes

from flax_lstm.cell import squash, update

pytestmark = pytest.mark.kernels

# Relative error ‖got - want‖ / ‖want‖ of outputs and gradients. float32: the roundings
# that other libraries show at T 64 (the interpreter multiplies in float32, not tf32).
# bfloat16: half of what they show (6e-3, 8e-3). float16: an eighth of that, for its
# three bits more.
BARS = {
    "float32": (4.4e-7, 8e-7),
    "bfloat16": (3e-3, 4e-3),
    "float16": (4e-4, 1e-3),
}
# (T, B, I, H), and the rows of a tile: a warpgroup alone, units and rows to fill up;
# two warpgroups, a tile of several eights; two that are full.
CASES = {
    "one group": ((4, 11, 2, 7), 8),
    "two groups": ((3, 20, 2, 100), 16),
    "full": ((3, 8, 2, 128), 8),
}


class Problem(NamedTuple):
    """Arguments of `forward`, and the cotangents of its first three results."""

    arguments: tuple
    d_results: tuple


def problem(shape, dtype):
    steps, rows, size, hidden = shape
    keys = jax.random.split(jax.random.key(3), 9)
    normal = jax.random.normal
    kernel = normal(keys[0], (size, 4 * hidden)) / size**0.5
    recurrent = normal(keys[1], (hidden, 4 * hidden)) / hidden**0.5
    bias = normal(keys[2], (4 * hidden,))
    x = normal(keys[3], (steps, rows, size))
    c, h = normal(keys[4], (2, rows, hidden))
    # One row to the end, one that is empty, a whole tile that ends before it.
    lengths = jax.random.randint(keys[5], (rows,), 1, steps, jnp.int32)
    lengths = lengths.at[0].set(steps).at[1].set(0)
    resets = jax.random.bernoulli(keys[6], 0.3, (steps, rows)).astype(jnp.uint8)
    d_hs = normal(keys[7], (steps, rows, hidden))
    d_c, d_h = normal(keys[8], (2, rows, hidden))
    weights = (leaf.astype(dtype) for leaf in (kernel, recurrent, bias))
    return Problem(
        (x.astype(dtype), *weights, c, h.astype(dtype), lengths, resets),
        (d_hs.astype(dtype), d_c, d_h),
    )


class Got(NamedTuple):
    """Results of both kernels, and whether either had a race."""

    values: tuple
    gradients: tuple
    raced: bool


def run(given, plan, *, reverse, keep=True):
    """Runs both kernels; in the padding they are given NaN."""
    x, *weights, lengths, resets = given.arguments
    dead = (jnp.arange(len(x))[:, None] >= lengths[None, :])[..., None]
    options = {"reverse": reverse, "plan": plan, "interpret": compat.watched()}

    def forward(*arguments):
        return gpu.forward(*arguments, keep=keep, **options)

    def backward(*arguments):
        return gpu.backward(*arguments, **options)

    x = jnp.where(dead, jnp.nan, x)
    values = jax.block_until_ready(jax.jit(forward)(x, *weights, lengths, resets))
    raced = compat.races_found()
    if not keep:
        return Got(values, (), raced)
    d_hs, *d_state = given.d_results
    d_hs = jnp.where(dead, jnp.nan, d_hs)
    gradients = jax.jit(backward)(
        d_hs, *d_state, *values[3:], weights[1], lengths, resets
    )
    jax.block_until_ready(gradients)
    return Got(values, gradients, raced or compat.races_found())


def judge(given, got, *, reverse, bars):
    """Compares values and gradients; those of the weights are formed here from d_z."""
    x, kernel, recurrent, bias, c, h, lengths, resets = given.arguments
    want = reference.lstm(
        (kernel, recurrent, bias),
        x,
        (c, h),
        lengths=lengths,
        resets=resets if resets.size else None,
        reverse=reverse,
        keep_order=True,
    )
    wanted = reference.backward(want, *given.d_results)
    (hs, c_last, h_last, _, _), (d_z, d_c, d_h), _ = got
    values = {"hs": (hs, want.outputs), "c": (c_last, want.c), "h": (h_last, want.h)}
    for name, (value, true) in values.items():
        assert reference.error(value, true) < bars[0], name
    d_z = reference.f64(d_z)
    gradients = {
        "inputs": d_z @ reference.f64(kernel).T,
        "bias": d_z.sum((0, 1)),
        "kernel": np.einsum("tbi,tbg->ig", reference.f64(x), d_z),
        "c": d_c,
        "h": d_h,
    }
    for name, value in gradients.items():
        assert reference.error(value, wanted[name]) < bars[1], name


@pytest.mark.parametrize(
    ("case", "reverse", "dtype"),
    [
        ("one group", False, "float32"),
        ("one group", True, "float32"),
        ("two groups", True, "bfloat16"),
        ("full", False, "float16"),
    ],
)
def test_values_and_gradients_are_those_of_numpy(case, reverse, dtype):
    shape, rows = CASES[case]
    given = problem(shape, dtype)
    got = run(given, Plan("single", rows, 2), reverse=reverse)
    judge(given, got, reverse=reverse, bars=BARS[dtype])
    assert not got.raced


def test_the_slopes_are_the_derivative_of_the_step():
    """In float32, of values near 1: a few roundings."""
    z, (c, d_h, d_c) = (
        jax.random.normal(jax.random.key(n), (4 - n, 5)) for n in (0, 1)
    )

    def step(z, c):
        return update(*squash(*z), c)

    _, transpose = jax.vjp(step, z, c)
    wanted = transpose((d_c, d_h))
    got = Slopes.of(squash(*z), c).apply(d_h, d_c)
    np.testing.assert_allclose(jnp.stack(got[0]), wanted[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(got[1], wanted[1], rtol=0, atol=1e-6)


def test_without_resets_and_with_more_stages_than_steps():
    given = problem((2, 3, 2, 7), "float32")
    arguments = (*given.arguments[:-1], jnp.zeros((0, 0), jnp.uint8))
    given = given._replace(arguments=arguments)
    got = run(given, Plan("single", 8, 4), reverse=False)
    judge(given, got, reverse=False, bars=BARS["float32"])


def test_what_is_kept_changes_no_result():
    given = problem((3, 3, 2, 7), "float32")
    plan = Plan("single", 8, 2)
    short, full = (
        run(given, plan, reverse=False, keep=keep).values for keep in (False, True)
    )
    for a, b in zip(short[:3], full[:3], strict=True):
        np.testing.assert_array_equal(a, b)
    assert short[3].size == short[4].size == 0


@pytest.mark.parametrize("missing", [None, single, single_backward])
def test_a_missing_barrier_is_found(missing, monkeypatch):
    """Shows that the detector sees what warpgroups tell each other, and only then.

    Plain products stand in for wgmma, whose reads it does not follow.
    """
    monkeypatch.setattr(compat, "INTERPRETS_LAYOUTS", False)
    if missing is not None:
        monkeypatch.setattr(missing, "meet", lambda barrier, groups: None)
    given = problem((2, 2, 1, 128), "float32")
    assert run(given, Plan("single", 8, 2), reverse=False).raced is bool(missing)


def lowered(shape, dtype):
    """Returns what both passes become for a GPU, by the plans that are chosen."""
    steps, rows, size, hidden = shape

    def like(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    def forward(*arguments):
        return gpu.forward(*arguments, reverse=True, keep=True)

    def backward(*arguments):
        return gpu.backward(*arguments, reverse=True)

    state = like(rows, hidden, dtype=jnp.float32)
    recurrent, h = like(hidden, 4 * hidden), like(rows, hidden)
    masks = like(rows, dtype=jnp.int32), like(steps, rows, dtype=jnp.uint8)
    arguments = (
        like(steps, rows, size),
        like(size, 4 * hidden),
        recurrent,
        like(4 * hidden),
        state,
        h,
        *masks,
    )
    hs, *_, gates, before = jax.eval_shape(forward, *arguments)
    gradients = (hs, state, state, gates, before, recurrent, *masks)
    check = jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
    for function, operands in ((forward, arguments), (backward, gradients)):
        exported = jax.export.export(
            jax.jit(function), platforms=["cuda"], disabled_checks=[check]
        )
        yield exported(*operands).mlir_module()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((5, 3, 2, 7), "float32"),
        ((5, 20, 2, 100), "bfloat16"),
        ((5, 2000, 2, 128), "float16"),
    ],
)
def test_both_lower_for_a_gpu(shape, dtype):
    """Smoke: Mosaic's lowering takes them; the compiler itself is not at hand here."""
    forward, backward = lowered(shape, dtype)
    assert "mosaic_gpu" in forward
    assert "mosaic_gpu" in backward
    # The gates take the place of z in memory.
    assert "output_operand_alias" in forward


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_every_batch_has_a_plan_that_fits(which):
    for hidden, itemsize in ((1, 2), (64, 2), (65, 2), (128, 2), (1, 4), (64, 4)):
        for rows in (1, 8, 9, 100, 1057, 100_000):
            sizes = Sizes(which, 1000, rows, hidden, itemsize)
            plan = choose(sizes)
            # What wgmma asks of its columns.
            assert plan.rows % 8 == 0
            assert plan.rows <= 256
            assert plan.stages >= 2
            needed = single_bytes(sizes, plan.rows, plan.stages)
            assert needed <= SHARED_MEMORY - SPARE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("8.0", jnp.bfloat16, 128), "this is 8.0"),
        (("9.0", jnp.float64, 128), "the computation dtype is float64"),
        (("9.0", jnp.bfloat16, 0), "sizes above 0 only"),
    ],
)
def test_support_tells_the_reason(arguments, message):
    assert message in (gpu.support(*arguments).reason or "")


def test_support_tells_the_plan():
    """128 units of 2 bytes are 128 KiB of weights."""
    told = gpu.support("9.0", jnp.bfloat16, 128, rows=256)
    assert told.reason is None
    assert told.plan is not None
    assert told.plan.kernel == "single"
    assert told.plan.rows == 8  # 32 tiles, of 132 that run at once
