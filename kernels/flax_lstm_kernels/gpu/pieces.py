"""Inference in pieces of time, whose gates lie in what is not yet written of hs.

x W + b of all steps is four times as wide as the outputs hs, and nothing of it is kept:
a scan has it of one step only. Here a piece of the steps is projected at a time, into
planes `[N, P]`, four for a step: into that part of hs which later pieces will write, as
long as there is any. A fifth of the steps that are left fits there each time; the last
few have a small memory of their own. Inputs and outputs are nearly all the memory then.

A piece is two launches, `project` and the kernel, and there are few: 17 of 244 steps.
Which steps they are is an argument, so that all pieces run the same two programs.

Where rows or units have to be filled up, hs is not what the caller gets, and of a few
rows it would be many times that. Such sequences run in pieces that are alike, in a
loop, each with planes and hs of its own, which is then copied; so does their training,
forward and backward, whose inputs are copied too (`piece_steps`). Only a piece is then
filled up.

Axes     T time, B batch, H hidden size; N and P the same in whole tiles of the batch
         and whole groups of units; S planes.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from flax_lstm_kernels import compat
from flax_lstm_kernels.copied import in_copies
from flax_lstm_kernels.gpu.project_operands import copies
from flax_lstm_kernels.gpu.source import Piece

# Steps whose planes have a memory of their own: so many, or what takes so many bytes.
LAST = 4
LAST_BYTES = 4 << 20
# Steps of a copied piece, where there are that many: at least so many, or a sixteenth
# of all, and as many as have planes of so many bytes. By estimate, not measured, its
# launches (3, of few rows 5, in training 7) then take no more time than its steps.
LEAST = 16
PIECES = 16
PROJECTED = 256 << 10


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


def nothing(steps: int, like: Array) -> Any:
    """Returns a reference to memory of `[steps, N, P]`, with anything in it."""
    return compat.in_place(lax.empty((steps, *like.shape), like.dtype))


def in_pieces(
    project: Callable[[Array, Any, Array], None],
    run: Callable[..., tuple[Array, ...]],
    inputs: Float[Array, "T B I"],
    c: Float[Array, "N P"],
    h: Float[Array, "N P"],
    lengths: Int[Array, " N"],
    resets: Shaped[Array, "T B"] | Shaped[Array, "0 0"],
    hidden: int,
    *,
    reverse: bool,
) -> tuple[Array, Array, Array]:
    """Projects and runs piece by piece, the state going from one to the next.

    Args:
      project: Called with inputs, a reference to the planes and `Piece.now`.
      run: Called with a piece, the state, lengths and resets; returns `(c, h)`.
      inputs: Of all steps.
      c: Cell before the first step.
      h: Output before the first step, in the computation dtype.
      lengths: 0 to T.
      resets: Of all steps, or empty.
      hidden: H.
      reverse: The last steps come first.

    Returns:
      `(hs [T, B, H], c [N, P], h [N, P])`.
    """
    steps, rows, _ = inputs.shape
    given = rows, hidden
    if h.shape == given:
        last = min(steps, last_steps(h.size * h.dtype.itemsize))
        hs, apart = nothing(steps, h), nothing(4 * last, h)
        for cut in cuts(steps, last, reverse=reverse):
            now = jnp.array([cut.first, cut.count, cut.plane], jnp.int32)
            project(inputs, apart if cut.apart else hs, now)
            piece = Piece(hs, apart if cut.apart else None, now, cut.count)
            c, h = run(piece, c, h, lengths, resets)
        return jax.freeze(hs), c, h

    def filled_up(sequences: Any, state: Any, *masks: Array) -> Any:
        some, numbers = sequences
        count = len(numbers)
        now = jnp.array([0, count, 0], jnp.int32)
        piece = Piece(nothing(count, h), nothing(4 * count, h), now, count)
        if copies(inputs):  # as `project` would of all of them
            project(some, piece.planes, now)
        else:
            project(inputs, piece.planes, now.at[0].set(numbers[0]))
        state = run(piece, *state, *masks)
        return (jax.freeze(piece.hs)[:, :rows, :hidden],), state

    (hs,), (c_last, h_last) = in_copies(
        filled_up,
        (inputs, jnp.arange(steps, dtype=jnp.int32)),
        (c, h),
        lengths,
        resets,
        results=[jax.ShapeDtypeStruct((steps, *given), h.dtype)],
        size=piece_steps(steps, given, h.shape, h.dtype.itemsize, keep=False),
        reverse=reverse,
    )
    return hs, c_last, h_last


def piece_steps(
    steps: int,
    given: tuple[int, ...],
    filled: tuple[int, ...],
    itemsize: int,
    *,
    keep: bool,
) -> int:
    """Returns the steps of a copied piece; all have as many, but for the last.

    Nothing is cut where N and P are B and H; nor in training in 16 bits where they are
    less than twice as much: it then takes less memory than a scan, whose steps leave
    float32, and at once it has fewer launches.

    Args:
      steps: T.
      given: B and H.
      filled: N and P.
      itemsize: Bytes of the computation dtype.
      keep: For training.

    >>> piece_steps(2048, (1, 1024), (8, 1024), 2, keep=True)
    16
    >>> piece_steps(2048, (5, 1024), (8, 1024), 2, keep=True)
    2048
    """
    rows, size = filled
    whole = keep and rows * size * itemsize < 4 * math.prod(given)
    if whole or given == filled:
        return steps
    least = min(LEAST, max(LAST, -(-steps // PIECES)))
    least = max(least, PROJECTED // (rows * 4 * size * itemsize))
    return -(-steps // max(1, steps // least))
