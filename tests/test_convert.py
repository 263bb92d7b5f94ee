"""Weight converters, without any of the packages they convert from.

The numbers of each form are judged by that form's own equations, written here in NumPy
float64 on the raw arrays. The same against the real packages: tests/parity.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_lstm import convert, lstm_cell
from flax_lstm.cell import LSTMParams, LSTMState
from flax_lstm.variants import PeepholeParams, ProjectedParams

D, H, B = 3, 4, 2


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def draw(seed, *shape, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def draw_layer(seed, input_size=D, hidden=H, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = ((input_size, 4 * hidden), (hidden, 4 * hidden), (4 * hidden,))
    return LSTMParams(*(jnp.asarray(rng.normal(size=s), dtype) for s in shapes))


def draw_stack(layers, directions, dtype=np.float32):
    widths = [D] + [directions * H] * (layers - 1)
    return tuple(
        tuple(draw_layer(10 * k + d, width, dtype=dtype) for d in range(directions))
        for k, width in enumerate(widths)
    )


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def one_step(params, x, h, c):
    """Returns our new h and c."""
    c, h, x = map(jnp.asarray, (c, h, x))
    new, _ = lstm_cell(params, LSTMState(c, h), x)
    return new.h, new.c


def update(i, f, g, o, c):
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


STACKS = [(1, 1), (1, 2), (3, 1), (2, 2)]
STACK_IDS = ["one", "bidirectional", "stacked", "stacked bidirectional"]


@pytest.mark.parametrize(("layers", "directions"), STACKS, ids=STACK_IDS)
class TestRoundTrip:
    """Reading what was written gives the same bits."""

    def test_torch(self, layers, directions):
        stack = draw_stack(layers, directions)
        assert_same(convert.from_torch(convert.to_torch(stack)), stack)

    def test_torch_below_a_prefix_and_beside_other_keys(self, layers, directions):
        stack = draw_stack(layers, directions)
        values = convert.to_torch(stack, prefix="encoder.lstm.")
        values["head.weight"] = np.zeros((1, H))
        got = convert.from_torch(values, prefix="encoder.lstm.")
        assert_same(got, stack)

    def test_torch_without_biases(self, layers, directions):
        stack = jax.tree.map(
            lambda leaf: leaf if leaf.ndim == 2 else jnp.zeros_like(leaf),
            draw_stack(layers, directions),
        )
        values = convert.to_torch(stack, bias=False)
        assert not [key for key in values if "bias" in key]
        assert_same(convert.from_torch(values), stack)

    def test_cudnn(self, layers, directions):
        stack = draw_stack(layers, directions)
        got = convert.from_cudnn(
            convert.to_cudnn(stack),
            input_size=D,
            hidden_size=H,
            num_layers=layers,
            bidirectional=directions == 2,
        )
        assert_same(got, stack)

    def test_keras(self, layers, directions):
        stack = draw_stack(layers, directions)
        got = convert.from_keras(convert.to_keras(stack), bidirectional=directions == 2)
        assert_same(got, stack)

    def test_tf1(self, layers, directions):
        # Small integers, so that adding and subtracting the forget bias is exact.
        stack = jax.tree.map(jnp.round, draw_stack(layers, directions))
        got = convert.from_tf1(convert.to_tf1(stack))
        assert_same(got, stack)

    def test_onnx(self, layers, directions):
        for layer in draw_stack(layers, directions):
            assert_same(convert.from_onnx(**convert.to_onnx(layer)), layer)


def test_haiku_round_trip_keeps_twelve_layers_in_order():
    """`lstm_10` sorts before `lstm_2` as text, not as a layer."""
    stack = jax.tree.map(jnp.round, draw_stack(12, 1))
    values = convert.to_haiku(stack)
    assert_same(convert.from_haiku(dict(sorted(values.items()))), stack)


def test_linen_nnx_and_equinox_round_trips():
    params = draw_layer(0)
    assert_same(convert.from_linen(convert.to_linen(params)), params)
    assert_same(convert.from_nnx(convert.to_nnx(params)), params)
    assert_same(convert.from_nnx(convert.to_nnx(params, cell="plain")), params)
    assert_same(convert.from_equinox(convert.to_equinox(params)), params)


def test_projections_and_peepholes_round_trip():
    """Torch's `proj_size` with two layers, ONNX's `P` with two directions."""
    projected = []
    for seed, width in enumerate((D, 2)):
        plain = draw_layer(seed, width)._replace(
            recurrent_kernel=jnp.asarray(draw(seed, 2, 4 * H))
        )
        matrix = jnp.asarray(draw(seed + 5, H, 2))
        projected.append((ProjectedParams(*plain, projection=matrix),))
    got = convert.from_torch(convert.to_torch(projected))
    assert_same(got, tuple(projected))
    layer = tuple(
        PeepholeParams(*draw_layer(n), peephole=jnp.asarray(draw(n + 7, 3, H)))
        for n in range(2)
    )
    values = convert.to_onnx(layer)
    i, f, o = layer[1].peephole
    np.testing.assert_array_equal(values["P"][1], np.concatenate([i, o, f]))
    assert_same(convert.from_onnx(**values), layer)


@pytest.mark.usefixtures("x64")
def test_float64_stays_float64():
    stack = draw_stack(2, 2, np.float64)
    got = convert.from_torch(convert.to_torch(stack))
    assert_same(got, stack)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype("float64")}


def test_bfloat16_stays_bfloat16():
    stack = draw_stack(1, 1, jnp.bfloat16)
    got = convert.from_keras(convert.to_keras(stack))
    assert_same(got, stack)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.usefixtures("x64")
class TestEquations:
    """One step with the weights read equals the form's own equations in float64."""

    x, h, c = (draw(n, B, size, dtype=np.float64) for n, size in enumerate((D, H, H)))

    def check(self, params, want):
        got = one_step(params, self.x, self.h, self.c)
        # A handful of float64 roundings of numbers near 1.
        np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-13)

    def test_torch(self):
        w, r = draw(3, 4 * H, D, dtype=float), draw(4, 4 * H, H, dtype=float)
        b, b2 = draw(5, 2, 4 * H, dtype=float)
        keys = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        ((params,),) = convert.from_torch(dict(zip(keys, (w, r, b, b2), strict=True)))
        z = self.x @ w.T + b + self.h @ r.T + b2
        i, f, g, o = np.split(z, 4, -1)
        self.check(params, update(i, f, g, o, self.c))

    def test_onnx(self):
        w, r = draw(3, 1, 4 * H, D, dtype=float), draw(4, 1, 4 * H, H, dtype=float)
        b = draw(5, 1, 8 * H, dtype=float)
        (params,) = convert.from_onnx(w, r, b)
        z = self.x @ w[0].T + self.h @ r[0].T + b[0, : 4 * H] + b[0, 4 * H :]
        i, o, f, g = np.split(z, 4, -1)
        self.check(params, update(i, f, g, o, self.c))

    def test_keras(self):
        w, r, b = (draw(3, *s, dtype=float) for s in ((D, 4 * H), (H, 4 * H), (4 * H,)))
        ((params,),) = convert.from_keras([w, r, b])
        i, f, g, o = np.split(self.x @ w + self.h @ r + b, 4, -1)
        self.check(params, update(i, f, g, o, self.c))

    def test_haiku(self):
        w, b = draw(3, D + H, 4 * H, dtype=float), draw(4, 4 * H, dtype=float)
        ((params,),) = convert.from_haiku({"lstm/linear": {"w": w, "b": b}})
        i, g, f, o = np.split(np.concatenate([self.x, self.h], -1) @ w + b, 4, -1)
        self.check(params, update(i, f + 1, g, o, self.c))

    def test_tf1(self):
        w, b = draw(3, D + H, 4 * H, dtype=float), draw(4, 4 * H, dtype=float)
        values = {"rnn/lstm_cell/kernel:0": w, "rnn/lstm_cell/bias:0": b}
        ((params,),) = convert.from_tf1(values, forget_bias=0.5)
        i, j, f, o = np.split(np.concatenate([self.x, self.h], -1) @ w + b, 4, -1)
        self.check(params, update(i, f + 0.5, j, o, self.c))

    def test_linen_and_nnx(self):
        kernels = {f"i{g}": draw(n, D, H, dtype=float) for n, g in enumerate("ifgo")}
        hidden = {f"h{g}": draw(n, H, H, dtype=float) for n, g in enumerate("ifgo")}
        biases = {f"h{g}": draw(9 + n, H, dtype=float) for n, g in enumerate("ifgo")}
        cell = {key: {"kernel": w} for key, w in kernels.items()} | {
            key: {"kernel": hidden[key], "bias": biases[key]} for key in hidden
        }
        i, f, g, o = (
            self.x @ kernels[f"i{n}"] + self.h @ hidden[f"h{n}"] + biases[f"h{n}"]
            for n in "ifgo"
        )
        want = update(i, f, g, o, self.c)
        self.check(convert.from_linen(cell), want)
        cell["if_"] = cell.pop("if")
        self.check(convert.from_nnx(cell), want)


def test_tf1_two_layers_reproduce_its_published_example():
    """Two cells of one forget-bias-1 unit pair, weights 0.5, from TensorFlow's tests.

    Every row of every matrix is 0.5 and every bias 0, so with s the sum of a layer's
    input and old output each pre-activation is s/2 (and 1 + s/2 in the forget gate).
    """
    variables = {}
    for n in range(2):
        scope = f"root/multi_rnn_cell/cell_{n}/basic_lstm_cell"
        variables[f"{scope}/kernel"] = np.full((4, 8), 0.5, np.float32)
        variables[f"{scope}/bias"] = np.zeros(8, np.float32)
    x = np.array([[1.0, 1.0]], np.float32)
    states = [(0.1, 0.1), (0.2, 0.2)]  # (c, h) of each layer, both units alike
    want = []
    s = 2.0
    for c, h in states:
        z = (s + 2 * h) / 2
        new_h, new_c = update(z, 1 + z, z, z, c)
        want.append((new_h, new_c))
        s = 2 * new_h
    y = x
    for (params,), (c, h), (want_h, want_c) in zip(
        convert.from_tf1(variables), states, want, strict=True
    ):
        got_h, got_c = one_step(
            params, y, np.full((1, 2), h, np.float32), np.full((1, 2), c, np.float32)
        )
        # Six roundings of numbers below 1.
        np.testing.assert_allclose(got_h, np.full((1, 2), want_h), rtol=1e-6)
        np.testing.assert_allclose(got_c, np.full((1, 2), want_c), rtol=1e-6)
        y = got_h


def test_tf1_directions_are_told_by_their_scope():
    stack = draw_stack(1, 2)
    values = convert.to_tf1(stack, forget_bias=0.0)
    assert set(values) == {
        f"bidirectional_rnn/{way}/basic_lstm_cell/{leaf}"
        for way in ("fw", "bw")
        for leaf in ("kernel", "bias")
    }
    assert_same(convert.from_tf1(values, forget_bias=0.0), stack)


def test_torch_sums_the_two_biases_and_splits_them():
    stack = draw_stack(1, 1)
    values = convert.to_torch(stack)
    np.testing.assert_array_equal(values["bias_hh_l0"], 0)
    values["bias_hh_l0"] = np.ones(4 * H, np.float32)
    ((params,),) = convert.from_torch(values)
    np.testing.assert_array_equal(params.bias, stack[0][0].bias + 1)


def test_keras_without_biases_reads_zeros():
    stack = draw_stack(2, 1)
    weights = [w for w in convert.to_keras(stack) if w.ndim == 2]
    got = convert.from_keras(weights)
    assert [float(abs(p.bias).max()) for (p,) in got] == [0, 0]
    np.testing.assert_array_equal(got[1][0].kernel, stack[1][0].kernel)


def torch_values(**changes):
    return convert.to_torch(draw_stack(2, 1)) | changes


def linen_values(**changes):
    return convert.to_linen(draw_layer(0)) | changes


WRONG = {
    "torch: missing": (
        lambda: convert.from_torch({"weight_ih_l0": np.zeros((16, 3))}),
        r"state_dict must have the key 'weight_hh_l0'; its keys are \['weight_ih_l0'\]",
    ),
    "torch: nothing below the prefix": (
        lambda: convert.from_torch(torch_values(), prefix="lstm."),
        r"state_dict with prefix 'lstm.' must have the key 'weight_hh_l0'",
    ),
    "torch: unknown": (
        lambda: convert.from_torch(torch_values(embedding=np.zeros(3))),
        r"keys that are no part of an LSTM: \['embedding'\]",
    ),
    "torch: a layer of the wrong width": (
        lambda: convert.from_torch(torch_values(weight_ih_l1=np.zeros((16, 5)))),
        r"\['weight_ih_l1'\] must have the shape \(16, 4\); got \(16, 5\)",
    ),
    "torch: a GRU": (
        lambda: convert.from_torch(
            {"weight_ih_l0": np.zeros((12, 3)), "weight_hh_l0": np.zeros((12, 4))}
        ),
        r"\['weight_hh_l0'\] must have the shape \(16, 4\); got \(12, 4\)",
    ),
    "torch: one bias": (
        lambda: convert.from_torch(
            {k: v for k, v in torch_values().items() if k != "bias_hh_l1"}
        ),
        r"state_dict must have the key 'bias_hh_l1'",
    ),
    "torch: a bias that would be lost": (
        lambda: convert.to_torch(draw_stack(1, 1), bias=False),
        r"bias=False needs zero biases; layer 0, forward direction has others",
    ),
    "torch: unequal units": (
        lambda: convert.to_torch(((draw_layer(0),), (draw_layer(1, H, 5),))),
        r"recurrent_kernel of layer 1, forward direction must have the shape \(4, 16\)",
    ),
    "torch: layers that do not follow": (
        lambda: convert.to_torch(((draw_layer(0),), (draw_layer(1, 5),))),
        r"kernel of layer 1, forward direction must have the shape \(4, 16\)",
    ),
    "cudnn: number of weights": (
        lambda: convert.from_cudnn(np.zeros(143), input_size=3, hidden_size=4),
        r"weights must have the shape \(144,\); got \(143,\)",
    ),
    "keras: not an LSTM": (
        lambda: convert.from_keras([np.zeros((3, 4)), np.zeros((4, 4))]),
        r"weights\[1\] must have the shape \(4, 16\); got \(4, 4\)",
    ),
    "keras: one array": (
        lambda: convert.from_keras([np.zeros((3, 4))]),
        r"weights\[0\] of shape \(3, 4\) is left over",
    ),
    "keras: odd number of directions": (
        lambda: convert.from_keras(
            convert.to_keras(draw_stack(1, 1)), bidirectional=True
        ),
        r"two directions for each where bidirectional=True; got 1",
    ),
    "haiku: none": (lambda: convert.from_haiku({}), r"at least one LSTM; got none"),
    "haiku: no matrix": (
        lambda: convert.from_haiku({"a": {"b": np.zeros(16)}}),
        r"modules\['a'\] must have the key 'w'",
    ),
    "haiku: too few rows": (
        lambda: convert.from_haiku({"a": {"w": np.zeros((4, 16)), "b": np.zeros(16)}}),
        r"modules\['a'\] must be a matrix \[I\+H, 4H\] .* got \(4, 16\) and \(16,\)",
    ),
    "haiku: two directions": (
        lambda: convert.to_haiku(draw_stack(1, 2)),
        r"tuples of 1 directions each, .* got \[2\] directions",
    ),
    "tf1: optimiser slots": (
        lambda: convert.from_tf1(
            {"rnn/kernel": np.zeros((7, 16)), "rnn/kernel/Adadelta": np.zeros((7, 16))}
        ),
        r"variables in 'rnn' must have the key 'bias'",
    ),
    "onnx: directions of W": (
        lambda: convert.from_onnx(np.zeros((2, 16, 3)), np.zeros((1, 16, 4))),
        r"W must have the shape \(1, 16, I\); got \(2, 16, 3\)",
    ),
    "onnx: bias": (
        lambda: convert.from_onnx(
            np.zeros((1, 16, 3)), np.zeros((1, 16, 4)), np.zeros((1, 16))
        ),
        r"B must have the shape \(1, 32\); got \(1, 16\)",
    ),
    "onnx: peepholes": (
        lambda: convert.from_onnx(
            np.zeros((1, 16, 3)), np.zeros((1, 16, 4)), None, np.zeros((1, 16))
        ),
        r"P must have the shape \(1, 12\); got \(1, 16\)",
    ),
    "onnx: unequal directions": (
        lambda: convert.to_onnx((draw_layer(0), draw_layer(1, 5))),
        r"same sizes .* for W",
    ),
    "linen: the RNN instead of its cell": (
        lambda: convert.from_linen({"cell": linen_values()}),
        r"keys that are no part of an LSTM: \['cell'\]",
    ),
    "linen: a gate missing": (
        lambda: convert.from_linen(
            {k: v for k, v in linen_values().items() if k != "ig"}
        ),
        r"cell must have a dictionary at 'ig'",
    ),
    "linen: a gate of another size": (
        lambda: convert.from_linen(linen_values(ig={"kernel": np.zeros((3, 5))})),
        r"cell\['ig'\]\['kernel'\] must have the shape \(3, 4\); got \(3, 5\)",
    ),
    "nnx: other keys": (
        lambda: convert.from_nnx({"dense_i": {}, "dense": {}}),
        r"keys that are no part of an LSTM: \['dense'\]",
    ),
    "nnx: another cell": (
        lambda: convert.to_nnx(draw_layer(0), cell="fused"),
        r"""cell must be "optimized" or "plain"; got 'fused'""",
    ),
    "equinox: shape": (
        lambda: convert.from_equinox(
            {"weight_hh": np.zeros((16, 4)), "weight_ih": np.zeros((3, 16))}
        ),
        r"cell\['weight_ih'\] must have the shape \(16, I\); got \(3, 16\)",
    ),
    "a bare layer instead of a stack": (
        lambda: convert.to_keras(draw_layer(0)),
        r"layers must be a non-empty sequence of tuples of 1 or 2 directions",
    ),
    "no layers": (lambda: convert.to_keras(()), r"non-empty sequence"),
}


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_wrong_weights_are_refused_with_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.usefixtures("as_installed")
def test_integers_and_variants_are_refused():
    with pytest.raises(TypeError, match=r"\['weight_hh_l0'\] must be a floating array"):
        convert.from_torch({"weight_hh_l0": np.zeros((16, 4), int)})
    with pytest.raises(TypeError, match="Keras holds plain LSTM layers only"):
        convert.to_keras(((tuple(draw_layer(0)),),))
