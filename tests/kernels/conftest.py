"""Counts what was done with the kernels, and says so at the end of the tests."""

import importlib
import threading
from collections import Counter
from pathlib import Path

import jax
import pytest
from flax_lstm_kernels.gpu import common
from jax._src.pallas.mosaic.interpret import thread_map

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
# A test of a kernel may be marked with what it does: `pytest.mark.kernels("lowered")`.
WAYS = ("interpreted", "lowered", "compiled")


@pytest.fixture(autouse=True)
def interpreted_in_a_hurry(hurried):
    """What the interpreters make of a kernel is large, and nobody's but the tests'."""


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    """Has the interpreter compile what a thread of a kernel runs once.

    JAX 0.10.2 does so for each thread at each launch, which is most of the time that a
    sequence in pieces takes; 0.12 once, but for threads that come at the same time.
    """
    programs, compiling = {}, threading.Lock()

    def run(jaxpr, consts, *arguments):
        def thread(consts, *arguments):
            jax.core.eval_jaxpr(jaxpr, consts, *arguments)

        with compiling:
            if jaxpr not in programs:
                programs[jaxpr] = jax.jit(thread).lower(consts, *arguments).compile()
        programs[jaxpr](consts, *arguments)

    # Of the name that it has in both; without it these tests fail, rather than crawl.
    monkeypatch.setattr(thread_map, "_run_jaxpr", run)


@pytest.fixture
def whole_float32(monkeypatch):
    """Has the GPU kernels multiply float32 as it is, for bars that only it can meet.

    That they round it to tf32, and nothing else, is seen in `test_gpu_common.py`.
    """
    monkeypatch.setattr(common, "nearest_tf32", lambda value: value)


def pytest_collection_modifyitems(items):
    """Notes on each test what it does; its report then carries that along."""
    for item in items:
        ways = {way for mark in item.iter_markers("kernels") for way in mark.args}
        assert ways <= set(WAYS), f"{item.nodeid}: {ways} are not all among {WAYS}"
        item.user_properties += [("kernels", way) for way in sorted(ways)]


def pytest_terminal_summary(terminalreporter):
    """Says how many tests passed that interpret, lower or compile a kernel."""
    passed = terminalreporter.stats.get("passed", [])
    done = Counter(
        value
        for report in passed
        if report.when == "call"
        for name, value in report.user_properties
        if name == "kernels"
    )
    if done:
        told = ", ".join(f"{done[way]} {way}" for way in WAYS)
        terminalreporter.write_line(f"Tests of kernels that passed: {told}")


@pytest.fixture
def cache(monkeypatch, request):
    """Returns where the compilers are; skips where the one of the test is not."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    cache = importlib.import_module("compile_kernels").default_cache()
    target, compiler = (request.getfixturevalue(n) for n in ("target", "compiler"))
    if not list(cache.glob(f"{compiler}-jax{jax.__version__}-*")):
        pytest.skip(
            f"the compiler for {target} is not in {cache}; "
            "python experiments/compile_kernels.py installs it"
        )
    return cache
