"""Useful work, counted one product and one array at a time."""

import numpy as np
import pytest

from flax_lstm.bench.shapes import Shape
from flax_lstm.bench.work import work_of

TINY = Shape("tiny", 2, 3, 5, 7, "")


def counted(shape: Shape, steps_of_rows: list[int]) -> tuple[int, int]:
    """Flops and numbers moved forward, by walking through what happens."""
    flops, numbers = 0, 0
    for steps in steps_of_rows:
        for _ in range(steps):
            for _ in range(4):  # gates
                flops += 2 * shape.inputs * shape.hidden
                flops += 2 * shape.hidden * shape.hidden
            numbers += shape.inputs  # read
            numbers += shape.hidden  # written
        numbers += 2 * shape.hidden  # the state before
        numbers += 2 * shape.hidden  # the state after
    for matrix in ((shape.inputs, 4), (shape.hidden, 4), (1, 4)):
        numbers += matrix[0] * matrix[1] * shape.hidden
    return flops, numbers


@pytest.mark.parametrize("lengths", [None, [3, 1], [2, 2]])
@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_forward_work_is_that_of_the_valid_steps(lengths, dtype, size):
    array = None if lengths is None else np.array(lengths)
    work = work_of(TINY, "forward", dtype, array)
    flops, numbers = counted(TINY, lengths or [3, 3])
    assert work.flops == flops
    assert work.bytes == size * numbers
    assert work.tokens == sum(lengths or [3, 3])
    assert work.intensity == pytest.approx(flops / (size * numbers))


def test_the_gradient_has_three_times_the_products_and_moves_each_array_twice():
    forward = work_of(TINY, "forward", "float32")
    gradient = work_of(TINY, "gradient", "float32")
    kept = 4 * 6 * 5 * 7  # bytes: six steps, four gates and c of seven units
    assert gradient.flops == 3 * forward.flops
    assert gradient.bytes == 2 * forward.bytes + kept
