"""The reader of GPU listings: what is a loop, and which one goes over time."""

import importlib
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"

pytestmark = pytest.mark.kernels


@pytest.fixture
def sass(monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS)
    return importlib.import_module("sass")


def listing(*lines):
    """Gives each instruction its address; labels stand as they are."""
    return "\n".join(
        line if line.startswith(".L") else f"  -:-:-:Y:01   /*{n * 16:04x}*/  {line} ;"
        for n, line in enumerate(lines)
    )


def test_the_time_loop_lies_in_the_loop_over_tiles_and_around_that_over_units(sass):
    kernel = listing(
        "LDC R1, c[0x0][0x28]",
        ".L_x_1:",  # tiles
        "IADD3 R2, R2, 0x1",
        "IADD3 R2, R2, 0x1",
        ".L_x_2:",  # time
        "SYNCS.PHASECHK R3",
        ".L_x_3:",  # units
        "HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8]",
        "@P1 BRA `(.L_x_3)",
        "MUFU.TANH R4, R4",
        "BRA UP0, `(.L_x_2)",
        "@!P2 BRA `(.L_x_1)",
        "EXIT",
    )
    assert sorted(map(len, sass.loops(sass.blocks(kernel)))) == [1, 3, 5]
    assert sass.time_loop(kernel) == 5


def test_a_jump_back_from_code_moved_out_of_the_way_makes_no_loop(sass):
    kernel = listing(
        "@!P1 BRA `(.L_x_9)",  # the barrier is not there yet
        ".L_x_1:",
        "IADD3 R2, R2, 0x1",
        ".L_x_2:",
        "MUFU.TANH R4, R4",
        "@!P2 BRA `(.L_x_8)",
        ".L_x_3:",
        "@P0 BRA `(.L_x_2)",
        "EXIT",
        ".L_x_8:",  # this wait is in the loop, ...
        "SYNCS.PHASECHK P3, R5",
        "@!P3 BRA `(.L_x_8)",
        "BRA `(.L_x_3)",
        ".L_x_9:",  # ... this one before it
        "SYNCS.PHASECHK P3, R5",
        "@!P3 BRA `(.L_x_9)",
        "BRA `(.L_x_1)",
    )
    assert sorted(map(len, sass.loops(sass.blocks(kernel)))) == [1, 1, 4]
    # tanh, two branches; the wait: a try, a branch, and the jump back
    assert sass.time_loop(kernel) == 6


def test_without_a_loop_all_instructions_count(sass):
    straight = listing("@P1 EXIT", "MOV R1, R2", "HGMMA.64x8x16 R1", "EXIT")
    assert sass.time_loop(straight) == 4
