"""Where the versions of JAX differ in Pallas for GPUs; every test of a version is here.

Tried with 0.10.2, 0.11.2 and 0.12.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

# Public from 0.11.
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

NEW_LOADS = jax.__version_info__ >= (0, 11)

# Whether the interpreter knows layouts of registers and transposed operands of wgmma.
INTERPRETS_LAYOUTS = NEW_LOADS
# Blocks of a cluster: GPUs of every kind have 8, a Hopper 16, which 0.11 launches too.
MAX_CLUSTER = 16 if NEW_LOADS else 8

__all__ = [
    "INTERPRETS_LAYOUTS",
    "MAX_CLUSTER",
    "InterpretGPUParams",
    "in_place",
    "kernel",
    "load",
    "races_found",
    "store",
    "transposed",
    "watched",
]


def load(ref: Any, layout: Any) -> Any:
    """Loads a reference into registers of the layout, by whatever instructions do."""
    index = () if NEW_LOADS else ((),)
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def store(ref: Any, value: Any) -> None:
    """Stores registers of any layout to a reference, by whatever instructions do."""
    # Since 0.12, where an assignment wants the best ones.
    if (by_any := getattr(plgpu, "store", None)) is not None:
        by_any(ref, value, optimized=False)
    else:
        ref[...] = value


def transposed(ref: Any) -> Any:
    """Returns a view of a reference of two axes with the axes exchanged."""
    return ref.T if NEW_LOADS else plgpu.transpose_ref(ref, (1, 0))


def watched() -> InterpretGPUParams:
    """Returns the interpreter that fills memory with NaN and looks for races.

    It notes them for `races_found`, and goes on.
    """
    options: dict[str, Any] = {"uninitialized_memory": "nan", "detect_races": True}
    if jax.__version_info__ >= (0, 12):
        options["on_race"] = "warn"  # before, it always did
    return InterpretGPUParams(**options)


def races_found() -> bool:
    """Says whether the last kernel that was run by `watched` had a race."""
    # Not public in any version.
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    return gpu_callbacks.get_races().races_found


def in_place(array: Any) -> Any:
    """Returns a reference to an array for kernels to write, also in a loop of XLA.

    The interpreter of 0.10.2 wants it in global memory, the loops of 0.12 nowhere.
    """
    return jax.new_ref(array, memory_space=None if NEW_LOADS else plgpu.GMEM)


def kernel(
    body: Callable[..., None],
    *,
    out_type: Sequence[Any],
    scratch_types: Sequence[Any],
    interpret: Any = None,
    name: str,
    approx_math: bool = False,
    auto_barriers: bool = True,
    **mesh: Any,
) -> Callable[..., Any]:
    """Makes a kernel of `body(*operands, *outputs, *scratch)`; `plgpu.kernel` in short.

    Operands may be arrays, which are only read, and `jax.new_ref`s in `plgpu.GMEM`,
    which the kernel also writes, in place. (`plgpu.kernel` of 0.10.2 takes no refs.)

    Args:
      body: What every warpgroup runs.
      out_type: Shape and dtype of each output.
      scratch_types: Shared memory and barriers of a block.
      interpret: Runs on any device by Pallas' interpreter: True, or its parameters.
      name: Of the kernel, in profiles.
      approx_math: Uses the hardware's `tanh` and `exp`, of 11 bits or so.
      auto_barriers: Has Pallas put a barrier around every access to shared memory.
      **mesh: grid, grid_names, cluster, cluster_names, num_threads, thread_name.
    """
    if interpret is True:
        interpret = InterpretGPUParams()

    def with_scratch(*refs: Any) -> None:
        pl.run_scoped(
            lambda *scratch: body(*refs, *scratch),
            *scratch_types,
            collective_axes=mesh.get("thread_name") or (),
        )

    return pl.kernel(
        with_scratch,
        out_type=out_type,
        mesh=plgpu.Mesh(**mesh),
        compiler_params=plgpu.CompilerParams(
            approx_math=approx_math,
            unsafe_no_auto_barriers=not auto_barriers,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        interpret=interpret or False,
        name=name,
    )
