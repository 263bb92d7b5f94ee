"""Tuned plans: what the table holds, who looks into it, and the command that writes it.

No device is timed: a timer stands in that says which plan is fast.
"""

import importlib
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from flax_lstm_kernels import gpu, tpu, tuning
from flax_lstm_kernels.target import Target

EXPERIMENTS = Path(__file__).parents[2] / "experiments"

pytestmark = pytest.mark.kernels


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS)
    return importlib.import_module("tune_kernels")


@pytest.fixture
def table(monkeypatch, tmp_path):
    path = tmp_path / "tuning.csv"
    path.write_text(",".join(tuning.FIELDS) + "\n")
    monkeypatch.setattr(tuning, "TABLE", path)
    tuning.read.cache_clear()
    yield path
    tuning.read.cache_clear()


def test_every_row_of_the_table_is_a_plan_of_a_kernel():
    rows = tuning.read(tuning.TABLE)
    for key, fields in rows.items():
        names = tpu.Plan._fields if key.kernel == "tpu" else gpu.Plan._fields
        assert set(fields) <= set(names)
        assert key.kernel == "tpu" or key.kernel in gpu.plan.PLANNERS


def test_the_kernels_look_into_the_table(table):
    sizes = tpu.plan.Sizes(64, 64, 8, 100, 2, True)
    of_gpu = gpu.plan.Sizes("forward", 64, 64, 100, 2)
    heuristic = tpu.plan.choose("forward", sizes, "TPU v5e")[0]
    plan = gpu.plan.choose(of_gpu)
    with table.open("a") as file:
        file.write(
            "tpu,forward,TPU v5e,128,64,2,rows=32 steps=2 units=128 fused=0 streamed=0"
            f",1,2,0\n{plan.kernel},forward,9.0,100,64,2,rows=24 stages=2,1,2,0\n"
        )
    tuning.read.cache_clear()
    wanted = tpu.Plan(32, 2, 128, False, False)
    assert tpu.plan.choose("forward", sizes, "TPU v5e")[0] == wanted != heuristic
    assert tpu.plan.choose("forward", sizes, "TPU v4")[0] != wanted
    assert tpu.plan.choose("backward", sizes, "TPU v5e")[0] != wanted
    assert gpu.plan.choose(of_gpu) == plan._replace(rows=24, stages=2) != plan
    assert gpu.plan.choose(of_gpu._replace(rows=65)).rows != 24


def test_the_fastest_plan_is_written_and_then_used(script, table, monkeypatch):
    case = script.Case("forward", "bfloat16", 2, 32, 3, 100)
    target = Target("tpu", "TPU v5e")
    given = list(script.candidates(case, target))
    fast = given[2][1]
    calls = []

    class Ready:
        """Stands in for a compiled function: which needs the device."""

        def __init__(self, plan):
            self.plan = plan

        lower = compile = lambda self, *_: self

    def functions(case, module, sharding, **options):
        _, like = real(case, module, sharding, **options)
        return Ready(options["plan"]), like

    def timer(run, arguments):
        calls.append(run.plan)
        assert arguments[0].shape == (2, 32, 3)
        assert arguments[-2].tolist() == [2] * 32
        if len(calls) == 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: does not fit")
        return 1e-4 if run.plan == fast else 2e-4

    real = script.functions
    monkeypatch.setattr(script, "functions", functions)
    monkeypatch.setattr(script.jax, "jit", lambda function: function)
    row = script.tuned(case, target, limit=4, timer=timer)
    assert calls == [plan for _, plan, _ in given[:4]]
    assert (row["time"], row["heuristic_time"]) == (100.0, 200.0)
    script.write([row], table)
    script.write([{**row, "rows": 7}], table)
    tuning.read.cache_clear()
    assert len(tuning.read(table)) == 2
    sizes = tpu.plan.Sizes(2, 32, 3, 100, 2, True)
    assert tpu.plan.choose("forward", sizes, "TPU v5e")[0] == fast

    def even(run, arguments):
        return 1e-4 if run.plan == given[3][1] else 1.02e-4

    assert script.tuned(case, target, limit=4, timer=even) is None


def test_the_plans_of_a_gpu_are_tried_too(script):
    case = script.Case("single backward", "bfloat16", 4, 64, 3, 128)
    target = Target("cuda", "9.0")
    keys, plans, options = zip(*script.candidates(case, target), strict=True)
    assert set(keys) == {tuning.Key("single", "backward", "9.0", 128, 64, 2)}
    sizes = gpu.plan.Sizes("backward", 4, 64, 128, jnp.dtype("bfloat16").itemsize)
    assert plans[0] == gpu.plan.PLANNERS["single"](sizes)
    assert len(set(plans)) == len(plans) > 10
    assert options[1] == {"plan": plans[1]}


def test_without_the_device_the_command_says_what_it_needs(script):
    assert script.refusal(Target("tpu", "TPU v4")) is None
    assert script.refusal(Target("cuda", "9.0")) is None
    assert "is cuda 8.0" in script.refusal(Target("cuda", "8.0"))
    ran = subprocess.run(
        [sys.executable, EXPERIMENTS / "tune_kernels.py"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 2
    assert ran.stderr.strip().endswith("the default device is cpu cpu")
    assert "Traceback" not in ran.stderr
