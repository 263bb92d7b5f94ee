"""The reference itself: against a value worked by hand and finite differences."""

import numpy as np
import pytest
import reference


def draw(rng, steps, batch, size, hidden):
    params = (
        rng.normal(size=(size, 4 * hidden)) * 0.5,
        rng.normal(size=(hidden, 4 * hidden)) * 0.5,
        rng.normal(size=4 * hidden),
    )
    xs = rng.normal(size=(steps, *batch, size))
    state = rng.normal(size=(2, *batch, hidden))
    return params, xs, state


def test_one_step_equals_a_hand_computed_value():
    """H = I = 1, zero input: gates are the sigmoids and tanh of the biases."""
    bias = np.log([3.0, 1.0, 2.0, 0.25])  # i = 3/4, f = 1/2, g = 3/5, o = 1/5
    params = (np.zeros((1, 4)), np.zeros((1, 4)), bias)
    out = reference.lstm(params, np.zeros((1, 1, 1)), np.full((2, 1, 1), 0.1))
    np.testing.assert_allclose(out.c, 0.5 * 0.1 + 0.75 * 0.6, rtol=1e-15)
    np.testing.assert_allclose(out.h, 0.2 * np.tanh(0.5), rtol=1e-15)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("keep_order", [False, True])
def test_backward_equals_central_differences(reverse, keep_order):
    """Error of a central difference: 1e-16/eps + eps², least near eps 1e-5."""
    rng = np.random.default_rng(3)
    params, xs, state = draw(rng, 4, (3,), 2, 2)
    options = {
        "lengths": np.array([4, 0, 3]),
        "resets": rng.random((4, 3)) < 0.3,
        "reverse": reverse,
        "keep_order": keep_order,
    }
    result = reference.lstm(params, xs, state, **options)
    weights = [rng.normal(size=a.shape) for a in result[:3]]

    def loss(*flat):
        w, r, b, xs, c, h = flat
        out = reference.lstm((w, r, b), xs, (c, h), **options)
        return sum(np.sum(a * k) for a, k in zip(out[:3], weights, strict=True))

    got = reference.backward(result, *weights)
    arguments = [*params, xs, *state]
    for index, name in enumerate(got):
        for where in np.ndindex(arguments[index].shape):
            sides = []
            for eps in (1e-5, -1e-5):
                moved = [a.copy() for a in arguments]
                moved[index][where] += eps
                sides.append(loss(*moved))
            want = (sides[0] - sides[1]) / 2e-5
            assert abs(got[name][where] - want) < 1e-8, (name, where)
