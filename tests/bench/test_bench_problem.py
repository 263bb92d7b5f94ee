"""What is right, judged by NumPy in float64; what is wrong is found."""

import numpy as np
import pytest
import reference as float64

from flax_lstm.bench import problem as problems
from flax_lstm.bench.shapes import Shape

SHAPE = Shape("tiny", 4, 40, 3, 5, "", lengths="stocktwits", reset=0.2)


@pytest.mark.parametrize("resets", [True, False])
def test_the_reference_equals_numpy_with_and_without_resets(resets):
    problem = problems.draw_problem(SHAPE, "gradient", "float32", 0)
    got = problems.reference(problem, resets=resets)
    want = float64.lstm(
        problem.params,
        problem.x,
        (problem.c, problem.h),
        lengths=problem.lengths,
        resets=problem.resets if resets else None,
    )
    zeros = np.zeros_like(problem.h)
    bars = float64.backward(want, problem.y_bar, zeros, zeros)
    # Some hundred roundings of float32.
    assert float64.error(got.y, want.outputs) < 1e-5
    for mine, name in (
        (got.params_bar.kernel, "kernel"),
        (got.params_bar.recurrent_kernel, "recurrent_kernel"),
        (got.params_bar.bias, "bias"),
        (got.x_bar, "inputs"),
        (got.h_bar, "h"),
        (got.c_bar, "c"),
    ):
        assert float64.error(mine, bars[name]) < 1e-5, name


def test_what_is_drawn_is_already_rounded_to_the_dtype():
    problem = problems.draw_problem(SHAPE, "forward", "bfloat16", 0)
    for array in (*problem.params, problem.x, problem.h, problem.c, problem.y_bar):
        assert array.dtype == np.float32
        # bfloat16 is the upper half of float32.
        assert not np.any(array.view(np.uint32) & 0xFFFF)


def test_a_step_is_one_step_without_lengths():
    problem = problems.draw_problem(SHAPE, "step", "float32", 0)
    assert problem.x.shape == (1, 4, 3)
    assert problem.lengths is None
    assert problem.resets is None
    assert problem.live.all()


def test_an_error_is_found_and_named_and_the_padding_does_not_count():
    problem = problems.draw_problem(SHAPE, "gradient", "float32", 0)
    right = problems.reference(problem, resets=True)
    assert problems.largest_error(problem, right, right)[0] == 0
    padding = ~problem.live[..., None]
    other = right._replace(y=right.y + 7 * padding, x_bar=right.x_bar + 7 * padding)
    assert problems.largest_error(problem, other, right)[0] == 0
    swapped = np.roll(right.params_bar.kernel, SHAPE.hidden, axis=1)
    other = right._replace(params_bar=right.params_bar._replace(kernel=swapped))
    error, name = problems.largest_error(problem, other, right)
    assert error > 0.5
    assert name == "kernel"


def test_a_value_that_is_no_number_is_the_largest_error():
    problem = problems.draw_problem(SHAPE, "gradient", "float32", 0)
    right = problems.reference(problem, resets=True)
    error, name = problems.largest_error(
        problem,
        right._replace(h_bar=right.h_bar * np.nan, c_bar=right.c_bar + 1),
        right,
    )
    assert np.isnan(error)
    assert name == "h_bar"


def test_only_accelerators_may_round_the_operands_of_float32():
    assert problems.tolerance("float32", "cpu") < 1e-3
    assert problems.tolerance("float32", "gpu") == problems.TF32_TOLERANCE
    assert problems.tolerance("bfloat16", "gpu") == problems.TOLERANCES["bfloat16"]
