"""Runs problems of the Hopper kernels, or other programs for a GPU, as compiled.

    python -m emulator.run ASKED

In the environment that `test_emulated.py` makes. ASKED is JSON, a list of what follows;
for each a line is printed, with what was wrong.

    {"kernel", "dtype", "shape": [T, B, I, H], "reverse", "order", "seed", "without"}

Kernel    Of `gpu.plan.PLANNERS`; values of training and inference and all gradients
          are judged as `gpu_problems.py` does. Or "matmul": a product that JAX comes
          with, at `shape` [M, N, K, tile of K].
Order     See `machine.py`; and seed.
Without   What is to be taken out of the kernels, of `MISSING`, or "".
"""

import dataclasses
import importlib
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_problems
import jax
import jax.numpy as jnp
import reference
from flax_lstm_kernels.gpu.plan import PLANNERS, Sizes

from emulator.calls import Calls, Kernel, emulate
from emulator.text import Instruction

Edit = Callable[[Instruction], Instruction | None]


def without(kernel: Kernel, edit: Edit) -> Kernel:
    """Returns a kernel whose instructions are changed, or left out where None."""
    kept, places = [], [0]
    for made in kernel.program.instructions:
        changed = edit(made)
        kept += [changed] if changed else []
        places.append(len(kept))
    labels = {name: places[at] for name, at in kernel.program.labels.items()}
    program = kernel.program._replace(instructions=kept, labels=labels)
    return dataclasses.replace(kernel, program=program)


def named(*names: str) -> Edit:
    """Leaves out the instructions of these names."""
    return lambda made: None if set(names) <= {made.name, *made.kinds} else made


def no_wait_for_copies(made: Instruction) -> Instruction:
    """Has what waits at an mbarrier go on at once."""
    if "try_wait" not in made.kinds:
        return made
    holds = made.operands[0]
    return Instruction("setp", ("eq", "u32"), (holds, "0", "0"), "", False, made.text)


def other_order(made: Instruction) -> Instruction:
    """Takes the first operand of a product of 16 bits as if it lay the other way."""
    if "mma_async" not in made.kinds or made.kinds[-1] == "tf32":
        return made
    *rest, of_a, of_b = made.operands
    return made._replace(operands=(*rest, str(1 - int(of_a)), of_b))


def unswizzled(kernel: Kernel) -> Kernel:
    """Has the copies of a kernel not swizzle, where its products expect it."""
    parameters = [
        {at: of._replace(bits=0) for at, of in value.items()}
        if isinstance(value, dict)
        else value
        for value in kernel.launched.parameters
    ]
    launched = kernel.launched._replace(parameters=parameters)
    return dataclasses.replace(kernel, launched=launched)


MISSING: dict[str, Callable[[Kernel], Kernel]] = {
    "": lambda kernel: kernel,
    "waits for copies": lambda kernel: without(kernel, no_wait_for_copies),
    "waits for products": lambda kernel: without(kernel, named("wgmma", "wait_group")),
    "waits for stores": lambda kernel: without(kernel, named("cp", "wait_group")),
    "fences": lambda kernel: without(kernel, named("fence", "proxy", "async")),
    "order of operands": lambda kernel: without(kernel, other_order),
    "swizzles": unswizzled,
}


def lstm(asked: dict[str, Any], calls: Calls) -> None:
    """Runs and judges a problem of an LSTM.

    Raises:
      AssertionError: If a result is wrong.
    """
    steps, rows, _, hidden = asked["shape"]
    dtype, reverse = asked["dtype"], asked["reverse"]
    sizes = Sizes(
        "backward", steps, rows, hidden, jnp.dtype(dtype).itemsize, resets=True
    )
    plan, of_inference = (
        PLANNERS[asked["kernel"]](of)
        for of in (sizes, sizes._replace(which="forward", keep=False))
    )
    if isinstance(plan, str) or isinstance(of_inference, str):
        raise NotImplementedError(plan)
    given = gpu_problems.problem(tuple(asked["shape"]), dtype)
    bars = gpu_problems.BARS["tf32" if dtype == "float32" else dtype]
    options = {"reverse": reverse, "interpret": False}
    got = gpu_problems.run(given, plan, **options)
    gpu_problems.judge(given, got, reverse=reverse, bars=bars)
    inference = gpu_problems.run(given, of_inference, keep=False, **options)
    got = got._replace(values=inference.values)
    gpu_problems.judge(given, got, reverse=reverse, bars=bars)
    if len(calls.ran) < 3:
        raise AssertionError(f"only {calls.ran} were run")


def matmul(asked: dict[str, Any], calls: Calls) -> None:
    """Runs and judges JAX's own product for Hopper, which GPUs are known to run.

    Raises:
      AssertionError: If it is wrong.
    """
    from jax.experimental.pallas.ops.gpu import hopper_matmul_mgpu as ops

    ops.get_num_sms = lambda: 2  # of the device, which is not there
    m, n, k, tile_k = asked["shape"]
    keys = jax.random.split(jax.random.key(4))
    a = jax.random.normal(keys[0], (m, k), asked["dtype"])
    b = jax.random.normal(keys[1], (k, n), asked["dtype"])
    found = ops.matmul(a, b, None, ops.TuningConfig(64, 64, tile_k, 2))
    want = reference.f64(a) @ reference.f64(b)
    # float32 sums, rounded once.
    assert reference.error(found, want) < float(jnp.finfo(asked["dtype"]).eps), "a @ b"
    assert len(calls.ran) == 1


def main() -> None:
    place = importlib.import_module("compile_for_hopper").sharding("h100")
    dump = Path(os.environ["MOSAIC_GPU_DUMP_TO"])
    calls = emulate(place, dump)
    for asked in json.loads(sys.argv[1]):
        calls.order, calls.seed = asked["order"], asked["seed"]
        calls.changed, calls.ran = MISSING[asked["without"]], []
        jax.clear_caches()
        wrong = ""
        try:
            (matmul if asked["kernel"] == "matmul" else lstm)(asked, calls)
        except (AssertionError, jax.errors.JaxRuntimeError) as error:
            wrong = re.sub(r"\s+", " ", str(error))[-500:] or "wrong"
        print(json.dumps({"wrong": wrong, "ran": calls.ran}), flush=True)


if __name__ == "__main__":
    main()
