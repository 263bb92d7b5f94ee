"""An LSTM and its derivative in NumPy float64, sharing no code with the library.

Written to be checked by reading: one row of the batch at a time, one step at a time,
only the steps that count, in the order in which they are processed. No masks, no
padding: lengths, resets and directions are handled by other means than the library's.

Gates `i f g o`:  z = x W + h R + b,  c' = f c + i g,  h' = o tanh(c').
"""

from typing import Any, NamedTuple

import numpy as np


class Result(NamedTuple):
    """Outputs `[T, *B, H]`, the final c and h `[*B, H]`, and what `backward` needs."""

    outputs: np.ndarray
    c: np.ndarray
    h: np.ndarray
    tape: Any


class Step(NamedTuple):
    """One step of one row."""

    read: int  # time index of its input
    write: int  # time index of its output
    reset: bool
    x: np.ndarray
    c: np.ndarray  # before the step, after a reset
    h: np.ndarray
    i: np.ndarray
    f: np.ndarray
    g: np.ndarray
    o: np.ndarray
    new_c: np.ndarray


def sigmoid(z: np.ndarray) -> np.ndarray:
    """Returns 1 / (1 + exp(-z)) without overflow."""
    return np.exp(-np.logaddexp(0, -z))


def f64(value: Any) -> np.ndarray:
    """Returns a float64 NumPy array."""
    return np.asarray(value).astype(np.float64)


def lstm(
    params: Any,
    inputs: Any,
    state: Any = None,
    *,
    lengths: Any = None,
    resets: Any = None,
    reverse: bool = False,
    keep_order: bool = False,
) -> Result:
    """Runs the layer; arguments as `flax_lstm.lstm`, params (W, R, b), state (c, h)."""
    w, r, b = (f64(p) for p in params)
    inputs = f64(inputs)
    steps, *batch_shape, size = inputs.shape
    hidden, rows = r.shape[0], int(np.prod(batch_shape))
    xs = inputs.reshape(steps, rows, size)
    counts = np.full(rows, steps) if lengths is None else np.ravel(lengths)
    cuts = np.zeros((steps, rows), bool) if resets is None else np.asarray(resets)
    cuts = cuts.reshape(steps, rows)
    if state is None:
        state = np.zeros((2, rows, hidden))
    c, h = (f64(s).reshape(rows, hidden).copy() for s in state)
    outputs = np.zeros((steps, rows, hidden))
    tapes: list[list[Step]] = []
    for row in range(rows):
        tape = []
        count = int(counts[row])
        for k in range(count):
            read = count - 1 - k if reverse else k
            write = read if keep_order else k
            reset = bool(cuts[read, row])
            old_c = np.zeros(hidden) if reset else c[row].copy()
            old_h = np.zeros(hidden) if reset else h[row].copy()
            z = xs[read, row] @ w + old_h @ r + b
            i, f = sigmoid(z[:hidden]), sigmoid(z[hidden : 2 * hidden])
            g, o = np.tanh(z[2 * hidden : 3 * hidden]), sigmoid(z[3 * hidden :])
            c[row] = f * old_c + i * g
            h[row] = o * np.tanh(c[row])
            outputs[write, row] = h[row]
            x, new_c = xs[read, row], c[row].copy()
            tape.append(Step(read, write, reset, x, old_c, old_h, i, f, g, o, new_c))
        tapes.append(tape)
    shape = (*batch_shape, hidden)
    return Result(
        outputs.reshape(steps, *shape),
        c.reshape(shape),
        h.reshape(shape),
        (w, r, inputs.shape, tapes),
    )


def backward(result: Result, d_outputs: Any, d_c: Any, d_h: Any) -> dict[str, Any]:
    """Returns the gradient of every input of `lstm`, given those of its results.

    By the chain rule, written out by hand, from the last step of each row to its first.
    """
    w, r, inputs_shape, tapes = result.tape
    steps, *batch_shape, size = inputs_shape
    hidden, rows = r.shape[0], len(tapes)
    d_outputs = f64(d_outputs).reshape(steps, rows, hidden)
    d_c, d_h = (f64(d).reshape(rows, hidden).copy() for d in (d_c, d_h))
    d_w, d_r, d_b = np.zeros_like(w), np.zeros_like(r), np.zeros(4 * hidden)
    d_x = np.zeros((steps, rows, size))
    for row, tape in enumerate(tapes):
        dc, dh = d_c[row], d_h[row]
        for s in reversed(tape):
            dh = dh + d_outputs[s.write, row]
            tanh_c = np.tanh(s.new_c)
            dc = dc + dh * s.o * (1 - tanh_c**2)
            d_z = np.concatenate(
                [
                    dc * s.g * s.i * (1 - s.i),
                    dc * s.c * s.f * (1 - s.f),
                    dc * s.i * (1 - s.g**2),
                    dh * tanh_c * s.o * (1 - s.o),
                ]
            )
            d_w += np.outer(s.x, d_z)
            d_r += np.outer(s.h, d_z)
            d_b += d_z
            d_x[s.read, row] = w @ d_z
            dc, dh = dc * s.f, r @ d_z
            if s.reset:
                dc, dh = np.zeros(hidden), np.zeros(hidden)
        d_c[row], d_h[row] = dc, dh
    shape = (*batch_shape, hidden)
    return {
        "kernel": d_w,
        "recurrent_kernel": d_r,
        "bias": d_b,
        "inputs": d_x.reshape(inputs_shape),
        "c": d_c.reshape(shape),
        "h": d_h.reshape(shape),
    }


def error(got: Any, want: Any) -> float:
    """Returns the relative error ‖got − want‖ / ‖want‖ (absolute where want is 0)."""
    got, want = f64(got), f64(want)
    if got.shape != want.shape:
        raise AssertionError(f"shape {got.shape} is not the reference's {want.shape}")
    scale = np.linalg.norm(want)
    return float(np.linalg.norm(got - want) / (scale if scale > 0 else 1))
