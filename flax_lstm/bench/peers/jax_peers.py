"""Other libraries on JAX: Haiku, Equinox, Keras, and JAX's own binding of cuDNN."""

# Imports what need not be installed.
# pyright: reportMissingImports=false

import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_lstm import convert
from flax_lstm.bench.peers.base import (
    Implementation,
    OnJax,
    Prepared,
    needs,
    prepare_on_jax,
)
from flax_lstm.bench.problem import Problem


def implementations() -> list[Implementation]:
    """Returns the four."""
    return [
        Implementation(
            "haiku",
            "jax",
            "haiku.dynamic_unroll(LSTM), with ResetCore for resets",
            needs("haiku"),
            prepare_haiku,
            ("dm-haiku",),
        ),
        Implementation(
            "equinox",
            "jax",
            "jax.lax.scan over jax.vmap(equinox.nn.LSTMCell)",
            needs("equinox"),
            prepare_equinox,
            ("equinox",),
        ),
        Implementation(
            "keras",
            "jax",
            "keras.layers.LSTM on the JAX backend, mask for lengths",
            missing_keras,
            prepare_keras,
            ("keras",),
        ),
        Implementation(
            "jax-cudnn", "jax", "jax.experimental.rnn", missing_cudnn, prepare_cudnn
        ),
    ]


def prepare_haiku(problem: Problem) -> Prepared:
    """Sets up `dynamic_unroll`, time-major as it is; for a step the core alone."""
    import haiku

    def network(x: Any, h: Any, c: Any, resets: Any) -> Any:
        core = haiku.LSTM(problem.shape.hidden)
        state: Any = haiku.LSTMState(h, c)
        if problem.mode == "step":
            y, state = core(x[0], state)
            return y[None], *state
        if resets is None:
            y, state = haiku.dynamic_unroll(core, x, state)
        else:
            # The parameters keep the name of the core inside.
            reset_core = haiku.ResetCore(core)
            y, state = haiku.dynamic_unroll(reset_core, (x, resets), state)
        return y, *state

    apply = haiku.without_apply_rng(haiku.transform(network)).apply

    def forward(
        weights: Any, x: Any, h: Any, c: Any, lengths: Any, resets: Any
    ) -> tuple[Any, Any, Any]:
        return apply(weights, x, h, c, resets)

    def read(bar: Any) -> Any:
        # A gradient has no forget bias to fold in; TF1's layout is the same otherwise.
        ((params,),) = convert.from_tf1(
            {
                "lstm/kernel": bar["lstm/linear"]["w"],
                "lstm/bias": bar["lstm/linear"]["b"],
            },
            forget_bias=0.0,
        )
        return params

    weights = convert.to_haiku([(problem.params,)])
    return prepare_on_jax(problem, OnJax(forward, weights, read, resets=True))


def prepare_equinox(problem: Problem) -> Prepared:
    """Sets up a scan over the cell, which is all that Equinox has."""
    import equinox

    sizes = (problem.shape.inputs, problem.shape.hidden)
    drawn = equinox.nn.LSTMCell(*sizes, key=jax.random.key(0))

    def forward(weights: Any, x: Any, h: Any, c: Any, *_: Any) -> tuple[Any, Any, Any]:
        fields = tuple(weights)
        cell = equinox.tree_at(
            lambda cell: [getattr(cell, name) for name in fields],
            drawn,
            [weights[name] for name in fields],
        )

        def step(state: Any, x: Any) -> Any:
            state = jax.vmap(cell)(x, state)
            return state, state[0]

        if problem.mode == "step":
            (h, c), y = step((h, c), x[0])
            return y[None], h, c
        (h, c), y = jax.lax.scan(step, (h, c), x)
        return y, h, c

    weights = convert.to_equinox(problem.params)
    return prepare_on_jax(problem, OnJax(forward, weights, convert.from_equinox))


def missing_keras() -> str | None:
    """Says what keeps Keras from running on JAX."""
    if reason := needs("keras")():
        return reason
    if "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = "jax"
    import keras

    backend = keras.backend.backend()
    if backend != "jax":
        return f"Keras was imported on its {backend} backend; it must be on jax here"
    return None


def prepare_keras(problem: Problem) -> Prepared:
    """Sets up the layer through `stateless_call`, batch-major as Keras is."""
    if reason := missing_keras():
        raise NotImplementedError(reason)
    import keras

    shape = problem.shape
    layer = keras.layers.LSTM(
        shape.hidden,
        return_sequences=True,
        return_state=True,
        recurrent_initializer="zeros",  # an orthogonal one has no 16-bit types
        dtype=problem.dtype,
    )
    layer.build((shape.batch, shape.steps, shape.inputs))
    rest = [variable.value for variable in layer.non_trainable_variables]

    def forward(
        weights: Any, x: Any, h: Any, c: Any, lengths: Any, resets: Any
    ) -> tuple[Any, Any, Any]:
        mask = None
        if lengths is not None:
            mask = jnp.arange(shape.steps)[None] < lengths[:, None]
        options = {"initial_state": [h, c], "mask": mask}
        return layer.stateless_call(weights, rest, x, **options)[0]

    def read(bar: Any) -> Any:
        ((params,),) = convert.from_keras(bar)
        return params

    weights = convert.to_keras([(problem.params,)])
    peer = OnJax(forward, weights, read, lengths=True, batch_major=True)
    return prepare_on_jax(problem, peer)


def missing_cudnn() -> str | None:
    """Says whether there is a CUDA device."""
    if jax.default_backend() in ("gpu", "cuda"):
        return None
    return (
        f'needs a CUDA device; the default backend is "{jax.default_backend()}" '
        "(on a machine that has one: pip install 'jax[cuda13]')"
    )


def prepare_cudnn(problem: Problem) -> Prepared:
    """Sets up `jax.experimental.rnn.lstm`, batch-major as it is."""
    if problem.dtype == "bfloat16":
        raise NotImplementedError("jax.experimental.rnn has no bfloat16")
    from jax.experimental import rnn

    shape = problem.shape
    sizes = {
        "input_size": shape.inputs,
        "hidden_size": shape.hidden,
        "num_layers": 1,
        "bidirectional": False,
    }

    def forward(
        weights: Any, x: Any, h: Any, c: Any, lengths: Any, resets: Any
    ) -> tuple[Any, Any, Any]:
        if lengths is None:
            lengths = jnp.full(shape.batch, shape.steps, jnp.int32)
        settings = (shape.inputs, shape.hidden, 1, 0.0, False)
        results: Any = rnn.lstm(x, h[None], c[None], weights, lengths, *settings)
        y, h, c = results
        return y, h[0], c[0]

    def read(bar: Any) -> Any:
        # The gradient of the sum of two biases reaches both of them.
        params: Any = convert.from_cudnn(bar, **sizes)[0][0]
        return params._replace(bias=params.bias / 2)

    weights = np.asarray(convert.to_cudnn([(problem.params,)]))
    peer = OnJax(forward, weights, read, lengths=True, batch_major=True)
    return prepare_on_jax(problem, peer)
