"""Our modules in the place of Flax's: what Flax tests of its own recurrent modules.

Each behaviour is asked of our cell inside Flax's RNN, and of our layer in the place of
that RNN; what must come out is what Flax's own classes give with the same weights.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx
from parity_common import assert_close, float32

import flax_lstm.linen
import flax_lstm.nnx
from flax_lstm import convert

pytestmark = pytest.mark.parity

B, T, D, H = 3, 4, 5, 6
TOLERANCE = float32(T)
LENGTHS = np.array([2, 4, 1])

LINEN = {
    "our cell": lambda **options: linen.RNN(flax_lstm.linen.LSTMCell(H), **options),
    "our layer": lambda **options: flax_lstm.linen.LSTM(H, **options),
}
NNX = {
    "our cell": lambda **options: nnx.RNN(
        flax_lstm.nnx.LSTMCell(D, H, rngs=nnx.Rngs(0)), **options
    ),
    "our layer": lambda **options: flax_lstm.nnx.LSTM(
        D, H, rngs=nnx.Rngs(0), **options
    ),
}
OPTIONS = {
    "plain": {},
    "unrolled": {"unroll": 2},
    "time-major": {"time_major": True},
    "reverse": {"reverse": True},
    "reverse, order kept": {"reverse": True, "keep_order": True},
}


def inputs(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape or (B, T, D))


def flax_rnn(**options: Any) -> tuple[Any, Any]:
    """Returns Flax's RNN over its own cell, and variables drawn for it."""
    module = linen.RNN(linen.LSTMCell(H), **options)
    return module, module.init(jax.random.key(1), inputs())


def own(rnn: Any, weights: Any) -> Any:
    """Puts the twelve leaves of a Linen cell into an NNX layer."""
    cell = rnn.cell
    state = nnx.state(cell, nnx.Param)
    params = convert.from_linen(weights)
    nnx.replace_by_pure_dict(state, convert.to_nnx(params))
    nnx.update(cell, state)
    return rnn


def valid(outputs: Any, lengths: Any = LENGTHS) -> Any:
    """Zeroes the padding, where Flax leaves values; batch-major."""
    live = np.arange(outputs.shape[1])[None] < lengths[:, None]
    return jnp.where(live[..., None], outputs, 0)


@pytest.mark.parametrize("ours", LINEN)
class TestLinen:
    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_options_of_the_rnn_give_what_flax_gives(self, ours, options):
        theirs, variables = flax_rnn(**options)
        module = LINEN[ours](**options)
        want = theirs.apply(variables, inputs(), return_carry=True)
        got = module.apply(variables, inputs(), return_carry=True)
        assert_close((tuple(got[0]), got[1]), want, TOLERANCE)

    def test_parameters_have_flaxs_names_and_shapes(self, ours):
        _, variables = flax_rnn()
        drawn = LINEN[ours]().init(jax.random.key(0), inputs())
        assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, variables)

    @pytest.mark.parametrize("reverse", [False, True])
    def test_lengths_give_flaxs_carry_and_valid_outputs(self, ours, reverse):
        options = {"return_carry": True, "reverse": reverse, "keep_order": True}
        theirs, variables = flax_rnn(**options)
        want_carry, want = theirs.apply(variables, inputs(), seq_lengths=LENGTHS)
        carry, got = LINEN[ours](**options).apply(
            variables, inputs(), seq_lengths=LENGTHS
        )
        assert_close((tuple(carry), valid(got)), (want_carry, valid(want)), TOLERANCE)

    def test_several_batch_axes(self, ours):
        theirs, variables = flax_rnn()
        x = inputs(2, 3, T, D)
        want = theirs.apply(variables, x)
        assert_close(LINEN[ours]().apply(variables, x), want, TOLERANCE)

    def test_an_initial_carry_is_used(self, ours):
        theirs, variables = flax_rnn()
        carry = (inputs(B, H), inputs(B, H) / 2)
        want = theirs.apply(variables, inputs(), initial_carry=carry)
        got = LINEN[ours]().apply(variables, inputs(), initial_carry=carry)
        assert_close(got, want, TOLERANCE)

    def test_both_directions_with_each_merge(self, ours):
        build = LINEN[ours]
        both = linen.Bidirectional(build(), build())
        theirs = linen.Bidirectional(
            linen.RNN(linen.LSTMCell(H)), linen.RNN(linen.LSTMCell(H))
        )
        variables = theirs.init(jax.random.key(0), inputs())
        for merge in (theirs.merge_fn, lambda a, b: a + b):
            want = theirs.clone(merge_fn=merge, return_carry=True).apply(
                variables, inputs()
            )
            got = both.clone(merge_fn=merge, return_carry=True).apply(
                variables, inputs()
            )
            carries = tuple(tuple(carry) for carry in got[0])
            assert_close((carries, got[1]), want, TOLERANCE)


class TestLinenCell:
    def test_the_rnn_is_a_loop_of_the_cell(self):
        """By hand, by `jax.lax.scan`, by `nn.scan`, and one row at a time."""
        cell = flax_lstm.linen.LSTMCell(H)
        rnn = linen.RNN(cell, return_carry=True)
        variables = rnn.init(jax.random.key(0), inputs())
        weights = {"params": variables["params"]["cell"]}
        want = rnn.apply(variables, inputs())
        start = cell.initialize_carry(jax.random.key(0), (B, D))

        carry, outputs = start, []
        for t in range(T):
            carry, y = cell.apply(weights, carry, inputs()[:, t])
            outputs.append(y)
        assert_close((carry, jnp.stack(outputs, 1)), want, TOLERANCE)

        def step(carry: Any, x: Any) -> Any:
            return cell.apply(weights, carry, x)

        carry, outputs = jax.lax.scan(step, start, inputs().swapaxes(0, 1))
        assert_close((carry, outputs.swapaxes(0, 1)), want, TOLERANCE)

        scanned = linen.scan(
            flax_lstm.linen.LSTMCell,
            in_axes=1,
            out_axes=1,
            variable_broadcast="params",
            split_rngs={"params": False},
        )(H)
        assert_close(scanned.apply(weights, start, inputs()), want, TOLERANCE)

        for row in range(B):
            carry, outputs = rnn.apply(variables, inputs()[row : row + 1])
            at = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], want)
            assert_close((carry, outputs), at, TOLERANCE)

    def test_one_cell_may_serve_both_directions(self):
        cell = flax_lstm.linen.LSTMCell(H)
        both = linen.Bidirectional(linen.RNN(cell), linen.RNN(cell))
        y, variables = both.init_with_output(jax.random.key(0), inputs())
        assert y.shape == (B, T, 2 * H)
        assert len(jax.tree.leaves(variables)) == 12

    def test_the_old_interface_is_refused(self):
        with pytest.raises(TypeError):
            flax_lstm.linen.LSTMCell()
        with pytest.raises(TypeError):
            flax_lstm.linen.LSTMCell.initialize_carry(jax.random.key(0), (2,), 3)


@pytest.mark.parametrize("ours", NNX)
class TestNnx:
    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_options_of_the_rnn_give_what_linen_gives(self, ours, options):
        theirs, variables = flax_rnn(**options)
        rnn = own(NNX[ours](**options), variables["params"]["cell"])
        want = theirs.apply(variables, inputs(), return_carry=True)
        got = rnn(inputs(), return_carry=True)
        assert_close((tuple(got[0]), got[1]), want, TOLERANCE)

    def test_lengths_give_flaxs_carry_and_valid_outputs(self, ours):
        theirs, variables = flax_rnn(return_carry=True)
        rnn = own(NNX[ours](return_carry=True), variables["params"]["cell"])
        want_carry, want = theirs.apply(variables, inputs(), seq_lengths=LENGTHS)
        carry, got = rnn(inputs(), seq_lengths=jnp.asarray(LENGTHS))
        assert_close((tuple(carry), valid(got)), (want_carry, valid(want)), TOLERANCE)

    def test_batches_of_any_size(self, ours):
        theirs, variables = flax_rnn()
        rnn = own(NNX[ours](), variables["params"]["cell"])
        for batch in (1, 2, 5):
            x = inputs(batch, T, D)
            assert_close(rnn(x), theirs.apply(variables, x), TOLERANCE)

    def test_the_state_goes_on_from_call_to_call(self, ours):
        rnn = NNX[ours](return_carry=True)
        want = rnn(inputs())
        carry, first = rnn(inputs()[:, :1])
        carry, rest = rnn(inputs()[:, 1:], initial_carry=carry)
        got = (carry, jnp.concatenate([first, rest], 1))
        assert_close(got, want, TOLERANCE)


class TestNnxCell:
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_half_precision_throughout(self, dtype):
        cell = flax_lstm.nnx.LSTMCell(
            D, H, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0)
        )
        x = inputs().astype(dtype)
        carry = cell.initialize_carry((B, D), nnx.Rngs(0))
        _, y = cell(carry, x[:, 0])
        assert y.dtype == dtype
        assert nnx.RNN(cell)(x, initial_carry=carry).dtype == dtype

    def test_other_activations_equal_flaxs_cell(self):
        options = {"gate_fn": jax.nn.relu, "activation_fn": jax.nn.elu}
        theirs = nnx.LSTMCell(D, H, rngs=nnx.Rngs(0), **options)
        cell = flax_lstm.nnx.LSTMCell(D, H, rngs=nnx.Rngs(1), **options)
        params = convert.from_nnx(nnx.to_pure_dict(nnx.state(theirs, nnx.Param)))
        state = nnx.state(cell, nnx.Param)
        weights = jax.tree.map(jnp.asarray, convert.to_nnx(params))
        nnx.replace_by_pure_dict(state, weights)
        nnx.update(cell, state)
        carry = (inputs(B, H), inputs(B, H) / 2)
        with jax.numpy_rank_promotion("allow"):  # Flax adds its biases that way
            want = theirs(carry, inputs(B, D))
        got, y = cell(carry, inputs(B, D))
        assert_close((tuple(got), y), want, TOLERANCE)

    def test_a_carry_is_drawn_as_asked(self):
        ones = nnx.initializers.ones
        cell = flax_lstm.nnx.LSTMCell(D, H, carry_init=ones, rngs=nnx.Rngs(0))
        for leaf in cell.initialize_carry((1, D), nnx.Rngs(0)):
            np.testing.assert_array_equal(leaf, np.ones((1, H)))

    def test_a_subclass_may_drop_units_of_the_state(self):
        """Recurrent dropout made by a user: the mask changes with every RNN call."""

        class Dropping(flax_lstm.nnx.LSTMCell):
            def __init__(self, *args: Any, rngs: nnx.Rngs, **options: Any):
                super().__init__(*args, rngs=rngs, **options)
                self.drop = nnx.Dropout(0.5, rng_collection="mask", rngs=rngs)

            def __call__(self, carry: Any, inputs: Any) -> Any:
                carry, y = super().__call__(carry, inputs)
                return jax.tree.map(self.drop, carry), y

        rnn = nnx.RNN(Dropping(D, H, rngs=nnx.Rngs(0, mask=1)), broadcast_rngs="mask")
        first, second = rnn(inputs()), rnn(inputs())
        assert first.shape == (B, T, H)
        assert float(abs(first - second).max()) > 0.01


FLAX_CELLS = {
    "linen.OptimizedLSTMCell": lambda: linen.OptimizedLSTMCell(H),
    "linen.LSTMCell": lambda: linen.LSTMCell(H),
    "nnx.OptimizedLSTMCell": lambda: nnx.OptimizedLSTMCell(D, H, rngs=nnx.Rngs(3)),
    "nnx.LSTMCell": lambda: nnx.LSTMCell(D, H, rngs=nnx.Rngs(3)),
}


@pytest.mark.parametrize("kind", FLAX_CELLS)
def test_checkpoints_of_flaxs_cells_load(kind, tmp_path):
    """Written by Orbax from `RNN(cell)`, read into our layer in the form of the latter.

    Unchanged, except that `nnx.LSTMCell` stores its gates apart: `convert` joins them.
    """
    cell = FLAX_CELLS[kind]()
    checkpointer = ocp.StandardCheckpointer()
    if kind.startswith("linen"):
        theirs = linen.RNN(cell)
        variables = theirs.init(jax.random.key(2), inputs())
        want = theirs.apply(variables, inputs())
        checkpointer.save(tmp_path / "run", variables)
        checkpointer.wait_until_finished()
        ours = flax_lstm.linen.LSTM(H)
        form = jax.eval_shape(ours.init, jax.random.key(0), inputs())
        restored = checkpointer.restore(tmp_path / "run", form)
        assert_close(ours.apply(restored, inputs()), want, TOLERANCE)
        return
    theirs = nnx.RNN(cell)
    with jax.numpy_rank_promotion("allow"):
        want = theirs(inputs())
    checkpointer.save(tmp_path / "run", nnx.to_pure_dict(nnx.state(theirs, nnx.Param)))
    checkpointer.wait_until_finished()
    ours = flax_lstm.nnx.LSTM(D, H, rngs=nnx.Rngs(0))
    state = nnx.state(ours, nnx.Param)
    if kind == "nnx.LSTMCell":
        restored = checkpointer.restore(tmp_path / "run")
        restored = {"cell": convert.to_nnx(convert.from_nnx(restored["cell"]))}
    else:
        form = jax.tree.map(jnp.zeros_like, nnx.to_pure_dict(state))
        restored = checkpointer.restore(tmp_path / "run", form)
    nnx.replace_by_pure_dict(state, restored)
    nnx.update(ours, state)
    assert_close(ours(inputs()), want, TOLERANCE)
