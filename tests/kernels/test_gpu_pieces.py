"""Inference piece by piece gives what all at once would, and holds less at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax_lstm_kernels.gpu import Plan, forward, pieces
from flax_lstm_kernels.gpu.pieces import LEAST, PROJECTED, in_pieces, piece_steps
from flax_lstm_kernels.gpu.plan import PLANNERS, Sizes
from gpu_problems import BARS, problem, run

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("whole_float32")]


def test_pieces_are_alike_and_neither_many_nor_large():
    for steps in (1, 59, 60, 61, 64, 119, 120, 244, 251, 1024, 100_003):
        for rows, size in ((8, 64), (256, 128), (2000, 128), (128, 1024)):
            found, of_step = piece_steps(steps, rows, size, 2), rows * 4 * size * 2
            assert found == steps or (
                found >= LEAST and found * of_step > PROJECTED / 2
            )
            assert found < 2 * LEAST or found * of_step < 2 * PROJECTED
            count = -(-steps // found)
            last = steps - (count - 1) * found
            assert 0 < last <= found
            assert found - last < count


def loop(inputs, c, h, lengths, resets, *, reverse):
    """Stands in for a kernel: what it gives depends on order, masks and states."""

    def step(carry, at):
        t, x = at
        c, h = carry
        fresh = (resets[t] != 0)[:, None] if resets.size else False
        new_c = 0.5 * jnp.where(fresh, 0.0, c) + x
        new_h = jnp.where(fresh, 0.0, h) - new_c
        live = (t < lengths)[:, None]
        state = jnp.where(live, new_c, c), jnp.where(live, new_h, h)
        return state, jnp.where(live, new_h, 0.0)

    times = jnp.arange(len(inputs))
    (c, h), hs = jax.lax.scan(step, (c, h), (times, inputs), reverse=reverse)
    return hs, c, h


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 6])
def test_pieces_give_what_all_at_once_gives(size, reverse):
    rng = np.random.default_rng(0)
    shapes = (6, 4, 3), (4, 3), (4, 3)
    x, c, h = (jnp.asarray(rng.normal(size=n), "float32") for n in shapes)
    lengths = jnp.array([6, 0, 3, 4])
    for resets in (rng.random((6, 4)) < 0.3, np.zeros((0, 0), bool)):
        given = x, c, h, lengths, jnp.asarray(resets)

        def of_piece(*arrays):
            return loop(*arrays, reverse=reverse)

        got = in_pieces(of_piece, *given, size=size, reverse=reverse)
        for a, b in zip(got, of_piece(*given), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.kernels("interpreted")
def test_the_kernel_gives_the_values_of_numpy(reverse, monkeypatch):
    """A piece of three steps, and one of two."""
    monkeypatch.setattr(pieces, "LEAST", 2)
    monkeypatch.setattr(pieces, "PROJECTED", 0)
    given = problem((5, 9, 2, 7), "float32")
    got = run(given, Plan("single", 8, 2), reverse=reverse, keep=False)
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
        assert reference.error(value, true) < BARS["float32"][0]


@pytest.mark.parametrize("kernel", ["single", "cluster", "grid", "step"])
@pytest.mark.kernels("lowered")
def test_the_projected_inputs_of_all_steps_are_nowhere(kernel):
    """Nor is a launch of every piece in the program: one in a loop, and the rest."""
    steps, rows, size, hidden = 251, 512, 2, 128
    plan = PLANNERS[kernel](Sizes("forward", steps, rows, hidden, 2, keep=False))
    shapes = (
        (steps, rows, size),
        (size, 4 * hidden),
        (hidden, 4 * hidden),
        (4 * hidden,),
    )
    shapes = [*shapes, (rows, hidden), (rows, hidden)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    arrays.append(jax.ShapeDtypeStruct((rows,), jnp.int32))
    arrays.append(jax.ShapeDtypeStruct((0, 0), jnp.uint8))

    def module(*, keep):
        def function(*arrays):
            return forward(*arrays, reverse=False, keep=keep, plan=plan)

        check = jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
        exported = jax.export.export(
            jax.jit(function), platforms=["cuda"], disabled_checks=[check]
        )
        return exported(*arrays).mlir_module()

    whole = f"tensor<{steps}x{rows}x4x{hidden}x"
    assert whole in module(keep=True)
    text = module(keep=False)
    assert whole not in text
    assert text.count("custom_call @mosaic_gpu_v2") == 2
