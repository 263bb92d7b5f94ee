"""What the threads of a block of the GPU kernels do to each other: nothing unordered.

The interpreter runs a warpgroup as one thread, and copies and matrix products at once.
This runs the kernels' own code in the model of `gpu_order.py`, which does not.
"""

import functools

import jax.numpy as jnp
import pytest
from flax_lstm_kernels import compat, gpu
from flax_lstm_kernels.gpu import Plan, project
from flax_lstm_kernels.gpu.arrange import kept_dtype, up
from flax_lstm_kernels.gpu.project_operands import weights_of_inputs
from flax_lstm_kernels.gpu.source import Piece
from gpu_order import Block
from gpu_recorder import Memory, stand_ins

pytestmark = pytest.mark.kernels

# Kernel, pass, dtype, H, stages, and rows; of `project` I, no stages, and units. Of
# `single` two warpgroups where they fit; of the others more chunks than stages.
CASES = [
    ("single", "forward", "bfloat16", 128, 3, 8),
    ("single", "inference", "bfloat16", 128, 2, 8),
    ("single", "inference", "bfloat16", 100, 2, 9),
    ("single", "inference", "float16", 128, 2, 1),
    ("single", "backward", "bfloat16", 128, 2, 8),
    ("single", "forward", "float32", 64, 2, 8),
    ("single", "inference", "float32", 64, 3, 8),
    ("single", "inference", "float32", 64, 2, 9),
    ("single", "backward", "float32", 128, 3, 8),
    ("cluster", "forward", "bfloat16", 256, 2, 8),
    ("cluster", "inference", "float32", 128, 2, 8),
    ("cluster", "inference", "bfloat16", 100, 2, 9),
    ("cluster", "backward", "bfloat16", 128, 2, 8),
    ("cluster", "backward", "float32", 128, 2, 8),
    ("grid", "forward", "bfloat16", 384, 2, 8),
    ("grid", "inference", "float32", 192, 2, 8),
    ("grid", "inference", "bfloat16", 200, 2, 1),
    ("grid", "backward", "float32", 192, 2, 8),
    ("step", "forward", "bfloat16", 384, 2, 8),
    ("step", "inference", "float32", 256, 3, 8),
    ("step", "inference", "bfloat16", 328, 2, 9),
    ("step", "backward", "bfloat16", 384, 2, 8),
    ("project", "inference", "bfloat16", 300, 0, 64),
    ("project", "inference", "float32", 100, 0, 64),
    ("project", "inference", "bfloat16", 100, 0, 100),
    ("project", "inference", "float32", 40, 0, 100),
]
STEPS = 4
BARRIERS = ("sync", "stored", "arrive", "wait", "wgmma_wait", "received", "cluster")
# Barriers that others make up for: of a flag, which is for global memory, of which the
# model knows nothing, and one before the first of them.
NOT_NEEDED = ("signal", "keep_weights")


def named(case):
    return " ".join(map(str, case))


def run(kernel, which, dtype, held, stages, held_rows):
    """Runs a pass, of which the last step is past the lengths."""
    dtype, size, rows = jnp.dtype(dtype), up(held, 64), up(held_rows, 8)
    blocks = max(2, size // 64) if kernel == "cluster" else 1
    plan = Plan(kernel, 8, stages, blocks)
    state, h = jnp.ones((rows, size)), jnp.ones((rows, size), dtype)
    weights = jnp.ones((held, 4, held), dtype)
    gates = jnp.ones((STEPS, rows, 4, size), kept_dtype(dtype))
    lengths = jnp.full(rows, STEPS - 1), jnp.zeros((STEPS, rows), jnp.uint8)
    options = {"reverse": False, "plan": plan}
    if which == "backward":
        of_steps = jnp.ones((STEPS, rows, size))
        arrays = of_steps.astype(dtype), state, state, gates, of_steps, weights
        gpu.BACKWARD[kernel](*arrays, *lengths, **options)
        return
    source = gates
    if which == "inference":  # hs in the place of gates, as where units are filled up
        hs = Memory("hs", (4 * STEPS * held_rows, held), dtype)
        now = jnp.array([0, STEPS, 0, STEPS], jnp.int32)
        source = Piece(hs, None, now, STEPS, held_rows)
    gpu.FORWARD[kernel](source, weights, state, h, *lengths, **options)


def run_projection(dtype, inner, units):
    """Runs `project`, each block over three tiles."""
    rows, dtype = 64, jnp.dtype(dtype)
    kernel, bias = jnp.ones((inner, 4 * units), dtype), jnp.ones(4 * units, dtype)
    planes = compat.in_place(jnp.ones((4 * 3 * rows, units), dtype))
    project.project(
        jnp.ones((3, rows, inner), dtype),
        weights_of_inputs(kernel, bias, (rows, units), dtype),
        planes,
        jnp.array([0, 3, 0]),
        rows=rows,
        least=1,
    )


def record(kernel, which, dtype, size, stages, held):
    """Returns what some blocks do, each `Launched`."""
    blocks = []
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, value in stand_ins(blocks):
            patch.setattr(owner, name, value)
        if kernel == "project":
            patch.setattr(project, "BLOCKS", 1)
            run_projection(dtype, size, held)
        else:
            run(kernel, which, dtype, size, stages, held)
    assert any(events for block in blocks for events in block.groups)
    return blocks


recorded = functools.cache(record)


@pytest.mark.parametrize("case", CASES, ids=named)
def test_every_two_accesses_that_conflict_are_in_an_order(case):
    found = [Block(block).run() for block in recorded(*case)]
    assert set().union(*found) == set()


def test_without_any_one_barrier_they_are_not():
    """So none is there for nothing, and the model sees what each is there for."""
    needed, idle = set(), set()
    for case in CASES:
        blocks = recorded(*case)
        sites = {
            (event.kind, event.site)
            for block in blocks
            for events in block.groups
            for event in events
            if event.kind in BARRIERS
        }
        for site in sites - needed:
            found = any(Block(block.without(*site)).run() for block in blocks)
            (needed if found else idle).add(site)
    idle = {site for site in idle - needed if not site[1].endswith(NOT_NEEDED)}
    assert not idle
    assert needed


@pytest.mark.parametrize("units", [64, 100])
def test_one_place_less_is_found(units, monkeypatch):
    monkeypatch.setattr(project, "TURNS", project.TURNS - 1)
    block, *_ = record("project", "inference", "bfloat16", 300, 0, units)
    assert "project.py" in min(Block(block).run())


@pytest.mark.parametrize(
    "case", [case for case in CASES if case[0] in ("step", "project")], ids=named
)
def test_to_wait_for_one_product_less_is_found(case):
    found = []
    for block in recorded(*case):
        waits = [
            (events, n)
            for events in block.groups
            for n, event in enumerate(events)
            if event.kind == "wgmma_wait"
        ]
        changed = {id(events): list(events) for events in block.groups}
        for events, n in waits:
            (count,) = events[n].what
            changed[id(events)][n] = events[n]._replace(what=(count + 1,))
        if waits:
            found.append(Block(block._replace(groups=list(changed.values()))).run())
    assert found
    assert all(found)
