"""Flax's own: `RNN` over its two cells in both APIs, time-major, with seq_lengths."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen, nnx

from flax_lstm import convert
from flax_lstm.bench.peers.base import (
    Implementation,
    OnJax,
    Prepared,
    never_missing,
    prepare_on_jax,
)
from flax_lstm.bench.problem import Problem

LINEN = {"optimized": linen.OptimizedLSTMCell, "plain": linen.LSTMCell}
NNX = {"optimized": nnx.OptimizedLSTMCell, "plain": nnx.LSTMCell}


def implementations() -> list[Implementation]:
    """Returns the four."""
    return [
        Implementation(
            f"{api}-{cell}",
            "jax",
            f"flax.{api} RNN({cells[cell].__name__})",
            never_missing,
            partial(prepare, cell),
            ("flax",),
        )
        for api, cells, prepare in (
            ("linen", LINEN, prepare_linen),
            ("nnx", NNX, prepare_nnx),
        )
        for cell in cells
    ]


def prepare_linen(kind: str, problem: Problem) -> Prepared:
    """Sets up `linen.RNN`, for a step the cell alone."""
    dtype = jnp.dtype(problem.dtype)
    # With param_dtype too it would trace its own weights, which has no 16-bit types.
    cell = LINEN[kind](problem.shape.hidden, dtype=dtype)
    layer = linen.RNN(cell, time_major=True, return_carry=True)

    def forward(
        weights: Any, x: Any, h: Any, c: Any, lengths: Any, resets: Any
    ) -> tuple[Any, Any, Any]:
        if problem.mode == "step":
            (c, h), y = cell.apply({"params": weights}, (c, h), x[0])
            return y[None], h, c
        options = {"initial_carry": (c, h), "seq_lengths": lengths}
        (c, h), y = layer.apply({"params": {"cell": weights}}, x, **options)
        return y, h, c

    weights = convert.to_linen(problem.params)
    peer = OnJax(forward, weights, convert.from_linen, lengths=True)
    return prepare_on_jax(problem, peer)


def prepare_nnx(kind: str, problem: Problem) -> Prepared:
    """Sets up `nnx.RNN`, for a step the cell alone."""
    dtype = jnp.dtype(problem.dtype)
    sizes = (problem.shape.inputs, problem.shape.hidden)
    # Its own weights, which ours replace, cannot be drawn in 16 bits.
    drawn = NNX[kind](*sizes, dtype=dtype, rngs=nnx.Rngs(0))

    def forward(
        weights: Any, x: Any, h: Any, c: Any, lengths: Any, resets: Any
    ) -> tuple[Any, Any, Any]:
        graph, state = nnx.split(drawn)
        nnx.replace_by_pure_dict(state, weights)
        cell = nnx.merge(graph, state)
        if problem.mode == "step":
            (c, h), y = cell((c, h), x[0])
            return y[None], h, c
        layer = nnx.RNN(cell, time_major=True, return_carry=True)
        (c, h), y = layer(x, initial_carry=(c, h), seq_lengths=lengths)
        return y, h, c

    weights = convert.to_nnx(
        problem.params,
        cell=kind,  # type: ignore[arg-type] one of the two names, as a plain string
    )
    return prepare_on_jax(
        problem, OnJax(forward, weights, convert.from_nnx, lengths=True)
    )
