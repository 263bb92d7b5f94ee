"""The TPU kernels, without a TPU: interpreted on this CPU, and lowered for one.

Values and gradients are held against NumPy float64 (`reference.py`). In two cases the
interpreter also fills all memory that is not written with NaN and looks for races; it
is too slow for more.
"""

import csv
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax_lstm_kernels import tpu
from flax_lstm_kernels.tpu.orders import BTI, ITB, TBI, TIB
from flax_lstm_kernels.tpu.plan import USABLE, choose
from flax_lstm_kernels.tpu.vmem import VMEM, Plan, Sizes, vmem_bytes
from jax.experimental.pallas import tpu as pltpu

pytestmark = pytest.mark.kernels

# (T, B, I, H), and the plan (rows, steps, units, fused, streamed): fewer rows than a
# register has; blocks that stand over in time and batch, a tile that has ended before
# it starts, a second panel of two units, inputs multiplied inside; inputs multiplied by
# XLA, two panels; streamed in two panels, the last tile nearly empty.
CASES = {
    "few rows": ((5, 3, 2, 7), Plan(3, 2, 128, True, False)),
    "fused": ((7, 20, 3, 130), Plan(16, 3, 128, True, False)),
    "panels": ((6, 16, 3, 200), Plan(16, 2, 128, False, False)),
    "streamed": ((3, 21, 3, 130), Plan(16, 1, 128, False, True)),
}
# Relative error ‖got - want‖ / ‖want‖ of outputs and gradients. float32: the roundings
# that other libraries show at T 64. bfloat16: half of what they show (6e-3, 8e-3), for
# here only the operands and the outputs are rounded.
BARS = {"float32": (4.4e-7, 8e-7), "bfloat16": (3e-3, 4e-3)}


class Problem(NamedTuple):
    """Arguments of `forward`, and the cotangents of its first three results."""

    arguments: tuple
    d_results: tuple


def problem(shape, dtype, *, ended=4):
    steps, rows, size, hidden = shape
    keys = jax.random.split(jax.random.key(3), 9)
    normal = jax.random.normal
    kernel = normal(keys[0], (size, 4 * hidden)) / size**0.5
    recurrent = normal(keys[1], (hidden, 4 * hidden)) / hidden**0.5
    bias = normal(keys[2], (4 * hidden,))
    x = normal(keys[3], (steps, rows, size))
    c, h = normal(keys[4], (2, rows, hidden))
    lengths = jax.random.randint(keys[5], (rows,), 1, steps + 1, jnp.int32)
    lengths = lengths.at[0].set(steps).at[max(1, rows - ended) :].set(0)
    resets = jax.random.bernoulli(keys[6], 0.3, (steps, rows)).astype(jnp.uint8)
    d_hs = normal(keys[7], (steps, rows, hidden))
    d_c, d_h = normal(keys[8], (2, rows, hidden))
    weights = (leaf.astype(dtype) for leaf in (kernel, recurrent, bias))
    return Problem(
        (x.astype(dtype), *weights, c, h.astype(dtype), lengths, resets),
        (d_hs.astype(dtype), d_c, d_h),
    )


def run(given, plan, *, reverse, interpret=True):
    """Returns the results of both kernels; in the padding they are given NaN."""
    x, *weights, lengths, resets = given.arguments
    dead = (jnp.arange(len(x))[:, None] >= lengths[None, :])[..., None]

    def both(arguments, d_results):
        results = tpu.forward(
            *arguments, reverse=reverse, keep=True, plan=plan, interpret=interpret
        )
        gradients = tpu.backward(
            *d_results,
            *results[3:],
            arguments[2],
            *arguments[6:],
            reverse=reverse,
            plan=plan._replace(fused=False),
            interpret=interpret,
        )
        return results, gradients

    d_hs, *d_state = given.d_results
    call = (
        (jnp.where(dead, jnp.nan, x), *weights, lengths, resets),
        (jnp.where(dead, jnp.nan, d_hs), *d_state),
    )
    return jax.jit(both)(*call)


def judge(given, got, *, reverse, bars):
    """Compares values and gradients; those of the weights are formed here from d_z."""
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
    wanted = reference.backward(want, *given.d_results)
    (hs, c_last, h_last, _, _), (d_z, d_c, d_h) = got
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
        ("few rows", False, "float32"),
        ("fused", True, "float32"),
        ("fused", False, "bfloat16"),
        ("panels", False, "float32"),
        ("panels", True, "bfloat16"),
        ("streamed", False, "float32"),
    ],
)
@pytest.mark.kernels("interpreted")
def test_values_and_gradients_are_those_of_numpy(case, reverse, dtype):
    shape, plan = CASES[case]
    given = problem(shape, dtype)
    got = run(given, plan, reverse=reverse)
    judge(given, got, reverse=reverse, bars=BARS[dtype])


@pytest.mark.parametrize(
    ("shape", "plan", "reverse"),
    [
        # The interpreter loses track of arrays that share memory where blocks stand
        # over, so that here they do not.
        ((4, 16, 3, 130), Plan(8, 2, 256, True, False), False),
        ((2, 8, 3, 130), Plan(8, 1, 128, False, True), True),
    ],
    ids=["fused", "streamed"],
)
@pytest.mark.kernels("interpreted")
def test_nothing_is_read_before_it_is_written_and_nothing_races(
    shape, plan, reverse, capfd
):
    given = problem(shape, "float32", ended=shape[1] - 8)  # the second tile
    # Of two cores each takes a tile, as those of v4 and v5p do: alone it races nobody.
    tiles = shape[1] // plan.rows
    poisoned = pltpu.InterpretParams(
        uninitialized_memory="nan", detect_races=True, num_cores_or_threads=tiles
    )
    got = run(given, plan, reverse=reverse, interpret=poisoned)
    judge(given, got, reverse=reverse, bars=BARS["float32"])
    assert "RACE" not in capfd.readouterr().out


def forward(given, plan, *, keep, reverse=False):
    def call(*arguments):
        return tpu.forward(
            *arguments, reverse=reverse, keep=keep, plan=plan, interpret=True
        )

    return jax.jit(call)(*given.arguments)


@pytest.mark.parametrize(
    "orders",
    [(TBI, TIB), (TIB, ITB), (ITB, BTI), (BTI, TBI)],
    ids=["TBI-TIB", "TIB-ITB", "ITB-BTI", "BTI-TBI"],
)
@pytest.mark.kernels("interpreted")
def test_neither_what_is_kept_nor_an_order_changes_a_result(orders):
    shape, plan = CASES["fused"]
    given = problem(shape, "float32")
    no_resets = jnp.zeros((0, 0), jnp.uint8)
    given = given._replace(arguments=(*given.arguments[:-1], no_resets))
    order, hs_order = orders
    turned = plan._replace(order=order, hs_order=hs_order)
    short, full = (forward(given, p, keep=p is plan) for p in (turned, plan))
    for a, b in zip(short[:3], full[:3], strict=True):
        np.testing.assert_array_equal(a, b)
    assert short[3].size == short[4].size == 0


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.kernels("interpreted")
def test_inference_in_pieces_gives_the_values_of_numpy(reverse):
    """Two pieces of eight steps, and one of three."""
    given = problem((19, 3, 2, 7), "float32", ended=1)
    hs, c, h, *kept = forward(
        given, Plan(3, 1, 128, False, True), keep=False, reverse=reverse
    )
    x, *weights, c_first, h_first, lengths, resets = given.arguments
    want = reference.lstm(
        weights,
        x,
        (c_first, h_first),
        lengths=lengths,
        resets=resets,
        reverse=reverse,
        keep_order=True,
    )
    for value, true in ((hs, want.outputs), (c, want.c), (h, want.h)):
        assert reference.error(value, true) < BARS["float32"][0]
    assert [array.size for array in kept] == [0, 0]


@pytest.mark.parametrize(
    ("steps", "rows", "pieces"),
    [(100, 3, {8, 4}), (9, 1000, {2, 1})],
    ids=["few rows", "many"],
)
def test_only_a_piece_is_projected_where_nothing_is_kept(steps, rows, pieces):
    """In a loop, all of whose pieces have one buffer of float32 gates."""
    given = problem((steps, rows, 2, 7), "bfloat16")

    def call(*arguments):
        plan = Plan(min(rows, 16), 1, 128, False, True)
        return tpu.forward(*arguments, reverse=False, keep=False, plan=plan)

    exported = jax.export.export(jax.jit(call), platforms=["tpu"])(*given.arguments)
    made = {
        int(steps)
        for steps in re.findall(
            rf"tensor<(\d+)x{rows}x512xf32>", exported.mlir_module()
        )
    }
    assert made == pieces


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("few rows", "bfloat16"),
        ("fused", "bfloat16"),
        ("panels", "float32"),
        ("streamed", "float32"),
    ],
)
@pytest.mark.kernels("lowered")
def test_both_lower_for_a_tpu(case, dtype):
    """Smoke: Mosaic's lowering takes them; the compiler itself is not at hand here."""
    (steps, rows, size, hidden), plan = CASES[case]

    def like(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    state, masks = like(rows, hidden), (like(rows, dtype=jnp.int32),)
    masks += (like(steps, rows, dtype=jnp.uint8),)
    recurrent = like(hidden, 4 * hidden, dtype=dtype)

    def forward(*arguments):
        return tpu.forward(*arguments, reverse=True, keep=True, plan=plan)

    def backward(*arguments):
        return tpu.backward(*arguments, reverse=True, plan=plan._replace(fused=False))

    forward_arguments = (
        like(steps, rows, size, dtype=dtype),
        like(size, 4 * hidden, dtype=dtype),
        recurrent,
        like(4 * hidden, dtype=dtype),
        state,
        like(rows, hidden, dtype=dtype),
        *masks,
    )
    backward_arguments = (
        like(steps, rows, hidden),
        state,
        state,
        like(steps, rows, 4 * hidden),
        like(steps, rows, hidden),
        recurrent,
        *masks,
    )
    for function, arguments in (
        (forward, forward_arguments),
        (backward, backward_arguments),
    ):
        exported = jax.export.export(jax.jit(function), platforms=["tpu"])(*arguments)
        assert "tpu_custom_call" in exported.mlir_module()


@pytest.mark.parametrize("kind", [None, *VMEM])
def test_every_hidden_size_to_2048_has_a_plan_that_fits(kind):
    limit = min(VMEM.values()) if kind is None else VMEM[kind]
    for hidden in (1, 100, 128, 384, 512, 640, 1000, 1024, 1152, 1536, 1920, 2048):
        for itemsize in (2, 4):
            for rows in (1, 7, 8, 100, 300, 4096):
                for which, inputs in (("forward", 300), ("backward", 0)):
                    sizes = Sizes(1000, rows, inputs, hidden, itemsize, keep=True)
                    plan, needed = choose(which, sizes, kind)
                    assert needed == vmem_bytes(which, sizes, plan) < limit
                    # What Mosaic asks of blocks, and the kernels of panels.
                    assert plan.rows == rows or plan.rows % (32 // itemsize) == 0
                    assert 1 <= plan.steps <= 32
                    assert -(-hidden // 128) * 128 % plan.units == 0
                    assert plan.steps == 1 or not plan.streamed


@pytest.mark.parametrize("kind", [None, *VMEM])
def test_inference_is_planned_in_the_orders_that_arguments_and_results_have(kind):
    """The orders are what the compiler for v5e was seen to give them."""
    for shape, itemsize, orders in (
        ((244, 256, 300, 128), 2, (TIB, TBI)),
        ((64, 256, 128, 100), 2, (TBI, ITB)),
        ((244, 128, 128, 64), 4, (TBI, TIB)),
        ((244, 100, 128, 128), 4, (BTI, BTI)),
        ((1024, 12, 256, 256), 2, (BTI, BTI)),
        ((1024, 4, 256, 256), 2, (TBI, TBI)),
        # The inputs take the same as (I, T, B), the outputs too.
        ((64, 300, 64, 100), 4, (TIB, BTI)),
    ):
        plan, _ = choose("forward", Sizes(*shape, itemsize, keep=False), kind)
        rows, spills = shape[1], itemsize == 4 and shape[1] > 128
        assert plan.fused
        if not (spills and kind in (None, "TPU v4")):
            assert (plan.order, plan.hs_order) == orders, (shape, kind)
        # What Mosaic asks of blocks whose last axes are rows, or steps and K.
        if {TIB, ITB} & {*orders}:
            assert plan.rows == rows or plan.rows % 128 == 0
        if {ITB, BTI} & {*orders}:
            assert plan.steps == shape[0] or plan.steps % 8 == 0
        kept, _ = choose("forward", Sizes(*shape, itemsize, keep=True), kind)
        assert kept.order == kept.hs_order == TBI


def test_the_estimate_of_memory_is_what_the_compiler_takes():
    """The compiler's figures: kernels/budgets.csv, for plans of every kind of TPU."""
    path = Path(__file__).parents[2] / "kernels" / "budgets.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["vmem_kib"]]
    assert {row["target"] for row in rows} == {"v4", "v5e", "v5p", "v6e", "v7x"}
    for row in rows:
        fields = (int(field.split("=")[1]) for field in row["plan"].split())
        plan = Plan(*fields)
        size = 0 if row["kernel"] == "backward" else int(row["I"])
        itemsize = jnp.dtype(row["dtype"]).itemsize
        keep = row["kernel"] != "inference"
        sizes = Sizes(int(row["T"]), int(row["B"]), size, int(row["H"]), itemsize, keep)
        which = "backward" if row["kernel"] == "backward" else "forward"
        estimate = vmem_bytes(which, sizes, plan) / 1024
        # Never below. Above, by the values on their way through registers and by second
        # buffers that a single tile does without, less than choose leaves free; of a
        # tile of 3 rows the compiler takes 4, not 8, and spills less than of many.
        # Where nothing is kept, what goes through registers weighs more.
        most = 2 - USABLE if plan.rows % 8 == 0 else 2
        most = most if keep else 1.5
        assert 1 <= estimate / int(row["vmem_kib"]) < most, row


def test_weights_that_fit_are_not_streamed():
    """Their bytes, 4 H², against the VMEM of one core as published: v4 has 16 MiB."""
    for kind, hidden, itemsize, streamed in (
        ("TPU v4", 1024, 2, False),  # 8 MiB
        ("TPU v4", 1024, 4, True),  # 16 MiB
        ("TPU v5e", 1024, 4, False),  # 16 MiB of 128
        ("TPU v6e", 2048, 4, True),  # 64 MiB of 128, but the compiler wants 43 more
        ("TPU v5p", 2048, 4, True),  # 64 MiB of 64
        ("TPU7x", 2048, 2, False),  # 32 MiB of 64
    ):
        sizes = Sizes(100, 16, 256, hidden, itemsize, keep=True)
        assert choose("forward", sizes, kind)[0].streamed is streamed, kind


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("TPU v5e", jnp.float16, 256), "float32 and bfloat16 only"),
        (("TPU v5e", jnp.float32, 2049), "1 to 2048 only; got 2049"),
        (("TPU v2", jnp.float32, 256), "this is 'TPU v2'"),
        (("tiny", jnp.float32, 2048), "leaves 3.4 MiB"),
    ],
)
def test_support_tells_the_reason(arguments, message, monkeypatch):
    monkeypatch.setitem(VMEM, "tiny", 4 << 20)
    told = tpu.support(*arguments)
    assert message in (told.reason or "")
    assert told.vmem_bytes == 0


def test_support_gives_its_estimate():
    """The weights alone are 4 H² of 2 bytes."""
    told = tpu.support("TPU v6e", jnp.bfloat16, 1024)
    assert told.reason is None
    assert 8 << 20 < told.vmem_bytes < 128 << 20
