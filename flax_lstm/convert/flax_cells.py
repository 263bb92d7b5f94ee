"""Flax's own LSTM cells, Linen and NNX: one order of gates, three ways to store it.

linen.LSTMCell, linen.OptimizedLSTMCell
         `ii if ig io {kernel}` each `[I, H]`; `hi hf hg ho {kernel, bias}` each
         `[H, H]` and `[H]`. Our `flax_lstm.linen` modules keep the same leaves.
nnx.LSTMCell
         the same with `if_` for `if`.
nnx.OptimizedLSTMCell
         `dense_i {kernel}` `[I, 4H]`, `dense_h {kernel, bias}` `[H, 4H]` and `[4H]`.
State    (c, h), as ours.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from flax_lstm.cell import LSTMParams
from flax_lstm.convert.layout import (
    GATES,
    Unpacked,
    check_keys,
    check_shape,
    pack,
    read,
    unpack,
)

LINEN_INPUTS = ("ii", "if", "ig", "io")
NNX_INPUTS = ("ii", "if_", "ig", "io")
RECURRENT = ("hi", "hf", "hg", "ho")


def from_linen(cell: Mapping[str, Any]) -> LSTMParams:
    """Reads the parameters of `linen.LSTMCell` or `linen.OptimizedLSTMCell`.

    Args:
      cell: The twelve leaves; of `linen.RNN(cell)`, that is
        `variables["params"]["cell"]`.

    Raises:
      ValueError: If a leaf is missing or unknown, or its shape does not fit.
      TypeError: If a value is no floating array.
    """
    return _read_gates(cell, LINEN_INPUTS)


def to_linen(params: LSTMParams) -> dict[str, dict[str, np.ndarray]]:
    """Writes the twelve leaves of `linen.LSTMCell` and `linen.OptimizedLSTMCell`.

    Raises:
      TypeError: If the parameters are those of a variant.
    """
    return _write_gates(unpack(params, "flax.linen"), LINEN_INPUTS)


def from_nnx(cell: Mapping[str, Any]) -> LSTMParams:
    """Reads the parameters of `nnx.LSTMCell` or `nnx.OptimizedLSTMCell`.

    Args:
      cell: `nnx.to_pure_dict(nnx.state(cell, nnx.Param))`.

    Raises:
      ValueError: If a leaf is missing or unknown, or its shape does not fit.
      TypeError: If a value is no floating array.
    """
    if "ii" in cell:
        return _read_gates(cell, NNX_INPUTS)
    check_keys(cell, ("dense_i", "dense_h"), name="cell")
    parts = {part: _child(cell, part) for part in ("dense_i", "dense_h")}
    check_keys(parts["dense_i"], ("kernel",), name="cell['dense_i']")
    check_keys(parts["dense_h"], ("kernel", "bias"), name="cell['dense_h']")
    name = "cell['dense_h']"
    recurrent = read(parts["dense_h"], "kernel", ("H", "4H"), name=name)
    hidden, columns = recurrent.shape
    check_shape(recurrent, (hidden, 4 * hidden), f"{name}['kernel']")
    bias = read(parts["dense_h"], "bias", (columns,), name=name)
    kernel = read(parts["dense_i"], "kernel", ("I", columns), name="cell['dense_i']")
    return pack(kernel, recurrent, bias)


def to_nnx(
    params: LSTMParams, *, cell: Literal["optimized", "plain"] = "optimized"
) -> dict[str, dict[str, np.ndarray]]:
    """Writes what `nnx.replace_by_pure_dict` puts into one of NNX' cells.

    Args:
      params: Weights of one layer.
      cell: "optimized" for `nnx.OptimizedLSTMCell`, "plain" for `nnx.LSTMCell`.

    Raises:
      ValueError: If `cell` is neither.
      TypeError: If the parameters are those of a variant.
    """
    kernel, recurrent, bias = weights = unpack(params, "flax.nnx")
    if cell == "plain":
        return _write_gates(weights, NNX_INPUTS)
    if cell != "optimized":
        raise ValueError(f'cell must be "optimized" or "plain"; got {cell!r}.')
    return {
        "dense_i": {"kernel": kernel},
        "dense_h": {"kernel": recurrent, "bias": bias},
    }


def _child(cell: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Returns the mapping at `key`."""
    if not isinstance(cell.get(key), Mapping):
        raise ValueError(
            f"cell must have a dictionary at {key!r}; its keys are {sorted(cell)}."
        )
    return cell[key]


def _read_gates(cell: Mapping[str, Any], inputs: tuple[str, ...]) -> LSTMParams:
    """Returns the parameters of a cell that stores each gate on its own."""
    check_keys(cell, (*inputs, *RECURRENT), name="cell")
    first = read(_child(cell, "hi"), "kernel", ("H", "H"), name="cell['hi']")
    hidden = first.shape[0]
    check_shape(first, (hidden, hidden), "cell['hi']['kernel']")
    rows: int | str = "I"
    kernels, recurrents, biases = [], [], []
    for key, recurrent in zip(inputs, RECURRENT, strict=True):
        at = _child(cell, key)
        check_keys(at, ("kernel",), name=f"cell[{key!r}]")
        kernels.append(read(at, "kernel", (rows, hidden), name=f"cell[{key!r}]"))
        rows = kernels[0].shape[0]
        at, name = _child(cell, recurrent), f"cell[{recurrent!r}]"
        check_keys(at, ("kernel", "bias"), name=name)
        recurrents.append(read(at, "kernel", (hidden, hidden), name=name))
        biases.append(read(at, "bias", (hidden,), name=name))
    return pack(*(np.concatenate(p, axis=-1) for p in (kernels, recurrents, biases)))


def _write_gates(
    weights: Unpacked, inputs: tuple[str, ...]
) -> dict[str, dict[str, np.ndarray]]:
    """Returns the leaves of a cell that stores each gate on its own."""
    kernels, recurrents, biases = (np.split(w, len(GATES), -1) for w in weights)
    leaves = {
        key: {"kernel": kernel} for key, kernel in zip(inputs, kernels, strict=True)
    }
    for key, kernel, bias in zip(RECURRENT, recurrents, biases, strict=True):
        leaves[key] = {"kernel": kernel, "bias": bias}
    return leaves
