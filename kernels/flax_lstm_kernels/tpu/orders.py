"""The orders in which an array `[T, B, K]` of inputs or outputs may lie in memory.

The compiler fills up the last axis of an array to whole lanes and the one before it to
whole sublanes. It has arguments and results of a program in the order that takes the
least memory so, and would copy all of one for a kernel that wants another.

Axes     T time, B batch, K the input or the hidden size.
"""

LANES = 128
TBI, TIB, ITB, BTI = range(4)
# The axes in each; where two orders take the same, the compiler has that named first.
ORDERS = {TBI: (0, 1, 2), BTI: (1, 0, 2), TIB: (0, 2, 1), ITB: (2, 0, 1)}


def up(size: int, multiple: int) -> int:
    """Rounds up to a multiple.

    >>> up(300, 128)
    384
    """
    return -(-size // multiple) * multiple


def sublanes(size: int, itemsize: int) -> int:
    """Rounds up as the compiler does an axis next to the last: small ones not to 8."""
    least = 4 // itemsize
    while least < min(size, 8):
        least *= 2
    return up(size, least)


def least(*shape: int, itemsize: int) -> int:
    """Returns the order in which an array `[T, B, K]` takes the least memory.

    Of those that the kernels know: none has time in the lanes.

    >>> least(244, 256, 300, itemsize=2) == TIB, least(64, 256, 300, itemsize=2) == ITB
    (True, True)
    """

    def elements(order: int) -> int:
        outer, inner, last = (shape[axis] for axis in ORDERS[order])
        return outer * sublanes(inner, itemsize) * up(last, LANES)

    return min(ORDERS, key=elements)
