"""Has JAX run the GPU's kernels, as they are compiled for an H100, by `machine.py`.

All else of a program runs on the CPU. Needs the environment of
`compile_for_hopper.environment`, that is, a process of its own.
"""

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src.interpreters import mlir
from jax._src.pallas import mpmd
from jax.experimental.mosaic.gpu import core as mosaic_core

from emulator.host import Launched, launched
from emulator.machine import Machine
from emulator.text import Program, program


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel: its name, its program, and how it is launched."""

    name: str
    program: Program
    launched: Launched

    def run(self, arrays: list[np.ndarray], order: str, seed: int) -> None:
        """Runs it on these arguments, bytes, and writes its results into them."""
        launch, parameters = self.launched
        with np.errstate(all="ignore"):
            Machine(
                self.program, launch, arrays, parameters, order=order, seed=seed
            ).run()


class Calls:
    """The kernels of a program, and how they are to be run.

    Attributes:
      order: See `Machine`, as for the next.
      seed: Of the order in which threads take turns.
      changed: What is done to a kernel before it is run.
      ran: Name of each kernel that was run, in order.
    """

    def __init__(self, place: Any, dump: Path) -> None:
        self.place, self.dump, self.order, self.seed = place, dump, "any", 0
        self.kernels: dict[str, Kernel] = {}
        self.changed: Callable[[Kernel], Kernel] = lambda kernel: kernel
        self.ran: list[str] = []

    def kernel(self, module: Any, avals: Any, results: Any) -> Kernel:
        """Compiles a module of Mosaic for an H100, and reads what came of it."""
        for old in self.dump.iterdir():
            old.unlink()
        like = [
            jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=self.place) for a in avals
        ]

        def call(*arguments: Any) -> Any:
            return mosaic_core.mosaic_gpu_p.bind(
                *arguments, module=module, out_types=results, inout_types=()
            )

        lowered = jax.jit(call).lower(*like)
        # The compiler knows a kernel by it, and does not make the same twice.
        (known,) = re.findall(r'kernel_hash = "([^"]*)"', lowered.as_text())
        if known not in self.kernels:
            lowered.compile()
            (ptx,) = self.dump.glob("*.ptx")
            passes = ptx.with_suffix(".mlir-passes.log")
            self.kernels[known] = Kernel(
                ptx.stem,
                program(ptx.read_text()),
                launched(passes.read_text(errors="replace")),
            )
        return self.kernels[known]

    def rule(
        self,
        context: Any,
        *arguments: Any,
        module: Any,
        out_types: Any,
        inout_types: Any = (),
        input_output_aliases: Any = (),
        **others: Any,
    ) -> Any:
        """Stands in for the rule that hands a module to a GPU."""
        if inout_types or any(others.values()):
            raise NotImplementedError(f"a call with {inout_types} and {others}")
        kernel = self.kernel(module, context.avals_in, tuple(out_types))
        results = [(a.shape, a.dtype) for a in context.avals_out]
        aliases = {out: into for into, out in input_output_aliases}

        def call(*given: Any) -> Any:
            inputs = [np.array(value) for value in given]
            made = [
                inputs[aliases[k]] if k in aliases else np.full(shape, 0, dtype)
                for k, (shape, dtype) in enumerate(results)
            ]
            for k, array in enumerate(made):
                if k not in aliases:
                    array.reshape(-1).view("u1")[:] = 0xFF
            arrays = [array.reshape(-1).view("u1") for array in (*inputs, *made)]
            self.ran.append(kernel.name)
            self.changed(kernel).run(arrays, self.order, self.seed)
            return tuple(made)

        like = [jax.ShapeDtypeStruct(*result) for result in results]
        lower = mlir.lower_fun(
            partial(jax.pure_callback, call, like), multiple_results=True
        )
        module = context.module_context.replace(platforms=("cpu",))
        return lower(context.replace(module_context=module), *arguments)

    def kernel_call(self, context: Any, *arguments: Any, **options: Any) -> Any:
        """Lowers a call of a kernel as for a GPU."""
        module = context.module_context.replace(platforms=("cuda",))
        of_gpu = context.replace(module_context=module)
        # JAX 0.10 has one rule for all platforms; later ones, another for a GPU.
        common = mpmd._mpmd_map_fallback_lowering
        rule = getattr(mpmd, "_mpmd_map_mgpu_lowering", common)
        return rule(of_gpu, *arguments, **options)


def emulate(place: Any, dump: Path) -> Calls:
    """Has what is traced from now on run its GPU kernels by the machine.

    Args:
      place: Sharding of a device that is not there, for the compiler.
      dump: Folder in which the compiler lists what it makes.
    """
    calls = Calls(place, dump)
    mlir.register_lowering(mpmd.mpmd_map_p, calls.kernel_call, platform="cpu")
    mosaic_core._mosaic_gpu_lowering_rule = calls.rule
    return calls
