"""Pooling over time against NumPy, row by row over the valid steps alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_lstm.pooling import pool, pooled_size

T, B, H = 6, 4, 3
LENGTHS = np.array([6, 0, 1, 4])
NUMPY = {
    "last": lambda r: r[-1],
    "mean": lambda r: r.mean(0),
    "max": lambda r: r.max(0),
    "concat": lambda r: np.concatenate([r[-1], r.mean(0), r.max(0)]),
}
# Sums of at most six float32 values.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def outputs() -> np.ndarray:
    # Below zero, so that a maximum over padding set to zero would show.
    drawn = np.random.default_rng(0).normal(size=(T, B, H)) - 5
    return drawn.astype(np.float32)


def numpy_pool(x, lengths, pooling):
    size = pooled_size(pooling, H)
    rows = [x[:n, b].astype(np.float64) for b, n in enumerate(lengths)]
    return np.stack([NUMPY[pooling](r) if len(r) else np.zeros(size) for r in rows])


@pytest.mark.parametrize("pooling", NUMPY)
def test_pool_equals_numpy_and_never_sees_the_padding(pooling):
    x = outputs()
    poisoned = np.where(np.arange(T)[:, None] < LENGTHS[None, :], 0, np.nan)[..., None]
    want = numpy_pool(x, LENGTHS, pooling)
    lengths = jnp.array(LENGTHS)
    got = pool(jnp.array(x + poisoned), lengths, pooling=pooling)
    np.testing.assert_allclose(got, want, **CLOSE)
    got = pool(jnp.array(x), pooling=pooling)
    np.testing.assert_allclose(got, numpy_pool(x, [T] * B, pooling), **CLOSE)

    def loss(x):
        return jnp.sum(pool(x, lengths, pooling=pooling) ** 2)

    grads = jax.grad(loss)(jnp.array(x + poisoned))
    assert bool(jnp.isfinite(grads).all())
    assert not np.asarray(grads)[np.isnan(x + poisoned)].any()


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "lengths"])
@pytest.mark.parametrize("pooling", NUMPY)
def test_pool_per_step_equals_numpy_over_every_prefix(pooling, lengths):
    x = outputs()
    given = None if lengths is None else jnp.array(lengths)
    got = pool(jnp.array(x), given, pooling=pooling, per_step=True)
    ends = np.full(B, T) if lengths is None else lengths
    want = [numpy_pool(x, np.minimum(ends, t + 1), pooling) for t in range(T)]
    np.testing.assert_allclose(got, np.stack(want), **CLOSE)


def test_pool_of_bfloat16_sums_in_float32():
    """3000 ones: bfloat16 cannot count above 256."""
    got = pool(jnp.ones((3000, 1, 1), jnp.bfloat16), pooling="mean")
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, 1, rtol=1e-6)


def test_pool_of_no_steps_is_zero():
    assert pool(jnp.zeros((0, 2, 3)), pooling="concat").tolist() == [[0.0] * 9] * 2
    empty = pool(jnp.zeros((0, 2, 3)), pooling="max", per_step=True)
    assert empty.shape == (0, 2, 3)


def test_unknown_pooling_is_refused(as_installed):
    with pytest.raises(ValueError, match=r"pooling must be one of .* got 'median'"):
        # The type is wrong on purpose: the error of the run is what is tested.
        pool(jnp.zeros((1, 1, 1)), pooling="median")  # type: ignore[arg-type] refused
