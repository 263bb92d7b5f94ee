"""How inference on a GPU is cut into pieces of time: how many, and where they lie."""

import itertools

import numpy as np
import pytest
from flax_lstm_kernels.gpu.arrange import up
from flax_lstm_kernels.gpu.pieces import (
    LAST,
    LEAST,
    PIECES,
    PROJECTED,
    TRAINED,
    cuts,
    piece_steps,
    shortest,
    trained_steps,
)

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("reverse", [False, True])
def test_every_step_is_in_one_piece_and_overwrites_nothing(reverse):
    """Gates lie where hs is neither written yet nor by the piece itself."""
    sizes = (1, 3, 4, 5, 8, 19, 20, 21, 27, 244, 251, 1024, 100_003)
    for steps, last in itertools.product(sizes, (1, 2, 4, 8, 16)):
        if steps < last:
            continue
        done = np.zeros(steps, bool)
        for cut in (found := cuts(steps, last, reverse=reverse)):
            here = slice(cut.first, cut.first + cut.count)
            # The steps that come before it in the loop, and no others, are done.
            assert done.all(where=np.arange(steps) < cut.first) or reverse
            assert not done[cut.first :].any() or reverse
            assert done[here.stop :].all() if reverse else True
            assert not done[: here.stop].any() if reverse else True
            done[here] = True
            assert cut.count > 0
            assert 0 <= cut.projected <= cut.first
            assert here.stop <= cut.projected + cut.apart <= steps
            if cut.within:
                planes = slice(cut.plane, cut.plane + 4 * cut.apart)
                assert cut.apart == cut.count
                assert planes.stop <= steps
                assert not done[planes].any()
            else:
                assert (cut.plane, cut.apart) == (0, last)
            assert cut.apart >= last
        assert done.all()
        # A fifth each time, rounded down; then at most ten apart.
        fewest = max(1, steps / (5 * last))
        assert len(found) <= 10 + 2 * np.log(fewest) / np.log(1.25)


@pytest.mark.parametrize("least", [1, 8, 16, 30, 1000])
def test_copied_pieces_are_alike_and_neither_short_nor_long(least):
    for steps in (8, 9, 59, 60, 61, 64, 119, 120, 244, 251, 1024, 100_003):
        for projected in (4 * 8 * 64 * 2, 4 * 2000 * 128 * 2):
            found = piece_steps(steps, least, projected)
            assert 0 < found <= steps
            fewest = max(LAST, least, PROJECTED // projected)
            assert found >= min(fewest, steps)
            assert found < 2 * fewest + 2
            count = -(-steps // found)
            last = steps - (count - 1) * found
            assert 0 < last <= found
            assert found - last < count


def test_there_are_no_more_pieces_than_32_but_of_eight_steps_and_more():
    for steps in (1, 64, 244, 1024, 100_003):
        least = shortest(steps)
        assert least == LEAST or -(-steps // least) <= PIECES


@pytest.mark.parametrize(
    ("given", "itemsize", "cut"),
    [
        ((4, 128), 2, True),
        ((5, 128), 2, False),
        ((250, 100), 2, False),
        ((250, 64), 2, True),
        ((250, 100), 4, True),
        ((256, 128), 4, False),
    ],
)
def test_training_is_cut_where_twice_as_much_would_be_filled_up(given, itemsize, cut):
    """In float32 where anything is; in 16 bits into no more than eighths."""
    filled = (up(given[0], 8), 128)
    found = trained_steps(2440, given, filled, itemsize)
    assert (found < 2440) is cut
    if cut and itemsize == 2:
        assert 2440 / TRAINED <= found < 2 * 2440 / TRAINED
