"""Our own implementations: each by name, what None chooses, and the cell alone."""

from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp

from flax_lstm.bench.peers.base import (
    Implementation,
    OnJax,
    Prepared,
    never_missing,
    prepare_on_jax,
)
from flax_lstm.bench.problem import Problem
from flax_lstm.cell import LSTMParams, LSTMState, lstm_cell
from flax_lstm.choice import Implementation as Named
from flax_lstm.sequence import explain, lstm


def implementations() -> list[Implementation]:
    """Returns ours: the default first."""
    found = [
        Implementation(
            "ours",
            "ours",
            "flax_lstm.lstm, the implementation that None chooses",
            never_missing,
            partial(prepare, None),
        )
    ]
    for name in get_args(Named):
        about = f'flax_lstm.lstm(implementation="{name}")'
        needs, ready = partial(missing, name), partial(prepare, name)
        found.append(Implementation(f"ours-{name}", "ours", about, needs, ready))
    about = "flax_lstm.lstm_cell, one step"
    found.append(
        Implementation("ours-cell", "ours", about, never_missing, prepare_cell)
    )
    return found


def missing(name: Any) -> str | None:
    """Returns why an implementation runs nothing here, not even a small layer."""
    reason = None
    for dtype in (jnp.bfloat16, jnp.float32):
        shapes = (128, 512), (128, 512), (512,), (2, 8, 128)
        *params, inputs = (jnp.zeros(shape, dtype) for shape in shapes)
        told = explain(LSTMParams(*params), inputs, implementation=name)
        if told.implementation is not None:
            return None
        reason = told.reasons[name]
    return reason


def prepare(name: Any, problem: Problem) -> Prepared:
    """Sets up `lstm`; raises NotImplementedError where `explain` says it cannot run."""
    dtype = jnp.dtype(problem.dtype)
    params, x, c, h = jax.tree.map(
        lambda v: jax.ShapeDtypeStruct(v.shape, dtype),
        (problem.params, problem.x, problem.c, problem.h),
    )
    told = explain(
        params,
        x,
        LSTMState(c, h),
        lengths=problem.lengths,
        resets=problem.resets,
        implementation=name,
    )
    if told.implementation is None:
        raise NotImplementedError(told.reasons[name])

    def forward(
        params: Any, x: Any, h: Any, c: Any, lengths: Any, resets: Any
    ) -> tuple[Any, Any, Any]:
        state, y = lstm(
            params,
            x,
            LSTMState(c, h),
            lengths=lengths,
            resets=resets,
            implementation=name,
        )
        return y, state.h, state.c

    note = f'runs "{told.implementation}"' if name is None else ""
    return prepare_on_jax(
        problem, OnJax(forward, problem.params, as_params, True, True, note=note)
    )


def prepare_cell(problem: Problem) -> Prepared:
    """Sets up one call of `lstm_cell`."""
    if problem.mode != "step":
        raise NotImplementedError("the cell is one step; see the others")

    def forward(params: Any, x: Any, h: Any, c: Any, *_: Any) -> tuple[Any, Any, Any]:
        state, y = lstm_cell(params, LSTMState(c, h), x[0])
        return y[None], state.h, state.c

    return prepare_on_jax(problem, OnJax(forward, problem.params, as_params))


def as_params(bar: LSTMParams) -> LSTMParams:
    """Returns the gradient of our weights, which is in our form."""
    return bar
