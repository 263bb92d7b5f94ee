"""Inference in pieces of time, whose gates lie in what is not yet written of hs.

x W + b of all steps is four times as wide as the outputs hs, and nothing of it is kept:
a scan has it of one step only. Here a piece of the steps is projected at a time, into
planes `[N, P]`, four for a step: into that part of hs which later pieces will write, as
long as there is any. A fifth of the steps that are left fits there each time; the last
few have a small memory of their own. Inputs and outputs are nearly all the memory then.

A piece is two launches, `project` and the kernel, and there are few: 17 of 244 steps.
Which steps they are is an argument, so that all pieces run the same two programs. A
gate's planes of all steps lie together, as a product of them all would.

Of one row, `grid` and `step` have planes `[1, P]`, and nothing is filled up. Where else
rows or units have to be, hs is not what the caller gets, and of a few
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
from flax_lstm_kernels.gpu.project_operands import EIGHT, copies
from flax_lstm_kernels.gpu.source import Piece

# Steps whose planes have a memory of their own: so many, or what takes so many bytes.
LAST = 4
LAST_BYTES = 4 << 20
ROW_LAST = 16  # of one row, in whole eights
# Steps of a copied piece, where there are that many: at least so many, or a sixteenth
# of all, and as many as have planes of so many bytes. By estimate, not measured, its
# launches (3, of few rows 5, in training 7) then take no more time than its steps. In
# training in 16 bits it has an eighth of all, and takes less memory than a scan still.
LEAST = 16
PIECES = 16
PROJECTED = 256 << 10
TRAINED = 8


class Cut(NamedTuple):
    """Some of the steps, and where their gates lie.

    Attributes:
      first: The first of them in time.
      count: How many they are.
      plane: The first plane of what is projected for them.
      projected: The first step that is projected.
      apart: How many steps are projected: so many planes has each gate.
      within: The planes are those of hs.
    """

    first: int
    count: int
    plane: int
    projected: int
    apart: int
    within: bool

    def to_project(self) -> Int[Array, "3"]:
        """Returns what `project` is told."""
        return jnp.array([self.projected, self.apart, self.plane], jnp.int32)

    def to_run(self) -> Int[Array, "4"]:
        """Returns what the kernel is told, see `Piece`."""
        plane = self.plane + self.first - self.projected
        return jnp.array([self.first, self.count, plane, self.apart], jnp.int32)


def last_steps(steps: int, rows: int, size: int, itemsize: int) -> int:
    """Returns how many steps at the end have planes apart; of one row in eights.

    >>> last_steps(244, 256, 128, 2), last_steps(244, 1024, 256, 2)
    (4, 2)
    >>> last_steps(244, 1, 1024, 2), last_steps(13, 1, 1024, 2)
    (16, 8)
    """
    if rows == 1:
        return min(steps, ROW_LAST) // EIGHT * EIGHT
    return min(steps, max(1, min(LAST, LAST_BYTES // (4 * rows * size * itemsize))))


def cuts(steps: int, last: int, *, one_row: bool, reverse: bool) -> list[Cut]:
    """Cuts time into pieces, in the order in which they run.

    The tiles of `project` take `last` steps at least, and of one row whole eights. So
    for the last piece, which may have fewer, some steps before it are projected again.

    >>> options = {"one_row": False, "reverse": False}
    >>> [(cut.first, cut.count, cut.plane) for cut in cuts(27, 4, **options)]
    [(0, 5, 5), (5, 4, 9), (9, 4, 0), (13, 4, 0), (17, 4, 0), (21, 4, 0), (25, 2, 0)]
    """
    found, left = [], steps
    while left:
        fits = left // 5
        if one_row:
            fits -= fits % EIGHT
        within = fits >= last
        count = fits if within else min(left, last)
        left -= count
        first = left if reverse else steps - left - count
        # In reverse the steps that are left are those before.
        plane = first + count if within and not reverse else 0
        apart = count if within else last
        found.append(Cut(first, count, plane, min(first, steps - apart), apart, within))
    return found


def in_pieces(
    project: Callable[[Array, Any, Array, int], None],
    run: Callable[..., tuple[Array, ...]],
    inputs: Float[Array, "T B I"],
    c: Float[Array, "N P"],
    h: Float[Array, "N P"],
    lengths: Int[Array, " N"],
    resets: Shaped[Array, "T B"] | Shaped[Array, "0 0"],
    hidden: int,
    *,
    one_row: bool,
    reverse: bool,
) -> tuple[Array, Array, Array]:
    """Projects and runs piece by piece, the state going from one to the next.

    Args:
      project: Called with inputs, a reference to the planes, `Cut.to_project` and the
        number of steps that are projected at least.
      run: Called with a piece, the state, lengths and resets; returns `(c, h)`.
      inputs: Of all steps.
      c: Cell before the first step.
      h: Output before the first step, in the computation dtype.
      lengths: 0 to T.
      resets: Of all steps, or empty.
      hidden: H.
      one_row: The kernel can run with planes and hs of one row, not of eight.
      reverse: The last steps come first.

    Returns:
      `(hs [T, B, H], c [N, P], h [N, P])`.
    """
    steps, rows, _ = inputs.shape
    given, alone = (rows, hidden), one_row and rows == 1 and steps >= EIGHT
    if (rows if alone else len(h), h.shape[1]) == given:
        last = last_steps(steps, *given, h.dtype.itemsize)
        hs, apart = (lax.empty((n, *given), h.dtype) for n in (steps, 4 * last))
        hs, apart = compat.in_place(hs), compat.in_place(apart)
        for cut in cuts(steps, last, one_row=alone, reverse=reverse):
            project(inputs, hs if cut.within else apart, cut.to_project(), last)
            planes = None if cut.within else apart
            piece = Piece(hs, planes, cut.to_run(), cut.count)
            c, h = run(piece, c, h, lengths, resets)
        return jax.freeze(hs), c, h

    def filled_up(sequences: Any, state: Any, *masks: Array) -> Any:
        some, numbers = sequences
        count = len(numbers)
        hs, planes = (lax.empty((n, *h.shape), h.dtype) for n in (count, 4 * count))
        hs, planes = compat.in_place(hs), compat.in_place(planes)
        cut = Cut(0, count, 0, 0, count, within=False)
        now = cut.to_project()
        if copies(inputs):  # as `project` would of all of them
            project(some, planes, now, count)
        else:
            project(inputs, planes, now.at[0].set(numbers[0]), count)
        state = run(Piece(hs, planes, cut.to_run(), count), *state, *masks)
        return (jax.freeze(hs)[:, :rows, :hidden],), state

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
    256
    >>> piece_steps(2048, (5, 1024), (8, 1024), 2, keep=True)
    2048
    """
    rows, size = filled
    whole = keep and rows * size * itemsize < 4 * math.prod(given)
    if whole or given == filled:
        return steps
    least = min(LEAST, -(-steps // PIECES))
    if keep and itemsize == 2:
        least = -(-steps // TRAINED)
    least = max(LAST, least, PROJECTED // (rows * 4 * size * itemsize))
    return -(-steps // max(1, steps // least))
