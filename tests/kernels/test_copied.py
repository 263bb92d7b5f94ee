"""Pieces of time with arguments and results copied: the same as all steps at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_lstm_kernels.copied import in_copies

pytestmark = pytest.mark.kernels


def loop(sequences, state, lengths, resets, *, reverse):
    """Stands in for a kernel: what it gives depends on order, masks and states."""

    def step(carry, at):
        t, x, y = at
        c, h = carry
        fresh = (resets[t] != 0)[:, None] if resets.size else False
        new_c = 0.5 * jnp.where(fresh, 0.0, c) + x
        new_h = jnp.where(fresh, 0.0, h) - new_c * y
        live = (t < lengths)[:, None]
        state = jnp.where(live, new_c, c), jnp.where(live, new_h, h)
        return state, (jnp.where(live, new_h, 0.0), jnp.where(live, new_c, 0.0))

    times = jnp.arange(len(sequences[0]))
    state, results = jax.lax.scan(step, state, (times, *sequences), reverse=reverse)
    return results, state


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 6])
def test_copied_pieces_give_what_all_at_once_gives(size, reverse):
    rng = np.random.default_rng(0)
    shapes = (6, 4, 3), (6, 4, 1), (4, 3), (4, 3)
    x, y, c, h = (jnp.asarray(rng.normal(size=n), "float32") for n in shapes)
    lengths = jnp.array([6, 0, 3, 4])
    for resets in (rng.random((6, 4)) < 0.3, np.zeros((0, 0), bool)):
        given = (x, y), (c, h), lengths, jnp.asarray(resets)

        def of_piece(*arrays):
            return loop(*arrays, reverse=reverse)

        results = [jax.ShapeDtypeStruct((6, 4, 3), "float32")] * 2
        options = {"results": results, "size": size, "reverse": reverse}
        got = in_copies(of_piece, *given, **options)
        leaves = zip(*map(jax.tree.leaves, (got, of_piece(*given))), strict=True)
        for a, b in leaves:
            np.testing.assert_array_equal(a, b)
