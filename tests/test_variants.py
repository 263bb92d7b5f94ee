"""The other cells against NumPy float64 statements of the papers' equations.

Each statement here works on one row, one step, and shares nothing with the library.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import flax_lstm as fl
from flax_lstm import variants
from flax_lstm.variants import (
    CoupledParams,
    LayerNormParams,
    PeepholeParams,
    ProjectedParams,
)

pytestmark = pytest.mark.usefixtures("hurried")

T, B, D, H, P = 4, 3, 2, 5, 3


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def normalized(v):
    return (v - v.mean()) / np.sqrt(v.var() + 1e-5)


def plain_step(p, c, h, x):
    zi, zf, zg, zo = np.split(x @ p[0] + h @ p[1] + p[2], 4)
    c = sigmoid(zf) * c + sigmoid(zi) * np.tanh(zg)
    return c, sigmoid(zo) * np.tanh(c)


def peephole_step(p, c, h, x):
    zi, zf, zg, zo = np.split(x @ p.kernel + h @ p.recurrent_kernel + p.bias, 4)
    i = sigmoid(zi + p.peephole[0] * c)
    f = sigmoid(zf + p.peephole[1] * c)
    c = f * c + i * np.tanh(zg)
    return c, sigmoid(zo + p.peephole[2] * c) * np.tanh(c)


def projected_step(p, c, h, x):
    c, m = plain_step(p, c, h, x)
    return c, m @ p.projection


def layer_norm_step(p, c, h, x):
    z = normalized(x @ p.kernel) * p.kernel_scale + p.bias
    z = z + normalized(h @ p.recurrent_kernel) * p.recurrent_scale
    zi, zf, zg, zo = np.split(z, 4)
    c = sigmoid(zf) * c + sigmoid(zi) * np.tanh(zg)
    return c, sigmoid(zo) * np.tanh(normalized(c) * p.cell_scale + p.cell_bias)


def coupled_step(p, c, h, x):
    zf, zg, zo = np.split(x @ p.kernel + h @ p.recurrent_kernel + p.bias, 3)
    f = sigmoid(zf)
    c = f * c + (1 - f) * np.tanh(zg)
    return c, sigmoid(zo) * np.tanh(c)


def clipped_step(p, c, h, x):
    zi, zf, zg, zo = np.split(x @ p.kernel + h @ p.recurrent_kernel + p.bias, 4)
    c = np.clip(sigmoid(zf) * c + sigmoid(zi) * np.tanh(zg), -0.3, 0.3)
    return c, sigmoid(zo) * np.tanh(c)


# The cell, the form of its parameters, their shapes, the size of h, the statement.
PLAIN = ((D, 4 * H), (H, 4 * H), (4 * H,))
CELLS = {
    "plain": (fl.lstm_cell, fl.LSTMParams, PLAIN, H, plain_step),
    "peephole": (
        variants.peephole_cell,
        PeepholeParams,
        (*PLAIN, (3, H)),
        H,
        peephole_step,
    ),
    "projected": (
        variants.projected_cell,
        ProjectedParams,
        ((D, 4 * H), (P, 4 * H), (4 * H,), (H, P)),
        P,
        projected_step,
    ),
    "layer norm": (
        variants.layer_norm_cell,
        LayerNormParams,
        (*PLAIN, (4 * H,), (4 * H,), (H,), (H,)),
        H,
        layer_norm_step,
    ),
    "coupled": (
        variants.coupled_cell,
        CoupledParams,
        ((D, 3 * H), (H, 3 * H), (3 * H,)),
        H,
        coupled_step,
    ),
    "clipped": (variants.clipped_cell(0.3), fl.LSTMParams, PLAIN, H, clipped_step),
}


def draw(form, shapes, size, dtype=np.float64):
    rng = np.random.default_rng(0)
    params = form(*(jnp.asarray(rng.normal(size=s), dtype) for s in shapes))
    x = jnp.asarray(rng.normal(size=(T, B, D)), dtype)
    c, h = (jnp.asarray(rng.normal(size=(B, s)), dtype) for s in (H, size))
    return params, x, fl.LSTMState(c, h)


def by_rows(step, params, x, state, lengths, resets):
    """Runs a statement over time, row by row, over the steps that count."""
    params = jax.tree.map(np.asarray, params)
    x, c, h = (np.array(v) for v in (x, *state))
    outputs = np.zeros((T, B, h.shape[-1]))
    for row in range(B):
        for t in range(lengths[row]):
            if resets[t, row]:
                c[row], h[row] = 0, 0
            c[row], h[row] = step(params, c[row], h[row], x[t, row])
            outputs[t, row] = h[row]
    return c, h, outputs


LENGTHS = np.array([4, 0, 2])
RESETS = np.arange(T * B).reshape(T, B) % 5 == 3


@pytest.mark.parametrize("case", CELLS.values(), ids=CELLS)
def test_a_cell_over_time_equals_numpy(x64, case):
    """With lengths and resets; a few roundings of 1e-16 per step."""
    cell, form, shapes, size, step = case
    params, x, state = draw(form, shapes, size)
    final, outputs = fl.scan_cell(
        cell, params, x, state, lengths=LENGTHS, resets=RESETS
    )
    want = by_rows(step, params, x, state, LENGTHS, RESETS)
    for got, wanted in zip((*final, outputs), want, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("case", CELLS.values(), ids=CELLS)
def test_a_cell_differentiates_with_masks_resets_and_remat(x64, case):
    """Against finite differences, whose error is about 1e-6 of the gradient."""
    cell, form, shapes, size, _ = case
    params, x, state = draw(form, shapes, size)

    def loss(params, x, state):
        final, outputs = fl.scan_cell(
            cell, params, x, state, lengths=LENGTHS, resets=RESETS, remat=2
        )
        return jnp.sum(jnp.sin(outputs)) + jnp.sum(final.c)

    if cell is not CELLS["clipped"][0]:
        check_grads(jax.jit(loss), (params, x, state), order=1)
    gradient = jax.jit(jax.grad(loss, 1))
    clean = gradient(params, x, state)
    dirty = gradient(params, x.at[2:, 2].set(jnp.nan), state)
    np.testing.assert_array_equal(clean, dirty)


@pytest.mark.parametrize("case", CELLS.values(), ids=CELLS)
def test_a_cell_computes_in_16_bits_and_keeps_c_in_32(case):
    cell, form, shapes, size, step = case
    params, x, state = draw(form, shapes, size, np.float32)
    given = fl.LSTMState(state.c, state.h.astype(jnp.bfloat16))
    final, outputs = fl.scan_cell(cell, params, x.astype(jnp.bfloat16), given)
    assert (final.c.dtype, outputs.dtype) == (jnp.float32, jnp.bfloat16)
    whole, none = np.full(B, T), np.zeros((T, B), bool)
    want = by_rows(step, params, x, state, whole, none)[2]
    # Operands rounded to 8 bits (4e-3) in products of 7 terms, over four steps.
    np.testing.assert_allclose(outputs.astype(jnp.float32), want, atol=0.1)


def test_layers_of_different_cells_stack(x64):
    key = jax.random.key(0)
    first = variants.init_projected_params(key, D, H, P, dtype=jnp.float64)
    second = variants.init_peephole_params(key, P, H, dtype=jnp.float64)
    x = draw(*CELLS["plain"][1:4])[1]
    start = variants.zero_projected_state((B,), H, P, jnp.float64)
    _, middle = fl.scan_cell(variants.projected_cell, first, x, start)
    zero = fl.zero_state((B,), H, jnp.float64)
    _, got = fl.scan_cell(variants.peephole_cell, second, middle, zero)
    whole, none = np.full(B, T), np.zeros((T, B), bool)
    want = by_rows(projected_step, first, x, start, whole, none)[2]
    want = by_rows(peephole_step, second, want, zero, whole, none)[2]
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)


def equals_plain(cell, params, plain):
    x, state = draw(*CELLS["plain"][1:4])[1:]
    got = fl.scan_cell(cell, params, x, state)
    want = fl.lstm(plain, x, state, implementation="scan")
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, 1e-12, 1e-13), got, want)


def test_without_peepholes_projection_or_limit_a_cell_is_the_plain_one(x64):
    plain = draw(*CELLS["plain"][1:4])[0]
    peephole = PeepholeParams(*plain, jnp.zeros((3, H)))
    equals_plain(variants.peephole_cell, peephole, plain)
    identity = ProjectedParams(*plain, jnp.eye(H))
    equals_plain(variants.projected_cell, identity, plain)
    equals_plain(variants.clipped_cell(1e9), plain, plain)


def test_the_coupled_cell_is_the_plain_one_with_the_opposite_input_gate(x64):
    """1 - sigmoid(z) = sigmoid(-z)."""
    coupled = draw(*CELLS["coupled"][1:4])[0]
    plain = fl.LSTMParams(
        *(jnp.concatenate([-p[..., :H], p], axis=-1) for p in coupled)
    )
    equals_plain(variants.coupled_cell, coupled, plain)


def test_layer_norm_does_not_see_the_scale_of_its_weights(x64):
    """To epsilon, 1e-5 of a variance that is made large here."""
    params, x, state = draw(*CELLS["layer norm"][1:4])
    larger = params._replace(kernel=params.kernel * 1e4)
    largest = params._replace(kernel=params.kernel * 1e6)
    got = fl.scan_cell(variants.layer_norm_cell, larger, x, state)[1]
    want = fl.scan_cell(variants.layer_norm_cell, largest, x, state)[1]
    np.testing.assert_allclose(got, want, atol=1e-6)


INITS = {
    "peephole": variants.init_peephole_params,
    "layer norm": variants.init_layer_norm_params,
    "coupled": variants.init_coupled_params,
    "projected": lambda *a, **k: variants.init_projected_params(*a, P, **k),
}


@pytest.mark.parametrize("name", INITS)
def test_initial_parameters_fit_their_cell(name):
    params = INITS[name](jax.random.key(0), D, H, forget_bias=3.0, dtype=jnp.float32)
    _, form, shapes, _, _ = CELLS[name]
    assert isinstance(params, form)
    assert tuple(p.shape for p in params) == shapes
    assert sorted(set(params.bias.tolist())) == [0.0, 3.0]
    first = params.bias.tolist().index(3.0)
    assert first == (0 if name == "coupled" else H)


def test_wrong_sizes_are_named():
    with pytest.raises(
        ValueError, match=r"projection_size must be within 1 … 5.*got 6"
    ):
        variants.init_projected_params(jax.random.key(0), D, H, 6)
    with pytest.raises(ValueError, match=r"limit must be above 0; got -1\.0"):
        variants.clipped_cell(-1.0)
