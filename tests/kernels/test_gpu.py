"""The GPU kernel `single`, without a GPU: interpreted here, and lowered for one.

Problems, and what results are judged by, are those of `gpu_problems.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_lstm_kernels import compat, gpu
from flax_lstm_kernels.gpu import Plan, single, single_backward
from flax_lstm_kernels.gpu.common import Slopes
from flax_lstm_kernels.gpu.plan import SHARED_MEMORY, SPARE, Sizes, choose, single_bytes
from gpu_problems import BARS, compiled, judge, lowered, problem, run

from flax_lstm.cell import squash, update

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("whole_float32")]

# (T, B, I, H), and the rows of a tile: a warpgroup alone, units and rows to fill up;
# two warpgroups, a tile of several eights; two that are full.
CASES = {
    "one group": ((4, 11, 2, 7), 8),
    "two groups": ((3, 20, 2, 100), 16),
    "full": ((3, 8, 2, 128), 8),
}


@pytest.mark.parametrize(
    ("case", "reverse", "dtype"),
    [
        ("one group", False, "float32"),
        ("one group", True, "float32"),
        ("two groups", True, "bfloat16"),
        ("full", False, "float16"),
    ],
)
@pytest.mark.kernels("interpreted")
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


@pytest.mark.kernels("interpreted")
def test_without_resets_and_with_more_stages_than_steps():
    given = problem((2, 3, 2, 7), "float32")
    arguments = (*given.arguments[:-1], jnp.zeros((0, 0), jnp.uint8))
    given = given._replace(arguments=arguments)
    got = run(given, Plan("single", 8, 4), reverse=False)
    judge(given, got, reverse=False, bars=BARS["float32"])


@pytest.mark.kernels("interpreted")
def test_what_is_kept_changes_no_result():
    given = problem((3, 3, 2, 7), "float32")
    plan = Plan("single", 8, 2)
    short, full = (
        run(given, plan, reverse=False, keep=keep).values for keep in (False, True)
    )
    for a, b in zip(short[:3], full[:3], strict=True):
        # The inputs are multiplied by another kernel: a few roundings of float32.
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=3e-7)
    assert short[3].size == short[4].size == 0


@pytest.mark.parametrize("missing", [None, single, single_backward])
@pytest.mark.kernels("interpreted")
def test_a_missing_barrier_is_found(missing, monkeypatch):
    """Shows that the detector sees what warpgroups tell each other, and only then.

    Plain products stand in for wgmma, whose reads it does not follow.
    """
    monkeypatch.setattr(compat, "INTERPRETS_LAYOUTS", False)
    if missing is not None:
        monkeypatch.setattr(missing, "meet", lambda barrier, groups: None)
    given = problem((2, 2, 1, 128), "float32")
    assert run(given, Plan("single", 8, 2), reverse=False).raced is bool(missing)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((5, 3, 2, 7), "float32"),
        ((5, 20, 2, 100), "bfloat16"),
        ((5, 2000, 2, 128), "float16"),
    ],
)
@pytest.mark.kernels("lowered")
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


def test_the_estimate_of_memory_is_what_the_compiler_takes():
    """Or more, where gates of a step go through registers and have no place in it."""
    for sizes, plan, taken in compiled("single"):
        estimate = single_bytes(sizes, plan["rows"], plan["stages"])
        assert taken <= estimate + SPARE, (sizes, plan)
        if sizes.keep or sizes.rows % 8 == sizes.hidden % 64 == 0:
            assert estimate <= taken, (sizes, plan)


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
