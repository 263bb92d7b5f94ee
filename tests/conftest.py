"""Sets JAX up before any test module imports the package.

Eight pretend CPU devices, so that every way of going parallel runs anywhere; no silent
rank promotion, which turns a `(B,) - (B, 1)` slip into an error; and every shape
annotation of the package checked at each call.
"""

import logging
import os
from collections.abc import Iterator

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
