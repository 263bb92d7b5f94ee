"""The time to the first step, told by clocks of the tests' own."""

import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
from flax_lstm_kernels import cpu

from flax_lstm import startup


def test_the_first_step_ends_the_start_and_later_ones_change_nothing():
    times, compiled = iter([10.25, 12.5, 99.0]), iter([1.0, 3.0, 50.0])
    watch = startup.Startup(
        10.0, clock=lambda: next(times), compiled=lambda: next(compiled)
    )
    assert (watch.seconds, watch.compile_seconds) == (None, None)
    watch.first_step()
    watch.first_step()
    assert (watch.seconds, watch.compile_seconds) == (2.5, 2.0)
    assert watch.import_seconds == 0.25


def test_what_reads_the_data_is_timed_each_time():
    times = iter([0.0, 1.0, 1.5, 4.0, 8.0])
    watch = startup.Startup(0.0, clock=lambda: next(times), compiled=lambda: 0.0)
    for _ in range(2):
        with watch.loading():
            pass
    assert watch.data_seconds == 0.5 + 4.0


def test_what_xla_compiles_is_counted_and_what_is_there_is_not():
    compiled = startup.compile_clock()
    program = jax.jit(lambda x: jnp.sort(jnp.cos(x)) * 2)
    before = compiled()
    program(jnp.arange(7.0)).block_until_ready()
    after = compiled()
    assert after > before
    jax.monitoring.record_event_duration_secs("/of/something/else", 1.0)
    assert compiled() == after
    program(jnp.arange(7.0) + 1).block_until_ready()
    ready = compiled()
    program(jnp.arange(7.0) + 1).block_until_ready()
    assert compiled() == ready


def test_the_kernel_in_c_is_counted_when_it_is_compiled_and_only_then(
    tmp_path, monkeypatch
):
    """By a compiler that takes a tenth of a second for an empty library."""
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nsleep 0.1\nfor last; do :; done\n: > "$last"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compiled = startup.compile_clock()
    before = compiled()
    cpu.built([str(compiler)])
    assert compiled() - before >= 0.1
    after = compiled()
    cpu.built([str(compiler)])
    assert compiled() == after


def test_the_process_began_after_its_parent_looked_at_the_clock():
    """`perf_counter` of Linux is one clock for all processes, so they compare."""
    if not os.path.exists("/proc/self/stat"):
        assert startup.process_start() <= time.perf_counter()
        return
    before = time.perf_counter()
    code = (
        "import time; ready = time.perf_counter(); import flax_lstm.startup as s; "
        "print(s.process_start(), ready)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    began, ready = map(float, done.stdout.split())
    tick = 2 / os.sysconf("SC_CLK_TCK")  # what the system's stamp is rounded to
    assert before - tick <= began <= ready


def test_a_call_leaves_what_is_compiled_as_it_is():
    """In a process of its own: the first call imports what the others find there."""
    counted = """
import jax, jax.numpy as jnp
from flax_lstm import LSTMParams, lstm

double = jax.jit(lambda x: 2 * x)
double(jnp.ones(3))
lstm(LSTMParams(jnp.ones((3, 8)), jnp.ones((2, 8)), jnp.ones(8)), jnp.ones((4, 1, 3)))
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: compiled.append(event)
)
double(jnp.ones(3))
print([event for event in compiled if "backend_compile" in event])
"""
    done = subprocess.run(
        [sys.executable, "-c", counted], capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "[]\n", done.stdout + done.stderr
