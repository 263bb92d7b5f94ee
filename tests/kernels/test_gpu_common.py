"""The operands of the matrix instructions: float32 rounded to tf32, in every kernel.

Problems, and what results are judged by, are those of `gpu_problems.py`.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from flax_lstm_kernels import compat
from flax_lstm_kernels.gpu import Plan, common, slabs
from flax_lstm_kernels.gpu.common import as_operand, plain_product
from gpu_problems import BARS, judge, problem, run

pytestmark = pytest.mark.kernels


def test_float32_is_rounded_to_the_nearest_of_11_bits():
    """NumPy's, in float64; of two that are as near, to the larger in magnitude."""
    rng = np.random.default_rng(0)
    mantissas, exponents = rng.uniform(1, 2, 4096), rng.integers(-125, 127, 4096)
    values = np.float32(np.ldexp(mantissas * rng.choice([-1, 1], 4096), exponents))
    tie = 1 + 2.0**-11
    values = np.concatenate([values, np.float32([0, 1, 2 - 2**-20, tie, -tie])])
    mantissa, exponent = np.frexp(values.astype(np.float64))
    scaled = np.abs(mantissa) * 2**11
    wanted = np.ldexp(np.copysign(np.floor(scaled + 0.5), mantissa) / 2**11, exponent)
    got = as_operand(jnp.asarray(values), jnp.float32)
    np.testing.assert_array_equal(np.asarray(got, np.float64), wanted)


def test_what_is_no_number_stays_what_it_is():
    """All bits of a GPU's NaN are ones, but the sign's."""
    bits = np.uint32([0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F800000, 0xFF800000])
    values = bits.view(np.float32)
    got = np.asarray(as_operand(jnp.asarray(values), jnp.float32))
    np.testing.assert_array_equal(got, values)


def test_operands_of_16_bits_are_cast():
    value = jnp.float32(1 + 2**-9)
    assert as_operand(value, jnp.bfloat16) == jnp.bfloat16(1)
    assert as_operand(value, jnp.float16) == value


@pytest.mark.parametrize(
    ("plan", "hidden"),
    [
        (Plan("single", 8, 2), 7),
        (Plan("cluster", 8, 2, 2), 60),
        (Plan("grid", 8, 1), 60),
        (Plan("step", 8, 2), 7),
    ],
    ids=lambda given: getattr(given, "kernel", None),
)
@pytest.mark.kernels("interpreted")
def test_all_operands_are_tf32_and_what_is_carried_is_not(plan, hidden, monkeypatch):
    """Of an operand of more bits the hardware would cut them off: here, NaN is made."""

    def of_tf32(weights, tile):
        cut = [
            np.int32(-(2**13)) & operand.view(jnp.int32) for operand in (weights, tile)
        ]
        fits = [
            bits.view(jnp.float32) == operand
            for bits, operand in zip(cut, (weights, tile), strict=True)
        ]
        weights, tile = (
            jnp.where(fit, operand, jnp.nan)
            for fit, operand in zip(fits, (weights, tile), strict=True)
        )
        return plain_product(weights, tile)

    monkeypatch.setattr(compat, "INTERPRETS_LAYOUTS", False)
    for module in (common, slabs):
        monkeypatch.setattr(module, "plain_product", of_tf32)
    given = problem((3, 3, 2, hidden), "float32")
    no_resets = jnp.zeros((0, 0), jnp.uint8)
    given = given._replace(arguments=(*given.arguments[:-1], no_resets))
    # Without its race detector, which does not like the flags of `grid`.
    nan_filled = compat.InterpretGPUParams(uninitialized_memory="nan")
    got = run(given, plan, reverse=False, interpret=nan_filled)
    judge(given, got, reverse=False, bars=BARS["tf32"])
    hs, _, h_last = (np.asarray(value) for value in got.values[:3])
    h_first, lengths = (np.asarray(given.arguments[n]) for n in (5, 6))
    for row, length in enumerate(lengths):
        wanted = hs[length - 1, row] if length else h_first[row]
        np.testing.assert_array_equal(h_last[row], wanted)
    # All steps of row 0 count. Only `single` says that it gives out dz as the operand.
    (hs, c, h, gates, before), (d_z, d_c, d_h) = got.values, got.gradients
    carried = {"hs": hs[:, 0], "c": c[0], "h": h[0], "d_c": d_c[0], "d_h": d_h[0]}
    carried |= {"gates": gates[:, 0], "before": before[1:, 0]}
    if plan.kernel != "single":
        carried["d_z"] = d_z[:, 0]
    for name, value in carried.items():
        # 13 bits that happen to be 0: one number in 8192.
        assert jnp.mean(as_operand(value, jnp.float32) != value) > 0.9, name
