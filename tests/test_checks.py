"""What a sequence function says of arguments that do not fit."""

import jax
import jax.numpy as jnp
import pytest

import flax_lstm as fl

WRONG = {
    "implementation": (
        ValueError,
        {"implementation": "fast"},
        r"implementation must be None or one of .*scan.*; got 'fast'",
    ),
    "inputs size": (
        ValueError,
        {"inputs": jnp.zeros((6, 4, 2))},
        r"inputs must be \[time, \*batch, 3\] to match params.kernel; got \(6, 4, 2\)",
    ),
    "inputs rank": (ValueError, {"inputs": jnp.zeros(3)}, r"inputs must be .*\(3,\)"),
    "inputs dtype": (
        TypeError,
        {"inputs": jnp.zeros((6, 4, 3), int)},
        "inputs must be floating; got int32",
    ),
    "inputs type": (
        TypeError,
        {"inputs": [[0.0]]},
        "inputs must be a JAX or NumPy array; got list",
    ),
    "lengths dtype": (
        TypeError,
        {"lengths": jnp.ones(4)},
        "lengths must be integers; got float32",
    ),
    "lengths type": (
        TypeError,
        {"lengths": [1, 2, 3, 4]},
        "lengths must be a JAX or NumPy array; got list",
    ),
    "lengths shape": (
        ValueError,
        {"lengths": jnp.ones((4, 1), int)},
        r"lengths must be \[\*batch\] = \(4,\) to match inputs; got \(4, 1\)",
    ),
    "lengths too long": (
        ValueError,
        {"lengths": jnp.array([1, 7, 2, 0])},
        "lengths must be within 0 … 6.*got values from 0 to 7",
    ),
    "lengths negative": (
        ValueError,
        {"lengths": jnp.array([1, -1, 2, 0])},
        "lengths must be within 0 … 6.*got values from -1 to 2",
    ),
    "resets dtype": (
        TypeError,
        {"resets": jnp.zeros((6, 4), int)},
        "resets must be booleans; got int32",
    ),
    "resets shape": (
        ValueError,
        {"resets": jnp.zeros((4, 6), bool)},
        r"resets must be \[time, \*batch\] = \(6, 4\) .*got \(4, 6\)",
    ),
    "state c": (
        ValueError,
        {"state": fl.zero_state((4,), 6)},
        r"state.c must be \[\*batch, hidden\] = \(4, 5\) .*got \(4, 6\)",
    ),
    "state h": (
        ValueError,
        {"state": fl.LSTMState(jnp.zeros((4, 5)), jnp.zeros((5, 4)))},
        r"state.h must be \[\*batch, hidden\] = \(4, 5\) .*got \(5, 4\)",
    ),
    "state type": (
        TypeError,
        {"state": ([[0.0] * 5] * 4, jnp.zeros((4, 5)))},
        "state.c must be a JAX or NumPy array; got list",
    ),
    "state dtype": (
        TypeError,
        {"state": (jnp.zeros((4, 5)), jnp.zeros((4, 5), jnp.complex64))},
        "state.h must be floating; got complex64",
    ),
    "reverse": (
        TypeError,
        {"reverse": "yes"},
        "reverse must be True or False, known when .*; got str",
    ),
    "keep_order": (
        TypeError,
        {"keep_order": jnp.array(True)},
        "keep_order must be True or False, known when .*; got ArrayImpl",
    ),
    "params type": (
        TypeError,
        {"params": fl.LSTMParams(jnp.zeros((3, 20)), [[0.0] * 20] * 5, jnp.zeros(20))},
        "params.recurrent_kernel must be a JAX or NumPy array; got list",
    ),
    "params transposed": (
        ValueError,
        {"params": fl.LSTMParams(*(jnp.zeros(s) for s in ((20, 3), (20, 5), (20,))))},
        r"params must be kernel \[I, 4H\].*got kernel \(20, 3\)",
    ),
    "params of another cell": (
        TypeError,
        {"params": (jnp.zeros((3, 20)),) * 4},
        r"params must be LSTMParams\(.*got tuple.*scan_cell",
    ),
    "params dtype": (
        TypeError,
        {"params": fl.LSTMParams(*(jnp.zeros(s, int) for s in ((3, 20), (5, 20), 20)))},
        "params.kernel must be floating; got int32",
    ),
    "dtype": (TypeError, {"dtype": jnp.int32}, "dtype must be floating; got int32"),
    "state": (
        TypeError,
        {"state": jnp.zeros((4, 5))},
        r"state must be LSTMState\(c, h\) or another pair \(c, h\); got \w+\.",
    ),
    "remat": (ValueError, {"remat": None}, "remat must be True, False or .*got None"),
    "params bias": (
        ValueError,
        {"params": fl.LSTMParams(*(jnp.zeros(s) for s in ((3, 20), (5, 20), (5,))))},
        r"params must be .*bias \(5,\)",
    ),
}


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize(("kind", "wrong", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_named_with_what_was_expected(kind, wrong, message):
    arguments = {
        "params": fl.init_lstm_params(jax.random.key(0), 3, 5),
        "inputs": jnp.zeros((6, 4, 3)),
        "state": fl.zero_state((4,), 5),
    } | wrong
    with pytest.raises(kind, match=message):
        fl.lstm(**arguments)
    if not isinstance(arguments["inputs"], list):  # no array to tell the shape of
        with pytest.raises(kind, match=message):
            fl.explain(**arguments)
