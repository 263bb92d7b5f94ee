"""What an implementation is, and how those on JAX are compiled and called."""

import importlib.util
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_lstm.bench.problem import Numbers, Problem

Family = Literal["ours", "jax", "torch"]
INSTALL = "pip install 'flax-lstm[bench]'"


class Prepared(NamedTuple):
    """An implementation set up for a problem.

    Attributes:
      call: Runs once, and returns when the device is done.
      numbers: Brings what `call` returned into our layout.
      compile_s: Seconds of tracing and compiling; None where nothing is compiled.
      lengths: "yes" where they are heeded, "padded" where every step is computed; "-"
        where the problem has none.
      resets: "yes" where they are heeded, "ignored" where it runs without; "-".
      note: Anything else a reader must know.
    """

    call: Callable[[], Any]
    numbers: Callable[[Any], Numbers]
    compile_s: float | None
    lengths: str
    resets: str
    note: str = ""


class Implementation(NamedTuple):
    """Something to race.

    Attributes:
      name: Its name in results.
      family: Whose it is, for the summary.
      about: What it is.
      missing: Returns why it cannot run here and what to do, or None.
      prepare: Sets it up for a problem; raises NotImplementedError with the reason
        where it cannot compute that.
      packages: Distributions whose versions a row names.
    """

    name: str
    family: Family
    about: str
    missing: Callable[[], str | None]
    prepare: Callable[[Problem], Prepared]
    packages: tuple[str, ...] = ()


def never_missing() -> None:
    """Returns None: what Flax and JAX bring is always there."""
    return


def needs(module: str) -> Callable[[], str | None]:
    """Returns a `missing` that asks for one importable module."""

    def missing() -> str | None:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed: {INSTALL}"
        return None

    return missing


class OnJax(NamedTuple):
    """An implementation on JAX, for one problem.

    Attributes:
      forward: `(weights, x, h, c, lengths, resets) -> (y, h, c)`; lengths and resets
        are None where it does not heed them.
      weights: Weights as the library keeps them.
      read: Brings the gradient of the weights into `LSTMParams`.
      lengths: Whether it heeds lengths.
      resets: Whether it heeds resets.
      batch_major: Whether x and y are `[B, T, ...]`.
      note: See `Prepared`.
    """

    forward: Callable[..., Any]
    weights: Any
    read: Callable[[Any], Any]
    lengths: bool = False
    resets: bool = False
    batch_major: bool = False
    note: str = ""


def prepare_on_jax(problem: Problem, peer: OnJax) -> Prepared:
    """Compiles the problem's mode, with all arrays on the device as arguments."""
    dtype = jnp.dtype(problem.dtype)

    def put(value: Any) -> Any:
        return jax.tree.map(lambda v: jnp.asarray(v).astype(dtype), value)

    def turned(value: Any) -> Any:
        return np.swapaxes(value, 0, 1) if peer.batch_major else value

    lengths = problem.lengths if peer.lengths else None
    resets = problem.resets if peer.resets else None
    arguments = (
        put(peer.weights),
        *put((turned(problem.x), problem.h, problem.c)),
        *jax.tree.map(jnp.asarray, (lengths, resets)),
    )
    run = peer.forward
    if problem.mode == "gradient":
        arguments = (put(turned(problem.y_bar)), *arguments)

        def run(y_bar: Any, *given: Any) -> Any:
            *inputs, lengths, resets = given

            def outputs(*inputs: Any) -> Any:
                return peer.forward(*inputs, lengths, resets)[0]

            y, pull = jax.vjp(outputs, *inputs)
            return y, pull(y_bar.astype(y.dtype))

    start = time.perf_counter()
    compiled = jax.jit(run).lower(*arguments).compile()
    compile_s = time.perf_counter() - start
    jax.block_until_ready(arguments)

    def numbers(result: Any) -> Numbers:
        y = turned(np.asarray(result[0], np.float32))
        if problem.mode != "gradient":
            return Numbers(y)
        weights, x, h, c = jax.tree.map(lambda v: np.asarray(v, np.float32), result[1])
        return Numbers(y, peer.read(weights), turned(x), h, c)

    return Prepared(
        lambda: jax.block_until_ready(compiled(*arguments)),
        numbers,
        compile_s,
        heeded(problem.lengths, peer.lengths, "padded"),
        heeded(problem.resets, peer.resets, "ignored"),
        peer.note,
    )


def heeded(asked: Any, can: bool, otherwise: str) -> str:
    """Returns what a row says of lengths or resets.

    >>> heeded(None, True, "padded"), heeded([3], False, "padded")
    ('-', 'padded')
    """
    if asked is None:
        return "-"
    return "yes" if can else otherwise
