"""Inference in pieces of time, whose gates lie in what is not yet written of hs.

x W + b of all steps is four times as wide as the outputs hs, and nothing of it is kept:
a scan has it of one step only. Here a piece of the steps is projected at a time, into
planes `[M, W]`, four for a step: into that part of hs which later pieces will write, as
long as there is any. A fifth of the steps that are left fits there each time; the last
few have a small memory of their own. Inputs and outputs are nearly all the memory then.

A piece is two launches, `project` and the kernel, and there are few: 17 of 244 steps.
Which steps they are is an argument, so that all pieces run the same two programs. A
gate's planes of all steps lie together, as a product of them all would.

Rows of no whole tile are not filled up, nor units of no whole group. Less than a tile
or a group is (`held_sizes`), and hs is then not what the caller gets. Such sequences
run in pieces that are alike, in a loop, each with planes and hs of its own, which is
then copied (`piece_steps`); hs has the place of the gate i of its step, where no two
tiles share rows, and no two groups units. So does training of what has to be filled up,
forward and backward, whose inputs are copied too. Only a piece is then filled up.

Axes     T time, B batch, H hidden size; N and P the same in whole tiles of the batch
         and whole groups of units; M rows and W units of planes and hs, B and H or
         filled up; S planes.
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
from flax_lstm_kernels.gpu.arrange import UNITS, up
from flax_lstm_kernels.gpu.plan import Plan
from flax_lstm_kernels.gpu.project_operands import EIGHT, copies
from flax_lstm_kernels.gpu.source import Piece

# Steps whose planes have a memory of their own: so many, or what takes so many bytes.
LAST = 4
LAST_BYTES = 4 << 20
ODD_LAST = 1  # of no whole eights and groups, whose states are there once more
ROW_LAST = 16  # of one row
# Steps of a copied piece, where there are that many: at least so many, or so manyth of
# all, of copied inputs twice that; and as many as have planes of so many bytes. By
# estimate, not measured, its launches (3, of copied inputs 5, in training 7) then take
# no more time than its steps. In training in 16 bits it has an eighth of all, and takes
# less memory than a scan still. Of inputs that are copied though hs is not, no more are
# copied at once either.
LEAST = 8
PIECES = 32
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

    def to_project(self, start: Int[Array, ""] | int = 0) -> Int[Array, "3"]:
        """Returns what `project` is told, whose inputs begin with step `start`."""
        first = self.projected - start
        return jnp.array([first, self.apart, self.plane], jnp.int32)

    def to_run(self) -> Int[Array, "4"]:
        """Returns what the kernel is told, see `Piece`."""
        plane = self.plane + self.first - self.projected
        return jnp.array([self.first, self.count, plane, self.apart], jnp.int32)


def fewest(rows: int) -> int:
    """Returns how many steps have eight rows, which `project` takes at least.

    >>> fewest(9), fewest(1)
    (1, 8)
    """
    return -(-EIGHT // rows)


def held_sizes(steps: int, given: tuple[int, int], plan: Plan) -> tuple[int, int]:
    """Returns M and W: B and H, but where a tile or `project` has no fewer.

    Nor is an odd number of units, for pairs of them are loaded at once.

    Args:
      steps: T.
      given: B and H.
      plan: Of the kernel.

    >>> plans = [Plan(kernel, rows=8, stages=2) for kernel in ("cluster", "single")]
    >>> [held_sizes(244, (rows, 100), plan) for rows in (99, 1) for plan in plans]
    [(99, 100), (99, 100), (8, 100), (1, 100)]
    >>> held_sizes(4, (1, 50), plans[1]), held_sizes(8, (99, 101), plans[1])
    ((8, 64), (99, 128))
    """
    rows, hidden = given
    fits = rows >= plan.rows or (rows == 1 and plan.kernel != "cluster")
    fits = fits and steps >= fewest(rows)
    held = rows if fits else max(plan.rows, up(rows, EIGHT))
    pairs = hidden >= UNITS and hidden % 2 == 0
    return held, hidden if pairs else plan.size(hidden)


def last_steps(steps: int, rows: int, units: int, itemsize: int) -> int:
    """Returns how many steps at the end have planes apart.

    Args:
      steps: T, at least `fewest`.
      rows: M.
      units: W.
      itemsize: Bytes of the computation dtype.

    >>> last_steps(244, 256, 128, 2), last_steps(244, 1024, 256, 2)
    (4, 2)
    >>> last_steps(244, 250, 100, 2), last_steps(244, 1, 1024, 2)
    (1, 16)
    """
    last = LAST if rows % EIGHT == units % UNITS == 0 else ODD_LAST
    last = ROW_LAST if rows == 1 else last
    last = min(last, LAST_BYTES // (4 * rows * units * itemsize), steps)
    return max(last, fewest(rows))


def cuts(steps: int, last: int, *, reverse: bool, most: int | None = None) -> list[Cut]:
    """Cuts time into pieces, in the order in which they run.

    What `project` runs over is `last` steps at least. So for the last piece, which may
    have fewer, some steps before it are projected again.

    Args:
      steps: T.
      last: From `last_steps`.
      reverse: The last steps come first.
      most: Steps of a piece; None for as many as fit.

    >>> [(cut.first, cut.count, cut.plane) for cut in cuts(27, 4, reverse=False)]
    [(0, 5, 5), (5, 4, 9), (9, 4, 0), (13, 4, 0), (17, 4, 0), (21, 4, 0), (25, 2, 0)]
    """
    found, left = [], steps
    while left:
        fits = min(left // 5, most or steps)
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
    resets: Shaped[Array, "T N"] | Shaped[Array, "0 0"],
    hidden: int,
    *,
    held: tuple[int, int],
    plan: Plan,
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
      held: From `held_sizes`.
      plan: Of the kernel.
      reverse: The last steps come first.

    Returns:
      `(hs [T, B, H], c [N, P], h [N, P])`.
    """
    steps, batch, _ = inputs.shape
    (rows, units), dtype = held, h.dtype
    copied = copies(inputs, rows)

    def nothing(steps: int) -> Any:
        return compat.in_place(lax.empty((steps * rows, units), dtype))

    def values(hs: Any) -> Array:
        return jax.freeze(hs).reshape(-1, rows, units)

    if (batch, hidden) == held:
        last = last_steps(steps, rows, units, dtype.itemsize)
        hs, apart = nothing(steps), nothing(4 * last)
        most = max(last, steps // PIECES) if copied else None
        found = cuts(steps, last, reverse=reverse, most=most)
        most = max(cut.apart for cut in found) if copied else steps
        for cut in found:
            start = min(cut.projected, steps - most)
            some = inputs[start : start + most]
            if copied:  # when the piece before is done, not all of them at once
                some, c = lax.optimization_barrier((some, c))
            project(some, hs if cut.within else apart, cut.to_project(start), last)
            planes = None if cut.within else apart
            piece = Piece(hs, planes, cut.to_run(), cut.count, rows)
            c, h = run(piece, c, h, lengths, resets)
        return values(hs), c, h

    def filled_up(sequences: Any, state: Any, *masks: Array) -> Any:
        (numbers,) = sequences
        count = len(numbers)
        apart = max(count, fewest(rows))
        # The last piece may project some steps before it again, as in `cuts`.
        cut = Cut(0, count, 0, count - apart, apart, within=False)
        now, some = cut.to_project(-numbers[0]), inputs
        if copied:  # as `project` would of all of them
            some = lax.dynamic_slice_in_dim(inputs, now[0], apart)
            now = now.at[0].set(0)
        hs = planes = nothing(4 * apart)
        project(some, planes, now, apart)
        if rows % plan.rows or units % UNITS:  # some are of two tiles or groups
            hs = nothing(apart)
        apart_of_hs = None if hs is planes else planes
        piece = Piece(hs, apart_of_hs, cut.to_run(), count, rows)
        state = run(piece, *state, *masks)
        return (values(hs)[:count, :batch, :hidden],), state

    (hs,), (c_last, h_last) = in_copies(
        filled_up,
        (jnp.arange(steps, dtype=jnp.int32),),
        (c, h),
        lengths,
        resets,
        results=[jax.ShapeDtypeStruct((steps, batch, hidden), dtype)],
        size=piece_steps(
            steps,
            max((2 if copied else 1) * shortest(steps), fewest(rows)),
            4 * rows * units * dtype.itemsize,
        ),
        reverse=reverse,
    )
    return hs, c_last, h_last


def shortest(steps: int) -> int:
    """Returns the least steps of a piece whose inputs are not copied.

    >>> shortest(64), shortest(244)
    (2, 8)
    """
    return min(LEAST, -(-steps // PIECES))


def piece_steps(steps: int, least: int, projected: int) -> int:
    """Returns the steps of a copied piece; all have as many, but for the last.

    Args:
      steps: T.
      least: Steps that it has, where there are that many.
      projected: Bytes of what is projected for a step.

    >>> piece_steps(244, 16, 1 << 20)
    17
    """
    least = max(LAST, least, PROJECTED // projected)
    return -(-steps // max(1, steps // least))


def trained_steps(
    steps: int, given: tuple[int, ...], filled: tuple[int, ...], itemsize: int
) -> int:
    """Returns the steps of a copied piece of training.

    Nothing is cut where N and P are B and H, nor in 16 bits where they are less than
    twice as much: it then takes less memory than a scan, whose steps leave float32, and
    at once it has fewer launches.

    Args:
      steps: T.
      given: B and H.
      filled: N and P.
      itemsize: Bytes of the computation dtype.

    >>> trained_steps(2048, (1, 1024), (8, 1024), 2)
    256
    >>> trained_steps(2048, (5, 1024), (8, 1024), 2)
    2048
    """
    projected = 4 * math.prod(filled) * itemsize
    if given == filled or projected < 16 * math.prod(given):
        return steps
    least = -(-steps // TRAINED) if itemsize == 2 else 2 * shortest(steps)
    return piece_steps(steps, least, projected)
