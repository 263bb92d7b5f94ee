"""The projection of inputs into planes of a larger buffer, without a GPU.

Interpreted, against NumPy float64: what is written, what is not, and what is not read.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_lstm_kernels import compat
from flax_lstm_kernels.gpu import project
from flax_lstm_kernels.gpu.common import as_operand
from flax_lstm_kernels.gpu.project import Cut
from flax_lstm_kernels.gpu.project_operands import inputs_to_project, weights_of_inputs
from reference import f64

pytestmark = pytest.mark.kernels

# dtype, (T, B, I, H), M, W, (first step, steps, first plane), S, least steps,
# multiprocessors.
CASES = {
    "one input, rows filled up": (
        *("bfloat16", (3, 1, 1, 64), 8, 64), (0, 3, 0), 13, 3, 1
    ),
    "fewer than a tile": ("float16", (2, 4, 7, 50), 8, 64, (1, 1, 4), 9, 1, 1),
    "tiles overlap": ("float32", (6, 20, 33, 130), 20, 192, (1, 4, 1), 18, 2, 1),
    "one chunk": ("float16", (3, 8, 32, 100), 8, 128, (2, 1, 0), 5, 1, 1),
    "of two blocks": ("bfloat16", (5, 130, 34, 64), 130, 64, (1, 4, 1), 17, 4, 2),
    "the tutorial's": ("bfloat16", (2, 256, 300, 100), 256, 128, (1, 1, 1), 6, 1, 2),
    "whole tiles": ("float32", (5, 64, 64, 64), 64, 64, (1, 3, 4), 16, 1, 2),
    "steps in a tile": ("bfloat16", (9, 8, 33, 64), 8, 64, (2, 6, 0), 24, 6, 2),
    "one row": ("bfloat16", (40, 1, 34, 64), 1, 64, (3, 32, 5), 135, 32, 1),
    "one row, tiles overlap": ("float16", (30, 1, 5, 64), 1, 64, (2, 24, 0), 96, 16, 2),
    "no eights of rows": ("bfloat16", (4, 9, 40, 64), 9, 64, (1, 3, 2), 15, 1, 1),
    "no groups": ("float16", (3, 11, 45, 100), 11, 100, (0, 3, 1), 13, 1, 2),
    "no groups, turned": ("float32", (3, 9, 70, 66), 9, 66, (1, 2, 0), 8, 1, 1),
    "no groups, few inputs": ("bfloat16", (2, 8, 5, 72), 8, 72, (0, 2, 0), 8, 1, 1),
    "no steps": ("bfloat16", (2, 8, 40, 64), 8, 64, (1, 0, 1), 6, 1, 1),
}  # fmt: skip


def given(dtype, shape):
    steps, rows, inner, hidden = shape
    rng = np.random.default_rng(0)
    x, kernel = (
        rng.normal(size=(steps, rows, inner)),
        rng.normal(size=(inner, 4 * hidden)),
    )
    bias = rng.normal(size=4 * hidden)
    return tuple(jnp.asarray(array, dtype) for array in (x, kernel, bias))


def run(x, kernel, bias, planes, now, *, rows, least=1, interpret=None):
    held = planes.shape[-1]
    ref = compat.in_place(planes.reshape(-1, held))
    weights = weights_of_inputs(kernel, bias, (rows, held), x.dtype)
    options = {"rows": rows, "least": least, "interpret": interpret}
    project.project(x, weights, ref, now, **options)
    return jax.freeze(ref).reshape(planes.shape)


def products(x, kernel, bias, size):
    """Returns `[4, T, B, P]` in float64, of operands as they are multiplied.

    And how far a value may be off: its own rounding, and those of float32 on the way.
    """
    x, kernel = (f64(as_operand(array, array.dtype)) for array in (x, kernel))
    inner, hidden = kernel.shape[0], kernel.shape[1] // 4
    found = []
    for x_, kernel_, bias_ in (
        (x, kernel, f64(bias)),
        (np.abs(x), np.abs(kernel), np.abs(f64(bias))),
    ):
        z = (x_ @ kernel_ + bias_).reshape(*x.shape[:2], 4, hidden)
        z = np.pad(z, [(0, 0)] * 3 + [(0, size - hidden)])
        found.append(z.transpose(2, 0, 1, 3))
    wanted, size_of_terms = found
    return wanted, (inner + 1) * 2.0**-24 * size_of_terms


@pytest.mark.parametrize("case", CASES)
@pytest.mark.kernels("interpreted")
def test_the_planes_of_the_steps_hold_the_product_and_no_other_changes(
    case, monkeypatch
):
    """Each value is rounded once; what is not to be read is NaN."""
    dtype, shape, held, size, now, count, least, processors = CASES[case]
    monkeypatch.setattr(project, "BLOCKS", processors)
    x, kernel, bias = given(dtype, shape)
    first, steps, plane = now
    rows = shape[1]
    before = jnp.asarray(
        np.random.default_rng(1).normal(size=(count, held, size)), dtype
    )
    live = slice(first, first + steps)
    of_steps = jnp.full_like(x, jnp.nan).at[live].set(x[live])
    options = {"rows": held, "least": least, "interpret": compat.watched()}
    call = jax.jit(partial(run, **options))
    after = call(of_steps, kernel, bias, before, jnp.int32(now))
    # Blocks that have some rows or units both write the same values to the same place.
    assert not compat.races_found() or steps * held % 8 or size % 64
    written = slice(plane, plane + 4 * steps)
    np.testing.assert_array_equal(
        np.delete(np.asarray(after), written, 0), np.delete(before, written, 0)
    )
    wanted, sums_off = products(x[live], kernel, bias, size)
    got = f64(after)[written].reshape(4, steps, *before.shape[1:])[:, :, :rows]
    off = float(jnp.finfo(dtype).eps) / 2 * np.abs(wanted) + sums_off
    assert (np.abs(got - wanted) <= off).all()


@pytest.mark.parametrize("what", ["input", "weight"])
@pytest.mark.kernels("interpreted")
def test_what_two_chunks_share_counts_once_also_where_it_is_infinite(what):
    x, kernel, bias = given("float32", (1, 8, 40, 64))
    if what == "input":
        x = x.at[0, 3, 10].set(jnp.inf)  # the second chunk has it, too
    else:
        kernel = kernel.at[10, 5].set(-jnp.inf)
    planes = jnp.zeros((4, 8, 64))
    call = jax.jit(partial(run, rows=8, interpret=True))
    got = call(x, kernel, bias, planes, jnp.int32([0, 1, 0]))
    wanted, _ = products(x, kernel, bias, 64)
    infinite = np.isinf(wanted[:, 0])
    assert infinite.sum() == (4 * 64 if what == "input" else 8)
    np.testing.assert_array_equal(np.isinf(got), infinite)
    signs = np.sign(got), np.sign(wanted[:, 0])
    np.testing.assert_array_equal(*(sign[infinite] for sign in signs))
    assert not np.isnan(got).any()


@pytest.mark.kernels("interpreted")
def test_pieces_in_a_loop_of_xla_are_one_kernel():
    """The inputs of few columns are filled up before it."""
    x, kernel, bias = given("bfloat16", (5, 9, 3, 64))

    def all_steps(x, kernel, bias):
        ref = compat.in_place(jnp.zeros((20 * 16, 64), x.dtype))
        weights = weights_of_inputs(kernel, bias, (16, 64), x.dtype)
        x = inputs_to_project(x, 16)
        options = {"rows": 16, "least": 1, "interpret": True}

        def piece(n, nothing):
            now = jnp.stack([2 * n, jnp.minimum(2, 5 - 2 * n), 8 * n])
            project.project(x, weights, ref, now, **options)

        jax.lax.fori_loop(0, 3, piece, None)
        return jax.freeze(ref).reshape(20, 16, 64)

    pieces = np.split(f64(jax.jit(all_steps)(x, kernel, bias))[:, :9], [8, 16])
    got = [np.split(piece, 4) for piece in pieces]
    got = np.concatenate(got, 1)
    wanted, sums_off = products(x, kernel, bias, 64)
    assert (np.abs(got - wanted) <= 2.0**-8 * np.abs(wanted) + sums_off).all()


def test_every_row_is_written_and_whole_eights_once():
    """The interpreter runs one block after the other, and may see no race of two."""
    others = [None] * (len(project.Block._fields) - 6)
    for total, rows, apart in itertools.product(range(8, 136), (8, 24, 64), (1, 2, 5)):
        if rows > total:
            continue
        times, tiles = np.zeros(total, int), -(-total // rows)
        for number in range(tiles):
            m, first = divmod(number, apart)
            cut, now = project.Cut(32, rows, 1), (0, total, 0)
            block = project.Block(cut, None, 0, first, apart, now, *others)
            row, twice = block.row(m)
            eights = [eight for eight in range(0, rows, 8) if eight + 8 > twice]
            times[row + eights[0] : row + rows] += 1
        assert (times >= 1).all()
        assert (times > 1).sum() <= (-total) % 8


@pytest.mark.parametrize("itemsize", [2, 4])
def test_loads_are_aligned_in_every_row(itemsize):
    """And whole for the layout: four warps of `vector` rows, 32 columns."""
    found = set()
    for inner in range(32, 320):
        for least in (8, 16, 24, 64, 1000):
            cut = Cut.of(least, inner, itemsize)
            assert inner % cut.vector == 0
            assert cut.vector * itemsize <= 16
            assert cut.rows % (8 if cut.vector == 1 else 4 * cut.vector) == 0
            # Chunks begin at every 32nd column, the last 32 before the end.
            assert (inner - project.WIDTH) % cut.vector == 0
            found.add(cut.vector)
    assert found == ({1, 2, 4, 8} if itemsize == 2 else {1, 2, 4})


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("bfloat16", (3, 64, 300, 128)), ("float32", (2, 20, 33, 64)),
     ("float16", (2, 8, 35, 64)), ("bfloat16", (3, 9, 300, 100)),
     ("float32", (3, 9, 35, 66))],
)  # fmt: skip
@pytest.mark.kernels("lowered")
def test_it_lowers_for_a_gpu_and_copies_no_inputs(dtype, shape):
    """Smoke, but for the copies: Mosaic's lowering takes it."""
    steps, rows, inner, hidden = shape
    sizes = (shape[:3], (inner, 4 * hidden), (4 * hidden,), (8, rows, hidden))
    arrays = [jax.ShapeDtypeStruct(size, dtype) for size in sizes]
    arrays.append(jax.ShapeDtypeStruct((3,), jnp.int32))
    exported = jax.export.export(
        jax.jit(partial(run, rows=rows, least=2)),
        platforms=["cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")],
    )
    text = exported(*arrays).mlir_module()
    assert text.count("custom_call @mosaic_gpu_v2") == 1
    for size, words in (
        (f"{steps}x{rows}", ("func", "reshape")),
        (f"{steps * rows}", ("reshape", "mosaic")),
    ):
        having = [line for line in text.splitlines() if f"<{size}x{inner}x" in line]
        assert all(word in line for word, line in zip(words, having, strict=True))
