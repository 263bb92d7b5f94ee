"""What a forward kernel runs over: the gates of all steps, or a piece of them.

Axes     T time, N batch in whole tiles, P hidden size in whole groups of units; of a
         piece, S planes of M rows of W units each: those that there are, or more.
Tiles    Of a piece whose M rows are no whole tiles, the last one ends at the last row,
         and has some of the rows of the one before. Both compute and write the same. So
         it is with W units and groups of 64. States, lengths and resets are there in
         tiles and groups (`arrange.in_tiles`).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from flax_lstm_kernels import compat
from flax_lstm_kernels.gpu.arrange import UNITS
from flax_lstm_kernels.gpu.cluster_tiles import EIGHT
from flax_lstm_kernels.gpu.common import place_of


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["hs", "planes", "now", "count"],
    meta_fields=["rows"],
)
@dataclasses.dataclass(frozen=True)
class Piece:
    """What a kernel forward is given where nothing is kept.

    Attributes:
      hs: Reference to `[T M, W]`, to be written in place.
      planes: Reference to `[S M, W]` with the gates before activation, in the dtype of
        hs; None where that is hs.
      now: int32, `Cut.first`, `count`, `plane` and `apart`.
      count: Steps of this piece.
      rows: M. Where they are fewer than a tile, only the first M of it are there.
    """

    hs: Any
    planes: Any
    now: Array
    count: Any  # int, but for jit
    rows: int


class Span(NamedTuple):
    """The steps of a launch, as the kernel sees them.

    Attributes:
      gates: Reference to the gates of all steps `[T, N, 4, P]`, or to planes
        `[S M, W]`.
      first: The first step.
      count: How many there are.
      plane: That of gate i of the first step; None where there are no planes.
      apart: How many planes later that of the next gate is.
      held: M.
    """

    gates: Any
    first: Any
    count: Any
    plane: Any = None
    apart: Any = None
    held: int | None = None

    @classmethod
    def of(cls, gates: Any, now: Any, held: int | None) -> "Span":
        """Returns the span of a piece, or without one (None) that of all steps."""
        if now is None:
            return cls(gates, 0, gates.shape[0])
        return cls(gates, now[0], now[1], now[2], now[3], held)

    def end(self, length: Any) -> Any:
        """Returns how many of the steps a row or tile of this length has."""
        if self.plane is None:
            return length
        return jnp.clip(length - self.first, 0, self.count)

    def rows(self, tile: Any, size: int) -> Any:
        """Returns the rows of a tile in gates and hs."""
        return place_of(tile * size, size, size, self.held or 0)[0]

    def units(self, number: Any, size: int) -> Any:
        """Returns units in gates and hs, a so-manyth of P, some of a group of 64."""
        return place_of(number * size, size, UNITS, self.gates.shape[-1])[0]

    def gate(self, t: Any, rows: Any, n: int, units: Any) -> Any:
        """Returns where gate n of step t lies, of the rows of a tile."""
        if self.plane is None:
            return self.gates.at[t, rows, n, units]
        plane = self.plane + n * self.apart + t - self.first
        return self.gates.at[self.joined(plane, rows), units]

    def place(self, hs: Any, t: Any, rows: Any, units: Any) -> Any:
        """Returns where hs of step t lies, of the rows of a tile."""
        if self.plane is None:
            return hs.at[t, rows, units]
        return hs.at[self.joined(t, rows), units]

    def joined(self, step: Any, rows: Any) -> Any:
        """Returns rows of a step, or plane, among those of all; of one row, that."""
        if self.held == 1:
            return step
        return pl.ds(step * self.held + rows.start, rows.size)


class Kind(NamedTuple):
    """What a forward kernel reads over time, and where hs goes.

    Attributes:
      keep: All steps are run, and what the backward pass needs is kept.
      planes: A piece has planes that are not those of hs.
      held: M of a piece.
      by_eights: Rows and units of gates and hs come in whole eights and 64s, in which
        TMA copies: a copy that began within one would end with it.
    """

    keep: bool
    planes: bool
    held: int | None
    by_eights: bool = True

    @classmethod
    def of(cls, source: Any) -> "Kind":
        """Describes the gates of all steps, or a `Piece`."""
        piece = isinstance(source, Piece)
        if not piece:
            return cls(keep=True, planes=False, held=None)
        return cls(
            keep=False,
            planes=source.planes is not None,
            held=source.rows,
            by_eights=source.rows % EIGHT == source.hs.shape[-1] % UNITS == 0,
        )

    def taken(self, take: Callable[..., Any]) -> tuple[Any, Span]:
        """Takes what `opened` gave; returns hs (None with `keep`)."""
        hs = take(not self.keep)
        gates = take() if self.keep or self.planes else hs
        return hs, Span.of(gates, take(not self.keep), self.held)


def forward_results(
    source: Any, c: Float[Array, "N P"], h: Float[Array, "N P"]
) -> list[jax.ShapeDtypeStruct]:
    """Returns the types of what a forward kernel makes: hs, c, h, before; or c, h."""
    state = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (c, h)]
    if isinstance(source, Piece):
        return state
    sequence = (source.shape[0], *c.shape)
    hs, before = (jax.ShapeDtypeStruct(sequence, array.dtype) for array in (h, c))
    return [hs, *state, before]


def opened(source: Any) -> list[Any]:
    """Returns the first arguments of a forward kernel, for `Kind.taken`.

    Of the gates of all steps a reference to them, for others to take their place.
    """
    if not isinstance(source, Piece):
        return [compat.in_place(source)]
    planes = [] if source.planes is None else [source.planes]
    return [source.hs, *planes, source.now]


def on_source(
    run: Callable[..., Any], source: Any, operands: list[Any]
) -> tuple[Any, ...]:
    """Calls a forward kernel on the gates of all steps, or on a piece.

    Returns:
      `(hs, c, h, gates, before)`; of a `Piece`, whose hs is written in place, `(c, h)`.
    """
    first = opened(source)
    if isinstance(source, Piece):
        return tuple(run(*first, *operands))
    hs, c, h, before = run(*first, *operands)
    return hs, c, h, jax.freeze(first[0]), before
