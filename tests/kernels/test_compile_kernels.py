"""The script that compiles the kernels: what it judges, reads and has recorded."""

import importlib
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"

pytestmark = pytest.mark.kernels


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS)
    return importlib.import_module


@pytest.fixture
def script(load):
    return load("compile_kernels")


def row(script, **changed):
    """A row of a target that has all costs."""
    key = dict(zip(script.KEY, ("v5e", "forward", "float32", 1, 2, 3, 4), strict=True))
    costs = dict.fromkeys(script.COSTS, 1000) | {"spill_bytes": 0}
    return key | {"jax": "1.2.3"} | costs | changed


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"bundles": 1050, "instructions": 1050}, None),
        ({"bundles": 1051}, "1051 bundles, budget 1000"),
        ({"vmem_kib": 1051}, "1051 vmem_kib, budget 1000"),
        ({"registers": 1051}, "1051 registers, budget 1000"),
        ({"smem_kib": 1051}, "1051 smem_kib, budget 1000"),
        ({"instructions": 1051}, "1051 instructions, budget 1000"),
        ({"H": 5}, "has no row"),
        ({"error": "ValueError: no"}, "does not compile"),
    ],
)
def test_more_than_5_percent_above_the_budget_fails(script, changed, found):
    budget = {name: str(value) for name, value in row(script).items()}
    wrong = script.judged([row(script, **changed)], [budget])
    assert [found in line for line in wrong] == ([] if found is None else [True])


def test_a_kernel_that_spills_fails_whatever_its_budget(script):
    spilling = row(script, spill_bytes=8)
    budget = {name: str(value) for name, value in spilling.items()}
    (wrong,) = script.judged([spilling], [budget])
    assert "spills 8 bytes" in wrong


def test_costs_that_a_target_does_not_have_are_not_judged(script):
    told = row(script)
    budget = {name: str(value) for name, value in told.items()}
    for cost in script.compile_for_tpu.COSTS:
        del told[cost]
        budget[cost] = ""
    assert script.judged([told], [budget]) == []


def test_the_code_of_another_jax_is_not_held_to_the_budget(script):
    told = row(script, registers=2000, jax="1.3.0")
    budget = {name: str(value) for name, value in row(script).items()}
    assert script.judged([told], [budget]) == []
    assert "not held to their budgets" in script.verdict([told], [budget])
    assert "within their budgets" in script.verdict([row(script)], [budget])
    spilling = row(script, spill_bytes=8, jax="1.3.0")
    assert script.judged([spilling], [budget])


def test_every_case_has_a_budget_on_every_target(script):
    recorded = [tuple(r[name] for name in script.KEY) for r in script.read()]
    wanted = [
        (target, *(str(getattr(case, name)) for name in script.KEY[1:]))
        for target, (_, cases) in script.TARGETS.items()
        for case in cases
    ]
    assert recorded == wanted
    assert len(set(wanted)) == len(wanted)


def test_no_recorded_kernel_spills(script):
    assert not [row for row in script.read() if int(row["spill_bytes"] or 0)]


def test_written_rows_stand_in_the_order_of_the_cases(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "BUDGETS", tmp_path / "budgets.csv")
    cases = script.TARGETS["v5e"][1][:2]
    rows = [
        row(script, target=target, bundles=place, **vars(case))
        for place, (target, case) in enumerate(
            [("v6e", cases[1]), ("v5e", cases[1]), ("v5e", cases[0])]
        )
    ]
    script.write(rows)
    assert [row["bundles"] for row in script.read()] == ["2", "1", "0"]
    script.write([rows[1] | {"bundles": 7}])
    assert [row["bundles"] for row in script.read()] == ["2", "7", "0"]


def test_bundles_are_counted_in_the_innermost_loop(load, tmp_path):
    listing = [
        "LH: loop header",
        "     0   :  { %s1 = smov 0 }",
        "   0x1 LB: > { %s2 = sphi %s1 }",
        "   0x2   : > { %s3 = sadd.s32 1, %s2 }",
        "   0x3 LB: >> { %v1 = vld [vmem:[%s2]] }",
        "   0x4   : >> { %v2 = vadd.f32 %v1, %v1 }",
        "   0x5   : >> { %p1 = scmp.ge.s32.totalorder %s3, 8 }",
        "   0x6   :  { %s9 = smov 1 }",
    ]
    (tmp_path / "1-flax_lstm_x.1-72-final_bundles.txt").write_text("\n".join(listing))
    allocated = "[space=vmem, size = 0x8000, scoped]\n[space=smem, size = 0x400]\n"
    allocations = tmp_path / "1-flax_lstm_x.1-51-pre-finalize-registers-and-allocations"
    Path(f"{allocations}.txt").write_text(allocated)
    costs = load("compile_for_tpu").costs(tmp_path)
    assert costs == {"bundles": 3, "vmem_kib": 32}


PTXAS = """\
ptxas info    : Compiling entry function 'body_mosaic_gpu_kernel' for 'sm_90a'
    {stack} bytes stack frame, {stack} bytes spill stores, 4 bytes spill loads
ptxas info    : Used {registers} registers, used 16 barriers, 1 bytes smem
"""


def listed(folder, name, *, instructions, smem, **told):
    """Writes what Mosaic lists of one kernel, with a loop of so many instructions."""
    loop = ["/*0000*/ LDC R1, c[0x0][0x28] ;", ".L_x_1:"]
    loop += ["/*0010*/ MUFU.TANH R1, R1 ;"] * (instructions - 1)
    loop += ["/*0020*/ @P0 BRA `(.L_x_1) ;", "/*0030*/ EXIT ;"]
    (folder / f"{name}.sass_ctrl").write_text("\n".join(loop))
    (folder / f"{name}.ptxas").write_text(PTXAS.format(**told))
    passes = f"dynamic_shared_memory_size %c7_i32\ndynamic_shared_memory_size %c{smem}_"
    (folder / f"{name}.mlir-passes.log").write_text(f"{passes}i32 args\n")


def test_costs_of_several_gpu_kernels_are_those_of_the_greediest(load, tmp_path):
    listed(tmp_path, "a_0", instructions=5, smem=1025, stack=8, registers=90)
    listed(tmp_path, "b_1", instructions=9, smem=100, stack=0, registers=80)
    costs = load("compile_for_hopper").costs(tmp_path)
    assert costs == {
        "registers": 90,
        "spill_bytes": 8 + 4 + 0 + 4,
        "smem_kib": 2,
        "instructions": 9,
    }


def test_no_kernel_and_serialized_products_are_errors(load, tmp_path):
    hopper = load("compile_for_hopper")
    with pytest.raises(ValueError, match="no kernel"):
        hopper.costs(tmp_path)
    listed(tmp_path, "a_0", instructions=5, smem=1, stack=0, registers=9)
    with (tmp_path / "a_0.ptxas").open("a") as file:
        file.write(f"ptxas info : Potential Performance Loss: {hopper.SERIALIZED} due")
    with pytest.raises(ValueError, match="serialized"):
        hopper.costs(tmp_path)
