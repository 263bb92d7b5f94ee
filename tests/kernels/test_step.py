"""The `step` kernels without a GPU: interpreted on this CPU, and lowered for one.

Each launch is interpreted, with the loop over them as it will run. Problems and bars
are those of `gpu_problems.py`.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from flax_lstm_kernels.gpu import Plan
from flax_lstm_kernels.gpu.plan import (
    SHARED_MEMORY,
    SPARE,
    Sizes,
    plan_step,
    slab_bytes,
)
from gpu_problems import BARS, judge, lowered, problem, run

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("whole_float32")]

# (T, B, I, H), rows of a tile, stages: two groups of 64 units, two tiles, units and
# rows to fill up; more chunks than stages, rows as registers hold them from 16 up.
CASES = {
    "two groups": ((3, 11, 2, 100), 8, 2),
    "refilled": ((2, 16, 2, 192), 16, 2),
}


@pytest.mark.parametrize(
    ("case", "reverse", "dtype"),
    [
        ("two groups", False, "float32"),
        ("two groups", True, "bfloat16"),
        ("refilled", True, "float32"),
    ],
)
@pytest.mark.kernels("interpreted")
def test_values_and_gradients_are_those_of_numpy(case, reverse, dtype):
    shape, rows, stages = CASES[case]
    given = problem(shape, dtype)
    got = run(given, Plan("step", rows, stages), reverse=reverse)
    judge(given, got, reverse=reverse, bars=BARS[dtype])
    assert not got.raced


@pytest.mark.kernels("interpreted")
def test_without_resets_and_without_what_is_kept():
    given = problem((2, 3, 2, 7), "float32")
    arguments = (*given.arguments[:-1], jnp.zeros((0, 0), jnp.uint8))
    given = given._replace(arguments=arguments)
    plan = Plan("step", 8, 1)
    got = run(given, plan, reverse=False)
    judge(given, got, reverse=False, bars=BARS["float32"])
    short = run(given, plan, reverse=False, keep=False).values
    for a, b in zip(short[:3], got.values[:3], strict=True):
        # The inputs are multiplied by another kernel: a few roundings of float32.
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=3e-7)
    assert short[3].size == short[4].size == 0


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((5, 3, 2, 130), "float32"), ((5, 70, 2, 2048), "bfloat16")],
)
@pytest.mark.kernels("lowered")
def test_both_lower_for_a_gpu(shape, dtype):
    """Smoke: Mosaic's lowering takes them; the compiler itself is not at hand here."""
    sizes = Sizes("backward", shape[0], shape[1], shape[3], jnp.dtype(dtype).itemsize)
    for module in lowered(shape, dtype, plan_step(sizes)):
        assert "mosaic_gpu" in module


@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_plan_fits(itemsize):
    for hidden in (1, 1024, 2048, 10_000):
        for rows in (1, 9, 17, 10_000):
            sizes = Sizes("forward", 10, rows, hidden, itemsize)
            plan = plan_step(sizes)
            needed = slab_bytes(sizes, plan.rows, plan.stages, resident=False)
            assert needed <= SHARED_MEMORY - SPARE
