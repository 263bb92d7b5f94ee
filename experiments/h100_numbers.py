"""Are the kernels right on the device? Values and gradients against float64.

Every case is drawn, computed by `implementation="pallas"` and by the scan in the same
dtype on the device, and in float64 by the scan on the host. So is inference, which runs
otherwise, where lengths, resets and reverse come together; more would not fit the time.
An error is the norm of the difference over the norm. A kernel may err at most twice as
much as the scan, and one rounding of the dtype more (of float32: of tf32): both sum in
another order.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax_lstm_kernels import gpu
from h100_targets import write_csv

from flax_lstm import LSTMParams, LSTMState, explain, lstm

VARIANTS = ("all", "plain", "lengths", "resets", "reverse")  # the most telling first


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape; odd sizes on purpose.

    Attributes:
      kernel: The kernel that the case is for; `ran` of a row is the one that is chosen.
      T: Steps.
      B: Rows.
      I: Input size.
      H: Units.
    """

    kernel: str
    T: int
    B: int
    I: int  # noqa: E741 the name of the axis everywhere in the project
    H: int

    @property
    def name(self) -> str:
        """Returns the kernel and H, as in a part of `h100.py`."""
        return f"{self.kernel}-{self.H}"


CASES = (
    Case("single", 36, 70, 20, 64),  # whose rows go through registers
    Case("single", 37, 136, 300, 128),  # whose rows are copied by TMA
    Case("single", 9, 3, 5, 100),  # whose rows are filled up
    Case("cluster", 21, 70, 64, 256),
    Case("cluster", 21, 33, 64, 512),
    Case("grid", 13, 40, 64, 1000),
    Case("grid", 101, 1, 64, 640),  # whose row is not filled up
    Case("step", 7, 40, 64, 2000),
)
DRY = ("single-64", "cluster-256")
# Of float32: the most that an operand errs when it is rounded to tf32, of 11 bits. Its
# results are not rounded, but the scan of a dry run multiplies without rounding.
ROUNDINGS = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-11}
DTYPES = tuple(ROUNDINGS)
ALL_OPTIONS = 4  # lengths, resets, reverse and keep_order


def numbers_rows(case: Case, dtype: str, variant: str) -> list[dict[str, Any]]:
    """Returns a row for each result and gradient of one case."""
    arrays, options = drawn(case, dtype, variant)
    told = explain(*arrays[:3], implementation="pallas", **options)
    plan = gpu.support("9.0", dtype, case.H, steps=case.T, rows=case.B).plan
    row = dataclasses.asdict(case) | {"ran": plan.kernel if plan else ""}
    row |= {"dtype": dtype, "variant": variant}
    if told.implementation is None:
        reason = told.reasons["pallas"]
        return [row | {"quantity": "", "ok": "unable", "reason": reason}]
    wanted = in_float64(arrays, options)
    try:
        found = {name: results(name, arrays, options) for name in ("pallas", "scan")}
    except jax.errors.JaxRuntimeError as error:
        # The machine is had once: what the other cases give is worth having too.
        return [row | {"quantity": "", "ok": False, "reason": str(error)[:500]}]
    errors = {name: distances(got, wanted) for name, got in found.items()}
    slack = ROUNDINGS[dtype]
    return [
        row
        | {
            "quantity": quantity,
            "error": error,
            "scan_error": errors["scan"][quantity],
            "ok": bool(error <= 2 * errors["scan"][quantity] + slack),
            "reason": "",
        }
        for quantity, error in errors["pallas"].items()
    ]


def drawn(case: Case, dtype: str, variant: str) -> tuple[tuple, dict[str, Any]]:
    """Returns `(params, inputs, state, cotangents)` and the options of a call."""
    rng = np.random.default_rng([case.T, case.B, case.H])
    bound = case.H**-0.5

    def array(*shape: int, scale: float = 1.0) -> jax.Array:
        return jnp.asarray(scale * rng.standard_normal(shape), dtype)

    params = LSTMParams(
        array(case.I, 4 * case.H, scale=bound),
        array(case.H, 4 * case.H, scale=bound),
        array(4 * case.H, scale=bound),
    )
    state = LSTMState(
        array(case.B, case.H).astype(jnp.float32), array(case.B, case.H, scale=0.5)
    )
    cotangents = (
        LSTMState(array(case.B, case.H).astype(jnp.float32), array(case.B, case.H)),
        array(case.T, case.B, case.H),
    )
    options: dict[str, Any] = {}
    if variant in ("lengths", "all"):
        lengths = rng.integers(0, case.T + 1, case.B)
        lengths[0] = case.T  # few rows may all be drawn empty
        options["lengths"] = jnp.asarray(lengths, jnp.int32)
    if variant in ("resets", "all"):
        options["resets"] = jnp.asarray(rng.random((case.T, case.B)) < 0.1)
    if variant in ("reverse", "all"):
        options |= {"reverse": True, "keep_order": True}
    return (params, array(case.T, case.B, case.I), state, cotangents), options


def results(implementation: Any, arrays: tuple, options: dict[str, Any]) -> Any:
    """Returns the final state and outputs, and the gradients of all arguments.

    And with all options state and outputs where nothing is kept for a derivative.
    """
    params, inputs, state, cotangents = arrays

    def run(params: Any, inputs: Any, state: Any) -> Any:
        return lstm(params, inputs, state, implementation=implementation, **options)

    @jax.jit
    def both(params: Any, inputs: Any, state: Any, cotangents: Any) -> Any:
        values, transpose = jax.vjp(run, params, inputs, state)
        return values, transpose(cotangents)

    found = both(params, inputs, state, cotangents)
    if len(options) == ALL_OPTIONS:
        found = *found, jax.jit(run)(params, inputs, state)
    return jax.device_get(found)


def in_float64(arrays: tuple, options: dict[str, Any]) -> Any:
    """Returns `results` by the scan in float64 on the host."""
    host = jax.devices("cpu")[0]
    with jax.enable_x64(True), jax.default_device(host):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), arrays)
        near = jax.tree.map(
            lambda x: x if isinstance(x, bool) else jnp.asarray(np.asarray(x)), options
        )
        return results("scan", wide, near)


def distances(got: Any, wanted: Any) -> dict[str, float]:
    """Returns the error of every result and gradient, by name."""
    (state, outputs), (params, inputs, first), *inference = got
    (want_state, want_outputs), (want_params, want_inputs, want_first), *_ = wanted
    pairs = {
        "outputs": (outputs, want_outputs),
        "final_c": (state.c, want_state.c),
        "final_h": (state.h, want_state.h),
        "d_kernel": (params.kernel, want_params.kernel),
        "d_recurrent_kernel": (params.recurrent_kernel, want_params.recurrent_kernel),
        "d_bias": (params.bias, want_params.bias),
        "d_inputs": (inputs, want_inputs),
        "d_c": (first.c, want_first.c),
        "d_h": (first.h, want_first.h),
    }
    for state, outputs in inference:
        pairs["inference_outputs"] = outputs, want_outputs
        pairs["inference_c"] = state.c, want_state.c
        pairs["inference_h"] = state.h, want_state.h
    return {name: distance(*pair) for name, pair in pairs.items()}


def distance(got: Any, wanted: Any) -> float:
    """Returns the norm of the difference over the norm."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return float(np.linalg.norm(got - wanted) / max(np.linalg.norm(wanted), 1e-30))


def numbers_part(name: str, out: Path, dry: bool) -> list[dict[str, Any]]:
    """Judges a case; returns the rows that are wrong.

    What could not be computed counts as wrong, but for a dry run: no interpreter runs
    all kernels.

    Args:
      name: Of the case.
      out: Folder of `numbers-NAME.csv`.
      dry: Takes few steps and rows, of those that the interpreter has done in a minute.
    """
    if dry and name not in DRY:
        print(f"{name}: too large to be interpreted here")
        return []
    (case,) = (case for case in CASES if case.name == name)
    if dry:
        case = dataclasses.replace(case, T=3, B=3, I=5)
    rows = []
    for variant, dtype in itertools.product(
        VARIANTS[:1] if dry else VARIANTS, DTYPES[-1:] if dry else DTYPES
    ):
        rows += (new := numbers_rows(case, dtype, variant))
        write_csv(out / f"numbers-{name}.csv", rows)
        told = {row["reason"] or f"{row['error']:.1e}" for row in new}
        print(case, dtype, variant, *sorted(told)[-1:], flush=True)
    fine = (True, "unable") if dry else (True,)
    return [row for row in rows if row["ok"] not in fine]
