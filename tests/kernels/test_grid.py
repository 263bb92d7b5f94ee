"""The `grid` kernels without a GPU: interpreted on this CPU, and lowered for one.

All blocks of a tile are interpreted at once, in threads, the loop over time and all.
Only the flags are others: counters in memory, which the race detector would object to,
so that it is off; `test_step.py` has it watch the same phases. There are four blocks,
one group: more wait for too long on two cores. `test_step.py` has two groups.
"""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_lstm_kernels import compat
from flax_lstm_kernels.gpu import Plan, grid
from flax_lstm_kernels.gpu.plan import (
    MOST_BLOCKS,
    SHARED_MEMORY,
    SPARE,
    Sizes,
    plan_grid,
    slab_bytes,
    tiles_at_once,
    up,
)
from flax_lstm_kernels.gpu.slab_backward import GROUP
from flax_lstm_kernels.gpu.slabs import UNITS, Cut
from flax_lstm_kernels.gpu.source import Kind
from gpu_problems import BARS, judge, lowered, problem, run

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("whole_float32")]

NAN_FILLED = compat.InterpretGPUParams(uninitialized_memory="nan")


@pytest.mark.parametrize(
    ("shape", "rows", "stages", "reverse", "dtype"),
    [
        ((3, 3, 2, 60), 8, 1, False, "float32"),
        ((3, 16, 2, 7), 16, 1, True, "bfloat16"),
        ((2, 3, 2, 70), 8, 1, False, "bfloat16"),  # a chunk of 128
    ],
)
@pytest.mark.kernels("interpreted")
def test_values_and_gradients_are_those_of_numpy(shape, rows, stages, reverse, dtype):
    given = problem(shape, dtype)
    plan = Plan("grid", rows, stages)
    got = run(given, plan, reverse=reverse, interpret=NAN_FILLED)
    judge(given, got, reverse=reverse, bars=BARS[dtype])


@pytest.mark.kernels("interpreted")
def test_tiles_run_one_after_another_where_they_do_not_fit(monkeypatch):
    monkeypatch.setattr(grid, "tiles_at_once", lambda size: 1)
    given = problem((2, 12, 2, 7), "float32")
    arguments = (*given.arguments[:-1], jnp.zeros((0, 0), jnp.uint8))
    given = given._replace(arguments=arguments)
    plan = Plan("grid", 8, 1)
    got = run(given, plan, reverse=False, interpret=NAN_FILLED)
    judge(given, got, reverse=False, bars=BARS["float32"])


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((5, 3, 2, 130), "float32"), ((5, 200, 2, 1024), "bfloat16")],
)
@pytest.mark.kernels("lowered")
def test_both_lower_for_a_gpu(shape, dtype):
    """Smoke: Mosaic's lowering takes them; the compiler itself is not at hand here."""
    itemsize = jnp.dtype(dtype).itemsize
    plan = plan_grid(Sizes("backward", shape[0], shape[1], shape[3], itemsize))
    for module in lowered(shape, dtype, plan):
        assert "mosaic_gpu" in module


@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_plan_fits_and_no_more_blocks_than_run_at_once(itemsize):
    for hidden in (1, 64, 130, 512, 832, 833, 1024, 1280, 1728, 1729):
        for rows in (1, 8, 9, 100, 4096):
            sizes = Sizes("forward", 10, rows, hidden, itemsize)
            plan, size = plan_grid(sizes), up(hidden, 64)
            if hidden > (832 if itemsize == 4 else 1728):
                assert "of shared memory; a block has 223" in plan
                continue
            at_once = min(up(rows, plan.rows) // plan.rows, tiles_at_once(size))
            assert 1 <= at_once * size // 16 <= MOST_BLOCKS
            needed = slab_bytes(sizes, plan.rows, plan.stages, resident=True)
            assert needed <= SHARED_MEMORY - SPARE


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("which", "resident", "strips"),
    [("forward", True, False), ("forward", False, True), ("backward", False, False)],
)
def test_the_plan_counts_the_shared_memory_that_is_asked_for(
    dtype, which, resident, strips
):
    cut = Cut(16, 192, jnp.dtype(dtype), 2, resident, strips)
    arrays = [ref for ref in cut.scratch() if hasattr(ref, "shape")]
    asked = sum(int(np.prod(a.shape)) * jnp.dtype(a.dtype).itemsize for a in arrays)
    sizes = Sizes(which, 1, 16, 192, jnp.dtype(dtype).itemsize)
    assert len(arrays) == 3 + strips
    assert asked == slab_bytes(sizes, 16, 2, resident=resident)


def test_a_device_with_fewer_multiprocessors_runs_fewer_blocks(monkeypatch):
    """An H100 PCIe has 114: two tiles of 64 blocks would wait for ever."""
    device = type("Device", (), {"platform": "gpu", "core_count": 114})
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert tiles_at_once(1024) == 1
    assert tiles_at_once(448) == 4


def test_too_many_units_have_a_reason():
    with pytest.raises(NotImplementedError, match="no more than 128 are sure to run"):
        grid.launch(lambda: None, Cut(8, 2112, jnp.bfloat16, 2, True), 8, [], None)
    assert "no more than 128 are sure to run at once" in plan_grid(
        Sizes("forward", 1, 1, 2049, 2)
    )


class Given:
    """Any argument of a kernel: of three tiles, each of which has two steps."""

    shape, dtype = (3,), jnp.dtype("float32")

    @property
    def at(self):
        return self

    def __getitem__(self, place):
        return 2 if isinstance(place, int) else self


class Counting:
    """Stands in for a block and its flags; notes signals so far at every wait."""

    def __init__(self):
        self.signals, self.waits = Counter(), []

    def signal(self, flag):
        self.signals[int(flag)] += 1

    def wait(self, flag, count):
        self.waits.append((int(flag), self.signals[int(flag)], int(count)))

    def load(self, *_):
        return jnp.zeros((1, 1))

    def turned(self, _):
        return [jnp.zeros((1, 1))] * GROUP

    def nothing(self, *_):
        pass

    per_row, product, store = load, nothing, nothing
    keep_weights = keep_turned = nothing


@pytest.mark.parametrize(
    ("body", "options", "waits"),
    [
        (grid.forward_body, {"kind": Kind(keep=True, planes=False, held=None)}, 2),
        (grid.backward_body, {}, 2 * 2 + 1),
    ],
    ids=["forward", "backward"],
)
def test_what_is_waited_for_grows_from_tile_to_tile(body, options, waits, monkeypatch):
    """Each wait is for all blocks to have signalled as often as the one that waits.

    So has the model of `test_flags.py`, of one tile.
    """
    blocks, found = 8, Counting()

    def loop(start, end, step, carry):
        for n in range(start, end):
            carry = step(n, carry)
        return carry

    monkeypatch.setattr(grid.lax, "fori_loop", loop)
    monkeypatch.setattr(grid.lax, "axis_index", lambda name: 0)
    monkeypatch.setattr(grid, "Block", lambda *_: found)
    body(
        *[Given()] * 20,
        cut=Cut(8, blocks * UNITS, jnp.float32, 1, resident=True),
        at_once=1,
        reverse=False,
        cuts=False,
        plain=True,
        make_flags=lambda: found,
        **options,
    )
    assert len(found.waits) == 3 * waits
    for flag, signals, count in found.waits:
        assert count == signals * (GROUP if flag else blocks)
