"""Inference in pieces of time: each gives what NumPy does, and nothing is copied."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax_lstm_kernels import compat, gpu
from flax_lstm_kernels.gpu import Plan, forward, pieces, project, single, step
from flax_lstm_kernels.gpu.arrange import (
    fill,
    from_tiles,
    gates_apart,
    in_tiles,
    recurrent_weights,
    up,
)
from flax_lstm_kernels.gpu.pieces import (
    cuts,
    held_sizes,
    last_steps,
    piece_steps,
    shortest,
    trained_steps,
)
from flax_lstm_kernels.gpu.plan import PLANNERS, Sizes
from flax_lstm_kernels.gpu.source import Piece
from gpu_problems import BARS, judge, problem, run

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("whole_float32")]


class Alone(NamedTuple):
    """One piece, run by itself: its problem, and the hs before and after it."""

    given: tuple
    before: np.ndarray
    hs: np.ndarray
    state: tuple


def piece_alone(kernel, *, reverse, apart, rows, held, dtype="float32"):
    """Runs steps 2 and 3 of 4 of a sequence of 12, planes in hs from 4 or 5 on."""
    x, weights, recurrent, bias, c, h, lengths, resets = problem(
        (4, rows, 2, 60), dtype
    ).arguments
    lengths = lengths.at[min(2, rows - 1)].set(3)
    plan = {"cluster": Plan("cluster", 8, 2, 2)}.get(kernel, Plan(kernel, 8, 1 + 1))
    size, filled = plan.size(60), up(rows, 8)
    z = reference.f64(x) @ reference.f64(weights) + reference.f64(bias)
    z = gates_apart(jnp.asarray(z, dtype), size).transpose(2, 0, 1, 3)
    z = z[:, 2:].reshape(8, rows, size)
    first_plane = 0 if apart else 4
    before = np.random.default_rng(0).normal(size=(12, held, size)).astype(dtype)
    planes = before[:8].copy() if apart else before
    planes[first_plane : first_plane + 8] = np.nan  # of rows that are not there
    planes[first_plane : first_plane + 8, :rows] = z
    weights = recurrent_weights(recurrent, size)

    def tiles(array, axis=0):
        if held == rows:
            return in_tiles(array, axis, 8)
        return fill(array, axis, filled)

    def flat(array):
        return compat.in_place(jnp.reshape(array, (-1, size)))

    def function(hs, planes, c, h, lengths, resets):
        hs, planes = flat(hs), flat(planes) if apart else None
        now = jnp.array([2, 2, first_plane, 2], jnp.int32)
        c, h = gpu.FORWARD[kernel](
            Piece(hs, planes, now, 2, held),
            weights,
            fill(tiles(c), 1, size),
            fill(tiles(h), 1, size),
            tiles(lengths),
            tiles(resets, 1),
            reverse=reverse,
            plan=plan,
            interpret=NAN_FILLED,
        )
        if held == rows:
            c, h = (from_tiles(array, 0, 8, rows) for array in (c, h))
        return jax.freeze(hs).reshape(12, held, size), (c, h)

    given = x[2:], recurrent, c, h, jnp.clip(lengths - 2, 0, 2), resets[2:], z
    hs, state = jax.jit(function)(before, planes, c, h, lengths, resets)
    return Alone(given, before, np.asarray(hs), state)


NAN_FILLED = compat.InterpretGPUParams(uninitialized_memory="nan")


@pytest.mark.parametrize(
    ("kernel", "rows", "held", "reverse", "apart"),
    [
        ("single", 9, 16, False, False),
        ("single", 11, 11, True, True),
        ("cluster", 9, 9, True, False),
        ("cluster", 9, 16, False, False),
        ("grid", 9, 16, False, True),
        ("grid", 10, 10, True, False),
        ("grid", 1, 1, True, False),
        ("step", 9, 9, True, False),
        ("step", 1, 1, False, True),
    ],
)
@pytest.mark.kernels("interpreted")
def test_a_piece_has_the_values_of_numpy_and_writes_no_other_step(
    kernel, rows, held, reverse, apart
):
    """Also where the last two tiles have some rows both."""
    alone = piece_alone(kernel, reverse=reverse, apart=apart, rows=rows, held=held)
    x, recurrent, c, h, lengths, resets, _ = alone.given
    _, weights, _, bias, *_ = problem((4, 9, 2, 60), "float32").arguments
    want = reference.lstm(
        (weights, recurrent, bias),
        x,
        (c, h),
        lengths=lengths,
        resets=resets,
        reverse=reverse,
        keep_order=True,
    )
    got = alone.hs[2:4, :rows, :60], *(array[:rows, :60] for array in alone.state)
    for value, true in zip(got, (want.outputs, want.c, want.h), strict=True):
        assert reference.error(value, true) < BARS["float32"][0]
    others = [0, 1, *range(4, 12)]
    np.testing.assert_array_equal(alone.hs[others], alone.before[others])


@pytest.fixture
def short_pieces(monkeypatch):
    """Cuts 7 steps up: into single ones, the last four apart; in copies, 3, 3 and 1."""
    named = {
        "LAST": 1,
        "ODD_LAST": 1,
        "LEAST": 1,
        "PIECES": 7,
        "PROJECTED": 0,
        "TRAINED": 4,
    }
    for name, value in named.items():
        monkeypatch.setattr(pieces, name, value)
    assert piece_steps(7, 2 * shortest(7), 1) == 3
    for itemsize in (2, 4):
        assert trained_steps(7, (1, 1), (8, 64), itemsize) == 3


PLANS = {
    "single": Plan("single", 8, 2),
    "cluster": Plan("cluster", 8, 2, 2),
    "grid": Plan("grid", 8, 2),
    "step": Plan("step", 8, 2),
}


@pytest.mark.parametrize(
    ("kernel", "steps", "rows", "size", "hidden", "reverse", "dtype"),
    [
        ("single", 7, 8, 2, 64, False, "float32"),
        ("step", 5, 8, 2, 64, False, "float32"),
        # In place, also of units of no whole group.
        ("single", 7, 9, 35, 64, True, "float32"),
        ("single", 5, 9, 35, 100, False, "bfloat16"),
        ("single", 13, 1, 35, 100, True, "bfloat16"),
        ("cluster", 3, 9, 2, 90, True, "float32"),
        ("grid", 2, 8, 35, 90, False, "float32"),
        ("step", 3, 9, 35, 90, True, "bfloat16"),
        ("step", 9, 1, 35, 72, False, "bfloat16"),
        # In copies of rows that are not filled up.
        ("single", 7, 9, 35, 7, True, "bfloat16"),
        ("single", 7, 12, 35, 7, True, "float32"),
        ("cluster", 7, 10, 2, 60, False, "float32"),
        ("step", 13, 1, 35, 7, True, "float32"),  # some steps are projected again
        ("step", 7, 3, 2, 7, False, "float32"),
        # Whole tiles, whose hs take the place of gates.
        ("cluster", 7, 8, 35, 60, True, "float32"),
        ("grid", 4, 16, 2, 60, False, "float32"),
        ("step", 7, 16, 35, 7, True, "float32"),
    ],
)
@pytest.mark.usefixtures("short_pieces")
@pytest.mark.kernels("interpreted")
def test_a_sequence_in_pieces_has_the_values_of_numpy(
    kernel, steps, rows, size, hidden, reverse, dtype
):
    """Of whole units in place, of others, and of few rows, in copies."""
    given, plan = problem((steps, rows, size, hidden), dtype), PLANS[kernel]
    interpret = NAN_FILLED if kernel == "grid" else None  # as in test_grid.py
    got = run(given, plan, reverse=reverse, keep=False, interpret=interpret)
    x, kernel, recurrent, bias, c, h, lengths, resets = given.arguments
    want = reference.lstm(
        (kernel, recurrent, bias),
        x,
        (c, h),
        lengths=lengths,
        resets=resets,
        reverse=reverse,
        keep_order=True,
    )
    for value, true in zip(got.values[:3], (want.outputs, want.c, want.h), strict=True):
        assert reference.error(value, true) < BARS[dtype][0]
    # Tiles and groups that have some rows or units both write the same values to the
    # same place, and not in order, which some versions tell.
    held_rows, held_units = held_sizes(steps, (rows, hidden), plan)
    both = (held_rows > 1 and held_rows % plan.rows) or held_units % 64
    assert not got.raced or both


WITHIN, APART = True, False  # hs, planes are


@pytest.mark.parametrize(
    ("steps", "reverse", "rows_of_hs", "expected"),
    [
        (43, False, 1, [(8, WITHIN), *[(8, APART)] * 4, (3, APART)]),
        (13, True, 1, [(8, APART), (5, APART)]),
        (5, False, 8, [(5, WITHIN)]),  # less than `project` has in a tile: filled up
    ],
)
@pytest.mark.kernels("interpreted")
def test_one_row_in_pieces_is_not_filled_up_and_has_the_values_of_numpy(
    steps, reverse, rows_of_hs, expected, monkeypatch
):
    """Nor are its last three steps, past its length, anything but 0."""
    monkeypatch.setattr(pieces, "ROW_LAST", 8)  # the least that there can be
    given = problem((steps, 1, 2, 64), "float32")
    *arguments, _, resets = given.arguments
    lengths = jnp.int32([steps - 3])
    given = given._replace(arguments=(*arguments, lengths, resets))
    seen = []

    def watched(source, *arrays, **options):
        seen.append((source.rows, source.count, source.planes is None))
        return step.forward_pass(source, *arrays, **options)

    monkeypatch.setitem(gpu.FORWARD, "step", watched)
    got = run(given, Plan("step", 8, 2), reverse=reverse, keep=False)
    want = reference.lstm(
        arguments[1:4],
        arguments[0],
        arguments[4:],
        lengths=lengths,
        resets=resets,
        reverse=reverse,
        keep_order=True,
    )
    for value, true in zip(got.values[:3], (want.outputs, want.c, want.h), strict=True):
        assert reference.error(value, true) < BARS["float32"][0]
    assert not got.raced
    assert seen == [(rows_of_hs, *piece) for piece in expected]


@pytest.mark.parametrize(
    ("kernel", "rows", "hidden", "reverse", "dtype"),
    [
        ("single", 3, 7, False, "float32"),
        ("single", 3, 64, True, "bfloat16"),
        ("step", 8, 60, False, "float32"),
    ],
)
@pytest.mark.usefixtures("short_pieces")
@pytest.mark.kernels("interpreted")
def test_training_in_copied_pieces_has_the_values_and_gradients_of_numpy(
    kernel, rows, hidden, reverse, dtype
):
    given = problem((7, rows, 2, hidden), dtype)
    got = run(given, Plan(kernel, 8, 2), reverse=reverse)
    judge(given, got, reverse=reverse, bars=BARS[dtype])
    assert not got.raced


@pytest.mark.parametrize(
    ("rows", "size", "hidden", "copied"),
    [
        (2001, 32, 50, False),
        (2000, 40, 101, False),
        (7, 40, 128, True),
        (16, 31, 50, True),
    ],
)
def test_inference_of_filled_up_sizes_keeps_nothing_and_copies_few_inputs(
    rows, size, hidden, copied, monkeypatch
):
    """Inputs are cut up where they are too few for `project` to read in place."""
    given = problem((64, rows, size, hidden), "bfloat16")
    sources, read, unwatched = [], [], project.project

    def single_watched(source, *arrays, **options):
        sources.append(source)
        return single.forward_pass(source, *arrays, **options)

    def project_watched(inputs, *arrays, **options):
        read.append(inputs.shape)
        return unwatched(inputs, *arrays, **options)

    monkeypatch.setitem(gpu.FORWARD, "single", single_watched)
    monkeypatch.setattr(project, "project", project_watched)
    call = partial(forward, reverse=False, keep=False, interpret=True)
    jax.eval_shape(call, *given.arguments)
    assert sources
    assert all(isinstance(source, Piece) for source in sources)
    # Of whole tiles hs has the place of gates.
    steps = {
        len(source.hs) // source.rows // (4 if source.planes is None else 1)
        for source in sources
    }
    assert max(steps) < 64
    assert {shape[0] for shape in read} == (steps if copied else {64})


def test_few_inputs_are_filled_up_for_a_piece_alone(monkeypatch):
    """To 32, though hs is written in place: of four of 64 steps."""
    given, read, unwatched = problem((64, 16, 31, 128), "bfloat16"), [], project.project

    def watched(inputs, *arrays, **options):
        read.append(inputs.shape)
        return unwatched(inputs, *arrays, **options)

    monkeypatch.setattr(project, "project", watched)
    call = partial(forward, reverse=False, keep=False, interpret=True)
    jax.eval_shape(call, *given.arguments)
    assert set(read) == {(4, 16, 31)}


@pytest.mark.parametrize(
    ("kernel", "steps", "rows", "held"),
    [
        ("single", 14, 16, 16),
        ("single", 13, 9, 9),
        ("single", 13, 1, 1),
        ("single", 13, 7, 8),
        ("cluster", 13, 9, 9),
        ("grid", 13, 9, 9),
        ("grid", 13, 1, 1),
        ("step", 13, 20, 20),
    ],
)
@pytest.mark.kernels("lowered")
def test_rows_of_no_whole_tile_are_lowered(kernel, steps, rows, held, monkeypatch):
    """What they are filled up to is what Mosaic and `project` need."""
    seen = []

    def watched(source, *arrays, **options):
        seen.append(source.rows)
        return run(source, *arrays, **options)

    run = gpu.FORWARD[kernel]
    monkeypatch.setitem(gpu.FORWARD, kernel, watched)
    plan = Plan("cluster", 8, 2, 2) if kernel == "cluster" else Plan(kernel, 8, 2)
    lowered_for_cuda(
        partial(forward, reverse=False, keep=False, plan=plan),
        arguments_like(steps, rows, 40, 128),
    )
    assert set(seen) == {held}


def arguments_like(steps, rows, size, hidden):
    shapes = (
        (steps, rows, size),
        (size, 4 * hidden),
        (hidden, 4 * hidden),
        (4 * hidden,),
        (rows, hidden),
        (rows, hidden),
    )
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    arrays.append(jax.ShapeDtypeStruct((rows,), jnp.int32))
    return [*arrays, jax.ShapeDtypeStruct((0, 0), jnp.uint8)]


def lowered_for_cuda(function, arrays):
    """Returns the text of the module."""
    check = jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
    exported = jax.export.export(
        jax.jit(function), platforms=["cuda"], disabled_checks=[check]
    )
    return exported(*arrays).mlir_module()


@pytest.mark.parametrize("kernel", ["single", "cluster", "grid", "step"])
@pytest.mark.kernels("lowered")
def test_the_projected_inputs_of_all_steps_are_nowhere(kernel):
    """Nor is a kernel of every piece in the program, but for `step`, which loops."""
    steps, rows, size, hidden = 91, 512, 40, 128
    plan = PLANNERS[kernel](Sizes("forward", steps, rows, hidden, 2, keep=False))
    assert isinstance(plan, Plan)
    arrays = arguments_like(steps, rows, size, hidden)

    def module(*, keep):
        run = partial(forward, reverse=False, keep=keep, plan=plan)
        return lowered_for_cuda(run, arrays)

    whole = f"tensor<{steps}x{rows}x4x{hidden}x"
    assert whole in module(keep=True)
    text = module(keep=False)
    assert whole not in text
    # `project` and the kernel, each with planes in hs and apart. (0.12 also tells what
    # the first piece is given from what others are.)
    last = last_steps(steps, rows, hidden, 2)
    count = len(cuts(steps, last, reverse=False))
    launches = 2 + count if kernel == "step" else 4
    assert launches <= text.count("custom_call @mosaic_gpu_v2") <= launches + 1
