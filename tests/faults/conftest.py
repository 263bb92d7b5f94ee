"""What the tests of faults share: every one of them is marked `faults`."""

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.register_assert_rewrite("fault_runs")  # so that they too say what differs


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses by marks
def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker("faults")


@pytest.fixture(scope="session")
def straight_run(source, tmp_path_factory, compilation_cache) -> Callable:
    """Trains the tiny run, with some arguments more, without a break; each once."""
    import fault_runs

    done = {}

    def train(*argv: str, fault: str = "") -> Path:
        if (argv, fault) not in done:
            folder = tmp_path_factory.mktemp("straight") / "run"
            ended = fault_runs.train(source, folder, *argv, fault=fault)
            assert ended.code == 0, ended.err
            done[argv, fault] = folder
        return done[argv, fault]

    return train


@pytest.fixture
def no_compile(monkeypatch) -> None:
    """Fails the test as soon as JAX would compile a program."""
    from jax._src import compiler

    def refuse(*arguments, **options):
        raise AssertionError("a program was to be compiled")

    monkeypatch.setattr(compiler, "compile_or_get_cached", refuse)
