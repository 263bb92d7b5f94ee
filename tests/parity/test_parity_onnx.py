"""Against ONNX: its node tests, its reference evaluator, and onnxruntime's kernel."""

from importlib import import_module
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from parity_common import FLOAT64, assert_close, float32

from flax_lstm import LSTMState, convert, lstm, scan_cell
from flax_lstm.cell import LSTMParams
from flax_lstm.variants import peephole_cell

onnx = pytest.importorskip("onnx", reason="compares with ONNX's LSTM operator")

pytestmark = pytest.mark.parity

DIRECTIONS = ("forward", "reverse", "bidirectional")
INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")


def run_node(
    values: dict[str, Any], *, direction: str = "forward", layout: int = 0
) -> dict[str, Any]:
    """Computes an ONNX LSTM node with our layers; names as the operator's."""
    swap = (lambda v: v.swapaxes(0, 1)) if layout else (lambda v: v)
    x = swap(jnp.asarray(values["X"]))
    layer = convert.from_onnx(*(values.get(name) for name in "WRBP"))
    lengths = values.get("sequence_lens")
    lengths = None if lengths is None else jnp.asarray(lengths)
    outputs, finals = [], []
    for n, params in enumerate(layer):
        zeros = jnp.zeros((x.shape[1], params.recurrent_kernel.shape[0]), x.dtype)
        h, c = (
            swap(jnp.asarray(values[name]))[n] if name in values else zeros
            for name in ("initial_h", "initial_c")
        )
        options = {
            "lengths": lengths,
            "reverse": direction == "reverse" or n == 1,
            "keep_order": True,
        }
        if isinstance(params, LSTMParams):
            final, y = lstm(params, x, LSTMState(c, h), **options)
        else:
            final, y = scan_cell(peephole_cell, params, x, LSTMState(c, h), **options)
        outputs.append(y)
        finals.append(final)
    y = jnp.stack(outputs, 1)
    return {
        "Y": y.transpose(2, 0, 1, 3) if layout else y,
        "Y_h": swap(jnp.stack([s.h for s in finals])),
        "Y_c": swap(jnp.stack([s.c for s in finals])),
    }


def draw_node(seed: int, dtype: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Draws the inputs and attributes of a node, with and without optional inputs."""
    rng = np.random.default_rng(seed)
    steps, batch, size, hidden = (int(n) for n in rng.integers(1, 8, 4))
    direction = DIRECTIONS[seed % 3]
    count = 1 + (direction == "bidirectional")
    shapes = {
        "X": (steps, batch, size),
        "W": (count, 4 * hidden, size),
        "R": (count, 4 * hidden, hidden),
        "B": (count, 8 * hidden),
        "initial_h": (count, batch, hidden),
        "initial_c": (count, batch, hidden),
        "P": (count, 3 * hidden),
    }
    for name in ("B", "initial_h", "initial_c", "P"):
        if rng.random() < 0.3:
            del shapes[name]
    values = {k: rng.normal(size=s).astype(dtype) / 2 for k, s in shapes.items()}
    return values, {"hidden_size": hidden, "direction": direction}


def build_model(values: dict[str, Any], attributes: dict[str, Any]) -> Any:
    """Returns the model of one LSTM node over these inputs."""
    helper = onnx.helper
    names = [name if name in values else "" for name in INPUTS]
    node = helper.make_node("LSTM", names, ["Y", "Y_h", "Y_c"], **attributes)
    real = helper.np_dtype_to_tensor_dtype(values["X"].dtype)
    inputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
        )
        for name, value in values.items()
    ]
    outputs = [helper.make_tensor_value_info(name, real, None) for name in node.output]
    graph = helper.make_graph([node], "lstm", inputs, outputs)
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10
    )


def node_tests() -> dict[str, Any]:
    """Returns ONNX's own cases of the operator; importing their module makes them."""
    import_module("onnx.backend.test.case.node.lstm")
    made = import_module("onnx.backend.test.case.node")._NodeTestCases
    return {case.name: case for case in made if "_lstm_" in case.name}


def test_onnxs_node_tests_pass():
    cases = node_tests()
    assert len(cases) == 6
    for name, case in cases.items():
        node = case.model.graph.node[0]
        attributes = {
            a.name: onnx.helper.get_attribute_value(a) for a in node.attribute
        }
        direction = attributes.get("direction", b"forward").decode()
        ((inputs, outputs),) = case.data_sets
        names = [n for n in node.input if n]
        got = run_node(
            dict(zip(names, inputs, strict=True)),
            direction=direction,
            layout=attributes.get("layout", 0),
        )
        for output, want in zip([n for n in node.output if n], outputs, strict=True):
            # ONNX's own tolerances.
            np.testing.assert_allclose(
                got[output], want, rtol=1e-3, atol=1e-7, err_msg=f"{name} {output}"
            )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("seed", range(12))
def test_drawn_nodes_equal_the_reference_evaluator(seed):
    """In float64; the evaluator ignores sequence_lens, so there are none."""
    from onnx.reference import ReferenceEvaluator

    values, attributes = draw_node(seed, np.float64)
    model = build_model(values, attributes)
    want = ReferenceEvaluator(model).run(None, values)
    got = run_node(values, direction=attributes["direction"])
    assert_close(tuple(got.values()), tuple(want), FLOAT64)


@pytest.mark.parametrize("seed", range(16))
def test_drawn_nodes_with_lengths_equal_onnxruntime(seed):
    """In float32, its only type.

    One difference on purpose: at a length of 0 its states are 0, ours the initial ones.
    """
    runtime = pytest.importorskip("onnxruntime", reason="compares with its kernel")
    values, attributes = draw_node(seed, np.float32)
    steps, batch, _ = values["X"].shape
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, steps + 1, batch).astype(np.int32)
    lengths[0] = steps if seed % 2 else 0
    values["sequence_lens"] = lengths
    model = build_model(values, attributes)
    session = runtime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    want_y, *want = session.run(None, values)
    got = run_node(values, direction=attributes["direction"])
    tolerance = float32(steps)
    assert_close(got["Y"], want_y, tolerance)
    for name, want_state in zip(("Y_h", "Y_c"), want, strict=True):
        initial = values.get(f"initial_{name[-1]}", np.zeros_like(want_state))
        empty = lengths == 0
        np.testing.assert_array_equal(want_state[:, empty], 0)
        np.testing.assert_array_equal(got[name][:, empty], initial[:, empty])
        assert_close(got[name][:, ~empty], want_state[:, ~empty], tolerance)


@pytest.mark.parametrize("seed", [0, 2, 8])
def test_what_we_write_runs_in_onnxruntime(seed):
    """Our layer, written as a node's inputs, gives our numbers there."""
    runtime = pytest.importorskip("onnxruntime", reason="compares with its kernel")
    values, attributes = draw_node(seed, np.float32)
    layer = convert.from_onnx(*(values.get(name) for name in "WRBP"))
    values = {"X": values["X"], **convert.to_onnx(layer)}
    session = runtime.InferenceSession(
        build_model(values, attributes).SerializeToString(),
        providers=["CPUExecutionProvider"],
    )
    got = run_node(values, direction=attributes["direction"])
    assert_close(
        tuple(got.values()), tuple(session.run(None, values)), float32(len(values["X"]))
    )
