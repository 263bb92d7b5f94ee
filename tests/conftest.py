"""Sets JAX up before any test module imports the package.

Eight pretend CPU devices, so that every way of going parallel runs anywhere; no silent
rank promotion, which turns a `(B,) - (B, 1)` slip into an error; and every shape
annotation of the package checked at each call.
"""

import contextlib
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import jax
import jaxtyping
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Undone by nothing: the modules stay instrumented for the whole test process.
jaxtyping.install_import_hook(["flax_lstm", "flax_lstm_kernels"], "annotations.checked")

for chatty in ("absl", "orbax", "jax", "datasets", "httpx"):
    logging.getLogger(chatty).setLevel(logging.ERROR)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need the network

hypothesis.settings.register_profile(
    "flax_lstm",
    deadline=None,  # the first example of a shape compiles
    derandomize="CI" in os.environ,  # a red build must be red again when rerun
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("flax_lstm")


@pytest.fixture
def as_installed() -> Iterator[None]:
    """Switches the annotation checks off: the package as its users run it.

    For tests of error messages, which the checks would otherwise forestall.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def x64() -> Iterator[None]:
    """Runs the test with 64-bit types."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def hurried() -> Iterator[None]:
    """Has LLVM optimise nothing: programs that run once are compiled in half the time.

    For tests that hold what our Python asks of XLA against something else, with a
    tolerance. Not where bits, time or memory matter, nor where it is to be seen how
    accurate a program is that users run. What JAX compiles meanwhile for a function of
    its own or of Flax it keeps, and later tests get, too: not where bits of such a
    function are compared in another file.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory) -> Iterator[None]:
    """Keeps compiled programs while the tests run, in a folder of their own.

    Most runs compile the same programs: 7 s of CPU each, 1 s with the cache. No earlier
    run of them is seen, and processes that a test starts use the same folder.
    """
    from flax_lstm.environment import use_compilation_cache

    variable, option = "JAX_COMPILATION_CACHE_DIR", "jax_compilation_cache_dir"
    before = os.environ.get(variable), jax.config.values.get(option)
    os.environ[variable] = str(tmp_path_factory.mktemp("xla"))
    use_compilation_cache(os.environ[variable])
    yield
    os.environ.pop(variable)
    if before[0] is not None:
        os.environ[variable] = before[0]
    jax.config.update(option, before[1])


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """Eighty short texts in a file."""
    from small_runs import write_texts

    return write_texts(tmp_path_factory.mktemp("data") / "texts.csv")


@pytest.fixture(scope="session")
def trained(source, tmp_path_factory, compilation_cache):
    """A finished run with everything it said."""
    from small_runs import make_config

    from flax_lstm import run

    events = []
    folder = tmp_path_factory.mktemp("runs") / "done"
    result = run.train(make_config(source), folder, on_event=events.append)
    return result, events


@pytest.fixture(scope="session")
def straight(source, tmp_path_factory, trained) -> Callable:
    """Trains by a recipe without a stop, each recipe once."""
    from small_runs import make_config

    from flax_lstm import run

    done = {}

    def train(recipe):
        if not recipe:
            return trained[0]
        name = str(sorted(recipe))
        if name not in done:
            folder = tmp_path_factory.mktemp("runs") / "straight"
            done[name] = run.train(make_config(source, **recipe), folder)
        return done[name]

    return train


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory, compilation_cache) -> tuple[Path, str]:
    """A small run on the demo corpus: its folder, and what training it printed."""
    from command_lines import SMALL

    from flax_lstm import cli

    folder = tmp_path_factory.mktemp("runs") / "small"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.main(["train", "--out", str(folder), *SMALL]) == 0
    return folder, printed.getvalue()


@pytest.fixture
def demo_folder(demo_run) -> Path:
    """The folder of that run."""
    return demo_run[0]


@pytest.fixture
def stdin(monkeypatch, tmp_path) -> Callable[[bytes], None]:
    """Gives the command line these bytes on its standard input."""

    def give(content: bytes) -> None:
        path = tmp_path / "stdin"
        path.write_bytes(content)
        # Stays open for the test to read, as a standard input does.
        opened = open(path, encoding="utf-8")  # noqa: SIM115 the test reads it
        monkeypatch.setattr(sys, "stdin", opened)

    return give
