"""The roofline, from made-up rates, and that real ones can be measured."""

import math

from flax_lstm.bench.limits import Limits, measure_limits
from flax_lstm.bench.work import Work

MADE_UP = Limits(
    {"float32": (100.0, "jax")},
    {1000: (50.0, "a"), 4000: (20.0, "b"), 9000: (5.0, "c")},
)


def test_a_case_is_held_against_the_working_set_next_below_its_own():
    assert MADE_UP.bandwidth(100.0) == 50  # smaller than all: the smallest
    assert MADE_UP.bandwidth(3999.0) == 50
    assert MADE_UP.bandwidth(4000.0) == 20
    assert MADE_UP.bandwidth(1e6) == 5


def test_a_larger_set_that_is_faster_counts():
    """A small one may be slow by what every call costs."""
    limits = Limits({}, {1000: (5.0, "a"), 4000: (20.0, "b")})
    assert limits.bandwidth(2000.0) == 20


def test_the_roof_is_memory_at_low_intensity_and_products_at_high():
    assert MADE_UP.attainable(Work(1, 5000.0, 5000.0), "float32") == 20
    assert MADE_UP.attainable(Work(1, 5000.0 * 9, 5000.0), "float32") == 100


def test_the_larger_of_two_measurements_counts():
    other = Limits({"float32": (90.0, "torch")}, {1000: (60.0, "d"), 2000: (1.0, "e")})
    assert MADE_UP.merged(other) == Limits(
        {"float32": (100.0, "jax")},
        {1000: (60.0, "d"), 4000: (20.0, "b"), 9000: (5.0, "c"), 2000: (1.0, "e")},
    )


def test_measured_limits_are_rates():
    limits = measure_limits(("float32", "bfloat16"), smoke=True, budget_s=0.01)
    found = limits.to_dict()
    assert set(found["gflop_per_s"]) == {"float32", "bfloat16"}
    for rates in found.values():
        for one in rates.values():
            assert math.isfinite(one["rate"])
            assert one["rate"] > 0
            assert one["by"].split()[0] in ("jax", "numpy", "torch")
