"""Every implementation that is here gives our numbers; one that does not is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_lstm_kernels.target import on

from flax_lstm.bench import suite
from flax_lstm.bench.peers import catalogue, flax_peers, own, torch_peers
from flax_lstm.bench.peers.base import (
    Implementation,
    OnJax,
    heeded,
    needs,
    never_missing,
    prepare_on_jax,
)
from flax_lstm.bench.problem import draw_problem
from flax_lstm.bench.shapes import Shape

pytestmark = pytest.mark.usefixtures("hurried")

LENGTHS = Shape("lengths", 4, 20, 3, 5, "", lengths="stocktwits")
RESETS = Shape("resets", 4, 6, 5, 5, "", reset=0.3)
FOUND = catalogue.implementations()
OURS = ("ours", "ours-scan", "ours-xla")
HERE = (*OURS, "linen-optimized", "linen-plain", "nnx-optimized", "nnx-plain")
OTHERS = ("haiku", "equinox", "keras", "torch", "torch-packed")
HEED_LENGTHS = {*HERE, "keras", "torch-packed"}
HEED_RESETS = {*OURS, "haiku"}
each_one = pytest.mark.parametrize(
    "name", [*HERE, *(pytest.param(n, marks=pytest.mark.parity) for n in OTHERS)]
)


def row_of(name: str, shape: Shape, mode: str, dtype: str = "float32") -> dict:
    """The row of one implementation; skips where its library is not here."""
    if reason := FOUND[name].missing():
        pytest.skip(reason)
    (row,) = run([FOUND[name]], shape, mode, dtype)
    return row


def run(contenders: list, shape: Shape, mode: str, dtype: str = "float32") -> list:
    timing = {"rounds": 1, "budget_s": 0.0, "pause_s": 0.0}
    return suite.run_case(shape, mode, dtype, contenders, seed=0, common={}, **timing)


@each_one
@pytest.mark.parametrize("mode", ["forward", "gradient"])
def test_outputs_and_gradients_pass_the_check_on_unequal_lengths(name, mode):
    row = row_of(name, LENGTHS, mode)
    assert row["status"] == "timed", row["reason"]
    assert row["lengths"] == ("yes" if name in HEED_LENGTHS else "padded")
    assert row["resets"] == "-"
    # Sums of a dozen terms over twenty steps; the tolerance is a hundred times this.
    assert row["error"] < 2e-6
    assert row["tokens"] == np.sum(LENGTHS.draw_lengths(0))


def test_ours_say_what_they_need():
    can = {name: one.missing() for name, one in FOUND.items() if "ours" in name}
    assert can["ours"] is can["ours-scan"] is can["ours-xla"] is None
    if jax.default_backend() == "cpu":
        assert "CUDA device" in can["ours-cudnn"]
        assert "no kernel for" in can["ours-pallas"]
    # An H100's kernels take float32 where tf32 is allowed, and 16 bits anywhere.
    with on("cuda", "9.0"), jax.default_matmul_precision("highest"):
        assert FOUND["ours-pallas"].missing() is None


@each_one
def test_rows_say_who_heeds_resets(name):
    row = row_of(name, RESETS, "gradient")
    if name == "torch-packed":
        assert (row["status"], row["reason"][:18]) == ("unable", "all rows are of on")
        return
    assert row["status"] == "timed", row["reason"]
    assert row["resets"] == ("yes" if name in HEED_RESETS else "ignored")
    assert row["error"] < 2e-6


@each_one
def test_bfloat16_passes_or_is_refused_with_a_reason(name):
    row = row_of(name, LENGTHS, "gradient", "bfloat16")
    assert row["status"] == "timed", row["reason"]
    # Rounded to 8 bits somewhere on the way, or it is not bfloat16.
    assert 1e-4 < row["error"] < 0.1


@pytest.mark.parametrize(
    "name",
    [
        *HERE,
        "ours-cell",
        *(
            pytest.param(n, marks=pytest.mark.parity)
            for n in ("haiku", "equinox", "keras", "torch", "torch-cell")
        ),
    ],
)
def test_one_step_is_right(name):
    row = row_of(name, RESETS, "step")
    assert row["status"] == "timed", row["reason"]
    assert (row["steps"], row["tokens"]) == (1, RESETS.batch)
    assert row["error"] < 2e-6


@pytest.mark.parametrize(("mode", "array"), [("forward", "y"), ("gradient", "")])
def test_wrong_numbers_are_listed_and_not_timed(mode, array):
    """The gates i and f change places."""

    def prepare(problem):
        def swapped(params, x, h, c, lengths, resets):
            blocks = [jnp.split(leaf, 4, axis=-1) for leaf in params]
            i_f = [jnp.concatenate([f, i, g, o], -1) for i, f, g, o in blocks]
            return forward(type(params)(*i_f), x, h, c, lengths, resets)

        return prepare_on_jax(
            problem, OnJax(swapped, problem.params, own.as_params, lengths=True)
        )

    def forward(params, x, h, c, lengths, resets):
        from flax_lstm import LSTMState, lstm

        state, y = lstm(params, x, LSTMState(c, h), lengths=lengths)
        return y, state.h, state.c

    one = Implementation("swapped", "jax", "", never_missing, prepare)
    (row,) = run([one], LENGTHS, mode)
    assert row["status"] == "wrong"
    assert f"{array}" in row["reason"]
    assert row["error"] > 0.01
    assert "median_ms" not in row


def test_a_wrong_gradient_behind_right_outputs_is_found():
    def prepare(problem):
        def forward(params, x, h, c, lengths, resets):
            from flax_lstm import LSTMState, lstm

            params = params._replace(kernel=jax.lax.stop_gradient(params.kernel))
            state, y = lstm(params, x, LSTMState(c, h), lengths=lengths)
            return y, state.h, state.c

        return prepare_on_jax(
            problem, OnJax(forward, problem.params, own.as_params, lengths=True)
        )

    one = Implementation("no gradient", "jax", "", never_missing, prepare)
    (forward,) = run([one], LENGTHS, "forward")
    (gradient,) = run([one], LENGTHS, "gradient")
    assert forward["status"] == "timed"
    assert gradient["status"] == "wrong"
    assert gradient["reason"].startswith("kernel is off by 1.0e+00")


def test_failures_and_refusals_of_a_library_end_no_run():
    def fails(problem):
        raise RuntimeError("deep inside\nand much more")

    def unable(problem):
        raise NotImplementedError("no such thing")

    one = Implementation("one", "jax", "", never_missing, fails)
    other = Implementation("other", "jax", "", never_missing, unable)
    gone = Implementation("gone", "jax", "", needs("no_such_module"), unable)
    rows = run([one, other, gone, FOUND["ours"]], LENGTHS, "forward")
    assert [(row["status"], row["reason"]) for row in rows[:3]] == [
        ("failed", "RuntimeError: deep inside"),
        ("unable", "no such thing"),
        (
            "missing",
            "no_such_module is not installed: pip install 'flax-lstm[bench]'",
        ),
    ]
    assert rows[3]["status"] == "timed"


def test_ours_says_which_implementation_the_default_is():
    row = row_of("ours", LENGTHS, "forward")
    assert row["reason"].startswith('runs "')
    row = row_of("ours-cudnn", LENGTHS, "forward")
    assert row["status"] == "unable"
    assert "CUDA" in row["reason"]


def test_lengths_of_the_problem_reach_the_layer():
    """Outputs in the padding are zero in ours, and are not in Flax."""
    problem = draw_problem(LENGTHS, "forward", "float32", 0)
    ours = own.prepare("scan", problem)
    theirs = flax_peers.prepare_linen("plain", problem)
    padding = ~problem.live
    assert not np.any(ours.numbers(ours.call()).y[padding])
    assert np.any(theirs.numbers(theirs.call()).y[padding])


def test_the_smoke_run_s_names_exist():
    assert set(catalogue.SMOKE) <= set(FOUND)


@pytest.mark.parametrize(
    ("asked", "can", "said"),
    [(None, True, "-"), ([1], True, "yes"), ([1], False, "no")],
)
def test_what_a_row_says(asked, can, said):
    assert heeded(asked, can, "no") == said


def test_a_reader_is_told_of_what_torch_makes_float32_products():
    assert torch_peers.products("cuda", "float32", True) == "products of tf32"
    assert "whole float32" in torch_peers.products("cuda", "float32", False)
    for device, dtype in (("cpu", "float32"), ("cuda", "bfloat16")):
        assert torch_peers.products(device, dtype, True) == ""
