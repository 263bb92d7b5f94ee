"""The GPU kernels over a cluster of blocks, without a GPU; problems of `gpu_problems`.

Interpreted, the blocks of a cluster are one block, and the copies between them are made
at once (`cluster_exchange`). What that shows: which weights, gates, units and rows each
has, masks, order of time; that all waits are where they must be, if a copy is done when
the barrier says so. What it does not: the instructions that copy and wait, which only a
compiler has seen, and the order in which they may take effect, which
`test_gpu_cluster_exchange` has in a model.
"""

import jax.numpy as jnp
import pytest
from flax_lstm_kernels import compat, gpu
from flax_lstm_kernels.gpu import Plan
from flax_lstm_kernels.gpu.cluster_exchange import Exchange
from flax_lstm_kernels.gpu.plan import (
    SHARED_MEMORY,
    SPARE,
    Sizes,
    cluster_bytes,
    plan_cluster,
)
from gpu_problems import BARS, compiled, judge, lowered, problem, run

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("whole_float32")]

# (T, B, I, H), rows of a tile, blocks: a warpgroup in each of two blocks, units and
# rows to fill up; two warpgroups in each, and two eights of rows; four blocks.
CASES = {
    "two blocks": ((4, 11, 2, 60), 8, 2),
    "two groups": ((3, 9, 2, 100), 16, 2),
    "four blocks": ((2, 3, 1, 128), 8, 4),
}


@pytest.mark.parametrize(
    ("case", "reverse", "dtype"),
    [
        ("two blocks", False, "float32"),
        ("two groups", True, "bfloat16"),
        ("four blocks", True, "float32"),
    ],
)
@pytest.mark.kernels("interpreted")
def test_values_and_gradients_are_those_of_numpy(case, reverse, dtype):
    shape, rows, blocks = CASES[case]
    given = problem(shape, dtype)
    got = run(given, Plan("cluster", rows, 2, blocks), reverse=reverse)
    judge(given, got, reverse=reverse, bars=BARS[dtype])
    assert not got.raced


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.kernels("interpreted")
def test_a_missing_wait_is_found(missing, monkeypatch):
    """Plain products stand in for wgmma, whose reads the detector does not follow."""
    monkeypatch.setattr(compat, "INTERPRETS_LAYOUTS", False)
    if missing:
        monkeypatch.setattr(Exchange, "wait", lambda self, round_: None)
    given = problem((2, 2, 1, 64), "float32")
    no_resets = jnp.zeros((0, 0), jnp.uint8)
    given = given._replace(arguments=(*given.arguments[:-1], no_resets))
    got = run(given, Plan("cluster", 8, 2, 2), reverse=False)
    assert got.raced is missing


@pytest.mark.parametrize(
    ("shape", "dtype"), [((5, 9, 2, 200), "bfloat16"), ((5, 3, 2, 130), "float32")]
)
@pytest.mark.kernels("lowered")
def test_both_lower_for_a_gpu(shape, dtype):
    """Smoke: Mosaic's lowering takes them; the compiler itself is not at hand here."""
    sizes = Sizes("forward", *shape[:2], shape[-1], jnp.dtype(dtype).itemsize)
    assert gpu.plan.choose(sizes).kernel == "cluster"
    for module in lowered(shape, dtype):
        assert "mosaic_gpu" in module


@pytest.mark.parametrize(
    ("largest", "itemsize", "hidden"), [(16, 2, 512), (16, 4, 320), (8, 2, 256)]
)
def test_hidden_sizes_have_plans_that_fit(largest, itemsize, hidden):
    for which in ("forward", "backward"):
        for units in range(129, hidden + 1, 7):
            for rows in (1, 8, 9, 100, 5000):
                sizes = Sizes(which, 100, rows, units, itemsize)
                plan = plan_cluster(sizes, largest)
                assert isinstance(plan, Plan), plan
                assert plan.blocks <= largest
                # Warpgroups own 32 units each, and 64 rows of the products.
                assert plan.size(units) % (32 * plan.blocks) == 0
                assert plan.blocks % 2 == 0
                needed = cluster_bytes(sizes, plan.rows, plan.blocks)
                assert needed <= SHARED_MEMORY - SPARE


@pytest.mark.parametrize(("largest", "itemsize", "hidden"), [(8, 2, 400), (16, 4, 512)])
def test_too_many_units_are_refused(largest, itemsize, hidden):
    told = plan_cluster(Sizes("backward", 100, 8, hidden, itemsize), largest)
    assert f"{hidden} units of {itemsize} bytes are too many" in told
    assert f"up to {largest} blocks" in told


def test_the_estimate_of_memory_is_what_the_compiler_takes():
    for sizes, plan, taken in compiled("cluster"):
        estimate = cluster_bytes(sizes, plan["rows"], plan["blocks"])
        assert estimate <= taken <= estimate + SPARE, (sizes, plan)
