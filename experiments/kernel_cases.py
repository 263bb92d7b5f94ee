"""The kernels and shapes that `compile_kernels.py` compiles, one row each.

To add a kernel, or a shape of one, add a row to `TPU` or `HOPPER` below, run
`python experiments/compile_kernels.py --only TARGET --kernel TEXT --write`, and commit
`kernels/budgets.csv` with it. The first word or two of a row say what is called:

    forward, backward      functions of `flax_lstm_kernels.tpu`, with `keep=True`
    inference              the former with `keep=False`
    NAME forward           `flax_lstm_kernels.gpu.forward` with `keep=True`, what
                           training runs, by the plan that `PLANNERS[NAME]` of
                           `flax_lstm_kernels.gpu.plan` makes
    NAME inference         the same with `keep=False`
    NAME backward          `flax_lstm_kernels.gpu.backward`, likewise
    project                `project` of `flax_lstm_kernels.gpu.project`

All but the last are called with lengths and resets.

Axes     T time, B batch, I input size, H hidden size, G = 4H.
"""

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel at one shape; see the file's head for `kernel`."""

    kernel: str
    dtype: str
    T: int
    B: int
    I: int  # noqa: E741 the name of the axis everywhere in the project
    H: int

    @property
    def computes(self) -> str:
        """Returns "forward", "inference", "backward" or "project"."""
        return self.kernel.split()[-1]


def cases(
    kernels: tuple[str, ...], shapes: tuple[tuple[str, tuple[int, ...]], ...]
) -> list[Case]:
    """Returns every kernel at every shape `(dtype, (T, B, I, H))`."""
    return [
        Case(kernel, dtype, *shape) for dtype, shape in shapes for kernel in kernels
    ]


TPU = [
    # Sizes at which weights stay, and are streamed, on some target or other.
    *cases(
        ("forward", "backward"),
        (
            ("bfloat16", (1024, 16, 256, 256)),
            ("float32", (40, 3, 5, 130)),  # nothing fits the lanes
            ("bfloat16", (244, 256, 300, 128)),
            ("bfloat16", (64, 64, 512, 512)),
            ("bfloat16", (128, 128, 1024, 1024)),
            ("bfloat16", (64, 64, 256, 2048)),
            ("float32", (64, 64, 256, 2048)),
        ),
    ),
    # Inputs that are read, and outputs that are written, in other orders.
    *cases(
        ("inference",),
        (
            ("bfloat16", (244, 256, 300, 128)),
            ("float32", (64, 256, 100, 128)),
            ("bfloat16", (244, 256, 128, 64)),
        ),
    ),
]

HOPPER = [
    # The layers of the tutorial; two eights of rows; as many rows as one SM can take at
    # once; float32, multiplied as tf32.
    *cases(
        ("single forward", "single inference", "single backward"),
        (
            ("bfloat16", (244, 256, 300, 128)),
            ("bfloat16", (244, 256, 128, 64)),
            ("float16", (128, 2000, 128, 128)),
            ("bfloat16", (32, 8192, 64, 64)),
            ("float32", (244, 256, 128, 64)),
        ),
    ),
    # To 256 units: JAX 0.10 has no clusters of more than 8 blocks.
    *cases(
        ("cluster forward", "cluster inference", "cluster backward"),
        (
            ("bfloat16", (1024, 16, 256, 256)),
            ("bfloat16", (512, 64, 200, 192)),
            ("float32", (64, 64, 256, 256)),
        ),
    ),
    # Rows and units of no whole tile, which are read and written where they lie.
    *cases(
        ("single inference",),
        (
            ("bfloat16", (64, 250, 128, 100)),
            ("float16", (128, 2001, 128, 128)),
            ("bfloat16", (244, 1, 128, 128)),
        ),
    ),
    *cases(("cluster inference",), (("bfloat16", (64, 64, 256, 200)),)),
    *cases(("grid inference",), (("float32", (64, 9, 256, 700)),)),
    *cases(("step inference",), (("bfloat16", (64, 64, 256, 2000)),)),
    *cases(
        ("grid forward", "grid backward"),
        (
            ("bfloat16", (1024, 128, 1024, 1024)),  # chunks are fetched again
            ("float16", (2048, 1, 1024, 1024)),
            ("bfloat16", (64, 16, 256, 1280)),
            ("float32", (64, 64, 512, 512)),
        ),
    ),
    # The row as it is, and filled up.
    *cases(
        ("grid inference",),
        (("bfloat16", (2048, 1, 1024, 1024)), ("float16", (244, 5, 300, 512))),
    ),
    *cases(
        ("step forward", "step backward"),
        (
            ("bfloat16", (64, 64, 256, 2048)),
            ("float32", (40, 3, 5, 1100)),  # nothing fits the tiles
        ),
    ),
    # Inputs of whole 8 bytes a row, of whole 16, and of 2; and one row.
    *cases(
        ("project",),
        (
            # Not as long as those of `single` and `grid`, which are not compiled again.
            ("bfloat16", (200, 256, 300, 128)),
            ("float32", (244, 256, 300, 128)),
            ("bfloat16", (64, 20, 33, 128)),
            ("bfloat16", (1000, 1, 1024, 1024)),
            # Weights through registers.
            ("bfloat16", (60, 250, 300, 100)),
            ("float32", (60, 250, 300, 100)),
        ),
    ),
]


def functions(
    case: Case, module: Any, sharding: Any, **options: Any
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns the function of a case, and the shapes of its arguments.

    Args:
      case: What is to run.
      module: Where its `forward` and `backward` are.
      sharding: Of all arguments; names the device.
      **options: Further keyword arguments of the function.
    """
    import jax
    import jax.numpy as jnp

    steps, rows, hidden = case.T, case.B, case.H
    dtype = jnp.dtype(case.dtype)

    def like(*shape: int, dtype: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    if case.computes == "project":
        return projection(case, like)

    def forward(*arrays: Any) -> Any:
        keep = case.computes != "inference"
        return module.forward(*arrays, reverse=False, keep=keep, **options)

    def chosen(*arrays: Any) -> Any:
        return module.forward(*arrays, reverse=False, keep=True)

    def backward(*arrays: Any) -> Any:
        return module.backward(*arrays, reverse=False, **options)

    c = like(rows, hidden, dtype=jnp.float32)
    recurrent_kernel = like(hidden, 4 * hidden)
    masks = like(rows, dtype=jnp.int32), like(steps, rows, dtype=jnp.uint8)
    x, kernel = like(steps, rows, case.I), like(case.I, 4 * hidden)
    h, bias = like(rows, hidden), like(4 * hidden)
    arguments = x, kernel, recurrent_kernel, bias, c, h, *masks
    if case.computes != "backward":
        return forward, arguments
    # The forward decides in which dtype it keeps.
    hs, *_, gates, before = (
        like(*of.shape, dtype=of.dtype) for of in jax.eval_shape(chosen, *arguments)
    )
    return backward, (hs, c, c, gates, before, recurrent_kernel, *masks)


def least_steps(case: Case) -> int:
    """Returns the least steps of a projection."""
    from flax_lstm_kernels.gpu.pieces import last_steps

    return last_steps(case.T, case.B, case.H, 2)


def projection(
    case: Case, like: Callable[..., Any]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns what `functions` does, of the projection of inputs."""
    import jax
    import jax.numpy as jnp
    from flax_lstm_kernels import compat
    from flax_lstm_kernels.gpu import project, project_operands
    from flax_lstm_kernels.gpu.pieces import held_sizes
    from flax_lstm_kernels.gpu.plan import Plan

    rows, units = held_sizes(case.T, (case.B, case.H), Plan("grid", 8, 2))

    def run(x: Any, kernel: Any, bias: Any, planes: Any, now: Any) -> Any:
        ref = compat.in_place(planes)
        weights = project_operands.weights_of_inputs(
            kernel, bias, (rows, units), x.dtype
        )
        options = {"rows": rows, "least": least_steps(case)}
        project.project(x, weights, ref, now, **options)
        return jax.freeze(ref)

    gates, planes = 4 * case.H, like(case.T * rows, units)
    x, now = like(case.T, case.B, case.I), like(3, dtype=jnp.int32)
    return run, (x, like(case.I, gates), like(gates), planes, now)


def lowered(case: Case, module: Any, sharding: Any, **options: Any) -> Any:
    """Lowers a case, given as to `functions`, for its compiler to be run on."""
    import jax

    function, arguments = functions(case, module, sharding, **options)
    return jax.jit(function).lower(*arguments)
