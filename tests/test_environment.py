"""The record of what a run ran on, and the cache of compiled programs."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from flax_lstm import environment

COMPILE = """
import sys, jax, jax.numpy as jnp
from flax_lstm.environment import use_compilation_cache
jax.jit(lambda x: x + 1)(1.0)  # too late for JAX to be told, if it were not reset
print(use_compilation_cache(*sys.argv[1:]))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: jnp.sort(jnp.sin(x)))(jnp.arange(100.0)).block_until_ready()
"""


@pytest.mark.parametrize("way", ["argument", "variable", "user's cache"])
def test_compiled_programs_are_kept_where_they_should_be(tmp_path, way):
    given, variables = [], {"XDG_CACHE_HOME": str(tmp_path / "home")}
    want = tmp_path / "home" / "flax-lstm" / "xla"
    if way != "user's cache":
        want = tmp_path / "chosen"
        variables["JAX_COMPILATION_CACHE_DIR"] = str(want)
    if way == "argument":
        variables["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "other")
        given = [str(want)]
    kept = {n: v for n, v in os.environ.items() if n != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *given],
        capture_output=True,
        text=True,
        env=kept | {"JAX_PLATFORMS": "cpu"} | variables,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == str(want), done.stderr
    assert any(want.iterdir())


def test_a_cache_that_cannot_be_written_is_a_warning_and_no_cache(tmp_path):
    (tmp_path / "file").write_text("in the way")
    before = jax.config.values["jax_compilation_cache_dir"]
    try:
        with pytest.warns(
            environment.CompilationCacheWarning,
            match=r"cannot keep compiled programs in .*file/xla: Not a directory; .*"
            "JAX_COMPILATION_CACHE_DIR.*--no-compilation-cache",
        ):
            assert environment.use_compilation_cache(tmp_path / "file" / "xla") is None
        assert jax.config.values["jax_compilation_cache_dir"] is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


def test_the_record_names_versions_devices_and_command():
    record = environment.describe(jax.devices())
    assert record["packages"]["jax"] == importlib.metadata.version("jax")
    assert record["devices"] == ["cpu cpu"] * 8
    assert record["command"] == sys.argv
    assert record["x64"] is False
    assert environment.installed("no-such-distribution") is None


def test_the_commit_is_that_of_git():
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        pytest.skip("not a checkout")
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"git does not read this checkout: {done.stderr.strip()}")
    # `--always` gives the commit itself unless a tag is near.
    assert environment.commit().rstrip("+").endswith(done.stdout.strip())
