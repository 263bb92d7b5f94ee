"""Inference in pieces of time, whose gates lie in what is not yet written of hs.

x W + b of all steps is four times as wide as the outputs hs, and nothing of it is kept:
a scan has it of one step only. Here a piece of the steps is projected at a time, into
planes `[N, P]`, four for a step: into that part of hs which later pieces will write, as
long as there is any. A fifth of the steps that are left fits there each time; the last
few have a small memory of their own. Inputs and outputs are nearly all the memory then.

A piece is two launches, `project` and the kernel, and there are few: 17 of 244 steps.
Which steps they are is an argument, so that all pieces run the same two programs.

Of a few rows, hs in whole tiles would be many times the outputs. They run in pieces
that are alike, in a loop, whose inputs and outputs are copied.

Axes     T time, N batch in whole tiles, P hidden size in whole groups of units,
         S planes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from flax_lstm_kernels import compat
from flax_lstm_kernels.copied import in_copies
from flax_lstm_kernels.gpu.source import Piece

# Steps whose planes have a memory of their own: so many, or what takes so many bytes.
LAST = 4
LAST_BYTES = 4 << 20
# Fewer rows than this run in copied pieces: hs in whole tiles would be as large twice.
FEW = 8
# Steps that such a piece has at least: by estimate, not measured, its launches are then
# a sixth of the time. And bytes that its planes take, where there are as many.
LEAST = 60
PROJECTED = 1 << 20


class Cut(NamedTuple):
    """Some of the steps, and where their gates lie.

    Attributes:
      first: The first of them in time.
      count: How many they are.
      plane: The first of their planes.
      apart: The planes are not those of hs.
    """

    first: int
    count: int
    plane: int
    apart: bool


def last_steps(plane_bytes: int) -> int:
    """Returns how many steps at the end have planes apart, by the bytes of a plane.

    >>> last_steps(256 * 128 * 2), last_steps(1024 * 256 * 2)
    (4, 2)
    """
    return max(1, min(LAST, LAST_BYTES // (4 * plane_bytes)))


def cuts(steps: int, last: int, *, reverse: bool) -> list[Cut]:
    """Cuts time into pieces, in the order in which they run; `last` as `last_steps`.

    >>> [(cut.first, cut.count, cut.plane) for cut in cuts(27, 4, reverse=False)]
    [(0, 5, 5), (5, 4, 9), (9, 4, 0), (13, 4, 0), (17, 4, 0), (21, 4, 0), (25, 2, 0)]
    """
    found, left = [], steps
    while left:
        within = left // 5
        apart = within < last
        count = min(left, last) if apart else within
        left -= count
        first = left if reverse else steps - left - count
        # In reverse the steps that are left are those before.
        plane = 0 if apart or reverse else first + count
        found.append(Cut(first, count, plane, apart))
    return found


def inference(
    project: Callable[[Array, Any, Array], None],
    run: Callable[..., tuple[Array, ...]],
    inputs: Float[Array, "T B I"],
    c: Float[Array, "N P"],
    h: Float[Array, "N P"],
    lengths: Int[Array, " N"],
    resets: Shaped[Array, "T B"] | Shaped[Array, "0 0"],
    *,
    reverse: bool,
) -> tuple[Array, Array, Array]:
    """Runs over all steps, keeping nothing.

    Args:
      project: Called with inputs, a reference to planes, and `Piece.now`.
      run: Called with a `Piece`, c, h, lengths and resets; returns `(c, h)`.
      inputs: In the computation dtype.
      c: Cell before the first step.
      h: Output before the first step, in the computation dtype.
      lengths: 0 to T.
      resets: Of all steps, or empty.
      reverse: From the last valid step to the first.

    Returns:
      `(hs [T, N, P], c, h)`; of a few rows hs are `[T, B, P]`.
    """
    steps, rows, _ = inputs.shape

    def of_copy(inputs: Array, *others: Array) -> tuple[Array, ...]:
        count, h = len(inputs), others[1]
        hs, planes = nothing(count, h), nothing(4 * count, h)
        now = jnp.array([0, count, 0], jnp.int32)
        project(inputs, planes, now)
        c, h = run(Piece(hs, planes, now, count), *others)
        return jax.freeze(hs)[:, :rows], c, h

    if rows < FEW:
        size = piece_steps(steps, h.shape[0], h.shape[1], h.dtype.itemsize)
        return in_copies(
            of_copy, inputs, c, h, lengths, resets, size=size, reverse=reverse
        )
    return in_pieces(
        jax.jit(partial(project, inputs)),
        lambda piece, c, h: run(piece, c, h, lengths, resets),
        c,
        h,
        steps,
        reverse=reverse,
    )


def nothing(steps: int, like: Array) -> Any:
    """Returns a reference to memory of `[steps, N, P]`, with anything in it."""
    return compat.in_place(lax.empty((steps, *like.shape), like.dtype))


def in_pieces(
    project: Callable[[Any, Array], None],
    run: Callable[[Piece, Array, Array], tuple[Array, ...]],
    c: Float[Array, "N P"],
    h: Float[Array, "N P"],
    steps: int,
    *,
    reverse: bool,
) -> tuple[Array, Array, Array]:
    """Projects and runs piece by piece, the state going from one to the next.

    Args:
      project: Called with a reference to the planes and `Piece.now`.
      run: Called with a piece and the state; returns `(c, h)`.
      c: Cell before the first step.
      h: Output before the first step, in the computation dtype.
      steps: T.
      reverse: The last steps come first.

    Returns:
      `(hs [T, N, P], c, h)`.
    """
    last = min(steps, last_steps(h.size * h.dtype.itemsize))
    hs, apart = nothing(steps, h), nothing(4 * last, h)
    for cut in cuts(steps, last, reverse=reverse):
        now = jnp.array([cut.first, cut.count, cut.plane], jnp.int32)
        project(apart if cut.apart else hs, now)
        piece = Piece(hs, apart if cut.apart else None, now, cut.count)
        c, h = run(piece, c, h)
    return jax.freeze(hs), c, h


def piece_steps(steps: int, rows: int, size: int, itemsize: int) -> int:
    """Returns the steps of a copied piece; all have as many, but for the last.

    Args:
      steps: T.
      rows: N.
      size: P.
      itemsize: Bytes of the computation dtype.

    >>> piece_steps(244, 8, 128, 2), piece_steps(2048, 8, 1024, 2)
    (244, 61)
    """
    least = max(LEAST, PROJECTED // (rows * 4 * size * itemsize))
    return -(-steps // max(1, steps // least))
