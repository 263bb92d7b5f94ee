"""The script that compiles the kernels: what it judges, and what it has recorded."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "experiments" / "compile_kernels.py"

pytestmark = pytest.mark.kernels


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compile_kernels", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(script, **changed):
    values = ("v5e", "forward", "float32", 1, 2, 3, 4, 1000, 100)
    names = (*script.KEY, *script.COSTS)
    return dict(zip(names, values, strict=True)) | changed


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"bundles": 1050}, None),
        ({"bundles": 1051}, "1051 bundles, budget 1000"),
        ({"vmem_kib": 106}, "106 vmem_kib, budget 100"),
        ({"H": 5}, "has no row"),
        ({"error": "ValueError: no"}, "does not compile"),
    ],
)
def test_more_than_5_percent_above_the_budget_fails(script, changed, found):
    budget = {name: str(value) for name, value in row(script).items()}
    wrong = script.judged([row(script, **changed)], [budget])
    assert [found in line for line in wrong] == ([] if found is None else [True])


def test_every_case_has_a_budget_on_every_target(script):
    recorded = [tuple(r[name] for name in script.KEY) for r in script.read()]
    wanted = {
        (target, *(str(getattr(case, name)) for name in script.KEY[1:]))
        for target in script.TARGETS
        for case in script.cases()
    }
    assert set(recorded) == wanted
    assert len(recorded) == len(wanted)


def test_bundles_are_counted_in_the_innermost_loop(script, tmp_path):
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
    assert script.costs_tpu(tmp_path) == {"bundles": 3, "vmem_kib": 32}
